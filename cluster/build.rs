//! `etcd-client` runs `protoc` when it builds; this says so in one line before it does.

include!("../proto/protoc.rs");

fn main() {
    require_protoc();
    println!("cargo::rerun-if-changed=../proto/protoc.rs");
}
