//! KV that leaves this base, and KV that comes in: the node's side of [`headstart_handoff`].

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use futures::StreamExt;
use headstart_cluster::BaseRole;
use headstart_engine::{EngineHandle, Generation, Import, KvFormat};
use headstart_handoff::rates::{Rates, patience};
use headstart_handoff::{KvTransport, Leases, Offer, Progress, Source, Tcp, Times, pull, serve};
use headstart_proto::{Epoch, Error, RequestId, v1};
use headstart_service::net::Listener;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::AbortOnDropHandle;

use crate::metrics::{self, Held, KV_LEASES, KV_PULLS};

/// Connections to the KV service at once.
const CONNECTIONS_MAX: usize = 256;

/// How a base takes part in handing KV over.
pub struct KvOptions {
    /// What it does of an answer.
    pub role: BaseRole,
    /// Where its KV service listens; `None`: it gives none away.
    pub listener: Option<Listener>,
    /// How others reach the listener, `host:port`; empty if there is none.
    pub address: String,
    /// How it reaches others.
    pub transport: Arc<dyn KvTransport>,
    /// How long either side waits.
    pub times: Times,
}

impl Default for KvOptions {
    /// A unified base that gives nothing away.
    fn default() -> Self {
        Self {
            role: BaseRole::Unified,
            listener: None,
            address: String::new(),
            transport: Arc::new(Tcp),
            times: Times::default(),
        }
    }
}

impl fmt::Debug for KvOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { role, listener, address, times, .. } = self;
        f.debug_struct("KvOptions")
            .field("role", role)
            .field("listener", listener)
            .field("address", address)
            .field("times", times)
            .finish_non_exhaustive()
    }
}

/// See the [module](self).
pub struct Kv {
    engine: EngineHandle,
    /// `None`: the engine's pages cannot leave it, nor others come in.
    format: Option<KvFormat>,
    leases: Leases,
    address: String,
    transport: Arc<dyn KvTransport>,
    times: Times,
    pulls: Mutex<HashMap<RequestId, Pull>>,
    pulls_max: usize,
    /// As last measured, in bytes a second.
    link: AtomicU64,
    /// Ends the service.
    _service: DropGuard,
}

/// A pull under way, or what it brought.
struct Pull {
    source: Source,
    import: Arc<Import>,
    progress: watch::Receiver<Progress>,
    /// Tells this pull from one that took its place.
    number: u64,
    task: AbortOnDropHandle<()>,
    /// Dropped with the pull: tells who asked for it that it is taken or given up.
    _wanted: oneshot::Sender<()>,
    _held: Held,
}

/// A pull that was asked for ahead. Dropping it gives up what no request has taken by then.
#[derive(Debug)]
pub struct Prefetch {
    kv: Weak<Kv>,
    id: RequestId,
    number: u64,
    over: oneshot::Receiver<()>,
}

impl Prefetch {
    /// Waits until a request has taken what was pulled, or its time is over.
    pub async fn over(mut self) {
        let _ = (&mut self.over).await;
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        if let Some(kv) = self.kv.upgrade() {
            kv.forget(&self.id, self.number);
        }
    }
}

/// Pages on offer to another base. Dropping it ends the lease.
#[derive(Debug)]
pub struct Lease {
    offer: Offer,
    _held: Held,
}

/// Pages that wait in the cache for their request.
pub struct Hold {
    _import: Arc<Import>,
}

static PULLS: AtomicU64 = AtomicU64::new(0);

impl Kv {
    /// The KV of `engine`, served as `options` say.
    #[must_use]
    pub fn new(engine: &EngineHandle, options: KvOptions) -> Arc<Self> {
        let KvOptions { listener, address, transport, times, .. } = options;
        let format = engine.kv_format();
        let slots = engine.stats().slots;
        let leases = Leases::new(CONNECTIONS_MAX);
        let stop = CancellationToken::new();
        if let (Some(listener), Some(format)) = (listener, format) {
            tokio::spawn(accept(listener, leases.clone(), format, times, stop.clone()));
        }
        Arc::new(Self {
            engine: engine.clone(),
            format,
            leases,
            address: if format.is_some() { address } else { String::new() },
            transport,
            times,
            pulls: Mutex::default(),
            // A request that waits, and one that its slot will have next.
            pulls_max: 2 * slots,
            link: AtomicU64::new(0),
            _service: stop.drop_guard(),
        })
    }

    /// Leases that run.
    #[must_use]
    pub fn leases(&self) -> usize {
        self.leases.len()
    }

    /// Readers of leases, those that wait for one included.
    #[must_use]
    pub fn readers(&self) -> usize {
        self.leases.readers()
    }

    /// Pulls that run or whose request has not come yet.
    #[must_use]
    pub fn pulls(&self) -> usize {
        self.lock().len()
    }

    /// Offers the pages of `generation` to whoever goes on with its request.
    pub async fn offer(
        &self,
        id: &RequestId,
        epoch: Epoch,
        generation: &Generation,
    ) -> Option<Lease> {
        if self.address.is_empty() {
            return None;
        }
        let export = generation.export().await.ok()?;
        let offer = self.leases.offer(id, epoch, export)?;
        Some(Lease { offer, _held: Held::new(KV_LEASES) })
    }

    /// Where the pages of an attempt are to be had.
    #[must_use]
    pub fn source(&self, id: &RequestId, epoch: Epoch) -> v1::KvSource {
        let (request_id, epoch) = (id.to_string(), epoch.get());
        v1::KvSource { address: self.address.clone(), request_id, epoch }
    }

    /// Keeps a lease for a reader, once its session is over, and until `gone`: then nobody goes on
    /// with the request.
    pub async fn keep(&self, lease: Lease, gone: impl Future<Output = ()>) {
        let end = tokio::select! {
            biased;
            pulled = lease.offer.until_pulled(self.times.lease) => {
                if pulled { "pulled" } else { "expired" }
            }
            () = gone => "cancelled",
        };
        metrics::kv_lease_ended(end);
    }

    /// Starts to pull what `id` will go on from, for as long as the [`Prefetch`] lives. One pull a
    /// request; a table that is full of them, or a source that makes no sense, is no error: this is
    /// only a hint.
    #[must_use]
    pub fn prefetch(self: &Arc<Self>, id: &RequestId, source: &v1::KvSource) -> Option<Prefetch> {
        let (Some(format), Ok(source)) = (self.format, wanted(source)) else { return None };
        let mut pulls = self.lock();
        if pulls.get(id).is_some_and(|pull| pull.source == source) {
            return None;
        }
        if pulls.len() >= self.pulls_max && !pulls.contains_key(id) {
            return None;
        }
        let import = Arc::new(self.engine.import());
        let number = PULLS.fetch_add(1, Ordering::Relaxed);
        let (sender, progress) = watch::channel(Progress::default());
        let run = {
            let (kv, id) = (Arc::downgrade(self), id.clone());
            let (transport, times) = (Arc::clone(&self.transport), self.times);
            let (source, import) = (source.clone(), Arc::clone(&import));
            async move {
                let pulled = pull(&*transport, &source, format, &import, &sender, times).await;
                let outcome = pulled.as_ref().map_or_else(|error| error.code(), |()| "whole");
                metrics::kv_pulled(outcome, sender.borrow().bytes);
                if let Err(error) = pulled {
                    tracing::debug!(request_id = %id, address = source.address, %error, "KV pull ended early");
                }
                drop(import);
                // A request that does not come in this time does not come.
                tokio::time::sleep(times.lease).await;
                if let Some(kv) = kv.upgrade() {
                    kv.forget(&id, number);
                }
            }
        };
        let task = AbortOnDropHandle::new(tokio::spawn(run));
        let (wanted, over) = oneshot::channel();
        let _held = Held::new(KV_PULLS);
        let pull = Pull { source, import, progress, number, task, _wanted: wanted, _held };
        let earlier = pulls.insert(id.clone(), pull);
        drop(pulls);
        drop(earlier);
        Some(Prefetch { kv: Arc::downgrade(self), id: id.clone(), number, over })
    }

    /// Waits for the KV of a request's first `tokens`, as long as that is faster than to compute
    /// what is missing. What has arrived is in the cache while the hold lives.
    pub async fn wait(
        self: &Arc<Self>,
        id: &RequestId,
        source: &v1::KvSource,
        tokens: usize,
    ) -> Option<Hold> {
        let layout = self.format?.layout;
        let started = self.prefetch(id, source);
        let Pull { import, mut progress, task, _held, .. } = self.lock().remove(id)?;
        drop(started);
        // The last token is extended again, for its result.
        let wanted = tokens.saturating_sub(1);
        let mut deadline: Option<Instant> = None;
        let arrived = loop {
            let now = *progress.borrow_and_update();
            self.measure(now);
            let missing = wanted.saturating_sub(now.tokens);
            let worth = patience(missing, layout.token_bytes(), self.rates());
            let until = *deadline.get_or_insert_with(|| Instant::now() + worth);
            if missing == 0 || now.over || worth.is_zero() {
                break now.tokens;
            }
            match timeout_at(until, progress.changed()).await {
                Ok(Ok(())) => {}
                _ => break progress.borrow().tokens,
            }
        };
        // What is not here yet comes too late.
        if arrived < wanted {
            drop(task);
        } else {
            tokio::spawn(async move {
                // The sender is told that everything is taken.
                let _ = progress.wait_for(|progress| progress.over).await;
                drop(task);
            });
        }
        metrics::kv_resumed(arrived.min(wanted), wanted.saturating_sub(arrived));
        Some(Hold { _import: import })
    }

    fn rates(&self) -> Rates {
        Rates {
            link_bytes_per_second: self.link.load(Ordering::Relaxed),
            prefill_tokens_per_second: self.engine.stats().prefill_tokens_per_second,
        }
    }

    fn measure(&self, progress: Progress) {
        let seconds = progress.receiving.as_secs_f64();
        if progress.bytes > 0 && seconds > 0.0 {
            self.link.store((progress.bytes as f64 / seconds) as u64, Ordering::Relaxed);
        }
    }

    fn forget(&self, id: &RequestId, number: u64) {
        let mut pulls = self.lock();
        let forgotten = match pulls.get(id) {
            Some(pull) if pull.number == number => pulls.remove(id),
            _ => None,
        };
        drop(pulls);
        // Its pages are given back outside the lock.
        drop(forgotten);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RequestId, Pull>> {
        // Every critical section leaves the map whole.
        self.pulls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wanted(source: &v1::KvSource) -> Result<Source, Error> {
    Ok(Source {
        address: source.address.clone(),
        request_id: RequestId::new(&source.request_id)?,
        epoch: Epoch::new(source.epoch)?,
    })
}

/// Serves connections until `stop`.
async fn accept(
    listener: Listener,
    leases: Leases,
    format: KvFormat,
    times: Times,
    stop: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut incoming = listener.into_incoming();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = tokio::select! {
            () = stop.cancelled() => return,
            accepted = incoming.next() => match accepted {
                None => return,
                Some(Ok(stream)) => stream,
                Some(Err(error)) => {
                    // Such as too many open files: others may close some.
                    tracing::warn!(%error, "accept a KV connection");
                    tokio::time::sleep(times.alive).await;
                    continue;
                }
            },
        };
        let (leases, stop) = (leases.clone(), stop.clone());
        tokio::spawn(async move {
            let _place = place;
            tokio::select! {
                () = stop.cancelled() => {}
                served = serve(stream, &leases, format, times, metrics::kv_sent) => {
                    if let Err(error) = served {
                        tracing::debug!(%error, "KV connection ended early");
                    }
                }
            }
        });
    }
}
