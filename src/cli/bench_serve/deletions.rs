//! How many trainings a second are deleted to the last object, as `serve` does it on a local disk.

use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use tokio_util::sync::CancellationToken;

use super::{House, failed};
use crate::blobs::{Key, Name, Scope};
use crate::cli::{Stop, say};
use crate::janitor;
use crate::job::{Format, JobId, Lease};

/// Objects of each training: its photos, and what its one attempt wrote.
const N_PHOTOS: usize = 3;
const N_IMAGES: usize = 4;
/// Bytes of each object: what takes long is the file, not its length.
const OBJECT_BYTES: usize = 10_000;

/// Makes `n` trainings with their objects, then deletes them by HTTP from `clients` connections. Counted is the time from
/// the first request until neither a row nor an object is left.
pub(super) async fn deletions(house: &House, n: usize, clients: usize) -> Result<(), Stop> {
    let mut jobs = Vec::new();
    for _ in 0..n {
        jobs.push(stored(house).await?);
    }
    let stop = CancellationToken::new();
    let pause = Duration::from_secs(15);
    let tidying = janitor::run(house.store.clone(), house.blobs.clone(), pause, stop.clone());
    let tidying = tokio::spawn(tidying);
    let client = reqwest::Client::new();
    let began = Instant::now();
    let requests = jobs.clone().into_iter().map(|job| {
        let url = format!("http://{}/v1/jobs/{job}", house.address);
        let request = client.delete(url).bearer_auth(&house.key);
        async move {
            let answer = request.send().await.map_err(|error| Stop::Failed(error.to_string()))?;
            let status = answer.status().as_u16();
            if status == 204 { Ok(()) } else { Err(Stop::Failed(format!("wanted 204, got {status}"))) }
        }
    });
    let mut answers = stream::iter(requests).buffer_unordered(clients.max(1));
    while let Some(answer) = answers.next().await {
        answer?;
    }
    let answered = began.elapsed();
    while house.store.n_deleting().await.map_err(failed)? > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let erased = began.elapsed();
    stop.cancel();
    let _ = tidying.await; // it ends because it was told to
    for job in jobs {
        let left = house.blobs.list(&Scope::job(house.tenant, job)).await;
        if !left.map_err(|error| Stop::Failed(error.to_string()))?.is_empty() {
            return Err(Stop::Failed("an object of a deleted training is still there".into()));
        }
    }
    say(&format!(
        "deletions/s, of {n} with {} objects each: {:.0} (answered: {:.0})",
        N_PHOTOS + N_IMAGES,
        n as f64 / erased.as_secs_f64(),
        n as f64 / answered.as_secs_f64()
    ));
    Ok(())
}

/// A training that has ended, with its objects in the store.
async fn stored(house: &House) -> Result<JobId, Stop> {
    let job = house.submit().await?;
    house.store.cancel(house.tenant, job).await.map_err(failed)?;
    let lease = Lease { job, run_lease: 1 };
    let photos = (0..N_PHOTOS).map(|n| Key::photo(house.tenant, job, n));
    let images = (0..N_IMAGES).map(|n| Key::artifact(house.tenant, lease, Name::Image(n, Format::Png)));
    for key in photos.chain(images) {
        let stored = house.blobs.put(&key, vec![0; OBJECT_BYTES]).await;
        stored.map_err(|error| Stop::Failed(error.to_string()))?;
    }
    Ok(job)
}
