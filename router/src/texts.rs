//! The models' tokenizers and templates, fetched from nodes by fingerprint and kept.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use headstart_cluster::{NodeRecord, View};
use headstart_proto::Error;
use headstart_service::text_client::fetch_model_text;
use headstart_text::ModelText;
use tokio::sync::OnceCell;

use crate::nodes::Nodes;

type Cell = Arc<OnceCell<Arc<ModelText>>>;

/// A bounded cache, the least recently used leaves first. Whoever asks for a text that is being
/// fetched waits for that fetch; when it fails or its asker is gone, the next one in line tries.
#[derive(Debug)]
pub(crate) struct Texts {
    capacity: usize,
    fetch_timeout: Duration,
    /// By text fingerprint, the most recently used last.
    cells: Mutex<Vec<(String, Cell)>>,
}

impl Texts {
    /// An empty cache for `capacity` texts.
    pub(crate) fn new(capacity: usize, fetch_timeout: Duration) -> Self {
        Self { capacity, fetch_timeout, cells: Mutex::default() }
    }

    /// The text of `record`'s model, from any node of `view` that has it.
    ///
    /// # Errors
    /// The last node's, when none gave it.
    pub(crate) async fn get(
        &self,
        record: &NodeRecord,
        nodes: &Nodes,
        view: &View,
    ) -> Result<Arc<ModelText>, Error> {
        let cell = self.cell(&record.text_fingerprint);
        let text = cell.get_or_try_init(|| self.fetch(record, nodes, view)).await?;
        Ok(Arc::clone(text))
    }

    /// Whether the text is here.
    pub(crate) fn has(&self, fingerprint: &str) -> bool {
        let cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
        cells.iter().any(|(known, cell)| known == fingerprint && cell.initialized())
    }

    fn cell(&self, fingerprint: &str) -> Cell {
        let mut cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
        let found = cells.iter().position(|(known, _)| known == fingerprint);
        let entry = match found {
            Some(index) => cells.remove(index),
            None => (fingerprint.to_owned(), Cell::default()),
        };
        let cell = Arc::clone(&entry.1);
        cells.push(entry);
        if cells.len() > self.capacity {
            cells.remove(0);
        }
        cell
    }

    async fn fetch(
        &self,
        record: &NodeRecord,
        nodes: &Nodes,
        view: &View,
    ) -> Result<Arc<ModelText>, Error> {
        let fingerprint = &record.text_fingerprint;
        let others = view.nodes.values().filter(|other| {
            other.text_fingerprint == *fingerprint && other.node_id != record.node_id
        });
        let mut last = None;
        for node in std::iter::once(record).chain(others.take(2)) {
            match fetch_model_text(nodes.link(node)?, fingerprint, self.fetch_timeout).await {
                Ok(text) => return Ok(Arc::new(text)),
                Err(error) => last = Some((node, error)),
            }
        }
        let (node, error) = last.unwrap_or_else(|| (record, Error::unavailable("no node")));
        let message =
            format!("fetch the tokenizer of {} from {}: {error}", node.model, node.node_id);
        Err(Error::unavailable(message))
    }
}
