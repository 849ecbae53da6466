//! The bytes of every token, and which bytes may be the beginning of a token.

use std::collections::HashMap;

use crate::spec::{DecoderKind, Spec};

/// The token ids' bytes.
#[derive(Debug)]
pub(crate) struct Vocab {
    arena: Vec<u8>,
    ranges: Vec<(u32, u32)>,
    special: Vec<bool>,
    keys: Keys,
    inner_metaspace: bool,
}

/// The vocabulary as the model's merging sees it (bytes for a byte-level model, text with `▁` for the
/// others), sorted, so that beginnings can be looked up.
#[derive(Debug, Default)]
struct Keys {
    sorted: Vec<(Box<[u8]>, u32)>,
    bytes_max: usize,
}

impl Vocab {
    pub(crate) fn new(spec: &Spec) -> Self {
        let ids = spec.vocab.iter().map(|(_, id)| *id as usize + 1).max().unwrap_or(0);
        let mut vocab = Self {
            arena: Vec::new(),
            ranges: vec![(0, 0); ids],
            special: vec![false; ids],
            keys: Keys::default(),
            inner_metaspace: spec.vocab.iter().any(|(text, _)| has_inner_metaspace(text)),
        };
        let added: HashMap<&str, bool> =
            spec.added.iter().map(|token| (token.content.as_str(), token.special)).collect();
        let chars = byte_of_char();
        for (text, id) in &spec.vocab {
            let is_added = added.get(text.as_str());
            let bytes = match is_added {
                Some(_) => text.as_bytes().to_vec(),
                None => token_bytes(text, spec.decoder, &chars),
            };
            let start = vocab.arena.len() as u32;
            vocab.arena.extend_from_slice(&bytes);
            vocab.ranges[*id as usize] = (start, vocab.arena.len() as u32);
            vocab.special[*id as usize] = is_added.copied().unwrap_or(false);
            if let Some(key) = key_bytes(text, spec.decoder, &chars) {
                vocab.keys.sorted.push((key.into_boxed_slice(), *id));
            }
        }
        vocab.keys.sorted.sort_unstable();
        vocab.keys.bytes_max =
            vocab.keys.sorted.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
        vocab
    }

    /// One more than the highest id.
    pub(crate) fn len(&self) -> usize {
        self.ranges.len()
    }

    /// A token's bytes; none for an id that is no token.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        let Some(&(start, end)) = self.ranges.get(id as usize) else { return &[] };
        &self.arena[start as usize..end as usize]
    }

    /// Whether the token is one that decoding leaves out.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Whether some token has a `▁` after another character.
    pub(crate) fn has_inner_metaspace(&self) -> bool {
        self.inner_metaspace
    }

    /// The length of the longest token in bytes.
    pub(crate) fn key_bytes_max(&self) -> usize {
        self.keys.bytes_max
    }

    /// The token that is exactly these bytes.
    pub(crate) fn exact(&self, bytes: &[u8]) -> Option<u32> {
        let at = self.keys.sorted.partition_point(|(key, _)| &**key < bytes);
        self.keys.sorted.get(at).filter(|(key, _)| &**key == bytes).map(|(_, id)| *id)
    }

    /// Whether some token begins with these bytes and goes on.
    pub(crate) fn has_longer(&self, bytes: &[u8]) -> bool {
        let at = self.keys.sorted.partition_point(|(key, _)| &**key <= bytes);
        self.keys.sorted.get(at).is_some_and(|(key, _)| key.starts_with(bytes))
    }
}

/// What a token adds to the text.
fn token_bytes(text: &str, decoder: DecoderKind, chars: &HashMap<char, u8>) -> Vec<u8> {
    match decoder {
        DecoderKind::ByteLevel => key_bytes(text, decoder, chars).unwrap_or_else(|| text.into()),
        DecoderKind::Metaspace { .. } => match fallback_byte(text) {
            Some(byte) => vec![byte],
            None => text.replace('▁', " ").into_bytes(),
        },
    }
}

fn has_inner_metaspace(text: &str) -> bool {
    text.trim_start_matches('▁').contains('▁')
}

/// A token as merging sees it; none when no text could ever lead to it.
fn key_bytes(text: &str, decoder: DecoderKind, chars: &HashMap<char, u8>) -> Option<Vec<u8>> {
    match decoder {
        DecoderKind::ByteLevel => text.chars().map(|c| chars.get(&c).copied()).collect(),
        DecoderKind::Metaspace { .. } => Some(text.as_bytes().to_vec()),
    }
}

/// The byte of a fallback token, which is written `<0x0A>`.
pub(crate) fn fallback_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let valid = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    valid.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The characters that stand for bytes in a byte-level vocabulary: printable ones for themselves, the
/// others for U+0100 and on, in order (GPT-2, `encoder.py`, `bytes_to_unicode`).
pub(crate) fn chars_of_bytes() -> [char; 256] {
    let mut chars = ['\0'; 256];
    let mut next = 0x100;
    for byte in 0..=255_u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        chars[usize::from(byte)] = if printable {
            char::from(byte)
        } else {
            let c = char::from_u32(next).unwrap_or('\0');
            next += 1;
            c
        };
    }
    chars
}

fn byte_of_char() -> HashMap<char, u8> {
    chars_of_bytes().into_iter().zip(0..=255).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_and_newline_have_their_well_known_letters() {
        let chars = chars_of_bytes();
        assert_eq!(chars[usize::from(b' ')], 'Ġ');
        assert_eq!(chars[usize::from(b'\n')], 'Ċ');
        assert_eq!(chars[0xAD], 'Ń');
        assert_eq!(byte_of_char().len(), 256);
    }

    #[test]
    fn fallback_tokens_are_two_digits() {
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        assert_eq!(fallback_byte("<0xff>"), Some(255));
        for other in ["<0x>", "<0x0>", "<0x0AB>", "0x0A", "<0x+1>", "<0xé>"] {
            assert_eq!(fallback_byte(other), None, "{other}");
        }
    }
}
