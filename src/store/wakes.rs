//! Hints that there is something to look at: within this process, and on Postgres between processes.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use sqlx::pool::PoolOptions;
use sqlx::postgres::{PgConnectOptions, PgListener};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use super::answers::Answers;
use super::db::{CHANNEL, Db};
use super::session::Server;

/// Before a lost listener tries again. Whoever waits polls meanwhile.
const AGAIN: Duration = Duration::from_secs(5);

/// Where hints come together.
#[derive(Debug)]
pub(super) struct Hub {
    sender: watch::Sender<()>,
    relay: Mutex<Option<JoinHandle<()>>>,
    deleted: Notify,
}

impl Default for Hub {
    fn default() -> Self {
        Self { sender: watch::Sender::new(()), relay: Mutex::default(), deleted: Notify::new() }
    }
}

/// One who waits for hints. Any number of them since the last wait are one.
#[derive(Clone, Debug)]
pub struct Wakes(watch::Receiver<()>);

impl Wakes {
    /// Waits for the next hint.
    pub async fn wait(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await; // the store is gone: nothing will ever be queued
        }
    }
}

impl Hub {
    pub(super) fn wake(&self) {
        self.sender.send_replace(());
    }

    /// Says that a deleted job may be erased.
    pub(super) fn deleted(&self) {
        self.deleted.notify_one();
    }

    pub(super) async fn deletion(&self) {
        self.deleted.notified().await;
    }

    pub(super) fn listen(&self, db: &Db) -> Wakes {
        let wakes = Wakes(self.sender.subscribe());
        if let Db::Postgres(Server { listen: Some(options), answers: Answers(None), .. }) = db {
            let mut running = self.relay.lock().unwrap_or_else(PoisonError::into_inner);
            if running.as_ref().is_none_or(JoinHandle::is_finished) {
                *running = Some(tokio::spawn(relay((**options).clone(), self.sender.clone())));
            }
        }
        wakes
    }
}

/// Passes on what other processes say, until nobody here listens any more.
async fn relay(options: PgConnectOptions, sender: watch::Sender<()>) {
    let pool = PoolOptions::new().max_connections(1).acquire_timeout(AGAIN).connect_lazy_with(options);
    let hear = async {
        loop {
            if let Ok(mut listener) = PgListener::connect_with(&pool).await
                && listener.listen(CHANNEL).await.is_ok()
            {
                sender.send_replace(()); // for what was said while nobody heard
                // A lost connection that is there again counts as well: nobody knows what was said meanwhile.
                while listener.try_recv().await.is_ok() {
                    sender.send_replace(());
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    };
    tokio::select! {
        () = hear => {}
        () = sender.closed() => {}
    }
}
