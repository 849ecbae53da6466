//! Models from the Hugging Face hub, in the hub's own cache (`HF_HOME`), so that other tools on
//! the machine share them. `HF_ENDPOINT` and `HF_TOKEN` are honoured.
//!
//! A file is used only when it has the size the hub told and, where the hub tells a SHA-256 (it
//! does for every large file, as the entity tag), when that is right too. Cached files need no
//! network.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;

use crate::models::Cancel;
use crate::models::cache::{self, PullLock, sha256_of};
use crate::models::error::ModelError;
use crate::models::hub_model::{HubModel, is_plain};
use crate::models::progress::{Progress, Show};

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Read where they are there.
const OPTIONAL: [&str; 3] =
    ["tokenizer_config.json", "generation_config.json", "chat_template.jinja"];
/// Shards of one model; the largest public ones have a few hundred.
const SHARDS_MAX: usize = 4096;

/// The hub and the cache in front of it.
#[derive(Clone, Debug)]
pub struct Hub {
    /// Another address than the public hub's.
    pub endpoint: Option<String>,
    /// An access token; the one stored by the hub's own tools where none is given.
    pub token: Option<String>,
    /// The hub's cache folder.
    pub cache_folder: PathBuf,
    /// Headstart's own folder: locks, and which cached files were found sound.
    pub state_folder: PathBuf,
    /// A transfer is given up when nothing arrives for this long.
    pub stall_max: Duration,
}

impl Hub {
    /// The hub as the environment says: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`.
    ///
    /// # Errors
    /// When there is no cache folder.
    pub fn from_env() -> Result<Self, ModelError> {
        let state_folder = cache::folder()?;
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Ok(Self {
            endpoint: set("HF_ENDPOINT"),
            token: set("HF_TOKEN"),
            cache_folder: Cache::from_env().path().clone(),
            state_folder,
            stall_max: Duration::from_secs(60),
        })
    }

    /// The path of `model`: a GGUF file, or a directory with everything that is needed.
    ///
    /// # Errors
    /// When the hub refuses or stalls, or a file is not what the hub said it would be; such a
    /// file is removed.
    pub fn fetch(
        &self,
        model: &HubModel,
        show: Show,
        cancel: &Cancel,
    ) -> Result<PathBuf, ModelError> {
        let pull = Pull::new(self, model, show, cancel)?;
        let lock_name = format!("hf--{}", model.repo);
        let _lock = PullLock::acquire(&self.state_folder, &lock_name, cancel)?;
        match &model.file {
            Some(file) => pull.get(file),
            None => pull.repository(),
        }
    }
}

/// One model on its way here.
struct Pull<'a> {
    hub: &'a Hub,
    model: &'a HubModel,
    repo: Repo,
    api: Api,
    cache: Cache,
    show: Show,
    cancel: &'a Cancel,
}

#[derive(Deserialize)]
struct Index {
    weight_map: std::collections::BTreeMap<String, String>,
}

impl<'a> Pull<'a> {
    fn new(
        hub: &'a Hub,
        model: &'a HubModel,
        show: Show,
        cancel: &'a Cancel,
    ) -> Result<Self, ModelError> {
        let cache = Cache::new(hub.cache_folder.clone());
        let mut builder = ApiBuilder::from_cache(cache.clone())
            .with_progress(false)
            .with_retries(2)
            .with_user_agent("headstart", env!("CARGO_PKG_VERSION"));
        if let Some(endpoint) = &hub.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
        }
        if let Some(token) = &hub.token {
            builder = builder.with_token(Some(token.clone()));
        }
        let api = builder.build().map_err(|error| ModelError::Hub {
            model: format!("hf:{model}"),
            file: "client".to_owned(),
            reason: error.to_string(),
        })?;
        let repo = Repo::with_revision(model.repo.clone(), RepoType::Model, model.revision.clone());
        Ok(Self { hub, model, repo, api, cache, show, cancel })
    }

    fn failed(&self, file: &str, reason: impl Into<String>) -> ModelError {
        ModelError::Hub {
            model: format!("hf:{}", self.model),
            file: file.to_owned(),
            reason: reason.into(),
        }
    }

    /// A repository in Hugging Face layout, or with exactly one GGUF file.
    fn repository(&self) -> Result<PathBuf, ModelError> {
        if let Some(folder) = self.cached_repository()? {
            return Ok(folder);
        }
        let files = self.list()?;
        let has = |name: &str| files.iter().any(|file| file == name);
        if !has(CONFIG) {
            return self.only_gguf(&files);
        }
        // The weights come last: a cached repository with its weights has everything else.
        for name in OPTIONAL.into_iter().chain([TOKENIZER]).filter(|name| has(name)) {
            self.get(name)?;
        }
        let config = self.get(CONFIG)?;
        if has(INDEX) {
            let index = self.get(INDEX)?;
            for shard in self.shards(&index)? {
                self.get(&shard)?;
            }
        } else if has(SINGLE) {
            self.get(SINGLE)?;
        } else {
            return Err(self.failed(SINGLE, "the repository has no safetensors weights"));
        }
        Ok(parent(&config))
    }

    fn only_gguf(&self, files: &[String]) -> Result<PathBuf, ModelError> {
        let ggufs: Vec<&String> = files.iter().filter(|f| f.ends_with(".gguf")).collect();
        match ggufs[..] {
            [] => Err(self.failed(CONFIG, "the repository has neither config.json nor a .gguf")),
            [file] if file.split('/').all(is_plain) => self.get(file),
            _ => {
                let names: Vec<&str> = ggufs.iter().take(20).map(|f| f.as_str()).collect();
                let reason = format!("name one of its files with `:file`: {}", names.join(", "));
                Err(self.failed("*.gguf", reason))
            }
        }
    }

    /// The folder of a repository of which everything needed is here and sound.
    fn cached_repository(&self) -> Result<Option<PathBuf>, ModelError> {
        let cached = |name: &str| self.cache.repo(self.repo.clone()).get(name);
        let Some(config) = cached(CONFIG) else {
            return Ok(None);
        };
        let weights = match cached(INDEX) {
            Some(index) => self.shards(&index)?,
            None => vec![SINGLE.to_owned()],
        };
        if !weights.iter().all(|name| cached(name).is_some()) {
            return Ok(None);
        }
        for name in &weights {
            self.get(name)?;
        }
        Ok(Some(parent(&config)))
    }

    fn shards(&self, index: &Path) -> Result<Vec<String>, ModelError> {
        let bytes = fs::read(index).map_err(ModelError::io("read", index))?;
        let index: Index = serde_json::from_slice(&bytes)
            .map_err(|error| self.failed(INDEX, format!("malformed: {error}")))?;
        let mut shards: Vec<String> = index.weight_map.into_values().collect();
        shards.sort_unstable();
        shards.dedup();
        if shards.is_empty() || shards.len() > SHARDS_MAX {
            let reason = format!("it names {} shards, expected 1 to {SHARDS_MAX}", shards.len());
            return Err(self.failed(INDEX, reason));
        }
        match shards.iter().find(|shard| !is_plain(shard)) {
            Some(shard) => Err(self.failed(INDEX, format!("`{shard}` is no name of a shard"))),
            None => Ok(shards),
        }
    }

    fn list(&self) -> Result<Vec<String>, ModelError> {
        let (api, repo) = (self.api.clone(), self.repo.clone());
        let meter = Arc::new(Meter::default());
        let listed =
            self.watched("its list of files", &meter, None, move || api.repo(repo).info())?;
        let info = listed.map_err(|error| self.refused("its list of files", &error))?;
        Ok(info.siblings.into_iter().map(|s| s.rfilename).collect())
    }

    /// A file of the repository, from the cache or the hub, found sound either way.
    fn get(&self, file: &str) -> Result<PathBuf, ModelError> {
        if let Some(pointer) = self.cache.repo(self.repo.clone()).get(file) {
            self.check(file, &pointer, None)?;
            return Ok(pointer);
        }
        let meter = Arc::new(Meter::default());
        let label = format!("fetching {file} from {}", self.model.repo);
        let progress = Progress::start(self.show, &label, 0);
        let (api, repo) = (self.api.clone(), self.repo.clone());
        let (name, counted) = (file.to_owned(), Counted(Arc::clone(&meter)));
        let fetched = self
            .watched(file, &meter, Some(&progress), move || {
                api.repo(repo).download_with_progress(&name, counted)
            })
            .and_then(|result| result.map_err(|error| self.refused(file, &error)));
        let pointer = fetched.inspect_err(|_| self.remove_partial())?;
        self.check(file, &pointer, Some(meter.total_bytes.load(Ordering::Relaxed)))?;
        Ok(pointer)
    }

    /// Runs `work` on its own thread; gives it up when its meter stands still, or on request.
    fn watched<T: Send + 'static>(
        &self,
        what: &str,
        meter: &Meter,
        progress: Option<&Progress>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ModelError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("hub".to_owned())
            .spawn(move || sender.send(work()))
            .map_err(|error| self.failed(what, format!("cannot start a thread: {error}")))?;
        let mut moved = (Instant::now(), 0);
        loop {
            match receiver.recv_timeout(Duration::from_millis(50)) {
                Ok(result) => return Ok(result),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.failed(what, "the transfer broke off"));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if self.cancel.is_cancelled() {
                return Err(ModelError::Interrupted { model: format!("hf:{}", self.model) });
            }
            let bytes = meter.bytes.load(Ordering::Relaxed);
            if let Some(progress) = progress {
                progress.set_total(meter.total_bytes.load(Ordering::Relaxed));
                progress.set(bytes);
            }
            if bytes != moved.1 {
                moved = (Instant::now(), bytes);
            }
            if moved.0.elapsed() > self.hub.stall_max {
                let waited = self.hub.stall_max.as_secs();
                return Err(self.failed(what, format!("nothing arrived for {waited} s")));
            }
        }
    }

    fn refused(&self, file: &str, error: &ApiError) -> ModelError {
        let hint = match error {
            ApiError::RequestError(inner) => match **inner {
                ureq::Error::StatusCode(401 | 403) => {
                    "; the model is private or gated: accept its terms and set HF_TOKEN"
                }
                ureq::Error::StatusCode(404) => "; there is no such file, revision or repository",
                _ => "",
            },
            _ => "",
        };
        self.failed(file, format!("{error}{hint}"))
    }

    /// Removes what lies half-written in the hub's cache of this repository.
    fn remove_partial(&self) {
        let blobs = self.cache.repo(self.repo.clone()).blob_path("part");
        let Ok(entries) = fs::read_dir(parent(&blobs)) else {
            return;
        };
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            if path.extension().is_some_and(|e| e == "part")
                && let Err(error) = fs::remove_file(&path)
            {
                eprintln!("cannot remove {}: {error}", path.display());
            }
        }
    }

    /// Compares a file with what the hub said of it; a broken one is removed.
    fn check(&self, file: &str, pointer: &Path, told_bytes: Option<u64>) -> Result<(), ModelError> {
        let blob = pointer.canonicalize().map_err(ModelError::io("open", pointer))?;
        let size_bytes = fs::metadata(&blob).map_err(ModelError::io("read", &blob))?.len();
        let broken = |what, found, expected| {
            for path in [pointer, &*blob] {
                if let Err(error) = fs::remove_file(path) {
                    eprintln!("cannot remove {}: {error}", path.display());
                }
            }
            let file = format!("{file} of hf:{}", self.model);
            ModelError::Broken { file, what, found, expected }
        };
        if let Some(told_bytes) = told_bytes.filter(|told| *told != size_bytes) {
            let (found, expected) = (size_bytes.to_string(), told_bytes.to_string());
            return Err(broken("size in bytes", found, expected));
        }
        let Some(expected) = sha256_in_name(&blob) else {
            return Ok(());
        };
        let mark = self.hub.state_folder.join("hub-sound").join(&expected);
        if fs::read_to_string(&mark).is_ok_and(|noted| noted == size_bytes.to_string()) {
            return Ok(());
        }
        let progress = Progress::start(self.show, &format!("checking {file}"), size_bytes);
        let found = sha256_of(&blob, &progress)?;
        if found != expected {
            return Err(broken("SHA-256", found, expected));
        }
        fs::create_dir_all(parent(&mark)).map_err(ModelError::io("create", &mark))?;
        fs::write(&mark, size_bytes.to_string()).map_err(ModelError::io("write", &mark))
    }
}

/// The hub names a large file's blob by its SHA-256, a small one's by its git hash.
fn sha256_in_name(blob: &Path) -> Option<String> {
    let name = blob.file_name()?.to_str()?;
    let is_hash = name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit());
    is_hash.then(|| name.to_ascii_lowercase())
}

fn parent(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).to_path_buf()
}

/// Bytes there are, and bytes there will be.
#[derive(Debug, Default)]
struct Meter {
    bytes: AtomicU64,
    total_bytes: AtomicU64,
}

struct Counted(Arc<Meter>);

impl hf_hub::api::Progress for Counted {
    fn init(&mut self, size: usize, _filename: &str) {
        self.0.total_bytes.store(size as u64, Ordering::Relaxed);
        self.0.bytes.store(0, Ordering::Relaxed);
    }

    fn update(&mut self, size: usize) {
        self.0.bytes.fetch_add(size as u64, Ordering::Relaxed);
    }

    fn finish(&mut self) {}
}
