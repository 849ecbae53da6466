//! What the device can do at most, measured on the spot: the marks that figures are compared with.

use headstart_kernels::cuda::{Activations, CudaError, Device, Precision, Tile, Weights};

use super::CudaModel;

/// Runs of each measurement; the best counts, for the mark is a limit.
const RUNS: usize = 5;

/// Bytes a second of reading `bytes` of memory once, nothing else.
///
/// # Errors
/// [`CudaError`]
pub fn bytes_per_second(model: &CudaModel, bytes: usize) -> Result<f64, CudaError> {
    let device = model.device();
    let mut buffer = device.alloc::<u8>(bytes, "measuring the memory")?;
    device.zero(&mut buffer, bytes)?;
    let mut sink = device.alloc::<u32>(1, "measuring the memory")?;
    let seconds = best(device, || device.read_memory(&buffer, bytes, &mut sink))?;
    Ok(bytes as f64 / seconds)
}

/// Floating-point operations a second of a product of bf16 matrices of `size` by `size`.
///
/// # Errors
/// [`CudaError`]
pub fn operations_per_second(model: &CudaModel, size: usize) -> Result<f64, CudaError> {
    let device = model.device();
    let weights = Weights::random_bf16(device, size, size, 1, 1.0)?;
    let bits = vec![0x3f80u16; size * size];
    let x = Activations::Bf16(device.upload(&bits, "measuring products")?);
    let mut y = device.alloc(size * size, "measuring products")?;
    let mut tile = Tile::new(device, size, false)?;
    debug_assert_eq!(x.precision(), Precision::Bf16);
    let product = || device.matmul(&weights, &x, size, &mut y, size, 0, &mut tile);
    let seconds = best(device, product)?;
    Ok(2.0 * (size as f64).powi(3) / seconds)
}

/// Seconds of the fastest of some runs, after one that does not count.
fn best(
    device: &Device,
    mut work: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    work()?;
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        let begun = device.timer()?;
        work()?;
        best = best.min(begun.seconds_until(&device.timer()?)?);
    }
    Ok(best)
}
