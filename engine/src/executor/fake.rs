//! An executor without a model: deterministic tokens, settable latency. It lets a whole cluster run
//! in a test.

mod pipeline;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{
    Executor, ExecutorError, Found, KvDtype, KvFormat, KvLayout, Limits, ModelHash, PageId,
    Pipeline, Row, Scored, TokenId,
};
use crate::core::sampling::{Sampling, Scratch, sample};

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
    /// Tensor-parallel ranks that its pages look like they come from.
    pub tp: usize,
    /// It takes a step before the last one is collected, as a GPU does.
    pub pipelines: bool,
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
            tp: 1,
            pipelines: false,
        }
    }
}

/// A gate that steps wait at.
#[derive(Debug, Default)]
pub struct Gate {
    passage: Mutex<Passage>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Passage {
    /// Steps that may pass; `usize::MAX`: all.
    steps: usize,
    /// A step is at the gate.
    waiting: bool,
}

impl Gate {
    /// Opens or closes the gate; a new one is closed.
    pub fn set_open(&self, open: bool) {
        self.lock().steps = if open { usize::MAX } else { 0 };
        self.changed.notify_all();
    }

    /// Lets so many more steps pass.
    pub fn let_through(&self, steps: usize) {
        let mut passage = self.lock();
        passage.steps = passage.steps.saturating_add(steps);
        self.changed.notify_all();
    }

    /// Whether a step waits that may not pass: all before it are over.
    #[must_use]
    pub fn holds_a_step(&self) -> bool {
        let passage = self.lock();
        passage.waiting && passage.steps == 0
    }

    fn wait(&self) {
        let mut passage = self.lock();
        while passage.steps == 0 {
            passage.waiting = true;
            passage = self.changed.wait(passage).unwrap_or_else(PoisonError::into_inner);
        }
        passage.waiting = false;
        if passage.steps < usize::MAX {
            passage.steps -= 1;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Passage> {
        self.passage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a slot holds that was never written.
const EMPTY: u32 = 0;
/// What a slot holds whose elements do not agree: no token's KV.
const NOTHING: u32 = u32::MAX;

/// What the slot of `token` holds behind a slot that holds `before`; [`EMPTY`]: behind nothing.
fn extended(before: u32, token: TokenId) -> u32 {
    let hash = mix(u64::from(before), u64::from(token) + 1);
    ((hash >> 32) as u32).clamp(EMPTY + 1, NOTHING - 1)
}

/// See the [module](self).
///
/// It remembers which tokens each slot of its pages was computed for (a hash of the slot's token and
/// all before it) and refuses a row whose page table says something else: KV that went astray is an
/// error, not a different answer.
#[derive(Clone, Debug)]
pub struct FakeExecutor {
    options: FakeOptions,
    /// `[page][slot]`, see [`extended`]; [`EMPTY`]: never written.
    slots: Vec<u32>,
    queue: pipeline::Queue,
}

impl FakeExecutor {
    /// The probability the fake gives to its own next token; the others share the rest.
    pub const CONFIDENCE: f32 = 0.9;

    /// A fake that behaves as `options` say.
    #[must_use]
    pub fn new(options: FakeOptions) -> Self {
        let Limits { pages, page_size, .. } = options.limits;
        Self { slots: vec![EMPTY; pages * page_size], options, queue: pipeline::Queue::default() }
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

impl FakeExecutor {
    /// The token that `sampling` chooses after `context`, whose answer begins at `answer_start`.
    #[must_use]
    pub fn sampled(
        &self,
        context: &[TokenId],
        answer_start: usize,
        sampling: &Sampling,
    ) -> TokenId {
        let next = self.next_token(context);
        if sampling.is_plain_greedy() {
            return next;
        }
        let FakeOptions { limits, first_token, .. } = &self.options;
        let other = ((1.0 - Self::CONFIDENCE) / (limits.vocab_size as f32 - 1.0)).ln();
        let mut logits = vec![other; limits.vocab_size];
        logits[..*first_token as usize].fill(f32::NEG_INFINITY);
        logits[next as usize] = Self::CONFIDENCE.ln();
        let history = &context[answer_start..];
        sample(&mut logits, history, history.len(), sampling, &mut Scratch::default())
    }
}

impl Executor for FakeExecutor {
    fn limits(&self) -> Limits {
        self.options.limits
    }

    fn execute(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        self.extend(rows)
    }

    fn pipeline(&mut self) -> Option<&mut dyn Pipeline> {
        if self.options.pipelines { Some(self) } else { None }
    }

    fn kv_format(&self) -> Option<KvFormat> {
        let FakeOptions { salt, agreement_percent, stop_token, limits, .. } = &self.options;
        let mut model = [0; 32];
        let parts = [*salt, *agreement_percent, stop_token.1, limits.vocab_size as u64];
        for (bytes, part) in model.chunks_exact_mut(8).zip(parts) {
            bytes.copy_from_slice(&part.to_le_bytes());
        }
        Some(KvFormat { model: ModelHash(model), layout: self.layout() })
    }

    fn read_page(&mut self, page: PageId, out: &mut Vec<u8>) -> Result<(), ExecutorError> {
        self.catch_up();
        let layout = self.layout();
        out.clear();
        let slots = &self.slots[page.0 as usize * layout.page_size..][..layout.page_size];
        put_page(&layout, slots, out);
        Ok(())
    }

    fn write_page(&mut self, page: PageId, data: &[u8]) -> Result<(), ExecutorError> {
        let layout = self.layout();
        if data.len() != layout.page_bytes() {
            let (expected, found) = (layout.page_bytes(), data.len());
            let message = format!("expected a page of {expected} bytes, found {found}");
            return Err(ExecutorError { message, fatal: false });
        }
        self.catch_up();
        let tokens = &mut self.slots[page.0 as usize * layout.page_size..][..layout.page_size];
        tokens.fill(EMPTY);
        let mut elements = data.as_chunks::<4>().0.iter();
        for_each_element(&layout, |slot, mark| {
            let element = elements.next().map_or(0, |bytes| u32::from_le_bytes(*bytes)) ^ mark;
            // Elements that do not agree are no token's.
            let agrees = tokens[slot] == EMPTY || tokens[slot] == element;
            tokens[slot] = if agrees { element } else { NOTHING };
        });
        Ok(())
    }
}

fn put_page(layout: &KvLayout, slots: &[u32], out: &mut Vec<u8>) {
    for_each_element(layout, |slot, mark| out.extend((slots[slot] ^ mark).to_le_bytes()));
}

/// Calls `f` with the slot and the mark of each element of a page, in their order. The mark tells
/// elements of the same token apart by layer, head and place.
fn for_each_element(layout: &KvLayout, mut f: impl FnMut(usize, u32)) {
    for rank in 0..layout.tp {
        for layer in 0..layout.layers {
            let mark = |value: bool, head: usize, dim: usize| {
                let place = [layer, usize::from(value), head, dim];
                let hash = place.iter().fold(17, |hash, &part| mix(hash, part as u64));
                (hash >> 32) as u32
            };
            for head in layout.heads(rank) {
                for dim in 0..layout.head_dim {
                    (0..layout.page_size).for_each(|slot| f(slot, mark(false, head, dim)));
                }
            }
            for head in layout.heads(rank) {
                for slot in 0..layout.page_size {
                    (0..layout.head_dim).for_each(|dim| f(slot, mark(true, head, dim)));
                }
            }
        }
    }
}

impl FakeExecutor {
    /// Whether `page` is the last one of a sequence of `tokens`, whatever lies behind the last token.
    #[must_use]
    pub fn is_page(layout: &KvLayout, tokens: &[TokenId], page: &[u8]) -> bool {
        let mut slots = Vec::with_capacity(tokens.len());
        for &token in tokens {
            slots.push(extended(slots.last().copied().unwrap_or(EMPTY), token));
        }
        let last = slots.chunks(layout.page_size).next_back().unwrap_or_default();
        let mut elements = page.as_chunks::<4>().0.iter();
        let mut right = page.len() == layout.page_bytes();
        for_each_element(layout, |slot, mark| {
            let element = elements.next().map(|bytes| u32::from_le_bytes(*bytes) ^ mark);
            right &= last.get(slot).is_none_or(|token| element == Some(*token));
        });
        right
    }

    fn layout(&self) -> KvLayout {
        let FakeOptions { limits, tp, .. } = &self.options;
        KvLayout {
            page_size: limits.page_size,
            layers: 2,
            kv_heads: 4,
            head_dim: 2,
            dtype: KvDtype::F32,
            tp: (*tp).max(1),
        }
    }

    /// Extends every row, in its time, and answers its probes.
    fn extend(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        if let Some(gate) = &self.options.gate {
            gate.wait();
        }
        let tokens: usize = rows.iter().map(|row| row.context.len() - row.start).sum();
        let time = self.options.step_latency + self.options.token_latency * tokens as u32;
        if !time.is_zero() {
            std::thread::sleep(time);
        }
        for (index, row) in rows.iter().enumerate() {
            self.keep(row).map_err(|what| {
                let message = format!("row {index}: {what}");
                ExecutorError { message, fatal: false }
            })?;
        }
        Ok(rows.iter().map(|row| self.answer(row)).collect())
    }

    /// Checks the KV that a row builds on, and adds that of its new tokens.
    fn keep(&mut self, row: &Row<'_>) -> Result<(), String> {
        let page_size = self.options.limits.page_size;
        let mut kept = EMPTY;
        for (index, page) in row.pages.iter().enumerate() {
            let start = index * page_size;
            let end = row.context.len().min(start + page_size);
            let slots = self.slots.get_mut(page.0 as usize * page_size..).unwrap_or_default();
            for (position, slot) in (start..end).zip(slots) {
                kept = extended(kept, row.context[position]);
                if position >= row.start {
                    *slot = kept;
                } else if *slot != kept {
                    return Err(format!(
                        "position {position} holds the KV of another token than {}",
                        row.context[position]
                    ));
                }
            }
        }
        Ok(())
    }

    fn answer(&self, row: &Row<'_>) -> Vec<Found> {
        row.probes
            .iter()
            .map(|probe| {
                let context = &row.context[..=probe.position];
                let scored = |token| Scored { token, logprob: self.logprob(context, token) };
                let next = self.next_token(context);
                let sampled = self.sampled(context, row.answer_start, row.sampling);
                let others = (0..self.options.limits.vocab_size as TokenId).filter(|&t| t != next);
                Found {
                    target: probe.target.map(|token| self.logprob(context, token)),
                    sampled: probe.sample.then(|| scored(sampled)),
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
