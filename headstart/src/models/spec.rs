//! The `SPEC` of a model on the command line.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::models::catalogue::{self, Entry};
use crate::models::error::ModelError;
use crate::models::hub_model::HubModel;

/// A model as a user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    /// A GGUF file or a directory in Hugging Face layout.
    Path(PathBuf),
    /// A short name of the catalogue.
    Catalogue(&'static Entry),
    /// `hf:owner/repo[@revision][:file]`.
    Hub(HubModel),
}

impl FromStr for Spec {
    type Err = ModelError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(rest) = text.strip_prefix("hf:") {
            return rest.parse().map(Self::Hub);
        }
        if let Some(entry) = catalogue::find(text) {
            return Ok(Self::Catalogue(entry));
        }
        let path = Path::new(text);
        let looks_like_path = path.components().count() > 1 || path.extension().is_some();
        if path.exists() || looks_like_path {
            return Ok(Self::Path(path.to_path_buf()));
        }
        Err(ModelError::UnknownSpec { spec: text.to_owned() })
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Catalogue(entry) => f.write_str(entry.name),
            Self::Hub(model) => write!(f, "hf:{model}"),
        }
    }
}

impl Spec {
    /// The name clients use for this model: the short name, or the file's or repository's name.
    #[must_use]
    pub fn model_name(&self) -> String {
        let name = match self {
            Self::Catalogue(entry) => entry.name.to_owned(),
            Self::Hub(model) => match &model.file {
                Some(file) => stem(Path::new(file)),
                None => stem_of_directory(Path::new(&model.repo)),
            },
            Self::Path(path) if path.extension().is_some_and(|e| e == "gguf") => stem(path),
            Self::Path(path) => {
                let whole = path.canonicalize().unwrap_or_else(|_| path.clone());
                stem_of_directory(&whole)
            }
        };
        tidy(&name)
    }
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn stem_of_directory(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// `@` joins a base's and a drafter's name, so no name may hold one.
fn tidy(name: &str) -> String {
    let tidied: String = name
        .chars()
        .map(|c| match c {
            'A'..='Z' | 'a'..='z' | '0'..='9' | '.' | '_' | '-' => c,
            _ => '-',
        })
        .collect();
    if tidied.is_empty() { "model".to_owned() } else { tidied }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_paths_and_hub_models_are_told_apart() {
        assert!(matches!("smollm2".parse(), Ok(Spec::Catalogue(e)) if e.name == "smollm2"));
        assert_eq!("./smollm2".parse::<Spec>().unwrap(), Spec::Path("./smollm2".into()));
        assert_eq!("model.gguf".parse::<Spec>().unwrap(), Spec::Path("model.gguf".into()));
        assert!(matches!("hf:a/b".parse(), Ok(Spec::Hub(_))));
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let message = "smollm3".parse::<Spec>().unwrap_err().to_string();
        assert!(message.contains("`smollm3`"), "{message}");
        assert!(message.contains("smollm2") && message.contains("qwen2.5-coder"), "{message}");
    }

    #[test]
    fn names_never_hold_what_joins_a_pair() {
        let name = |spec: &str| spec.parse::<Spec>().unwrap().model_name();
        assert_eq!(name("smollm2"), "smollm2");
        assert_eq!(name("/models/Big Model@home.Q4_K_M.gguf"), "Big-Model-home.Q4_K_M");
        assert_eq!(name("/models/Llama-3.1-70B"), "Llama-3.1-70B");
        assert_eq!(name("hf:owner/Pilot-3B"), "Pilot-3B");
        assert_eq!(name("hf:owner/repo@v1:sub/x.q8.gguf"), "x.q8");
    }
}
