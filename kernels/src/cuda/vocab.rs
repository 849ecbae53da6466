//! What is asked of logits on the device.

use std::ops::Range;

use super::batch::Staged;
use super::device::{CudaError, Device};
use super::memory::Buffer;

/// Logits that one block reduces; `VOCAB_CHUNK` of vocab.cu.
const CHUNK: usize = 4096;

/// Facts of one row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenFound {
    /// The most likely token, the lowest id among equals.
    pub argmax: u32,
    /// Its logit.
    pub max: f32,
    /// `ln Σ exp(logit)`.
    pub log_sum_exp: f32,
    /// The logit of the probe's target; NaN if there is none among the tokens looked at.
    pub target: f32,
}

/// How one row is sampled. The fields mean what they mean in the engine's `Sampling`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleArgs {
    /// The generator's key.
    pub seed: u64,
    /// The position in the answer.
    pub position: u64,
    /// 0 is greedy.
    pub temperature: f32,
    /// Keeps the fewest likeliest tokens with this sum.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the likeliest.
    pub min_p: f32,
    /// Keeps so many likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// The row of logits.
    pub row: u32,
    /// Entries of the list of penalties that are this row's, and the first of them.
    pub penalties: u32,
    /// The first of them.
    pub first_penalty: u32,
    /// Makes the size a multiple of 8; 0.
    pub padding: u32,
}

/// A row's facts as the device has them.
pub(super) fn token_found(words: [u32; 4]) -> TokenFound {
    let [argmax, max, log_sum_exp, target] = words;
    let [max, log_sum_exp, target] = [max, log_sum_exp, target].map(f32::from_bits);
    TokenFound { argmax, max, log_sum_exp, target }
}

impl Device {
    /// Floats that [`Device::vocab_stats`] needs for `rows` rows.
    #[must_use]
    pub fn vocab_parts(rows: usize, vocab: usize) -> usize {
        3 * rows * vocab.div_ceil(CHUNK)
    }

    /// Facts of `rows` rows of logits of the tokens `vocab` (`[rows][vocab.len()]`), which belong to
    /// the batch's probes from `first` on. `found` gets four numbers a row; [`Device::read_found`] reads them.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If a shape does not fit.
    #[allow(clippy::too_many_arguments)]
    pub fn vocab_stats(
        &self,
        logits: &Buffer<f32>,
        vocab: Range<usize>,
        rows: usize,
        batch: &Staged,
        first: usize,
        parts: &mut Buffer<f32>,
        found: &mut Buffer<f32>,
    ) -> Result<(), CudaError> {
        assert!(vocab.end <= batch.vocab, "vocab: tokens");
        let (start, vocab) = (vocab.start, vocab.len());
        assert!(first + rows <= batch.probes.1 && logits.len() >= rows * vocab, "vocab: logits");
        assert!(parts.len() >= Self::vocab_parts(rows, vocab), "vocab: parts");
        assert!(found.len() >= 4 * rows, "vocab: found");
        let chunks = vocab.div_ceil(CHUNK);
        let launch = self.launch("vocab_part").buffer(logits, 0).value(vocab as u32);
        let launch = launch.buffer(parts, 0);
        // SAFETY: (float* logits, u32 vocab, float* parts); sizes checked.
        unsafe { launch.run([chunks, rows, 1], 256, 0)? };
        let launch = self.launch("vocab_join").buffer(parts, 0).value(chunks as u32);
        let launch = launch.buffer(logits, 0).value(start as u32).value(vocab as u32);
        let launch = launch.buffer(&batch.data, batch.targets + first).value(rows as u32);
        let launch = launch.buffer(found, 0);
        // SAFETY: (float* parts, u32 chunks, float* logits, u32 start, u32 vocab, u32* targets, u32 rows,
        // float* found); sizes checked.
        unsafe { launch.run([rows.div_ceil(32), 1, 1], 32, 0) }
    }

    /// What [`Device::vocab_stats`] found, when it is done.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn read_found(
        &self,
        found: &Buffer<f32>,
        rows: usize,
    ) -> Result<Vec<TokenFound>, CudaError> {
        let mut floats = vec![0.0; 4 * rows];
        self.read(found, 0, &mut floats)?;
        let facts = floats.as_chunks().0.iter();
        Ok(facts.map(|facts: &[f32; 4]| token_found(facts.map(f32::to_bits))).collect())
    }

    /// Samples a token for each of `args`, and tells its logit as the model gave it. `penalties` are tokens and what is taken from their
    /// logits; `work` is room for a row of logits each.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If a shape does not fit.
    pub fn sample(
        &self,
        logits: &Buffer<f32>,
        vocab: usize,
        args: &[SampleArgs],
        penalties: &[(u32, f32)],
        work: &mut Buffer<f32>,
    ) -> Result<Vec<(u32, f32)>, CudaError> {
        if args.is_empty() {
            return Ok(Vec::new());
        }
        let rows = logits.len() / vocab;
        assert!(args.iter().all(|a| (a.row as usize) < rows), "sample: a row");
        let ends = args.iter().map(|a| a.first_penalty as usize + a.penalties as usize);
        assert!(ends.max() <= Some(penalties.len()), "sample: penalties");
        assert!(work.len() >= args.len() * vocab, "sample: room");
        let words: Vec<u64> = args.iter().flat_map(SampleArgs::words).collect();
        let words = self.upload(&words, "sampling parameters")?;
        let pairs: Vec<f32> =
            penalties.iter().flat_map(|(t, p)| [f32::from_bits(*t), *p]).collect();
        let pairs = self.upload(&pairs, "penalties")?;
        let sampled: Buffer<u32> = self.alloc(2 * args.len(), "samples")?;
        let launch = self.launch("sample_tokens").buffer(logits, 0).value(vocab as u32);
        let launch = launch.buffer(&words, 0).buffer(&pairs, 0);
        let launch = launch.buffer(work, 0).buffer(&sampled, 0);
        // SAFETY: (float* logits, u32 vocab, SampleArgs* args, float* penalties, float* work,
        // u32* sampled); rows and penalties checked.
        unsafe { launch.run([args.len(), 1, 1], 512, 0)? };
        let mut words = vec![0; 2 * args.len()];
        self.read(&sampled, 0, &mut words)?;
        Ok(words.chunks_exact(2).map(|w| (w[0], f32::from_bits(w[1]))).collect())
    }

    /// The likeliest tokens of rows of logits with their logits, likeliest first: for each of
    /// `wanted` its row and how many.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If a row is not there or more tokens are wanted than there are.
    pub fn top_tokens(
        &self,
        logits: &Buffer<f32>,
        vocab: usize,
        wanted: &[(u32, u32)],
    ) -> Result<Vec<Vec<(u32, f32)>>, CudaError> {
        let most = wanted.iter().map(|(_, n)| *n as usize).max().unwrap_or(0);
        if most == 0 {
            return Ok(vec![Vec::new(); wanted.len()]);
        }
        assert!(most <= vocab, "top_tokens: more than there are");
        let rows = logits.len() / vocab;
        assert!(wanted.iter().all(|(row, _)| (*row as usize) < rows), "top_tokens: a row");
        let flat: Vec<u32> = wanted.iter().flat_map(|(row, n)| [*row, *n]).collect();
        let list = self.upload(&flat, "rows")?;
        let top: Buffer<f32> = self.alloc(wanted.len() * most * 2, "the likeliest tokens")?;
        let launch = self.launch("top_tokens").buffer(logits, 0).value(vocab as u32);
        let launch = launch.buffer(&list, 0).value(most as u32).buffer(&top, 0);
        // SAFETY: (float* logits, u32 vocab, u32* rows, u32 n, float* top); sizes checked.
        unsafe { launch.run([wanted.len(), 1, 1], 256, 0)? };
        let mut floats = vec![0.0; top.len()];
        self.read(&top, 0, &mut floats)?;
        let pairs = |(floats, (_, n)): (&[f32], &(u32, u32))| {
            let pairs = floats.chunks_exact(2).take(*n as usize);
            pairs.map(|p| (p[0].to_bits(), p[1])).collect()
        };
        Ok(floats.chunks_exact(2 * most).zip(wanted).map(pairs).collect())
    }
}

impl SampleArgs {
    /// The structure as the kernel has it, little-endian.
    pub(super) fn words(&self) -> [u64; 6] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        [
            self.seed,
            self.position,
            pair(self.temperature.to_bits(), self.top_p.to_bits()),
            pair(self.min_p.to_bits(), self.top_k),
            pair(self.row, self.penalties),
            pair(self.first_penalty, self.padding),
        ]
    }
}
