//! How long a statement's answer is waited for, and what a test may do to statements and their answers.

use std::any::Any;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::db::{ANSWER, COMMIT, answer_within};

/// What kind of statement it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statement {
    /// Outside of a transaction; it writes nothing.
    Read,
    /// The beginning of a transaction.
    Begin,
    /// One within a transaction.
    Within,
    /// The end of a transaction that is to count.
    Commit,
}

/// What becomes of a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It is carried out and answered.
    Answered,
    /// Its connection breaks before it arrives.
    NotSent,
    /// It is carried out, and its connection breaks before the answer arrives.
    AnswerLost,
    /// Only for a commit: it is carried out whenever [`Faults::later`] likes, and never answered.
    Late,
}

/// Something of a test that lasts until it is dropped.
pub type Guard = Box<dyn Any + Send>;

/// A commit that nobody waits for any more.
pub type Commit = BoxFuture<'static, ()>;

/// What a test does to the statements of one [`Store`](super::Store).
pub trait Faults: fmt::Debug + Send + Sync {
    /// Holds a statement for as long as it likes, and then says what becomes of it. The guard is dropped when the
    /// database has answered.
    fn before(&self, statement: Statement) -> BoxFuture<'_, (Delivery, Guard)>;

    /// A transaction has begun. The guard is dropped with it.
    fn begun(&self) -> Guard;

    /// Takes a commit that is [`Delivery::Late`]: awaited, it is carried out; dropped, it never was. Whoever waits for its
    /// answer waits for this, which never ends.
    fn later(&self, commit: Commit) -> BoxFuture<'_, Infallible>;
}

/// How statements are waited for. Without `faults`, as they come.
#[derive(Clone, Debug, Default)]
pub(super) struct Answers(pub(super) Option<Arc<dyn Faults>>);

impl Answers {
    /// Waits for the answer to a statement.
    pub(super) fn wait<T>(
        &self,
        statement: Statement,
        work: impl Future<Output = sqlx::Result<T>>,
    ) -> impl Future<Output = sqlx::Result<T>> {
        let faults = self.0.clone();
        answer_within(ANSWER, async move {
            let Some(faults) = faults else { return work.await };
            let (delivery, guard) = faults.before(statement).await;
            carry_out(delivery, guard, work).await
        })
    }

    /// Waits for the answer to the end of a transaction.
    pub(super) fn wait_for_commit(
        &self,
        commit: impl Future<Output = sqlx::Result<()>> + Send + 'static,
    ) -> impl Future<Output = sqlx::Result<()>> {
        let faults = self.0.clone();
        answer_within(COMMIT, async move {
            let Some(faults) = faults else { return commit.await };
            match faults.before(Statement::Commit).await {
                (Delivery::Late, guard) => {
                    drop(guard);
                    match faults.later(Box::pin(async { drop(commit.await) })).await {}
                }
                (delivery, guard) => carry_out(delivery, guard, commit).await,
            }
        })
    }

    /// What lasts as long as a transaction that has just begun.
    pub(super) fn begun(&self) -> Option<Guard> {
        self.0.as_ref().map(|faults| faults.begun())
    }
}

/// Does to the statement what is to become of it. The guard goes when that is done.
async fn carry_out<T>(
    delivery: Delivery,
    _guard: Guard,
    work: impl Future<Output = sqlx::Result<T>>,
) -> sqlx::Result<T> {
    match delivery {
        Delivery::Answered => work.await,
        Delivery::AnswerLost => work.await.and(Err(broken())),
        Delivery::NotSent | Delivery::Late => Err(broken()),
    }
}

fn broken() -> sqlx::Error {
    sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into())
}
