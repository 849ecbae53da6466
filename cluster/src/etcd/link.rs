//! How to reach etcd: endpoints, key names, timeouts and back-off.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use headstart_proto::NodeId;

use crate::ClusterError;

/// Shortest and longest pause between two attempts to reach an etcd that is away.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// A connection that stays silent so long after a ping is dead.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// Everything needed to open a connection to etcd; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    endpoints: Arc<[String]>,
    prefix: Arc<str>,
    leaders: Arc<str>,
    timeout: Duration,
}

/// An etcd call failed, or took too long.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error("no answer")]
    Timeout,
    #[error(transparent)]
    Etcd(#[from] etcd_client::Error),
    #[error("{0}")]
    Ended(&'static str),
}

impl CallError {
    /// What lies at the bottom: of a failed connection, what the system said.
    fn root(&self) -> String {
        let mut deepest: &dyn std::error::Error = match self {
            Self::Etcd(etcd_client::Error::GRpcStatus(status)) => status,
            Self::Etcd(etcd_client::Error::TransportError(error)) => error,
            other => return other.to_string(),
        };
        while let Some(source) = deepest.source() {
            deepest = source;
        }
        deepest.to_string()
    }
}

impl Link {
    pub(crate) fn new(
        endpoints: &[String],
        cluster_name: &str,
        timeout: Duration,
    ) -> Result<Self, ClusterError> {
        if NodeId::new(cluster_name).is_err() {
            let expected = "1 to 64 letters, digits, '-', '_', '.' or ':'";
            return Err(ClusterError::invalid("cluster", expected, cluster_name));
        }
        if endpoints.is_empty() {
            return Err(ClusterError::invalid("etcd", "at least one endpoint", ""));
        }
        for endpoint in endpoints {
            let address = endpoint.strip_prefix("http://").unwrap_or(endpoint);
            if !crate::record::is_host_port(address.trim_end_matches('/')) {
                let expected = "host:port or http://host:port";
                return Err(ClusterError::invalid("etcd", expected, endpoint));
            }
        }
        let of = |what| format!("/headstart/{cluster_name}/{what}/").into();
        let (prefix, leaders) = (of("nodes"), of("leaders"));
        Ok(Self { endpoints: endpoints.into(), prefix, leaders, timeout })
    }

    /// The prefix of every record's key.
    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }

    pub(crate) fn key(&self, id: &NodeId) -> String {
        format!("{}{id}", self.prefix)
    }

    /// The key of where the processes of one node meet.
    pub(crate) fn leader_key(&self, id: &NodeId) -> String {
        format!("{}{id}", self.leaders)
    }

    /// A fresh client, boxed because it is large. It connects with its first call.
    pub(crate) async fn open(&self) -> Result<Box<Client>, CallError> {
        let options = ConnectOptions::new()
            .with_connect_timeout(self.timeout)
            .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
            .with_require_leader(true);
        let open = Box::pin(async {
            Client::connect(&self.endpoints[..], Some(options)).await.map(Box::new)
        });
        self.call(open).await
    }

    /// Runs one etcd call within the timeout.
    pub(crate) async fn call<T>(
        &self,
        call: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, CallError> {
        match tokio::time::timeout(self.timeout, call).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(CallError::Timeout),
        }
    }

    /// Retries `attempt` until the timeout is over.
    pub(crate) async fn within_timeout<T, F>(
        &self,
        attempt: impl Fn() -> F,
    ) -> Result<T, ClusterError>
    where
        F: Future<Output = Result<T, CallError>>,
    {
        let mut last = CallError::Timeout;
        let mut backoff = Backoff::default();
        let retried = async {
            loop {
                match attempt().await {
                    Ok(value) => return value,
                    Err(error) => last = error,
                }
                backoff.pause().await;
            }
        };
        match tokio::time::timeout(self.timeout, retried).await {
            Ok(value) => Ok(value),
            Err(_) => Err(self.unreachable(&last)),
        }
    }

    pub(crate) fn unreachable(&self, cause: &CallError) -> ClusterError {
        ClusterError::Unreachable {
            endpoints: self.endpoints.join(","),
            timeout: self.timeout,
            cause: cause.root(),
        }
    }

    /// The endpoints, for log lines.
    pub(crate) fn endpoints(&self) -> String {
        self.endpoints.join(",")
    }
}

/// Pauses that double, from 100 ms to 2 s.
#[derive(Debug)]
pub(crate) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(BACKOFF_MIN)
    }
}

impl Backoff {
    /// The length of the next pause.
    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (self.0 * 2).min(BACKOFF_MAX);
        pause
    }

    pub(crate) async fn pause(&mut self) {
        tokio::time::sleep(self.next()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u128> = (0..7).map(|_| backoff.next().as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 2000, 2000]);
    }

    #[test]
    fn malformed_endpoints_and_names_are_named() {
        let link = |endpoint: &str, name: &str| {
            Link::new(&[endpoint.to_owned()], name, Duration::from_secs(1))
        };
        assert!(link("127.0.0.1:2379", "demo").is_ok());
        assert!(link("http://etcd-0.etcd:2379/", "demo").is_ok());
        let field = |result: Result<Link, ClusterError>| match result {
            Err(ClusterError::Invalid { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(link("nowhere", "demo")), "etcd");
        assert_eq!(field(link("https://a:1", "demo")), "etcd");
        assert_eq!(field(link("a:1", "de/mo")), "cluster");
        assert_eq!(field(Link::new(&[], "demo", Duration::ZERO)), "etcd");
    }
}
