//! Headstart's own binaries as processes on loopback, ended by their id when they are dropped.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::http::Client;

/// The time a process may take to load its model and become ready.
const READY_WITHIN: Duration = Duration::from_secs(300);

/// A process, killed when it is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
}

impl Process {
    /// Starts one of the workspace's binaries. What it prints goes to the test's own output.
    ///
    /// # Panics
    /// If the binary was not built.
    #[must_use]
    pub fn start(name: &str, arguments: &[&str]) -> Self {
        Self::start_with(name, arguments, Stdio::inherit(), &[])
    }

    /// As [`Self::start`], with these variables in its environment.
    ///
    /// # Panics
    /// If the binary was not built.
    #[must_use]
    pub fn start_env(name: &str, arguments: &[&str], env: &[(&str, &str)]) -> Self {
        Self::start_with(name, arguments, Stdio::inherit(), env)
    }

    /// As [`Self::start`]; what it prints goes to the file `log`.
    ///
    /// # Panics
    /// If the binary was not built, or the file cannot be made.
    #[must_use]
    pub fn start_logged(name: &str, arguments: &[&str], log: &Path) -> Self {
        Self::start_logged_env(name, arguments, log, &[])
    }

    /// As [`Self::start_logged`], with these variables in its environment.
    ///
    /// # Panics
    /// If the binary was not built, or the file cannot be made.
    #[must_use]
    pub fn start_logged_env(
        name: &str,
        arguments: &[&str],
        log: &Path,
        env: &[(&str, &str)],
    ) -> Self {
        let file = std::fs::File::create(log).expect("a log can be made");
        Self::start_with(name, arguments, file.into(), env)
    }

    fn start_with(name: &str, arguments: &[&str], stderr: Stdio, env: &[(&str, &str)]) -> Self {
        let path = binary(name);
        let mut command = Command::new(&path);
        command.args(arguments).env_remove("RUST_LOG").stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(stderr).envs(env.iter().copied());
        let child = command.spawn().unwrap_or_else(|error| {
            panic!("{}: {error}; run `cargo build --release --workspace --bins`", path.display())
        });
        Self { name: name.to_owned(), child }
    }

    /// Asks the process to stop (SIGTERM) and waits for its exit code.
    ///
    /// # Panics
    /// If it does not stop within a minute.
    #[must_use]
    pub fn terminate(self) -> Option<i32> {
        self.signal("TERM");
        self.ended()
    }

    /// Waits for the process to end by itself.
    ///
    /// # Panics
    /// If it does not within a minute.
    #[must_use]
    pub fn ended(mut self) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "{} did not stop", self.name);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends the process a signal, by its name without `SIG`.
    ///
    /// # Panics
    /// If there is no `kill` program.
    pub fn signal(&self, name: &str) {
        let (signal, id) = (format!("-{name}"), self.child.id().to_string());
        let sent = Command::new("kill").args([signal, id]).status();
        assert!(sent.is_ok_and(|status| status.success()), "SIG{name} to {}", self.name);
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a binary to its end and gives its exit code, standard output and standard error.
///
/// # Panics
/// If the binary was not built.
#[must_use]
pub fn run(name: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    run_env(name, arguments, &[])
}

/// As [`run`], with these variables in its environment.
///
/// # Panics
/// If the binary was not built.
#[must_use]
pub fn run_env(
    name: &str,
    arguments: &[&str],
    env: &[(&str, &str)],
) -> (Option<i32>, String, String) {
    let mut command = Command::new(binary(name));
    let output = command.args(arguments).envs(env.iter().copied()).output();
    let output = output.expect("the binary was built");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Ports that Linux gives nobody who does not name them: below those of outgoing connections.
const PORTS: std::ops::Range<u32> = 10_000..32_000;

/// A loopback address that nobody listens on, and that this process gives out once.
///
/// # Panics
/// If loopback has no free port.
#[must_use]
pub fn free_address() -> String {
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(101);
    let mut tries = PORTS.map(|_| {
        let port = first.wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed)) % PORTS.len() as u32;
        format!("127.0.0.1:{}", PORTS.start + port)
    });
    let free = tries.find(|address| TcpListener::bind(address).is_ok());
    free.expect("loopback has a free port")
}

/// Waits until `condition` holds.
///
/// # Panics
/// If it does not within two minutes.
pub fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until a router says that it is ready.
///
/// # Panics
/// If one of `processes` ends, or five minutes pass.
pub fn wait_ready(client: &Client, processes: &mut [&mut Process]) {
    let deadline = Instant::now() + READY_WITHIN;
    while client.get("/ready").is_none_or(|response| response.status != 200) {
        for process in processes.iter_mut() {
            assert!(process.is_running(), "{} ended before it was ready", process.name);
        }
        assert!(Instant::now() < deadline, "not ready within {READY_WITHIN:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The path of a file in `tests/fixtures`.
#[must_use]
pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

fn binary(name: &str) -> PathBuf {
    // A test's own binary lies in `target/<profile>/deps`.
    let test = std::env::current_exe().expect("a test has a path");
    let profile = test.parent().and_then(Path::parent).expect("target/<profile>/deps");
    profile.join(name)
}
