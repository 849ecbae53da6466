//! Every kernel becomes machine code for every architecture, without a GPU. Prints registers and
//! spills.

use std::path::Path;
use std::process::Command;

use headstart_kernels::cuda::compile::{ARCHITECTURES, compile};
use headstart_kernels::cuda::library;

/// What the assembler says of one kernel.
#[derive(Debug, Default)]
struct Kernel {
    name: String,
    registers: u32,
    spilled_bytes: u32,
}

/// Reads `ptxas -v`: a kernel's name, then its spills, then its registers.
fn kernels(log: &str) -> Vec<Kernel> {
    let number_before = |line: &str, what: &str| -> Option<u32> {
        line[..line.find(what)?].split_whitespace().last()?.parse().ok()
    };
    let mut kernels: Vec<Kernel> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default().to_owned();
            kernels.push(Kernel { name, ..Kernel::default() });
        }
        let Some(kernel) = kernels.last_mut() else { continue };
        if let Some(bytes) = number_before(line, " bytes spill stores") {
            kernel.spilled_bytes = bytes;
        }
        if let Some(registers) = number_before(line, " registers") {
            kernel.registers = registers;
        }
    }
    kernels
}

#[test]
fn every_kernel_compiles_for_every_architecture() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/nvrtc");
    let fetched = Command::new(script).output().expect("the script runs");
    if fetched.status.code() == Some(3) {
        let why = String::from_utf8_lossy(&fetched.stderr);
        eprintln!("SKIPPED every_kernel_compiles_for_every_architecture: {why}");
        return;
    }
    assert!(fetched.status.success(), "{}", String::from_utf8_lossy(&fetched.stderr));
    let folder = String::from_utf8(fetched.stdout).expect("a path");
    library::open_all_in(Path::new(folder.trim()));
    let mut names: Option<Vec<String>> = None;
    for architecture in ARCHITECTURES {
        let compiled = compile(architecture).unwrap_or_else(|e| panic!("{architecture}: {e}"));
        assert!(compiled.image.starts_with(b"\x7fELF"), "{architecture}: no machine code");
        let mut kernels = kernels(&compiled.log);
        kernels.sort_by(|a, b| a.name.cmp(&b.name));
        let most = kernels.iter().max_by_key(|k| k.registers).expect("there are kernels");
        println!(
            "{architecture}: {} kernels, {} bytes, most registers {} ({})",
            kernels.len(),
            compiled.image.len(),
            most.registers,
            most.name
        );
        for kernel in &kernels {
            let Kernel { name, registers, spilled_bytes } = kernel;
            println!("  {name:24} {registers:4} registers, {spilled_bytes} bytes spilled");
            // A few registers may be spilled outside loops; more would be slow.
            assert!(kernel.spilled_bytes <= 32, "{architecture}: {kernel:?}");
            assert!(kernel.registers > 0, "{architecture}: {kernel:?}");
        }
        let found: Vec<String> = kernels.into_iter().map(|k| k.name).collect();
        assert_eq!(names.get_or_insert_with(|| found.clone()), &found, "{architecture}");
    }
    assert_eq!(names.map_or(0, |n| n.len()), 69);
}
