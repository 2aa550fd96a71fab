//! Retries of ended jobs.

use hypnos::blobs::{Key, Scope};
use hypnos::job::{Fault, FaultCode, Job, Kind, State};
use hypnos::retry::{Error, Retried, Terms, retry};
use hypnos::store::{Idempotency, Submitted};
use uuid::Uuid;

use super::scripted::{Script, expected_weights};
use super::test_workers::{TENANT, TestWorkers};

const DAY: std::time::Duration = std::time::Duration::from_hours(24);

fn terms() -> Terms {
    Terms { max_attempts: 2, queue_max: 1000, idempotency: None, trace: Some("00-1-2-01".into()) }
}

/// A training whose worker gave it up.
async fn failed(workers: &TestWorkers) -> Job {
    let job = workers.train("mug", 3).await;
    let claimed = workers.store.claim(Uuid::now_v7(), &[Kind::Train], DAY, DAY).await.unwrap().unwrap();
    let fault = Fault::new(FaultCode::Machine, "out of memory");
    assert_eq!(workers.store.fail(claimed.lease(), &fault, None).await.unwrap(), State::Failed);
    workers.find(&job).await.unwrap()
}

fn new(retried: Retried) -> Job {
    match retried {
        Retried::Submitted(Submitted::New(job)) => job,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_training_is_retried_with_copies_of_its_photos() {
    let workers = TestWorkers::new().await;
    let old = failed(&workers).await;
    let again = new(retry(&workers.store, &workers.blobs, &old, terms()).await.unwrap());
    assert_eq!((again.spec_json.as_str(), again.max_attempts), (old.spec_json.as_str(), 2));
    assert_eq!((again.retry_of, again.trace.as_deref()), (Some(old.id), Some("00-1-2-01")));
    assert_eq!(workers.find(&old).await.as_ref(), Some(&old), "what has ended stays as it is");

    // The first can be erased, and the second is done all the same.
    assert!(workers.store.delete(TENANT, old.id).await.unwrap());
    hypnos::maintenance::erase(&workers.store, &workers.blobs, TENANT, old.id).await.unwrap();
    let worker = workers.start(&Script::new(std::time::Duration::ZERO));
    let done = workers.ended(&again).await;
    assert_eq!(done.state, State::Succeeded, "{:?}", done.error);
    assert_eq!(workers.artifact(&again, hypnos::job::WEIGHTS).await, expected_weights(7, 3));
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_failed_and_canceled_jobs_are_retried() {
    let workers = TestWorkers::new().await;
    let job = workers.train("mug", 3).await;
    let again = async |job: &Job| retry(&workers.store, &workers.blobs, job, terms()).await.unwrap();
    assert_eq!(again(&job).await, Retried::WrongState(State::Queued));
    let canceled = workers.store.cancel(TENANT, job.id).await.unwrap().unwrap();
    let again_canceled = new(again(&canceled).await);
    let claimed = workers.store.claim(Uuid::now_v7(), &[Kind::Train], DAY, DAY).await.unwrap().unwrap();
    assert_eq!(claimed.id, again_canceled.id);
    assert_eq!(again(&claimed).await, Retried::WrongState(State::Running));
    workers.store.finish(claimed.lease(), &serde_json::json!({}), &[]).await.unwrap();
    let succeeded = workers.find(&claimed).await.unwrap();
    assert_eq!(again(&succeeded).await, Retried::WrongState(State::Succeeded));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_that_is_refused_leaves_no_object() {
    let workers = TestWorkers::new().await;
    let old = failed(&workers).await;
    let keys = async || {
        let entries = workers.blobs.list(&Scope::tenant(TENANT)).await.unwrap();
        entries.into_iter().map(|entry| entry.key.to_string()).collect::<Vec<_>>()
    };
    let before = keys().await;
    let full = Terms { queue_max: 0, ..terms() };
    let refused = retry(&workers.store, &workers.blobs, &old, full).await.unwrap();
    assert_eq!(refused, Retried::Submitted(Submitted::QueueFull));
    assert_eq!(keys().await, before);

    // A photo is gone: the two that were copied before it go as well.
    workers.blobs.delete(&Key::photo(TENANT, old.id, 2)).await.unwrap();
    let refused = retry(&workers.store, &workers.blobs, &old, terms()).await;
    assert!(matches!(refused, Err(Error::Blobs(hypnos::blobs::Error::Missing))), "{refused:?}");
    assert_eq!(keys().await, before[..2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_retry_sent_twice_is_one_job() {
    let workers = TestWorkers::new().await;
    let old = failed(&workers).await;
    let named = Idempotency { key: "again".into(), request_hash: "abc".into() };
    let named = || Terms { idempotency: Some(named.clone()), ..terms() };
    let first = new(retry(&workers.store, &workers.blobs, &old, named()).await.unwrap());
    let second = retry(&workers.store, &workers.blobs, &old, named()).await.unwrap();
    assert_eq!(second, Retried::Submitted(Submitted::Replayed(first)));
}
