//! One request in the engine: its tokens, how many of them have KV, and what it waits for.
//!
//! A sequence is *reading* while a drafter writes its answer, and *writing* once the base does. A
//! drafter's own sequence is writing from the start. `computed` counts the tokens whose KV is in
//! the pages. The result at position `j` is about token `j + 1`, so a reading sequence holds its
//! last known token back until the next one, or the end of the draft, is known: this way no
//! position is ever computed twice.
//!
//! On an executor that pipelines, rows of a sequence may be *in flight*: sent, and not committed. The
//! next row goes behind them if nothing that they find can change it: prefill always may, and what is
//! written goes on from the token that is not known yet, without penalties, which would have to count
//! it. A row that scores a draft is waited for.
//!
//! An answer that was begun in another engine goes on here: its [`Known`] tokens follow the prompt
//! as if they had been read or written here, so positions, penalties and the switch rule are what
//! they would have been.

use std::sync::Arc;

use super::pages::{Page, PageTable};
use super::sampling::Sampling;
use super::switch::SwitchRule;
use crate::executor::{Found, Probe, Row, Scored, TokenId};

/// What is asked of the engine.
#[derive(Clone, Debug)]
pub struct Request {
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// Tokens of the answer at most, drafted ones included; at least 1.
    pub max_tokens: usize,
    /// How the engine's own tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end the answer; they are not part of it.
    pub stop_tokens: Arc<[TokenId]>,
    /// So many most likely tokens are reported at each position of the answer.
    pub top_logprobs: usize,
    /// Set: somebody else begins the answer, and what becomes of the draft is not decided.
    pub draft: Option<DraftPolicy>,
    /// What is known of the answer already.
    pub known: Known,
}

/// The beginning of an answer that goes on here.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    /// The answer's first tokens. While a draft is read they are its first ones: no switch before
    /// the last of them is possible, and what [`Sequence::push_draft`] takes comes behind them.
    pub answer: Vec<TokenId>,
    /// `ln P` of the first draft tokens, none of them NaN; without effect if no draft is read.
    /// What is not here is scored here.
    pub scores: Vec<f32>,
}

/// How a draft is read (design §1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DraftPolicy {
    /// Tokens in the window, at least 1.
    pub window: usize,
    /// γ in `(0, 1]`.
    pub threshold: f64,
    /// Go on after a draft that ended without a switch, or end the answer there.
    pub continue_complete: bool,
    /// Go on after an empty draft, or end the answer there.
    pub continue_empty: bool,
    /// Another engine goes on: nothing is computed here once the draft is decided.
    pub moves_on: bool,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token, or the end of a draft that is not continued.
    Stop,
    /// `max_tokens`.
    Length,
}

/// The base's view of one position of the answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Judged {
    /// The token there, with its log-probability.
    pub token: Scored,
    /// The most likely tokens there, most likely first.
    pub top: Vec<Scored>,
}

/// What became of a draft; what comes next is the engine's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether a window reached the threshold.
    pub switched: bool,
    /// Draft tokens that belong to the answer.
    pub kept: usize,
    /// Draft tokens that were given.
    pub drafted: usize,
}

/// What happens to a sequence. Positions are indices in the answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Draft tokens `first..first + scores.len()` were scored.
    Read {
        /// The first one's index.
        first: usize,
        /// One for each; none if a draft was decided by its end alone.
        scores: Vec<Judged>,
        /// Set once, in the last event of its kind. It comes with the scores it rests on, so that
        /// nobody takes the tokens behind a switch for certain.
        decision: Option<Decision>,
    },
    /// The engine wrote a token.
    Wrote {
        /// Its index in the answer.
        index: usize,
        /// The token.
        judged: Judged,
    },
    /// The answer is over; the last event.
    Finished {
        /// Why.
        reason: Finish,
        /// Tokens of the answer.
        answer_tokens: usize,
    },
    /// The engine could not go on; the last event.
    Failed {
        /// Why.
        message: String,
        /// The engine is of no further use: another one may well answer.
        fatal: bool,
    },
}

#[derive(Debug)]
struct Reading {
    policy: DraftPolicy,
    rule: SwitchRule,
    complete: bool,
}

#[derive(Debug)]
enum Phase {
    Reading(Reading),
    Writing,
    /// Another engine writes.
    Moving,
    Finished,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Sequence {
    tokens: Vec<TokenId>,
    prompt_len: usize,
    /// Tokens of the answer that were known from the start.
    known_len: usize,
    computed: usize,
    /// Tokens that rows in flight extend.
    in_flight: usize,
    /// Rows in flight with probes.
    asked: usize,
    max_tokens: usize,
    sampling: Sampling,
    stop_tokens: Arc<[TokenId]>,
    top_logprobs: usize,
    phase: Phase,
    /// The sequence's KV pages.
    pub pages: PageTable,
}

impl Sequence {
    /// A sequence with nothing computed.
    #[must_use]
    pub fn new(request: Request) -> Self {
        let Known { answer, scores } = request.known;
        let phase = match request.draft {
            Some(policy) => {
                let rule = SwitchRule::new(policy.window, policy.threshold);
                let mut rule = rule.with_accepted(answer.len());
                // The last token's score may switch, and that is told together with its result.
                for &score in scores.iter().take(answer.len().saturating_sub(1)) {
                    rule.push(score);
                }
                let complete = answer.len() >= request.max_tokens;
                Phase::Reading(Reading { policy, rule, complete })
            }
            None => Phase::Writing,
        };
        let (prompt_len, known_len) = (request.prompt.len(), answer.len());
        let mut tokens = request.prompt;
        tokens.extend(answer);
        Self {
            prompt_len,
            known_len,
            tokens,
            computed: 0,
            in_flight: 0,
            asked: 0,
            max_tokens: request.max_tokens,
            sampling: request.sampling,
            stop_tokens: request.stop_tokens,
            top_logprobs: request.top_logprobs,
            phase,
            pages: PageTable::default(),
        }
    }

    /// Tokens whose KV is in the pages.
    #[must_use]
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// [`Self::computed`], with what is in flight: where the next row begins.
    #[must_use]
    pub fn sent(&self) -> usize {
        self.computed + self.in_flight
    }

    /// The tokens whose KV is in the pages, undecided draft tokens included.
    #[must_use]
    pub fn computed_tokens(&self) -> &[TokenId] {
        &self.tokens[..self.computed]
    }

    /// Tokens of the answer so far, undecided draft tokens included.
    #[must_use]
    pub fn answer_len(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Whether the last event was given.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        matches!(self.phase, Phase::Finished)
    }

    /// Tokens that can be extended now.
    #[must_use]
    pub fn work(&self) -> usize {
        let ready = match &self.phase {
            Phase::Finished | Phase::Moving => 0,
            Phase::Writing if self.asked > 0 => return usize::from(self.writes_on_unseen()),
            Phase::Reading(_) if self.asked > 0 => 0,
            Phase::Writing => self.tokens.len(),
            Phase::Reading(reading) if reading.complete && self.continues_after(reading) => {
                self.tokens.len()
            }
            Phase::Reading(_) => self.tokens.len() - 1,
        };
        ready.saturating_sub(self.sent())
    }

    /// Whether what is in flight must be committed before its next row, and there will be one.
    #[must_use]
    pub fn is_held(&self) -> bool {
        match &self.phase {
            _ if self.asked == 0 => false,
            Phase::Finished | Phase::Moving => false,
            Phase::Writing => self.goes_on_unseen() && !self.writes_on_unseen(),
            Phase::Reading(reading) => reading.complete || self.sent() < self.tokens.len() - 1,
        }
    }

    /// Whether the limit leaves room behind the token that is being sampled.
    fn goes_on_unseen(&self) -> bool {
        self.answer_len() + self.asked < self.max_tokens
    }

    /// Whether the token that is being sampled can be extended before it is known.
    fn writes_on_unseen(&self) -> bool {
        self.asked == 1 && self.goes_on_unseen() && !self.sampling.has_penalties()
    }

    /// Whether somebody else is to begin this answer and has not yet.
    #[must_use]
    pub fn awaits_draft(&self) -> bool {
        let reading = matches!(&self.phase, Phase::Reading(reading) if !reading.complete);
        reading && self.answer_len() == 0
    }

    /// Whether nobody waits for the very next token: the prompt, or a recomputation, is under way.
    #[must_use]
    pub fn is_prefilling(&self) -> bool {
        self.sent() < self.first_probe()
    }

    /// Takes draft tokens. What exceeds `max_tokens`, or comes after a decision, is dropped.
    pub fn push_draft(&mut self, draft: &[TokenId]) {
        let room = self.max_tokens - self.answer_len().min(self.max_tokens);
        if let Phase::Reading(reading) = &mut self.phase
            && !reading.complete
        {
            self.tokens.extend_from_slice(&draft[..draft.len().min(room)]);
            reading.complete = draft.len() >= room;
        }
    }

    /// The draft is over. A decision that this makes possible is made.
    pub fn end_draft(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        if let Phase::Reading(reading) = &mut self.phase {
            reading.complete = true;
            self.read(Vec::new(), &mut events);
        }
        events
    }

    /// The tokens whose KV another sequence may have left in the prefix cache: all that are known,
    /// but for those whose results are still wanted. Empty once something is computed.
    #[must_use]
    pub fn reusable(&self) -> &[TokenId] {
        if self.sent() == 0 { &self.tokens[..self.first_probe()] } else { &[] }
    }

    /// The tokens whose KV this sequence is about to put into the prefix cache, and how many of them
    /// it has computed; none unless it is prefilling.
    #[must_use]
    pub fn prefilling(&self) -> (&[TokenId], usize) {
        let prefilling = self.computed < self.first_probe();
        let end = if prefilling { self.first_probe().min(self.prompt_len) } else { 0 };
        (&self.tokens[..end], self.computed.min(end))
    }

    /// Takes over `pages`, the KV of the first `computed` tokens.
    pub fn reuse(&mut self, pages: Vec<Page>, computed: usize) {
        self.computed = computed;
        pages.into_iter().for_each(|page| self.pages.push(page));
    }

    /// The tokens whose KV is in the pages for good: a draft that is not decided may still be cut,
    /// but not before the last token that was scored or is out.
    #[must_use]
    pub fn settled(&self) -> &[TokenId] {
        match &self.phase {
            Phase::Reading(reading) => {
                let certain = self.prompt_len + reading.rule.scored().max(self.known_len);
                &self.tokens[..self.computed.min(certain)]
            }
            _ => &self.tokens[..self.computed],
        }
    }

    /// Forgets all KV, to be recomputed. No result that was given is given again.
    pub fn preempt(&mut self) {
        debug_assert_eq!(self.in_flight, 0, "what is in flight is committed first");
        self.computed = 0;
        self.pages.truncate(0);
    }

    /// The probes for the next `count` tokens.
    #[must_use]
    pub fn probes(&self, count: usize) -> Vec<Probe> {
        let end = self.sent() + count;
        (self.first_probe().max(self.sent())..end)
            .map(|position| {
                let target = match self.phase {
                    Phase::Reading(_) => self.tokens.get(position + 1).copied(),
                    _ => None,
                };
                Probe { position, target, sample: true, top: self.top_logprobs }
            })
            .collect()
    }

    /// The executor's row for the next `count` tokens, with the probes of [`Self::probes`]. `before`
    /// is the place of its row in the batch before, if it has one there.
    #[must_use]
    pub fn row<'a>(&'a self, count: usize, probes: &'a [Probe], before: Option<usize>) -> Row<'a> {
        let end = self.sent() + count;
        Row {
            context: &self.tokens[..end.min(self.tokens.len())],
            start: self.sent(),
            pages: self.pages.ids(),
            answer_start: self.prompt_len,
            probes,
            sampling: &self.sampling,
            pending: before.filter(|_| end > self.tokens.len()),
        }
    }

    /// The row for the next `count` tokens is in flight.
    pub fn send(&mut self, count: usize, probes: &[Probe]) {
        self.in_flight += count;
        self.asked += usize::from(!probes.is_empty());
    }

    /// Takes the results of the oldest row in flight, which extended `count` tokens.
    pub fn commit(&mut self, count: usize, probes: &[Probe], found: Vec<Found>) -> Vec<Event> {
        self.computed += count;
        self.in_flight -= count;
        self.asked -= usize::from(!probes.is_empty());
        let mut events = Vec::new();
        let mut answers = probes.iter().zip(found);
        let Phase::Reading(reading) = &mut self.phase else {
            if let Some((_, found)) = answers.next() {
                self.write(found, &mut events);
            }
            return events;
        };
        let mut scores = Vec::new();
        let mut own = None;
        for (probe, found) in answers.by_ref() {
            let (Some(token), Some(logprob)) = (probe.target, found.target) else {
                // The last token of a complete draft was extended: this is about the next one.
                own = Some(found);
                break;
            };
            scores.push(Judged { token: Scored { token, logprob }, top: found.top });
            if reading.rule.push(logprob) {
                break;
            }
        }
        let ahead = self.read(scores, &mut events);
        let written = own.into_iter().chain(answers.map(|(_, found)| found));
        self.write_along(&ahead, written, &mut events);
        events
    }

    /// The first position whose result is still wanted; 0 if none is.
    fn first_probe(&self) -> usize {
        match &self.phase {
            Phase::Reading(reading) => self.prompt_len - 1 + reading.rule.scored(),
            Phase::Writing => self.tokens.len() - 1,
            Phase::Moving | Phase::Finished => 0,
        }
    }

    fn continues_after(&self, reading: &Reading) -> bool {
        match self.answer_len() {
            0 => reading.policy.continue_empty,
            len => len < self.max_tokens && reading.policy.continue_complete,
        }
    }

    /// Tells of new scores, and decides the draft if it can be decided. Returns the draft tokens
    /// behind a switch that were extended with it.
    fn read(&mut self, scores: Vec<Judged>, events: &mut Vec<Event>) -> Vec<TokenId> {
        let Phase::Reading(reading) = &self.phase else {
            return Vec::new();
        };
        let (scored, drafted) = (reading.rule.scored(), self.answer_len());
        let first = scored - scores.len();
        let decision = match reading.rule.switch() {
            Some(index) => Some(Decision { switched: true, kept: index + 1, drafted }),
            None if reading.complete && scored == drafted => {
                Some(Decision { switched: false, kept: drafted, drafted })
            }
            None => None,
        };
        let moves_on = reading.policy.moves_on;
        let goes_on = decision.is_some_and(|d| d.switched) || self.continues_after(reading);
        if decision.is_some() || !scores.is_empty() {
            events.push(Event::Read { first, scores, decision });
        }
        let Some(Decision { kept, .. }) = decision else {
            return Vec::new();
        };
        self.phase = if moves_on { Phase::Moving } else { Phase::Writing };
        let mut ahead = self.tokens.split_off(self.prompt_len + kept);
        ahead.truncate(self.computed.saturating_sub(self.tokens.len()));
        self.computed = self.computed.min(self.tokens.len());
        if kept == self.max_tokens {
            self.finish(Finish::Length, events);
        } else if !goes_on {
            self.finish(Finish::Stop, events);
        }
        ahead
    }

    /// Writes what was sampled while the draft was read to its end: the token after the switch, and, as long as the base says what the drafter said, the ones after it (speculative
    /// decoding's rule: KV of an agreed token is already there).
    fn write_along(
        &mut self,
        ahead: &[TokenId],
        found: impl Iterator<Item = Found>,
        events: &mut Vec<Event>,
    ) {
        for (index, found) in found.enumerate() {
            let before = self.answer_len();
            self.write(found, events);
            let agreed = self.answer_len() > before && self.tokens.last() == ahead.get(index);
            if self.is_finished() || !agreed {
                return;
            }
            self.computed += 1;
        }
    }

    fn write(&mut self, found: Found, events: &mut Vec<Event>) {
        let Some(token) = found.sampled.filter(|_| matches!(self.phase, Phase::Writing)) else {
            return;
        };
        if self.stop_tokens.contains(&token.token) {
            return self.finish(Finish::Stop, events);
        }
        let index = self.answer_len();
        self.tokens.push(token.token);
        events.push(Event::Wrote { index, judged: Judged { token, top: found.top } });
        if self.answer_len() == self.max_tokens {
            self.finish(Finish::Length, events);
        }
    }

    fn finish(&mut self, reason: Finish, events: &mut Vec<Event>) {
        self.phase = Phase::Finished;
        events.push(Event::Finished { reason, answer_tokens: self.answer_len() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(draft: Option<DraftPolicy>, sampling: Sampling) -> Request {
        Request {
            prompt: vec![3, 4, 5],
            max_tokens: 3,
            sampling,
            stop_tokens: Arc::from([]),
            top_logprobs: 0,
            draft,
            known: Known::default(),
        }
    }

    /// Sends a row of so many tokens; what it asks.
    fn send(sequence: &mut Sequence, count: usize) -> Vec<Probe> {
        let probes = sequence.probes(count);
        sequence.send(count, &probes);
        probes
    }

    fn found(target: Option<f32>) -> Vec<Found> {
        vec![Found { target, sampled: Some(Scored { token: 9, logprob: -0.5 }), top: Vec::new() }]
    }

    /// What can be sent, and whether a commit is waited for.
    fn next(sequence: &Sequence) -> (usize, bool) {
        (sequence.work(), sequence.is_held())
    }

    #[test]
    fn writing_goes_on_behind_a_row_in_flight() {
        let mut sequence = Sequence::new(request(None, Sampling::default()));
        send(&mut sequence, 2);
        assert_eq!(next(&sequence), (1, false), "the rest of the prompt is known");
        let last = send(&mut sequence, 1);
        assert_eq!(next(&sequence), (1, false), "and so is the place of the token behind it");
        sequence.commit(2, &[], Vec::new());
        let unseen = send(&mut sequence, 1);
        let row = sequence.row(1, &unseen, Some(7));
        assert_eq!((row.context.len(), row.start, row.pending), (3, 4, Some(7)));
        assert_eq!(unseen[0].position, 3);
        assert_eq!(next(&sequence), (0, true), "one token that nobody knows is enough");
        sequence.commit(1, &last, found(None));
        assert_eq!(next(&sequence), (1, false));
        let unseen_too = send(&mut sequence, 1);
        sequence.commit(1, &unseen, found(None));
        assert_eq!(next(&sequence), (0, false), "the limit ends it");
        let events = sequence.commit(1, &unseen_too, found(None));
        assert_eq!(events.len(), 2);
        assert!(sequence.is_finished() && sequence.sent() == sequence.computed());
    }

    #[test]
    fn penalties_and_scores_are_waited_for() {
        let penalised = Sampling { presence_penalty: 0.1, ..Sampling::default() };
        let mut sequence = Sequence::new(request(None, penalised));
        send(&mut sequence, 3);
        assert_eq!(next(&sequence), (0, true));

        let policy = DraftPolicy {
            window: 2,
            threshold: 0.9,
            continue_complete: true,
            continue_empty: true,
            moves_on: false,
        };
        let mut sequence = Sequence::new(request(Some(policy), Sampling::default()));
        sequence.push_draft(&[6]);
        send(&mut sequence, 2);
        assert_eq!(next(&sequence), (1, false), "no score is on its way");
        let score = send(&mut sequence, 1);
        assert_eq!(next(&sequence), (0, false), "there is nothing behind it yet");
        sequence.push_draft(&[7]);
        assert_eq!(next(&sequence), (0, true));
        sequence.commit(2, &[], Vec::new());
        assert_eq!(next(&sequence), (0, true));
        sequence.commit(1, &score, found(Some(-3.0)));
        assert_eq!(next(&sequence), (1, false));
    }

    #[test]
    fn what_moves_on_keeps_nobody_waiting_and_takes_nothing() {
        let policy = DraftPolicy {
            window: 2,
            threshold: 0.9,
            continue_complete: true,
            continue_empty: true,
            moves_on: true,
        };
        let mut sequence = Sequence::new(request(Some(policy), Sampling::default()));
        assert!(sequence.is_prefilling());
        assert_eq!(sequence.prefilling(), (&[3, 4][..], 0));
        assert_eq!(sequence.end_draft().len(), 1, "an empty draft is decided at once");
        assert_eq!(next(&sequence), (0, false));
        assert!(!sequence.is_prefilling() && !sequence.is_finished());
        assert_eq!((sequence.prefilling(), sequence.reusable()), ((&[][..], 0), &[][..]));
    }
}
