//! Other programs: run with their words in files, watched, and ended when the user stops.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::failure::Failure;
use crate::models::Cancel;

const POLL: Duration = Duration::from_millis(50);
/// Of a program's words, so many bytes at the end are searched for what went wrong.
const TAIL_BYTES: u64 = 64 << 10;

/// A program to run, and where its words go.
#[derive(Debug)]
pub(super) struct Job<'a> {
    /// What it does, for people: "building llama.cpp".
    pub(super) doing: &'a str,
    /// The program and its arguments.
    pub(super) command: Command,
    /// Gets standard output; emptied first.
    pub(super) out: PathBuf,
    /// Gets standard error; may be the same file.
    pub(super) err: PathBuf,
}

impl Job<'_> {
    /// Runs the program to its end. `watch` gets standard output as it grows, in pieces.
    ///
    /// # Errors
    /// When it cannot be started, fails, or `cancel` is set; then it is killed.
    pub(super) fn run(
        mut self,
        cancel: &Cancel,
        watch: &mut dyn FnMut(&str),
    ) -> Result<(), Failure> {
        let out = create(&self.out)?;
        let err = if self.err == self.out {
            out.try_clone().map_err(|error| self.failed(&error.to_string()))?
        } else {
            create(&self.err)?
        };
        let mut grown = File::open(&self.out).map_err(|error| self.failed(&error.to_string()))?;
        self.command.stdin(Stdio::null()).stdout(out).stderr(err);
        let program = self.command.get_program().to_string_lossy().into_owned();
        let child = self
            .command
            .spawn()
            .map_err(|error| self.failed(&format!("cannot run `{program}`: {error}")))?;
        let mut running = Running(child);
        loop {
            let ended = running.0.try_wait().map_err(|error| self.failed(&error.to_string()))?;
            let mut piece = Vec::new();
            if grown.read_to_end(&mut piece).is_ok_and(|bytes| bytes > 0) {
                watch(&String::from_utf8_lossy(&piece));
            }
            match ended {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    let said = last_words(&tail(&self.err)).unwrap_or_else(|| status.to_string());
                    return Err(self.failed(&said));
                }
                None if cancel.is_cancelled() => {
                    return Err(Failure::Interrupted(format!("{} was interrupted", self.doing)));
                }
                None => std::thread::sleep(POLL),
            }
        }
    }

    fn failed(&self, reason: &str) -> Failure {
        let log = if self.err.exists() {
            format!(" (all it said: {})", self.err.display())
        } else {
            String::new()
        };
        Failure::Failed(format!("{} failed: {reason}{log}", self.doing))
    }
}

/// A child process that does not outlive its owner.
#[derive(Debug)]
pub(super) struct Running(Child);

impl Running {
    /// Owns `child`.
    pub(super) fn new(child: Child) -> Self {
        Self(child)
    }

    /// Whether the process is over.
    pub(super) fn has_ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn create(path: &Path) -> Result<File, Failure> {
    // Appending, so that two handles of one file do not write over each other.
    let emptied = fs::write(path, "").and_then(|()| File::options().append(true).open(path));
    emptied.map_err(|error| Failure::Failed(format!("cannot write {}: {error}", path.display())))
}

fn tail(path: &Path) -> String {
    let read = || {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_default()
}

/// The line that says what went wrong: the last one that speaks of an error, or else the last.
/// A bare `CMake Error at …:` is told together with the line that follows it.
fn last_words(said: &str) -> Option<String> {
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let speaks = |line: &&str| line.to_lowercase().contains("error");
    let at = lines.iter().rposition(speaks).unwrap_or(lines.len().checked_sub(1)?);
    let line = lines[at].trim_start_matches("ERROR: ");
    Some(match lines.get(at + 1) {
        Some(next) if line.ends_with(':') || line.ends_with("(message)") => {
            format!("{line} {next}")
        }
        _ => line.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job<'a>(folder: &Path, script: &str) -> Job<'a> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let (out, err) = (folder.join("out"), folder.join("err"));
        Job { doing: "counting", command, out, err }
    }

    #[test]
    fn what_a_program_says_is_seen_as_it_comes() {
        let folder = tempfile::tempdir().unwrap();
        let mut seen = String::new();
        let script = "echo one; echo aside >&2; echo two";
        let watch = &mut |piece: &str| seen.push_str(piece);
        job(folder.path(), script).run(&Cancel::default(), watch).unwrap();
        assert_eq!(seen, "one\ntwo\n");
    }

    #[test]
    fn a_failure_is_told_in_the_programs_own_words() {
        let folder = tempfile::tempdir().unwrap();
        let script = "echo 'fatal error: no such header' >&2; echo 'build stopped' >&2; exit 3";
        let error = job(folder.path(), script).run(&Cancel::default(), &mut |_| ()).unwrap_err();
        let message = error.message();
        assert!(message.starts_with("counting failed: fatal error: no such header"), "{message}");
        let silent = job(folder.path(), "exit 3").run(&Cancel::default(), &mut |_| ());
        assert!(silent.unwrap_err().message().contains("exit status: 3"));
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut missing = job(folder.path(), "");
        missing.command = Command::new("headstart-no-such-program");
        let error = missing.run(&Cancel::default(), &mut |_| ()).unwrap_err();
        let message = error.message();
        assert!(message.contains("cannot run `headstart-no-such-program`"), "{message}");
    }

    #[test]
    fn an_interrupt_ends_the_program() {
        let folder = tempfile::tempdir().unwrap();
        let cancel = Cancel::default();
        cancel.cancel();
        let ended = job(folder.path(), "sleep 600").run(&cancel, &mut |_| ());
        assert!(matches!(ended, Err(Failure::Interrupted(_))), "{ended:?}");
    }

    #[test]
    fn the_line_about_the_error_is_found() {
        let cmake = "CMake Error at CMakeLists.txt:2 (project):\n  No CMAKE_CXX_COMPILER could be \
            found.\n\n\n-- Configuring incomplete!\n";
        let expected =
            "CMake Error at CMakeLists.txt:2 (project): No CMAKE_CXX_COMPILER could be found.";
        // The last line that speaks of an error wins; this one is bare.
        assert_eq!(last_words(cmake).unwrap(), expected);
        assert_eq!(
            last_words("ERROR: No matching distribution\n\n").unwrap(),
            "No matching distribution"
        );
        assert_eq!(last_words("one\ntwo\n").unwrap(), "two");
        assert_eq!(last_words(" \n"), None);
    }
}
