//! What is measured.

use crate::failure::Failure;

/// A sequence's prompt and its answer in a batch, as llama-batched-bench is usually run.
const BATCH_PROMPT_TOKENS: usize = 32;
const BATCH_GEN_TOKENS: usize = 48;
/// The KV pool holds at least so many tokens, whatever is measured, so that peak memory always
/// means the same.
const KV_TOKENS_MIN: usize = 4096;
/// Room for a sequence's last page.
const PAGE_TOKENS_MAX: usize = 64;
/// What nodes run with.
const STEP_TOKENS_MIN: usize = 512;

/// What is measured, in which sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Tokens of the prompt whose reading is timed.
    pub(super) prompt_tokens: usize,
    /// Tokens that one sequence writes alone.
    pub(super) gen_tokens: usize,
    /// Sequences that write together, ascending.
    pub(super) batches: Vec<usize>,
    /// Tokens of each of their prompts.
    pub(super) batch_prompt_tokens: usize,
    /// Tokens that each of them writes.
    pub(super) batch_gen_tokens: usize,
}

/// One figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Figure {
    /// Reading a prompt.
    Prefill,
    /// Writing, one sequence alone.
    Decode,
    /// Writing, so many sequences together.
    Batch(usize),
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            prompt_tokens: 512,
            gen_tokens: 128,
            batches: vec![1, 4, 8, 16],
            batch_prompt_tokens: BATCH_PROMPT_TOKENS,
            batch_gen_tokens: BATCH_GEN_TOKENS,
        }
    }
}

impl Plan {
    /// All figures, in the order in which they are measured and shown.
    pub(super) fn figures(&self) -> Vec<Figure> {
        let batches = self.batches.iter().map(|batch| Figure::Batch(*batch));
        [Figure::Prefill, Figure::Decode].into_iter().chain(batches).collect()
    }

    /// A figure's short name: `pp512`, `tg128`, `batch 16`.
    pub(super) fn name(&self, figure: Figure) -> String {
        match figure {
            Figure::Prefill => format!("pp{}", self.prompt_tokens),
            Figure::Decode => format!("tg{}", self.gen_tokens),
            Figure::Batch(batch) => format!("batch {batch}"),
        }
    }

    /// Tokens that all sequences of the largest batch have in the end.
    pub(super) fn batch_tokens(&self) -> usize {
        self.batch_max() * (self.batch_prompt_tokens + self.batch_gen_tokens)
    }

    /// Tokens of the KV pool: no run waits for a page.
    pub(super) fn kv_tokens(&self) -> usize {
        let sequence = self.prompt_tokens.max(self.gen_tokens) + PAGE_TOKENS_MAX;
        let batch = self.batch_tokens() + self.batch_max() * PAGE_TOKENS_MAX;
        sequence.max(batch).max(KV_TOKENS_MIN)
    }

    /// Tokens of a step: all prompts of a run are read in one.
    pub(super) fn step_tokens(&self) -> usize {
        let batch = self.batch_max() * self.batch_prompt_tokens;
        batch.max(self.prompt_tokens).max(STEP_TOKENS_MIN)
    }

    /// Whether a model with this context can run it all.
    ///
    /// # Errors
    /// Names the flag that asks for too much.
    pub(super) fn check_context(&self, context_length: usize) -> Result<(), Failure> {
        let batch = self.batch_prompt_tokens + self.batch_gen_tokens;
        for (flag, tokens) in
            [("--pp", self.prompt_tokens), ("--tg", self.gen_tokens), ("--batches", batch)]
        {
            if tokens > context_length {
                return Err(Failure::Usage(format!(
                    "{flag}: sequences of {tokens} tokens do not fit the model's context of {context_length}"
                )));
            }
        }
        Ok(())
    }

    fn batch_max(&self) -> usize {
        self.batches.iter().copied().max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_names_and_an_order() {
        let plan = Plan { batches: vec![1, 16], ..Plan::default() };
        let names: Vec<String> = plan.figures().into_iter().map(|f| plan.name(f)).collect();
        assert_eq!(names, ["pp512", "tg128", "batch 1", "batch 16"]);
    }

    #[test]
    fn there_is_room_for_the_largest_run() {
        let plan =
            Plan { prompt_tokens: 100, gen_tokens: 10, batches: vec![1, 64], ..Plan::default() };
        assert!(plan.kv_tokens() >= 64 * (80 + 1));
        assert!(plan.step_tokens() >= 64 * 32);
        assert_eq!(Plan::default().kv_tokens(), 4096);
        assert_eq!(Plan::default().step_tokens(), 512);
        let long = Plan { gen_tokens: 9000, ..Plan::default() };
        assert!(long.kv_tokens() > 9000);
    }

    #[test]
    fn what_asks_for_too_much_is_named() {
        let plan = Plan { prompt_tokens: 16, gen_tokens: 2048, ..Plan::default() };
        let error = plan.check_context(1024).unwrap_err();
        assert!(error.message().starts_with("--tg") && error.message().contains("1024"));
        assert!(plan.check_context(2048).is_ok());
    }
}
