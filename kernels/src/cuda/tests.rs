//! Parity of every kernel with its plain reference, on random shapes with the odd ones among them.
//!
//! They run on the emulated device (`kernels/cuda/emulated`); with `HEADSTART_CUDA_TESTS=device` in
//! the environment, on the machine's GPU.

mod ask;
mod attention;
mod nccl;
mod pages;
mod ranks;
mod rows;
mod vocab;
mod weights;

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use half::bf16;

use super::{Activations, Batch, Buffer, Device, Precision, Staged, library};
use crate::testing::Rng;

/// The device under test. One for all tests: opening it twice would be opening it once.
pub(super) fn device() -> Device {
    device_at(0).expect("a device")
}

/// Whether the machine's own GPU is tested.
fn on_the_machine() -> bool {
    std::env::var_os("HEADSTART_CUDA_TESTS").is_some_and(|v| v == "device")
}

/// The emulated device is several; a machine may have fewer.
fn device_at(ordinal: usize) -> Option<Device> {
    static DEVICES: [OnceLock<Option<Device>>; 2] = [const { OnceLock::new() }; 2];
    DEVICES[ordinal]
        .get_or_init(|| {
            if !on_the_machine() {
                let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/emulated-cuda");
                let built = Command::new(script).output().expect("the script runs");
                assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
                let folder = String::from_utf8(built.stdout).expect("a path");
                library::open_all_in(Path::new(folder.trim()));
            }
            Device::open(ordinal, None).ok()
        })
        .clone()
}

/// A stream of its own on a device: nobody else's work is recorded on it, or waits behind a sum.
fn own_device(ordinal: usize) -> Option<Device> {
    device_at(ordinal).and_then(|_| Device::open(ordinal, None).ok())
}

fn upload(device: &Device, data: &[f32]) -> Buffer<f32> {
    device.upload(data, "test data").expect("memory")
}

fn read(device: &Device, buffer: &Buffer<f32>) -> Vec<f32> {
    let mut data = vec![0.0; buffer.len()];
    device.read(buffer, 0, &mut data).expect("a copy");
    data
}

/// Values in a precision, as they are after rounding.
fn rounded(precision: Precision, data: &[f32]) -> Vec<f32> {
    match precision {
        Precision::F32 => data.to_vec(),
        Precision::Bf16 => data.iter().map(|v| bf16::from_f32(*v).to_f32()).collect(),
    }
}

fn activations(device: &Device, precision: Precision, data: &[f32]) -> Activations {
    match precision {
        Precision::F32 => Activations::F32(upload(device, data)),
        Precision::Bf16 => {
            let bits: Vec<u16> = data.iter().map(|v| bf16::from_f32(*v).to_bits()).collect();
            Activations::Bf16(device.upload(&bits, "test data").expect("memory"))
        }
    }
}

fn read_activations(device: &Device, x: &Activations) -> Vec<f32> {
    match x {
        Activations::F32(b) => read(device, b),
        Activations::Bf16(b) => {
            let mut bits = vec![0; b.len()];
            device.read(b, 0, &mut bits).expect("a copy");
            bits.into_iter().map(|b| bf16::from_bits(b).to_f32()).collect()
        }
    }
}

fn empty(device: &Device, precision: Precision, len: usize) -> Activations {
    Activations::new(device, precision, len, "test data").expect("memory")
}

/// Fails unless `got` is `expected` within `tolerance`, relative to the larger of the value and 1.
#[track_caller]
fn assert_close(got: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        let near = (g - e).abs() <= tolerance * e.abs().max(1.0);
        assert!(near, "{what}: at {i} {g}, expected {e}");
    }
}

/// How far apart results in a precision may be.
fn tolerance(precision: Precision) -> f32 {
    match precision {
        Precision::F32 => 2e-6,
        Precision::Bf16 => 1.0 / 200.0,
    }
}

/// `rows` rows of one token each, every one in a table of its own with shuffled pages.
fn batch(rng: &mut Rng, positions: &[u32], pages: usize, page_size: usize, stride: usize) -> Batch {
    assert!(pages >= positions.len() * stride);
    let mut tables: Vec<u32> = (0..pages as u32).collect();
    for i in (1..tables.len()).rev() {
        tables.swap(i, rng.below(i + 1));
    }
    tables.truncate(positions.len() * stride);
    assert!(positions.iter().all(|p| (*p as usize) < stride * page_size));
    let rows = 0..positions.len() as u32;
    Batch {
        tokens: vec![0; positions.len()],
        positions: positions.to_vec(),
        row_tables: rows.clone().collect(),
        tables,
        table_stride: stride,
        singles: rows.collect(),
        sequences: Vec::new(),
        probes: Vec::new(),
        targets: Vec::new(),
        pending: Vec::new(),
    }
}

fn staged(device: &Device, batch: &Batch, vocab: usize, pages: usize, page_size: usize) -> Staged {
    let words = Staged::words_for(batch.rows(), batch.table_stride) + batch.tables.len();
    let mut staged = Staged::new(device, words, vocab, pages, page_size).expect("memory");
    let mut host = device.pinned(words, "test data").expect("memory");
    staged.stage(device, batch, &mut host).expect("a copy");
    staged
}

#[test]
fn a_graph_runs_what_was_recorded() {
    let device = own_device(0).expect("a device");
    let mut x = upload(&device, &[1.0, 2.0]);
    let bias = upload(&device, &[10.0, 20.0]);
    let graph = device.capture(|| device.add_bias(&mut x, &bias, 1)).expect("a graph");
    drop(bias);
    assert_eq!(read(&device, &x), [1.0, 2.0], "recording is not running");
    graph.launch().expect("a launch");
    graph.launch().expect("a launch");
    assert_eq!(read(&device, &x), [21.0, 42.0]);
}

#[test]
fn what_a_device_does_not_have_is_an_error() {
    let device = device();
    let (_, total) = device.memory_bytes().expect("figures");
    let error = device.alloc::<u8>(2 * total, "everything").expect_err("too much");
    assert!(error.to_string().contains("for everything"), "{error}");
    let error = Device::open(97, None).expect_err("no such device");
    assert!(error.to_string().starts_with("finding the GPU"), "{error}");
}
