//! Added tokens in text that is still growing.

use crate::spec::AddedToken;

/// What is known about the beginning of the text not yet given on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Ordinary text up to here; what follows may yet turn out to be an added token.
    TextTo(usize),
    /// Ordinary text up to `start`, then the token, up to `end`.
    Token {
        /// Where the token starts.
        start: usize,
        /// Where it ends.
        end: usize,
        /// Its id.
        id: u32,
    },
    /// Ordinary text up to here, then a token that takes white space around it away, or is matched
    /// by another rule than its mere text: only the whole text can tell.
    Unclear(usize),
}

/// The added tokens by their first byte, the longest first.
#[derive(Debug)]
pub(crate) struct AddedTokens {
    by_first: Vec<Vec<Entry>>,
    empty: bool,
    /// Whether a space between two letters can never be part of, or next to, an added token.
    clear_of_words: bool,
}

#[derive(Debug)]
struct Entry {
    content: String,
    id: u32,
    plain: bool,
}

impl AddedTokens {
    pub(crate) fn new(added: &[AddedToken]) -> Self {
        let mut by_first: Vec<Vec<Entry>> = (0..256).map(|_| Vec::new()).collect();
        for token in added {
            let Some(&first) = token.content.as_bytes().first() else { continue };
            by_first[usize::from(first)].push(Entry {
                content: token.content.clone(),
                id: token.id,
                plain: is_plain(token),
            });
        }
        for entries in &mut by_first {
            entries.sort_by_key(|entry| std::cmp::Reverse(entry.content.len()));
        }
        let clear = |token: &AddedToken| {
            is_plain(token)
                && !token.content.contains(char::is_whitespace)
                && !token.content.ends_with(char::is_alphabetic)
        };
        let clear_of_words = added.iter().all(clear);
        Self { empty: added.is_empty(), by_first, clear_of_words }
    }

    pub(crate) fn clear_of_words(&self) -> bool {
        self.clear_of_words
    }

    /// The first added token in the text, or how far there is certainly none. With `closed` no more
    /// text comes. Leftmost first, of those that start there the longest.
    pub(crate) fn find(&self, text: &str, closed: bool) -> Found {
        if self.empty {
            return Found::TextTo(text.len());
        }
        for (start, &first) in text.as_bytes().iter().enumerate() {
            for entry in &self.by_first[usize::from(first)] {
                let rest = &text.as_bytes()[start..];
                let content = entry.content.as_bytes();
                if rest.starts_with(content) {
                    if !entry.plain {
                        return Found::Unclear(start);
                    }
                    return Found::Token { start, end: start + content.len(), id: entry.id };
                }
                if !closed && content.starts_with(rest) {
                    return Found::TextTo(start);
                }
            }
        }
        Found::TextTo(text.len())
    }
}

/// Found by its text alone, wherever it stands.
fn is_plain(token: &AddedToken) -> bool {
    !(token.single_word || token.lstrip || token.rstrip || token.normalized)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(contents: &[&str]) -> AddedTokens {
        let token = |(id, content): (usize, &&str)| AddedToken {
            id: id as u32,
            content: (*content).to_owned(),
            single_word: false,
            lstrip: content.starts_with('~'),
            rstrip: false,
            normalized: false,
            special: true,
        };
        AddedTokens::new(&contents.iter().enumerate().map(token).collect::<Vec<_>>())
    }

    #[test]
    fn leftmost_longest_and_partial() {
        let added = tokens(&["<a>", "<a>b", "<", "~x"]);
        assert_eq!(added.find("12<a>c", false), Found::Token { start: 2, end: 5, id: 0 });
        assert_eq!(added.find("12<a>", false), Found::TextTo(2));
        assert_eq!(added.find("12<a>", true), Found::Token { start: 2, end: 5, id: 0 });
        assert_eq!(added.find("12<a>b", false), Found::Token { start: 2, end: 6, id: 1 });
        assert_eq!(added.find("12<", false), Found::TextTo(2));
        assert_eq!(added.find("12<c", false), Found::Token { start: 2, end: 3, id: 2 });
        assert_eq!(added.find("12 ~x", false), Found::Unclear(3));
        assert_eq!(added.find("plain", false), Found::TextTo(5));
    }
}
