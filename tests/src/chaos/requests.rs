//! What the clients ask, and what an answer is.

use headstart_proto::v1;
use serde_json::{Map, Value, json};

/// The name both tiers' models go by.
pub const MODEL: &str = "smollm2";

/// Subjects of the questions; each becomes one prompt.
const QUESTIONS: [&str; 12] = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain what a hash table is to a ten-year-old.",
    "List five ways to save water at home.",
    "Write a Python function that reverses a string.",
    "Give me three reasons to learn a second language.",
    "Is it rude to decline a wedding invitation? How should I do it?",
    "Summarise the plot of Romeo and Juliet in two sentences.",
    "What should I do if I get a flat tyre on the motorway?",
    "Translate 'good morning' into Spanish, French and German.",
    "How does a rainbow come about?",
    "Name a vegetable for every letter of the word 'garden'.",
];

/// A long system prompt that some requests share: KV worth moving, and worth sharing.
const HOUSE_RULES: &str = "You are the assistant of a small public library. Be brief and friendly. \
    The library opens at nine in the morning and closes at six in the evening, on Saturdays at two \
    in the afternoon; it is closed on Sundays. Books may be kept for four weeks, films for one week. \
    A reader may borrow up to twenty things at once. Lost books are paid for at their price when \
    new. There is a reading hour for children every Wednesday afternoon, a chess club on Thursdays, \
    and a repair workshop on the first Saturday of the month. The copier costs ten cents a page. \
    Never give legal or medical advice: name the shelf where a good book about it stands instead.";

/// One request, the same over both doors.
#[derive(Clone, Debug)]
pub struct Ask {
    /// What is special about it.
    pub kind: &'static str,
    /// Answers asked for.
    pub choices: u32,
    messages: Vec<(&'static str, String)>,
    max_tokens: u32,
    sampled: Option<u64>,
    stop: Vec<String>,
    top_logprobs: Option<u32>,
    threshold: f32,
    draft_tokens_max: Option<u32>,
}

/// Every distinct request of a run. Some draft to their end, some switch early or late; half are
/// greedy, half are sampled with a seed.
#[must_use]
pub fn all() -> Vec<Ask> {
    let mut asks = Vec::new();
    for (index, question) in QUESTIONS.iter().enumerate() {
        let seed = 1000 + index as u64;
        let long = index % 3 == 0;
        let mut messages = vec![("user", (*question).to_owned())];
        if long {
            messages.insert(0, ("system", HOUSE_RULES.to_owned()));
        }
        let plain = Ask {
            kind: "greedy",
            choices: 1,
            messages,
            max_tokens: [24, 40, 56, 72][index % 4],
            sampled: None,
            stop: Vec::new(),
            top_logprobs: None,
            threshold: [0.8, 0.55][index % 2],
            draft_tokens_max: None,
        };
        let sampled = Ask { kind: "sampled", sampled: Some(seed), ..plain.clone() };
        asks.push(Ask { kind: "greedy, logprobs", top_logprobs: Some(2), ..plain.clone() });
        asks.push(Ask { kind: "sampled, logprobs", top_logprobs: Some(1), ..sampled.clone() });
        let stop = vec![". ".to_owned(), "\n\n".to_owned()];
        asks.push(Ask { kind: "sampled, stop strings", stop, ..sampled.clone() });
        asks.push(Ask { kind: "sampled, n = 2", choices: 2, ..sampled.clone() });
        // A draft that is over long before the answer: the base writes most of it.
        asks.push(Ask { kind: "greedy, short draft", draft_tokens_max: Some(8), ..plain.clone() });
        asks.push(Ask {
            kind: "sampled, short draft",
            draft_tokens_max: Some(8),
            ..sampled.clone()
        });
        // A threshold that is never reached: the drafter writes all of it.
        asks.push(Ask { kind: "greedy, never switched", threshold: 1.0, ..plain.clone() });
        asks.push(plain);
        asks.push(sampled);
    }
    asks
}

impl Ask {
    /// The body for `POST /v1/chat/completions`.
    #[must_use]
    pub fn http(&self) -> Value {
        let messages: Vec<Value> = self
            .messages
            .iter()
            .map(|(role, content)| json!({"role": role, "content": content}))
            .collect();
        let mut extension = Map::new();
        extension.insert("threshold".into(), json!(self.threshold));
        if let Some(max) = self.draft_tokens_max {
            extension.insert("draft_tokens_max".into(), json!(max));
        }
        let mut body = json!({
            "model": MODEL, "messages": messages, "max_tokens": self.max_tokens, "n": self.choices,
            "stream": true, "return_token_ids": true, "headstart": extension,
            "temperature": if self.sampled.is_some() { 0.8 } else { 0.0 },
        });
        if let Some(seed) = self.sampled {
            body["seed"] = json!(seed);
            body["top_p"] = json!(0.95);
            body["presence_penalty"] = json!(0.5);
            body["frequency_penalty"] = json!(0.25);
        }
        if let Some(top) = self.top_logprobs {
            body["logprobs"] = json!(true);
            body["top_logprobs"] = json!(top);
        }
        if !self.stop.is_empty() {
            body["stop"] = json!(self.stop);
        }
        body
    }

    /// The same for `Router.Generate`.
    #[must_use]
    pub fn grpc(&self) -> v1::GenerateRequest {
        let message = |(role, content): &(&str, String)| v1::Message {
            role: (*role).into(),
            content: content.clone(),
        };
        let sampling = match self.sampled {
            None => v1::Sampling { temperature: Some(0.0), ..v1::Sampling::default() },
            Some(seed) => v1::Sampling {
                temperature: Some(0.8),
                seed: Some(seed),
                top_p: Some(0.95),
                presence_penalty: Some(0.5),
                frequency_penalty: Some(0.25),
                ..v1::Sampling::default()
            },
        };
        v1::GenerateRequest {
            model: MODEL.into(),
            messages: self.messages.iter().map(message).collect(),
            max_tokens: Some(self.max_tokens),
            sampling: Some(sampling),
            stop: self.stop.clone(),
            n: Some(self.choices),
            top_logprobs: self.top_logprobs,
            threshold: Some(self.threshold),
            draft_tokens_max: self.draft_tokens_max,
            ..v1::GenerateRequest::default()
        }
    }
}

/// One answer, without what may differ from run to run (how far the drafter came).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    /// The base's token ids.
    pub ids: Vec<u32>,
    /// Of these, the drafter's.
    pub drafter_tokens: u32,
    /// The text.
    pub text: String,
    /// Log-probabilities: each token's own, then its alternatives'.
    pub logprobs: Vec<f32>,
    /// `stop` or `length`; empty until the end.
    pub reason: String,
    /// A window reached the threshold.
    pub switched: bool,
    /// Draft tokens that were kept.
    pub kept_tokens: u32,
}

/// How an answer differs from the right one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// Tokens came twice.
    Duplicated(String),
    /// Tokens are missing.
    Missing(String),
    /// Anything else.
    Wrong(String),
}

impl Flaw {
    /// The class and what was seen.
    #[must_use]
    pub fn parts(&self) -> (&'static str, &str) {
        match self {
            Self::Duplicated(what) => ("duplicated", what),
            Self::Missing(what) => ("missing", what),
            Self::Wrong(what) => ("wrong", what),
        }
    }
}

/// Compares an answer with the undisturbed one: to the token, to the character and to the bit of
/// each log-probability.
///
/// # Errors
/// How they differ.
pub fn compare(expected: &[Choice], found: &[Choice]) -> Result<(), Flaw> {
    if expected.len() != found.len() {
        return Err(Flaw::Wrong(format!("{} answers, not {}", found.len(), expected.len())));
    }
    for (index, (expected, found)) in expected.iter().zip(found).enumerate() {
        compare_ids(index, &expected.ids, &found.ids)?;
        if expected != found {
            let (expected, found) = (format!("{expected:?}"), format!("{found:?}"));
            let what = format!("choice {index}: expected {expected}, found {found}");
            return Err(Flaw::Wrong(what));
        }
    }
    Ok(())
}

fn compare_ids(choice: usize, expected: &[u32], found: &[u32]) -> Result<(), Flaw> {
    if expected == found {
        return Ok(());
    }
    let shorter = expected.len().min(found.len());
    let same = |pair: &(&u32, &u32)| pair.0 == pair.1;
    let head = expected.iter().zip(found).take_while(same).count();
    let tail = expected.iter().rev().zip(found.iter().rev()).take_while(same).count();
    let what = format!("choice {choice} at token {head}: expected {expected:?}, found {found:?}");
    Err(match expected.len().cmp(&found.len()) {
        std::cmp::Ordering::Less if head + tail >= shorter => Flaw::Duplicated(what),
        std::cmp::Ordering::Greater if head + tail >= shorter => Flaw::Missing(what),
        _ => Flaw::Wrong(what),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(ids: &[u32]) -> Vec<Choice> {
        vec![Choice { ids: ids.to_vec(), ..Choice::default() }]
    }

    #[test]
    fn flaws_are_told_apart() {
        let expected = answer(&[1, 2, 3, 4, 5]);
        let cases: [(&[u32], Option<&str>); 8] = [
            (&[1, 2, 3, 4, 5], None),
            (&[1, 2, 3, 3, 4, 5], Some("duplicated")),
            (&[1, 2, 3, 2, 3, 4, 5], Some("duplicated")),
            (&[1, 2, 5], Some("missing")),
            (&[1, 2, 3], Some("missing")),
            (&[], Some("missing")),
            (&[1, 2, 9, 4, 5], Some("wrong")),
            (&[1, 2, 9], Some("wrong")),
        ];
        for (ids, class) in cases {
            let flaw = compare(&expected, &answer(ids)).err();
            assert_eq!(flaw.as_ref().map(|flaw| flaw.parts().0), class, "{ids:?}");
        }
        let mut other = expected.clone();
        other[0].logprobs = vec![0.5];
        assert_eq!(compare(&expected, &other).unwrap_err().parts().0, "wrong");
        assert!(compare(&expected, &[]).is_err());
    }

    #[test]
    fn both_doors_are_asked_the_same() {
        for ask in all() {
            let (http, grpc) = (ask.http(), ask.grpc());
            assert_eq!(http["n"].as_u64().map(|n| n as u32), grpc.n);
            assert_eq!(http["seed"].as_u64(), grpc.sampling.and_then(|sampling| sampling.seed));
        }
    }
}
