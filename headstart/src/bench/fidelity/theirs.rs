//! llama.cpp's closeness to the same reference: our f32 distributions in a file as llama-perplexity
//! reads it, and what that program finds.
//!
//! The file (`tools/perplexity/perplexity.cpp`): `_logits_`, then as 32-bit integers the tokens of a
//! chunk, the vocabulary and the number of chunks, then all tokens; then for each position from the
//! middle of a chunk to its last but one: a scale and the least log-probability as f32, and for each
//! token of the vocabulary a u16 (one more if the vocabulary is odd), `ln p = least + scale · u`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::compare::Closeness;
use super::{CHUNK_TOKENS, FIRST};
use crate::bench::engine::llama::Llama;
use crate::bench::steps::Steps;
use crate::failure::Failure;
use crate::models::Cancel;

const MAGIC: &[u8; 8] = b"_logits_";
/// Log-probabilities this far below the largest are all the same in the file.
const LOGPROB_RANGE: f32 = 16.0;

/// The file, while it is written and until it is dropped.
pub(super) struct LogitFile {
    path: PathBuf,
    out: BufWriter<File>,
    record: Vec<u8>,
}

impl LogitFile {
    /// Begins the file in `folder`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn create(
        folder: &Path,
        vocab: usize,
        chunks: &[Vec<u32>],
    ) -> Result<Self, Failure> {
        let path = folder.join(format!("reference-{}.logits", std::process::id()));
        let file = File::create(&path).map_err(|error| failed(&path, &error))?;
        let mut this = Self { out: BufWriter::with_capacity(1 << 20, file), record: vec![], path };
        let mut head = MAGIC.to_vec();
        for number in [CHUNK_TOKENS, vocab, chunks.len()] {
            head.extend(u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
        }
        head.extend(chunks.iter().flatten().flat_map(|token| token.to_le_bytes()));
        this.write(&head)?;
        Ok(this)
    }

    /// Adds the next position's natural-log probabilities.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn push(&mut self, logprobs: &[f32]) -> Result<(), Failure> {
        let mut record = std::mem::take(&mut self.record);
        record.clear();
        encode(logprobs, &mut record);
        let written = self.write(&record);
        self.record = record;
        written
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.out.write_all(bytes).map_err(|error| failed(&self.path, &error))
    }

    /// Has llama-perplexity compare `model` with the file.
    ///
    /// # Errors
    /// When the program fails, finds something else than statistics, or `cancel` is set.
    pub(super) fn measure(
        mut self,
        llama: &Llama,
        model: &Path,
        threads: usize,
        cancel: &Cancel,
    ) -> Result<Closeness, Failure> {
        self.out.flush().map_err(|error| failed(&self.path, &error))?;
        let _steps = Steps::start("comparing llama.cpp with the same", 0);
        let mut command = llama.command("llama-perplexity");
        let (threads, tokens) = (threads.to_string(), CHUNK_TOKENS.to_string());
        command.arg("-m").arg(model).arg("--kl-divergence");
        command.arg("--kl-divergence-base").arg(&self.path);
        command.args(["-c", &tokens, "-b", &tokens, "-t", &threads]);
        let printed = llama.run("llama-perplexity", command, cancel)?;
        parse(&printed)
    }
}

impl Drop for LogitFile {
    fn drop(&mut self) {
        // It is large, and of no use any more; what cannot be removed is overwritten some day.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One position's record.
fn encode(logprobs: &[f32], record: &mut Vec<u8>) {
    let max = logprobs.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let min = logprobs.iter().copied().fold(f32::INFINITY, f32::min).max(max - LOGPROB_RANGE);
    let scale = (max - min) / f32::from(u16::MAX);
    record.extend(scale.to_le_bytes());
    record.extend(min.to_le_bytes());
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for &logprob in logprobs {
        // A float becomes the nearest integer of its range.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let step = ((logprob - min) * inverse).round() as u16;
        record.extend(step.to_le_bytes());
    }
    if logprobs.len() % 2 == 1 {
        record.extend([0; 2]);
    }
}

/// The two figures among what llama-perplexity prints.
fn parse(printed: &str) -> Result<Closeness, Failure> {
    let value = |name: &str| -> Option<f64> {
        let line = printed.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse().ok()
    };
    match (value("Mean    KLD:"), value("Same top p:")) {
        (Some(kl_mean), Some(percent)) => Ok(Closeness { kl_mean, same_top: percent / 100.0 }),
        _ => Err(Failure::Failed(format!(
            "llama-perplexity printed no divergence from position {FIRST} on"
        ))),
    }
}

fn failed(path: &Path, error: &std::io::Error) -> Failure {
    Failure::Failed(format!("cannot write {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_gives_back_what_went_in() {
        let logprobs = [-0.1f32, -2.5, -9.0, -40.0, f32::NEG_INFINITY];
        let mut record = Vec::new();
        encode(&logprobs, &mut record);
        assert_eq!(record.len(), 2 * (6 + 4));
        let float = |at: usize| f32::from_le_bytes(record[at..at + 4].try_into().unwrap());
        let (scale, min) = (float(0), float(4));
        for (at, &logprob) in logprobs.iter().enumerate() {
            let step = u16::from_le_bytes(record[8 + 2 * at..][..2].try_into().unwrap());
            let back = min + scale * f32::from(step);
            let expected = logprob.max(-0.1 - LOGPROB_RANGE);
            assert!((back - expected).abs() < 2e-4, "{logprob}: {back}");
        }
    }

    #[test]
    fn the_file_has_the_head_that_is_read_and_goes_away() {
        let folder = tempfile::tempdir().unwrap();
        let chunks = [vec![7u32; CHUNK_TOKENS], vec![8; CHUNK_TOKENS]];
        let mut file = LogitFile::create(folder.path(), 3, &chunks).unwrap();
        file.push(&[-1.0, -1.1, -1.2]).unwrap();
        file.out.flush().unwrap();
        let path = file.path.clone();
        let bytes = std::fs::read(&path).unwrap();
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(&bytes[..8], MAGIC);
        assert_eq!((number(8), number(12), number(16), number(20)), (512, 3, 2, 7));
        assert_eq!(bytes.len(), 20 + 2 * 512 * 4 + 2 * (4 + 4));
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn the_figures_are_found() {
        let printed = "====== KL divergence statistics ======\n\
            Mean    KLD:   0.012345 ±   0.000100\nMaximum KLD:   1.0\n\nSame top p: 94.250 ± 0.300 %\n";
        let found = parse(printed).unwrap();
        assert!((found.kl_mean, found.same_top) == (0.012_345, 0.9425), "{found:?}");
        assert!(parse("nothing").is_err());
    }
}
