//! A small HTTP/1.1 client, so that every byte of a request is the test's choice.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The JSON of every event but `[DONE]`; whether that came last.
    pub fn events(&self) -> (Vec<Value>, bool) {
        let mut events = Vec::new();
        let mut done = false;
        for event in self.body.split("\n\n").filter(|event| !event.is_empty()) {
            let data = event.strip_prefix("data: ").unwrap_or_else(|| panic!("{event}"));
            assert!(!done, "nothing after [DONE]");
            if data == "[DONE]" {
                done = true;
            } else {
                events.push(serde_json::from_str(data).unwrap_or_else(|e| panic!("{e}: {data}")));
            }
        }
        (events, done)
    }

    pub fn error(&self) -> (u16, String, String) {
        let body = self.json();
        let text = |key: &str| body["error"][key].as_str().unwrap_or_default().to_owned();
        (self.status, text("code"), text("message"))
    }
}

pub async fn get(address: SocketAddr, path: &str) -> Reply {
    exchange(address, "GET", path, b"").await
}

pub async fn post(address: SocketAddr, path: &str, body: &[u8]) -> Reply {
    exchange(address, "POST", path, body).await
}

pub async fn exchange(address: SocketAddr, method: &str, path: &str, body: &[u8]) -> Reply {
    exchange_with(address, method, path, "", body).await
}

/// With more header lines, each ended by CR LF.
pub async fn exchange_with(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &[u8],
) -> Reply {
    let stream = send_with(address, method, path, headers, body).await;
    let mut open = Open::read_head(stream).await;
    let mut whole = String::new();
    while let Some(piece) = open.chunk().await {
        whole.push_str(&piece);
    }
    Reply { status: open.status, headers: open.headers, body: whole }
}

/// A response whose head has arrived.
pub struct Open {
    stream: BufReader<TcpStream>,
    pub status: u16,
    pub headers: Vec<(String, String)>,
    left: Option<usize>,
}

/// Sends a request and reads nothing.
pub async fn send(address: SocketAddr, method: &str, path: &str, body: &[u8]) -> TcpStream {
    send_with(address, method, path, "", body).await
}

async fn send_with(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &[u8],
) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n{headers}\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // The server may answer and close before it has read a body that it refuses.
    let _ = stream.write_all(body).await;
    stream
}

impl Open {
    pub async fn start(address: SocketAddr, method: &str, path: &str, body: &[u8]) -> Self {
        Self::read_head(send(address, method, path, body).await).await
    }

    async fn read_head(stream: TcpStream) -> Self {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status in {line:?}"));
        let mut headers = Vec::new();
        loop {
            line.clear();
            stream.read_line(&mut line).await.unwrap();
            let Some((key, value)) = line.trim_end().split_once(": ") else { break };
            headers.push((key.to_ascii_lowercase(), value.to_owned()));
        }
        let length = headers.iter().find(|(key, _)| key == "content-length");
        let left = length.map(|(_, value)| value.parse().unwrap());
        Self { stream, status, headers, left }
    }

    /// The next piece of the body.
    pub async fn chunk(&mut self) -> Option<String> {
        let size = match self.left.take() {
            Some(left) => left,
            None => {
                let mut line = String::new();
                self.stream.read_line(&mut line).await.unwrap();
                usize::from_str_radix(line.trim_end(), 16).unwrap_or(0)
            }
        };
        if size == 0 {
            return None;
        }
        let mut piece = vec![0; size];
        self.stream.read_exact(&mut piece).await.unwrap();
        let mut rest = String::new();
        if !self.headers.iter().any(|(key, _)| key == "content-length") {
            self.stream.read_line(&mut rest).await.unwrap();
        } else {
            self.left = Some(0);
        }
        Some(String::from_utf8(piece).unwrap())
    }
}
