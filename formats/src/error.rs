//! The one error of this crate.

use std::path::{Path, PathBuf};

/// A model file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The operating system would not open or read the file.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried: "open", "read tensor x".
        action: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The file's content is not what its format promises.
    #[error("{}: {field}: expected {expected}, found {found}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The field, key or tensor that is wrong.
        field: String,
        /// What a valid file has there.
        expected: String,
        /// What this file has there.
        found: String,
    },
}

impl FormatError {
    /// The file that the error is about.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Io { path, .. } | Self::Invalid { path, .. } => path,
        }
    }

    /// An [`FormatError::Invalid`] from its parts.
    pub fn invalid(
        path: impl Into<PathBuf>,
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            path: path.into(),
            field: field.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    pub(crate) fn io(
        path: impl Into<PathBuf>,
        action: impl Into<String>,
        source: std::io::Error,
    ) -> Self {
        Self::Io { path: path.into(), action: action.into(), source }
    }
}
