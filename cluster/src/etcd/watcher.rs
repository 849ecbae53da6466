//! Follows the records: one list, then a watch from its revision; again after every break.

use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{Client, GetOptions, KeyValue, WatchOptions, WatchResponse};
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use headstart_proto::NodeId;
use tokio::sync::watch;

use super::link::{Backoff, CallError, Link};
use super::look::look;
use crate::tracker::Tracker;
use crate::{ClusterError, LEASE_TTL, NodeRecord, View};

/// How long a node that an outage made vanish has to register again before it is looked at, and
/// from one look at a lingering node to the next.
const GRACE: Duration = LEASE_TTL;

/// What one list brought.
pub(super) struct Listed {
    client: Box<Client>,
    records: Vec<NodeRecord>,
    revision: i64,
}

impl Listed {
    pub(super) fn view(&self) -> View {
        let nodes = self.records.iter().map(|r| (r.node_id.clone(), r.clone())).collect();
        View { nodes }
    }
}

/// Why following ended.
enum Break {
    /// The watched revision was compacted away; the connection is sound.
    Compacted,
    Lost(CallError),
}

/// The first list, retried until the link's timeout is over.
pub(super) async fn first_list(link: &Link) -> Result<Listed, ClusterError> {
    link.within_timeout(|| async { list(link, link.open().await?).await }).await
}

async fn list(link: &Link, mut client: Box<Client>) -> Result<Listed, CallError> {
    let options = GetOptions::new().with_prefix();
    let mut answer = link.call(client.get(link.prefix(), Some(options))).await?;
    let revision = answer.take_header().map_or(0, |header| header.revision());
    let records = answer.kvs().iter().filter_map(|kv| read(link, kv)).collect();
    Ok(Listed { client, records, revision })
}

/// The record in a key; a malformed one is passed over with a warning.
fn read(link: &Link, kv: &KeyValue) -> Option<NodeRecord> {
    let id = node_id(link, kv)?;
    match NodeRecord::from_json(kv.value()) {
        Ok(record) if record.node_id == id => Some(record),
        Ok(record) => {
            tracing::warn!(key = %id, found = %record.node_id, "ignored a record under another node's key");
            None
        }
        Err(error) => {
            tracing::warn!(key = %id, %error, "ignored a malformed node record");
            None
        }
    }
}

fn node_id(link: &Link, kv: &KeyValue) -> Option<NodeId> {
    let key = std::str::from_utf8(kv.key()).ok()?;
    NodeId::new(key.strip_prefix(link.prefix())?).ok()
}

/// Follows the records for ever.
pub(super) async fn run(link: Link, first: Listed, view: watch::Sender<Arc<View>>) {
    let mut tracker = Tracker::default();
    let mut listed = first;
    let mut grace = GRACE;
    loop {
        tracker.list(listed.records, Instant::now(), grace);
        publish(&tracker, &view);
        let (client, why) =
            follow(&link, listed.client, listed.revision + 1, &mut tracker, &view).await;
        (listed, grace) = match why {
            Break::Compacted => {
                tracing::debug!("the watched revision was compacted; listing again");
                match list(&link, client).await {
                    // etcd was there all the time: who is missing had its time.
                    Ok(listed) => (listed, Duration::ZERO),
                    Err(error) => (reconnect(&link, &error).await, GRACE),
                }
            }
            Break::Lost(error) => (reconnect(&link, &error).await, GRACE),
        };
    }
}

/// Lists again as soon as etcd answers. Meanwhile the last view stays.
async fn reconnect(link: &Link, cause: &CallError) -> Listed {
    let endpoints = link.endpoints();
    tracing::warn!(%endpoints, error = %cause, "etcd is away; the last view stays");
    let mut backoff = Backoff::default();
    loop {
        let attempt = async { list(link, link.open().await?).await };
        match attempt.await {
            Ok(listed) => {
                tracing::info!(%endpoints, "etcd is back");
                return listed;
            }
            Err(error) => tracing::debug!(%endpoints, %error, "etcd is still away"),
        }
        backoff.pause().await;
    }
}

/// Applies events until the watch breaks.
async fn follow(
    link: &Link,
    mut client: Box<Client>,
    revision: i64,
    tracker: &mut Tracker,
    view: &watch::Sender<Arc<View>>,
) -> (Box<Client>, Break) {
    let options = WatchOptions::new().with_prefix().with_start_revision(revision);
    let mut stream = match link.call(client.watch(link.prefix(), Some(options))).await {
        Ok(stream) => stream,
        Err(error) => return (client, Break::Lost(error)),
    };
    let mut looks = Looks::default();
    loop {
        tokio::select! {
            answer = stream.message() => match answer {
                Ok(Some(answer)) if answer.canceled() => {
                    let why = match answer.compact_revision() {
                        0 => Break::Lost(CallError::Ended("etcd cancelled the watch")),
                        _ => Break::Compacted,
                    };
                    return (client, why);
                }
                Ok(Some(answer)) => apply(link, &answer, tracker),
                Ok(None) => return (client, Break::Lost(CallError::Ended("etcd ended the watch"))),
                Err(error) => return (client, Break::Lost(error.into())),
            },
            Some((record, answered)) = looks.next() => tracker.looked(&record, answered),
            () = at(tracker.next_due()) => {
                let now = Instant::now();
                for record in tracker.due(now, now + GRACE) {
                    looks.push(Box::pin(look(record)));
                }
            }
        }
        publish(tracker, view);
    }
}

/// Looks at lingering nodes that have not ended.
type Looks = FuturesUnordered<BoxFuture<'static, (NodeRecord, bool)>>;

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

fn apply(link: &Link, answer: &WatchResponse, tracker: &mut Tracker) {
    for kv in answer.events().iter().filter_map(|event| event.kv()) {
        // A deletion resets a key's version to zero.
        let record = if kv.version() == 0 { None } else { read(link, kv) };
        match (record, node_id(link, kv)) {
            (Some(record), _) => tracker.put(record),
            (None, Some(id)) => tracker.vanished(&id, Instant::now()),
            (None, None) => {}
        }
    }
}

fn publish(tracker: &Tracker, view: &watch::Sender<Arc<View>>) {
    view.send_if_modified(|current| {
        let changed = **current != *tracker.view();
        if changed {
            *current = Arc::new(tracker.view().clone());
        }
        changed
    });
}
