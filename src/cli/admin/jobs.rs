//! `hypnos admin jobs`: lists and changes the jobs of all tenants.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::selection::{Action, Conditions, Selection};
use super::text::{age, plain, print_table, time};
use super::{Place, failed, tenant_named};
use crate::blobs;
use crate::cli::error::CliError;
use crate::cli::output::{print_error, print_line};
use crate::job::{JobId, Kind, Object, State};
use crate::retry::{self, Retried, Terms};
use crate::store::{AdminJob, Requeued, Store, Submitted};

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Command {
    /// List jobs, the newest first.
    List(List),
    /// Show all data of a job.
    Show(Show),
    /// Retry failed or canceled jobs, as new jobs with the same photos. Without conditions on the state: failed ones.
    Retry(Act),
    /// Take running jobs from their workers, at the cost of no attempt: they resume from their last checkpoint.
    Requeue(Act),
    /// Cancel jobs: queued ones at once, running ones within a step.
    Cancel(Act),
    /// Pause claims: no worker takes new jobs. Running jobs continue.
    Pause(Hold),
    /// End a pause that was made with the same options.
    Resume(Resume),
    /// List what is paused.
    Paused(Paused),
}

#[derive(Debug, Args)]
pub(in crate::cli) struct List {
    #[command(flatten)]
    conditions: Conditions,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    limit: u32,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Show {
    /// Its id
    id: JobId,
    /// Include its specification, which contains the client's texts: prompts, templates
    #[arg(long)]
    spec: bool,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Act {
    #[command(flatten)]
    selection: Selection,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Hold {
    /// Only of the tenant of this name
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// Only train or sample
    #[arg(long)]
    kind: Option<Kind>,
    /// Why, for other operators
    #[arg(long, default_value = "")]
    reason: String,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Resume {
    /// The pause of the tenant of this name
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// The pause of train or sample
    #[arg(long)]
    kind: Option<Kind>,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Paused {
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

pub(super) fn run(command: &Command) -> Result<ExitCode, CliError> {
    match command {
        Command::List(args) => args.place.with_store(|store, _| list(args, store)),
        Command::Show(args) => args.place.with_store(|store, _| show(args, store)),
        Command::Retry(args) => args.place.with_store(|store, _| retry(args, store)),
        Command::Requeue(args) => args.place.with_store(|store, _| requeue(args, store)),
        Command::Cancel(args) => args.place.with_store(|store, _| cancel(args, store)),
        Command::Pause(args) => args.place.with_store(|store, _| pause(args, store)),
        Command::Resume(args) => args.place.with_store(|store, _| resume(args, store)),
        Command::Paused(args) => args.place.with_store(|store, _| paused(args, store)),
    }
}

async fn list(args: &List, store: Store) -> Result<ExitCode, CliError> {
    let filter = args.conditions.filter(&store).await?;
    let jobs = store.all_jobs(&filter, None, args.limit).await.map_err(failed)?;
    if args.json {
        jobs.iter().for_each(|job| print_line(&described(job).to_string()));
    } else {
        let head = ["ID", "TENANT", "KIND", "STATE", "AGE", "ATTEMPT", "PROGRESS", "CLASS", "ERROR"];
        print_table(&head, &jobs.iter().map(row).collect::<Vec<_>>());
    }
    Ok(ExitCode::SUCCESS)
}

fn row(job: &AdminJob) -> Vec<String> {
    let AdminJob { job: row, .. } = job;
    let state = match row.state {
        state if job.deleting => format!("{state}, deleting"),
        State::Queued if job.held_back => "queued, paused".into(),
        State::Running if row.cancel_requested => "running, canceling".into(),
        state => state.to_string(),
    };
    let progress = row.progress.as_ref().filter(|_| !row.state.is_terminal());
    let progress = progress.map(|at| match at.total {
        0 => at.phase.to_string(),
        total => format!("{} {}/{total}", at.phase, at.step),
    });
    vec![
        row.id.to_string(),
        plain(&job.tenant_name),
        row.kind.to_string(),
        state,
        age(row.created_ms),
        format!("{}/{}", row.attempt, row.max_attempts),
        progress.unwrap_or_default(),
        plain(job.class_name.as_deref().unwrap_or_default()),
        row.error.as_ref().map(|fault| fault.code.to_string()).unwrap_or_default(),
    ]
}

/// All fields of a row except the specification, which holds the client's texts.
pub(super) fn described(job: &AdminJob) -> Value {
    let AdminJob { job: row, .. } = job;
    json!({
        "id": row.id,
        "tenant": job.tenant_name,
        "kind": row.kind,
        "state": row.state,
        "deleting": job.deleting,
        "paused": job.held_back && row.state == State::Queued,
        "cancel_requested": row.cancel_requested,
        "class_name": job.class_name,
        "parent": row.parent,
        "retry_of": row.retry_of,
        "retried_as": job.retried_as,
        "priority": job.priority,
        "attempt": row.attempt,
        "max_attempts": row.max_attempts,
        "rescues": job.rescues,
        "fault_hosts": job.fault_hosts,
        "device_seconds": job.used_ms as f64 / 1e3,
        "run_lease": row.run_lease,
        "worker": job.worker,
        "created_at": time(row.created_ms),
        "not_before": time(job.not_before_ms),
        "claimed_at": job.claimed_ms.map(time),
        "started_at": row.started_ms.map(time),
        "finished_at": row.finished_ms.map(time),
        "checkpoint_step": row.checkpoint.as_ref().map(|checkpoint| checkpoint.step),
        "progress": row.progress,
        "result": row.result,
        "error": row.error,
        "photos": row.photos.len(),
        "trace": row.trace,
    })
}

async fn show(args: &Show, store: Store) -> Result<ExitCode, CliError> {
    let job = store.any_job(args.id).await.map_err(failed)?;
    let job = job.ok_or_else(|| CliError::Input(unknown(args.id)))?;
    let mut shown = described(&job);
    let artifacts = store.artifacts(job.job.tenant, job.job.id).await.map_err(failed)?;
    let artifact =
        |object: &Object| json!({ "name": object.name, "size": object.size, "sha256": object.sha256 });
    shown["artifacts"] = artifacts.iter().map(artifact).collect();
    if args.spec {
        shown["spec"] = serde_json::from_str(&job.job.spec_json).unwrap_or(Value::Null);
    }
    if args.json {
        print_line(&shown.to_string());
        return Ok(ExitCode::SUCCESS);
    }
    for (name, value) in shown.as_object().into_iter().flatten() {
        let name = format!("{name:16}");
        match value {
            Value::Null => {}
            Value::String(text) => print_line(&format!("{name} {}", plain(text))),
            Value::Array(all) if all.is_empty() => {}
            Value::Array(all) => {
                all.iter().for_each(|one| print_line(&format!("{name} {}", plain(&one.to_string()))));
            }
            other => print_line(&format!("{name} {}", plain(&other.to_string()))),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints the outcome for each job, and keeps the exit code: whether all succeeded.
struct Outcomes {
    json: bool,
    refused: bool,
}

impl Outcomes {
    fn new(args: &Act, unknown: &[JobId]) -> Self {
        let mut outcomes = Self { json: args.json, refused: false };
        unknown.iter().for_each(|&id| outcomes.refuse(id, "there is no such job"));
        outcomes
    }

    fn done(&self, id: JobId, what: &str, more: Value) {
        if self.json {
            let mut line = json!({ "id": id, "outcome": what });
            let more = more.as_object().cloned().unwrap_or_default();
            line.as_object_mut().into_iter().for_each(|line| line.extend(more.clone()));
            print_line(&line.to_string());
        } else {
            let more = more.as_object().into_iter().flatten();
            let more: Vec<&str> = more.filter_map(|(_, value)| value.as_str()).collect();
            print_line(format!("{id} {what} {}", more.join(" ")).trim_end());
        }
    }

    fn refuse(&mut self, id: JobId, why: &str) {
        self.refused = true;
        print_error(&format!("{id}: {why}"));
    }

    fn end(self, n: usize) -> ExitCode {
        if n == 0 && !self.refused && !self.json {
            print_line("no job meets the conditions");
        }
        if self.refused { ExitCode::from(2) } else { ExitCode::SUCCESS }
    }
}

fn unknown(id: JobId) -> String {
    format!("{id}: there is no such job")
}

async fn retry(args: &Act, store: Store) -> Result<ExitCode, CliError> {
    let action = Action { verb: "retry", states: &[State::Failed], not_retried: true };
    let (jobs, unknown) = args.selection.jobs(&store, &action).await?;
    let blobs = args.place.blobs(&store).await?;
    let mut outcomes = Outcomes::new(args, &unknown);
    for job in &jobs {
        if job.deleting {
            outcomes.refuse(job.job.id, "it is being deleted");
            continue;
        }
        let terms = Terms {
            max_attempts: job.job.max_attempts,
            queue_max: u64::MAX, // a tenant's share is no bound on what its operator does
            idempotency: None,
            trace: None,
        };
        match retry::retry(&store, &blobs, &job.job, terms).await {
            Ok(Retried::Submitted(Submitted::New(new))) => {
                outcomes.done(job.job.id, "retried as", json!({ "retried_as": new.id }));
            }
            Ok(Retried::WrongState(state)) => {
                outcomes.refuse(job.job.id, &format!("it is {state}; wanted failed or canceled"));
            }
            Ok(Retried::Submitted(Submitted::Disabled)) => {
                outcomes.refuse(job.job.id, &format!("its tenant {:?} is not active", job.tenant_name));
            }
            Ok(Retried::Submitted(Submitted::NoParent(state))) => {
                let is = state.map_or("deleted".to_owned(), |state| state.to_string());
                outcomes.refuse(job.job.id, &format!("its training is {is}"));
            }
            Ok(Retried::Submitted(other)) => {
                return Err(CliError::Failed(format!("{}: not accepted: {other:?}", job.job.id)));
            }
            Err(retry::Error::Store(error)) => return Err(failed(error)),
            Err(retry::Error::Blobs(error @ (blobs::Error::Missing | blobs::Error::Damaged))) => {
                outcomes.refuse(job.job.id, &format!("its photos: {error}"));
            }
            Err(retry::Error::Blobs(error)) => return Err(CliError::Failed(error.to_string())),
        }
    }
    Ok(outcomes.end(jobs.len()))
}

async fn requeue(args: &Act, store: Store) -> Result<ExitCode, CliError> {
    let action = Action { verb: "requeue", states: &[State::Running], not_retried: false };
    let (jobs, unknown) = args.selection.jobs(&store, &action).await?;
    let mut outcomes = Outcomes::new(args, &unknown);
    for job in &jobs {
        match store.requeue(job.job.id).await.map_err(failed)? {
            Some(Requeued::Released(state)) => outcomes.done(job.job.id, state.as_str(), Value::Null),
            Some(Requeued::NotRunning(state)) => {
                outcomes.refuse(job.job.id, &format!("it is {state}; wanted running"));
            }
            None => outcomes.refuse(job.job.id, "there is no such job"),
        }
    }
    Ok(outcomes.end(jobs.len()))
}

async fn cancel(args: &Act, store: Store) -> Result<ExitCode, CliError> {
    let action = Action { verb: "cancel", states: &[State::Queued, State::Running], not_retried: false };
    let (jobs, unknown) = args.selection.jobs(&store, &action).await?;
    let mut outcomes = Outcomes::new(args, &unknown);
    for job in &jobs {
        match store.cancel(job.job.tenant, job.job.id).await.map_err(failed)? {
            Some(row) if row.state == State::Running => outcomes.done(row.id, "canceling", Value::Null),
            Some(row) if row.state == State::Canceled => outcomes.done(row.id, "canceled", Value::Null),
            Some(row) => outcomes.refuse(row.id, &format!("it is {}; wanted queued or running", row.state)),
            None => outcomes.refuse(job.job.id, "it is being deleted"),
        }
    }
    Ok(outcomes.end(jobs.len()))
}

async fn pause(args: &Hold, store: Store) -> Result<ExitCode, CliError> {
    let tenant = match &args.tenant {
        Some(name) => Some(tenant_named(&store, name).await?.id),
        None => None,
    };
    store.pause(tenant, args.kind, &args.reason).await.map_err(failed)?;
    print_line(&format!("paused: {}", what(args.tenant.as_deref(), args.kind)));
    Ok(ExitCode::SUCCESS)
}

async fn resume(args: &Resume, store: Store) -> Result<ExitCode, CliError> {
    let tenant = match &args.tenant {
        Some(name) => Some(tenant_named(&store, name).await?.id),
        None => None,
    };
    let what = what(args.tenant.as_deref(), args.kind);
    if store.resume(tenant, args.kind).await.map_err(failed)? {
        print_line(&format!("resumed: {what}"));
        return Ok(ExitCode::SUCCESS);
    }
    Err(CliError::Input(format!("there is no pause of {what}; `hypnos admin jobs paused` lists all")))
}

/// Describes what a pause covers.
fn what(tenant: Option<&str>, kind: Option<Kind>) -> String {
    let kind = kind.map_or("all jobs".to_owned(), |kind| format!("{kind} jobs"));
    tenant.map_or(format!("{kind} of every tenant"), |name| format!("{kind} of {}", plain(name)))
}

async fn paused(args: &Paused, store: Store) -> Result<ExitCode, CliError> {
    for pause in store.pauses().await.map_err(failed)? {
        if args.json {
            print_line(
                &json!({
                    "tenant": pause.tenant_name, "kind": pause.kind, "reason": pause.reason,
                    "since": time(pause.created_ms),
                })
                .to_string(),
            );
        } else {
            let what = what(pause.tenant_name.as_deref(), pause.kind);
            print_line(
                format!("{what}, for {}: {}", age(pause.created_ms), plain(&pause.reason))
                    .trim_end_matches(": "),
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}
