//! Every parser that faces outside, under libFuzzer. `HEADSTART_FUZZ_TARGET` names one of
//! [`headstart_tests::fuzz::targets::ALL`]: one binary, as each would link the whole project anew.
//!
//! A panic, a crash, an overflow (checked in this build) or memory beyond the target's bound stops
//! libFuzzer, which keeps the input.

#![no_main]

use std::alloc::System;
use std::sync::LazyLock;

use cap::Cap;
use headstart_tests::fuzz::Target;
use headstart_tests::fuzz::targets::ALL;
use libfuzzer_sys::fuzz_target;

/// Counts memory, and refuses what exceeds a target's bound.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("HEADSTART_FUZZ_TARGET").unwrap_or_default();
    ALL.iter().find(|target| target.name == name).unwrap_or_else(|| {
        let names: Vec<&str> = ALL.iter().map(|target| target.name).collect();
        eprintln!("HEADSTART_FUZZ_TARGET: expected one of {}, found {name:?}", names.join(", "));
        std::process::exit(2)
    })
});

fuzz_target!(|input: &[u8]| {
    let target = *TARGET;
    let _ = ALLOCATOR.set_limit(ALLOCATOR.allocated() + target.memory_max);
    (target.run)(&input[..input.len().min(target.bytes_max)]);
    let _ = ALLOCATOR.set_limit(usize::MAX);
});
