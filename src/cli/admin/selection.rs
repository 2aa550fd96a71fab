//! The jobs that a command acts on: given by their ids, or found by a filter.

use std::io::{self, BufRead, IsTerminal, Write};
use std::time::Duration;

use clap::Args;

use super::text::span;
use super::{failed, tenant_named};
use crate::cli::error::CliError;
use crate::job::{JobId, Kind, State};
use crate::store::{AdminFilter, AdminJob, Store};

/// Rows read at once.
const PAGE: u32 = 500;

/// Conditions that a job must all meet.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Which jobs")]
pub(super) struct Conditions {
    /// Of the tenant of this name
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// In one of these states: queued, running, succeeded, failed, canceled
    #[arg(long, value_name = "STATE", value_delimiter = ',')]
    state: Vec<State>,
    /// train or sample
    #[arg(long)]
    kind: Option<Kind>,
    /// Trainings of this class
    #[arg(long, value_name = "NAME")]
    class: Option<String>,
    /// Accepted longer ago than this, such as 90s, 15m, 2h, 7d
    #[arg(long, value_name = "AGE", value_parser = span)]
    older_than: Option<Duration>,
}

impl Conditions {
    fn are_none(&self) -> bool {
        let Self { tenant, state, kind, class, older_than } = self;
        tenant.is_none() && state.is_empty() && kind.is_none() && class.is_none() && older_than.is_none()
    }

    /// The store's filter.
    pub(super) async fn filter(&self, store: &Store) -> Result<AdminFilter, CliError> {
        let tenant = match &self.tenant {
            Some(name) => Some(tenant_named(store, name).await?.id),
            None => None,
        };
        Ok(AdminFilter {
            tenant,
            kind: self.kind,
            states: self.state.clone(),
            class_name: self.class.clone(),
            older_than: self.older_than,
            not_retried: false,
        })
    }
}

/// Jobs to act on.
#[derive(Clone, Debug, Args)]
pub(super) struct Selection {
    /// Their ids; without ids, every job that meets the conditions
    ids: Vec<JobId>,
    #[command(flatten)]
    conditions: Conditions,
    /// At most so many, the newest first
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Do it without asking
    #[arg(long)]
    yes: bool,
}

/// The name of an action, and the states that it applies to by default.
pub(super) struct Action {
    pub(super) verb: &'static str,
    pub(super) states: &'static [State],
    /// Leave out jobs that were retried already.
    pub(super) not_retried: bool,
}

impl Selection {
    /// The selected jobs, and the ids that do not exist. Jobs found by a filter must be confirmed by the operator.
    pub(super) async fn jobs(
        &self,
        store: &Store,
        action: &Action,
    ) -> Result<(Vec<AdminJob>, Vec<JobId>), CliError> {
        match (self.ids.is_empty(), self.conditions.are_none()) {
            (false, true) => self.by_id(store).await,
            (true, false) => Ok((self.by_filter(store, action).await?, Vec::new())),
            (true, true) => Err(CliError::Input(format!(
                "which jobs to {}: wanted ids, or conditions such as --tenant NAME or --state STATE",
                action.verb
            ))),
            (false, false) => Err(CliError::Input("wanted ids or conditions, got both".into())),
        }
    }

    async fn by_id(&self, store: &Store) -> Result<(Vec<AdminJob>, Vec<JobId>), CliError> {
        let (mut found, mut unknown) = (Vec::new(), Vec::new());
        for &id in &self.ids {
            match store.any_job(id).await.map_err(failed)? {
                Some(job) => found.push(job),
                None => unknown.push(id),
            }
        }
        Ok((found, unknown))
    }

    async fn by_filter(&self, store: &Store, action: &Action) -> Result<Vec<AdminJob>, CliError> {
        let mut filter = self.conditions.filter(store).await?;
        filter.not_retried = action.not_retried;
        if filter.states.is_empty() {
            filter.states = action.states.to_vec();
        }
        let mut jobs: Vec<AdminJob> = Vec::new();
        loop {
            let left = self.limit.map_or(PAGE, |limit| PAGE.min(limit - jobs.len() as u32));
            let before = jobs.last().map(|job| job.job.id);
            let page = if left == 0 {
                Vec::new()
            } else {
                store.all_jobs(&filter, before, left).await.map_err(failed)?
            };
            if page.is_empty() {
                break;
            }
            jobs.extend(page);
        }
        jobs.retain(|job| !job.deleting);
        if jobs.is_empty() || self.yes {
            return Ok(jobs);
        }
        let question = match jobs.len() {
            1 => format!("{} 1 job", action.verb),
            n => format!("{} {n} jobs", action.verb),
        };
        if agreed(&question)? { Ok(jobs) } else { Err(CliError::Input("nothing was done".into())) }
    }
}

/// Asks for confirmation on the terminal; an error if there is none.
fn agreed(question: &str) -> Result<bool, CliError> {
    if !io::stdin().is_terminal() {
        return Err(CliError::Input(format!("this would {question}; add --yes to confirm")));
    }
    let _ = write!(io::stderr(), "{question}? [y/N] ");
    let mut answer = String::new();
    let read = io::stdin().lock().read_line(&mut answer);
    read.map_err(|error| CliError::Failed(format!("the answer cannot be read: {}", error.kind())))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
