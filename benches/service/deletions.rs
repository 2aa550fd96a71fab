//! How many trainings a second are deleted to the last object, as `serve` does it on a local disk.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures_util::{StreamExt, stream};
use hypnos::blobs::{Key, Name, Scope};
use hypnos::job::{Format, JobId, Lease};
use hypnos::maintenance;
use tokio_util::sync::CancellationToken;

use super::Service;

/// Objects of each training: its photos, and what its one attempt wrote.
const N_PHOTOS: usize = 3;
const N_IMAGES: usize = 4;
/// Bytes of each object: what takes long is the file, not its length.
const OBJECT_BYTES: usize = 10_000;

/// Makes `n` trainings with their objects, then deletes them by HTTP from `clients` connections. Counted is the time
/// from the first request until neither a row nor an object is left.
pub(super) async fn deletions(service: &Service, n: usize, clients: usize) -> Result<()> {
    let mut jobs = Vec::new();
    for _ in 0..n {
        jobs.push(stored(service).await?);
    }
    let stop = CancellationToken::new();
    let pause = Duration::from_secs(15);
    let maintaining = maintenance::run(service.store.clone(), service.blobs.clone(), pause, stop.clone());
    let maintaining = tokio::spawn(maintaining);
    let client = reqwest::Client::new();
    let began = Instant::now();
    let requests = jobs.clone().into_iter().map(|job| {
        let url = format!("http://{}/v1/jobs/{job}", service.address);
        let request = client.delete(url).bearer_auth(&service.key);
        async move {
            let answer = request.send().await?;
            let status = answer.status().as_u16();
            ensure!(status == 204, "wanted 204, got {status}");
            anyhow::Ok(())
        }
    });
    let mut answers = stream::iter(requests).buffer_unordered(clients.max(1));
    while let Some(answer) = answers.next().await {
        answer?;
    }
    let answered = began.elapsed();
    while service.store.n_deleting().await? > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let erased = began.elapsed();
    stop.cancel();
    let _ = maintaining.await; // it ends because it was told to
    for job in jobs {
        let left = service.blobs.list(&Scope::job(service.tenant, job)).await?;
        ensure!(left.is_empty(), "an object of a deleted training is still there");
    }
    println!(
        "deletions/s, of {n} with {} objects each: {:.0} (answered: {:.0})",
        N_PHOTOS + N_IMAGES,
        n as f64 / erased.as_secs_f64(),
        n as f64 / answered.as_secs_f64()
    );
    Ok(())
}

/// A training that has ended, with its objects in the store.
async fn stored(service: &Service) -> Result<JobId> {
    let job = service.submit().await?;
    service.store.cancel(service.tenant, job).await?;
    let lease = Lease { job, run_lease: 1 };
    let photos = (0..N_PHOTOS).map(|n| Key::photo(service.tenant, job, n));
    let images = (0..N_IMAGES).map(|n| Key::artifact(service.tenant, lease, Name::Image(n, Format::Png)));
    for key in photos.chain(images) {
        service.blobs.put(&key, vec![0; OBJECT_BYTES]).await?;
    }
    Ok(job)
}
