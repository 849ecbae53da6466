//! Keeps one node's record alive.

use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, LeaseKeepAliveStream, LeaseKeeper, PutOptions, Txn, TxnOp,
};
use tokio::sync::oneshot;

use super::link::{Backoff, CallError, Link};
use crate::registration::{Held, Wish};
use crate::{ClusterError, NodeRecord};

/// Keeps one record in etcd until its holder leaves or is gone.
pub(super) struct Holder {
    link: Link,
    held: Held,
    ttl: Duration,
    hold: Option<Hold>,
}

/// A live lease with the record attached.
struct Hold {
    client: Box<Client>,
    lease: i64,
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
    interval: Duration,
}

/// How putting a record ended.
enum Put {
    Stored,
    /// A later start of the node is registered.
    Superseded(u64),
}

/// Why a holder stops.
enum End {
    Leave(oneshot::Sender<()>),
    Abandon,
    Superseded(u64),
}

impl Holder {
    /// Stores the record for the first time.
    pub(super) async fn register(
        link: Link,
        held: Held,
        record: &NodeRecord,
        ttl: Duration,
    ) -> Result<Self, ClusterError> {
        let outcome = link.within_timeout(|| establish(&link, record, ttl, None)).await?;
        match outcome {
            Ok(hold) => Ok(Self { link, held, ttl, hold: Some(hold) }),
            Err(incarnation) => {
                let node_id = record.node_id.clone();
                Err(ClusterError::Superseded { node_id, incarnation })
            }
        }
    }

    /// Keeps the record until the end of its registration.
    pub(super) async fn run(mut self) {
        let node_id = self.held.node_id();
        match self.keep().await {
            End::Leave(done) => {
                let record = NodeRecord { draining: true, ..self.held.record() };
                if let Some(hold) = &mut self.hold
                    && let Err(error) = hold.leave(&self.link, &record).await
                {
                    tracing::warn!(%node_id, %error, "could not deregister; the lease will run out");
                }
                let _ = done.send(());
            }
            End::Abandon => {}
            End::Superseded(incarnation) => {
                tracing::error!(%node_id, incarnation, "a later start of this node took its record");
            }
        }
    }

    async fn keep(&mut self) -> End {
        let mut backoff = Backoff::default();
        let mut lease = None;
        loop {
            if let Some(hold) = &mut self.hold {
                lease = Some(hold.lease);
                match hold.keep(&self.link, &mut self.held).await {
                    Ok(end) => return end,
                    Err(error) => {
                        let node_id = self.held.node_id();
                        tracing::warn!(%node_id, %error, "lost the hold on the node record");
                        self.hold = None;
                        backoff = Backoff::default();
                    }
                }
            }
            let pause = backoff.next();
            let attempt = async {
                tokio::time::sleep(pause).await;
                let record = self.held.record.borrow().clone();
                establish(&self.link, &record, self.ttl, lease).await
            };
            tokio::select! {
                outcome = attempt => match outcome {
                    Ok(Ok(hold)) => self.hold = Some(hold),
                    Ok(Err(incarnation)) => return End::Superseded(incarnation),
                    Err(error) => tracing::debug!(%error, "could not register again yet"),
                },
                end = ended(&mut self.held.leave) => return end,
            }
        }
    }
}

async fn ended(leave: &mut oneshot::Receiver<oneshot::Sender<()>>) -> End {
    match leave.await {
        Ok(done) => End::Leave(done),
        Err(_) => End::Abandon,
    }
}

/// Takes up the old lease where it still lives, or a new one, and stores the record under it. The
/// inner error is the incarnation of a later start.
async fn establish(
    link: &Link,
    record: &NodeRecord,
    ttl: Duration,
    lease: Option<i64>,
) -> Result<Result<Hold, u64>, CallError> {
    let mut client = link.open().await?;
    let ttl_secs = i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX).max(1);
    let alive = match lease {
        Some(lease) => match link.call(client.lease_keep_alive(lease)).await {
            Ok((keeper, answers)) => Some((keeper, answers)),
            Err(CallError::Etcd(etcd_client::Error::LeaseKeepAliveError(_))) => None,
            Err(error) => return Err(error),
        },
        None => None,
    };
    let (keeper, answers) = match alive {
        Some(alive) => alive,
        None => {
            let granted = link.call(client.lease_grant(ttl_secs, None)).await?;
            link.call(client.lease_keep_alive(granted.id())).await?
        }
    };
    let lease = keeper.id();
    match put(link, &mut client, record, lease).await? {
        Put::Stored => {
            let interval = Duration::from_secs(ttl_secs.unsigned_abs()) / 3;
            Ok(Ok(Hold { client, lease, keeper, answers, interval }))
        }
        Put::Superseded(incarnation) => {
            // The lease holds nothing; if this fails it runs out by itself.
            let _ = link.call(client.lease_revoke(lease)).await;
            Ok(Err(incarnation))
        }
    }
}

/// Stores the record unless a later start of the node is stored.
async fn put(
    link: &Link,
    client: &mut Client,
    record: &NodeRecord,
    lease: i64,
) -> Result<Put, CallError> {
    let key = link.key(&record.node_id);
    loop {
        let stored = link.call(client.get(key.as_str(), None)).await?;
        let stored = stored.kvs().first();
        if let Some(kv) = stored
            && let Ok(other) = NodeRecord::from_json(kv.value())
            && other.incarnation > record.incarnation
        {
            return Ok(Put::Superseded(other.incarnation));
        }
        let revision = stored.map_or(0, etcd_client::KeyValue::mod_revision);
        let options = PutOptions::new().with_lease(lease);
        let txn = Txn::new()
            .when([Compare::mod_revision(key.as_str(), CompareOp::Equal, revision)])
            .and_then([TxnOp::put(key.as_str(), record.to_json(), Some(options))]);
        if link.call(client.txn(txn)).await?.succeeded() {
            return Ok(Put::Stored);
        }
    }
}

impl Hold {
    /// Renews the lease and stores changes until the registration ends or the hold is lost.
    async fn keep(&mut self, link: &Link, held: &mut Held) -> Result<End, CallError> {
        let mut tick = tokio::time::interval(self.interval);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => self.renew(link).await?,
                wish = held.next() => match wish {
                    Wish::Update => {
                        let record = held.record();
                        if let Put::Superseded(by) = put(link, &mut self.client, &record, self.lease).await? {
                            return Ok(End::Superseded(by));
                        }
                    }
                    Wish::Leave(done) => return Ok(End::Leave(done)),
                    Wish::Abandon => return Ok(End::Abandon),
                },
            }
        }
    }

    /// Takes the record away. It says that the node drains before it goes, so that whoever watches can
    /// tell a farewell from a lease that ran out.
    async fn leave(&mut self, link: &Link, record: &NodeRecord) -> Result<(), CallError> {
        put(link, &mut self.client, record, self.lease).await?;
        link.call(self.client.lease_revoke(self.lease)).await?;
        Ok(())
    }

    async fn renew(&mut self, link: &Link) -> Result<(), CallError> {
        let (keeper, answers) = (&mut self.keeper, &mut self.answers);
        let renewed = async {
            keeper.keep_alive().await?;
            answers.message().await
        };
        match link.call(renewed).await? {
            Some(answer) if answer.ttl() > 0 => Ok(()),
            Some(_) => Err(CallError::Ended("the lease ran out")),
            None => Err(CallError::Ended("etcd ended the keep-alive")),
        }
    }
}
