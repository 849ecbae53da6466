use super::*;
use headstart_proto::v1::serve_frame::Event;

const DRAFTER: i32 = v1::Source::Drafter as i32;
const BASE: i32 = v1::Source::Base as i32;

fn gate(draft: bool, empty_allowed: bool) -> FrameGate {
    let policy = v1::DraftPolicy { continue_empty_draft: empty_allowed, ..Default::default() };
    let id = RequestId::new("r-0").unwrap();
    FrameGate::new(id, Epoch::new(2).unwrap(), 10, draft.then_some(&policy), false)
}

fn frame(position: u32, event: Event) -> v1::ServeFrame {
    v1::ServeFrame { request_id: "r-0".into(), epoch: 2, position, event: Some(event) }
}

fn tokens(source: i32, position: u32, ids: &[u32]) -> v1::ServeFrame {
    frame(position, Event::Tokens(v1::Tokens { source, ids: ids.to_vec(), logprobs: vec![] }))
}

fn switched(position: u32, kept_tokens: u32, drafted_tokens: u32) -> v1::ServeFrame {
    let switched = v1::Switched { by_threshold: true, kept_tokens, drafted_tokens };
    frame(position, Event::Switched(switched))
}

fn finished(position: u32) -> v1::ServeFrame {
    let reason = v1::FinishReason::Stop as i32;
    frame(position, Event::Finished(v1::Finished { reason, ..Default::default() }))
}

fn ids(event: Option<ServeEvent>) -> (u32, Vec<u32>) {
    match event {
        Some(ServeEvent::Tokens(run)) => (run.position, run.ids),
        other => panic!("expected tokens, found {other:?}"),
    }
}

#[test]
fn every_position_passes_once() {
    let mut gate = gate(true, false);
    assert_eq!(ids(gate.admit(tokens(DRAFTER, 0, &[1, 2])).unwrap()), (0, vec![1, 2]));
    assert_eq!(gate.admit(tokens(DRAFTER, 0, &[1, 2])).unwrap(), None, "seen");
    assert_eq!(ids(gate.admit(tokens(DRAFTER, 1, &[2, 3])).unwrap()), (2, vec![3]), "half seen");
    assert_eq!(gate.admit(tokens(DRAFTER, 3, &[])).unwrap(), None, "empty");
    assert!(matches!(gate.admit(switched(3, 3, 5)), Ok(Some(ServeEvent::Switched(_)))));
    assert_eq!(gate.admit(switched(3, 3, 5)).unwrap(), None, "seen");
    assert_eq!(ids(gate.admit(tokens(BASE, 3, &[4])).unwrap()), (3, vec![4]));
    assert_eq!(gate.admit(finished(3)).unwrap(), None, "an old end");
    let end = gate.admit(finished(4)).unwrap();
    assert_eq!(end, Some(ServeEvent::Finished(FinishReason::Stop)));
}

#[test]
fn an_older_attempt_is_dropped_and_a_later_one_refused() {
    let mut gate = gate(true, false);
    let mut old = tokens(DRAFTER, 7, &[1]);
    old.epoch = 1;
    assert_eq!(gate.admit(old).unwrap(), None);
    let mut late = tokens(DRAFTER, 0, &[1]);
    late.epoch = 3;
    assert!(gate.admit(late).unwrap_err().message.contains("later attempt 3"));
    let mut other = tokens(DRAFTER, 0, &[1]);
    other.request_id = "r-1".into();
    assert!(gate.admit(other).unwrap_err().message.contains("another request"));
}

#[test]
fn what_the_protocol_does_not_allow_is_an_error() {
    let cases: [(&str, bool, Vec<v1::ServeFrame>); 12] = [
        ("expected position 0, found 1", true, vec![tokens(DRAFTER, 1, &[1])]),
        ("expected position 1, found 2", true, vec![tokens(DRAFTER, 0, &[1]), finished(2)]),
        ("before the draft was decided", true, vec![tokens(BASE, 0, &[1])]),
        ("that no drafter began", true, vec![switched(0, 0, 0), tokens(BASE, 0, &[1])]),
        ("wrong source", true, vec![switched(0, 1, 1), tokens(BASE, 0, &[1])]),
        ("wrong source", true, vec![switched(0, 1, 1), tokens(DRAFTER, 0, &[1, 2])]),
        ("wrong source", false, vec![tokens(DRAFTER, 0, &[1])]),
        ("without a draft", false, vec![switched(0, 0, 0)]),
        ("keeps 3 of 2", true, vec![switched(0, 3, 2)]),
        ("keeps 1 of 4", true, vec![tokens(DRAFTER, 0, &[1, 2]), switched(2, 1, 4)]),
        ("max_tokens (10)", true, vec![tokens(DRAFTER, 0, &[0; 11])]),
        ("without a source", true, vec![tokens(0, 0, &[1])]),
    ];
    for (message, draft, frames) in cases {
        let mut gate = gate(draft, false);
        let results: Vec<_> = frames.into_iter().map(|frame| gate.admit(frame)).collect();
        let (last, before) = results.split_last().unwrap();
        assert!(before.iter().all(Result::is_ok), "{message}");
        let error = last.as_ref().expect_err(message);
        assert_eq!(error.code, ErrorCode::Protocol);
        assert!(error.message.contains(message), "{message}: {}", error.message);
    }
}

#[test]
fn an_empty_draft_goes_on_only_where_it_may() {
    let mut open = gate(true, true);
    open.admit(switched(0, 0, 0)).unwrap();
    assert_eq!(ids(open.admit(tokens(BASE, 0, &[1])).unwrap()), (0, vec![1]));
    let mut base_only = gate(false, false);
    assert_eq!(ids(base_only.admit(tokens(BASE, 0, &[1])).unwrap()), (0, vec![1]));
}

#[test]
fn wanted_logprobs_must_be_there() {
    let mut gate = gate(true, false);
    gate.logprobs = true;
    assert!(gate.admit(tokens(DRAFTER, 0, &[1])).is_err());
    let entry = |id| v1::PositionLogprobs {
        token: Some(v1::TokenLogprob { id, logprob: -0.5 }),
        top: vec![v1::TokenLogprob { id: 9, logprob: -0.1 }],
    };
    let run = v1::Tokens { source: DRAFTER, ids: vec![1, 2], logprobs: vec![entry(1), entry(2)] };
    let Some(ServeEvent::Tokens(run)) = gate.admit(frame(0, Event::Tokens(run))).unwrap() else {
        panic!("expected tokens");
    };
    assert_eq!(run.logprobs[1], TokenLogprobs { token: (2, -0.5), top: vec![(9, -0.1)] });
}

#[test]
fn a_later_attempt_goes_on_behind_what_is_out() {
    let decision = Decision { by_threshold: true, kept_tokens: 3, drafted_tokens: 5 };
    let mut open = gate(true, false).behind(3, Some(decision));
    assert_eq!(open.admit(tokens(DRAFTER, 0, &[1, 2, 3])).unwrap(), None, "seen");
    assert_eq!(open.admit(switched(3, 3, 5)).unwrap(), None, "seen");
    assert_eq!(ids(open.admit(tokens(BASE, 3, &[4])).unwrap()), (3, vec![4]));
    let mut early = gate(true, false).behind(3, Some(decision));
    assert!(early.admit(tokens(DRAFTER, 3, &[4])).is_err(), "the draft is over");
    let mut undecided = gate(true, false).behind(2, None);
    assert!(undecided.admit(switched(2, 1, 5)).is_err(), "two tokens are out");
    let scores = vec![-0.5, f32::NAN, -0.5];
    let moved = frame(2, Event::Moved(v1::Moved { kv: None, scores }));
    let expected = ServeEvent::Moved { kv: None, scores: vec![-0.5] };
    assert_eq!(undecided.admit(moved).unwrap(), Some(expected));
}
