//! A client: asks a router over the network and writes down what it sees.

use std::time::Duration;

use headstart_engine::executor::TokenId;
use headstart_proto::error::ERROR_TRAILER;
use headstart_proto::v1::generate_frame::Event;
use headstart_proto::v1::router_client::RouterClient;
use headstart_proto::{ErrorCode, v1};
use headstart_service::channel::{self, KeepAlive};
use headstart_service::net::Dialer;
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;

use crate::plan::{Ask, Reader};
use crate::trace::Trace;

/// How long a client waits for everything: longer than anything in the cluster may take.
pub const PATIENCE: Duration = Duration::from_secs(150);
/// How long a connection to the router may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// One answer as a client saw it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// The position that each frame named, and how many tokens had come before it.
    pub positions: Vec<(u32, u32)>,
    /// The tokens.
    pub ids: Vec<TokenId>,
    /// For each token, whether the drafter wrote it.
    pub drafted: Vec<bool>,
    /// The text.
    pub text: String,
    /// Log-probabilities, as in the oracle's answer.
    pub logprobs: Vec<(f32, Vec<(TokenId, f32)>)>,
    /// How it ended.
    pub finished: Option<Finished>,
    /// Frames came after the end.
    pub after_end: bool,
}

/// The end of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// By an end token, a stop string or a finished draft.
    pub stopped: bool,
    /// What the router counted.
    pub tokens: u32,
    /// Draft tokens in the answer, as the summary tells.
    pub kept: u32,
}

/// How a request ended for its client.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// With its last frame.
    Whole,
    /// The stream ended without a word.
    Vanished,
    /// With an error of the cluster.
    Failed(ErrorCode, String),
    /// The connection to the router broke.
    Broken(String),
    /// The client hung up.
    HungUp,
    /// It did not end.
    Hung,
}

/// A request and what came of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What was asked.
    pub ask: Ask,
    /// It was asked in the healing phase.
    pub healed: bool,
    /// When, from the world's start.
    pub started: Duration,
    /// When it was over.
    pub ended: Duration,
    /// Its answers.
    pub answers: Vec<Seen>,
    /// How it ended.
    pub end: End,
}

/// Asks the router at `address` and waits for the end.
pub async fn ask(
    ask: Ask,
    address: &str,
    dialer: &Dialer,
    (start, trace, index): (Instant, &Trace, u64),
    healed: bool,
) -> Outcome {
    let started = start.elapsed();
    let mut answers = vec![Seen::default(); ask.choices as usize];
    let talk = talk(&ask, address, dialer, &mut answers, trace, index);
    let end = timeout(PATIENCE, talk).await.unwrap_or(End::Hung);
    let kind = match &end {
        End::Whole => 0,
        End::Vanished => 1,
        End::Failed(code, _) => 10 + *code as u64,
        End::Broken(_) => 2,
        End::HungUp => 3,
        End::Hung => 4,
    };
    trace.add(&[4, index, kind], format_args!("request {index} ends: {end:?}"));
    Outcome { ask, healed, started, ended: start.elapsed(), answers, end }
}

async fn talk(
    ask: &Ask,
    address: &str,
    dialer: &Dialer,
    answers: &mut [Seen],
    trace: &Trace,
    index: u64,
) -> End {
    let channel = match channel::lazy(dialer, address, CONNECT_TIMEOUT, KeepAlive::CLUSTER) {
        Ok(channel) => channel,
        Err(error) => return End::Failed(error.code, error.message),
    };
    let mut client = RouterClient::new(channel);
    let mut frames = match client.generate(ask.wire()).await {
        Ok(frames) => frames.into_inner(),
        Err(status) => return failed(&status),
    };
    let mut left = match ask.reader {
        Reader::HangsUp(frames) => frames,
        _ => usize::MAX,
    };
    loop {
        if left == 0 {
            return End::HungUp;
        }
        match frames.message().await {
            Ok(Some(frame)) => see(answers, frame, trace, index),
            Ok(None) => break,
            Err(status) => return failed(&status),
        }
        left -= 1;
        if let Reader::Slow(pause) = ask.reader {
            sleep(pause).await;
        }
    }
    match answers.iter().all(|answer| answer.finished.is_some()) {
        true => End::Whole,
        false => End::Vanished,
    }
}

fn failed(status: &Status) -> End {
    // What the cluster says carries its code in a trailer; what the connection says does not.
    match status.metadata().contains_key(ERROR_TRAILER) {
        true => {
            let error = headstart_proto::Error::from_status(status);
            End::Failed(error.code, error.message)
        }
        false => End::Broken(format!("{:?}: {}", status.code(), status.message())),
    }
}

fn see(answers: &mut [Seen], frame: v1::GenerateFrame, trace: &Trace, index: u64) {
    let v1::GenerateFrame { choice, position, event, .. } = frame;
    let Some(answer) = answers.get_mut(choice as usize) else { return };
    answer.after_end |= answer.finished.is_some();
    match event {
        Some(Event::Text(text)) => {
            let drafted = text.source() == v1::Source::Drafter;
            let mut numbers = vec![3, index, choice.into(), position.into(), u64::from(drafted)];
            numbers.extend(text.ids.iter().map(|&id| u64::from(id)));
            let ids = &text.ids;
            let who = if drafted { "drafter" } else { "base" };
            trace.add(
                &numbers,
                format_args!("request {index}/{choice} at {position}: {ids:?} by the {who}"),
            );
            answer.positions.push((position, answer.ids.len() as u32));
            answer.drafted.extend(text.ids.iter().map(|_| drafted));
            answer.ids.extend(text.ids);
            answer.text.push_str(&text.text);
            answer.logprobs.extend(text.logprobs.into_iter().map(|position| {
                let own = position.token.map_or(f32::NAN, |token| token.logprob);
                (own, position.top.into_iter().map(|top| (top.id, top.logprob)).collect())
            }));
        }
        Some(Event::Finished(finished)) => {
            answer.finished = Some(Finished {
                stopped: finished.reason() == v1::FinishReason::Stop,
                tokens: finished.completion_tokens,
                kept: finished.draft.map_or(0, |draft| draft.kept_tokens),
            });
        }
        Some(Event::Started(_)) | None => {}
    }
}
