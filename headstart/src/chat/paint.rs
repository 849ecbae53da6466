//! An answer on a terminal: two colours for who wrote what, and a mark where the base took over.

use std::io::Write;

use anstyle::{AnsiColor, Style};
use headstart_proto::v1::Source;

/// Stands between the drafter's words and the base's.
pub const MARK: &str = "‖";

/// The drafter's colour.
pub(super) const DRAFTER: Style = AnsiColor::Cyan.on_default();
/// The base's colour.
pub(super) const BASE: Style = AnsiColor::Green.on_default();
/// The mark's colour.
pub(super) const SWITCH: Style = AnsiColor::Yellow.on_default().bold();
/// Everything around the answer.
pub(super) const ASIDE: Style = Style::new().dimmed();

/// Paints one answer. The stream decides whether colours come through (`NO_COLOR`, no terminal).
#[derive(Debug)]
pub struct Painter<W: Write> {
    out: W,
    source: Option<Source>,
    at_line_start: bool,
}

impl<W: Write> Painter<W> {
    /// Paints to `out`.
    pub fn new(out: W) -> Self {
        Self { out, source: None, at_line_start: true }
    }

    /// Writes a piece of the answer.
    pub fn text(&mut self, source: Source, text: &str) {
        if text.is_empty() {
            return;
        }
        if self.source == Some(Source::Drafter) && source == Source::Base {
            self.write(SWITCH, MARK);
        }
        self.source = Some(source);
        let style = if source == Source::Drafter { DRAFTER } else { BASE };
        self.write(style, &visible(text));
        self.at_line_start = text.ends_with('\n');
    }

    /// Ends the answer's last line.
    pub fn end(&mut self) {
        if !self.at_line_start {
            self.write(Style::new(), "\n");
            self.at_line_start = true;
        }
    }

    /// Where it painted to.
    pub fn written(&self) -> &W {
        &self.out
    }

    fn write(&mut self, style: Style, text: &str) {
        // An output that nobody reads any more is no reason to lose the conversation.
        let _ = write!(self.out, "{style}{text}{style:#}");
        let _ = self.out.flush();
    }
}

/// A model may write anything, but no escape sequence reaches the terminal.
fn visible(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\t' => c,
            '\u{0}'..='\u{1f}' => char::from_u32(0x2400 + u32::from(c)).unwrap_or(' '),
            '\u{7f}'..='\u{9f}' => char::REPLACEMENT_CHARACTER,
            _ => c,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn painted(pieces: &[(Source, &str)], colours: bool) -> String {
        let mut bytes = Vec::new();
        let choice =
            if colours { anstream::ColorChoice::AlwaysAnsi } else { anstream::ColorChoice::Never };
        {
            let mut painter = Painter::new(anstream::AutoStream::new(&mut bytes, choice));
            for (source, text) in pieces {
                painter.text(*source, text);
            }
            painter.end();
        }
        String::from_utf8(bytes).unwrap()
    }

    const PIECES: [(Source, &str); 4] = [
        (Source::Drafter, "The "),
        (Source::Drafter, "capital"),
        (Source::Base, " is"),
        (Source::Base, " Paris."),
    ];

    #[test]
    fn without_colours_a_mark_tells_the_switch() {
        assert_eq!(painted(&PIECES, false), "The capital‖ is Paris.\n");
    }

    #[test]
    fn with_colours_each_source_has_its_own() {
        let text = painted(&PIECES, true);
        assert!(text.contains("\u{1b}[36mcapital\u{1b}[0m"), "{text:?}");
        assert!(text.contains("\u{1b}[32m is\u{1b}[0m"), "{text:?}");
        assert_eq!(text.matches(MARK).count(), 1);
    }

    #[test]
    fn there_is_no_mark_without_a_switch() {
        assert_eq!(painted(&PIECES[..2], false), "The capital\n");
        assert_eq!(painted(&PIECES[2..], false), " is Paris.\n");
    }

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        let text = painted(&[(Source::Base, "a\u{1b}[2Jb\u{9b}c\r\n")], false);
        assert_eq!(text, "a␛[2Jb\u{fffd}c␍\n");
    }
}
