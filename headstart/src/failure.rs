//! How a command fails: one line for people, and an exit code for scripts.

use std::process::ExitCode;

use crate::models::ModelError;

/// A command that did not do what it was asked.
#[derive(Debug)]
pub enum Failure {
    /// The command line or the configuration is at fault: exit code 2.
    Usage(String),
    /// Something else is: exit code 1.
    Failed(String),
    /// The user stopped it: exit code 130, as a shell has it for SIGINT.
    Interrupted(String),
}

impl Failure {
    /// The line to print.
    #[must_use]
    pub fn message(&self) -> &str {
        match self {
            Self::Usage(message) | Self::Failed(message) | Self::Interrupted(message) => message,
        }
    }

    /// What the process exits with.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Failed(_) => ExitCode::from(1),
            Self::Usage(_) => ExitCode::from(2),
            Self::Interrupted(_) => ExitCode::from(130),
        }
    }
}

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Interrupted { .. } => Self::Interrupted(error.to_string()),
            _ if error.is_usage() => Self::Usage(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}
