//! The metrics registry of the process, and a small HTTP endpoint for it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::serve::ListenerExt;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::server::ServeError;

/// The content type of [`render`]'s text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Bucket bounds of every `_seconds` histogram.
const SECONDS: [f64; 16] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0,
];

/// How often what histograms gathered is folded into their buckets when nobody scrapes.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

static REGISTRY: OnceLock<PrometheusHandle> = OnceLock::new();

/// Installs the registry, once a process; later calls change nothing.
pub fn install() {
    REGISTRY.get_or_init(|| {
        let builder = PrometheusBuilder::new();
        let builder = match builder
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        {
            Ok(builder) => builder,
            Err(_) => PrometheusBuilder::new(),
        };
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("another metrics recorder is installed; /metrics stays empty");
        }
        let upkeep = handle.clone();
        let _ = std::thread::Builder::new().name("metrics-upkeep".into()).spawn(move || {
            loop {
                std::thread::sleep(UPKEEP_INTERVAL);
                upkeep.run_upkeep();
            }
        });
        handle
    });
}

/// Everything that was measured so far, in the Prometheus text format.
pub fn render() -> String {
    REGISTRY.get().map(PrometheusHandle::render).unwrap_or_default()
}

/// Serves `/metrics` (after `refresh`, which sets the gauges) and `/health` (503 once `draining` is
/// cancelled) until `stop`.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    refresh: Arc<dyn Fn() + Send + Sync>,
    draining: CancellationToken,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let scrape = move || {
        refresh();
        let text = ([(header::CONTENT_TYPE, CONTENT_TYPE)], render());
        std::future::ready(text.into_response())
    };
    let health = move || {
        std::future::ready(match draining.is_cancelled() {
            true => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
            false => (StatusCode::OK, "ok\n"),
        })
    };
    let app = Router::new().route("/metrics", get(scrape)).route("/health", get(health));
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, app)
        .with_graceful_shutdown(async move { stop.cancelled().await })
        .await
        .map_err(|error| ServeError::Failed { cause: error.to_string() })
}
