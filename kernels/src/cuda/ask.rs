//! Questions to logits, asked and answered without the host's waiting: what goes to the device and
//! comes back passes through [`Pinned`] memory.

use super::device::{CudaError, Device};
use super::memory::Buffer;
use super::pinned::Pinned;
use super::vocab::{SampleArgs, TokenFound, token_found};

/// Words of [`SampleArgs`].
const ARGS: usize = 12;

/// What is asked of rows of logits, beyond their facts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Questions {
    /// Rows whose facts are told, of the first rank that has them.
    pub rows: usize,
    /// Tokens to draw.
    pub samples: Vec<SampleArgs>,
    /// Tokens and what is taken from their logits; [`SampleArgs`] says which are whose.
    pub penalties: Vec<(u32, f32)>,
    /// Rows, and how many likeliest tokens of each are told.
    pub tops: Vec<(u32, u32)>,
    /// Chosen tokens that the next batch may begin with.
    pub keep: Vec<Keep>,
}

/// A chosen token that stays on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Its place among those that are kept.
    pub place: u32,
    /// The sample, or the row whose argmax it is.
    pub at: u32,
    /// Whether it is a sample.
    pub drawn: bool,
}

/// Facts of rows of logits ([`Device::vocab_stats`]), found by one rank, or by each of several in its
/// part of the vocabulary.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// `[ranks][rows]`.
    pub found: &'a Buffer<f32>,
    /// In the order of their parts of the vocabulary.
    pub ranks: usize,
    /// Rows of each.
    pub rows: usize,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answers {
    /// Of each row.
    pub facts: Vec<TokenFound>,
    /// Each drawn token, with its logit as the model gave it.
    pub samples: Vec<(u32, f32)>,
    /// The likeliest tokens with their logits, likeliest first.
    pub tops: Vec<Vec<(u32, f32)>>,
}

impl Questions {
    /// Words that the host sends.
    #[must_use]
    pub fn words(&self) -> usize {
        let Self { samples, penalties, tops, keep, .. } = self;
        ARGS * samples.len() + 2 * penalties.len() + 2 * tops.len() + 3 * keep.len()
    }

    /// Words that come back.
    #[must_use]
    pub fn answer_words(&self) -> usize {
        4 * self.rows + 2 * self.samples.len() + 2 * self.tops.len() * self.tops_most()
    }

    fn tops_most(&self) -> usize {
        self.tops.iter().map(|(_, n)| *n as usize).max().unwrap_or(0)
    }

    /// Reads what came back.
    ///
    /// # Panics
    /// If there are fewer than [`Self::answer_words`].
    #[must_use]
    pub fn read(&self, words: &[u32]) -> Answers {
        let (facts, words) = words.split_at(4 * self.rows);
        let (samples, words) = words.split_at(2 * self.samples.len());
        let pair = |w: &[u32]| (w[0], f32::from_bits(w[1]));
        let most = self.tops_most();
        let tops = self.tops.iter().enumerate().map(|(index, (_, n))| {
            let from = 2 * most * index;
            words[from..from + 2 * *n as usize].chunks_exact(2).map(pair).collect()
        });
        Answers {
            facts: facts.as_chunks().0.iter().map(|words| token_found(*words)).collect(),
            samples: samples.chunks_exact(2).map(pair).collect(),
            tops: tops.collect(),
        }
    }

    fn put(&self, words: &mut [u32]) {
        let (args, words) = words.split_at_mut(ARGS * self.samples.len());
        for (to, args) in args.chunks_exact_mut(ARGS).zip(&self.samples) {
            for (to, word) in to.chunks_exact_mut(2).zip(args.words()) {
                to.copy_from_slice(&[word as u32, (word >> 32) as u32]);
            }
        }
        let penalties = self.penalties.iter().flat_map(|(token, taken)| [*token, taken.to_bits()]);
        let tops = self.tops.iter().flat_map(|(row, n)| [*row, *n]);
        let keep = self.keep.iter().flat_map(|k| [k.place, k.at, u32::from(k.drawn)]);
        for (to, word) in words.iter_mut().zip(penalties.chain(tops).chain(keep)) {
            *to = word;
        }
    }

    /// Panics if a kernel would reach outside its buffers.
    fn check(&self, rows: usize, vocab: usize, facts: Facts<'_>, room: &AskRoom, kept: usize) {
        assert!(self.rows <= facts.rows && facts.ranks > 0, "ask: rows");
        assert!(facts.found.len() >= 4 * facts.ranks * facts.rows, "ask: facts");
        let within = |row: &u32| (*row as usize) < rows;
        assert!(self.samples.iter().all(|a| within(&a.row)), "ask: a sample's row");
        assert!(self.samples.len() <= room.rows, "ask: samples");
        let ends = self.samples.iter().map(|a| a.first_penalty as usize + a.penalties as usize);
        assert!(ends.max().unwrap_or(0) <= self.penalties.len(), "ask: penalties");
        assert!(self.tops.iter().all(|(row, _)| within(row)), "ask: a row of likeliest tokens");
        assert!(self.tops_most() <= vocab, "ask: more tokens than there are");
        for keep in &self.keep {
            let from = if keep.drawn { self.samples.len() } else { facts.rows };
            assert!(
                (keep.place as usize) < kept && (keep.at as usize) < from,
                "ask: a token to keep"
            );
        }
    }
}

/// Room on the device for questions and answers.
#[derive(Debug)]
pub struct AskRoom {
    rows: usize,
    words: Buffer<u32>,
    sampled: Buffer<u32>,
    tops: Buffer<f32>,
    /// Rows that are drawn from at once.
    at_once: usize,
    /// `[at_once][vocab]`.
    work: Buffer<f32>,
}

impl AskRoom {
    /// Room for `rows` rows, of which `at_once` are drawn from at once. More penalties, or more
    /// likeliest tokens, than are usual get more of it when they come.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn new(
        device: &Device,
        rows: usize,
        vocab: usize,
        at_once: usize,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            rows,
            words: device.alloc(2 * (ARGS + 5) * rows, "questions")?,
            sampled: device.alloc(2 * rows, "samples")?,
            tops: device.alloc(64 * rows, "the likeliest tokens")?,
            at_once,
            work: device.alloc(at_once * vocab, "sampling")?,
        })
    }

    fn reserve(&mut self, device: &Device, questions: &Questions) -> Result<(), CudaError> {
        let words = questions.words();
        if words > self.words.len() {
            self.words = device.alloc(words.next_power_of_two(), "questions")?;
        }
        let tops = 2 * questions.tops.len() * questions.tops_most();
        if tops > self.tops.len() {
            self.tops = device.alloc(tops.next_power_of_two(), "the likeliest tokens")?;
        }
        Ok(())
    }
}

impl Device {
    /// Answers questions about rows of `logits` (`[rows][vocab]`), and about `facts`. What is asked goes
    /// by way of `asked`, and what is found comes back in `answers`, when it is done. Chosen tokens are
    /// put into `kept`.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If a question reaches outside the logits, or host memory has too little room.
    #[allow(clippy::too_many_arguments)]
    pub fn ask(
        &self,
        questions: &Questions,
        (logits, vocab): (&Buffer<f32>, usize),
        facts: Facts<'_>,
        room: &mut AskRoom,
        asked: &mut Pinned<u32>,
        answers: &mut Pinned<u32>,
        kept: &mut Buffer<u32>,
    ) -> Result<(), CudaError> {
        questions.check(logits.len() / vocab, vocab, facts, room, kept.len());
        let Questions { rows, samples, penalties, tops, keep } = questions;
        room.reserve(self, questions)?;
        questions.put(&mut asked.wait_for()?[..questions.words()]);
        self.write_pinned(&mut room.words, 0, asked, questions.words())?;
        self.read_pinned(&facts.found.as_words(), 0, answers, 0, 4 * rows)?;
        let penalties_at = ARGS * samples.len();
        let first = (0..samples.len()).step_by(room.at_once.max(1));
        for (at, samples) in first.zip(samples.chunks(room.at_once.max(1))) {
            let launch = self.launch("sample_tokens").buffer(logits, 0).value(vocab as u32);
            let launch = launch.buffer(&room.words, ARGS * at).buffer(&room.words, penalties_at);
            let launch = launch.buffer(&room.work, 0).buffer(&room.sampled, 2 * at);
            // SAFETY: (float* logits, u32 vocab, SampleArgs* args, float* penalties, float* work,
            // u32* sampled); rows and penalties checked.
            unsafe { launch.run([samples.len(), 1, 1], 512, 0)? };
        }
        self.read_pinned(&room.sampled, 0, answers, 4 * rows, 2 * samples.len())?;
        let (tops_at, most) = (penalties_at + 2 * penalties.len(), questions.tops_most());
        if most > 0 {
            let launch = self.launch("top_tokens").buffer(logits, 0).value(vocab as u32);
            let launch = launch.buffer(&room.words, tops_at).value(most as u32);
            let launch = launch.buffer(&room.tops, 0);
            // SAFETY: (float* logits, u32 vocab, u32* rows, u32 n, float* top); sizes checked.
            unsafe { launch.run([tops.len(), 1, 1], 256, 0)? };
            let to = 4 * rows + 2 * samples.len();
            self.read_pinned(&room.tops.as_words(), 0, answers, to, 2 * tops.len() * most)?;
        }
        let launch = self.launch("keep_tokens").buffer(&room.words, tops_at + 2 * tops.len());
        let launch = launch.value(keep.len() as u32).buffer(facts.found, 0);
        let launch = launch.value(facts.ranks as u32).value(facts.rows as u32);
        let launch = launch.buffer(&room.sampled, 0).buffer(kept, 0);
        // SAFETY: (u32* list, u32 count, float* found, u32 ranks, u32 rows, u32* sampled, u32* kept);
        // each entry checked, and so were the facts.
        unsafe { launch.run([keep.len().div_ceil(128), 1, 1], 128, 0) }
    }
}
