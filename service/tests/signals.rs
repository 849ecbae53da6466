//! Signals, in a process of their own: the test runs itself again.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use headstart_service::shutdown::on_signals;

/// Set in the process that gets the signals.
const CHILD: &str = "SIGNALS_TEST_CHILD";

fn send(child: &Child, signal: &str) {
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-s", signal, &id]).status().unwrap().success());
}

#[test]
fn the_first_signal_cancels_and_the_second_ends_at_once() {
    if std::env::var_os(CHILD).is_some() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let token = on_signals().unwrap();
            println!("\nlistening");
            token.cancelled().await;
            println!("\ncancelled");
            std::future::pending::<()>().await;
        });
    }
    for (first, second, code) in [("TERM", "TERM", 143), ("INT", "TERM", 143), ("TERM", "INT", 130)]
    {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["the_first_signal", "--nocapture"])
            .env(CHILD, "1")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        assert!(lines.any(|line| line == "listening"));
        send(&child, first);
        assert!(lines.any(|line| line == "cancelled"));
        send(&child, second);
        assert_eq!(child.wait().unwrap().code(), Some(code));
    }
}
