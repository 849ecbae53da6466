//! Generates the `headstart.v1` types, clients and servers from the `.proto` files.

use std::path::PathBuf;

include!("protoc.rs");

const PROTOS: [&str; 5] = [
    "headstart/v1/common.proto",
    "headstart/v1/node.proto",
    "headstart/v1/drafter.proto",
    "headstart/v1/base.proto",
    "headstart/v1/router.proto",
];

fn main() -> std::io::Result<()> {
    require_protoc();
    println!("cargo::rerun-if-changed=headstart");
    println!("cargo::rerun-if-changed=protoc.rs");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    tonic_prost_build::configure()
        .file_descriptor_set_path(out.join("headstart.bin"))
        .emit_rerun_if_changed(false)
        .compile_protos(&PROTOS, &["."])
}
