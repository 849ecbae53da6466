//! A row's results depend on nothing but the row: not on the batch, the threads, or how its tokens
//! were cut into calls. Bit for bit.

mod common;

use std::sync::Arc;

use common::{FAMILIES, Runner, load, sampling, target_at, tiny, tokens};
use headstart_engine::executor::{Found, Probe, Row};
use headstart_engine::model::{Model, WeightDtype};
use headstart_engine::{Sampling, TokenId};

fn models() -> impl Iterator<Item = (&'static str, Arc<Model>)> {
    FAMILIES.into_iter().map(|name| (name, load(&tiny(name), WeightDtype::Auto)))
}

/// Scores of a text, read in calls of the given lengths.
fn scores(runner: &mut Runner, text: &[TokenId], cuts: &[usize]) -> Vec<Found> {
    let mut sequence = runner.sequence(&[], &Sampling::default());
    let mut all = Vec::new();
    let mut start = 0;
    for len in cuts.iter().copied().cycle() {
        let end = (start + len).min(text.len());
        sequence.tokens.extend_from_slice(&text[start..end]);
        let probes: Vec<Probe> = (start..end)
            .map(|i| Probe { top: 3, ..target_at(i, text.get(i + 1).copied().unwrap_or(7)) })
            .collect();
        all.extend(runner.extend(&mut [(&mut sequence, probes)]).remove(0));
        start = end;
        if start == text.len() {
            return all;
        }
    }
    all
}

#[test]
fn a_text_read_in_pieces_scores_as_in_one() {
    for (name, model) in models() {
        let text = tokens(1, 100);
        let whole = scores(&mut Runner::new(&model, 2, 256), &text, &[100]);
        assert_eq!(whole.len(), text.len());
        for (threads, chunk, cuts) in [
            (1, 256, &[100][..]),
            (2, 256, &[1]),
            (2, 256, &[7, 1, 30]),
            (2, 5, &[100]),
            (1, 33, &[50]),
        ] {
            let pieces = scores(&mut Runner::new(&model, threads, chunk), &text, cuts);
            assert_eq!(whole, pieces, "{name}: {threads} threads, chunks of {chunk}, {cuts:?}");
        }
    }
}

#[test]
fn a_batch_of_eight_writes_what_each_writes_alone() {
    for (name, model) in models() {
        let prompts: Vec<Vec<TokenId>> = (0..8).map(|i| tokens(i, 1 + 9 * i as usize)).collect();
        let mut together = Runner::new(&model, 2, 64);
        let mut batch: Vec<_> = prompts
            .iter()
            .enumerate()
            .map(|(i, prompt)| together.sequence(prompt, &sampling(i as u64)))
            .collect();
        let batch_found = together.generate(&mut batch, 20);
        for (i, prompt) in prompts.iter().enumerate() {
            let mut alone = Runner::new(&model, 1, 256);
            let mut one = [alone.sequence(prompt, &sampling(i as u64))];
            let found = alone.generate(&mut one, 20);
            assert_eq!(one[0].tokens, batch[i].tokens, "{name}: sequence {i}");
            assert_eq!(found[0], batch_found[i], "{name}: sequence {i}");
        }
    }
}

#[test]
fn reading_decoding_and_checking_share_a_batch() {
    let (_, model) = models().next().expect("there are models");
    let text = tokens(4, 60);
    let alone = scores(&mut Runner::new(&model, 2, 256), &text, &[60]);
    let mut runner = Runner::new(&model, 2, 16);
    let mut decoding = runner.sequence(&tokens(5, 12), &sampling(2));
    let mut reading = runner.sequence(&text[..40], &Sampling::default());
    let mut decoded = Vec::new();
    for step in 0..3 {
        let from = reading.tokens.len() - if step == 0 { 40 } else { 10 };
        let probes = (from..reading.tokens.len())
            .map(|i| Probe { top: 3, ..target_at(i, text.get(i + 1).copied().unwrap_or(7)) })
            .collect();
        let sample = common::sample_at(decoding.tokens.len() - 1);
        let found = runner.extend(&mut [(&mut decoding, vec![sample]), (&mut reading, probes)]);
        decoded.push(found[0][0].sampled.expect("a sample was asked for").token);
        decoding.tokens.push(decoded[step]);
        assert_eq!(found[1], alone[from..reading.tokens.len()]);
        let next = (reading.tokens.len() + 10).min(60);
        let have = reading.tokens.len();
        if step < 2 {
            reading.tokens.extend_from_slice(&text[have..next]);
        }
    }
    let mut alone = Runner::new(&model, 1, 256);
    let mut one = [alone.sequence(&tokens(5, 12), &sampling(2))];
    alone.generate(&mut one, 3);
    assert_eq!(one[0].tokens[12..], decoded);
}

#[test]
fn a_batch_that_reaches_outside_is_refused() {
    let (_, model) = models().next().expect("there are models");
    let mut executor = Runner::new(&model, 1, 256).executor;
    let sampling = Sampling::default();
    let pages: Vec<_> = (0..2).map(headstart_engine::core::pages::PageId).collect();
    let context = tokens(1, 20);
    let probes = [target_at(19, 3)];
    let good = Row {
        context: &context,
        start: 0,
        pages: &pages,
        answer_start: 20,
        probes: &probes,
        sampling: &sampling,
        pending: None,
    };
    let long = tokens(1, 200);
    let many = [headstart_engine::core::pages::PageId(1); 20];
    let wrong_page = [headstart_engine::core::pages::PageId(9999); 2];
    let bad = [
        Row { start: 20, ..good },
        Row { pages: &pages[..1], ..good },
        Row { pages: &wrong_page, ..good },
        Row { context: &[96; 20], ..good },
        Row { probes: &[target_at(20, 3)], ..good },
        Row { probes: &[target_at(19, 96)], ..good },
        Row { probes: &[target_at(3, 3), target_at(3, 3)], ..good },
        Row { context: &long, pages: &many, ..good },
    ];
    for (i, row) in bad.into_iter().enumerate() {
        let error = executor.execute(&[good, row]).expect_err("a bad row was accepted");
        assert!(!error.fatal && error.message.starts_with("row 1: "), "case {i}: {error}");
    }
    assert_eq!(executor.execute(&[good]).expect("it is right").len(), 1);
}
