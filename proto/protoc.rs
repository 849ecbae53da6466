// Shared by the build scripts of every crate whose build runs `protoc`.

/// Ends the build with one clear line unless `protoc` can be run.
fn require_protoc() {
    println!("cargo::rerun-if-env-changed=PROTOC");
    let protoc = std::env::var_os("PROTOC").unwrap_or_else(|| "protoc".into());
    let found = std::process::Command::new(protoc)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    if !found {
        println!(
            "cargo::error=protoc not found: install protobuf-compiler (apt-get install \
             protobuf-compiler) or run make setup"
        );
        std::process::exit(1);
    }
}
