//! Batches between their submission and their collection.
//!
//! The device has one set of buffers, for its work is in one order. The host has two of those that it
//! fills or reads, for while the device reads or writes one it goes on with the other. A chosen token
//! stays on the device for the batch behind, whose row may need it before the host knows it.

use std::collections::VecDeque;

use headstart_kernels::cuda::{
    Buffer, CudaError, Device, Keep, Pinned, Questions, Timer, TokenFound,
};

use super::plan::Wanted;
use super::probe::sample_question;
use super::{CudaExecutor, lost};
use crate::executor::{ExecutorError, Found, IN_FLIGHT_MAX, Limits, Row, Scored};

/// Words that host memory for questions and answers has at least: most batches need no more.
const WORDS_MIN: usize = 16 << 10;

/// What the host shares with the device for one batch.
#[derive(Debug, Default)]
pub(super) struct Lane {
    /// Of each chunk.
    pub(super) staging: Vec<Pinned<u32>>,
    /// For each time that logits are looked at.
    asked: Vec<Pinned<u32>>,
    answers: Vec<Pinned<u32>>,
}

/// The `index`-th of `pieces`, which come to be as they are needed, with `words` at least.
pub(super) fn piece<'a>(
    device: &Device,
    pieces: &'a mut Vec<Pinned<u32>>,
    index: usize,
    words: usize,
) -> Result<&'a mut Pinned<u32>, CudaError> {
    if pieces.get(index).is_none_or(|piece| piece.len() < words) {
        let words = words.next_power_of_two().max(WORDS_MIN);
        let piece = device.pinned(words, "batches")?;
        pieces.truncate(index);
        pieces.push(piece);
    }
    Ok(&mut pieces[index])
}

/// Probes whose logits were looked at together.
#[derive(Debug)]
struct Asked {
    wanted: Vec<Wanted>,
    /// The first of the batch's probes that are among them.
    first: usize,
    questions: Questions,
    /// For each wanted one its place among the samples, unless the argmax is its answer.
    drawn: Vec<Option<usize>>,
}

/// A batch in flight.
#[derive(Debug)]
pub(super) struct InFlight {
    /// Which of the lanes it has.
    pub(super) lane: usize,
    rows: usize,
    asked: Vec<Asked>,
    /// Reached when all its work is done.
    done: Option<Timer>,
}

/// All batches in flight.
#[derive(Debug)]
pub(super) struct Batches {
    pub(super) lanes: [Lane; IN_FLIGHT_MAX],
    /// What the rows of the batch in each lane chose.
    pub(super) kept: [Buffer<u32>; IN_FLIGHT_MAX],
    in_flight: VecDeque<InFlight>,
    /// The lane of the next one.
    next: usize,
    /// Whether each row of the last one samples at its last probe.
    pub(super) samples: Vec<bool>,
}

impl Batches {
    /// A row writes a page of its own, so there are as many rows as pages at most.
    pub(super) fn new(device: &Device, limits: Limits) -> Result<Self, CudaError> {
        let kept = || device.alloc(limits.pages, "chosen tokens");
        Ok(Self {
            lanes: Default::default(),
            kept: [kept()?, kept()?],
            in_flight: VecDeque::new(),
            next: 0,
            samples: Vec::new(),
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// A batch of so many rows, about to be submitted.
    pub(super) fn begin(&self, rows: usize) -> Result<InFlight, ExecutorError> {
        let refused = |message: String| ExecutorError { message, fatal: false };
        if self.in_flight.len() == IN_FLIGHT_MAX {
            return Err(refused(format!("{IN_FLIGHT_MAX} batches are in flight")));
        }
        if rows > self.kept[0].len() {
            return Err(refused(format!("{rows} rows on {} pages", self.kept[0].len())));
        }
        Ok(InFlight { lane: self.next, rows, asked: Vec::new(), done: None })
    }

    /// It is submitted.
    pub(super) fn push(&mut self, batch: InFlight, rows: &[Row<'_>], done: Timer) {
        let samples = |row: &Row<'_>| row.probes.last().is_some_and(|probe| probe.sample);
        self.samples = rows.iter().map(samples).collect();
        self.next = (self.next + 1) % IN_FLIGHT_MAX;
        self.in_flight.push_back(InFlight { done: Some(done), ..batch });
    }

    /// Waits for the oldest one.
    pub(super) fn collect(&mut self) -> Result<Vec<Vec<Found>>, ExecutorError> {
        let nothing = || ExecutorError { message: "nothing is in flight".into(), fatal: false };
        let batch = self.in_flight.pop_front().ok_or_else(nothing)?;
        if let Some(done) = &batch.done {
            done.wait().map_err(lost)?;
        }
        let mut found = vec![Vec::new(); batch.rows];
        for (asked, answers) in batch.asked.iter().zip(&mut self.lanes[batch.lane].answers) {
            asked.tell(answers.wait_for().map_err(lost)?, &mut found)?;
        }
        Ok(found)
    }
}

impl CudaExecutor {
    /// Asks about the probes whose logits are on the device: `first..first + count` of the chunk.
    pub(super) fn ask(
        &mut self,
        rows: &[Row<'_>],
        wanted: &[Wanted],
        first: usize,
        count: usize,
        batch: &mut InFlight,
    ) -> Result<(), CudaError> {
        let here = |w: &&Wanted| (first..first + count).contains(&w.at);
        let wanted: Vec<Wanted> = wanted.iter().filter(here).copied().collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let (device, vocab) = (self.model.device(), self.limits.vocab_size);
        let asked = Asked::new(rows, wanted, first, count, vocab);
        let (index, questions) = (batch.asked.len(), &asked.questions);
        let Batches { lanes, kept, .. } = &mut self.batches;
        let Lane { asked: questions_host, answers, .. } = &mut lanes[batch.lane];
        let questions_host = piece(device, questions_host, index, questions.words())?;
        let answers = piece(device, answers, index, questions.answer_words())?;
        let (p, kept) = (&mut self.probes, &mut kept[batch.lane]);
        let logits = (&p.logits, vocab);
        device.ask(questions, logits, &p.found, &mut p.ask, questions_host, answers, kept)?;
        batch.asked.push(asked);
        Ok(())
    }
}

impl Asked {
    fn new(
        rows: &[Row<'_>],
        wanted: Vec<Wanted>,
        first: usize,
        count: usize,
        vocab: usize,
    ) -> Self {
        let mut questions = Questions { rows: count, ..Questions::default() };
        let mut drawn = Vec::with_capacity(wanted.len());
        for w in &wanted {
            let (row, at) = (&rows[w.row], w.at - first);
            questions.tops.push((at as u32, w.probe.top.min(vocab) as u32));
            let draws = w.probe.sample && !row.sampling.is_plain_greedy();
            let sample = draws.then_some(questions.samples.len());
            if draws {
                sample_question(row, w.probe.position, at, &mut questions);
            }
            if w.probe.sample && row.probes.last() == Some(&w.probe) {
                let at = sample.unwrap_or(at) as u32;
                questions.keep.push(Keep { place: w.row as u32, at, drawn: draws });
            }
            drawn.push(sample);
        }
        Self { wanted, first, questions, drawn }
    }

    /// Tells each probe's row what was found.
    fn tell(&self, words: &[u32], found: &mut [Vec<Found>]) -> Result<(), ExecutorError> {
        let answers = self.questions.read(words);
        let facts = |w: &Wanted| &answers.facts[w.at - self.first];
        if let Some(bad) = self.wanted.iter().find(|w| !facts(w).log_sum_exp.is_finite()) {
            let position = bad.probe.position;
            let message = format!("the model's logits at position {position} are not finite");
            return Err(ExecutorError { message, fatal: false });
        }
        for ((wanted, drawn), top) in self.wanted.iter().zip(&self.drawn).zip(answers.tops) {
            let facts = facts(wanted);
            let scored = |(token, logit)| Scored { token, logprob: logprob(logit, facts) };
            let chosen = || drawn.map_or((facts.argmax, facts.max), |at| answers.samples[at]);
            found[wanted.row].push(Found {
                target: wanted.probe.target.map(|_| logprob(facts.target, facts)),
                sampled: wanted.probe.sample.then(|| scored(chosen())),
                top: top.into_iter().map(scored).collect(),
            });
        }
        Ok(())
    }
}

/// The norm is a sum of at least this token's weight; rounding must not make it more than 1.
fn logprob(logit: f32, found: &TokenFound) -> f32 {
    (logit - found.log_sum_exp).min(0.0)
}
