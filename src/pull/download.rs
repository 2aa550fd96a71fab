//! One file from its source onto the disk: gone on with where it was cut off, repeated when the network fails, and
//! compared with its hashes.

use std::path::Path;
use std::time::Duration;

use tokio::time::sleep;

use super::hub::{Answer, Failure, Hub, Rest, again};
use super::local_file::LocalFile;
use super::partial::Partial;
use super::sources::File;
use super::{Error, Listener};

/// Attempts in a row that brought no bytes.
const ATTEMPTS_MAX: u32 = 6;

/// How often a file is begun again because its server sends another one, or one that does not go with what is there.
const BEGINNINGS_MAX: u32 = 3;

/// The first wait between two attempts; each is twice as long as the one before.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// Fetches a file to `path`, or the rest of it. It may be there in part, from an earlier run or a killed one.
pub(super) async fn download(
    hub: &Hub,
    file: &File,
    path: &Path,
    listener: &dyn Listener,
) -> Result<LocalFile, Error> {
    let mut partial = Partial::open(file, path).await?;
    listener.resumed(partial.n());
    let (mut attempts, mut n_begun_again) = (0, 0);
    // Not merely more than before the attempt: a server without ranges begins with the first byte each time.
    let mut furthest = partial.n();
    let mut is_expected = file.expected_size().is_some();
    loop {
        let failure = match attempt(hub, file, &mut partial, &mut is_expected, listener).await {
            Ok(()) => match partial.finish(file).await? {
                Some(got) => return Ok(got),
                None => Failure::BeginAgain("its size or hash is wrong with what was fetched before"),
            },
            Err(failure) => failure,
        };
        let (why, after) = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Again(why, after) => (why, after),
            Failure::BeginAgain(why) => {
                begin_again(file, &mut partial, listener).await?;
                (furthest, n_begun_again) = (0, n_begun_again + 1);
                (why.to_owned(), Some(Duration::ZERO))
            }
        };
        attempts = if partial.n() > furthest { 1 } else { attempts + 1 };
        furthest = furthest.max(partial.n());
        if attempts >= ATTEMPTS_MAX || n_begun_again > BEGINNINGS_MAX {
            let what = format!("cannot be fetched: {why}; the same command goes on with what is missing");
            return Err(Error::Failed(format!("{}: {what}", file.place.source())));
        }
        let after = after.unwrap_or(FIRST_WAIT * 2_u32.pow(attempts - 1));
        listener.say(&format!("{}: {why}; trying again{}", file.place.source(), in_seconds(after)));
        sleep(after).await;
    }
}

fn in_seconds(wait: Duration) -> String {
    if wait.as_secs() > 1 { format!(" in {} s", wait.as_secs()) } else { String::new() }
}

async fn begin_again(file: &File, partial: &mut Partial, listener: &dyn Listener) -> Result<(), Error> {
    listener.moved(-(partial.n() as i64));
    partial.begin_again(file).await
}

/// Asks for what is missing, and writes it.
async fn attempt(
    hub: &Hub,
    file: &File,
    partial: &mut Partial,
    is_expected: &mut bool,
    listener: &dyn Listener,
) -> Result<(), Failure> {
    if partial.is_whole(file) {
        return Ok(());
    }
    let rest = Rest { from: partial.n(), validator: partial.validator() };
    let mut answer = hub.get(file, &rest).await?;
    if answer.start < partial.n() {
        begin_again(file, partial, listener).await?; // the server sends all of it
    } else if partial.n() > 0 && !partial.is_of(answer.etag.as_deref(), file) {
        return Err(Failure::BeginAgain("it may have changed"));
    }
    check_size(file, answer.total)?;
    partial.note(&answer).await?;
    if !std::mem::replace(is_expected, true) {
        listener.expect(answer.total.unwrap_or(0));
    }
    receive(file, &mut answer, partial, listener).await
}

fn check_size(file: &File, total: Option<u64>) -> Result<(), Error> {
    match (file.size, total) {
        (Some(wanted), Some(found)) if wanted != found => {
            let what = format!("has {found} bytes; {wanted} are wanted");
            Err(Error::Failed(format!("{}: {what}", file.place.source())))
        }
        _ => Ok(()),
    }
}

async fn receive(
    file: &File,
    answer: &mut Answer,
    partial: &mut Partial,
    listener: &dyn Listener,
) -> Result<(), Failure> {
    let failed = |what: &str| Error::Failed(format!("{}: {what}", file.place.source()));
    let end = answer.total.or(file.size);
    while let Some(bytes) = answer.response.chunk().await.map_err(again)? {
        if partial.n() == 0 && is_web_page(&bytes) {
            return Err(failed("is a web page; is there a login on the way?").into());
        }
        if end.is_some_and(|end| partial.n() + bytes.len() as u64 > end) {
            return Err(failed("is longer than announced").into());
        }
        partial.write(&bytes).await?;
        listener.moved(bytes.len() as i64);
    }
    match end {
        Some(end) if partial.n() < end => {
            Err(Failure::Again(format!("the connection ended after {} of {end} bytes", partial.n()), None))
        }
        _ => Ok(()),
    }
}

/// No file of a bundle begins like this.
fn is_web_page(bytes: &[u8]) -> bool {
    let head = bytes[..bytes.len().min(64)].trim_ascii_start().to_ascii_lowercase();
    head.starts_with(b"<!doctype html") || head.starts_with(b"<html")
}
