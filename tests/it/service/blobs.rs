//! The contract of the object store, for a local directory, Garage and s3s-fs; then the behaviour of single ones.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures_util::TryStreamExt;
use hypnos::blobs::{BadLink, Blobs, BlobsConfig, Bucket, Error, Key, Links, Name, Place, Scope};
use hypnos::job::{Format, JobId, Lease, Object, TenantId};
use hypnos::ml::random;
use jiff::Timestamp;
use object_store::local::LocalFileSystem;
use object_store::{ObjectStore, ObjectStoreExt};
use reqwest::Method;
use tempfile::TempDir;

use super::chaos::{Chaos, StoreFault, keys};
use super::s3::{Fault, Faulty, Garage, files, http};

/// A store to test with: the service's access to it, and direct access to inspect and damage objects.
struct TestStore {
    blobs: Blobs,
    bare: Arc<dyn ObjectStore>,
    /// Prefix of the service's keys, seen by direct access.
    prefix: &'static str,
    server: Server,
}

enum Server {
    Directory(TempDir),
    Garage(Garage),
    Faulty(Faulty),
}

impl TestStore {
    async fn directory() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let blobs = open_directory(directory.path(), "a secret of sixteen").await;
        let bare = Arc::new(LocalFileSystem::new_with_prefix(directory.path()).unwrap());
        Self { blobs, bare, prefix: "", server: Server::Directory(directory) }
    }

    async fn garage() -> Self {
        let garage = Garage::start().await;
        let blobs = open_bucket(garage.bucket()).await;
        Self { blobs, bare: garage.store(), prefix: "test/pre/", server: Server::Garage(garage) }
    }

    async fn faulty() -> Self {
        let faulty = Faulty::start().await;
        let blobs = open_bucket(faulty.bucket()).await;
        Self { blobs, bare: faulty.store(), prefix: "test/pre/", server: Server::Faulty(faulty) }
    }

    /// Parts of uploads that were begun and not finished.
    async fn unfinished(&self) -> usize {
        match &self.server {
            Server::Directory(directory) => {
                files(directory.path()).iter().filter(|name| name.contains('#')).count()
            }
            Server::Garage(garage) => garage.unfinished().await,
            Server::Faulty(faulty) => faulty.unfinished(),
        }
    }

    fn path(&self, object: &Object) -> object_store::path::Path {
        format!("{}{}", self.prefix, object.key).into()
    }
}

async fn open_directory(directory: &Path, secret: &str) -> Blobs {
    let links = Links { public_url: "https://hypnos.example/".into(), secret: secret.into() };
    let config = BlobsConfig { place: Place::Directory(directory.into()), links: Some(links) };
    Blobs::open(&config).await.unwrap()
}

async fn open_bucket(bucket: Bucket) -> Blobs {
    Blobs::open(&BlobsConfig { place: Place::Bucket(bucket), links: None }).await.unwrap()
}

/// Bytes that no compression or coincidence makes alike.
fn noise(seed: u64, n_bytes: usize) -> Vec<u8> {
    (0..n_bytes.div_ceil(8))
        .flat_map(|n| random::derive(seed, &n.to_string()).to_le_bytes())
        .take(n_bytes)
        .collect()
}

/// Large files need not be all noise.
fn large(seed: u64, n_bytes: usize) -> Vec<u8> {
    noise(seed, 65_521).into_iter().cycle().take(n_bytes).collect()
}

fn lease() -> (TenantId, Lease) {
    (TenantId::new(), Lease { job: JobId::new(), run_lease: 1 })
}

fn image_key() -> Key {
    let (tenant, lease) = lease();
    Key::artifact(tenant, lease, Name::Image(0, Format::Png))
}

fn weights_key() -> Key {
    let (tenant, lease) = lease();
    Key::artifact(tenant, lease, Name::Weights)
}

fn job_of(key: &Key) -> Scope {
    let (tenant, job, _) = key.owner().unwrap();
    Scope::job(tenant, job)
}

async fn poll<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done().await {
        assert!(Instant::now() < deadline, "{what}: not within 30 s");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Fails if the text contains what a client or a log must not see.
fn assert_discreet(error: &Error) {
    let text = format!("{error} {error:?}");
    for word in ["/", "<", "http", "private", "secret", "hypnos"] {
        assert!(!text.contains(word), "{text} says {word}");
    }
}

async fn what_is_put_can_be_read(stage: &TestStore) {
    for (key, n_bytes) in [(image_key(), 100_000), (weights_key(), 0), (image_key(), 1)] {
        let bytes = noise(1, n_bytes);
        let object = stage.blobs.put(&key, bytes.clone()).await.unwrap();
        assert_eq!((object.size, object.key.as_str()), (n_bytes as u64, key.as_str()));
        assert_eq!(object.content_type, key.content_type());
        assert_eq!(stage.blobs.get(&object).await.unwrap(), bytes);
        let chunks: Vec<Bytes> = stage.blobs.stream(&object).await.unwrap().try_collect().await.unwrap();
        assert_eq!(chunks.concat(), bytes);
        // Written again, as after a lost answer: one object, the same.
        assert_eq!(stage.blobs.put(&key, bytes).await.unwrap(), object);
    }
    assert_eq!(keys(&*stage.bare).await.len(), 3);
}

async fn an_absent_object_is_missing(stage: &TestStore) {
    let object = stage.blobs.put(&image_key(), "x").await.unwrap();
    let gone = Object { key: image_key().as_str().into(), ..object.clone() };
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(stage.blobs.get(&gone).await, Err(Error::Missing));
    assert_eq!(stage.blobs.stream(&gone).await.err(), Some(Error::Missing));
    assert_eq!(stage.blobs.get_to_file(&gone, &directory.path().join("x")).await, Err(Error::Missing));
    // A row whose key we cannot have written.
    for key in ["", "../secret", "probe/x", "t/x/j/y/a/1/weights.safetensors"] {
        let forged = Object { key: key.into(), ..object.clone() };
        assert_eq!(stage.blobs.get(&forged).await, Err(Error::Missing));
    }
    assert!(files(directory.path()).is_empty());
}

async fn a_large_file_goes_in_parts_and_comes_back(stage: &TestStore) {
    let directory = tempfile::tempdir().unwrap();
    let (there, back) = (directory.path().join("there"), directory.path().join("back"));
    for n_bytes in [0, 3, 20 << 20] {
        let bytes = large(2, n_bytes);
        std::fs::write(&there, &bytes).unwrap();
        let mut heard = Vec::new();
        let object = stage.blobs.put_file(&weights_key(), &there, |sent| heard.push(sent)).await.unwrap();
        assert_eq!(object.size, n_bytes as u64);
        assert!(heard.is_sorted(), "{heard:?}");
        assert_eq!(heard.last(), Some(&(n_bytes as u64)));
        stage.blobs.get_to_file(&object, &back).await.unwrap();
        assert!(std::fs::read(&back).unwrap() == bytes);
    }
    assert_eq!(stage.unfinished().await, 0);
    assert_eq!(files(directory.path()).len(), 2);
}

async fn a_damaged_object_is_never_accepted(stage: &TestStore) {
    let bytes = noise(3, 300_000);
    let object = stage.blobs.put(&image_key(), bytes.clone()).await.unwrap();
    let mut flipped = bytes.clone();
    flipped[299_999] ^= 1;
    let longer = [&bytes[..], b"x"].concat();
    for damaged in [flipped, bytes[..150_000].to_vec(), longer, Vec::new()] {
        stage.bare.put(&stage.path(&object), damaged.into()).await.unwrap();
        assert_eq!(stage.blobs.get(&object).await, Err(Error::Damaged));
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("x");
        assert_eq!(stage.blobs.get_to_file(&object, &file).await, Err(Error::Damaged));
        assert!(files(directory.path()).is_empty());
        let streamed = match stage.blobs.stream(&object).await {
            Ok(stream) => {
                let mut n_bytes = 0;
                let end = stream
                    .try_for_each(|chunk| {
                        n_bytes += chunk.len();
                        async { Ok(()) }
                    })
                    .await;
                assert!(n_bytes < bytes.len());
                end
            }
            Err(error) => Err(error),
        };
        assert_eq!(streamed, Err(Error::Damaged));
    }
}

async fn only_an_owner_s_objects_are_listed_and_removed(stage: &TestStore) {
    let (tenant, other) = (TenantId::new(), TenantId::new());
    let (job, second) = (JobId::new(), JobId::new());
    let written = [
        Key::photo(tenant, job, 0),
        Key::artifact(tenant, Lease { job, run_lease: 1 }, Name::Weights),
        Key::artifact(tenant, Lease { job, run_lease: 10 }, Name::Weights),
        Key::artifact(tenant, Lease { job, run_lease: 10 }, Name::Checkpoint(200)),
        Key::photo(tenant, second, 0),
        Key::class_image(tenant, "abc", 5, Lease { job, run_lease: 1 }),
        Key::photo(other, job, 0),
    ];
    for key in &written {
        stage.blobs.put(key, "x").await.unwrap();
    }
    let listed = stage.blobs.list(&Scope::job(tenant, job)).await.unwrap();
    let mut expected = written[..4].to_vec();
    expected.sort();
    assert_eq!(listed.iter().map(|entry| entry.key.clone()).collect::<Vec<_>>(), expected);
    assert!(listed.iter().all(|entry| entry.size == 1));

    let attempt = Scope::attempt(tenant, Lease { job, run_lease: 1 });
    assert_eq!(stage.blobs.delete_all(&attempt).await, Ok(1));
    assert_eq!(stage.blobs.delete_all(&attempt).await, Ok(0));
    assert_eq!(stage.blobs.delete_all(&Scope::job(tenant, job)).await, Ok(3));
    assert_eq!(stage.blobs.delete_all(&Scope::tenant(tenant)).await, Ok(2));
    assert_eq!(keys(&*stage.bare).await, [format!("{}{}", stage.prefix, written[6])]);
    stage.blobs.delete(&written[6]).await.unwrap();
    stage.blobs.delete(&written[6]).await.unwrap();
    assert!(keys(&*stage.bare).await.is_empty());
}

// case 72
async fn an_upload_that_fails_or_is_dropped_leaves_no_part(stage: &TestStore) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("weights");
    std::fs::write(&file, large(4, 30 << 20)).unwrap();
    let chaos = Chaos::over(Arc::clone(&stage.bare));
    let blobs = Blobs::over(Arc::new(chaos.clone()));
    let key = weights_key();

    // Begin, four parts, complete: each of them once.
    for nth in 0..6 {
        chaos.inject(nth, StoreFault::FailsBefore);
        let error = blobs.put_file(&key, &file, |_| {}).await.unwrap_err();
        assert_eq!(error, Error::Unavailable("connection reset".into()), "operation {nth}");
        assert_eq!(stage.unfinished().await, 0, "operation {nth}");
    }
    chaos.inject(3, StoreFault::Full);
    assert_eq!(blobs.put_file(&key, &file, |_| {}).await, Err(Error::Full));
    assert!(keys(&*stage.bare).await.is_empty());

    // Dropped while its third part hangs.
    let before = chaos.n_answered();
    chaos.inject(3, StoreFault::HangsBefore);
    let sending = tokio::spawn({
        let (blobs, key, file) = (blobs.clone(), key.clone(), file.clone());
        async move { blobs.put_file(&key, &file, |_| {}).await }
    });
    poll("all but the third part", || async { chaos.n_answered() == before + 4 }).await;
    sending.abort();
    assert!(sending.await.unwrap_err().is_cancelled());
    poll("no part left", || async { stage.unfinished().await == 0 }).await;
    assert!(keys(&*stage.bare).await.is_empty());
}

async fn a_store_that_works_passes_the_probe_and_keeps_nothing_of_it(stage: &TestStore) {
    stage.blobs.probe().await.unwrap();
    stage.blobs.probe().await.unwrap();
    assert!(keys(&*stage.bare).await.is_empty());
}

async fn foreign_objects_are_reported_and_left_alone(stage: &TestStore) {
    let (tenant, job) = (TenantId::new(), JobId::new());
    let ours = [Key::photo(tenant, job, 0), Key::photo(tenant, job, 1)];
    for key in &ours {
        stage.blobs.put(key, "x").await.unwrap();
    }
    let foreign = [
        format!("t/{tenant}/j/{job}/photos/0.png.bak"),
        format!("t/{tenant}/j/{job}/photos/10"),
        format!("t/{tenant}/j/{job}/photos/a b+c.png"),
        format!("t/{tenant}/readme"),
    ];
    for key in &foreign {
        stage.bare.put(&format!("{}{key}", stage.prefix).into(), "x".into()).await.unwrap();
    }
    let found = stage.blobs.list_all(&Scope::job(tenant, job)).await.unwrap();
    assert_eq!(found.entries.iter().map(|entry| entry.key.clone()).collect::<Vec<_>>(), ours);
    assert_eq!(
        found.foreign,
        foreign[..3].iter().map(|key| format!("{}{key}", stage.prefix)).collect::<Vec<_>>()
    );
    assert_eq!(stage.blobs.delete_all(&Scope::tenant(tenant)).await, Ok(2));
    assert_eq!(keys(&*stage.bare).await.len(), 4);
}

async fn a_marker_is_read_as_it_was_written(stage: &TestStore) {
    assert_eq!(stage.blobs.marker().await.unwrap(), None);
    for text in ["one", "another"] {
        stage.blobs.put_marker(text).await.unwrap();
        assert_eq!(stage.blobs.marker().await.unwrap().unwrap(), text);
    }
    assert!(stage.blobs.is_empty().await.unwrap(), "it is no object of a job");
    let object = stage.blobs.put(&image_key(), "picture").await.unwrap();
    assert!(!stage.blobs.is_empty().await.unwrap());
    let gone = Object { key: image_key().as_str().into(), ..object.clone() };
    let other = Object { size: 1, ..object.clone() };
    assert_eq!(stage.blobs.count(&[object, gone, other]).await, Ok(1));
}

/// Runs every test of the contract on one store.
macro_rules! contract {
    ($($store:ident: [$($clause:ident),* $(,)?];)*) => {
        $(mod $store {
            $(#[tokio::test]
            async fn $clause() {
                super::$clause(&super::TestStore::$store().await).await;
            })*
        })*
    };
}

contract! {
    directory: [
        what_is_put_can_be_read,
        an_absent_object_is_missing,
        a_large_file_goes_in_parts_and_comes_back,
        a_damaged_object_is_never_accepted,
        only_an_owner_s_objects_are_listed_and_removed,
        an_upload_that_fails_or_is_dropped_leaves_no_part,
        a_store_that_works_passes_the_probe_and_keeps_nothing_of_it,
        foreign_objects_are_reported_and_left_alone,
        a_marker_is_read_as_it_was_written,
    ];
    garage: [
        what_is_put_can_be_read,
        an_absent_object_is_missing,
        a_large_file_goes_in_parts_and_comes_back,
        a_damaged_object_is_never_accepted,
        only_an_owner_s_objects_are_listed_and_removed,
        an_upload_that_fails_or_is_dropped_leaves_no_part,
        a_store_that_works_passes_the_probe_and_keeps_nothing_of_it,
        foreign_objects_are_reported_and_left_alone,
        a_marker_is_read_as_it_was_written,
        a_bucket_s_link_reads_one_object_until_it_expires,
        a_bucket_with_the_wrong_secret_refuses,
    ];
    faulty: [
        what_is_put_can_be_read,
        an_absent_object_is_missing,
        a_large_file_goes_in_parts_and_comes_back,
        a_damaged_object_is_never_accepted,
        only_an_owner_s_objects_are_listed_and_removed,
        an_upload_that_fails_or_is_dropped_leaves_no_part,
        a_store_that_works_passes_the_probe_and_keeps_nothing_of_it,
        foreign_objects_are_reported_and_left_alone,
        a_marker_is_read_as_it_was_written,
        a_bucket_s_link_reads_one_object_until_it_expires,
        a_bucket_with_the_wrong_secret_refuses,
    ];
}

impl TestStore {
    fn bucket(&self) -> Bucket {
        match &self.server {
            Server::Garage(garage) => garage.bucket(),
            Server::Faulty(faulty) => faulty.bucket(),
            Server::Directory(_) => panic!("a directory is no bucket"),
        }
    }
}

async fn a_bucket_s_link_reads_one_object_until_it_expires(stage: &TestStore) {
    let (client, now) = (http(), Timestamp::now());
    let object = stage.blobs.put(&image_key(), "picture").await.unwrap();
    let other = stage.blobs.put(&image_key(), "another").await.unwrap();
    let hour = Duration::from_hours(1);
    let url = stage.blobs.sign(&object, hour, now).await.unwrap();
    assert!(url.split_once('?').unwrap().0.ends_with("/image-0.png"), "{url}");
    let answer = client.get(&url).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["content-type"], "image/png");
    assert_eq!(answer.bytes().await.unwrap(), "picture");

    let refused = async |method: Method, url: &str| {
        let status = client.request(method.clone(), url).body("").send().await.unwrap().status();
        assert!(status.is_client_error(), "{method} {url}: {status}");
    };
    refused(Method::PUT, &url).await;
    refused(Method::DELETE, &url).await;
    refused(Method::GET, &url.replace(&object.key, &other.key)).await;
    refused(Method::GET, &url.replace("X-Amz-Expires=3600", "X-Amz-Expires=7200")).await;
    refused(Method::GET, url.split_once('?').unwrap().0).await;
    assert_eq!(stage.blobs.get(&object).await.unwrap(), "picture");
    assert_eq!(stage.blobs.verify(&object.key, "expires=1", now), Err(BadLink::Forged));

    let short = stage.blobs.sign(&object, Duration::from_secs(1), now).await.unwrap();
    poll("the end of a link", || async {
        client.get(&short).send().await.unwrap().status().is_client_error()
    })
    .await;

    // Clients reach the server by another name, which is the one that is signed.
    let public = stage.bucket().endpoint.unwrap().replace("127.0.0.1", "localhost");
    let blobs = open_bucket(Bucket { public_endpoint: Some(public.clone()), ..stage.bucket() }).await;
    let url = blobs.sign(&object, hour, now).await.unwrap();
    assert!(url.starts_with(&public), "{url}");
    assert_eq!(client.get(&url).send().await.unwrap().status(), 200);
}

async fn a_bucket_with_the_wrong_secret_refuses(stage: &TestStore) {
    let wrong = Bucket { credentials: super::s3::keys(&"0".repeat(64)), ..stage.bucket() };
    let blobs = open_bucket(wrong.clone()).await;
    assert!(!format!("{wrong:?} {blobs:?}").contains(&"0".repeat(64)));
    for error in [blobs.probe().await.unwrap_err(), blobs.put(&image_key(), "x").await.unwrap_err()] {
        assert!(
            matches!(&error, Error::Refused(refusal) if refusal.to_string().starts_with("403 ")),
            "{error}"
        );
        assert_discreet(&error);
    }
}

#[tokio::test]
async fn a_missing_bucket_and_an_unreachable_server_are_not_missing_objects() {
    let garage = Garage::start().await;
    let blobs = open_bucket(garage.bucket()).await.with_request_timeout(Duration::from_secs(2));
    let object = blobs.put(&image_key(), "x").await.unwrap();
    let nowhere = open_bucket(Bucket { name: "nowhere".into(), ..garage.bucket() }).await;
    for error in [
        nowhere.probe().await.unwrap_err(),
        nowhere.put(&image_key(), "x").await.unwrap_err(),
        // An object of a bucket that is not there is not lost.
        nowhere.get(&object).await.unwrap_err(),
        nowhere.list(&job_of(&image_key())).await.unwrap_err(),
    ] {
        assert!(
            matches!(&error, Error::Refused(refusal) if refusal.to_string() == "404 NoSuchBucket"),
            "{error}"
        );
        assert_discreet(&error);
    }
    drop(garage);
    // case 68
    for error in [blobs.probe().await.unwrap_err(), blobs.get(&object).await.unwrap_err()] {
        assert!(matches!(error, Error::Unavailable(_)), "{error}");
        assert_discreet(&error);
    }
}

#[tokio::test]
async fn our_own_link_reads_one_object_until_it_expires() {
    let directory = tempfile::tempdir().unwrap();
    let blobs = open_directory(directory.path(), "a secret of sixteen").await;
    let object = blobs.put(&image_key(), "picture").await.unwrap();
    let now = Timestamp::from_second(1_800_000_000).unwrap();
    let url = blobs.sign(&object, Duration::from_mins(1), now).await.unwrap();
    let (path, query) = url.split_once('?').unwrap();
    assert_eq!(path, format!("https://hypnos.example/v1/files/{}", object.key));
    assert!(path.ends_with("/image-0.png"));

    let at = |seconds: i64| now + Duration::from_secs(seconds.unsigned_abs());
    let key = object.key.as_str();
    assert_eq!(blobs.verify(key, query, at(0)), Ok(object.clone()));
    assert_eq!(blobs.verify(key, query, at(59)), Ok(object.clone()));
    assert_eq!(blobs.verify(key, query, at(60)), Err(BadLink::Expired));

    let others = image_key();
    let other = open_directory(directory.path(), "another secret of ours").await;
    assert_eq!(other.verify(key, query, at(0)), Err(BadLink::Forged));
    assert_eq!(blobs.verify(others.as_str(), query, at(0)), Err(BadLink::Forged));
    let mut forged = vec![
        String::new(),
        query.replace("expires=1800000060", "expires=1900000000"),
        query.replace("size=7", "size=8"),
        query.replace("&signature=", "&signature=0"),
        query.replace("signature", "Signature"),
        query.split_once("&signature").unwrap().0.to_owned(),
        format!("{query}&x=1"),
        format!("{query}00"),
        query[..query.len() - 2].to_owned(),
    ];
    // Every character of it counts.
    for at in 0..query.len() {
        let turned = if query.as_bytes()[at] == b'0' { "1" } else { "0" };
        forged.push(format!("{}{turned}{}", &query[..at], &query[at + 1..]));
    }
    for query in forged {
        assert_eq!(blobs.verify(key, &query, at(0)), Err(BadLink::Forged), "{query}");
    }
    // A process that was not told how makes none and takes none.
    let place = Place::Directory(directory.path().into());
    let mute = Blobs::open(&BlobsConfig { place, links: None }).await.unwrap();
    assert!(mute.sign(&object, Duration::from_mins(1), now).await.is_err());
    assert_eq!(mute.verify(key, query, at(0)), Err(BadLink::Forged));
}

#[tokio::test]
async fn what_a_killed_upload_left_in_a_directory_is_swept_when_it_is_old() {
    let directory = tempfile::tempdir().unwrap();
    let blobs = open_directory(directory.path(), "a secret of sixteen").await;
    let object = blobs.put(&image_key(), "whole").await.unwrap();
    let place = directory.path().join(&object.key);
    let beside = |end: &str| place.with_file_name(format!("image-0.png{end}"));
    for end in ["#1", "#22", "#x"] {
        std::fs::write(beside(end), "half").unwrap();
    }
    let old = SystemTime::now() - Duration::from_hours(25);
    for path in [&place, &beside("#1"), &beside("#x")] {
        std::fs::File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
    }
    let blobs = {
        drop(blobs);
        open_directory(directory.path(), "a secret of sixteen").await
    };
    let mut left = files(directory.path());
    left.sort();
    assert_eq!(left, ["image-0.png", "image-0.png#22", "image-0.png#x"]);
    assert_eq!(blobs.sweep_unfinished(Duration::ZERO).await, Ok(1));
    assert_eq!(blobs.get(&object).await.unwrap(), "whole");
}

#[tokio::test]
async fn a_store_that_fails_hangs_or_is_full_is_an_error_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let chaos = Chaos::over(Arc::new(LocalFileSystem::new_with_prefix(directory.path()).unwrap()));
    let blobs = Blobs::over(Arc::new(chaos.clone())).with_request_timeout(Duration::from_millis(200));
    let key = image_key();
    let object = blobs.put(&key, "picture").await.unwrap();
    let scope = job_of(&key);
    let expected = [
        (StoreFault::FailsBefore, Error::Unavailable("connection reset".into())),
        (StoreFault::HangsBefore, Error::Unavailable("timeout".into())),
        (StoreFault::HangsAfter, Error::Unavailable("timeout".into())),
        (StoreFault::Full, Error::Full),
    ];
    for (what, expected) in expected {
        chaos.inject_all(Some(what));
        assert_eq!(blobs.put(&key, "picture").await, Err(expected.clone()), "{what:?}");
        assert_eq!(blobs.get(&object).await, Err(expected.clone()), "{what:?}");
        assert_eq!(blobs.stream(&object).await.err(), Some(expected.clone()), "{what:?}");
        assert_eq!(blobs.list(&scope).await, Err(expected.clone()), "{what:?}");
        assert_eq!(blobs.probe().await, Err(expected.clone()), "{what:?}");
        if what != StoreFault::HangsAfter {
            assert_eq!(blobs.delete(&key).await, Err(expected.clone()), "{what:?}");
        }
        assert_discreet(&expected);
        chaos.inject_all(None);
        assert_eq!(blobs.get(&object).await.unwrap(), "picture", "{what:?}");
    }
    // case 70: half of it once is read again, twice is damaged.
    chaos.inject(0, StoreFault::Short);
    assert_eq!(blobs.get(&object).await.unwrap(), "picture");
    chaos.inject(0, StoreFault::Short);
    chaos.inject(1, StoreFault::Short);
    assert_eq!(blobs.get(&object).await, Err(Error::Damaged));
    // case 69: done, but nobody heard.
    chaos.inject(0, StoreFault::FailsAfter);
    assert!(blobs.put(&key, "picture").await.is_err());
    assert_eq!(blobs.put(&key, "picture").await, Ok(object));
    // What a probe that was cut off left, the next one takes along.
    assert_eq!(keys(&chaos).await.len(), 2);
    blobs.probe().await.unwrap();
    assert_eq!(keys(&chaos).await, [key.as_str()]);
}

// cases 68, 69
#[tokio::test]
async fn a_failing_server_is_retried_and_stores_one_object() {
    let server = Faulty::start().await;
    let blobs = open_bucket(server.bucket()).await;
    for fault in [Fault::SlowDown, Fault::Broken, Fault::Deaf, Fault::Lost, Fault::Slow] {
        let bytes = noise(5, 50_000);
        let key = image_key();
        server.inject(|method, _| method == "PUT", fault, 2);
        let object =
            blobs.put(&key, bytes.clone()).await.unwrap_or_else(|error| panic!("{fault:?}: {error}"));
        server.inject(|method, _| method == "GET", fault, 2);
        assert_eq!(blobs.get(&object).await.unwrap(), bytes, "{fault:?}");
        assert_eq!(blobs.delete_all(&job_of(&key)).await, Ok(1));
        server.calm();
    }
    // For good: an error in time, in our words.
    let blobs = blobs.with_request_timeout(Duration::from_secs(2));
    server.inject(|_, _| true, Fault::Broken, usize::MAX);
    let error = blobs.put(&image_key(), "x").await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error}");
    assert_discreet(&error);
}

// case 70
#[tokio::test]
async fn a_truncated_or_corrupted_body_is_fetched_again_and_never_accepted() {
    let server = Faulty::start().await;
    let blobs = open_bucket(server.bucket()).await;
    let bytes = noise(6, 200_000);
    let object = blobs.put(&image_key(), bytes.clone()).await.unwrap();
    for fault in [Fault::Cut, Fault::Short, Fault::Flip] {
        server.inject(|method, _| method == "GET", fault, 1);
        assert_eq!(blobs.get(&object).await.unwrap(), bytes, "{fault:?}");
        server.calm();
    }
    for fault in [Fault::Short, Fault::Flip] {
        server.inject(|method, _| method == "GET", fault, usize::MAX);
        assert_eq!(blobs.get(&object).await, Err(Error::Damaged), "{fault:?}");
        server.calm();
    }
    assert_eq!(blobs.get(&object).await.unwrap(), bytes);
}

// case 72
#[tokio::test]
async fn an_upload_that_cannot_be_completed_leaves_no_part_on_the_server() {
    let server = Faulty::start().await;
    let blobs = open_bucket(server.bucket()).await.with_request_timeout(Duration::from_secs(3));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("weights");
    std::fs::write(&file, large(7, 20 << 20)).unwrap();
    server.inject(|method, uri| method == "POST" && uri.contains("uploadId="), Fault::Broken, usize::MAX);
    let error = blobs.put_file(&weights_key(), &file, |_| {}).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error}");
    assert_discreet(&error);
    assert_eq!(server.unfinished(), 0);
    server.calm();

    server.inject(|method, uri| method == "PUT" && uri.contains("partNumber=2"), Fault::SlowDown, 2);
    let object = blobs.put_file(&weights_key(), &file, |_| {}).await.unwrap();
    blobs.get_to_file(&object, &directory.path().join("back")).await.unwrap();
}

// cases 68-70
#[tokio::test]
async fn under_any_faults_what_is_read_is_what_was_written_or_an_error() {
    let server = Faulty::start().await;
    let blobs = open_bucket(server.bucket()).await.with_request_timeout(Duration::from_secs(10));
    server.strike_at_random(11, 4);
    let (mut n_read, mut n_written) = (0, 0);
    for n in 0..60 {
        let bytes = noise(n, 10_000);
        let Ok(object) = blobs.put(&image_key(), bytes.clone()).await else { continue };
        n_written += 1;
        if let Ok(back) = blobs.get(&object).await {
            assert!(back == bytes, "object {n}");
            n_read += 1;
        }
    }
    assert!(n_written > 40 && n_read > 30, "{n_written} written, {n_read} read");
}
