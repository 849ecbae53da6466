//! What this processor can do, found once.

use std::sync::OnceLock;

/// Instruction sets that kernels are written for, worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX-512 with VNNI (byte products).
    Vnni,
    /// The above with AMX byte and bf16 tiles.
    Amx,
}

/// What was found.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    /// The best instruction set.
    pub isa: Isa,
    /// AVX-512 BF16 dot products.
    pub avx512_bf16: bool,
}

impl Cpu {
    /// The processor this runs on.
    pub fn get() -> Cpu {
        static CPU: OnceLock<Cpu> = OnceLock::new();
        *CPU.get_or_init(detect)
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Cpu {
    use std::is_x86_feature_detected as has;
    let avx2 = has!("avx2") && has!("fma") && has!("f16c");
    let avx512 =
        avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
    let vnni = avx512 && has!("avx512vnni");
    let bf16 = avx512 && has!("avx512bf16");
    let isa = match (avx2, avx512, vnni, vnni && bf16 && amx::request()) {
        (_, _, _, true) => Isa::Amx,
        (_, _, true, _) => Isa::Vnni,
        (_, true, ..) => Isa::Avx512,
        (true, ..) => Isa::Avx2,
        _ => Isa::Portable,
    };
    Cpu { isa, avx512_bf16: bf16 }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Cpu {
    Cpu { isa: Isa::Portable, avx512_bf16: false }
}

#[cfg(target_arch = "x86_64")]
mod amx {
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;

    /// Whether AMX tiles with byte and bf16 products exist and the kernel lets this process use
    /// them (Linux grants the tile state only on request, `arch_prctl(2)`).
    pub(super) fn request() -> bool {
        if __cpuid_count(0, 0).eax < 7 {
            return false;
        }
        let edx = __cpuid_count(7, 0).edx;
        let (bf16, tile, int8) = (edx >> 22 & 1, edx >> 24 & 1, edx >> 25 & 1);
        bf16 & tile & int8 == 1 && granted()
    }

    #[cfg(target_os = "linux")]
    fn granted() -> bool {
        const ARCH_PRCTL: i64 = 158;
        const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
        const XFEATURE_XTILEDATA: i64 = 18;
        let result: i64;
        // SAFETY: the system call takes integers only and touches no memory of ours.
        unsafe {
            asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA, lateout("rcx") _, lateout("r11") _);
        }
        result == 0
    }

    #[cfg(not(target_os = "linux"))]
    fn granted() -> bool {
        false
    }
}
