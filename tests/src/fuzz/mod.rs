//! Fuzzing of every parser that faces outside, by mutation of right inputs. It runs on the stable
//! compiler and needs nothing but this workspace: no coverage guides it, structure does.

pub mod mutate;
mod seeds;
pub mod targets;

/// One parser.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Right inputs.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Words of its language.
    pub words: &'static [&'static str],
    /// Longest input, in bytes.
    pub bytes_max: usize,
    /// Memory that one input may take, in bytes, whatever its length within `bytes_max`.
    pub memory_max: usize,
    /// Parses. Any result is right; a panic, a crash or more memory is not.
    pub run: fn(&[u8]),
}
