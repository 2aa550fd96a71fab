//! A proxy to a Postgres server that loses answers on purpose; it recognises commits.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};

/// What happens to a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Loss {
    /// The connection breaks before it reaches the server.
    Before,
    /// It is done, and the connection breaks before the answer.
    Answer,
    /// It is done, and no answer ever comes.
    AnswerHangs,
}

/// A listener on loopback that forwards everything except the chosen commits.
pub(crate) struct Wire {
    address: SocketAddr,
    plan: Arc<Plan>,
    server: Arc<Mutex<PathBuf>>,
}

#[derive(Default)]
struct Plan {
    n_commits: AtomicUsize,
    losses: Mutex<BTreeMap<usize, Loss>>,
}

impl Wire {
    /// In front of the server whose socket is in `directory`.
    pub(crate) async fn before(directory: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (plan, server) = (Arc::new(Plan::default()), Arc::new(Mutex::new(directory.to_owned())));
        let wire = Self { address, plan: plan.clone(), server: server.clone() };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let socket = server.lock().unwrap().join(".s.PGSQL.5432");
                if let Ok(server) = UnixStream::connect(&socket).await {
                    tokio::spawn(pass(client, server, plan.clone()));
                }
            }
        });
        wire
    }

    /// From now on new connections go to the server, or to the pooler, whose socket is in `directory`.
    pub(crate) fn lead_to(&self, directory: &Path) {
        directory.clone_into(&mut self.server.lock().unwrap());
    }

    /// The same database by this way.
    pub(crate) fn through(&self, url: &str) -> String {
        let database = url.split('?').next().unwrap().rsplit('/').next().unwrap();
        format!("postgres://postgres@{}/{database}", self.address)
    }

    /// The `nth` commit from now, 0 the next one, is lost.
    pub(crate) fn inject(&self, nth: usize, loss: Loss) {
        self.plan.losses.lock().unwrap().insert(self.n_commits() + nth, loss);
    }

    /// Number of commits so far.
    pub(crate) fn n_commits(&self) -> usize {
        self.plan.n_commits.load(Ordering::SeqCst)
    }
}

async fn pass(client: TcpStream, server: UnixStream, plan: Arc<Plan>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let lost: Arc<Mutex<Option<Loss>>> = Arc::default();
    let muted = lost.clone();
    let answers = async move {
        let mut chunk = vec![0; 1 << 16];
        loop {
            let n = from_server.read(&mut chunk).await.unwrap_or(0);
            let loss = *muted.lock().unwrap();
            match loss {
                _ if n == 0 => return,
                Some(Loss::AnswerHangs) => {}
                Some(_) => return, // it is done: this was the answer
                None if to_client.write_all(&chunk[..n]).await.is_err() => return,
                None => {}
            }
        }
    };
    let questions = async move {
        let mut typed = false; // the first messages have no type
        while let Some(message) = message(&mut from_client, typed).await {
            const ENCRYPT: &[u8] = &80_877_103_u32.to_be_bytes();
            typed |= message.get(4..8) != Some(ENCRYPT);
            if message[0] == b'Q' && message[5..].eq_ignore_ascii_case(b"commit\0") {
                let nth = plan.n_commits.fetch_add(1, Ordering::SeqCst);
                let loss = plan.losses.lock().unwrap().remove(&nth);
                *lost.lock().unwrap() = loss;
                if loss == Some(Loss::Before) {
                    return;
                }
            }
            if to_server.write_all(&message).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = answers => {}
        () = questions => {}
    }
}

/// The next message whole, with its head.
async fn message(from: &mut (impl AsyncReadExt + Unpin), typed: bool) -> Option<Vec<u8>> {
    let mut message = vec![0; if typed { 5 } else { 4 }];
    from.read_exact(&mut message).await.ok()?;
    let length = u32::from_be_bytes(*message.last_chunk()?) as usize;
    let head = message.len();
    message.resize(head - 4 + length, 0);
    from.read_exact(&mut message[head..]).await.ok()?;
    Some(message)
}
