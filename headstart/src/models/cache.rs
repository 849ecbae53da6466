//! The user's cache folder: where models lie, one pull of each at a time, and how a file is
//! known to be sound.

use std::fs::{self, File, TryLockError};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::models::progress::Progress;
use crate::models::{Cancel, ModelError};

/// How closely a cached file is looked at before it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Its size. A file gets its final name only after its checksum was right.
    Size,
    /// Its size and its SHA-256.
    Sha256,
}

/// `$XDG_CACHE_HOME/headstart/models`, or `~/.cache/headstart/models`.
///
/// # Errors
/// When neither `XDG_CACHE_HOME` nor `HOME` is an absolute path.
pub fn folder() -> Result<PathBuf, ModelError> {
    let absolute =
        |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .map(|cache| cache.join("headstart").join("models"))
        .ok_or(ModelError::NoCacheFolder)
}

/// The right to fetch one model; other processes wait for it.
#[derive(Debug)]
pub struct PullLock {
    _file: File,
}

impl PullLock {
    /// Waits until no other process fetches `name` into `folder`.
    ///
    /// # Errors
    /// When the lock file cannot be made, or `cancel` is set while waiting.
    pub fn acquire(folder: &Path, name: &str, cancel: &Cancel) -> Result<Self, ModelError> {
        fs::create_dir_all(folder).map_err(ModelError::io("create", folder))?;
        let path = folder.join(format!(".{}.lock", name.replace('/', "--")));
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(ModelError::io("create", &path))?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self { _file: file }),
                Err(TryLockError::Error(source)) => {
                    return Err(ModelError::io("lock", &path)(source));
                }
                Err(TryLockError::WouldBlock) if cancel.is_cancelled() => {
                    return Err(ModelError::Interrupted { model: name.to_owned() });
                }
                Err(TryLockError::WouldBlock) => {
                    if !told {
                        eprintln!("waiting for another process that is fetching {name} …");
                        told = true;
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }
}

/// The SHA-256 of a file, in hex.
///
/// # Errors
/// When the file cannot be read.
pub fn sha256_of(path: &Path, progress: &Progress) -> Result<String, ModelError> {
    let mut file = File::open(path).map_err(ModelError::io("open", path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let count = file.read(&mut buffer).map_err(ModelError::io("read", path))?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
        bytes += count as u64;
        progress.set(bytes);
    }
}

/// Lower-case hex.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
