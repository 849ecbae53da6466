//! Whose request it is: by the API keys the operator gave out, or else by whatever bearer token
//! comes.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::Arc;

use headstart_proto::{Error, ErrorCode};
use sha2::{Digest, Sha256};

/// Longest name of a key, in bytes.
const NAME_BYTES_MAX: usize = 64;
/// Longest key, in bytes.
const KEY_BYTES_MAX: usize = 512;

/// Whose share a request uses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Tenant {
    /// Everybody who sends no token.
    Anonymous,
    /// The holder of a token that nobody checks, by its hash.
    Bearer(u64),
    /// The name of a known key.
    Named(Arc<str>),
}

/// The keys that an operator gave out. Only their hashes are kept.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKeys {
    names: HashMap<[u8; 32], Arc<str>>,
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKeys").field("keys", &self.names.len()).finish()
    }
}

impl ApiKeys {
    /// Reads a file that [`Self::parse`] understands.
    ///
    /// # Errors
    /// The file's name and what is wrong with it; never a key.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string());
        let keys = text.and_then(|text| Self::parse(&text));
        keys.map_err(|message| format!("{}: {message}", path.display()))
    }

    /// Reads lines of `name=key`. Empty lines and those that start with `#` say nothing; a name may
    /// have several keys.
    ///
    /// # Errors
    /// The line's number and what is wrong with it; never a key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut names = HashMap::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = |what: &str| format!("line {}: {what}", index + 1);
            let (name, key) = line.split_once('=').ok_or_else(|| wrong("expected name=key"))?;
            let (name, key) = (name.trim(), key.trim());
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
            if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(plain) {
                return Err(wrong("a name is 1 to 64 letters, digits, '-', '_' or '.'"));
            }
            if key.is_empty()
                || key.len() > KEY_BYTES_MAX
                || !key.bytes().all(|b| b.is_ascii_graphic())
            {
                return Err(wrong("a key is 1 to 512 visible ASCII characters"));
            }
            if names.insert(hash(key), name.into()).is_some() {
                return Err(wrong("this key stands here twice"));
            }
        }
        if names.is_empty() {
            return Err("expected at least one line of name=key".into());
        }
        Ok(Self { names })
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// Tells callers apart.
#[derive(Debug)]
pub(crate) struct Callers {
    keys: Option<Arc<ApiKeys>>,
    hasher: RandomState,
}

impl Callers {
    /// With `keys`, whoever has none of them is turned away.
    pub(crate) fn new(keys: Option<Arc<ApiKeys>>) -> Self {
        Self { keys, hasher: RandomState::new() }
    }

    /// Whose request it is, by the value of its `Authorization` header.
    ///
    /// # Errors
    /// [`ErrorCode::Unauthenticated`] where keys are in force and this is none.
    pub(crate) fn tenant(&self, authorization: Option<&str>) -> Result<Tenant, Error> {
        let token = authorization.and_then(bearer);
        let Some(keys) = &self.keys else {
            let hashed = token.map(|token| Tenant::Bearer(self.hasher.hash_one(token)));
            return Ok(hashed.unwrap_or(Tenant::Anonymous));
        };
        let refused = |message: &str| Err(Error::new(ErrorCode::Unauthenticated, message));
        match token {
            None => refused("an API key is needed: Authorization: Bearer KEY"),
            Some(token) => match keys.names.get(&hash(token)) {
                Some(name) => Ok(Tenant::Named(Arc::clone(name))),
                None => refused("the API key is not known here"),
            },
        }
    }
}

fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.trim().split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_files_are_read_and_what_is_wrong_is_named_without_the_key() {
        let keys = ApiKeys::parse("# ours\n\nweb = sk-1\nweb=sk-2\r\nnightly=s=k\n").unwrap();
        assert_eq!(format!("{keys:?}"), "ApiKeys { keys: 3 }");
        let callers = Callers::new(Some(Arc::new(keys)));
        let named = |name: &str| Ok(Tenant::Named(name.into()));
        assert_eq!(callers.tenant(Some("Bearer sk-1")), named("web"));
        assert_eq!(callers.tenant(Some("bearer  sk-2 ")), named("web"));
        assert_eq!(callers.tenant(Some("Bearer s=k")), named("nightly"));
        for unknown in
            [None, Some("Bearer sk-3"), Some("Bearer "), Some("sk-1"), Some("Basic sk-1")]
        {
            let error = callers.tenant(unknown).unwrap_err();
            assert_eq!(error.code, ErrorCode::Unauthenticated, "{unknown:?}");
            assert!(!error.message.contains("sk-"), "{}", error.message);
        }
        let cases = [
            ("", "at least one"),
            ("# a=b", "at least one"),
            ("a=b\nsecret", "line 2: expected name=key"),
            ("=secret", "line 1: a name"),
            ("a b=secret", "line 1: a name"),
            ("a=", "line 1: a key"),
            ("a=se cret", "line 1: a key"),
            ("a=secret\nb=secret", "line 2: this key stands here twice"),
        ];
        for (text, expected) in cases {
            let message = ApiKeys::parse(text).unwrap_err();
            assert!(message.contains(expected) && !message.contains("cret"), "{text}: {message}");
        }
    }

    #[test]
    fn without_keys_every_token_is_its_own_tenant() {
        let callers = Callers::new(None);
        let tenant = |value| callers.tenant(value).unwrap();
        assert_eq!(tenant(None), Tenant::Anonymous);
        assert_eq!(tenant(Some("Basic x")), Tenant::Anonymous);
        assert_eq!(tenant(Some("Bearer x")), tenant(Some("bearer x")));
        assert_ne!(tenant(Some("Bearer x")), tenant(Some("Bearer y")));
    }
}
