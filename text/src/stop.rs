//! Stop strings in a stream of text.

/// What one piece of text led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStep {
    /// Text that is certainly no part of a stop string.
    pub text: String,
    /// Whether a stop string is complete; nothing after it is ever given out.
    pub stopped: bool,
}

/// Finds the first stop string in text that arrives in pieces.
///
/// The stop string that is complete first wins; of several that end at the same place the longest.
/// The text before it is given out, and as early as it is certain: held back is only the longest end
/// of the text that could still become a stop string.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// The bytes that stop strings begin with.
    begins: [bool; 256],
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// A matcher for these strings; empty ones are left out.
    #[must_use]
    pub fn new(stops: Vec<String>) -> Self {
        let stops: Vec<_> = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        let mut begins = [false; 256];
        for stop in &stops {
            begins[usize::from(stop.as_bytes()[0])] = true;
        }
        Self { stops, begins, held: String::new(), stopped: false }
    }

    /// Whether a stop string was found.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> StopStep {
        if self.stopped {
            return StopStep { text: String::new(), stopped: true };
        }
        // Most text has nothing to do with any stop string.
        if self.held.is_empty() && !text.bytes().any(|byte| self.begins[usize::from(byte)]) {
            return StopStep { text: text.to_owned(), stopped: false };
        }
        self.held.push_str(text);
        if let Some(start) = self.first_match() {
            self.stopped = true;
            self.held.truncate(start);
            return StopStep { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.held.split_off(self.held.len() - self.partial_bytes());
        StopStep { text: std::mem::replace(&mut self.held, keep), stopped: false }
    }

    /// The text that was held back, when no more comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the match that ends first starts (of those that end there, the longest).
    fn first_match(&self) -> Option<usize> {
        let found = self.stops.iter().filter_map(|stop| {
            self.held.find(stop.as_str()).map(|start| (start + stop.len(), start))
        });
        found.min().map(|(_, start)| start)
    }

    /// The length of the longest end of the held text that is a beginning of a stop string.
    fn partial_bytes(&self) -> usize {
        let bytes_max = self.stops.iter().map(String::len).max().unwrap_or(1) - 1;
        let from = self.held.len().saturating_sub(bytes_max);
        let starts = (from..self.held.len()).filter(|&i| self.held.is_char_boundary(i));
        for start in starts {
            let end = &self.held[start..];
            if self.stops.iter().any(|stop| stop.starts_with(end)) {
                return end.len();
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|&s| s.to_owned()).collect());
        let mut text: String = pieces.iter().map(|piece| matcher.push(piece).text).collect();
        text.push_str(&matcher.finish());
        (text, matcher.stopped())
    }

    /// The rule over the whole text: every end position in turn, the longest stop that ends there.
    fn naive(stops: &[String], text: &str) -> (String, bool) {
        for end in (0..=text.len()).filter(|&i| text.is_char_boundary(i)) {
            let ending =
                stops.iter().filter(|s| !s.is_empty() && text[..end].ends_with(s.as_str()));
            if let Some(longest) = ending.map(String::len).max() {
                return (text[..end - longest].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    #[test]
    fn text_before_the_stop_is_given_out() {
        assert_eq!(run(&["[User]"], &["Hi. [U", "ser] more"]), ("Hi. ".into(), true));
        assert_eq!(run(&["[User]"], &["Hi. [U", "nit]"]), ("Hi. [Unit]".into(), false));
        assert_eq!(run(&["[User]"], &["Hi. [User"]), ("Hi. [User".into(), false));
    }

    #[test]
    fn the_longest_that_ends_there_takes_the_newlines() {
        let stops = ["[User]", "\n[User]", "\n\n[User]"];
        assert_eq!(run(&stops, &["Bye.\n", "\n[User]\nMore"]), ("Bye.".into(), true));
        assert_eq!(run(&stops, &["Bye.\n \n[User]"]), ("Bye.\n ".into(), true));
    }

    #[test]
    fn the_first_complete_one_wins() {
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]), ("xa".into(), true));
        assert_eq!(run(&["abcd", "bc"], &["xa", "b", "c", "d"]), ("xa".into(), true));
    }

    #[test]
    fn no_stops_hold_nothing_back() {
        let mut matcher = StopMatcher::new(vec![String::new()]);
        assert_eq!(matcher.push("é").text, "é");
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn only_what_may_become_a_stop_is_held() {
        let mut matcher = StopMatcher::new(vec!["\n\n[User]".into(), "END".into()]);
        assert_eq!(matcher.push("word\n\nE").text, "word\n\n");
        assert_eq!(matcher.push("E").text, "E");
        assert_eq!(matcher.push("N").text, "");
        assert_eq!(matcher.push("D!"), StopStep { text: String::new(), stopped: true });
        assert_eq!(matcher.push("later"), StopStep { text: String::new(), stopped: true });
        assert_eq!(matcher.finish(), "");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn any_split_equals_a_search_of_the_whole(
            stops in proptest::collection::vec("[ab\né]{0,4}", 0..22),
            pieces in proptest::collection::vec("[ab\né]{0,5}", 0..12),
        ) {
            let whole = pieces.concat();
            let mut matcher = StopMatcher::new(stops.clone());
            let mut text = String::new();
            for piece in &pieces {
                text.push_str(&matcher.push(piece).text);
                let expected = naive(&stops, &whole).0;
                prop_assert!(expected.starts_with(&text));
            }
            text.push_str(&matcher.finish());
            prop_assert_eq!((text, matcher.stopped()), naive(&stops, &whole));
        }
    }
}
