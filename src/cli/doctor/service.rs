//! The database and the object store.

use super::Finding;
use crate::blobs::{self, Blobs, Place};
use crate::cli::error::CliError;
use crate::cli::service::{open_existing_blobs, open_existing_store};
use crate::config::Storage;
use crate::store::{Sessions, Store};
use crate::{clock, deployment};

/// Clocks that differ by more are wrong, in milliseconds.
const CLOCKS_APART_MOST: i64 = 5_000;

pub(super) async fn check(storage: &Storage) -> Vec<Finding> {
    let (mut findings, store) = database(storage).await;
    let (finding, blobs) = objects(storage).await;
    findings.push(finding);
    if let (Some(store), Some(blobs)) = (&store, &blobs) {
        findings.push(pairing(store, blobs).await);
    }
    if let Some(store) = store {
        store.close().await;
    }
    findings
}

fn line(error: CliError) -> String {
    match error {
        CliError::Input(line) | CliError::Failed(line) => line,
        CliError::Interrupted => "interrupted".into(),
    }
}

async fn database(storage: &Storage) -> (Vec<Finding>, Option<Store>) {
    let wrong = |found: String| {
        let advice = "look at HYPNOS_DATABASE: whether its server runs, can be reached, and takes this user";
        (vec![Finding::error("database", found, advice)], None)
    };
    match storage.sqlite_file() {
        Ok(Some(file)) if !file.is_file() => {
            let found = format!("there is no SQLite file {} yet", file.display());
            return (vec![Finding::warning("database", found, "hypnos serve makes it")], None);
        }
        Err(error) => return wrong(error.to_string()),
        Ok(_) => {}
    }
    let store = match open_existing_store(storage).await {
        Ok(store) => store,
        Err(error) => return wrong(line(error)),
    };
    let server = match store.server().await {
        Ok(server) => server,
        Err(error) => return wrong(error.to_string()),
    };
    let kind = match store.sessions() {
        None => "SQLite",
        Some(Sessions::Own) => "Postgres",
        Some(Sessions::Shared) => "Postgres behind a pooler",
    };
    let mut findings =
        vec![Finding::ok("database", format!("{kind} {}, its schema is this program's", server.version))];
    let apart = server.now_ms - clock::timestamp().as_millisecond();
    if apart.abs() > CLOCKS_APART_MOST {
        let found = format!("the database's clock is {:.1} s from this machine's", apart as f64 / 1e3);
        findings.push(Finding::warning(
            "database's clock",
            found,
            "set both by NTP: links and signatures expire by them",
        ));
    }
    if store.sessions() == Some(Sessions::Shared) && !matches!(storage.database_direct(), Ok(Some(_))) {
        let found = "without HYPNOS_DATABASE_DIRECT the queue is polled every HYPNOS_POLL_SECS";
        let advice = "set it to the address of Postgres itself, for jobs to start at once";
        findings.push(Finding::warning("database's pooler", found, advice));
    }
    (findings, Some(store))
}

async fn objects(storage: &Storage) -> (Finding, Option<Blobs>) {
    let wrong = |found: String| {
        let advice = "look at HYPNOS_OBJECTS and HYPNOS_S3_*: the address, the keys, their permissions";
        (Finding::error("object store", found, advice), None)
    };
    let kind = match storage.place() {
        Ok(Place::Directory(dir)) if !dir.is_dir() => {
            let found = format!("there is no directory {} yet", dir.display());
            return (Finding::warning("object store", found, "hypnos serve makes it"), None);
        }
        Ok(Place::Directory(dir)) => format!("directory {}", dir.display()),
        Ok(_) => "bucket".into(),
        Err(error) => return wrong(error.to_string()),
    };
    let blobs = match open_existing_blobs(storage).await {
        Ok(blobs) => blobs,
        Err(error) => return wrong(line(error)),
    };
    match blobs.probe().await {
        Ok(()) => {
            let found = format!("{kind}: an object was written, read back and removed");
            (Finding::ok("object store", found), Some(blobs))
        }
        Err(blobs::Error::Refused(refusal)) => wrong(format!("{kind}: {}", refusal.details())),
        Err(error) => wrong(format!("{kind}: {error}")),
    }
}

async fn pairing(store: &Store, blobs: &Blobs) -> Finding {
    let check = "database and objects";
    match deployment::check(store, blobs).await {
        Ok(own) => Finding::ok(check, format!("belong together: deployment {}", own.id)),
        Err(error @ deployment::Error::Mismatch(_)) => {
            Finding::warning(check, error.to_string(), "hypnos serve pairs new ones when it starts")
        }
        Err(error) => Finding::error(check, error.to_string(), "see the lines above"),
    }
}
