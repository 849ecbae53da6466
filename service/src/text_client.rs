//! Fetches a model's text bundle from a node that runs it.

use std::time::Duration;

use headstart_proto::v1::{GetTokenizerRequest, node_client::NodeClient};
use headstart_proto::{Error, ErrorCode};
use headstart_text::{BUNDLE_BYTES_MAX, ModelText};

use crate::link::Link;

/// Bundles larger than this are read off the threads that carry tokens.
const INLINE_BYTES_MAX: usize = 32 << 10;

/// Fetches the text bundle with this fingerprint (hex SHA-256) and reads it.
///
/// # Errors
/// [`ErrorCode::NotFound`] when the node has another one, [`ErrorCode::TooLarge`] beyond
/// [`BUNDLE_BYTES_MAX`], [`ErrorCode::Mismatch`] when what came is not what was asked for or cannot
/// be read, [`ErrorCode::DeadlineExceeded`] after `timeout`, and the node's own errors.
pub async fn fetch_model_text(
    node: Link,
    fingerprint: &str,
    timeout: Duration,
) -> Result<ModelText, Error> {
    let fetching = async {
        let bundle = fetch_bundle(node, fingerprint).await?;
        let inline = bundle.len() <= INLINE_BYTES_MAX;
        let read = move || ModelText::from_bundle(&bundle);
        let text = if inline {
            read()
        } else {
            let reading = tokio::task::spawn_blocking(read).await;
            reading.map_err(|error| Error::internal(format!("read the text bundle: {error}")))?
        };
        let text = text.map_err(|error| Error::new(ErrorCode::Mismatch, error.to_string()))?;
        let found = text.fingerprint().to_string();
        if found != fingerprint {
            let message = format!("expected the text bundle {fingerprint}, found {found}");
            return Err(Error::new(ErrorCode::Mismatch, message));
        }
        Ok(text)
    };
    tokio::time::timeout(timeout, fetching).await.unwrap_or_else(|_| {
        let message = format!("no text bundle within {timeout:?}");
        Err(Error::new(ErrorCode::DeadlineExceeded, message))
    })
}

async fn fetch_bundle(node: Link, fingerprint: &str) -> Result<Vec<u8>, Error> {
    let request = GetTokenizerRequest { text_fingerprint: fingerprint.to_owned() };
    let mut chunks = NodeClient::new(node).get_tokenizer(request).await?.into_inner();
    let mut bundle = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        if bundle.len() + chunk.data.len() > BUNDLE_BYTES_MAX {
            let message = format!("expected a text bundle of at most {BUNDLE_BYTES_MAX} bytes");
            return Err(Error::new(ErrorCode::TooLarge, message));
        }
        bundle.extend_from_slice(&chunk.data);
    }
    Ok(bundle)
}
