//! llama.cpp from its Python source package, built once into the user's cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::llama::Llama;
use crate::bench::child::Job;
use crate::bench::machine::Processor;
use crate::bench::steps::Steps;
use crate::failure::Failure;
use crate::models::Cancel;
use crate::models::cache::{self, PullLock};

/// The source package that carries llama.cpp; pip's own configuration says where it comes from.
pub(super) const PACKAGE: &str = "llama-cpp-python==0.3.36";
const PACKAGE_NAME: &str = "llama-cpp-python";
const PACKAGE_SHA256: &str = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e";
/// Where llama.cpp lies inside the package.
const MEMBER: &str = "llama_cpp_python-0.3.36/vendor/llama.cpp/";
/// The folder in the cache.
const FOLDER: &str = "llama.cpp-0.3.36";
/// What builds it where the system has nothing.
const TOOLS: [&str; 2] = ["cmake==3.31.6", "ninja==1.11.1.4"];

/// llama.cpp's own way to build for the processor at hand, and nothing that is not measured.
const OPTIONS: [&str; 11] = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-Wno-dev",
];

/// What compilers are told for a processor whose matrix unit is not to be used.
const WITHOUT_AMX: &str = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16";

/// Which llama.cpp is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::bench) enum Flavor {
    /// For this processor, with everything it has.
    Native,
    /// For this processor, but for its matrix unit (AMX).
    WithoutAmx,
}

impl Flavor {
    /// The folder of its objects and programs.
    const fn folder(self) -> &'static str {
        match self {
            Self::Native => "build",
            Self::WithoutAmx => "build-no-amx",
        }
    }

    fn options(self) -> Vec<String> {
        let mut options: Vec<String> = OPTIONS.map(str::to_owned).to_vec();
        if self == Self::WithoutAmx {
            let flags = ["C", "CXX"].map(|it| format!("-DCMAKE_{it}_FLAGS={WITHOUT_AMX}"));
            options.extend(flags);
        }
        options
    }

    /// The programs that are built.
    const fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Native => {
                &["llama-bench", "llama-batched-bench", "llama-quantize", "llama-perplexity"]
            }
            Self::WithoutAmx => &["llama-bench", "llama-batched-bench"],
        }
    }
}

/// The one change to llama.cpp. Older versions of GCC see `_tile_loadconfig` read only the first
/// eight bytes of the tile configuration and leave the rest unwritten, and the program dies on any
/// processor with AMX. The added line says that all of it is read; no other instruction changes.
const PATCH_FILE: &str = "ggml/src/ggml-cpu/amx/mmq.cpp";
const PATCH_BEFORE: &str = "    _tile_loadconfig(&tc);\n";
const PATCH_ADDED: &str = "    __asm__ volatile(\"\" : : \"m\"(tc));\n";

/// Unpacks the members of the archive named by the first argument that lie below the second into
/// the folder named by the third. Names that lead out of it are refused.
const UNPACK: &str = "import os, sys, tarfile
archive, prefix, folder = sys.argv[1:]
root = os.path.realpath(folder)
with tarfile.open(archive) as tar:
    for member in tar:
        if not (member.name.startswith(prefix) and (member.isfile() or member.isdir())):
            continue
        target = os.path.realpath(os.path.join(root, member.name[len(prefix):]))
        if os.path.commonpath([root, target]) != root:
            sys.exit('error: a member leads out of the folder: ' + member.name)
        if member.isdir():
            os.makedirs(target, exist_ok=True)
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with tar.extractfile(member) as source, open(target, 'wb') as file:
            file.write(source.read())
        os.chmod(target, member.mode & 0o755)
";

/// The programs in the user's cache, fetched and built first if they are not there.
///
/// # Errors
/// When Python, pip or a C++ compiler is missing, the package cannot be had, or the build fails. A
/// build that was interrupted goes on the next time.
pub(in crate::bench) fn llama(flavor: Flavor, cancel: &Cancel) -> Result<Llama, Failure> {
    let models = cache::folder()?;
    let parent = models.parent().unwrap_or(&models);
    let python = "python3".to_owned();
    Builder { folder: parent.join(FOLDER), flavor, python, cancel }.llama(parent)
}

struct Builder<'a> {
    folder: PathBuf,
    flavor: Flavor,
    python: String,
    cancel: &'a Cancel,
}

/// The programs that build.
struct Tools {
    cmake: PathBuf,
    ninja: PathBuf,
}

impl Builder<'_> {
    fn llama(&self, parent: &Path) -> Result<Llama, Failure> {
        let build = self.folder.join(self.flavor.folder());
        let llama = Llama { programs: build.join("bin"), words: self.folder.join("output") };
        let _lock = PullLock::acquire(parent, "llama.cpp", self.cancel)?;
        create_all(&llama.words)?;
        let recipe = recipe(self.flavor, &Processor::this());
        let built = build.join("built");
        if fs::read_to_string(&built).is_ok_and(|text| text == recipe) {
            return Ok(llama);
        }
        self.source(&llama.words)?;
        self.compile(&build, &llama.words, &recipe)?;
        write(&built, &recipe)?;
        Ok(llama)
    }

    /// Fetches the package and unpacks llama.cpp, whole or not at all.
    fn source(&self, words: &Path) -> Result<(), Failure> {
        let source = self.folder.join("source");
        if source.join("CMakeLists.txt").is_file() {
            return Ok(());
        }
        let mut steps = Steps::start(&format!("fetching {PACKAGE}"), 2);
        let staging = self.folder.join(".partial");
        remove_all(&staging)?;
        let download = staging.join("download");
        create_all(&download)?;
        let requirement = staging.join("requirement.txt");
        write(&requirement, &format!("{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n"))?;
        let mut pip = self.python();
        pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]);
        pip.args(["--no-binary", PACKAGE_NAME, "--require-hashes", "--requirement"]);
        pip.arg(&requirement).arg("--dest").arg(&download);
        self.job(&format!("fetching {PACKAGE}"), pip, words.join("fetch.log"))?;
        steps.at(1, "unpacking");
        let archive = first_file(&download)?;
        let unpacked = staging.join("source");
        create_all(&unpacked)?;
        let mut unpack = self.python();
        unpack.args(["-c", UNPACK]).arg(&archive).arg(MEMBER).arg(&unpacked);
        self.job(&format!("unpacking {PACKAGE}"), unpack, words.join("unpack.log"))?;
        patch(&unpacked.join(PATCH_FILE))?;
        rename(&unpacked, &source)?;
        steps.at(2, "");
        remove_all(&staging)
    }

    fn compile(&self, build: &Path, words: &Path, recipe: &str) -> Result<(), Failure> {
        let tools = self.tools(words)?;
        let begun = build.join("begun");
        if fs::read_to_string(&begun).map_or(true, |text| text != recipe) {
            // Objects for another processor, or built otherwise.
            remove_all(build)?;
            create_all(build)?;
            write(&begun, recipe)?;
        }
        let mut steps = Steps::start("building llama.cpp", 0);
        let mut configure = Command::new(&tools.cmake);
        configure.arg("-S").arg(self.folder.join("source")).arg("-B").arg(build);
        configure.args(["-G", "Ninja"]).args(self.flavor.options());
        configure.arg(format!("-DCMAKE_MAKE_PROGRAM={}", tools.ninja.display()));
        // Never takes the version of a repository that the cache folder may lie in.
        configure.env("GIT_CEILING_DIRECTORIES", &self.folder);
        self.job("configuring llama.cpp", configure, words.join("configure.log"))?;
        let mut ninja = Command::new(&tools.ninja);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        ninja.arg("-C").arg(build).args(["-j", &cores.to_string()]);
        ninja.args(self.flavor.programs());
        let log = words.join("build.log");
        let job = Job { doing: "building llama.cpp", command: ninja, out: log.clone(), err: log };
        job.run(self.cancel, &mut |piece| {
            if let Some((done, total)) = ninja_progress(piece) {
                steps.set(done, total, "");
            }
        })
    }

    /// The system's cmake and ninja, or else pip's in a virtual environment of their own.
    fn tools(&self, words: &Path) -> Result<Tools, Failure> {
        if runs("cmake") && runs("ninja") {
            return Ok(Tools { cmake: "cmake".into(), ninja: "ninja".into() });
        }
        let venv = self.folder.join("tools");
        let bin = venv.join("bin");
        let tools = Tools { cmake: bin.join("cmake"), ninja: bin.join("ninja") };
        if runs(&tools.cmake) && runs(&tools.ninja) {
            return Ok(tools);
        }
        let _steps = Steps::start("fetching cmake and ninja", 0);
        let log = words.join("tools.log");
        let mut make = self.python();
        make.args(["-m", "venv", "--clear"]).arg(&venv);
        self.job("making a virtual environment for cmake and ninja", make, log.clone())?;
        let mut pip = Command::new(bin.join("python"));
        pip.args(["-m", "pip", "install", "--quiet", "--only-binary", ":all:"]).args(TOOLS);
        quiet(&mut pip);
        self.job("fetching cmake and ninja", pip, log)?;
        Ok(tools)
    }

    fn python(&self) -> Command {
        let mut command = Command::new(&self.python);
        quiet(&mut command);
        command
    }

    fn job(&self, doing: &str, command: Command, log: PathBuf) -> Result<(), Failure> {
        Job { doing, command, out: log.clone(), err: log }.run(self.cancel, &mut |_| ())
    }
}

fn quiet(pip: &mut Command) {
    pip.env("PIP_DISABLE_PIP_VERSION_CHECK", "1").env("PIP_NO_INPUT", "1");
}

fn patch(path: &Path) -> Result<(), Failure> {
    let text = fs::read_to_string(path).map_err(|error| failed("read", path, &error))?;
    if text.matches(PATCH_BEFORE).count() != 1 {
        let message = format!("{} is not what it is in {PACKAGE}", path.display());
        return Err(Failure::Failed(message));
    }
    write(path, &text.replace(PATCH_BEFORE, &format!("{PATCH_ADDED}{PATCH_BEFORE}")))
}

/// What a build depends on; one made by another recipe is of no use.
fn recipe(flavor: Flavor, processor: &Processor) -> String {
    let Processor { name, features } = processor;
    let (options, programs) = (flavor.options().join(" "), flavor.programs().join(" "));
    format!("{PACKAGE}\n{PATCH_ADDED}{options}\n{programs}\n{name}\n{features}\n")
}

/// The last `[done/total]` of what ninja printed.
fn ninja_progress(printed: &str) -> Option<(u64, u64)> {
    printed.lines().rev().find_map(|line| {
        let (done, total) = line.strip_prefix('[')?.split_once(']')?.0.split_once('/')?;
        Some((done.parse().ok()?, total.parse().ok()?))
    })
}

fn runs(program: impl AsRef<std::ffi::OsStr>) -> bool {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn first_file(folder: &Path) -> Result<PathBuf, Failure> {
    let mut entries = fs::read_dir(folder).map_err(|error| failed("read", folder, &error))?;
    entries
        .find_map(|entry| entry.ok().map(|entry| entry.path()))
        .ok_or_else(|| Failure::Failed(format!("pip brought nothing for {PACKAGE}")))
}

fn create_all(folder: &Path) -> Result<(), Failure> {
    fs::create_dir_all(folder).map_err(|error| failed("create", folder, &error))
}

fn remove_all(folder: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(failed("remove", folder, &error))
        }
        _ => Ok(()),
    }
}

fn rename(from: &Path, to: &Path) -> Result<(), Failure> {
    remove_all(to)?;
    fs::rename(from, to).map_err(|error| failed("rename", from, &error))
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text).map_err(|error| failed("write", path, &error))
}

fn failed(verb: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::Failed(format!("cannot {verb} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ninjas_progress_is_the_last_it_printed() {
        let printed = "[1/138] Building C object a.o\n[2/138] Linking CXX b\nwarning: [9/9] no\n";
        assert_eq!(ninja_progress(printed), Some((2, 138)));
        assert_eq!(ninja_progress("ninja: no work to do.\n"), None);
        assert_eq!(ninja_progress("[x/y] z"), None);
    }

    #[test]
    fn the_patch_goes_to_one_known_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, format!("a\n{PATCH_BEFORE}b\n")).unwrap();
        patch(file.path()).unwrap();
        let patched = fs::read_to_string(&file).unwrap();
        assert_eq!(patched, format!("a\n{PATCH_ADDED}{PATCH_BEFORE}b\n"));
        fs::write(&file, "something else").unwrap();
        assert!(patch(file.path()).unwrap_err().message().contains(PACKAGE));
    }

    #[test]
    fn a_build_for_another_processor_is_of_no_use() {
        let processor = |features: &str| Processor { name: "A".into(), features: features.into() };
        let recipe = |features| recipe(Flavor::Native, &processor(features));
        assert_ne!(recipe("avx2"), recipe("avx2 avx512f"));
        assert_eq!(recipe("avx2"), recipe("avx2"));
        let other = super::recipe(Flavor::WithoutAmx, &processor("avx2"));
        assert!(other != recipe("avx2") && other.contains("-mno-amx-int8"), "{other}");
    }

    #[test]
    fn a_build_that_is_there_is_taken_as_it_is() {
        let cache = tempfile::tempdir().unwrap();
        let (folder, flavor) = (cache.path().join(FOLDER), Flavor::WithoutAmx);
        let built = folder.join("build-no-amx").join("built");
        fs::create_dir_all(built.parent().unwrap()).unwrap();
        fs::write(&built, recipe(flavor, &Processor::this())).unwrap();
        // No program of this name: nothing may be fetched or built.
        let cancel = Cancel::default();
        let python = "headstart-no-such-python".to_owned();
        let builder = Builder { folder: folder.clone(), flavor, python, cancel: &cancel };
        let llama = builder.llama(cache.path()).unwrap();
        assert_eq!(llama.programs, folder.join("build-no-amx/bin"));
        // A stale one is fetched anew, which needs Python.
        fs::write(&built, "for another processor").unwrap();
        let message = builder.llama(cache.path()).unwrap_err().message().to_owned();
        assert!(message.contains("headstart-no-such-python"), "{message}");
        assert!(message.contains(PACKAGE), "{message}");
    }

    #[test]
    fn only_what_lies_below_the_member_is_unpacked() {
        let folder = tempfile::tempdir().unwrap();
        let make = "import io, sys, tarfile
with tarfile.open(sys.argv[1], 'w:gz') as tar:
    for name in sys.argv[2:]:
        info = tarfile.TarInfo(name)
        info.size = 2
        tar.addfile(info, io.BytesIO(b'ok'))
";
        let (archive, target) = (folder.path().join("a.tar.gz"), folder.path().join("target"));
        let run = |script: &str, args: &[&str], members: &[&str]| {
            let mut python = Command::new("python3");
            python.args(["-c", script]).arg(&archive).args(members).args(args);
            python.stderr(Stdio::null()).status().unwrap().success()
        };
        fs::create_dir(&target).unwrap();
        let into = target.to_str().unwrap();
        assert!(run(make, &[], &["p/x/CMakeLists.txt", "p/x/src/a.c", "p/y/b.c"]));
        assert!(run(UNPACK, &["p/x/", into], &[]));
        assert_eq!(fs::read_to_string(target.join("src/a.c")).unwrap(), "ok");
        assert!(target.join("CMakeLists.txt").is_file() && !target.join("b.c").exists());
        assert!(run(make, &[], &["p/x/../../../out.c"]));
        assert!(!run(UNPACK, &["p/x/", into], &[]), "a member led out of the folder");
    }
}
