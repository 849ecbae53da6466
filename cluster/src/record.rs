//! What a node tells the cluster about itself.

use std::time::{SystemTime, UNIX_EPOCH};

use headstart_proto::NodeId;
use serde::{Deserialize, Serialize};

use crate::ClusterError;

/// Longest stored record, in bytes; a longer one is malformed.
const RECORD_BYTES_MAX: usize = 16 << 10;

/// Longest text field, in bytes.
const TEXT_BYTES_MAX: usize = 512;

/// Which model of the pair a node runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Writes the beginning of an answer.
    Drafter,
    /// Takes over and writes the rest.
    Base,
}

impl Tier {
    /// `drafter` or `base`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Drafter => "drafter",
            Self::Base => "base",
        }
    }
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a base does of an answer.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum BaseRole {
    /// All of it.
    #[default]
    Unified,
    /// Reads prompts and drafts; another base writes on.
    Score,
    /// Writes on what another base has read.
    Decode,
}

impl BaseRole {
    /// `unified`, `score` or `decode`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unified => "unified",
            Self::Score => "score",
            Self::Decode => "decode",
        }
    }
}

impl std::fmt::Display for BaseRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for BaseRole {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Unified, Self::Score, Self::Decode]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| format!("{text:?} is none of unified, score, decode"))
    }
}

/// One node, as the others see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// The node; it keeps its id when it restarts.
    pub node_id: NodeId,
    /// Drafter or base.
    pub tier: Tier,
    /// Where its gRPC services listen, `host:port`, as others reach it.
    pub address: String,
    /// The name clients use for its model.
    pub model: String,
    /// Hex SHA-256 of the canonical tokenizer.
    pub tokenizer_fingerprint: String,
    /// Hex SHA-256 of the text bundle (tokenizer, template, stop tokens).
    pub text_fingerprint: String,
    /// Tokens a sequence can hold.
    pub context_length: u32,
    /// Requests it runs at once.
    pub slots: u32,
    /// Tokens that its KV cache holds for all requests together; 0: it does not say.
    #[serde(default)]
    pub kv_tokens: u64,
    /// It finishes what it has and takes no new work.
    #[serde(default)]
    pub draining: bool,
    /// Grows with every start of the node, see [`incarnation_now`].
    pub incarnation: u64,
    /// What a base does; `Unified` for a drafter.
    #[serde(default)]
    pub base_role: BaseRole,
    /// Where its KV service listens, `host:port`, as others reach it; empty: it has none.
    #[serde(default)]
    pub kv_address: String,
}

/// The incarnation of a node that starts now: milliseconds since 1970.
pub fn incarnation_now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl NodeRecord {
    /// Checks what serde does not.
    ///
    /// # Errors
    /// [`ClusterError::Invalid`] names the first field that is out of its range.
    pub fn validate(&self) -> Result<(), ClusterError> {
        if !is_host_port(&self.address) {
            return Err(ClusterError::invalid("address", "host:port", &self.address));
        }
        if !self.kv_address.is_empty() && !is_host_port(&self.kv_address) {
            return Err(ClusterError::invalid("kv_address", "host:port", &self.kv_address));
        }
        let texts = [
            ("model", &self.model),
            ("tokenizer_fingerprint", &self.tokenizer_fingerprint),
            ("text_fingerprint", &self.text_fingerprint),
        ];
        for (field, text) in texts {
            if text.is_empty() || text.len() > TEXT_BYTES_MAX || text.contains(char::is_control) {
                return Err(ClusterError::invalid(field, "1 to 512 bytes of plain text", text));
            }
        }
        for (field, number) in [("context_length", self.context_length), ("slots", self.slots)] {
            if number == 0 {
                return Err(ClusterError::invalid(field, "a number from 1", "0"));
            }
        }
        Ok(())
    }

    /// The stored form.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads the stored form.
    ///
    /// # Errors
    /// [`ClusterError::Invalid`] for what is no record.
    pub fn from_json(json: &[u8]) -> Result<Self, ClusterError> {
        if json.len() > RECORD_BYTES_MAX {
            return Err(ClusterError::invalid("record", "at most 16 KiB", &json.len().to_string()));
        }
        let record: Self = serde_json::from_slice(json).map_err(|error| {
            ClusterError::invalid("record", "a node record", &error.to_string())
        })?;
        record.validate()?;
        Ok(record)
    }
}

pub(crate) fn is_host_port(address: &str) -> bool {
    let Some((host, port)) = address.rsplit_once(':') else {
        return false;
    };
    let host_ok = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')),
    };
    host_ok
        && !host.is_empty()
        && host.len() < 256
        && port.parse::<u16>().is_ok_and(|port| port > 0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn record(id: &str) -> NodeRecord {
        NodeRecord {
            node_id: id.parse().unwrap(),
            tier: Tier::Drafter,
            address: "127.0.0.1:7000".into(),
            model: "smollm2".into(),
            tokenizer_fingerprint: "ab".repeat(32),
            text_fingerprint: "cd".repeat(32),
            context_length: 2048,
            slots: 4,
            kv_tokens: 8192,
            draining: false,
            incarnation: 1,
            base_role: BaseRole::Unified,
            kv_address: String::new(),
        }
    }

    #[test]
    fn records_round_trip_and_unknown_fields_are_allowed() {
        let record = record("d-1");
        assert_eq!(NodeRecord::from_json(&record.to_json()).unwrap(), record);
        let text = String::from_utf8(record.to_json()).unwrap();
        let newer = text.replacen('{', "{\"new_field\":[1],", 1);
        assert_eq!(NodeRecord::from_json(newer.as_bytes()).unwrap(), record);
        let older = text.replace("\"kv_tokens\":8192,", "");
        assert_ne!(older, text);
        assert_eq!(NodeRecord::from_json(older.as_bytes()).unwrap().kv_tokens, 0);
        let older = text.replace(",\"base_role\":\"unified\",\"kv_address\":\"\"", "");
        assert_ne!(older, text);
        assert_eq!(NodeRecord::from_json(older.as_bytes()).unwrap(), record);
    }

    #[test]
    fn roles_have_names() {
        for role in [BaseRole::Unified, BaseRole::Score, BaseRole::Decode] {
            assert_eq!(role.to_string().parse(), Ok(role));
            assert_eq!(serde_json::to_value(role).unwrap(), role.as_str());
        }
        assert!("both".parse::<BaseRole>().is_err());
    }

    #[test]
    fn bad_fields_are_named() {
        type Spoil = fn(&mut NodeRecord);
        let cases: [(&str, Spoil); 6] = [
            ("address", |r| r.address = "nowhere".into()),
            ("address", |r| r.address = "host/path:1".into()),
            ("kv_address", |r| r.kv_address = "nowhere".into()),
            ("model", |r| r.model = String::new()),
            ("slots", |r| r.slots = 0),
            ("text_fingerprint", |r| r.text_fingerprint = "x".repeat(600)),
        ];
        for (field, spoil) in cases {
            let mut bad = record("d-1");
            spoil(&mut bad);
            let error = NodeRecord::from_json(&bad.to_json()).unwrap_err();
            assert!(
                matches!(&error, ClusterError::Invalid { field: f, .. } if *f == field),
                "{error}"
            );
        }
    }

    #[test]
    fn addresses() {
        for good in ["127.0.0.1:1", "node-1.ns.svc:50051", "[::1]:80"] {
            assert!(is_host_port(good), "{good}");
        }
        for bad in ["", ":80", "a:0", "a:99999", "a", "http://a:80", "[x]:80", "a b:80"] {
            assert!(!is_host_port(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>) {
            prop_assert!(NodeRecord::from_json(&bytes).is_err());
        }
    }
}
