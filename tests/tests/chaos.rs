//! Short versions of the long proofs: chaos and soak on a small fleet of real processes, and a few
//! thousand inputs for each parser. `make chaos`, `make soak` and `make fuzz` are the long ones.

use std::process::Command;

use headstart_tests::process::run;

/// Runs one of this crate's programs and shows what it says.
fn passes(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect("it was built");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    println!("{}{}", text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{}", output.status);
}

fn model() -> String {
    let (code, model, errors) = run("headstart", &["models", "pull", "smollm2"]);
    assert_eq!(code, Some(0), "{errors}");
    model.trim().to_owned()
}

#[test]
fn answers_survive_a_little_chaos() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().to_string_lossy();
    let model = model();
    let arguments =
        "--minutes 0.4 --every 3 --asks 9 --clients 3 --routers 2 --drafters 2 --bases 2";
    let mut arguments: Vec<&str> = arguments.split(' ').collect();
    arguments.extend(["--model", &model, "--folder", &folder]);
    passes(env!("CARGO_BIN_EXE_chaos"), &arguments);
}

#[test]
fn nothing_is_held_after_a_little_load() {
    let folder = tempfile::tempdir().expect("a folder");
    let arguments =
        ["--folder", &folder.path().to_string_lossy(), "--minutes", "0.1", "--asks", "9"];
    let model = model();
    passes(env!("CARGO_BIN_EXE_soak"), &[&["--model", &model], &arguments[..]].concat());
    let plot = std::fs::read_to_string(folder.path().join("soak.html")).expect("a plot");
    assert!(plot.contains("b1 resident") && plot.contains("<polyline"), "{plot}");
}

#[test]
fn parsers_survive_a_few_inputs() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().to_string_lossy();
    passes(env!("CARGO_BIN_EXE_fuzz"), &["--runs", "3000", "--folder", &folder]);
}
