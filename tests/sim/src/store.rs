//! The membership store, as each host sees it: it may be away, cut off from a host, late, and it
//! lets the records of those who cannot reach it expire.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use headstart_cluster::{ClusterError, InMemory, Membership, NodeRecord, Registration, View};
use headstart_proto::NodeId;
use tokio::sync::watch;
use tokio::time::sleep;

/// How long a host tries to reach the store before it gives up.
const PATIENCE: Duration = Duration::from_millis(500);

/// What is wrong with the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Faults {
    /// Nobody reaches it.
    away: bool,
    /// These hosts do not reach it.
    cut: BTreeSet<String>,
    /// These nodes' records have expired though they live.
    expired: BTreeSet<String>,
    /// News come so late.
    late: Duration,
}

/// The store. Clones share it.
#[derive(Clone, Debug)]
pub struct Store {
    inner: InMemory,
    faults: watch::Sender<Faults>,
    starts: Arc<AtomicU64>,
}

impl Default for Store {
    fn default() -> Self {
        let (faults, _) = watch::channel(Faults::default());
        Self { inner: InMemory::new(), faults, starts: Arc::default() }
    }
}

impl Store {
    /// The store as `host` sees it.
    #[must_use]
    pub fn of(&self, host: &str) -> HostStore {
        HostStore { store: self.clone(), host: host.to_owned() }
    }

    /// Takes the store away or brings it back.
    pub fn away(&self, away: bool) {
        self.faults.send_modify(|faults| faults.away = away);
    }

    /// Cuts a host off from the store or lets it reach it.
    pub fn cut(&self, host: &str, cut: bool) {
        self.faults.send_modify(|faults| set(&mut faults.cut, host, cut));
    }

    /// Lets a live host's record expire, or lets the host register again.
    pub fn expire(&self, host: &str, expired: bool) {
        self.faults.send_modify(|faults| set(&mut faults.expired, host, expired));
    }

    /// Lets news come so late.
    pub fn late(&self, late: Duration) {
        self.faults.send_modify(|faults| faults.late = late);
    }

    /// Everything is well again.
    pub fn mend(&self) {
        self.faults.send_replace(Faults::default());
    }

    /// The nodes that are registered, as somebody sees them who reaches the store.
    #[must_use]
    pub fn view(&self) -> Arc<View> {
        self.inner.watch().borrow().clone()
    }
}

fn set(names: &mut BTreeSet<String>, name: &str, there: bool) {
    if there {
        names.insert(name.to_owned())
    } else {
        names.remove(name)
    };
}

/// The store as one host sees it.
#[derive(Clone, Debug)]
pub struct HostStore {
    store: Store,
    host: String,
}

impl Membership for HostStore {
    fn register(
        &self,
        mut record: NodeRecord,
        ttl: Duration,
    ) -> BoxFuture<'_, Result<Registration, ClusterError>> {
        Box::pin(async move {
            let mut faults = self.store.faults.subscribe();
            let reached = faults.wait_for(|f| !f.away && !f.cut.contains(&self.host));
            if tokio::time::timeout(PATIENCE, reached).await.is_err() {
                return Err(ClusterError::Unreachable {
                    endpoints: "store".into(),
                    timeout: PATIENCE,
                    cause: "the simulated store is away".into(),
                });
            }
            // Wall clocks have no place here: the starts of all nodes are counted instead.
            record.incarnation = self.store.starts.fetch_add(1, Ordering::Relaxed) + 1;
            self.store.inner.register(record, ttl).await
        })
    }

    fn watch(&self) -> watch::Receiver<Arc<View>> {
        let (view, receiver) = watch::channel(Arc::default());
        tokio::spawn(follow(self.clone(), view));
        receiver
    }
}

/// Tells one host's watch what it gets to see.
async fn follow(of: HostStore, view: watch::Sender<Arc<View>>) {
    let mut nodes = of.store.inner.watch();
    let mut faults = of.store.faults.subscribe();
    loop {
        let now = faults.borrow_and_update().clone();
        if !now.away && !now.cut.contains(&of.host) {
            if !now.late.is_zero() {
                sleep(now.late).await;
            }
            let mut seen = View::clone(&nodes.borrow_and_update());
            seen.nodes.retain(|id: &NodeId, _| !now.expired.contains(id.as_str()));
            view.send_if_modified(|known| {
                let news = **known != seen;
                if news {
                    *known = Arc::new(seen);
                }
                news
            });
        }
        tokio::select! {
            biased;
            () = view.closed() => return,
            changed = nodes.changed() => if changed.is_err() { return },
            changed = faults.changed() => if changed.is_err() { return },
        }
    }
}
