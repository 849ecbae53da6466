//! Steps that the CUDA executor has before the last one is collected give what one step at a time gives,
//! on one rank and on several.
//!
//! Runs on the emulated device, which is several and does its work as late as it may; with
//! `HEADSTART_CUDA_TESTS=device` in the environment on the machine's GPUs.

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use common::watched::Watched;
use common::{cuda_devices, sample_at, sampling, tiny, tokens};
use headstart_engine::core::pages::PageId;
use headstart_engine::core::scheduler::SequenceId;
use headstart_engine::executor::cuda::{self, CudaExecutor, CudaModel, CudaOptions, Ranks};
use headstart_engine::executor::{Executor, ExecutorError, Found, Pipeline, Probe, Row};
use headstart_engine::model::WeightDtype;
use headstart_engine::step::{Counters, Engine};
use headstart_engine::{DraftPolicy, Event, Finish, Known, Limits, Request, Sampling, TokenId};

/// One rank; several on one GPU; several that have one each.
fn placements() -> impl Iterator<Item = Ranks> {
    [1, 2].map(Ranks::SameDevice).into_iter().chain(cuda_devices(2))
}

fn on_cuda(path: &Path, ranks: Ranks) -> Arc<CudaModel> {
    common::open_cuda_libraries();
    let model = cuda::load(path, WeightDtype::F32, ranks, None, &mut |_| ());
    model.unwrap_or_else(|e| panic!("{e}"))
}

fn executor(model: &Arc<CudaModel>) -> CudaExecutor {
    let options = CudaOptions { kv_tokens: 1024, ..CudaOptions::default() };
    CudaExecutor::new(model.clone(), &options).expect("options are right")
}

/// An executor that is not asked whether it pipelines.
struct OneByOne(CudaExecutor);

impl Executor for OneByOne {
    fn limits(&self) -> Limits {
        self.0.limits()
    }

    fn execute(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        self.0.execute(rows)
    }
}

fn request(prompt: Vec<TokenId>, max_tokens: usize, sampling: Sampling) -> Request {
    Request {
        prompt,
        max_tokens,
        sampling,
        stop_tokens: Arc::from([]),
        top_logprobs: 0,
        draft: None,
        known: Known::default(),
    }
}

/// Requests of every kind, some with a draft, and what the engine tells of each.
fn served(executor: Box<dyn Executor>) -> (Vec<Vec<Event>>, Counters) {
    let mut engine = Engine::new(executor, 24);
    let policy = DraftPolicy {
        window: 3,
        threshold: 0.02,
        continue_complete: true,
        continue_empty: true,
        moves_on: false,
    };
    let mut told = Vec::new();
    for number in 0..9u32 {
        // Those with penalties are not planned ahead, and nobody while they are there.
        let max_tokens = if number % 4 == 3 { 2 } else { 12 + number as usize };
        let prompt = tokens(number, 2 + 11 * number as usize % 50);
        let id = engine.add(Request {
            // An eighth of the vocabulary, so that some answers stop.
            stop_tokens: if number % 4 == 1 { (0..12).collect() } else { Arc::from([]) },
            top_logprobs: number as usize % 3,
            draft: (number % 4 == 2).then_some(policy),
            ..request(prompt, max_tokens, sampling(u64::from(number)))
        });
        engine.push_draft(id, &tokens(100 + number, 5));
        let events = engine.end_draft(id).into_iter().map(|(_, event)| event).collect();
        told.push((id, events));
        // One that is gone while it is in work.
        if number == 4 {
            let id = engine.add(request(tokens(70, 9), 30, Sampling::default()));
            (0..5).for_each(|_| take(engine.step(), &mut told));
            engine.remove(id);
        }
    }
    while engine.has_work() {
        take(engine.step(), &mut told);
    }
    assert_eq!(engine.pool().used(), 0, "nothing is held");
    (told.into_iter().map(|(_, events)| whole(events)).collect(), engine.counters())
}

/// Scores that came in several events as if they had come in one: how a draft is cut into steps is a
/// matter of timing.
fn whole(events: Vec<Event>) -> Vec<Event> {
    let mut whole: Vec<Event> = Vec::new();
    for event in events {
        match (whole.last_mut(), event) {
            (
                Some(Event::Read { scores, decision, .. }),
                Event::Read { scores: more, decision: decided, .. },
            ) => {
                scores.extend(more);
                *decision = decided;
            }
            (_, event) => whole.push(event),
        }
    }
    whole
}

type Stepped = (Vec<(SequenceId, Event)>, Result<(), ExecutorError>);

fn take((events, result): Stepped, told: &mut [(SequenceId, Vec<Event>)]) {
    result.expect("the device is well");
    for (id, event) in events {
        if let Some((_, events)) = told.iter_mut().find(|(other, _)| *other == id) {
            events.push(event);
        }
    }
}

/// The tokens that were written.
fn written(events: &[Event]) -> Vec<TokenId> {
    let token = |event: &Event| match event {
        Event::Wrote { judged, .. } => Some(judged.token.token),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

/// Steps that are submitted before the last one is collected, with tokens that the host does not know
/// yet, tell the same, bit for bit; and several ranks write what one writes.
#[test]
fn pipelined_steps_give_the_same_answers() {
    let three = [1, 3].map(Ranks::SameDevice).to_vec();
    for (name, all) in [("qwen3", placements().collect()), ("mistral-window", three)] {
        let mut alone = None;
        for ranks in all {
            let model = on_cuda(&tiny(name), ranks);
            let (watched, seen) = Watched::new(executor(&model));
            let (expected, plain) = served(Box::new(OneByOne(executor(&model))));
            let (told, pipelined) = served(watched);
            for (request, (told, expected)) in told.iter().zip(&expected).enumerate() {
                assert_eq!(told, expected, "{name}, {ranks:?}, request {request}");
            }
            let seen = *seen.lock().expect("nobody panicked");
            println!("{name}, {ranks:?}: {plain:?} {pipelined:?} {seen:?}");
            assert_eq!(plain.tokens_overrun, 0);
            assert!(pipelined.tokens_overrun > 0, "some row was too many: {pipelined:?}");
            assert_eq!(pipelined.tokens_extended, plain.tokens_extended, "{name}, {ranks:?}");
            assert!(seen.in_flight_max == 2 && seen.pending_rows > 50, "{ranks:?}: {seen:?}");
            let written: Vec<_> = told.iter().map(|events| written(events)).collect();
            let alone = alone.get_or_insert_with(|| written.clone());
            assert_eq!(&written, alone, "{name}, {ranks:?}");
        }
    }
}

/// Rows whose token is not known here, more of them than are drawn from at once, recorded and not. `ahead`:
/// each batch is submitted before the one before it is collected.
fn write(executor: &mut CudaExecutor, ahead: bool, steps: usize) -> Vec<Vec<Vec<Found>>> {
    let prompts: Vec<_> = (0..44).map(|row| tokens(row, 1 + row as usize % 6)).collect();
    let draws: Vec<_> = (0..44).map(|row| sampling(row % 3)).collect();
    let (mut texts, mut found) = (prompts.clone(), Vec::new());
    for step in 0..=steps {
        let pending = ahead && step > 0;
        let ends: Vec<usize> = prompts.iter().map(|prompt| prompt.len() + step).collect();
        let probe = |end: &usize| [Probe { top: end % 3, ..sample_at(end - 1) }];
        let probes: Vec<_> = ends.iter().map(probe).collect();
        let pages: Vec<_> = (0..44).map(|row| [PageId(row)]).collect();
        // The rows of every other batch are in another order.
        let order = |step: usize, at: usize| if step.is_multiple_of(2) { at } else { 43 - at };
        let row = |at: usize| {
            let row = order(step, at);
            Row {
                context: &texts[row],
                start: if step == 0 { 0 } else { ends[row] - 1 },
                pages: &pages[row],
                answer_start: prompts[row].len(),
                probes: &probes[row],
                sampling: &draws[row],
                pending: pending.then(|| order(step + 1, row)),
            }
        };
        let rows: Vec<_> = (0..44).map(row).collect();
        executor.submit(&rows).expect("the batch is right");
        if pending || !ahead {
            let all = executor.collect().expect("the device is well");
            let collected = if ahead { step - 1 } else { step };
            for (at, found) in all.iter().enumerate() {
                let token = found[0].sampled.expect("was asked for").token;
                texts[order(collected, at)].push(token);
            }
            found.push(all);
        }
    }
    if ahead {
        assert!(executor.execute(&[]).is_err_and(|e| !e.fatal), "a batch is in flight");
        found.push(executor.collect().expect("the device is well"));
    }
    assert!(executor.collect().is_err_and(|e| !e.fatal), "nothing is in flight");
    found
}

#[test]
fn rows_follow_on_a_batch_that_is_in_flight() {
    let mut alone = None;
    for ranks in placements() {
        let model = on_cuda(&tiny("qwen3"), ranks);
        let expected = write(&mut executor(&model), false, 4);
        let mut pipelined = executor(&model);
        let found = write(&mut pipelined, true, 4);
        assert_eq!(found, expected, "{ranks:?}");
        assert_eq!(pipelined.graphs(), 1, "{ranks:?}: steps were recorded");
        let token = |found: &Vec<Found>| found[0].sampled.expect("was asked for").token;
        let tokens: Vec<Vec<TokenId>> =
            found.iter().map(|batch| batch.iter().map(token).collect()).collect();
        assert_eq!(&tokens, alone.get_or_insert(tokens.clone()), "{ranks:?}");
    }
}

#[test]
fn what_follows_on_nothing_is_refused() {
    for ranks in placements() {
        let mut executor = executor(&on_cuda(&tiny("qwen3"), ranks));
        let (context, probes, sampling) = (tokens(1, 20), [sample_at(19)], Sampling::default());
        let row = Row {
            context: &context,
            start: 0,
            pages: &[0, 1].map(PageId),
            answer_start: 20,
            probes: &probes,
            sampling: &sampling,
            pending: None,
        };
        let next = Row { start: 20, probes: &[], pending: Some(0), ..row };
        assert!(executor.submit(&[next]).is_err_and(|e| !e.fatal), "nothing is behind it");
        executor.submit(&[row]).expect("the batch is right");
        assert!(executor.submit(&[Row { pending: Some(1), ..next }]).is_err_and(|e| !e.fatal));
        executor.submit(&[next]).expect("the batch is right");
        assert!(executor.submit(&[row]).is_err_and(|e| !e.fatal), "two are in flight");
        assert_eq!(executor.collect().expect("the first").len(), 1);
        assert_eq!(executor.collect().expect("the second"), [Vec::new()]);
    }
}

/// A model whose rank that has the embedding of `token` finds no numbers there.
fn broken_at(token: TokenId) -> tempfile::TempDir {
    let (folder, name) = (tempfile::tempdir().expect("a folder"), "llama-linear-untied");
    let from = tiny(name);
    std::fs::copy(from.join("config.json"), folder.path().join("config.json")).expect("a copy");
    let mut bytes = std::fs::read(from.join("model.safetensors")).expect("it is there");
    // The file is a header's length, the header, and tensors behind it: the head, then embeddings, of
    // 96 tokens in half precision.
    let header = u64::from_le_bytes(*bytes.first_chunk().expect("a length")) as usize;
    let row = 32 * 2;
    let at = 8 + header + (96 + token as usize) * row;
    bytes[at..at + row].fill(0x7e);
    std::fs::write(folder.path().join("model.safetensors"), bytes).expect("a copy");
    folder
}

/// A rank that fails in one step costs this step's sequences, although the next one is on its way; then
/// others are served.
#[test]
fn a_step_that_fails_is_not_the_next_ones_affair() {
    let serve = |executor: Box<dyn Executor>| -> (Vec<Event>, Vec<Event>) {
        let mut engine = Engine::new(executor, 24);
        let mut all = [tokens(3, 5), tokens(8, 4)].map(|prompt| {
            let id = engine.add(request(prompt, 12, Sampling::default()));
            let mut events = Vec::new();
            while engine.has_work() {
                events.extend(engine.step().0.into_iter().inspect(|(of, _)| assert_eq!(*of, id)));
            }
            assert_eq!(engine.pool().used(), 0, "nothing is held");
            events.into_iter().map(|(_, event)| event).collect()
        });
        (std::mem::take(&mut all[0]), std::mem::take(&mut all[1]))
    };
    let well = on_cuda(&tiny("llama-linear-untied"), Ranks::SameDevice(1));
    let (first, second) = serve(Box::new(executor(&well)));
    let others = [&written(&second)[..], &tokens(3, 5), &tokens(8, 4)].concat();
    let tokens = written(&first);
    // One that is written when steps are two in flight, and only in the first answer.
    let new = |at: &usize| !tokens[..*at].contains(&tokens[*at]) && !others.contains(&tokens[*at]);
    let at = (3..10).find(new).expect("an answer says something new");
    let folder = broken_at(tokens[at]);
    for ranks in placements() {
        let model = on_cuda(folder.path(), ranks);
        let (expected, last) = serve(Box::new(OneByOne(executor(&model))));
        let told = serve(Box::new(executor(&model)));
        assert_eq!(told, (expected.clone(), last.clone()), "{ranks:?}");
        assert_eq!(written(&expected), tokens[..=at], "{ranks:?}");
        let failed = expected.last().expect("an end");
        let not_finite = |message: &str| message.contains("logits at position");
        assert!(
            matches!(failed, Event::Failed { message, fatal: false } if not_finite(message)),
            "{ranks:?}: {failed:?}"
        );
        assert_eq!(written(&last), written(&second), "{ranks:?}");
        let finished = Event::Finished { reason: Finish::Length, answer_tokens: 12 };
        assert_eq!(last.last(), Some(&finished), "{ranks:?}");
    }
}

/// Says to a process of this test that one of its emulated devices fails, and when.
const FAULT: &str = "HEADSTART_EMULATED_FAULT";

/// What such a process runs; in the test's own, nothing.
#[test]
fn a_model_whose_second_gpu_fails() {
    if std::env::var_os(FAULT).is_none() {
        return;
    }
    let model = on_cuda(&tiny("qwen3"), Ranks::Devices(2));
    let (watched, seen) = Watched::new(executor(&model));
    let mut engine = Engine::new(watched, 24);
    let ids = [4, 5].map(|seed| engine.add(request(tokens(seed, 5), 100, Sampling::default())));
    let (events, error) = loop {
        if let (events, Err(error)) = engine.step() {
            break (events, error);
        }
    };
    println!("{error}");
    assert!(error.fatal && error.message.starts_with("GPU: "), "{error}");
    assert_eq!(seen.lock().expect("nobody panicked").in_flight, 1, "another step is in flight");
    for id in ids {
        let lost = |(of, event): &(SequenceId, Event)| {
            *of == id && matches!(event, Event::Failed { fatal: true, .. })
        };
        assert!(events.iter().any(lost), "{events:?}");
    }
    // The first GPU waited for the second, and so would whoever frees its memory.
    drop(engine);
}

/// On a machine with GPUs none of them is made to fail.
#[test]
fn a_gpu_that_fails_ends_the_model_while_two_steps_are_in_flight() {
    if std::env::var_os("HEADSTART_CUDA_TESTS").is_some_and(|v| v == "device") {
        return;
    }
    // Before steps are recorded, and long after.
    for kernels in [60, 1500] {
        let mut process = Command::new(std::env::current_exe().expect("a test has a path"));
        process.args(["--exact", "a_model_whose_second_gpu_fails", "--nocapture"]);
        let ended = process.env(FAULT, format!("1:{kernels}")).output().expect("it can be started");
        let said = String::from_utf8_lossy(&ended.stdout) + String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success(), "after {kernels}: {said}");
        assert!(said.contains("GPU: running on the GPU"), "after {kernels}: {said}");
    }
}
