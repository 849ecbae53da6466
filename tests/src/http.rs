//! A plain HTTP client, so that tests see statuses, headers and bodies as they are.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

/// A response, whatever its status.
#[derive(Debug)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// The `Retry-After` header.
    pub retry_after: Option<String>,
    /// The body; `Null` if it is not JSON.
    pub body: Value,
}

/// A client of one server.
#[derive(Clone, Debug)]
pub struct Client {
    agent: ureq::Agent,
    base: String,
}

impl Client {
    /// A client of `http://address`.
    #[must_use]
    pub fn new(address: &str) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(600)))
            .no_delay(true)
            .build()
            .into();
        Self { agent, base: format!("http://{address}") }
    }

    /// `GET path`. `None` if nobody answers.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<Response> {
        self.agent.get(format!("{}{path}", self.base)).call().ok().map(response)
    }

    /// One value of the Prometheus text at `/metrics`. `None` if nobody answers, or it is not there.
    #[must_use]
    pub fn metric(&self, name: &str) -> Option<u64> {
        let mut response = self.agent.get(format!("{}/metrics", self.base)).call().ok()?;
        let text = response.body_mut().read_to_string().ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        line.trim().parse().ok()
    }

    /// The bases of a role that a router knows and believes to be up. `None` if nobody answers.
    #[must_use]
    pub fn bases_up(&self, role: &str) -> Option<u64> {
        self.metric(&format!(r#"headstart_router_nodes{{tier="base",role="{role}",state="up"}}"#))
    }

    /// `POST path` with a JSON body.
    ///
    /// # Panics
    /// If nobody answers.
    #[must_use]
    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.post_bytes(path, body.to_string().as_bytes())
    }

    /// `POST path` with any body, called JSON.
    ///
    /// # Panics
    /// If nobody answers.
    #[must_use]
    pub fn post_bytes(&self, path: &str, body: &[u8]) -> Response {
        response(self.send(path, body))
    }

    /// `POST path` with a JSON body; the data of each server-sent event, without `[DONE]`.
    ///
    /// # Panics
    /// If nobody answers, or with something other than an event stream of JSON that ends in
    /// `[DONE]`.
    #[must_use]
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let response = self.send(path, body.to_string().as_bytes());
        assert_eq!(response.status().as_u16(), 200);
        let mut events = Vec::new();
        for line in BufReader::new(response.into_body().into_reader()).lines() {
            let line = line.expect("the stream is whole");
            match line.strip_prefix("data: ") {
                Some("[DONE]") => return events,
                Some(data) => events.push(serde_json::from_str(data).expect("JSON")),
                None => assert!(line.is_empty() || line.starts_with(':'), "{line}"),
            }
        }
        panic!("the stream ended without [DONE]: {events:?}");
    }

    fn send(&self, path: &str, body: &[u8]) -> ureq::http::Response<ureq::Body> {
        self.agent
            .post(format!("{}{path}", self.base))
            .header("content-type", "application/json")
            .send(body)
            .expect("the server answers")
    }
}

fn response(mut response: ureq::http::Response<ureq::Body>) -> Response {
    let header = response.headers().get("retry-after");
    let retry_after = header.and_then(|value| value.to_str().ok()).map(ToOwned::to_owned);
    let status = response.status().as_u16();
    let text = response.body_mut().read_to_string().unwrap_or_default();
    Response { status, retry_after, body: serde_json::from_str(&text).unwrap_or_default() }
}

/// The sum over all labels of a counter at a node's metrics address.
///
/// # Panics
/// If the node breaks off in the middle of its answer.
#[must_use]
pub fn counter(address: &str, name: &str) -> f64 {
    // A node that still loads its model counts nothing.
    let Ok(mut stream) = TcpStream::connect(address) else { return 0.0 };
    let request = "GET /metrics HTTP/1.0\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).expect("the node reads");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("the node answers");
    let lines = text
        .lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}
