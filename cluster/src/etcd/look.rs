//! A look at a node past the store: does it answer?

use std::time::Duration;

use headstart_proto::v1::InfoRequest;
use headstart_proto::v1::node_client::NodeClient;
use tonic::transport::Endpoint;

use crate::NodeRecord;

/// How long a node may take to answer.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Whether the node of `record` answers at its address, under its own name.
pub(super) async fn look(record: NodeRecord) -> (NodeRecord, bool) {
    let answer = tokio::time::timeout(TIMEOUT, node_id(&record.address)).await;
    let answered = answer.is_ok_and(|id| id.is_some_and(|id| id == record.node_id.as_str()));
    match answered {
        true => tracing::info!(
            node_id = %record.node_id,
            "the node is not in etcd and answers: it stays until it does not"
        ),
        false => tracing::info!(
            node_id = %record.node_id,
            "the node is not in etcd and does not answer: given up"
        ),
    }
    (record, answered)
}

async fn node_id(address: &str) -> Option<String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).ok()?;
    let channel = endpoint.tcp_nodelay(true).connect_timeout(TIMEOUT).connect().await.ok()?;
    let info = NodeClient::new(channel).info(InfoRequest {}).await.ok()?;
    Some(info.into_inner().node_id)
}
