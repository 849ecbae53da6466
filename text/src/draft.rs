//! A draft's text in the base's tokens, while it is still being written.

use crate::stream::{Encoder, Start, Stream};
use crate::{TextError, Tokenizer};

/// Re-encodes a draft with the base's tokenizer as it arrives.
///
/// All that it gives out is, token for token, the encoding of the prompt and the whole draft (stripped
/// of outer white space) as one string, without the prompt's tokens: [`encode_draft`]. Leading white
/// space is dropped; white space at the end is held back, since it may be the draft's end.
///
/// A prompt whose last token would merge with the draft's first is no clean boundary: the base has read
/// that token already. Then the draft is encoded as if it began right there, and
/// [`DraftEncoder::clean_boundary`] says so. No prompt that ends with a line break or a special token,
/// as those of [`crate::ModelText`] do, has that trouble.
#[derive(Clone)]
pub struct DraftEncoder {
    tokenizer: Tokenizer,
    prompt: String,
    /// None when only the whole text can tell.
    stream: Option<Stream>,
    /// The draft so far, from its first character that is no white space.
    draft: String,
    fed: usize,
    /// The prompt's last tokens, which the stream gives out first.
    expected: Vec<u32>,
    matched: usize,
    given: usize,
    clean: bool,
    finished: bool,
}

impl DraftEncoder {
    /// An encoder for a draft that follows this prompt. `prompt_ids` is the encoding of `prompt_text`,
    /// with or without a BOS before it.
    ///
    /// # Errors
    /// `prompt_ids` does not end as the encoding of `prompt_text` does.
    pub fn new(
        tokenizer: &Tokenizer,
        prompt_text: &str,
        prompt_ids: &[u32],
    ) -> Result<Self, TextError> {
        let mut encoder = Self {
            tokenizer: tokenizer.clone(),
            prompt: prompt_text.to_owned(),
            stream: None,
            draft: String::new(),
            fed: 0,
            expected: Vec::new(),
            matched: 0,
            given: 0,
            clean: true,
            finished: false,
        };
        encoder.read_prompt(prompt_ids)?;
        Ok(encoder)
    }

    /// Whether the prompt's tokens are those that prompt and draft as one string begin with, as far as
    /// is known yet.
    #[must_use]
    pub fn clean_boundary(&self) -> bool {
        self.clean
    }

    /// Takes more of the draft and gives out the tokens that are certain now.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn push(&mut self, text: &str) -> Result<Vec<u32>, TextError> {
        let text = if self.draft.is_empty() { text.trim_start() } else { text };
        if text.is_empty() || self.finished {
            return Ok(Vec::new());
        }
        self.draft.push_str(text);
        let end = self.draft.trim_end().len();
        let from = self.fed;
        self.fed = end.max(from);
        let Some(stream) = self.stream.as_mut().filter(|_| end > from) else {
            return Ok(Vec::new());
        };
        let mut ids = Vec::new();
        stream.push(&self.draft[from..end], &mut ids)?;
        self.settle(ids, false)
    }

    /// Gives out all tokens that are left: the draft is complete.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn finish(&mut self) -> Result<Vec<u32>, TextError> {
        if std::mem::replace(&mut self.finished, true) {
            return Ok(Vec::new());
        }
        let mut ids = Vec::new();
        let unclear = match self.stream.as_mut() {
            Some(stream) => {
                stream.close(&mut ids)?;
                stream.unclear()
            }
            None => true,
        };
        if unclear && self.clean {
            return self.finish_whole();
        }
        if let Some(stream) = self.stream.as_mut().filter(|_| unclear) {
            close_unclear(&self.tokenizer, stream, &mut ids)?;
        }
        self.settle(ids, true)
    }

    /// Feeds the prompt's end, from a place on where two tokens meet whatever follows.
    fn read_prompt(&mut self, prompt_ids: &[u32]) -> Result<(), TextError> {
        let Some(encoder) = self.tokenizer.encoder() else {
            return self.check_whole_prompt(prompt_ids);
        };
        let from = anchor(encoder, &self.prompt);
        let start = if from == 0 { Start::Text } else { Start::Middle };
        let mut stream = Stream::new(encoder, start);
        let mut given = Vec::new();
        stream.push(&self.prompt[from..], &mut given)?;
        let mut closed = stream.clone();
        self.expected.clone_from(&given);
        closed.close(&mut self.expected)?;
        if closed.unclear() {
            self.expected.clear();
            return self.check_whole_prompt(prompt_ids);
        }
        if !prompt_ids.ends_with(&self.expected) {
            return Err(TextError::PromptMismatch);
        }
        self.matched = given.len();
        self.stream = Some(stream);
        Ok(())
    }

    fn check_whole_prompt(&self, prompt_ids: &[u32]) -> Result<(), TextError> {
        let ids = self.tokenizer.encode(&self.prompt)?;
        if prompt_ids.ends_with(&ids) { Ok(()) } else { Err(TextError::PromptMismatch) }
    }

    /// Takes the prompt's own tokens off the front of what the stream gave out.
    fn settle(&mut self, mut ids: Vec<u32>, closed: bool) -> Result<Vec<u32>, TextError> {
        if self.matched < self.expected.len() {
            let open = &self.expected[self.matched..];
            let common = open.iter().zip(&ids).take_while(|(a, b)| a == b).count();
            let short = closed && common < open.len();
            if short || common < open.len().min(ids.len()) {
                ids = self.start_over(closed)?;
            } else {
                self.matched += common;
                ids.drain(..common);
            }
        }
        self.given += ids.len();
        Ok(ids)
    }

    /// The boundary is not clean: encodes the draft on its own. Nothing of it has been given out.
    fn start_over(&mut self, closed: bool) -> Result<Vec<u32>, TextError> {
        self.clean = false;
        self.matched = self.expected.len();
        let Some(encoder) = self.tokenizer.encoder() else { return Ok(Vec::new()) };
        let mut stream = Stream::new(encoder, Start::Middle);
        let mut ids = Vec::new();
        stream.push(&self.draft[..self.fed], &mut ids)?;
        if closed {
            close_all(&self.tokenizer, &mut stream, &mut ids)?;
        }
        self.stream = Some(stream);
        Ok(ids)
    }

    fn finish_whole(&mut self) -> Result<Vec<u32>, TextError> {
        let (ids, clean) = encode_draft(&self.tokenizer, &self.prompt, &self.draft)?;
        self.clean = clean;
        let rest = ids.get(self.given..).unwrap_or(&[]).to_vec();
        self.given += rest.len();
        Ok(rest)
    }
}

/// The tokens of a complete draft after a prompt: prompt and stripped draft encoded as one string, less
/// the prompt's tokens. The flag says whether the boundary is clean; if not (see [`DraftEncoder`]), the
/// draft is encoded as if it began right there.
///
/// # Errors
/// The tokenizer fails.
pub fn encode_draft(
    tokenizer: &Tokenizer,
    prompt_text: &str,
    draft: &str,
) -> Result<(Vec<u32>, bool), TextError> {
    let draft = draft.trim();
    let prompt_ids = tokenizer.encode(prompt_text)?;
    let mut ids = tokenizer.encode(&format!("{prompt_text}{draft}"))?;
    if ids.starts_with(&prompt_ids) {
        ids.drain(..prompt_ids.len());
        return Ok((ids, true));
    }
    let Some(encoder) = tokenizer.encoder() else { return Ok((tokenizer.encode(draft)?, false)) };
    let mut stream = Stream::new(encoder, Start::Middle);
    let mut ids = Vec::new();
    stream.push(draft, &mut ids)?;
    close_all(tokenizer, &mut stream, &mut ids)?;
    Ok((ids, false))
}

fn close_all(
    tokenizer: &Tokenizer,
    stream: &mut Stream,
    ids: &mut Vec<u32>,
) -> Result<(), TextError> {
    stream.close(ids)?;
    if stream.unclear() { close_unclear(tokenizer, stream, ids) } else { Ok(()) }
}

/// Encodes what the stream cannot as a text of its own.
fn close_unclear(
    tokenizer: &Tokenizer,
    stream: &mut Stream,
    ids: &mut Vec<u32>,
) -> Result<(), TextError> {
    let rest = stream.close_before_unclear(ids)?;
    ids.extend(tokenizer.encode(&rest)?);
    Ok(())
}

/// The last place in the text before which everything is encoded in the same way whatever follows, and
/// after which everything is encoded as if nothing preceded: between a letter and a space.
fn anchor(encoder: &Encoder, text: &str) -> usize {
    if !encoder.added.clear_of_words() || !encoder.splits_at_spaces() {
        return 0;
    }
    let mut after = text.len();
    for (at, c) in text.char_indices().rev() {
        if is_letter(c) && text[after..].starts_with(' ') {
            return after;
        }
        after = at;
    }
    0
}

/// Surely a letter, and one that normalisation leaves alone.
fn is_letter(c: char) -> bool {
    c.is_ascii_alphabetic()
        || matches!(c, '\u{4e00}'..='\u{9fff}' | '\u{ac00}'..='\u{d7a3}' | 'ぁ'..='ゖ' | 'ァ'..='ヺ')
}
