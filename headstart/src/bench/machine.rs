//! What this machine is: its processor, its caches, this process's memory. Linux tells; elsewhere
//! nothing is known.

use std::fs;

/// The processor's name, and the instructions it has, as the kernel lists them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Processor {
    /// "model name".
    pub(super) name: String,
    /// "flags".
    pub(super) features: String,
}

impl Processor {
    /// This machine's.
    pub(super) fn this() -> Self {
        Self::parse(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
    }

    fn parse(cpuinfo: &str) -> Self {
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name));
            let value = line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim());
            value.unwrap_or_default().to_owned()
        };
        Self { name: field("model name"), features: field("flags") }
    }
}

/// The most memory this process ever had resident, in bytes.
pub(super) fn resident_bytes_max() -> Option<u64> {
    kib_field(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM")
}

/// Memory that can be taken without swapping, in bytes.
pub(super) fn available_bytes() -> Option<u64> {
    kib_field(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable")
}

/// The size of the largest cache of the first processor, in bytes.
pub(super) fn last_level_cache_bytes() -> Option<u64> {
    (0..8)
        .filter_map(|index| {
            let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
            cache_bytes(fs::read_to_string(path).ok()?.trim())
        })
        .max()
}

/// `VmHWM:    123 kB` in bytes.
fn kib_field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1 << 10)
}

/// `49152K` in bytes.
fn cache_bytes(text: &str) -> Option<u64> {
    let shift = match text.chars().last()? {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        _ => 0,
    };
    let number: u64 = text.trim_end_matches(['K', 'M', 'G']).parse().ok()?;
    number.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_fields_are_read() {
        let status = "VmPeak:\t  999 kB\nVmHWM:\t   1234 kB\nThreads:\t2\n";
        assert_eq!(kib_field(status, "VmHWM"), Some(1234 << 10));
        assert_eq!(kib_field(status, "Vm"), None);
        assert_eq!(kib_field(status, "Threads"), None);
        assert_eq!(cache_bytes("491520K"), Some(480 << 20));
        assert_eq!(cache_bytes("32M"), Some(32 << 20));
        assert_eq!(cache_bytes("512"), Some(512));
        assert_eq!(cache_bytes("lots"), None);
    }

    #[test]
    fn the_processor_is_read() {
        let cpuinfo = "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nflags\t\t: fpu avx2\n\n\
            processor\t: 1\nmodel name\t: Another\n";
        let expected = Processor { name: "A CPU @ 2 GHz".into(), features: "fpu avx2".into() };
        assert_eq!(Processor::parse(cpuinfo), expected);
        assert_eq!(Processor::parse(""), Processor::default());
    }
}
