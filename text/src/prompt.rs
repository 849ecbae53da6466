//! Messages and prompts.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::TextError;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The operator's instructions.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// "system", "user" or "assistant".
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "system" => Ok(Self::System),
            "user" => Ok(Self::User),
            "assistant" => Ok(Self::Assistant),
            other => {
                let found: String = other.chars().take(40).collect();
                let message = format!("unknown role {found:?}; known: system, user, assistant");
                Err(TextError::Messages(message))
            }
        }
    }
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message.
    #[must_use]
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// A prompt as text and as token ids. A BOS that the template does not write is in the ids only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// What the ids say.
    pub text: String,
    /// What the model reads.
    pub ids: Vec<u32>,
}

/// The prompt for a base model without a chat template: a transcript that breaks off where the
/// assistant's turn begins. Every message is stripped of outer white space.
#[must_use]
pub fn plain_prompt(messages: &[Message]) -> String {
    let mut text = String::new();
    for message in messages {
        text.push_str("\n\n");
        text.push_str(header(message.role));
        text.push_str(message.content.trim());
    }
    text.push_str("\n\n");
    text.push_str(header(Role::Assistant));
    text
}

fn header(role: Role) -> &'static str {
    match role {
        Role::System => "[System]\n",
        Role::User => "[User]\n",
        Role::Assistant => "[Assistant]\n",
    }
}

/// What ends an answer to the plain prompt: the next speaker's header. With the newlines before it, so
/// that they are left out as well.
pub(crate) const PLAIN_STOPS: [&str; 9] = [
    "[User]",
    "[System]",
    "[Assistant]",
    "\n[User]",
    "\n[System]",
    "\n[Assistant]",
    "\n\n[User]",
    "\n\n[System]",
    "\n\n[Assistant]",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_prompts_exactly() {
        let user = Message::new(Role::User, " \n Hi there.\t\n");
        assert_eq!(
            plain_prompt(std::slice::from_ref(&user)),
            "\n\n[User]\nHi there.\n\n[Assistant]\n"
        );
        let turns = [
            Message::new(Role::System, "Be kind. "),
            user,
            Message::new(Role::Assistant, "\nHello!"),
            Message::new(Role::User, "Bye"),
        ];
        let expected = "\n\n[System]\nBe kind.\n\n[User]\nHi there.\n\n[Assistant]\nHello!\n\n[User]\nBye\n\n[Assistant]\n";
        assert_eq!(plain_prompt(&turns), expected);
    }

    #[test]
    fn roles_round_trip_and_others_are_named() {
        for role in [Role::System, Role::User, Role::Assistant] {
            assert_eq!(role.to_string().parse::<Role>().unwrap(), role);
        }
        let error = "tool".parse::<Role>().unwrap_err();
        assert!(error.client_fault() && error.to_string().contains("\"tool\""), "{error}");
    }
}
