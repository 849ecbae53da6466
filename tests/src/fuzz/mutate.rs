//! Inputs that are almost right: each is one of the seeds, changed a little. Which one and how is a
//! function of a number, so that every input can be made again.

use crate::chaos::Draw;

/// Changes to one input, at most.
const CHANGES_MAX: usize = 8;
/// Longest piece that is copied, cut or moved, in bytes.
const PIECE_MAX: usize = 64;
/// Numbers at the edges of their types.
const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
];
/// The same as text, and texts that parsers stumble over.
const TEXTS: [&str; 24] = [
    "0",
    "-1",
    "1e999",
    "-0.0",
    "NaN",
    "18446744073709551615",
    "9223372036854775808",
    "1e-400",
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
    "[[[[[[[[",
    "\\u0000",
    "\\ud800",
    "\u{0}",
    "\u{feff}",
    "\u{1F600}",
    "\r\n",
    "\\",
    "'",
    "\"",
    ",",
];

/// Input number `index` of a run with `seed`.
#[must_use]
pub fn input(
    seed: u64,
    index: u64,
    seeds: &[Vec<u8>],
    words: &[&str],
    bytes_max: usize,
) -> Vec<u8> {
    let mut draw = Draw::new(seed ^ index.wrapping_mul(0xd6e8_feb8_6659_fd93));
    let mut bytes = draw.of(seeds).cloned().unwrap_or_default();
    for _ in 0..=draw.below(CHANGES_MAX) {
        change(&mut draw, &mut bytes, seeds, words);
    }
    bytes.truncate(bytes_max);
    bytes
}

fn change(draw: &mut Draw, bytes: &mut Vec<u8>, seeds: &[Vec<u8>], words: &[&str]) {
    let at = draw.below(bytes.len() + 1);
    let end = at + draw.below(PIECE_MAX.min(bytes.len() - at) + 1);
    match draw.below(11) {
        0 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << draw.below(8);
            }
        }
        1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = draw.bits() as u8;
            }
        }
        2 => overwrite(bytes, at, &number(draw)),
        3 => insert(bytes, at, &number(draw)),
        4 => drop(bytes.drain(at..end)),
        5 => {
            let piece = bytes[at..end].to_vec();
            let to = draw.below(bytes.len() + 1);
            insert(bytes, to, &piece);
        }
        6 => {
            // One piece many times: long strings, deep nesting.
            let piece = bytes[at..end.min(at + 4)].repeat(draw.below(512));
            insert(bytes, at, &piece);
        }
        7 => bytes.truncate(at),
        8 => {
            let text = draw.of(&TEXTS).copied().unwrap_or_default();
            replace(bytes, at, end.min(at + 8), text.as_bytes());
        }
        9 => {
            let word = draw.of(words).or(draw.of(&TEXTS)).copied().unwrap_or_default();
            insert(bytes, at, word.as_bytes());
        }
        _ => {
            // The beginning of this one and the end of another.
            if let Some(other) = draw.of(seeds) {
                bytes.truncate(at);
                bytes.extend_from_slice(&other[draw.below(other.len() + 1)..]);
            }
        }
    }
}

/// A number of 1, 2, 4 or 8 bytes, little-endian: an edge, a neighbour of one, or any.
fn number(draw: &mut Draw) -> Vec<u8> {
    let edge = draw.of(&EDGES).copied().unwrap_or_default();
    let number = match draw.below(3) {
        0 => edge,
        1 => edge.wrapping_add(draw.bits() % 8).wrapping_sub(4),
        _ => draw.bits() >> draw.below(64),
    };
    number.to_le_bytes()[..1 << draw.below(4)].to_vec()
}

fn overwrite(bytes: &mut [u8], at: usize, piece: &[u8]) {
    for (byte, new) in bytes[at..].iter_mut().zip(piece) {
        *byte = *new;
    }
}

fn insert(bytes: &mut Vec<u8>, at: usize, piece: &[u8]) {
    replace(bytes, at, at, piece);
}

fn replace(bytes: &mut Vec<u8>, start: usize, end: usize, piece: &[u8]) {
    bytes.splice(start..end, piece.iter().copied());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_is_a_function_of_its_number() {
        let seeds = [b"{\"a\": [1, 2]}".to_vec(), b"GGUF\x03\0\0\0".to_vec()];
        let all: Vec<_> = (0..2000).map(|index| input(7, index, &seeds, &["a"], 4096)).collect();
        for (index, bytes) in all.iter().enumerate() {
            assert_eq!(*bytes, input(7, index as u64, &seeds, &["a"], 4096));
            assert!(bytes.len() <= 4096);
        }
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert!(distinct.len() > 1500, "{} distinct inputs", distinct.len());
    }
}
