//! What is asked and answered while the host goes on, against what it waits for.

use super::*;
use crate::cuda::{AskRoom, Facts, Keep, Questions, SampleArgs};

#[test]
fn shared_memory_is_there_when_it_is_looked_at_and_not_before() {
    let device = device();
    let mut x = upload(&device, &[1.0, 2.0, 3.0]);
    let mut host = device.pinned::<f32>(4, "test data").expect("memory");
    host.wait_for().expect("nothing to wait for").copy_from_slice(&[10.0, 20.0, 30.0, 40.0]);
    device.write_pinned(&mut x, 1, &mut host, 2).expect("a copy");
    // The copy reads what was there when it was asked for, whenever it happens.
    host.wait_for().expect("a copy").fill(-1.0);
    device.read_pinned(&x, 0, &mut host, 1, 3).expect("a copy");
    assert_eq!(host.wait_for().expect("a copy"), [-1.0, 1.0, 10.0, 20.0]);
    device.read_pinned(&x, 2, &mut host, 0, 1).expect("a copy");
    drop(host);
    assert_eq!(read(&device, &x), [1.0, 10.0, 20.0]);
}

#[test]
fn a_mark_is_reached_when_the_work_before_it_is_done() {
    let device = device();
    let x = upload(&device, &[5.0]);
    let mut host = device.pinned::<f32>(1, "test data").expect("memory");
    device.read_pinned(&x, 0, &mut host, 0, 1).expect("a copy");
    device.timer().expect("an event").wait().expect("the copy");
    assert_eq!(host.wait_for().expect("a copy"), [5.0]);
}

fn sample(seed: u64, row: usize, penalties: (usize, usize)) -> SampleArgs {
    SampleArgs {
        seed,
        position: 3 * seed,
        temperature: if seed.is_multiple_of(4) { 0.0 } else { 0.9 },
        top_p: 0.9,
        min_p: 0.0,
        top_k: 40,
        row: row as u32,
        penalties: penalties.1 as u32,
        first_penalty: penalties.0 as u32,
        padding: 0,
    }
}

#[test]
fn many_questions_at_once_are_answered_as_one_by_one() {
    let (device, mut rng) = (device(), Rng::new(77));
    for (vocab, rows, at_once) in [(31, 1, 1), (1000, 7, 2), (5000, 40, 16)] {
        let logits = upload(&device, &rng.floats(rows * vocab, 8.0));
        let mut batch = batch(&mut rng, &vec![0; rows], rows, 16, 1);
        batch.probes = (0..rows as u32).collect();
        batch.targets = (0..rows).map(|i| (i * 5 % vocab) as u32).collect();
        batch.pending =
            (0..rows as u32).step_by(3).map(|row| (row, rows as u32 - 1 - row)).collect();
        let mut staged = staged(&device, &batch, vocab, rows, 16);
        let mut parts = upload(&device, &vec![0.0; Device::vocab_parts(rows, vocab)]);
        let mut found = upload(&device, &vec![0.0; 4 * rows]);
        device
            .vocab_stats(&logits, 0..vocab, rows, &staged, 0, &mut parts, &mut found)
            .expect("a launch");
        let mut questions = Questions { rows, ..Questions::default() };
        for row in (0..rows).filter(|row| row % 3 != 1) {
            let penalties = (questions.penalties.len(), row % 4);
            questions.penalties.extend((0..row % 4).map(|i| ((i * 7 % vocab) as u32, 0.5)));
            questions.samples.push(sample(row as u64 + 1, row, penalties));
        }
        questions.tops = (0..rows as u32).map(|row| (row, row % 5)).collect();
        questions.keep = (0..rows)
            .map(|row| {
                let sample = questions.samples.iter().position(|args| args.row == row as u32);
                let (at, drawn) = (sample.unwrap_or(row) as u32, sample.is_some());
                Keep { place: row as u32, at, drawn }
            })
            .collect();
        let mut room = AskRoom::new(&device, rows, vocab, at_once).expect("memory");
        let mut asked = device.pinned(questions.words(), "questions").expect("memory");
        let mut answers = device.pinned(questions.answer_words(), "answers").expect("memory");
        let mut kept = device.upload(&vec![u32::MAX; rows], "tokens").expect("memory");
        let (of, facts) = ((&logits, vocab), Facts { found: &found, ranks: 1, rows });
        device
            .ask(&questions, of, facts, &mut room, &mut asked, &mut answers, &mut kept)
            .expect("a launch");
        device.take_tokens(&mut staged, &kept).expect("a launch");
        let answers = questions.read(answers.wait_for().expect("answers"));

        assert_eq!(answers.facts, device.read_found(&found, rows).expect("a copy"));
        let mut work = upload(&device, &vec![0.0; rows * vocab]);
        let (args, penalties) = (&questions.samples, &questions.penalties);
        let drawn = device.sample(&logits, vocab, args, penalties, &mut work).expect("draws");
        assert_eq!(answers.samples, drawn);
        let tops = device.top_tokens(&logits, vocab, &questions.tops).expect("a launch");
        assert_eq!(answers.tops, tops);
        let chosen: Vec<u32> = (0..rows)
            .map(|row| match args.iter().position(|args| args.row == row as u32) {
                Some(sample) => drawn[sample].0,
                None => answers.facts[row].argmax,
            })
            .collect();
        let mut words = vec![0; rows];
        device.read(&kept, 0, &mut words).expect("a copy");
        assert_eq!(words, chosen);
        device.read(&staged.data, 0, &mut words).expect("a copy");
        for (row, token) in words.iter().enumerate() {
            let expected = if row % 3 == 0 { chosen[rows - 1 - row] } else { 0 };
            assert_eq!(*token, expected, "row {row} of {rows}");
        }
    }
}

#[test]
fn what_is_no_token_is_not_taken() {
    let device = device();
    let mut batch = batch(&mut Rng::new(1), &[0; 2], 2, 16, 1);
    (batch.tokens, batch.pending) = (vec![4, 5], vec![(1, 0)]);
    let mut staged = staged(&device, &batch, 10, 2, 16);
    let kept = device.upload(&[10], "tokens").expect("memory");
    device.take_tokens(&mut staged, &kept).expect("a launch");
    let mut words = vec![9; 2];
    device.read(&staged.data, 0, &mut words).expect("a copy");
    assert_eq!(words, [4, 0]);
}

/// What several ranks found, of which each has a part of the vocabulary: the greatest logit is the
/// earliest rank's that has it. Nothing is told, only kept; what is no number is nowhere the greatest.
#[test]
fn the_likeliest_token_of_several_ranks_is_kept() {
    let (none, nan) = (f32::NEG_INFINITY, f32::NAN);
    // Each rank's greatest logit, and who has the greatest of two and of three ranks.
    let rows = [
        ([3.0, 2.0, 1.0], [0, 0]),
        ([1.0, 3.0, 2.0], [1, 1]),
        ([1.0, 2.0, 3.0], [1, 2]),
        ([2.0, 2.0, 2.0], [0, 0]),
        ([1.0, 2.0, 2.0], [1, 1]),
        ([2.0, 1.0, 2.0], [0, 0]),
        ([-0.0, 0.0, -1.0], [0, 0]),
        ([none, none, none], [0, 0]),
        ([none, -9e9, none], [1, 1]),
        ([-3.0, nan, -2.0], [0, 2]),
    ];
    let device = device();
    for ranks in 1..=3 {
        let facts = (0..ranks).flat_map(|rank| {
            let token = move |row: usize| f32::from_bits((100 * rank + row) as u32);
            let maxima = rows.iter().enumerate();
            maxima.flat_map(move |(row, (maxima, _))| [token(row), maxima[rank], 0.0, nan])
        });
        let found = upload(&device, &facts.collect::<Vec<_>>());
        let keep = |row: usize| Keep { place: (2 * row) as u32, at: row as u32, drawn: false };
        let keep: Vec<Keep> = (0..rows.len()).map(keep).collect();
        let questions = Questions { keep, ..Questions::default() };
        let mut room = AskRoom::new(&device, 1, 1, 1).expect("memory");
        let mut asked = device.pinned(questions.words(), "questions").expect("memory");
        let mut answers = device.pinned(1, "answers").expect("memory");
        let mut kept = device.upload(&vec![7; 2 * rows.len()], "tokens").expect("memory");
        let (of, facts) = ((&found, 1), Facts { found: &found, ranks, rows: rows.len() });
        device
            .ask(&questions, of, facts, &mut room, &mut asked, &mut answers, &mut kept)
            .expect("a launch");
        let mut words = vec![0; 2 * rows.len()];
        device.read(&kept, 0, &mut words).expect("a copy");
        for (row, (words, (_, best))) in words.chunks(2).zip(&rows).enumerate() {
            let best = if ranks == 1 { 0 } else { best[ranks - 2] };
            assert_eq!(words, [100 * best + row as u32, 7], "row {row}, {ranks} ranks");
        }
        assert_eq!(answers.wait_for().expect("answers"), [0], "nothing is told");
    }
}
