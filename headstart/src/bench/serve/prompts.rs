//! What is asked: lines of a file, or questions of our own, with as much to read before each as is
//! wanted.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::failure::Failure;

/// A file of prompts is no longer than this.
const FILE_BYTES_MAX: u64 = 64 << 20;

const QUESTIONS: [&str; 24] = [
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do vaccines teach the body to defend itself?",
    "Write a haiku about the first snow.",
    "Explain to a child how a bicycle stays upright.",
    "What should I pack for three days in the mountains?",
    "Write a function in Python that reverses the words of a sentence.",
    "How does a refrigerator move heat from cold to warm?",
    "Name four things that made the printing press possible.",
    "How do I politely decline an invitation to a wedding?",
    "What is the difference between a virus and a bacterium?",
    "Summarise the story of Romeo and Juliet in three sentences.",
    "How is cheese made?",
    "Give me a recipe for a soup with lentils and carrots.",
    "Why do we have leap years?",
    "What does a compiler do that an interpreter does not?",
    "How can I learn to play the piano as an adult?",
    "What are the causes of inflation?",
    "Describe the life of a star like the sun.",
    "Write a short letter of complaint about a late train.",
    "How do submarines rise and sink?",
    "What makes bread rise?",
    "Explain recursion with an example from everyday life.",
    "Which exercises are good for the lower back?",
];

/// What stands before a question when there is to be more to read.
const SENTENCES: [&str; 12] = [
    "The ferry leaves the harbour twice a day, once at dawn and once when the lamps are lit.",
    "Two of the older houses on the square were rebuilt after the flood, and one was not.",
    "She kept a notebook of every bird that she had seen from the kitchen window.",
    "The committee met on a Thursday and could not agree on the colour of the doors.",
    "Most of the wheat was sold before it was cut, at a price that nobody was proud of.",
    "Where the road bends to the north there is a well, and beside it a stone without a name.",
    "He had learned the trade from his uncle, who had learned it from a book.",
    "In the second winter the pipes froze, and the school was closed for eleven days.",
    "The map was right about the river and wrong about nearly everything else.",
    "Every train that stops here waits for seven minutes, even when there is nobody to wait for.",
    "They planted the orchard in rows of nine, because the field would not take ten.",
    "A letter came in the spring with a stamp that none of them had ever seen.",
];

/// The prompts of a run, which repeat when there are more requests.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Prompts {
    messages: Vec<Value>,
    context_words: usize,
}

/// A line of a file: `{"prompt": …}` or `{"messages": …}`.
#[derive(Deserialize)]
struct Line {
    prompt: Option<String>,
    messages: Option<Value>,
}

impl Prompts {
    /// Our own questions, each after about `context_words` words of prose that no two requests share
    /// a beginning of.
    pub(super) fn own(context_words: usize) -> Self {
        let messages = QUESTIONS.iter().map(|question| user(question)).collect();
        Self { messages, context_words }
    }

    /// The lines of `path`: each a prompt, or a JSON object with `prompt` or `messages`.
    ///
    /// # Errors
    /// When the file cannot be read, is too long or holds no prompt, or a line is an object without
    /// either.
    pub(super) fn read(path: &Path, context_words: usize) -> Result<Self, Failure> {
        let wrong = |what: String| Failure::Usage(format!("--prompts: {}: {what}", path.display()));
        let length = std::fs::metadata(path).map_err(|error| wrong(error.to_string()))?.len();
        if length > FILE_BYTES_MAX {
            return Err(wrong(format!("{length} bytes are too many")));
        }
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let messages = lines
            .map(|(at, line)| parse(line).map_err(|what| wrong(format!("line {}: {what}", at + 1))))
            .collect::<Result<Vec<_>, _>>()?;
        if messages.is_empty() {
            return Err(wrong("there is no prompt in it".to_owned()));
        }
        Ok(Self { messages, context_words })
    }

    /// The messages of request number `index`.
    pub(super) fn messages(&self, index: usize) -> Value {
        let mut messages = self.messages[index % self.messages.len()].clone();
        let last = messages.as_array_mut().and_then(|messages| messages.last_mut());
        if let Some(last) = last.filter(|_| self.context_words > 0) {
            let question = last["content"].as_str().unwrap_or_default();
            last["content"] = Value::String(format!("{}\n\n{question}", self.context(index)));
        }
        messages
    }

    /// Prose before request number `index`, that begins as no other does.
    fn context(&self, index: usize) -> String {
        let mut text = format!("These are my notes, page {}.", index + 1);
        let mut words = text.split(' ').count();
        for turn in 0.. {
            if words >= self.context_words {
                break;
            }
            // 5 and 12 have no factor in common: every sentence comes before one comes again.
            let sentence = SENTENCES[(index + turn * 5) % SENTENCES.len()];
            words += sentence.split(' ').count();
            text.push(' ');
            text.push_str(sentence);
        }
        text
    }
}

fn parse(line: &str) -> Result<Value, String> {
    if !line.trim_start().starts_with('{') {
        return Ok(user(line));
    }
    let found: Line = serde_json::from_str(line).map_err(|error| error.to_string())?;
    match (found.prompt, found.messages) {
        (Some(prompt), None) => Ok(user(&prompt)),
        (None, Some(messages)) if messages.as_array().is_some_and(|all| !all.is_empty()) => {
            Ok(messages)
        }
        _ => Err("expected \"prompt\" or \"messages\"".to_owned()),
    }
}

fn user(content: &str) -> Value {
    json!([{"role": "user", "content": content}])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_repeat_and_their_contexts_do_not() {
        let prompts = Prompts::own(0);
        assert_eq!(prompts.messages(3), prompts.messages(3 + QUESTIONS.len()));
        let long = Prompts::own(100);
        let text = |index| long.messages(index)[0]["content"].as_str().unwrap().to_owned();
        let (one, other) = (text(0), text(QUESTIONS.len()));
        assert!(one.split(' ').count() >= 100 && one.ends_with(QUESTIONS[0]), "{one}");
        let shared = one.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
        assert!(shared < 40, "{one}\n{other}");
    }

    #[test]
    fn a_file_has_lines_of_three_kinds() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let lines = "plain\n\n{\"prompt\": \"quoted\"}\n{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}]}\n";
        std::fs::write(&file, lines).unwrap();
        let prompts = Prompts::read(file.path(), 0).unwrap();
        assert_eq!(prompts.messages(0), user("plain"));
        assert_eq!(prompts.messages(1), user("quoted"));
        assert_eq!(prompts.messages(2)[0]["role"], "system");
        for (text, expected) in [("{\"x\": 1}", "line 1"), ("{", "line 1"), ("\n", "no prompt")] {
            std::fs::write(&file, text).unwrap();
            let message = Prompts::read(file.path(), 0).unwrap_err().message().to_owned();
            assert!(message.starts_with("--prompts") && message.contains(expected), "{message}");
        }
    }
}
