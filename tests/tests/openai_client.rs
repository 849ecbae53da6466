//! The `openai` Python package against `headstart up`, from `tests/openai`.

use std::path::{Path, PathBuf};
use std::process::Command;

use headstart_tests::http::Client;
use headstart_tests::process::{Process, free_address, wait_ready};

/// A virtual environment with the packages of `requirements.txt`, made once under `target`.
fn python() -> PathBuf {
    let requirements = here().join("requirements.txt");
    let wanted = std::fs::read_to_string(&requirements).unwrap();
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("openai-venv");
    let python = folder.join("bin/python");
    let mark = folder.join("installed.txt");
    if std::fs::read_to_string(&mark).is_ok_and(|installed| installed == wanted) {
        return python;
    }
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder));
    run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "-r"]).arg(&requirements));
    std::fs::write(mark, wanted).unwrap();
    python
}

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("openai")
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}; `make setup-test` installs what is missing");
}

#[test]
fn the_openai_package_works() {
    let python = python();
    let (http, grpc) = (free_address(), free_address());
    let arguments =
        ["up", "--drafter", "smollm2", "--base", "smollm2", "--http", &http, "--grpc", &grpc];
    let mut process = Process::start("headstart", &arguments);
    wait_ready(&Client::new(&http), &mut [&mut process]);
    run(Command::new(python)
        .arg(here().join("test_openai_client.py"))
        .env("HEADSTART_URL", format!("http://{http}")));
    assert_eq!(process.terminate(), Some(0));
}
