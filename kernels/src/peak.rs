//! What the arithmetic units do at most: products and sums that wait for no memory and not for each
//! other, on all threads of a pool. A limit to set a kernel's speed beside.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::ThreadPool;
use crate::cpu::{Cpu, Isa};

/// Operations a second of all threads together; a product and its sum are two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    /// On f32, with the widest vectors there are.
    pub f32_per_second: f64,
    /// On bytes, in dot products of vectors (`vpdpbusd`). `None` without AVX-512 VNNI.
    pub avx512_i8_per_second: Option<f64>,
    /// On bf16, in dot products of vectors (`vdpbf16ps`). `None` without AVX-512 BF16.
    pub avx512_bf16_per_second: Option<f64>,
    /// On bytes, in tiles. `None` without AMX.
    pub amx_i8_per_second: Option<f64>,
    /// On bf16, in tiles. `None` without AMX.
    pub amx_bf16_per_second: Option<f64>,
}

/// How often a unit's loop runs between two looks at the clock.
const TURNS: u64 = 4096;

/// Measures each unit for `time`.
#[must_use]
pub fn peak(pool: &ThreadPool, time: Duration) -> Peak {
    let isa = Cpu::get().isa;
    let of = |there: bool, work: fn() -> u64| there.then(|| rate(pool, time, work));
    let float = match isa {
        Isa::Portable => rate(pool, time, portable),
        Isa::Avx2 => rate(pool, time, avx2),
        Isa::Avx512 | Isa::Vnni | Isa::Amx => rate(pool, time, avx512),
    };
    Peak {
        f32_per_second: float,
        avx512_i8_per_second: of(isa >= Isa::Vnni, avx512_i8),
        avx512_bf16_per_second: of(isa >= Isa::Vnni && Cpu::get().avx512_bf16, avx512_bf16),
        amx_i8_per_second: of(isa >= Isa::Amx, amx_i8),
        amx_bf16_per_second: of(isa >= Isa::Amx, amx_bf16),
    }
}

/// Operations a second of `work`, which does its loop [`TURNS`] times and tells the operations.
fn rate(pool: &ThreadPool, time: Duration, work: fn() -> u64) -> f64 {
    let operations = AtomicU64::new(0);
    let begun = Instant::now();
    pool.run(pool.threads(), &|_| {
        let mut sum = 0;
        while begun.elapsed() < time {
            sum += work();
        }
        operations.fetch_add(sum, Ordering::Relaxed);
    });
    operations.into_inner() as f64 / begun.elapsed().as_secs_f64()
}

/// Sums that grow side by side, so that none waits for another.
const SUMS: usize = 12;

fn portable() -> u64 {
    const LANES: usize = 4;
    let mut sums = black_box([[0.5f32; LANES]; SUMS]);
    let factor = black_box(0.5f32);
    for _ in 0..TURNS {
        for sum in sums.as_flattened_mut() {
            *sum = *sum * factor + 1.0;
        }
    }
    black_box(sums);
    TURNS * (SUMS * LANES * 2) as u64
}

#[cfg(target_arch = "x86_64")]
use x86::{amx_bf16, amx_i8, avx2, avx512, avx512_bf16, avx512_i8};

#[cfg(not(target_arch = "x86_64"))]
use self::{
    portable as amx_bf16, portable as amx_i8, portable as avx2, portable as avx512,
    portable as avx512_bf16, portable as avx512_i8,
};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{SUMS, TURNS};

    /// Runs one instruction on [`SUMS`] sums, over and over; it adds `products` products.
    macro_rules! vectors {
        ($name:ident, $features:literal, $products:literal, $start:expr, $factor:expr,
         |$sum:ident, $by:ident| $instruction:expr) => {
            pub(super) fn $name() -> u64 {
                #[target_feature(enable = $features)]
                fn run() {
                    let mut sums = [$start; SUMS];
                    let $by = $factor;
                    for _ in 0..TURNS {
                        for $sum in &mut sums {
                            *$sum = $instruction;
                        }
                    }
                    black_box(sums);
                }
                // SAFETY: chosen only on a processor that has it.
                unsafe { run() }
                TURNS * (SUMS * $products * 2) as u64
            }
        };
    }

    vectors!(
        avx2,
        "avx2,fma",
        8,
        _mm256_set1_ps(0.5),
        _mm256_set1_ps(black_box(0.5)),
        |sum, by| _mm256_fmadd_ps(*sum, by, by)
    );
    vectors!(
        avx512,
        "avx512f",
        16,
        _mm512_set1_ps(0.5),
        _mm512_set1_ps(black_box(0.5)),
        |sum, by| _mm512_fmadd_ps(*sum, by, by)
    );
    vectors!(
        avx512_i8,
        "avx512f,avx512vnni",
        64,
        _mm512_setzero_si512(),
        _mm512_set1_epi32(black_box(1)),
        |sum, by| _mm512_dpbusd_epi32(*sum, by, by)
    );
    vectors!(
        avx512_bf16,
        "avx512f,avx512bf16",
        32,
        _mm512_set1_ps(0.5),
        // SAFETY: both are any 512 bits.
        unsafe {
            std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(black_box(0x3f00_3f00)))
        },
        |sum, by| _mm512_dpbf16_ps(*sum, by, by)
    );

    /// `ldtilecfg`'s operand: eight tiles of 16 rows and 64 bytes.
    #[repr(C, align(64))]
    struct FullTiles([u8; 64]);

    impl FullTiles {
        fn new() -> Self {
            let mut bytes = [0; 64];
            bytes[0] = 1;
            for tile in 0..8 {
                bytes[16 + 2 * tile] = 64;
                bytes[48 + tile] = 16;
            }
            Self(bytes)
        }
    }

    /// Runs one instruction on four sums of tiles, over and over.
    macro_rules! tiles {
        ($name:ident, $instruction:literal, $depth:literal) => {
            pub(super) fn $name() -> u64 {
                let tiles = FullTiles::new();
                // SAFETY: chosen only on a processor with AMX that this process may use; the operand
                // is 64 bytes of a valid configuration, and only tiles are written.
                unsafe {
                    asm!("ldtilecfg [{}]", in(reg) &tiles, options(nostack, readonly));
                    for _ in 0..TURNS {
                        asm!(
                            concat!($instruction, " tmm0, tmm4, tmm6"),
                            concat!($instruction, " tmm1, tmm4, tmm7"),
                            concat!($instruction, " tmm2, tmm5, tmm6"),
                            concat!($instruction, " tmm3, tmm5, tmm7"),
                            options(nostack, nomem)
                        );
                    }
                    asm!("tilerelease", options(nostack, nomem));
                }
                // 16 × 16 sums of `depth` products each, four times a turn.
                TURNS * 4 * 16 * 16 * $depth * 2
            }
        };
    }

    tiles!(amx_i8, "tdpbssd", 64);
    tiles!(amx_bf16, "tdpbf16ps", 32);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_that_is_there_does_something() {
        let peak = peak(&ThreadPool::new(2), Duration::from_millis(2));
        assert!(peak.f32_per_second.is_finite() && peak.f32_per_second > 0.0, "{peak:?}");
        let cpu = Cpu::get();
        let (vnni, amx) = (cpu.isa >= Isa::Vnni, cpu.isa >= Isa::Amx);
        for (rate, there) in [
            (peak.avx512_i8_per_second, vnni),
            (peak.avx512_bf16_per_second, vnni && cpu.avx512_bf16),
            (peak.amx_i8_per_second, amx),
            (peak.amx_bf16_per_second, amx),
        ] {
            assert!(rate.is_some_and(|rate| rate > 0.0) == there, "{peak:?}");
        }
    }
}
