//! A client that costs next to nothing, so that what is measured is the server: one connection, one request at a time,
//! the same bytes again and again.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

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
        requests += client.await??;
    }
    Ok(Seen { requests, time: began.elapsed() })
}

async fn one(address: std::net::SocketAddr, request: String, until: Instant) -> Result<usize> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(64 << 10);
    let mut n = 0;
    while Instant::now() < until {
        stream.write_all(request.as_bytes()).await?;
        buffer.clear();
        loop {
            if stream.read_buf(&mut buffer).await? == 0 {
                bail!("{address}: the connection was closed");
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
        bail!("wanted 200, got {}", head.lines().next().unwrap_or_default());
    }
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let length = length.context("an answer does not say its length")?;
    Ok(answer.len() >= end + 4 + length)
}
