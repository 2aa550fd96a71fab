//! A client that costs next to nothing, so that what is measured is the server: one connection, one request at a time,
//! the same bytes again and again.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::ml::{Error, Result};

/// What the clients of one measurement saw.
pub(super) struct Seen {
    /// Answers of all clients.
    pub(super) requests: usize,
    /// From the first request to the last answer.
    pub(super) time: Duration,
}

/// Sends `request` over `n` connections for `time`, each as fast as its answers come. Every answer must be a 200.
pub(super) async fn load(
    address: std::net::SocketAddr,
    request: &str,
    n: usize,
    time: Duration,
) -> Result<Seen> {
    let began = Instant::now();
    let clients: Vec<_> =
        (0..n).map(|_| tokio::spawn(one(address, request.to_owned(), began + time))).collect();
    let mut requests = 0;
    for client in clients {
        requests += client.await.map_err(|error| Error::input(format!("a client ended: {error}")))??;
    }
    Ok(Seen { requests, time: began.elapsed() })
}

async fn one(address: std::net::SocketAddr, request: String, until: Instant) -> Result<usize> {
    let failed = |error: std::io::Error| Error::input(format!("{address}: {error}"));
    let mut stream = TcpStream::connect(address).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    let mut buffer = Vec::with_capacity(64 << 10);
    let mut n = 0;
    while Instant::now() < until {
        stream.write_all(request.as_bytes()).await.map_err(failed)?;
        buffer.clear();
        loop {
            if stream.read_buf(&mut buffer).await.map_err(failed)? == 0 {
                return Err(Error::input(format!("{address}: the connection was closed")));
            }
            if is_whole(&buffer)? {
                break;
            }
        }
        n += 1;
    }
    Ok(n)
}

/// Whether `answer` has its head and as many bytes after it as the head says.
fn is_whole(answer: &[u8]) -> Result<bool> {
    let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(false) };
    let head = String::from_utf8_lossy(&answer[..end]);
    if !head.starts_with("HTTP/1.1 200") {
        return Err(Error::input(format!("wanted 200, got {}", head.lines().next().unwrap_or_default())));
    }
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let length = length.ok_or_else(|| Error::input("an answer does not say its length"))?;
    Ok(answer.len() >= end + 4 + length)
}
