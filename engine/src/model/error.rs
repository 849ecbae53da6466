//! Why a model could not be loaded.

use std::path::{Path, PathBuf};

use headstart_formats::FormatError;

use super::shard::TooManyRanks;

/// A model that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file is not what its format promises.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The model needs something that this engine does not have.
    #[error("{}: {field}: {found} is not supported (supported: {supported})", path.display())]
    Unsupported {
        /// The file or directory.
        path: PathBuf,
        /// The field that asks for it.
        field: String,
        /// What it asks for.
        found: String,
        /// What would be understood.
        supported: String,
    },
    /// A tensor is missing or has another shape than the configuration says.
    #[error("{}: tensor {tensor}: expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file or directory.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// The shape that the configuration asks for.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The model cannot be cut among so many ranks.
    #[error("{}: {error}", path.display())]
    Ranks {
        /// The file or directory.
        path: PathBuf,
        /// How many there may be.
        error: TooManyRanks,
    },
}

impl LoadError {
    pub(super) fn unsupported(
        path: &Path,
        field: impl Into<String>,
        found: impl Into<String>,
        supported: impl Into<String>,
    ) -> Self {
        Self::Unsupported {
            path: path.to_owned(),
            field: field.into(),
            found: found.into(),
            supported: supported.into(),
        }
    }

    pub(super) fn ranks(path: &Path, error: TooManyRanks) -> Self {
        Self::Ranks { path: path.to_owned(), error }
    }

    pub(super) fn tensor(
        path: &Path,
        tensor: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Tensor {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            expected: expected.into(),
            found: found.into(),
        }
    }
}
