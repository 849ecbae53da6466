//! The runner: slots, aborts, limits and failures, on the fake executor.

use std::sync::Arc;
use std::time::Duration;

use headstart_engine::executor::fake::{FakeExecutor, FakeOptions, Gate};
use headstart_engine::executor::{ExecutorError, Found, Row};
use headstart_engine::{
    DraftPolicy, EngineHandle, EngineOptions, Event, Executor, Finish, Known, Limits, Request,
    Sampling, SubmitError,
};

fn request(max_tokens: usize) -> Request {
    Request {
        prompt: vec![5, 6, 7],
        max_tokens,
        sampling: Sampling::default(),
        stop_tokens: Arc::from([0]),
        top_logprobs: 0,
        draft: None,
        known: Known::default(),
    }
}

fn start(options: FakeOptions, slots: usize) -> EngineHandle {
    let executor = Box::new(FakeExecutor::new(options));
    EngineHandle::start(executor, EngineOptions { slots, ..EngineOptions::default() })
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..2_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

#[tokio::test]
async fn a_full_engine_refuses_at_once_and_a_drop_makes_room() {
    let gate = Arc::new(Gate::default());
    let engine = start(FakeOptions { gate: Some(Arc::clone(&gate)), ..FakeOptions::default() }, 2);
    let first = engine.submit(request(8)).expect("a slot is free");
    let _second = engine.submit(request(8)).expect("a slot is free");
    assert_eq!(engine.submit(request(8)).err(), Some(SubmitError::Full { slots: 2 }));
    drop(first);
    gate.set_open(true);
    until("the dropped request's slot is free", || engine.stats().slots_used < 2).await;
    let mut third = engine.submit(request(8)).expect("the slot is free again");
    let mut wrote = 0;
    while let Some(event) = third.next().await {
        match event {
            Event::Wrote { index, .. } => {
                assert_eq!(index, wrote);
                wrote += 1;
            }
            Event::Finished { reason, .. } => assert_eq!(reason, Finish::Length),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(wrote, 8);
}

#[tokio::test]
async fn an_abort_frees_slots_and_pages_while_others_go_on() {
    let slow = Duration::from_millis(2);
    let engine = start(FakeOptions { step_latency: slow, ..FakeOptions::default() }, 4);
    let mut kept = engine.submit(request(60)).expect("a slot");
    let mut dropped = engine.submit(request(3000)).expect("a slot");
    assert!(dropped.next().await.is_some());
    drop(dropped);
    until("one slot is used", || engine.stats().slots_used == 1).await;
    let mut events = 0;
    while kept.next().await.is_some() {
        events += 1;
    }
    assert_eq!(events, 61);
    until("nothing is held", || {
        let stats = engine.stats();
        stats.slots_used == 0 && stats.kv_tokens_used == 0
    })
    .await;
}

#[tokio::test]
async fn what_can_never_run_is_refused_by_name() {
    let engine = start(FakeOptions::default(), 4);
    let field = |request| match engine.submit(request).err() {
        Some(SubmitError::Invalid { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    assert_eq!(field(Request { prompt: vec![], ..request(1) }), "prompt");
    assert_eq!(field(Request { prompt: vec![512], ..request(1) }), "prompt");
    let known = |answer, scores| Known { answer, scores };
    assert_eq!(field(Request { known: known(vec![512], vec![]), ..request(2) }), "known");
    assert_eq!(field(Request { known: known(vec![5], vec![]), ..request(1) }), "known");
    assert_eq!(field(Request { known: known(vec![5], vec![f32::NAN]), ..request(2) }), "known");
    assert_eq!(field(request(0)), "max_tokens");
    assert_eq!(field(request(4094)), "max_tokens");
    assert_eq!(field(request(usize::MAX)), "max_tokens");
    assert!(engine.submit(request(4093)).is_ok());
}

#[tokio::test]
async fn a_draft_that_is_never_given_holds_nobody_up() {
    let engine = start(FakeOptions::default(), 4);
    let policy = DraftPolicy {
        window: 6,
        threshold: 0.8,
        continue_complete: true,
        continue_empty: false,
        moves_on: false,
    };
    let waiting = engine.submit(Request { draft: Some(policy), ..request(8) }).expect("a slot");
    let mut other = engine.submit(request(4)).expect("a slot");
    while other.next().await.is_some() {}
    let sender = waiting.draft();
    drop(waiting);
    assert_eq!(sender.push(vec![9]).await, Ok(()), "a late draft is dropped");
    until("both are gone", || engine.stats().slots_used == 0).await;
}

/// Fails the step of every row whose prompt begins with 13; fatally, if it begins with 14.
struct Failing(FakeExecutor);

impl Executor for Failing {
    fn limits(&self) -> Limits {
        self.0.limits()
    }

    fn execute(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        match rows.iter().map(|row| row.context[0]).find(|first| [13, 14].contains(first)) {
            Some(first) => Err(ExecutorError { message: "broken".into(), fatal: first == 14 }),
            None => self.0.execute(rows),
        }
    }
}

#[tokio::test]
async fn a_failed_step_is_told_and_a_fatal_one_stops_the_engine() {
    let executor = Failing(FakeExecutor::new(FakeOptions::default()));
    let engine = EngineHandle::start(Box::new(executor), EngineOptions::default());
    let failed = |fatal| Event::Failed { message: "broken".into(), fatal };
    let mut one = engine.submit(Request { prompt: vec![13], ..request(4) }).expect("a slot");
    assert_eq!(one.next().await, Some(failed(false)));
    assert_eq!(one.next().await, None);
    let mut fine = engine.submit(request(1)).expect("the engine goes on");
    assert!(matches!(fine.next().await, Some(Event::Wrote { .. })));
    let mut two = engine.submit(Request { prompt: vec![14], ..request(4) }).expect("a slot");
    assert_eq!(two.next().await, Some(failed(true)));
    until("the engine has stopped", || engine.is_stopped()).await;
    assert_eq!(engine.submit(request(1)).err(), Some(SubmitError::Stopped));
    assert_eq!(engine.stats().slots_used, 0);
}
