//! One request as its client saw it.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bench::client::{CallError, error_code};

/// What became of a draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Draft {
    /// A window reached the threshold.
    pub(super) switched: bool,
    /// Draft tokens that the base received.
    pub(super) drafted_tokens: u32,
    /// Those in the answer.
    pub(super) kept_tokens: u32,
}

/// One request's life. Times are in seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Sample {
    /// From the run's start until it was sent.
    pub(super) sent: f64,
    /// Until its first text.
    pub(super) ttft: Option<f64>,
    /// Between two tokens, one for each token after the first event's.
    pub(super) itl: Vec<f64>,
    /// As [`Self::itl`], between two of the base's own tokens.
    #[serde(skip)]
    pub(super) base_itl: Vec<f64>,
    /// From the last of the drafter's text to the first of the base's.
    pub(super) takeover: Option<f64>,
    /// Until its end.
    pub(super) total: f64,
    /// Events with text.
    pub(super) events: u32,
    /// As the server counted them.
    pub(super) prompt_tokens: u32,
    /// As the server counted them.
    pub(super) completion_tokens: u32,
    /// `stop` or `length`.
    pub(super) finish_reason: Option<String>,
    /// Set by a server that drafts.
    pub(super) draft: Option<Draft>,
    /// Why there is no whole answer.
    pub(super) error: Option<String>,
}

/// Reads the events of one stream.
#[derive(Debug)]
pub(super) struct Watch {
    begun: Instant,
    /// When the last text came, and whose it was.
    last: Option<(Instant, Source)>,
    sample: Sample,
    error: Option<CallError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Drafter,
    Base,
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(default, borrow)]
    choices: Vec<Choice<'a>>,
    usage: Option<Usage>,
    headstart: Option<Draft>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default)]
    delta: Delta,
    finish_reason: Option<String>,
    #[serde(borrow)]
    source: Option<std::borrow::Cow<'a, str>>,
    token_ids: Option<Vec<u32>>,
}

#[derive(Deserialize, Default)]
struct Delta {
    content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
}

impl Watch {
    /// Begins with the request, `sent` after the run's start.
    pub(super) fn new(sent: Duration) -> Self {
        let sample = Sample { sent: sent.as_secs_f64(), ..Sample::default() };
        Self { begun: Instant::now(), last: None, sample, error: None }
    }

    /// Takes the data of an event that came at `now`.
    pub(super) fn event(&mut self, data: &[u8], now: Instant) {
        let event: Event<'_> = match serde_json::from_slice(data) {
            Ok(event) => event,
            Err(error) => {
                self.error.get_or_insert(CallError::Broken(format!("an event: {error}")));
                return;
            }
        };
        if event.error.is_some() {
            self.error.get_or_insert(CallError::Failed(error_code(data)));
        }
        for choice in event.choices {
            self.choice(choice, now);
        }
        if let Some(usage) = event.usage {
            self.sample.prompt_tokens = usage.prompt_tokens;
            self.sample.completion_tokens = usage.completion_tokens;
        }
        if event.headstart.is_some() {
            self.sample.draft = event.headstart;
        }
    }

    fn choice(&mut self, choice: Choice<'_>, now: Instant) {
        if choice.finish_reason.is_some() {
            self.sample.finish_reason = choice.finish_reason;
        }
        let text = choice.delta.content.unwrap_or_default();
        let tokens = choice.token_ids.map_or(1, |ids| ids.len().max(1));
        if text.is_empty() {
            return;
        }
        self.sample.events += 1;
        let source = match choice.source.as_deref() {
            Some("drafter") => Source::Drafter,
            _ => Source::Base,
        };
        match self.last {
            None => self.sample.ttft = Some((now - self.begun).as_secs_f64()),
            Some((before, last)) => {
                let gap = (now - before).as_secs_f64();
                if (last, source) == (Source::Drafter, Source::Base) {
                    self.sample.takeover = Some(gap);
                }
                let each = std::iter::repeat_n(gap / tokens as f64, tokens);
                self.sample.itl.extend(each.clone());
                if (last, source) == (Source::Base, Source::Base) {
                    self.sample.base_itl.extend(each);
                }
            }
        }
        self.last = Some((now, source));
    }

    /// The request is over.
    pub(super) fn finish(mut self, outcome: Result<(), CallError>) -> Sample {
        self.sample.total = self.begun.elapsed().as_secs_f64();
        let error = outcome.err().or(self.error);
        self.sample.error = error.map(|error| error.to_string());
        self.sample
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(begun: Instant, ms: u64) -> Instant {
        begun + Duration::from_millis(ms)
    }

    #[test]
    fn a_stream_gives_its_times_and_its_draft() {
        let mut watch = Watch::new(Duration::from_secs(2));
        let begun = watch.begun;
        let text = |source: &str, ids: &str| {
            format!(
                r#"{{"choices": [{{"delta": {{"content": "a\"b"}}, "source": "{source}", "token_ids": [{ids}]}}]}}"#
            )
        };
        let role = r#"{"choices": [{"delta": {"role": "assistant", "content": ""}, "source": "drafter"}]}"#;
        watch.event(role.as_bytes(), at(begun, 50));
        watch.event(text("drafter", "1,2").as_bytes(), at(begun, 100));
        watch.event(text("drafter", "3,4").as_bytes(), at(begun, 120));
        watch.event(text("base", "5").as_bytes(), at(begun, 150));
        watch.event(text("base", "6").as_bytes(), at(begun, 190));
        let end = r#"{"choices": [{"delta": {}, "finish_reason": "length"}],
            "headstart": {"drafter": "d", "switched": true, "drafted_tokens": 7, "kept_tokens": 4}}"#;
        watch.event(end.as_bytes(), at(begun, 191));
        let usage = r#"{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}}"#;
        watch.event(usage.as_bytes(), at(begun, 191));
        let sample = watch.finish(Ok(()));
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(sample.sent == 2.0 && near(sample.ttft.unwrap(), 0.1), "{sample:?}");
        assert_eq!(sample.itl.len(), 4);
        assert!(near(sample.itl[0], 0.01) && near(sample.itl[3], 0.04), "{sample:?}");
        assert!(sample.base_itl.len() == 1 && near(sample.takeover.unwrap(), 0.03), "{sample:?}");
        let draft = Draft { switched: true, drafted_tokens: 7, kept_tokens: 4 };
        assert_eq!((sample.draft, sample.events), (Some(draft), 4));
        assert_eq!((sample.prompt_tokens, sample.completion_tokens), (9, 6));
        assert_eq!((sample.finish_reason.as_deref(), sample.error), (Some("length"), None));
    }

    #[test]
    fn an_error_in_mid_stream_is_an_error() {
        let mut watch = Watch::new(Duration::ZERO);
        watch.event(br#"{"error": {"message": "m", "code": "unavailable"}}"#, Instant::now());
        let error = watch.finish(Ok(())).error.unwrap();
        assert!(error.contains("mid-stream") && error.contains("unavailable"), "{error}");
        let mut watch = Watch::new(Duration::ZERO);
        watch.event(b"{", Instant::now());
        assert!(watch.finish(Ok(())).error.is_some());
    }
}
