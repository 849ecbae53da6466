//! A conversation with a router.

use std::io::Write;
use std::time::{Duration, Instant};

use headstart_proto::v1::generate_frame::Event;
use headstart_proto::v1::router_client::RouterClient;
use headstart_proto::{Error, ErrorCode, v1};
use tonic::transport::{Channel, Endpoint};

use super::Asking;
use super::paint::{ASIDE, BASE, DRAFTER, MARK, Painter, SWITCH};
use crate::failure::Failure;

const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// A router that says nothing for this long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// An answer's frames; the router coalesces tokens, so this is far above any real one.
const FRAME_BYTES_MAX: usize = 16 << 20;

/// A conversation: what was said, and how it goes on.
#[derive(Debug)]
pub struct Session {
    client: RouterClient<Channel>,
    asking: Asking,
    model: String,
    messages: Vec<v1::Message>,
}

/// What came of a line that the user typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked {
    /// The user wants to leave.
    Quit,
    /// An empty line.
    Nothing,
    /// Words to show after whatever was painted.
    Said(String),
}

/// An answer's figures.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// The whole text.
    pub text: String,
    /// From the question to the first text.
    pub first_text: Option<Duration>,
    /// From the first text to the last.
    pub writing: Duration,
    /// How it ended.
    pub finished: v1::GenerateFinished,
}

impl Session {
    /// Connects to the router at `grpc` and settles the model.
    ///
    /// # Errors
    /// When nobody answers there, or no model is served.
    pub async fn connect(grpc: &str, asking: Asking) -> Result<Self, Failure> {
        let url = if grpc.contains("://") { grpc.to_owned() } else { format!("http://{grpc}") };
        let endpoint = Endpoint::from_shared(url)
            .map_err(|error| Failure::Usage(format!("--grpc `{grpc}` is no address: {error}")))?
            .connect_timeout(CONNECT_TIME_MAX)
            .tcp_nodelay(true);
        let channel = endpoint.connect().await.map_err(|_| {
            Failure::Failed(format!(
                "no router answers at {grpc}; start a cluster with \
                 `headstart up --drafter smollm2 --base qwen2.5-coder`, or give --grpc HOST:PORT"
            ))
        })?;
        let mut client = RouterClient::new(channel).max_decoding_message_size(FRAME_BYTES_MAX);
        let model = match &asking.model {
            Some(model) => model.clone(),
            None => first_model(&mut client, grpc).await?,
        };
        Ok(Self { messages: system(&asking), client, asking, model })
    }

    /// What a conversation begins with.
    pub(super) fn greeting(&self) -> String {
        format!(
            "Talking to {}: {DRAFTER}the drafter begins{DRAFTER:#}{SWITCH}{MARK}{SWITCH:#}\
             {BASE}the base goes on{BASE:#}. /reset starts afresh, /quit leaves.",
            self.model
        )
    }

    /// A line of a conversation: a command, or a question.
    pub async fn take<W: Write>(&mut self, line: &str, painter: &mut Painter<W>) -> Asked {
        let line = line.trim();
        match line {
            "" => Asked::Nothing,
            "/quit" | "/exit" => Asked::Quit,
            "/reset" => {
                self.messages = system(&self.asking);
                Asked::Said("The conversation starts afresh.".to_owned())
            }
            _ if line.starts_with('/') && !line[1..].contains(['/', ' ']) => {
                Asked::Said(format!("There is no {line}; /reset starts afresh, /quit leaves."))
            }
            _ => match self.ask(line, painter).await {
                Ok(answer) => Asked::Said(answer.summary()),
                Err(error) if error.code == ErrorCode::ContextTooLong => {
                    Asked::Said(format!("{}; /reset starts afresh", error.message))
                }
                Err(error) => Asked::Said(error.message),
            },
        }
    }

    /// Asks, paints the answer as it comes, and keeps both in the conversation. A question that
    /// got no answer is not kept.
    ///
    /// # Errors
    /// What the router said.
    pub async fn ask<W: Write>(
        &mut self,
        question: &str,
        painter: &mut Painter<W>,
    ) -> Result<Answer, Error> {
        let mut messages = self.messages.clone();
        messages.push(message("user", question));
        let request = self.asking.request(self.model.clone(), messages.clone());
        let answer = self.receive(request, painter).await;
        painter.end();
        let answer = answer?;
        if !answer.text.trim().is_empty() {
            messages.push(message("assistant", &answer.text));
            self.messages = messages;
        }
        Ok(answer)
    }

    async fn receive<W: Write>(
        &mut self,
        request: v1::GenerateRequest,
        painter: &mut Painter<W>,
    ) -> Result<Answer, Error> {
        let asked = Instant::now();
        let mut answer = Answer::default();
        let mut frames = patient(self.client.generate(request)).await?.into_inner();
        while let Some(frame) = patient(frames.message()).await? {
            match frame.event {
                Some(Event::Text(text)) => {
                    let first = *answer.first_text.get_or_insert_with(|| asked.elapsed());
                    answer.writing = asked.elapsed().saturating_sub(first);
                    painter.text(text.source(), &text.text);
                    answer.text.push_str(&text.text);
                }
                Some(Event::Finished(finished)) => answer.finished = finished,
                Some(Event::Started(_)) | None => {}
            }
        }
        Ok(answer)
    }
}

/// `call`, unless nothing comes of it for too long.
async fn patient<T>(call: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, Error> {
    match tokio::time::timeout(SILENCE_MAX, call).await {
        Ok(result) => result.map_err(|status| Error::from_status(&status)),
        Err(_) => Err(Error::new(
            ErrorCode::DeadlineExceeded,
            format!("the router said nothing for {} s", SILENCE_MAX.as_secs()),
        )),
    }
}

async fn first_model(client: &mut RouterClient<Channel>, grpc: &str) -> Result<String, Failure> {
    let listed = patient(client.list_models(v1::ListModelsRequest {}))
        .await
        .map_err(|error| Failure::Failed(format!("{grpc}: {}", error.message)))?;
    let models = listed.into_inner().models;
    let base = |model: &&v1::Model| model.tier() == v1::NodeTier::Base;
    models.iter().find(base).or(models.first()).map(|model| model.id.clone()).ok_or_else(|| {
        Failure::Failed(format!("the router at {grpc} serves no model yet; try again in a moment"))
    })
}

fn system(asking: &Asking) -> Vec<v1::Message> {
    asking.system.iter().map(|text| message("system", text)).collect()
}

fn message(role: &str, content: &str) -> v1::Message {
    v1::Message { role: role.to_owned(), content: content.to_owned() }
}

impl Answer {
    /// One line: time to first text, speed, and what became of the draft.
    #[must_use]
    pub fn summary(&self) -> String {
        let Some(first) = self.first_text else {
            return "(an empty answer)".to_owned();
        };
        let tokens = self.finished.completion_tokens;
        let mut parts = vec![format!("TTFT {} ms", first.as_millis())];
        if tokens > 1 && !self.writing.is_zero() {
            let rate = f64::from(tokens - 1) / self.writing.as_secs_f64();
            parts.push(format!("{tokens} tokens, {rate:.1} tokens/s"));
        } else {
            parts.push(format!("{tokens} tokens"));
        }
        if let Some(draft) = &self.finished.draft {
            parts.push(became(draft));
        }
        if self.finished.reason() == v1::FinishReason::Length {
            parts.push("cut at the limit".to_owned());
        }
        parts.join(" · ")
    }
}

/// What became of a draft, for people.
fn became(draft: &v1::DraftSummary) -> String {
    let (kept, drafted) = (draft.kept_tokens, draft.drafted_tokens);
    let pair = format!("{} → {}", draft.drafter, draft.base);
    match draft.switch_index {
        Some(index) if draft.switched => {
            format!("{pair}, switched at {index}: kept {kept} of {drafted} drafted")
        }
        Some(_) => format!("{pair}, no switch: the whole draft of {kept} kept"),
        None => format!("{} alone", draft.base),
    }
}

/// Writes an aside to standard error.
pub(super) fn tell(words: &str) {
    let _ = writeln!(anstream::stderr(), "{ASIDE}{words}{ASIDE:#}");
}

/// Asks for the next line.
pub(super) fn prompt() {
    let mut stderr = anstream::stderr();
    let _ = write!(stderr, "\n{SWITCH}›{SWITCH:#} ");
    let _ = stderr.flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(draft: v1::DraftSummary) -> Answer {
        Answer {
            text: "x".to_owned(),
            first_text: Some(Duration::from_millis(85)),
            writing: Duration::from_secs(2),
            finished: v1::GenerateFinished {
                completion_tokens: 41,
                draft: Some(draft),
                ..v1::GenerateFinished::default()
            },
        }
    }

    #[test]
    fn the_summary_tells_the_switch() {
        let draft = v1::DraftSummary {
            drafter: "small".to_owned(),
            base: "large".to_owned(),
            switched: true,
            switch_index: Some(12),
            kept_tokens: 13,
            drafted_tokens: 15,
            ..v1::DraftSummary::default()
        };
        assert_eq!(
            answer(draft).summary(),
            "TTFT 85 ms · 41 tokens, 20.0 tokens/s · small → large, switched at 12: \
             kept 13 of 15 drafted"
        );
    }

    #[test]
    fn the_summary_tells_that_nothing_switched() {
        let draft = v1::DraftSummary {
            drafter: "small".to_owned(),
            base: "large".to_owned(),
            switch_index: Some(39),
            kept_tokens: 40,
            drafted_tokens: 40,
            ..v1::DraftSummary::default()
        };
        let summary = answer(draft).summary();
        assert!(summary.ends_with("no switch: the whole draft of 40 kept"), "{summary}");
        assert_eq!(Answer::default().summary(), "(an empty answer)");
    }
}
