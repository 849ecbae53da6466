//! Ranks on the GPUs of several processes, which NCCL sums over.
//!
//! Each process drives its own ranks, as one process drives all of them elsewhere. The leader makes the
//! group's id and tells it over the work's connection once all have come. A sum waits on the device for
//! the other processes, where no closed connection frees it: when one is lost, the communicators of
//! this process are aborted.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use headstart_kernels::cuda::{Communicators, Device, UniqueId};

use super::collective::{Collective, Ranks};
use super::load::CudaModel;
use super::{CudaExecutor, CudaLoadError, CudaOptions, lost, open};
use crate::collective::hosts::group::Others;
use crate::collective::hosts::join::Joined;
use crate::collective::hosts::link::Kind;
use crate::collective::hosts::{Member, Place, Pulse, Terms, gather, join};
use crate::executor::hosts::follower::Following;
use crate::executor::hosts::leader::Elsewhere;
use crate::executor::hosts::{FollowError, HostTimes, LeadError, Leading, LocalRanks, Partials};
use crate::executor::{
    Executor, ExecutorError, KvFormat, Limits, ModelHash, PageId, Pipeline, Row,
};
use crate::model::{ModelConfig, Progress, WeightDtype};

/// The ranks of one place, before they have found the others.
#[derive(Debug)]
pub struct CudaPart {
    model: CudaModel,
    hash: ModelHash,
    place: Place,
}

/// Loads the ranks of a place to the GPUs of this process, one each; compiled kernels are kept in
/// `cache`.
///
/// # Errors
/// One sentence that says what is missing, or what is wrong with the file.
pub fn load_ranks(
    path: &Path,
    dtype: WeightDtype,
    place: Place,
    cache: Option<PathBuf>,
    progress: &mut dyn FnMut(Progress),
) -> Result<CudaPart, CudaLoadError> {
    let local = place.local();
    let devices = open(Ranks::Devices(local.len()), cache.as_deref())?;
    // Nobody else waits for what cannot be.
    Communicators::available().map_err(CudaLoadError::Device)?;
    let (first, of) = (local.start, place.ranks);
    let model = CudaModel::load_ranks(&devices, first, of, path, dtype, progress)?;
    // It has files.
    let hash = model.hash.unwrap_or_default();
    Ok(CudaPart { model, hash, place })
}

impl CudaPart {
    /// What the whole model is.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn member(&self) -> Member {
        Member { place: self.place, model: self.hash, on_gpus: true }
    }

    /// Joins the group of all ranks' GPUs, and leaves it when another process is lost.
    fn join(mut self, id: &UniqueId, pulse: &Pulse) -> Result<CudaModel, ExecutorError> {
        let devices: Vec<Device> = self.model.parts.iter().map(|p| p.device.clone()).collect();
        let (of, first, leads) = (self.place.ranks, self.place.local().start, self.place.host == 0);
        let gone = || pulse.lost().is_some() || pulse.is_over();
        let group = Communicators::join(id, of, first, &devices, &gone).map_err(lost)?;
        let group = Arc::new(group);
        let weak = Arc::downgrade(&group);
        let abort = move |pulse: &Pulse| {
            // A leader that leaves waits for nobody.
            if let (Some(group), true) = (weak.upgrade(), !leads || pulse.lost().is_some()) {
                group.abort();
            }
        };
        pulse.at_end(abort).map_err(|error| {
            let message = format!("watching a group of GPUs: {error}");
            ExecutorError { message, fatal: true }
        })?;
        self.model.collective = Collective::Nccl(group);
        Ok(self.model)
    }

    /// Its executor, once it has joined.
    fn executor(
        self,
        id: &UniqueId,
        pulse: &Pulse,
        options: &CudaOptions,
    ) -> Result<CudaExecutor, ExecutorError> {
        let model = self.join(id, pulse)?;
        CudaExecutor::new(Arc::new(model), options)
    }
}

/// Leads the ranks of a model that other processes share: waits on `listener` for them.
///
/// # Errors
/// [`JoinError`](crate::collective::hosts::JoinError); as [`CudaExecutor::new`]; NCCL does not reach
/// the others.
pub fn lead(
    part: CudaPart,
    options: &CudaOptions,
    times: HostTimes,
    listener: &TcpListener,
) -> Result<Box<dyn Executor>, LeadError> {
    let CudaOptions { page_size, kv_tokens, chunk_tokens } = *options;
    let terms = Terms { page_size, chunk_tokens, kv_tokens, silence_max: times.silence_max };
    let place = part.place;
    let (peers, pulse) = gather(listener, &part.member(), terms, times.join_timeout)?;
    let others = Arc::new(Mutex::new(Others::Followers(peers)));
    let elsewhere = Elsewhere::new(others, pulse.clone(), place);
    let id = UniqueId::new().map_err(lost).map_err(|error| elsewhere.failed(&error))?;
    elsewhere.tell(Kind::Group, |out| out.extend(id.bytes()))?;
    let local = part.executor(&id, &pulse, options);
    let local = local.map_err(|error| elsewhere.failed(&error))?;
    Ok(Box::new(Leading::new(local, elsewhere)))
}

/// Runs this place's ranks until the leader says goodbye. `find` looks the leader's address up
/// before each try to reach it, for `join_timeout`; `ready` is called once all have joined.
///
/// # Errors
/// [`FollowError`].
pub fn follow(
    part: CudaPart,
    join_timeout: Duration,
    find: &mut dyn FnMut() -> Result<String, String>,
    ready: &mut dyn FnMut(),
) -> Result<(), FollowError> {
    let (place, member) = (part.place, part.member());
    let Joined { mut link, pulse, watching, terms } = join(find, &member, join_timeout)?;
    let following = Following { place, pulse: pulse.clone(), watching };
    let options = CudaOptions {
        page_size: terms.page_size,
        kv_tokens: terms.kv_tokens,
        chunk_tokens: terms.chunk_tokens,
    };
    let told = link.receive(&[Kind::Group], UniqueId::BYTES).map(|(_, id)| id.try_into().ok());
    let id = told.and_then(|id| id.ok_or_else(|| link.malformed()));
    let joined = id.map_err(FollowError::from).and_then(|id| {
        let ranks = part.executor(&UniqueId::of(id), &pulse, &options);
        ranks.map_err(FollowError::from)
    });
    match joined {
        Ok(ranks) => {
            ready();
            following.serve(ranks, &Mutex::new(Others::Leader(link)))
        }
        Err(error) => following.end(error),
    }
}

impl LocalRanks for CudaExecutor {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn format(&self) -> Option<KvFormat> {
        self.format_of_all()
    }

    fn check(&self, rows: &[Row<'_>]) -> Result<(), ExecutorError> {
        self.limits.check(rows)?;
        self.batches.check(rows.len())
    }

    fn run(&mut self, rows: &[Row<'_>]) -> Result<Partials, ExecutorError> {
        self.submit(rows)?;
        let ranks = self.ranks.len();
        self.batches.collect_apart(ranks)
    }

    fn page_bytes(&self) -> usize {
        self.local_page_bytes()
    }

    fn copy_out(&mut self, page: PageId, out: &mut [u8]) -> Result<(), ExecutorError> {
        self.page_out(page, out)
    }

    fn copy_in(&mut self, page: PageId, data: &[u8]) -> Result<(), ExecutorError> {
        self.page_in(page, data)
    }
}
