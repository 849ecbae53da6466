//! The golden files: token-exact answers of an independent offline implementation of Weak-to-Strong
//! Decoding (Hugging Face transformers, float32, greedy).

use serde::Deserialize;
use serde_json::{Value, json};

use crate::http::{Client, Response};
use crate::process::fixture;

/// Decisions closer than this may tip with another order of float additions.
const MARGIN_MIN: f64 = 0.002;
/// How far a log-probability may be off.
const LOGPROB_TOLERANCE: f64 = 1e-3;

/// One prompt's answer.
#[derive(Clone, Debug, Deserialize)]
pub struct Golden {
    id: String,
    messages: Value,
    window: u32,
    threshold: f64,
    draft_tokens_max: u32,
    max_tokens: u32,
    base_prompt_ids: Vec<u32>,
    base_draft_logprobs: Vec<f64>,
    switched: bool,
    switch_index: usize,
    kept_ids: Vec<u32>,
    continuation_ids: Vec<u32>,
    end: String,
    answer: String,
    margins: Margins,
}

#[derive(Clone, Debug, Deserialize)]
struct Margins {
    draft_logit_gap: f64,
    base_logit_gap: f64,
    threshold_gap: f64,
}

/// Reads a golden file.
///
/// # Panics
/// If it is not there, or not as expected.
#[must_use]
pub fn read(file: &str) -> Vec<Golden> {
    let path = fixture("golden").join(file);
    let text = std::fs::read_to_string(&path).expect("a golden file");
    text.lines().map(|line| serde_json::from_str(line).expect("a golden line")).collect()
}

impl Golden {
    /// Whether no decision of this answer was so close that rounding may tip it.
    #[must_use]
    pub fn is_robust(&self) -> bool {
        let Margins { draft_logit_gap, base_logit_gap, threshold_gap } = self.margins;
        [draft_logit_gap, base_logit_gap, threshold_gap].iter().all(|&gap| gap >= MARGIN_MIN)
    }

    /// The request, as an OpenAI client would send it.
    #[must_use]
    pub fn request(&self, model: &str) -> Value {
        json!({
            "model": model,
            "messages": self.messages,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "logprobs": true,
            "return_token_ids": true,
            "headstart": {
                "window": self.window,
                "threshold": self.threshold,
                "draft_tokens_max": self.draft_tokens_max,
            },
        })
    }

    /// Asks for this answer, and says what is not as it must be.
    #[must_use]
    pub fn check(&self, client: &Client, model: &str) -> Vec<String> {
        let Response { status, body, .. } =
            client.post("/v1/chat/completions", &self.request(model));
        if status != 200 {
            return vec![format!("{}: status {status}: {body}", self.id)];
        }
        let mut wrong = Vec::new();
        let mut expect = |what: &str, found: &Value, expected: Value| {
            if *found != expected {
                wrong.push(format!("{}: {what}: expected {expected}, found {found}", self.id));
            }
        };
        let choice = &body["choices"][0];
        let answer_ids = [self.kept_ids.as_slice(), &self.continuation_ids].concat();
        let reason = if self.end == "length" { "length" } else { "stop" };
        expect("prompt ids", &body["prompt_token_ids"], json!(self.base_prompt_ids));
        expect("answer ids", &choice["token_ids"], json!(answer_ids));
        expect("answer", &choice["message"]["content"], json!(self.answer));
        expect("finish_reason", &choice["finish_reason"], json!(reason));
        let summary = &body["headstart"];
        expect("switched", &summary["switched"], json!(self.switched));
        expect("switch_index", &summary["switch_index"], json!(self.switch_index));
        expect("kept_tokens", &summary["kept_tokens"], json!(self.kept_ids.len()));
        expect("completion_tokens", &body["usage"]["completion_tokens"], json!(answer_ids.len()));
        let logprobs = choice["logprobs"]["content"].as_array().cloned().unwrap_or_default();
        for (index, expected) in self.base_draft_logprobs[..self.kept_ids.len()].iter().enumerate()
        {
            let found = logprobs.get(index).and_then(|entry| entry["logprob"].as_f64());
            if found.is_none_or(|found| (found - expected).abs() > LOGPROB_TOLERANCE) {
                wrong.push(format!(
                    "{}: logprob {index}: expected {expected}, found {found:?}",
                    self.id
                ));
            }
        }
        wrong
    }
}

/// Asks for the robust answers of a golden file, `concurrency` at a time, `rounds` times over.
///
/// # Panics
/// If an answer is not as it must be, or none was robust.
pub fn check_file(client: &Client, model: &str, file: &str, concurrency: usize, rounds: usize) {
    let goldens: Vec<Golden> = read(file).into_iter().filter(Golden::is_robust).collect();
    assert!(goldens.len() >= 10, "{file}: only {} robust answers", goldens.len());
    let total = goldens.len() * rounds;
    let next = std::sync::atomic::AtomicUsize::new(0);
    let wrong = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..concurrency {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if index >= total {
                        return;
                    }
                    let found = goldens[index % goldens.len()].check(client, model);
                    wrong.lock().expect("no thread panicked").extend(found);
                }
            });
        }
    });
    let wrong = wrong.into_inner().expect("no thread panicked");
    assert!(wrong.is_empty(), "{file}: {} of {total}:\n{}", wrong.len(), wrong.join("\n"));
    println!("{file}: {total} answers equal, {concurrency} at a time");
}
