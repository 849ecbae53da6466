//! How a model on the hub is named.

use std::fmt;
use std::str::FromStr;

use crate::models::error::ModelError;

/// A model on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubModel {
    /// `owner/repo`.
    pub repo: String,
    /// A branch, tag or commit; `main` unless given.
    pub revision: String,
    /// A GGUF file of the repository; none means the repository itself.
    pub file: Option<String>,
}

impl fmt::Display for HubModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        match &self.file {
            Some(file) => write!(f, ":{file}"),
            None => Ok(()),
        }
    }
}

impl FromStr for HubModel {
    type Err = ModelError;

    fn from_str(spec: &str) -> Result<Self, Self::Err> {
        let bad = |reason| ModelError::BadHubSpec { spec: spec.to_owned(), reason };
        let (place, file) = match spec.split_once(':') {
            Some((place, file)) => (place, Some(file)),
            None => (spec, None),
        };
        let (repo, revision) = place.split_once('@').unwrap_or((place, "main"));
        let parts: Vec<&str> = repo.split('/').collect();
        if parts.len() != 2 || !parts.iter().all(|part| is_plain(part)) {
            return Err(bad("the repository is not owner/repo"));
        }
        if !revision.split('/').all(is_plain) {
            return Err(bad("the revision is not a branch, tag or commit"));
        }
        if let Some(file) = file {
            if !file.split('/').all(is_plain) {
                return Err(bad("the file is not a path inside the repository"));
            }
            if !file.ends_with(".gguf") {
                return Err(bad("the file is not a .gguf"));
            }
            if file.contains("-of-0") {
                return Err(bad("a GGUF in several files cannot be read"));
            }
        }
        Ok(Self {
            repo: repo.to_owned(),
            revision: revision.to_owned(),
            file: file.map(str::to_owned),
        })
    }
}

/// One component of a path that stays where it is put.
pub(super) fn is_plain(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_models_round_trip() {
        for text in ["owner/repo", "o/r:a.gguf", "o/r@v1.0:sub/a.q8_0.gguf", "o/r@feat/x"] {
            assert_eq!(text.parse::<HubModel>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn malformed_hub_models_say_what_is_wrong() {
        for (text, wrong) in [
            ("repo", "owner/repo"),
            ("a/b/c", "owner/repo"),
            ("a/..", "owner/repo"),
            ("a/b:../../x.gguf", "the file is not a path"),
            ("a/b:x.bin", "not a .gguf"),
            ("a/b@:x.gguf", "the revision"),
            ("a/b:x-00001-of-00002.gguf", "several files"),
            ("a b/c", "owner/repo"),
        ] {
            let message = text.parse::<HubModel>().unwrap_err().to_string();
            assert!(message.contains(wrong), "{text}: {message}");
        }
    }
}
