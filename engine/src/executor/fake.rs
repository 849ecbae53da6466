//! An executor without a model: deterministic tokens, settable latency. It lets a whole cluster run
//! in a test.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::{Executor, ExecutorError, Found, Limits, Row, Scored, TokenId};
use crate::core::sampling::{Scratch, sample};

/// How a [`FakeExecutor`] behaves.
#[derive(Clone, Debug)]
pub struct FakeOptions {
    /// Its limits.
    pub limits: Limits,
    /// Two fakes agree on the next token at this share of all contexts, in percent.
    pub agreement_percent: u64,
    /// What sets this fake apart from others where they do not agree.
    pub salt: u64,
    /// The token that ends an answer, and after how many contexts on average it comes; 0 = never.
    pub stop_token: (TokenId, u64),
    /// Lowest id the fake says by itself, so that special tokens can be left out.
    pub first_token: TokenId,
    /// Time of every step.
    pub step_latency: Duration,
    /// Time of every token of a step.
    pub token_latency: Duration,
    /// Holds every step back while it is closed.
    pub gate: Option<Arc<Gate>>,
}

impl Default for FakeOptions {
    fn default() -> Self {
        Self {
            limits: Limits { vocab_size: 512, context_length: 4096, page_size: 16, pages: 4096 },
            agreement_percent: 60,
            salt: 0,
            stop_token: (0, 0),
            first_token: 3,
            step_latency: Duration::ZERO,
            token_latency: Duration::ZERO,
            gate: None,
        }
    }
}

/// A gate that steps wait at.
#[derive(Debug, Default)]
pub struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    /// Opens or closes the gate; a new one is closed.
    pub fn set_open(&self, open: bool) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = open;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        while !*open {
            open = self.changed.wait(open).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct FakeExecutor {
    options: FakeOptions,
}

impl FakeExecutor {
    /// The probability the fake gives to its own next token; the others share the rest.
    pub const CONFIDENCE: f32 = 0.9;

    /// A fake that behaves as `options` say.
    #[must_use]
    pub fn new(options: FakeOptions) -> Self {
        Self { options }
    }

    /// The token that the fake says after `context`: a function of its last eight tokens.
    #[must_use]
    pub fn next_token(&self, context: &[TokenId]) -> TokenId {
        let options = &self.options;
        let tail = &context[context.len().saturating_sub(8)..];
        let hash = tail.iter().fold(0x517c_c1b7_2722_0a95, |hash, &id| mix(hash, u64::from(id)));
        let (stop, every) = options.stop_token;
        if every > 0 && mix(hash, 1).is_multiple_of(every) {
            return stop;
        }
        let agrees = mix(hash, 2) % 100 < options.agreement_percent;
        let voice = if agrees { mix(hash, 3) } else { mix(hash, 4 + options.salt) };
        let choices = options.limits.vocab_size as u64 - u64::from(options.first_token);
        options.first_token + (voice % choices) as TokenId
    }

    /// `ln P(token | context)`.
    #[must_use]
    pub fn logprob(&self, context: &[TokenId], token: TokenId) -> f32 {
        if token == self.next_token(context) {
            Self::CONFIDENCE.ln()
        } else {
            let others = self.options.limits.vocab_size as f32 - 1.0;
            ((1.0 - Self::CONFIDENCE) / others).ln()
        }
    }
}

impl Executor for FakeExecutor {
    fn limits(&self) -> Limits {
        self.options.limits
    }

    fn execute(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        if let Some(gate) = &self.options.gate {
            gate.wait();
        }
        let tokens: usize = rows.iter().map(|row| row.context.len() - row.start).sum();
        let time = self.options.step_latency + self.options.token_latency * tokens as u32;
        if !time.is_zero() {
            std::thread::sleep(time);
        }
        Ok(rows.iter().map(|row| self.answer(row)).collect())
    }
}

impl FakeExecutor {
    /// The token that `row`'s sampling chooses after `context`, whose likeliest one is `next`.
    fn sampled(&self, row: &Row<'_>, context: &[TokenId], next: TokenId) -> TokenId {
        if row.sampling.is_plain_greedy() {
            return next;
        }
        let FakeOptions { limits, first_token, .. } = &self.options;
        let other = ((1.0 - Self::CONFIDENCE) / (limits.vocab_size as f32 - 1.0)).ln();
        let mut logits = vec![other; limits.vocab_size];
        logits[..*first_token as usize].fill(f32::NEG_INFINITY);
        logits[next as usize] = Self::CONFIDENCE.ln();
        let history = &context[row.answer_start..];
        sample(&mut logits, history, history.len(), row.sampling, &mut Scratch::default())
    }

    fn answer(&self, row: &Row<'_>) -> Vec<Found> {
        row.probes
            .iter()
            .map(|probe| {
                let context = &row.context[..=probe.position];
                let scored = |token| Scored { token, logprob: self.logprob(context, token) };
                let next = self.next_token(context);
                let others = (0..self.options.limits.vocab_size as TokenId).filter(|&t| t != next);
                Found {
                    target: probe.target.map(|token| self.logprob(context, token)),
                    sampled: probe.sample.then(|| scored(self.sampled(row, context, next))),
                    top: std::iter::once(next).chain(others).take(probe.top).map(scored).collect(),
                }
            })
            .collect()
    }
}

fn mix(hash: u64, value: u64) -> u64 {
    let mut z = hash.rotate_left(23) ^ value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
