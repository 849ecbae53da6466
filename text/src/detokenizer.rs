//! Token ids to text, one id at a time.

use crate::Tokenizer;

/// Turns ids into text incrementally: what it gives out, put together, is what
/// [`Tokenizer::decode`] makes of all the ids at once.
///
/// A character whose bytes are spread over several tokens is given out with the last of them, so a
/// replacement character appears only where the whole text has one.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    pending: Vec<u8>,
    at_start: bool,
}

impl Detokenizer {
    /// A detokenizer at the start of a text.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer) -> Self {
        Self { tokenizer: tokenizer.clone(), pending: Vec::new(), at_start: true }
    }

    /// A detokenizer that goes on after `ids`, whose text has been given out before.
    #[must_use]
    pub fn after(tokenizer: &Tokenizer, ids: &[u32]) -> Self {
        let mut detokenizer = Self::new(tokenizer);
        for &id in ids {
            detokenizer.push(id);
        }
        detokenizer
    }

    /// Takes the next id and gives out the characters that it completes.
    pub fn push(&mut self, id: u32) -> String {
        let bytes = self.tokenizer.text_bytes(id);
        if bytes.is_empty() {
            return String::new();
        }
        let first = std::mem::replace(&mut self.at_start, false);
        let skip = usize::from(first && self.tokenizer.strips_first_space() && bytes[0] == b' ');
        self.pending.extend_from_slice(&bytes[skip..]);
        let mut text = String::new();
        let complete = decode_complete(&self.pending, &mut text);
        self.pending.drain(..complete);
        text
    }

    /// What is left when no more ids come: a character that was never completed.
    pub fn finish(&mut self) -> String {
        let pending = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&pending).into_owned()
    }
}

/// Appends the text of `bytes` but for an incomplete character at the end; invalid bytes become
/// replacement characters exactly as [`String::from_utf8_lossy`] has it. Returns the bytes consumed.
fn decode_complete(bytes: &[u8], text: &mut String) -> usize {
    let mut consumed = 0;
    loop {
        let rest = &bytes[consumed..];
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                return bytes.len();
            }
            Err(error) => {
                let valid = &rest[..error.valid_up_to()];
                text.push_str(&String::from_utf8_lossy(valid));
                consumed += valid.len();
                let Some(invalid) = error.error_len() else { return consumed };
                text.push(char::REPLACEMENT_CHARACTER);
                consumed += invalid;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn pieces_of_any_bytes_decode_as_the_whole(
            pieces in proptest::collection::vec(
                prop_oneof![
                    proptest::collection::vec(any::<u8>(), 0..5),
                    "[a-zé你👩\u{200d}\u{fe0f}]{0,2}".prop_map(String::into_bytes),
                    "[é你👩]".prop_flat_map(|s| (0..=s.len()).prop_map(move |i| s.as_bytes()[..i].to_vec())),
                ],
                0..12,
            ),
        ) {
            let mut text = String::new();
            let mut pending = Vec::new();
            for piece in &pieces {
                pending.extend_from_slice(piece);
                let complete = decode_complete(&pending, &mut text);
                pending.drain(..complete);
                prop_assert!(pending.len() < 4);
            }
            text.push_str(&String::from_utf8_lossy(&pending));
            prop_assert_eq!(text, String::from_utf8_lossy(&pieces.concat()).into_owned());
        }
    }
}
