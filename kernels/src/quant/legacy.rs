//! Blocks of 32: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

use super::f16_at;
use crate::{DType, KernelError};
use half::{bf16, f16};

pub(super) fn q8_0(b: &[u8], out: &mut [f32]) {
    let d = f16_at(b, 0);
    for (o, &q) in out.iter_mut().zip(&b[2..34]) {
        *o = f32::from(q as i8) * d;
    }
}

pub(super) fn q4_0(b: &[u8], out: &mut [f32]) {
    let d = f16_at(b, 0);
    for (j, &q) in b[2..18].iter().enumerate() {
        out[j] = f32::from((q & 15) as i8 - 8) * d;
        out[j + 16] = f32::from((q >> 4) as i8 - 8) * d;
    }
}

pub(super) fn q4_1(b: &[u8], out: &mut [f32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    for (j, &q) in b[4..20].iter().enumerate() {
        out[j] = f32::from(q & 15) * d + m;
        out[j + 16] = f32::from(q >> 4) * d + m;
    }
}

fn fifth_bits(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

pub(super) fn q5_0(b: &[u8], out: &mut [f32]) {
    let (d, high) = (f16_at(b, 0), fifth_bits(b, 2));
    for (j, &q) in b[6..22].iter().enumerate() {
        let (h0, h1) = (((high >> j) & 1) as u8, ((high >> (j + 16)) & 1) as u8);
        out[j] = f32::from(((q & 15) | (h0 << 4)) as i8 - 16) * d;
        out[j + 16] = f32::from(((q >> 4) | (h1 << 4)) as i8 - 16) * d;
    }
}

pub(super) fn q5_1(b: &[u8], out: &mut [f32]) {
    let (d, m, high) = (f16_at(b, 0), f16_at(b, 2), fifth_bits(b, 4));
    for (j, &q) in b[8..24].iter().enumerate() {
        let (h0, h1) = (((high >> j) & 1) as u8, ((high >> (j + 16)) & 1) as u8);
        out[j] = f32::from((q & 15) | (h0 << 4)) * d + m;
        out[j + 16] = f32::from((q >> 4) | (h1 << 4)) * d + m;
    }
}

/// Compresses `x` as ggml's reference quantisers do, for the types that need no search: F32, F16,
/// BF16, Q8_0, Q4_0, Q4_1. It lets tools and tests make models of these types from wider ones.
///
/// # Errors
/// [`KernelError`] for a partial block, or a type without a plain quantiser.
pub fn quantise(dtype: DType, x: &[f32]) -> Result<Vec<u8>, KernelError> {
    let mut out = Vec::with_capacity(dtype.bytes_for(x.len())?);
    match dtype {
        DType::F32 => x.iter().for_each(|v| out.extend(v.to_le_bytes())),
        DType::F16 => x.iter().for_each(|v| out.extend(f16::from_f32(*v).to_le_bytes())),
        DType::BF16 => x.iter().for_each(|v| out.extend(bf16::from_f32(*v).to_le_bytes())),
        DType::Q8_0 => x.chunks_exact(32).for_each(|b| to_q8_0(b, &mut out)),
        DType::Q4_0 => x.chunks_exact(32).for_each(|b| to_q4_0(b, &mut out)),
        DType::Q4_1 => x.chunks_exact(32).for_each(|b| to_q4_1(b, &mut out)),
        _ => {
            return Err(KernelError::Shape {
                what: "a type without a plain quantiser, bytes a block",
                found: dtype.block_bytes(),
            });
        }
    }
    Ok(out)
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn to_q8_0(x: &[f32], out: &mut Vec<u8>) {
    let max = x.iter().fold(0f32, |a, v| a.max(v.abs()));
    let d = max / 127.0;
    out.extend(f16::from_f32(d).to_le_bytes());
    out.extend(x.iter().map(|v| (v * inverse(d)).round() as i8 as u8));
}

fn to_q4_0(x: &[f32], out: &mut Vec<u8>) {
    let max = x.iter().fold(0f32, |a, &v| if v.abs() > a.abs() { v } else { a });
    let d = max / -8.0;
    out.extend(f16::from_f32(d).to_le_bytes());
    let q = |v: f32| ((v * inverse(d) + 8.5) as i8).clamp(0, 15) as u8;
    out.extend((0..16).map(|j| q(x[j]) | (q(x[j + 16]) << 4)));
}

fn to_q4_1(x: &[f32], out: &mut Vec<u8>) {
    let min = x.iter().fold(f32::MAX, |a, &v| a.min(v));
    let max = x.iter().fold(f32::MIN, |a, &v| a.max(v));
    let d = (max - min) / 15.0;
    out.extend(f16::from_f32(d).to_le_bytes());
    out.extend(f16::from_f32(min).to_le_bytes());
    let q = |v: f32| (((v - min) * inverse(d) + 0.5) as i8).clamp(0, 15) as u8;
    out.extend((0..16).map(|j| q(x[j]) | (q(x[j + 16]) << 4)));
}
