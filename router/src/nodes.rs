//! The nodes this router knows: a link to each, what runs on it, whether it is believed to be well.
//! A node that is not is probed in the background until it answers.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use headstart_cluster::{NodeRecord, Tier, View};
use headstart_proto::v1::InfoRequest;
use headstart_proto::v1::node_client::NodeClient;
use headstart_proto::{Error, ErrorCode, NodeId};
use headstart_service::channel::KeepAlive;
use headstart_service::link::Link;
use headstart_service::net::Dialer;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::chance::Chance;
use crate::lanes;
use crate::options::RouterOptions;
use crate::route::{Candidate, Snapshot};
use crate::suspicion::Health;

/// How long a suspected node may take to answer a probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// One start of one node.
#[derive(Debug)]
struct Node {
    id: NodeId,
    address: String,
    incarnation: u64,
    /// A way to it for each lane, and one for everybody else.
    links: Box<[Link]>,
    in_flight: AtomicU32,
    belief: Mutex<Belief>,
    /// Told when a suspicion begins or ends.
    changed: Arc<Notify>,
    chance: Arc<Chance>,
}

#[derive(Debug, Default)]
struct Belief {
    health: Health,
    /// A task probes the node.
    probing: bool,
}

impl Node {
    /// The way to it from this thread's lane.
    fn link(&self) -> Link {
        let lane = lanes::current();
        self.links.get(lane).unwrap_or(&self.links[0]).clone()
    }

    fn belief(&self) -> MutexGuard<'_, Belief> {
        self.belief.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call ended: well, or with this code.
    fn told(self: &Arc<Self>, outcome: Option<ErrorCode>) {
        let mut belief = self.belief();
        let (now, health) = (Instant::now(), &mut belief.health);
        let changed = match outcome {
            None => health.answered(),
            Some(ErrorCode::Unavailable) => health.broke(now, self.chance.permille()),
            Some(ErrorCode::Internal | ErrorCode::Protocol | ErrorCode::DeadlineExceeded) => {
                health.failed(now, self.chance.permille())
            }
            // The rest says nothing bad about the node.
            Some(_) => false,
        };
        if changed {
            let suspected = health.suspected_since().is_some();
            if suspected && !std::mem::replace(&mut belief.probing, true) {
                tokio::spawn(probe(Arc::downgrade(self)));
            }
            drop(belief);
            self.log(suspected);
        }
    }

    fn log(&self, suspected: bool) {
        match suspected {
            true => tracing::warn!(node_id = %self.id, "node is suspected: left out and probed"),
            false => tracing::info!(node_id = %self.id, "node answers again"),
        }
        self.changed.notify_one();
    }

    /// When to probe next; `None` ends the probing.
    fn next_probe(&self) -> Option<Instant> {
        let mut belief = self.belief();
        let at = belief.health.probe_at();
        belief.probing = at.is_some();
        at
    }
}

/// Probes a suspected node until it is well or forgotten.
async fn probe(node: Weak<Node>) {
    loop {
        let Some((at, link)) =
            node.upgrade().and_then(|node| Some((node.next_probe()?, node.link())))
        else {
            return;
        };
        tokio::time::sleep_until(at).await;
        let call = async move { NodeClient::new(link).info(InfoRequest {}).await };
        let answer = tokio::time::timeout(PROBE_TIMEOUT, call).await;
        let Some(node) = node.upgrade() else { return };
        // Another process may have got the address.
        let well = matches!(answer, Ok(Ok(info)) if info.get_ref().node_id == node.id.as_str());
        if node.belief().health.probed(well, Instant::now(), node.chance.permille()) {
            node.log(false);
        }
    }
}

/// One answer's place on a node; dropping it gives the place back.
#[derive(Debug)]
pub(crate) struct Place {
    node: Arc<Node>,
}

impl Place {
    /// The way to the node from this thread.
    pub(crate) fn link(&self) -> Link {
        self.node.link()
    }

    /// What became of a call to the node: `None` is success. A broken connection takes the node out
    /// of choice at once, as many failures in a row do.
    pub(crate) fn told(&self, outcome: Option<ErrorCode>) {
        self.node.told(outcome);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.node.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Nodes {
    dialer: Dialer,
    connect_timeout: Duration,
    keep_alive: KeepAlive,
    lanes: usize,
    changed: Arc<Notify>,
    chance: Arc<Chance>,
    known: Mutex<HashMap<NodeId, Arc<Node>>>,
}

impl Nodes {
    /// No nodes yet; they are reached as `options` say.
    pub(crate) fn new(options: &RouterOptions, chance: Arc<Chance>) -> Self {
        Self {
            dialer: options.dialer.clone(),
            connect_timeout: options.connect_timeout,
            keep_alive: options.keep_alive,
            lanes: options.http_threads as usize,
            changed: Arc::default(),
            chance,
            known: Mutex::default(),
        }
    }

    /// Waits until a suspicion has begun or ended.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, Arc<Node>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what is no longer in `view`. Answers that run on a forgotten node keep its link.
    pub(crate) fn retain(&self, view: &View) {
        self.lock().retain(|id, node| {
            view.nodes.get(id).is_some_and(|record| {
                record.incarnation == node.incarnation && record.address == node.address
            })
        });
    }

    /// What routing looks at.
    pub(crate) fn snapshot<'a>(&self, view: &'a View) -> Snapshot<'a> {
        let (known, now) = (self.lock(), Instant::now());
        let candidates = |tier| {
            view.tier(tier)
                .map(|record| {
                    let node = known.get(&record.node_id);
                    let in_flight = node.map_or(0, |node| node.in_flight.load(Ordering::Relaxed));
                    let since = node.and_then(|node| node.belief().health.suspected_since());
                    let suspected_for = since.map(|since| now.saturating_duration_since(since));
                    Candidate { record, in_flight, suspected_for }
                })
                .collect()
        };
        Snapshot { bases: candidates(Tier::Base), drafters: candidates(Tier::Drafter) }
    }

    /// Places taken on all nodes that are known.
    pub(crate) fn places(&self) -> usize {
        self.lock().values().map(|node| node.in_flight.load(Ordering::Relaxed) as usize).sum()
    }

    /// Takes a place for one answer on `record`'s node.
    ///
    /// # Errors
    /// When the node's address is malformed.
    pub(crate) fn place(&self, record: &NodeRecord) -> Result<Place, Error> {
        let node = self.node(record)?;
        node.in_flight.fetch_add(1, Ordering::Relaxed);
        Ok(Place { node })
    }

    /// The way to `record`'s node from this thread.
    ///
    /// # Errors
    /// When the node's address is malformed.
    pub(crate) fn link(&self, record: &NodeRecord) -> Result<Link, Error> {
        Ok(self.node(record)?.link())
    }

    fn node(&self, record: &NodeRecord) -> Result<Arc<Node>, Error> {
        let mut known = self.lock();
        if let Some(node) = known.get(&record.node_id)
            && node.address == record.address
            && node.incarnation == record.incarnation
        {
            return Ok(Arc::clone(node));
        }
        let (timeout, keep_alive) = (self.connect_timeout, self.keep_alive);
        let link = || Link::new(&self.dialer, &record.address, timeout, keep_alive);
        let node = Arc::new(Node {
            id: record.node_id.clone(),
            address: record.address.clone(),
            incarnation: record.incarnation,
            links: (0..=self.lanes).map(|_| link()).collect::<Result<_, _>>()?,
            in_flight: AtomicU32::new(0),
            belief: Mutex::default(),
            changed: Arc::clone(&self.changed),
            chance: Arc::clone(&self.chance),
        });
        known.insert(record.node_id.clone(), Arc::clone(&node));
        Ok(node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use headstart_proto::v1::node_server::NodeServer;
    use headstart_service::node_service::{NodeService, NodeStatus};
    use headstart_service::server::{GrpcServer, RunningServer};
    use headstart_text::ModelText;
    use tokio::net::TcpListener;
    use tokio_util::sync::CancellationToken;

    fn nodes() -> Nodes {
        let connect_timeout = Duration::from_secs(1);
        let options = RouterOptions { connect_timeout, ..RouterOptions::default() };
        Nodes::new(&options, Arc::new(Chance::new(None)))
    }

    fn record(address: &str) -> NodeRecord {
        NodeRecord {
            node_id: NodeId::new("b1").unwrap(),
            tier: Tier::Base,
            address: address.into(),
            model: "big".into(),
            tokenizer_fingerprint: "t".into(),
            text_fingerprint: "t".into(),
            context_length: 512,
            slots: 4,
            kv_tokens: 0,
            draining: false,
            incarnation: 1,
            base_role: headstart_cluster::BaseRole::Unified,
            kv_address: String::new(),
        }
    }

    async fn serve(record: &NodeRecord) -> RunningServer {
        let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/stories260k");
        let text = ModelText::load(fixture.as_ref()).unwrap();
        let stop = CancellationToken::new();
        let node = NodeService::new(record, &text, "f32", NodeStatus::default, stop);
        let listener = TcpListener::bind(&record.address).await.unwrap();
        GrpcServer::new().unwrap().add(NodeServer::new(node)).start(listener).await
    }

    fn is_suspected(nodes: &Nodes, record: &NodeRecord) -> bool {
        let view = View { nodes: [(record.node_id.clone(), record.clone())].into() };
        nodes.snapshot(&view).bases[0].suspected_for.is_some()
    }

    #[tokio::test]
    async fn a_suspected_node_is_probed_until_it_answers_under_its_own_name() {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let record = record(&free.to_string());
        let nodes = nodes();
        let place = nodes.place(&record).unwrap();
        place.told(Some(ErrorCode::Overloaded));
        assert!(!is_suspected(&nodes, &record), "to be full is no fault");
        place.told(Some(ErrorCode::Unavailable));
        assert!(is_suspected(&nodes, &record));
        nodes.changed().await;
        // Another process that got the address is not the node.
        let stranger = NodeRecord { node_id: NodeId::new("other").unwrap(), ..record.clone() };
        let other = serve(&stranger).await;
        let unchanged = tokio::time::timeout(Duration::from_millis(600), nodes.changed()).await;
        assert!(unchanged.is_err() && is_suspected(&nodes, &record));
        other.stop().await;
        let _server = serve(&record).await;
        tokio::time::timeout(Duration::from_secs(60), nodes.changed())
            .await
            .expect("it comes back");
        assert!(!is_suspected(&nodes, &record));
        // And the second suspicion finds a prober again.
        place.told(Some(ErrorCode::Unavailable));
        nodes.changed().await;
        assert!(is_suspected(&nodes, &record));
        tokio::time::timeout(Duration::from_secs(60), nodes.changed()).await.expect("and again");
    }

    #[tokio::test]
    async fn a_call_that_goes_well_ends_a_suspicion() {
        let record = record("127.0.0.1:9");
        let nodes = nodes();
        let place = nodes.place(&record).unwrap();
        place.told(Some(ErrorCode::Unavailable));
        place.told(None);
        assert!(!is_suspected(&nodes, &record));
    }
}
