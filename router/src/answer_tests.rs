use super::*;
use std::path::Path;

fn tokenizer() -> Tokenizer {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stories260k");
    Tokenizer::from_json(&std::fs::read(root.join("tokenizer.json")).unwrap()).unwrap()
}

/// One byte-fallback id a byte: the finest cut there is.
fn byte_ids(text: &str) -> Vec<u32> {
    text.bytes().map(|byte| u32::from(byte) + 3).collect()
}

fn run(source: Source, position: u32, ids: &[u32]) -> TokenRun {
    TokenRun { source, position, ids: ids.to_vec(), logprobs: vec![] }
}

fn answer(stops: &[&str]) -> Answer {
    let stops = stops.iter().map(|&stop| stop.to_owned()).collect();
    Answer::new(&tokenizer(), stops, Source::Drafter)
}

/// Pushes drafter and base text token by token; what came out, by source.
fn stream(stops: &[&str], drafter: &str, base: &str) -> (Vec<(Source, String)>, Vec<u32>, bool) {
    let mut answer = answer(stops);
    let mut pieces = Vec::new();
    let drafted = byte_ids(drafter).into_iter().map(|id| (Source::Drafter, id));
    let all = drafted.chain(byte_ids(base).into_iter().map(|id| (Source::Base, id)));
    for (position, (source, id)) in all.enumerate() {
        answer.push(run(source, position.try_into().unwrap(), &[id]), &mut pieces);
        if answer.stopped() {
            break;
        }
    }
    answer.finish(&mut pieces);
    let ids = pieces.iter().flat_map(|piece| piece.ids.clone()).collect();
    let mut texts: Vec<(Source, String)> = Vec::new();
    for piece in pieces {
        match texts.last_mut() {
            Some((source, text)) if *source == piece.source => text.push_str(&piece.text),
            _ => texts.push((piece.source, piece.text)),
        }
    }
    texts.retain(|(_, text)| !text.is_empty());
    (texts, ids, answer.stopped())
}

#[test]
fn text_keeps_its_source() {
    let (texts, ids, stopped) = stream(&[], "ab", "cd");
    assert_eq!(texts, [(Source::Drafter, "ab".into()), (Source::Base, "cd".into())]);
    assert_eq!(ids, byte_ids("abcd"));
    assert!(!stopped);
}

#[test]
fn a_character_across_the_switch_belongs_to_who_completes_it() {
    let mut answer = answer(&[]);
    let bytes = byte_ids("é");
    let mut pieces = Vec::new();
    answer.push(run(Source::Drafter, 0, &bytes[..1]), &mut pieces);
    assert_eq!((pieces[0].text.as_str(), pieces[0].ids.len()), ("", 1));
    answer.push(run(Source::Base, 1, &bytes[1..]), &mut pieces);
    assert_eq!((pieces[1].source, pieces[1].text.as_str()), (Source::Base, "é"));
}

#[test]
fn a_stop_string_across_the_switch_cuts_both() {
    let (texts, ids, stopped) = stream(&["STOP"], "one ST", "OP two");
    assert_eq!(texts, [(Source::Drafter, "one ".into())]);
    assert_eq!(ids, byte_ids("one STOP"), "every token up to the one that completes the stop");
    assert!(stopped);
}

#[test]
fn text_held_back_by_the_drafter_comes_out_as_the_drafters() {
    let (texts, ids, stopped) = stream(&["STOP"], "one ST", "AY two");
    assert_eq!(texts, [(Source::Drafter, "one ST".into()), (Source::Base, "AY two".into())]);
    assert_eq!(ids, byte_ids("one STAY two"));
    assert!(!stopped);
}

#[test]
fn a_run_is_cut_at_the_token_that_completes_a_stop() {
    let mut answer = answer(&["b"]);
    let mut pieces = Vec::new();
    answer.push(run(Source::Drafter, 0, &byte_ids("abcd")), &mut pieces);
    assert!(answer.stopped());
    assert_eq!((answer.tokens(), answer.drafter_tokens()), (2, 2));
    assert_eq!(pieces.len(), 1);
    assert_eq!((pieces[0].text.as_str(), &pieces[0].ids), ("a", &byte_ids("ab")));
}

#[test]
fn held_back_text_is_given_out_at_the_end() {
    let (texts, _, stopped) = stream(&["STOP"], "x", "y ST");
    assert_eq!(texts, [(Source::Drafter, "x".into()), (Source::Base, "y ST".into())]);
    assert!(!stopped);
    let mut cut = answer(&[]);
    let mut pieces = Vec::new();
    cut.push(run(Source::Drafter, 0, &byte_ids("é")[..1]), &mut pieces);
    cut.finish(&mut pieces);
    assert_eq!(pieces.iter().map(|piece| piece.text.as_str()).collect::<String>(), "\u{fffd}");
}

#[test]
fn a_piece_without_text_still_carries_its_tokens() {
    let mut answer = answer(&["STOP"]);
    let mut pieces = Vec::new();
    answer.push(run(Source::Drafter, 0, &byte_ids("S")), &mut pieces);
    assert_eq!((pieces[0].text.as_str(), pieces[0].ids.len(), pieces[0].position), ("", 1, 0));
    pieces.clear();
    answer.push(run(Source::Base, 1, &byte_ids("x")), &mut pieces);
    let shape: Vec<_> = pieces.iter().map(|p| (p.source, p.text.as_str(), p.ids.len())).collect();
    assert_eq!(shape, [(Source::Drafter, "S", 0), (Source::Base, "x", 1)]);
}
