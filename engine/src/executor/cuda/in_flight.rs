//! Batches between their submission and their collection.
//!
//! A device has one set of buffers, for its work is in one order. The host has two of those that it
//! fills or reads, for while the device reads or writes one it goes on with the other. A chosen token
//! stays on the device for the batch behind, whose row may need it before the host knows it.

use std::collections::VecDeque;

use headstart_kernels::VocabStats;
use headstart_kernels::cuda::{
    Answers, Buffer, CudaError, Device, Facts, Keep, Pinned, Questions, Timer, TokenFound,
};

use super::load::{CudaModel, RankModel};
use super::plan::Wanted;
use super::probe::{Choice, gather_logits, join, sample_question};
use super::{CudaExecutor, Rank, lost};
use crate::executor::hosts::Partials;
use crate::executor::partial::Partial;
use crate::executor::vocab::join_top;
use crate::executor::{ExecutorError, Found, IN_FLIGHT_MAX, Limits, Row, Scored, TokenId};

/// Words that host memory for questions and answers has at least: most batches need no more.
const WORDS_MIN: usize = 16 << 10;

/// What the host shares with a rank's device for one batch.
#[derive(Debug, Default)]
pub(super) struct Lane {
    /// Of each chunk.
    pub(super) staging: Vec<Pinned<u32>>,
    /// For each time that logits are looked at.
    asked: Vec<Pinned<u32>>,
    answers: Vec<Pinned<u32>>,
    /// Once: what the device kept.
    kept: Vec<Pinned<u32>>,
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
    /// What each rank is asked, and the first token of its part of the vocabulary.
    questions: Vec<(Questions, u32)>,
    /// What is chosen from the findings of several ranks; one rank chooses by itself.
    choices: Vec<Choice>,
    /// For each wanted one its place among the samples, unless the argmax is its answer.
    drawn: Vec<Option<usize>>,
    /// Where others have ranks as well: each rank's logits of each wanted one from which a token is
    /// drawn. The leader of all draws it.
    logits: Vec<Vec<Vec<f32>>>,
}

/// A batch in flight.
#[derive(Debug)]
pub(super) struct InFlight {
    /// Which of the lanes it has.
    pub(super) lane: usize,
    rows: usize,
    asked: Vec<Asked>,
    /// Choices of all of them.
    choices: usize,
    /// Reached when all its work is done, on each device.
    done: Vec<Timer>,
}

/// All batches in flight.
#[derive(Debug)]
pub(super) struct Batches {
    /// One of each rank, and one of each device on which several ranks' findings come together.
    pub(super) lanes: [Vec<Lane>; IN_FLIGHT_MAX],
    /// What the rows of the batch in each lane chose, on each device.
    pub(super) kept: [Vec<Buffer<u32>>; IN_FLIGHT_MAX],
    /// Whether they are kept: where other processes have ranks, too, it is the leader who chooses.
    keeps: bool,
    in_flight: VecDeque<InFlight>,
    /// The lane of the next one.
    next: usize,
    /// Whether each row of the last one samples at its last probe.
    pub(super) samples: Vec<bool>,
}

/// Waits until all are reached. Devices wait for each other in sums: one that failed keeps the others
/// from theirs for ever, and is seen when all are looked at in turn.
fn wait_for(done: &[Timer]) -> Result<(), CudaError> {
    if let [one] = done {
        return one.wait();
    }
    loop {
        let reached = done.iter().map(Timer::is_reached);
        if reached.collect::<Result<Vec<_>, _>>()?.iter().all(|reached| *reached) {
            return Ok(());
        }
        std::thread::yield_now();
    }
}

impl Batches {
    /// A row writes a page of its own, so there are as many rows as pages at most.
    pub(super) fn new(model: &CudaModel, limits: Limits) -> Result<Self, CudaError> {
        let kept = |device: &Device| device.alloc(limits.pages, "chosen tokens");
        let kept = || model.devices().map(kept).collect::<Result<_, _>>();
        let lanes = model.parts.len() + model.devices().count();
        let lanes = || (0..lanes).map(|_| Lane::default()).collect();
        Ok(Self {
            lanes: [lanes(), lanes()],
            kept: [kept()?, kept()?],
            keeps: !model.is_spread(),
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
        if self.in_flight.len() == IN_FLIGHT_MAX {
            let message = format!("{IN_FLIGHT_MAX} batches are in flight");
            return Err(ExecutorError { message, fatal: false });
        }
        self.check(rows)?;
        Ok(InFlight { lane: self.next, rows, asked: Vec::new(), choices: 0, done: Vec::new() })
    }

    /// Refuses more rows than can be.
    pub(super) fn check(&self, rows: usize) -> Result<(), ExecutorError> {
        let pages = self.kept[0][0].len();
        match rows > pages {
            true => {
                let message = format!("{rows} rows on {pages} pages");
                Err(ExecutorError { message, fatal: false })
            }
            false => Ok(()),
        }
    }

    /// It is submitted.
    pub(super) fn push(&mut self, batch: InFlight, rows: &[Row<'_>], done: Vec<Timer>) {
        let keeps = self.keeps;
        let samples = |row: &Row<'_>| keeps && row.probes.last().is_some_and(|probe| probe.sample);
        self.samples = rows.iter().map(samples).collect();
        self.next = (self.next + 1) % IN_FLIGHT_MAX;
        self.in_flight.push_back(InFlight { done, ..batch });
    }

    /// Waits for the oldest one.
    fn wait(&mut self) -> Result<InFlight, ExecutorError> {
        let nothing = || ExecutorError { message: "nothing is in flight".into(), fatal: false };
        let batch = self.in_flight.pop_front().ok_or_else(nothing)?;
        wait_for(&batch.done).map_err(lost)?;
        Ok(batch)
    }

    /// Waits for the oldest one, and makes one answer of what its ranks found.
    pub(super) fn collect(&mut self) -> Result<Vec<Vec<Found>>, ExecutorError> {
        let batch = self.wait()?;
        let (mut found, mut choices) = (vec![Vec::new(); batch.rows], 0);
        let lanes = &mut self.lanes[batch.lane];
        for (index, asked) in batch.asked.iter().enumerate() {
            let mut read = |questions: &Questions, lane: usize, index: usize| {
                let words = lanes[lane].answers[index].wait_for();
                words.map(|words| questions.read(words)).map_err(lost)
            };
            let mut parts = Vec::with_capacity(asked.questions.len());
            for (rank, (questions, _)) in asked.questions.iter().enumerate() {
                parts.push(read(questions, rank, index)?);
            }
            let mut samples = std::mem::take(&mut parts[0].samples);
            for choice in &asked.choices {
                // All devices draw alike.
                samples.extend(read(&choice.questions, parts.len(), choices)?.samples);
                choices += 1;
            }
            asked.tell(&parts, &samples, &mut found)?;
        }
        for kept in lanes.iter_mut().flat_map(|lane| &mut lane.kept) {
            check_kept(&found, kept.wait_for().map_err(lost)?)?;
        }
        Ok(found)
    }

    /// Waits for the oldest one: what each of `ranks` ranks found.
    pub(super) fn collect_apart(&mut self, ranks: usize) -> Result<Partials, ExecutorError> {
        let batch = self.wait()?;
        let rows = || (0..batch.rows).map(|_| Vec::new()).collect();
        let mut found: Partials = (0..ranks).map(|_| rows()).collect();
        let lanes = &mut self.lanes[batch.lane];
        for (index, mut asked) in batch.asked.into_iter().enumerate() {
            for (rank, (lane, found)) in lanes.iter_mut().zip(&mut found).enumerate() {
                let words = lane.answers[index].wait_for().map_err(lost)?;
                let answers = asked.questions[rank].0.read(words);
                asked.tell_apart(rank, answers, found);
            }
        }
        Ok(found)
    }
}

impl CudaExecutor {
    /// Asks about the probes whose logits are on the devices: `first..first + count` of the chunk.
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
        let (model, index) = (&self.model, batch.asked.len());
        let mut asked = Asked::new(rows, wanted, first, count, model);
        let Batches { lanes, kept, .. } = &mut self.batches;
        let (lanes, together) = lanes[batch.lane].split_at_mut(model.parts.len());
        let kept = &mut kept[batch.lane];
        let ranks = model.parts.iter().zip(&mut self.ranks).zip(model.places());
        for (((part, rank), place), (lane, (questions, _))) in
            ranks.zip(lanes.iter_mut().zip(&asked.questions))
        {
            let (device, p) = (&part.device, &mut rank.probes);
            let host = piece(device, &mut lane.asked, index, questions.words())?;
            let answers = piece(device, &mut lane.answers, index, questions.answer_words())?;
            let logits = (&p.logits, part.vocab.len());
            let facts = Facts { found: &p.found, ranks: 1, rows: count };
            let kept = &mut kept[place];
            device.ask(questions, logits, facts, &mut p.ask, host, answers, kept)?;
        }
        if model.is_spread() {
            asked.take_logits(model, &self.ranks)?;
        }
        for choice in &asked.choices {
            gather_logits(model, &self.ranks, &mut self.gathered, &choice.rows)?;
            let (questions, at) = (&choice.questions, batch.choices);
            let places = model.devices().zip(&mut self.gathered).zip(&mut *kept);
            for (((device, gathered), kept), lane) in places.zip(&mut *together) {
                let host = piece(device, &mut lane.asked, at, questions.words())?;
                let answers = piece(device, &mut lane.answers, at, questions.answer_words())?;
                gathered.choose(model, device, (choice, count), [host, answers], kept)?;
            }
            batch.choices += 1;
        }
        batch.asked.push(asked);
        Ok(())
    }

    /// Has each device tell what it kept, where that was chosen from the findings of several ranks.
    pub(super) fn tell_kept(&mut self, batch: &InFlight) -> Result<(), CudaError> {
        let Batches { lanes, kept, .. } = &mut self.batches;
        let together = &mut lanes[batch.lane][self.model.parts.len()..];
        let places = self.model.devices().zip(&self.gathered).zip(&kept[batch.lane]);
        for (((device, _), kept), lane) in places.zip(together) {
            let told = piece(device, &mut lane.kept, 0, batch.rows)?;
            device.read_pinned(kept, 0, told, 0, batch.rows)?;
        }
        Ok(())
    }
}

impl Asked {
    fn new(
        rows: &[Row<'_>],
        wanted: Vec<Wanted>,
        first: usize,
        count: usize,
        model: &CudaModel,
    ) -> Self {
        // As if there were one rank; then what is to be drawn and kept goes where it belongs.
        let mut all = Questions { rows: count, ..Questions::default() };
        let mut drawn = Vec::with_capacity(wanted.len());
        for w in &wanted {
            let (row, at) = (&rows[w.row], w.at - first);
            let draws = w.probe.sample && !row.sampling.is_plain_greedy();
            let sample = draws.then_some(all.samples.len());
            if draws {
                sample_question(row, w.probe.position, at, &mut all);
            }
            if w.probe.sample && row.probes.last() == Some(&w.probe) {
                let at = sample.unwrap_or(at) as u32;
                all.keep.push(Keep { place: w.row as u32, at, drawn: draws });
            }
            drawn.push(sample);
        }
        let tops = |vocab: usize| -> Vec<(u32, u32)> {
            let top = |w: &Wanted| ((w.at - first) as u32, w.probe.top.min(vocab) as u32);
            wanted.iter().map(top).collect()
        };
        let (choices, logits) = (Vec::new(), Vec::new());
        if let ([part], true) = (&model.parts[..], model.is_whole()) {
            all.tops = tops(part.vocab.len());
            return Self { wanted, first, questions: vec![(all, 0)], choices, drawn, logits };
        }
        let part = |part: &RankModel| {
            let tops = tops(part.vocab.len());
            let questions = Questions { rows: count, tops, ..Questions::default() };
            (questions, part.vocab.start as u32)
        };
        let questions = model.parts.iter().map(part).collect();
        let choices = if model.is_spread() { choices } else { Choice::all(&all) };
        Self { wanted, first, questions, choices, drawn, logits }
    }

    /// Has the logits come to the host from which a token is drawn.
    fn take_logits(&mut self, model: &CudaModel, ranks: &[Rank]) -> Result<(), CudaError> {
        for (part, rank) in model.parts.iter().zip(ranks) {
            let vocab = part.vocab.len();
            let rows = self.wanted.iter().zip(&self.drawn).map(|(wanted, drawn)| {
                let mut row = vec![0.0; if drawn.is_some() { vocab } else { 0 }];
                let from = (wanted.at - self.first) * vocab;
                part.device.read(&rank.probes.logits, from, &mut row).map(|()| row)
            });
            self.logits.push(rows.collect::<Result<_, _>>()?);
        }
        Ok(())
    }

    /// Tells each probe's row what a rank found.
    fn tell_apart(&mut self, rank: usize, answers: Answers, found: &mut [Vec<Partial>]) {
        let start = self.questions[rank].1;
        let logits = std::mem::take(&mut self.logits[rank]);
        for ((wanted, top), logits) in self.wanted.iter().zip(answers.tops).zip(logits) {
            let facts = answers.facts[wanted.at - self.first];
            let TokenFound { argmax, max, log_sum_exp, target } = facts;
            found[wanted.row].push(Partial {
                stats: VocabStats { argmax, max, log_sum_exp },
                target: wanted.probe.target.map(|_| target).filter(|target| !target.is_nan()),
                top: top.into_iter().map(|(token, logit)| (token + start, logit)).collect(),
                logits,
            });
        }
    }

    /// Tells each probe's row what was found by the ranks, and drawn.
    fn tell(
        &self,
        parts: &[Answers],
        samples: &[(TokenId, f32)],
        found: &mut [Vec<Found>],
    ) -> Result<(), ExecutorError> {
        for (index, (wanted, drawn)) in self.wanted.iter().zip(&self.drawn).enumerate() {
            let at = wanted.at - self.first;
            let facts = join(&parts.iter().map(|part| part.facts[at]).collect::<Vec<_>>());
            if !facts.log_sum_exp.is_finite() {
                let position = wanted.probe.position;
                let message = format!("the model's logits at position {position} are not finite");
                return Err(ExecutorError { message, fatal: false });
            }
            let scored = |(token, logit)| Scored { token, logprob: logprob(logit, &facts) };
            let chosen = || drawn.map_or((facts.argmax, facts.max), |at| samples[at]);
            let top = parts.iter().zip(&self.questions).map(|(part, (_, start))| {
                part.tops[index].iter().map(|(token, logit)| (token + start, *logit)).collect()
            });
            let top = join_top(top, wanted.probe.top);
            found[wanted.row].push(Found {
                target: wanted.probe.target.map(|_| logprob(facts.target, &facts)),
                sampled: wanted.probe.sample.then(|| scored(chosen())),
                top: top.into_iter().map(scored).collect(),
            });
        }
        Ok(())
    }
}

/// Refuses tokens that a device kept which are not those that are told: the rows behind go on with them.
fn check_kept(found: &[Vec<Found>], kept: &[u32]) -> Result<(), ExecutorError> {
    let sampled = found.iter().map(|found| found.last().and_then(|last| last.sampled));
    for (row, (sampled, kept)) in sampled.zip(kept).enumerate() {
        if let Some(Scored { token, .. }) = sampled.filter(|sampled| sampled.token != *kept) {
            let message = format!("GPU: row {row} goes on with token {kept}, and {token} is told");
            return Err(ExecutorError { message, fatal: true });
        }
    }
    Ok(())
}

/// The norm is a sum of at least this token's weight; rounding must not make it more than 1.
fn logprob(logit: f32, found: &TokenFound) -> f32 {
    (logit - found.log_sum_exp).min(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_what_is_told() {
        let found = |sampled: Option<u32>| Found {
            sampled: sampled.map(|token| Scored { token, logprob: -1.0 }),
            ..Found::default()
        };
        // Rows that are asked nothing, only for a score, and for tokens of which the last one is kept.
        let rows = [
            vec![],
            vec![found(None)],
            vec![found(Some(4))],
            vec![found(Some(5)), found(Some(6))],
            vec![found(Some(7)), found(None)],
        ];
        for (kept, said) in [
            ([9, 9, 4, 6, 9], ""),
            ([0, 0, 4, 6, 7], ""),
            ([9, 9, 5, 6, 9], "GPU: row 2 goes on with token 5, and 4 is told"),
            ([9, 9, 4, 5, 9], "GPU: row 3 goes on with token 5, and 6 is told"),
        ] {
            match check_kept(&rows, &kept) {
                Ok(()) => assert_eq!(said, "", "{kept:?}"),
                Err(error) => assert_eq!((&*error.message, error.fatal), (said, true)),
            }
        }
    }
}
