//! Headstart's own figures: requests through the engine's steps, as a node runs them.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use headstart_engine::core::sequence::Event;
use headstart_engine::executor::cpu::{CpuExecutor, CpuOptions};
use headstart_engine::model::{LoadOptions, Model, WeightDtype};
use headstart_engine::step::Engine;
use headstart_engine::{Executor, Known, Request, Sampling, TokenId};

use super::plan::{Figure, Plan};
use crate::failure::Failure;
use crate::models::Cancel;
use crate::models::progress::{Progress, Show};

/// An engine with a model, to be measured.
pub(super) struct Ours {
    engine: Engine,
    vocab_size: usize,
    /// State of the generator of prompts.
    random: u64,
    /// Bytes of the matrices in memory.
    pub(super) weight_bytes: u64,
    /// Bytes of those that each decode step reads.
    pub(super) decode_bytes: u64,
    /// Weights that each token meets.
    pub(super) layer_weights: u64,
    /// Bytes of the KV pool.
    pub(super) kv_bytes: u64,
}

/// How long the two halves of a run took.
#[derive(Clone, Copy, Debug)]
struct Timing {
    /// The first step, which reads all prompts.
    prefill: Duration,
    /// All later ones.
    decode: Duration,
}

impl Ours {
    /// Loads the model and makes room for everything that `plan` measures.
    ///
    /// # Errors
    /// When the model cannot be loaded, or its context is too short for the plan.
    pub(super) fn load(
        path: &Path,
        dtype: WeightDtype,
        threads: usize,
        plan: &Plan,
    ) -> Result<Self, Failure> {
        let progress = Progress::start(Show::Progress, "loading", 0);
        let load = LoadOptions { dtype, threads };
        let model = Model::load(path, load, &mut |so_far| {
            progress.set_total(so_far.bytes_total);
            progress.set(so_far.bytes_loaded);
        });
        progress.finish();
        let model = Arc::new(model.map_err(|error| {
            let (path, error) = (path.display().to_string(), error.to_string());
            let named = error.contains(&path);
            Failure::Failed(if named { error } else { format!("{path}: {error}") })
        })?);
        plan.check_context(model.config().context_length)?;
        let options = CpuOptions { threads, kv_tokens: plan.kv_tokens(), ..CpuOptions::default() };
        let executor = CpuExecutor::new(Arc::clone(&model), options)
            .map_err(|error| Failure::Failed(error.to_string()))?;
        Ok(Self {
            vocab_size: executor.limits().vocab_size,
            random: 0x9e37_79b9_7f4a_7c15,
            weight_bytes: model.weight_bytes() as u64,
            decode_bytes: model.decode_bytes() as u64,
            layer_weights: model.layer_weights() as u64,
            kv_bytes: executor.kv_bytes() as u64,
            engine: Engine::new(Box::new(executor), plan.step_tokens()),
        })
    }

    /// Runs everything once, and fills every KV page, so that no later run is the first of its kind.
    ///
    /// # Errors
    /// When the engine fails, or `cancel` is set.
    pub(super) fn warm_up(&mut self, plan: &Plan, cancel: &Cancel) -> Result<(), Failure> {
        for batch in &plan.batches {
            self.batch(*batch, plan.batch_prompt_tokens, 2, cancel)?;
        }
        let pages = self.engine.pool().total();
        for _ in 0..pages {
            if self.engine.pool().free() == 0 {
                break;
            }
            let before = self.engine.pool().free();
            self.prefill(plan.prompt_tokens, cancel)?;
            if self.engine.pool().free() == before {
                // Prompts shorter than a page leave none in the prefix cache.
                break;
            }
        }
        Ok(())
    }

    /// Tokens a second.
    ///
    /// # Errors
    /// When the engine fails, or `cancel` is set.
    pub(super) fn measure(
        &mut self,
        figure: Figure,
        plan: &Plan,
        cancel: &Cancel,
    ) -> Result<f64, Failure> {
        match figure {
            Figure::Prefill => self.prefill(plan.prompt_tokens, cancel),
            Figure::Decode => self.decode(plan.gen_tokens, cancel),
            Figure::Batch(batch) => {
                self.batch(batch, plan.batch_prompt_tokens, plan.batch_gen_tokens, cancel)
            }
        }
    }

    /// Prompt tokens a second of one prompt of `tokens`.
    fn prefill(&mut self, tokens: usize, cancel: &Cancel) -> Result<f64, Failure> {
        let timing = self.run(1, tokens, 1, cancel)?;
        Ok(rate(tokens, timing.prefill))
    }

    /// Tokens a second of one sequence that begins with one token and grows by one a step.
    fn decode(&mut self, tokens: usize, cancel: &Cancel) -> Result<f64, Failure> {
        let timing = self.run(1, 1, tokens, cancel)?;
        Ok(rate(tokens, timing.prefill + timing.decode))
    }

    /// Tokens a second of `batch` sequences together, each of which writes `tokens` after a prompt.
    /// The prompts' time does not count.
    fn batch(
        &mut self,
        batch: usize,
        prompt_tokens: usize,
        tokens: usize,
        cancel: &Cancel,
    ) -> Result<f64, Failure> {
        // The step that reads the prompts writes a token of each sequence as well.
        let timing = self.run(batch, prompt_tokens, 1 + tokens, cancel)?;
        Ok(rate(batch * tokens, timing.decode))
    }

    fn run(
        &mut self,
        requests: usize,
        prompt_tokens: usize,
        max_tokens: usize,
        cancel: &Cancel,
    ) -> Result<Timing, Failure> {
        for _ in 0..requests {
            let prompt = (0..prompt_tokens).map(|_| self.random_token()).collect();
            self.engine.add(Request {
                prompt,
                max_tokens,
                sampling: Sampling::default(),
                stop_tokens: Arc::new([]),
                top_logprobs: 0,
                draft: None,
                known: Known::default(),
            });
        }
        let begun = Instant::now();
        let mut wrote = self.step()?;
        let prefill = begun.elapsed();
        if wrote != requests {
            let found = format!("{wrote} of {requests} prompts were read in one step");
            return Err(Failure::Failed(found));
        }
        let begun = Instant::now();
        while self.engine.has_work() {
            if cancel.is_cancelled() {
                return Err(Failure::Interrupted("the benchmark was interrupted".to_owned()));
            }
            wrote += self.step()?;
        }
        let timing = Timing { prefill, decode: begun.elapsed() };
        if wrote != requests * max_tokens {
            let wanted = requests * max_tokens;
            return Err(Failure::Failed(format!("{wrote} of {wanted} tokens were written")));
        }
        Ok(timing)
    }

    /// One step. Returns how many tokens were written.
    fn step(&mut self) -> Result<usize, Failure> {
        let (events, result) = self.engine.step();
        result.map_err(|error| Failure::Failed(format!("the engine failed: {error}")))?;
        Ok(events.iter().filter(|(_, event)| matches!(event, Event::Wrote { .. })).count())
    }

    /// Any token: xorshift64.
    fn random_token(&mut self) -> TokenId {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let token = (self.random >> 11) % self.vocab_size.max(1) as u64;
        TokenId::try_from(token).unwrap_or_default()
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    tokens as f64 / time.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tiny real model through the real path. Nothing here depends on how fast it is.
    #[test]
    fn every_figure_comes_from_the_work_it_names() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stories260k");
        let plan = Plan { prompt_tokens: 512, gen_tokens: 16, ..Plan::default() };
        let cancel = Cancel::default();
        let mut ours = Ours::load(&folder, WeightDtype::Auto, 1, &plan).unwrap();
        ours.warm_up(&plan, &cancel).unwrap();
        assert_eq!(ours.engine.pool().free(), 0, "pages never touched are left");

        let counted = |ours: &mut Ours, work: &dyn Fn(&mut Ours) -> f64| {
            let before = ours.engine.counters();
            let rate = work(ours);
            let after = ours.engine.counters();
            assert!(rate.is_finite() && rate > 0.0, "{rate}");
            (after.steps - before.steps, after.tokens_extended - before.tokens_extended)
        };
        let prefill = |ours: &mut Ours| ours.prefill(512, &cancel).unwrap();
        assert_eq!(counted(&mut ours, &prefill), (1, 512));
        let decode = |ours: &mut Ours| ours.decode(16, &cancel).unwrap();
        assert_eq!(counted(&mut ours, &decode), (16, 16));
        let batch = |ours: &mut Ours| ours.batch(16, 32, 48, &cancel).unwrap();
        assert_eq!(counted(&mut ours, &batch), (1 + 48, 16 * (32 + 48)));

        let counters = ours.engine.counters();
        assert_eq!((counters.tokens_reused, counters.tokens_preempted), (0, 0));
        assert!(ours.decode_bytes > 0 && ours.decode_bytes <= ours.weight_bytes);
        assert!(ours.kv_bytes > 0);
    }

    #[test]
    fn a_context_that_is_too_short_is_named() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stories260k");
        let plan = Plan { prompt_tokens: 513, ..Plan::default() };
        let error = Ours::load(&folder, WeightDtype::Auto, 1, &plan).err().unwrap();
        assert!(matches!(&error, Failure::Usage(m) if m.contains("--pp") && m.contains("512")));
    }
}
