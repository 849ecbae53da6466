//! What becomes of the tile unit's integer sums: they are scaled and added up, in the order of
//! [`super::int`].
//!
//! For a whole tile of rows in registers: sixteen sums, and four more on the way, which compilers do not
//! manage without spilling.

use super::activations::{HIGH_SHIFT, TILE};
use super::formats::Format;
use std::arch::asm;
use std::arch::x86_64::*;

/// Adds a group to the sums `a` of a tile of rows: `scale · Σ q·x + min · Σ x`.
///
/// # Safety
/// AVX-512; `R` rows of sums at `high` and, if there are two products a group, at `low`; the sums of
/// `R` rows of inputs at `x`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn add<F: Format, const R: usize>(
    a: &mut [__m512; R],
    scale: __m512,
    high: *const u8,
    low: *const u8,
    min: __m512,
    x: *const f32,
) {
    if R == TILE {
        let a: &mut [__m512; TILE] = a.as_mut_slice().try_into().expect("a whole tile");
        // SAFETY: the caller's promises.
        return unsafe {
            match (F::NIBBLES, F::MINS) {
                (true, true) => nibbles_mins(a, scale, high, min, x),
                (true, false) => nibbles(a, scale, high),
                _ => levels(a, scale, high, low),
            }
        };
    }
    for (r, a) in a.iter_mut().enumerate() {
        // SAFETY: the caller's promises.
        unsafe {
            let mut isum = _mm512_load_si512(high.add(r * 64).cast());
            if !F::NIBBLES {
                let low = _mm512_load_si512(low.add(r * 64).cast());
                isum = _mm512_add_epi32(_mm512_slli_epi32::<HIGH_SHIFT>(isum), low);
            }
            *a = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(isum), *a);
            if F::MINS {
                *a = _mm512_fmadd_ps(min, _mm512_set1_ps(*x.add(r)), *a);
            }
        }
    }
}

/// Adds a tile to `$a`, row by row. `$row!(row, passing register, bytes to the tile's row, bytes to the
/// row's input)` are the instructions for one.
macro_rules! add_rows {
    ($row:ident, $a:ident, $($operands:tt)*) => {{
        // What passes through; assembly must know their type.
        let (t0, t1, t2, t3): (__m512, __m512, __m512, __m512);
        asm!(
            $row!("0", "0", "0", "0"),
            $row!("1", "1", "64", "4"),
            $row!("2", "2", "128", "8"),
            $row!("3", "3", "192", "12"),
            $row!("4", "0", "256", "16"),
            $row!("5", "1", "320", "20"),
            $row!("6", "2", "384", "24"),
            $row!("7", "3", "448", "28"),
            $row!("8", "0", "512", "32"),
            $row!("9", "1", "576", "36"),
            $row!("10", "2", "640", "40"),
            $row!("11", "3", "704", "44"),
            $row!("12", "0", "768", "48"),
            $row!("13", "1", "832", "52"),
            $row!("14", "2", "896", "56"),
            $row!("15", "3", "960", "60"),
            a0 = inout(zmm_reg) $a[0],
            a1 = inout(zmm_reg) $a[1],
            a2 = inout(zmm_reg) $a[2],
            a3 = inout(zmm_reg) $a[3],
            a4 = inout(zmm_reg) $a[4],
            a5 = inout(zmm_reg) $a[5],
            a6 = inout(zmm_reg) $a[6],
            a7 = inout(zmm_reg) $a[7],
            a8 = inout(zmm_reg) $a[8],
            a9 = inout(zmm_reg) $a[9],
            a10 = inout(zmm_reg) $a[10],
            a11 = inout(zmm_reg) $a[11],
            a12 = inout(zmm_reg) $a[12],
            a13 = inout(zmm_reg) $a[13],
            a14 = inout(zmm_reg) $a[14],
            a15 = inout(zmm_reg) $a[15],
            t0 = out(zmm_reg) t0,
            t1 = out(zmm_reg) t1,
            t2 = out(zmm_reg) t2,
            t3 = out(zmm_reg) t3,
            $($operands)*
            options(nostack, readonly, preserves_flags),
        );
        let _ = (t0, t1, t2, t3);
    }};
}

#[rustfmt::skip]
macro_rules! nibbles_mins_row {
    ($row:literal, $t:literal, $tile:literal, $x:literal) => {
        concat!(
            nibbles_row!($row, $t, $tile, $x),
            "vfmadd231ps {a", $row, "}, {m}, dword ptr [{x} + ", $x, "]{{1to16}}\n",
        )
    };
}

#[rustfmt::skip]
macro_rules! nibbles_row {
    ($row:literal, $t:literal, $tile:literal, $x:literal) => {
        concat!(
            "vcvtdq2ps {t", $t, "}, zmmword ptr [{high} + ", $tile, "]\n",
            "vfmadd231ps {a", $row, "}, {s}, {t", $t, "}\n",
        )
    };
}

#[rustfmt::skip]
macro_rules! levels_row {
    ($row:literal, $t:literal, $tile:literal, $x:literal) => {
        concat!(
            "vpslld {t", $t, "}, zmmword ptr [{high} + ", $tile, "], 4\n",
            "vpaddd {t", $t, "}, {t", $t, "}, zmmword ptr [{low} + ", $tile, "]\n",
            "vcvtdq2ps {t", $t, "}, {t", $t, "}\n",
            "vfmadd231ps {a", $row, "}, {s}, {t", $t, "}\n",
        )
    };
}

/// Four-bit weights with minima.
///
/// # Safety
/// As [`add`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn nibbles_mins(
    a: &mut [__m512; 16],
    scale: __m512,
    high: *const u8,
    min: __m512,
    x: *const f32,
) {
    // SAFETY: reads what the caller promised.
    unsafe {
        add_rows!(
            nibbles_mins_row, a,
            s = in(zmm_reg) scale,
            high = in(reg) high,
            m = in(zmm_reg) min,
            x = in(reg) x,
        );
    }
}

/// Four-bit weights.
///
/// # Safety
/// As [`add`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn nibbles(a: &mut [__m512; 16], scale: __m512, high: *const u8) {
    // SAFETY: reads what the caller promised.
    unsafe {
        add_rows!(
            nibbles_row, a,
            s = in(zmm_reg) scale,
            high = in(reg) high,
        );
    }
}

/// Two products a group.
///
/// # Safety
/// As [`add`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn levels(a: &mut [__m512; 16], scale: __m512, high: *const u8, low: *const u8) {
    // SAFETY: reads what the caller promised.
    unsafe {
        add_rows!(
            levels_row, a,
            s = in(zmm_reg) scale,
            high = in(reg) high,
            low = in(reg) low,
        );
    }
}
