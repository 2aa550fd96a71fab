//! Runs statements and commits within their time limits, and lets tests lose or delay them.

use std::any::Any;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::timeout::{COMMIT_TIMEOUT, STATEMENT_TIMEOUT, with_timeout};

/// The kind of a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statement {
    /// A read outside of a transaction.
    Read,
    /// The begin of a transaction.
    Begin,
    /// A statement within a transaction.
    InTransaction,
    /// The commit of a transaction.
    Commit,
}

/// What happens to a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It is executed and answered.
    Answered,
    /// Its connection breaks before it arrives.
    NotSent,
    /// It is executed, and its connection breaks before the answer arrives.
    AnswerLost,
    /// Only for a commit: it is executed when [`FaultInjector::later`] decides, and never answered.
    Late,
}

/// A value of a test, dropped when the guarded state ends.
pub type Guard = Box<dyn Any + Send>;

/// A commit that nothing waits for any more.
pub type Commit = BoxFuture<'static, ()>;

/// Decides, in a test, what happens to the statements of one [`Store`](super::Store).
pub trait FaultInjector: fmt::Debug + Send + Sync {
    /// Called before a statement: may delay it, and returns what happens to it. The guard is dropped when the database
    /// has answered.
    fn before(&self, statement: Statement) -> BoxFuture<'_, (Delivery, Guard)>;

    /// Called when a transaction has begun. The guard is dropped with the transaction.
    fn begun(&self) -> Guard;

    /// Takes a commit that is [`Delivery::Late`]: it is executed if awaited, and never if dropped. Whoever waits for
    /// its answer waits for this future, which never ends.
    fn later(&self, commit: Commit) -> BoxFuture<'_, Infallible>;
}

/// Runs statements; without a fault injector, just within their time limits.
#[derive(Clone, Debug, Default)]
pub(super) struct Executor(pub(super) Option<Arc<dyn FaultInjector>>);

impl Executor {
    /// Runs a statement.
    pub(super) fn execute<T>(
        &self,
        statement: Statement,
        work: impl Future<Output = sqlx::Result<T>>,
    ) -> impl Future<Output = sqlx::Result<T>> {
        let faults = self.0.clone();
        with_timeout(STATEMENT_TIMEOUT, async move {
            let Some(faults) = faults else { return work.await };
            let (delivery, guard) = faults.before(statement).await;
            deliver(delivery, guard, work).await
        })
    }

    /// Runs the commit of a transaction.
    pub(super) fn commit(
        &self,
        commit: impl Future<Output = sqlx::Result<()>> + Send + 'static,
    ) -> impl Future<Output = sqlx::Result<()>> {
        let faults = self.0.clone();
        with_timeout(COMMIT_TIMEOUT, async move {
            let Some(faults) = faults else { return commit.await };
            match faults.before(Statement::Commit).await {
                (Delivery::Late, guard) => {
                    drop(guard);
                    match faults.later(Box::pin(async { drop(commit.await) })).await {}
                }
                (delivery, guard) => deliver(delivery, guard, commit).await,
            }
        })
    }

    /// The guard of a transaction that has just begun.
    pub(super) fn transaction_begun(&self) -> Option<Guard> {
        self.0.as_ref().map(|faults| faults.begun())
    }
}

/// Delivers a statement. The guard is dropped when that is done.
async fn deliver<T>(
    delivery: Delivery,
    _guard: Guard,
    work: impl Future<Output = sqlx::Result<T>>,
) -> sqlx::Result<T> {
    match delivery {
        Delivery::Answered => work.await,
        Delivery::AnswerLost => work.await.and(Err(connection_reset())),
        Delivery::NotSent | Delivery::Late => Err(connection_reset()),
    }
}

fn connection_reset() -> sqlx::Error {
    sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into())
}
