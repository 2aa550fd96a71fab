//! The invariants that are checked after every step of a walk, and at its end.

use std::collections::{BTreeMap, BTreeSet};

use hypnos::job::{Checkpoint, Object, Spec};
use sha2::{Digest, Sha256};

use super::super::scripted::{Did, expected_weights};
use super::bucket::{Bucket, Stored};
use super::client::{Clients, Submission};
use super::database::{JobRow, Rows};

type Objects = BTreeMap<String, Stored>;

/// What was seen so far.
#[derive(Default)]
pub(super) struct Seen {
    rows: Rows,
    /// Jobs that had a result at some time.
    succeeded: BTreeSet<String>,
    /// The last committed checkpoint of each training.
    committed: BTreeMap<String, u64>,
    /// For each device, the training that it began last, its first step, the checkpoint there was then, and its last
    /// step.
    begun: BTreeMap<String, (String, u64, u64, u64)>,
}

impl Seen {
    /// Looks at what is committed and at what is stored.
    pub(super) fn look(&mut self, rows: Rows, bucket: &Bucket, clients: &Clients) -> Result<(), String> {
        let objects = bucket.objects();
        for row in &rows.jobs {
            let before = self.rows.jobs.iter().find(|before| before.id == row.id);
            if let Some(before) = before {
                follows(before, row)?;
            }
            if !row.is_deleting {
                for object in named(row, &rows)? {
                    stored(&object.key, &object.sha256, &objects)
                        .map_err(|how| format!("{} {} names {}, {how}", row.state, row.id, object.key))?;
                }
                result(row, &rows)?;
            }
            if row.state == "succeeded" {
                self.succeeded.insert(row.id.clone());
            }
            if let Some(known) = clients.known.get(&row.id)
                && known.canceled
                && matches!(row.state.as_str(), "succeeded" | "failed")
            {
                return Err(format!("{} was said to be canceled, and has {}", row.id, row.state));
            }
            if let Some(checkpoint) = &row.checkpoint {
                let step = parse::<Checkpoint>(checkpoint)?.step;
                let committed = self.committed.entry(row.id.clone()).or_default();
                if step < *committed {
                    return Err(format!("{} goes back from checkpoint {committed} to {step}", row.id));
                }
                *committed = step;
            }
        }
        for class_image in rows.named.iter().filter(|named| named.job.is_none()) {
            stored(&class_image.key, &class_image.sha256, &objects)
                .map_err(|how| format!("a row of class images names {}, {how}", class_image.key))?;
        }
        self.are_there(&rows, clients)?;
        self.rows = rows;
        Ok(())
    }

    /// No row goes but for a deletion, and what was accepted is there.
    fn are_there(&self, rows: &Rows, clients: &Clients) -> Result<(), String> {
        let there: BTreeMap<&str, &JobRow> = rows.jobs.iter().map(|row| (row.id.as_str(), row)).collect();
        if let Some(gone) =
            self.rows.jobs.iter().find(|row| !row.is_deleting && !there.contains_key(&*row.id))
            && !clients.may_be_gone(&gone.id)
        {
            return Err(format!("the row of {} is gone", gone.id));
        }
        for (id, known) in &clients.known {
            match there.get(id.as_str()) {
                Some(row) if known.deleted && !row.is_deleting => {
                    return Err(format!("{id} was said to be deleted, and is there"));
                }
                Some(row) if !known.delete_sent && row.is_deleting => {
                    return Err(format!("{id} is being deleted, and nobody asked for it"));
                }
                None if !known.delete_sent => return Err(format!("{id} was accepted, and is not there")),
                _ => {}
            }
        }
        Ok(())
    }

    /// Looks at what the devices did since the last look. An attempt that begins before the last committed checkpoint,
    /// and goes on for more than the step after which its lease is looked at, loses steps that were kept.
    pub(super) fn did(&mut self, device: &str, did: &[Did]) -> Result<(), String> {
        for did in did {
            let Did::Step(_, step, id) = did else { continue };
            let committed = self.committed.get(id).copied().unwrap_or_default();
            match self.begun.get_mut(device) {
                Some((name, first, known, last)) if name == id && *last + 1 == *step => {
                    if first < known {
                        return Err(format!(
                            "{id} was begun anew at step {first}, with a checkpoint of step {known}"
                        ));
                    }
                    *last = *step;
                }
                _ => {
                    let begun = (id.clone(), *step, committed, *step);
                    self.begun.insert(device.to_owned(), begun);
                }
            }
        }
        Ok(())
    }

    pub(super) fn n_results(&self) -> usize {
        self.succeeded.len()
    }

    /// Trainings that can be drawn with.
    pub(super) fn succeeded(&self) -> impl Iterator<Item = &str> {
        let drawable = |row: &&JobRow| row.kind == "train" && row.state == "succeeded" && !row.is_deleting;
        self.rows.jobs.iter().filter(drawable).map(|row| row.id.as_str())
    }

    /// Jobs that can be done again.
    pub(super) fn without_result(&self) -> impl Iterator<Item = &str> {
        let ended = |row: &&JobRow| matches!(row.state.as_str(), "failed" | "canceled") && !row.is_deleting;
        self.rows.jobs.iter().filter(ended).map(|row| row.id.as_str())
    }

    pub(super) fn has_ended(&self, id: &str) -> bool {
        self.rows.jobs.iter().any(|row| row.id == id && row.finished_ms.is_some())
    }

    /// What there is still to do: a line for each.
    pub(super) fn unfinished(&self, clients: &Clients) -> Vec<String> {
        let mut left = Vec::new();
        for row in &self.rows.jobs {
            if row.is_deleting {
                left.push(format!("{} is to be erased", row.id));
            } else if row.finished_ms.is_none() {
                left.push(format!("{} is {}", row.id, row.state));
            } else if row.checkpoint.is_some() {
                left.push(format!("{} keeps a checkpoint that nobody needs", row.id));
            }
        }
        for wanted in &clients.wanted {
            let waits = wanted.submission == Submission::Pending
                || (wanted.submission == Submission::Unknown && wanted.key.is_some());
            if waits {
                left.push(format!("a client does not know of {}", wanted.class_name));
            }
        }
        left
    }

    /// When all is done and swept: the store holds what the rows name, and nothing else.
    pub(super) fn nothing_is_left(&self, bucket: &Bucket) -> Result<(), String> {
        let mut named: BTreeSet<String> = self.rows.named.iter().map(|named| named.key.clone()).collect();
        for row in &self.rows.jobs {
            named.extend(parse::<Vec<Object>>(&row.photos)?.into_iter().map(|photo| photo.key));
        }
        let left = |key: &&String| key.starts_with("t/") && !named.contains(*key);
        match bucket.objects().keys().find(left) {
            Some(key) => Err(format!("{key} is left, and no row names it")),
            None => Ok(()),
        }
    }
}

/// Whether one look at a row may follow another.
fn follows(before: &JobRow, row: &JobRow) -> Result<(), String> {
    let end = |row: &JobRow| (row.state.clone(), row.result.clone(), row.error.clone(), row.finished_ms);
    if before.finished_ms.is_some() && end(before) != end(row) {
        return Err(format!("{} had ended as {:?}, and is {:?}", row.id, end(before), end(row)));
    }
    if before.cancel_requested && !row.cancel_requested {
        return Err(format!("{} was to be canceled, and is not any more", row.id));
    }
    if before.run_lease > row.run_lease {
        return Err(format!("{} goes back from lease {} to {}", row.id, before.run_lease, row.run_lease));
    }
    Ok(())
}

/// All objects that a row needs.
fn named(row: &JobRow, rows: &Rows) -> Result<Vec<Object>, String> {
    let mut named: Vec<Object> = parse(&row.photos)?;
    if let (Some(checkpoint), None) = (&row.checkpoint, row.finished_ms) {
        named.push(parse::<Checkpoint>(checkpoint)?.object);
    }
    for artifact in rows.named.iter().filter(|named| named.job.as_ref() == Some(&row.id)) {
        named.push(Object {
            name: artifact.name.clone(),
            key: artifact.key.clone(),
            size: 0,
            sha256: artifact.sha256.clone(),
            content_type: String::new(),
            meta: serde_json::Value::Null,
        });
    }
    Ok(named)
}

fn stored(key: &str, sha256: &str, objects: &Objects) -> Result<(), String> {
    match objects.get(key) {
        None => Err("which is not in the store".into()),
        Some(stored) if stored.sha256 != sha256 => Err("which is another in the store".into()),
        Some(_) => Ok(()),
    }
}

/// What succeeded has the one right result.
fn result(row: &JobRow, rows: &Rows) -> Result<(), String> {
    if row.state != "succeeded" {
        return Ok(());
    }
    let shown = |name: &str| {
        let mut own = rows.named.iter().filter(|named| named.job.as_ref() == Some(&row.id));
        own.find(|named| named.name == name).map(|named| named.sha256.clone())
    };
    match spec(row)? {
        Spec::Train(spec) => {
            let weights = expected_weights(spec.seed, spec.options.steps.into());
            let wanted = format!("{:x}", Sha256::digest(&weights));
            if shown("weights.safetensors") != Some(wanted) {
                return Err(format!("{} has succeeded without its weights", row.id));
            }
            for name in ["report.json", "report.html", "image-0.png"] {
                shown(name).ok_or_else(|| format!("{} has succeeded without {name}", row.id))?;
            }
        }
        Spec::Sample(_) => {
            shown("image-0.png").ok_or_else(|| format!("{} has succeeded without its picture", row.id))?;
        }
    }
    Ok(())
}

fn spec(row: &JobRow) -> Result<Spec, String> {
    parse(&row.spec)
}

fn parse<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| format!("a column that cannot be read: {error}"))
}
