//! The database and the object store.

use nix::unistd::{AccessFlags, access};
use secrecy::ExposeSecret;

use super::Finding;
use crate::blobs::{self, Blobs, BlobsConfig, Place};
use crate::config::Storage;
use crate::store::{self, Sessions, Store};
use crate::{clock, deployment};

/// Clocks that differ by more are wrong, in milliseconds.
const CLOCKS_APART_MOST: i64 = 5_000;

pub(super) async fn check(storage: &Storage) -> Vec<Finding> {
    let (mut findings, store) = database(storage).await;
    let (finding, blobs) = objects(storage, store.as_ref()).await;
    findings.push(finding);
    if let (Some(store), Some(blobs)) = (&store, &blobs) {
        findings.push(pairing(store, blobs).await);
    }
    if let Some(store) = store {
        store.close().await;
    }
    findings
}

/// Opens the database, which is neither made nor migrated.
async fn database(storage: &Storage) -> (Vec<Finding>, Option<Store>) {
    let wrong = |found: String, advice: &str| (vec![Finding::error("database", found, advice)], None);
    let unreachable =
        "look at HYPNOS_DATABASE: whether its server runs, can be reached, and lets this user in";
    match storage.sqlite_file() {
        Ok(Some(file)) if !file.is_file() => {
            let found = format!("there is no SQLite file {} yet", file.display());
            return (vec![Finding::warning("database", found, "hypnos serve makes it when it starts")], None);
        }
        Err(error) => return wrong(error.to_string(), "correct the setting"),
        Ok(_) => {}
    }
    let url = match storage.existing_database_url().and_then(|url| storage.check_local().map(|()| url)) {
        Ok(url) => url,
        Err(error) => return wrong(error.to_string(), "correct the setting"),
    };
    let opened = async {
        let store = Store::connect(url.expose_secret(), storage.database_connections).await?;
        store.check_schema().await?;
        let server = store.server().await?;
        Ok((store, server))
    };
    let (store, server) = match opened.await {
        Ok(opened) => opened,
        Err(error @ store::Error::Schema(_)) => {
            let advice = "hypnos migrate brings the database up to this program, after a backup (docs/backup.md); \
                          a SQLite file is migrated when hypnos serve starts";
            return wrong(error.to_string(), advice);
        }
        Err(error) => return wrong(error.to_string(), unreachable),
    };
    let kind = match store.sessions() {
        None => "SQLite",
        Some(Sessions::Own) => "Postgres",
        Some(Sessions::Shared) => "Postgres behind a pooler",
    };
    let found = format!("{kind} {}, answers, its schema is this program's", server.version);
    let mut findings = vec![Finding::ok("database", found)];
    let apart = server.now_ms - clock::timestamp().as_millisecond();
    if apart.abs() > CLOCKS_APART_MOST {
        let found = format!("the database's clock is {:.1} s from this machine's", apart as f64 / 1e3);
        let advice = "set both by NTP: links and signatures expire by them";
        findings.push(Finding::warning("database's clock", found, advice));
    }
    if store.sessions() == Some(Sessions::Shared) && !matches!(storage.database_direct(), Ok(Some(_))) {
        let found = "without HYPNOS_DATABASE_DIRECT the queue is polled every HYPNOS_POLL_SECS";
        let advice = "set it to the address of Postgres itself, for jobs to start at once";
        findings.push(Finding::warning("database's pooler", found, advice));
    }
    (findings, Some(store))
}

/// Reads from the object store. Nothing is written: whether a bucket can be written to shows when a process starts.
async fn objects(storage: &Storage, database: Option<&Store>) -> (Finding, Option<Blobs>) {
    let check = "object store";
    let wrong = |found: String| {
        let advice = "look at HYPNOS_OBJECTS and HYPNOS_S3_*: the address, the keys, their permissions";
        (Finding::error(check, found, advice), None)
    };
    let place = match storage.place() {
        Ok(place) => place,
        Err(error) => return wrong(error.to_string()),
    };
    if let Place::Directory(dir) = &place
        && !dir.is_dir()
    {
        let missing = format!("there is no directory {}", dir.display());
        // A database that was paired with one has rows that name its objects.
        let was_paired = match database {
            Some(store) => matches!(store.deployment().await, Ok(Some(_))),
            None => false,
        };
        let finding = if dir.exists() {
            Finding::error(check, format!("{} is not a directory", dir.display()), "correct HYPNOS_OBJECTS")
        } else if was_paired {
            let advice =
                "correct HYPNOS_OBJECTS, or mount its disk: the database names objects that were in it";
            Finding::error(check, missing, advice)
        } else {
            Finding::warning(check, format!("{missing} yet"), "hypnos serve makes it when it starts")
        };
        return (finding, None);
    }
    let found = match &place {
        Place::Directory(dir) => match access(dir, AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK)
        {
            Ok(()) => format!("directory {}: can be read and written", dir.display()),
            Err(error) => {
                return wrong(format!(
                    "directory {}: cannot be read and written: {}",
                    dir.display(),
                    error.desc()
                ));
            }
        },
        Place::Bucket(_) => "bucket: can be read; whether it can be written shows when hypnos starts".into(),
    };
    let read = async {
        let blobs = Blobs::existing(&BlobsConfig { place, links: None })?;
        blobs.marker().await.map(|_| blobs)
    };
    match read.await {
        Ok(blobs) => (Finding::ok(check, found), Some(blobs)),
        Err(blobs::Error::Refused(refusal)) => {
            wrong(format!("the store rejects the request: {}", refusal.details()))
        }
        Err(error) => wrong(error.to_string()),
    }
}

/// Whether both carry the same marker.
async fn pairing(store: &Store, blobs: &Blobs) -> Finding {
    let check = "database and objects";
    match deployment::check(store, blobs).await {
        Ok(own) => Finding::ok(check, format!("belong together: deployment {}", own.id)),
        Err(error @ deployment::Error::Mismatch(_)) => {
            let is_new =
                matches!(store.deployment().await, Ok(None)) && matches!(blobs.marker().await, Ok(None));
            if is_new {
                return Finding::warning(check, error.to_string(), "hypnos serve marks both when it starts");
            }
            Finding::error(
                check,
                error.to_string(),
                "nothing starts on these two: correct the setting that is wrong",
            )
        }
        Err(error) => Finding::error(check, error.to_string(), "see the lines above"),
    }
}
