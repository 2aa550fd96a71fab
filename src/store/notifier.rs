//! The notifier: hints that there is something to do, within this process and on Postgres between processes.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use sqlx::pool::PoolOptions;
use sqlx::postgres::{PgConnectOptions, PgListener};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use super::db::{CHANNEL, Db};
use super::fault_injection::Executor;
use super::postgres::PostgresServer;

/// Wait before a lost listener connects again. Subscribers poll meanwhile.
const RECONNECT: Duration = Duration::from_secs(5);

/// Collects notifications and passes them to subscribers.
#[derive(Debug)]
pub(super) struct Notifier {
    sender: watch::Sender<()>,
    relay: Mutex<Option<JoinHandle<()>>>,
    deleted: Notify,
}

impl Default for Notifier {
    fn default() -> Self {
        Self { sender: watch::Sender::new(()), relay: Mutex::default(), deleted: Notify::new() }
    }
}

/// Receives notifications. Any number of them since the last wait count as one.
#[derive(Clone, Debug)]
pub struct Subscription(watch::Receiver<()>);

impl Subscription {
    /// Waits for the next notification.
    pub async fn wait(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await; // the store is gone: nothing will ever be queued
        }
    }
}

impl Notifier {
    /// Notifies this process's subscribers.
    pub(super) fn notify(&self) {
        self.sender.send_replace(());
    }

    /// Notifies the waiter of this process that a deleted job may be erased.
    pub(super) fn notify_deletion(&self) {
        self.deleted.notify_one();
    }

    /// Waits for [`Notifier::notify_deletion`].
    pub(super) async fn deletion(&self) {
        self.deleted.notified().await;
    }

    /// A subscription to this process's notifications, and with a listener's session to those of other processes.
    pub(super) fn subscribe(&self, db: &Db) -> Subscription {
        let subscription = Subscription(self.sender.subscribe());
        if let Db::Postgres(PostgresServer { listen: Some(options), executor: Executor(None), .. }) = db {
            let mut running = self.relay.lock().unwrap_or_else(PoisonError::into_inner);
            if running.as_ref().is_none_or(JoinHandle::is_finished) {
                *running = Some(tokio::spawn(relay((**options).clone(), self.sender.clone())));
            }
        }
        subscription
    }
}

/// Relays the notifications of other processes until the last subscription here is dropped.
async fn relay(options: PgConnectOptions, sender: watch::Sender<()>) {
    let pool = PoolOptions::new().max_connections(1).acquire_timeout(RECONNECT).connect_lazy_with(options);
    let listen = async {
        loop {
            if let Ok(mut listener) = PgListener::connect_with(&pool).await
                && listener.listen(CHANNEL).await.is_ok()
            {
                sender.send_replace(()); // for notifications that were missed before
                // A connection that was lost and restored counts too: notifications may have been missed meanwhile.
                while listener.try_recv().await.is_ok() {
                    sender.send_replace(());
                }
            }
            tokio::time::sleep(RECONNECT).await;
        }
    };
    tokio::select! {
        () = listen => {}
        () = sender.closed() => {}
    }
}
