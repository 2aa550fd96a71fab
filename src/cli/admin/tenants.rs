//! `hypnos admin tenants`: list, enable, disable, export and delete tenants.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::text::{plain, print_table, time};
use super::{Place, export, failed, tenant_named};
use crate::cli::error::CliError;
use crate::cli::output::{print_line, progress_bar};
use crate::job::TenantId;
use crate::maintenance::{self, Eraser};
use crate::store::{Holdings, Store, Tenant, TenantState, WEIGHT_MAX};

/// Poll interval of a deletion that waits for a worker.
const LOOK: Duration = Duration::from_millis(500);

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Command {
    /// List tenants and how much they have.
    List(List),
    /// Disable a tenant: its keys are answered with 403, its waiting jobs stay queued. Running jobs continue to their
    /// end; `hypnos admin jobs cancel --tenant NAME` ends that too.
    Disable(Named),
    /// Enable a disabled tenant again.
    Enable(Named),
    /// Set a tenant's share of the devices: twice the weight of another that waits too, twice the device time.
    Weight(Weight),
    /// Write all that a tenant has into a directory: rows as JSON, objects with their hashes.
    Export(Export),
    /// Erase a tenant with all that it has: jobs, objects, class images, keys.
    Delete(Delete),
}

#[derive(Debug, Args)]
pub(in crate::cli) struct List {
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Named {
    /// The tenant's name
    name: String,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Weight {
    /// The tenant's name
    name: String,
    /// From 1, which every tenant has at first, to 1000
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(WEIGHT_MAX)))]
    weight: u32,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Export {
    /// The tenant's name
    name: String,
    /// Directory to write into: a new one, or that of an interrupted export, which is then resumed
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Delete {
    /// The tenant's name
    name: String,
    /// The name again, instead of typing it when asked
    #[arg(long, value_name = "NAME")]
    yes_delete: Option<String>,
    #[command(flatten)]
    place: Place,
}

pub(super) fn run(command: &Command) -> Result<ExitCode, CliError> {
    match command {
        Command::List(args) => args.place.with_store(|store, _| list(args, store))?,
        Command::Disable(args) => args.place.with_store(|store, _| serve(args, store, false))?,
        Command::Enable(args) => args.place.with_store(|store, _| serve(args, store, true))?,
        Command::Weight(args) => args.place.with_store(|store, _| weigh(args, store))?,
        Command::Export(args) => return args.place.with_store(|store, stop| export(args, store, stop)),
        Command::Delete(args) => args.place.with_store(|store, stop| delete(args, store, stop))?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(args: &List, store: Store) -> Result<(), CliError> {
    let mut rows = Vec::new();
    for tenant in store.tenants().await.map_err(failed)? {
        let Holdings { keys, queued, running, jobs } = store.holdings(tenant.id).await.map_err(failed)?;
        if args.json {
            print_line(&json!({
                "name": tenant.name, "id": tenant.id, "state": tenant.state, "weight": tenant.weight, "created_at": time(tenant.created_ms),
                "keys": keys, "queued": queued, "running": running, "jobs": jobs,
            })
            .to_string());
        }
        let numbers = [keys, queued, running, jobs].map(|n| n.to_string());
        let words = [plain(&tenant.name), tenant.state.to_string(), tenant.weight.to_string()];
        rows.push(words.into_iter().chain(numbers).chain([tenant.id.to_string()]).collect());
    }
    if !args.json {
        print_table(&["NAME", "STATE", "WEIGHT", "KEYS", "QUEUED", "RUNNING", "JOBS", "ID"], &rows);
    }
    Ok(())
}

async fn serve(args: &Named, store: Store, served: bool) -> Result<(), CliError> {
    let tenant = tenant_named(&store, &args.name).await?;
    let verb = if served { "enabled" } else { "disabled" };
    if tenant.id == TenantId::LOCAL {
        return Err(CliError::Input(format!(
            "{:?} is the tenant of a service without keys, which cannot be {verb}: stop the service instead",
            tenant.name
        )));
    }
    if !store.enable_tenant(tenant.id, served).await.map_err(failed)? {
        return Err(CliError::Input(format!("{:?} is being deleted, and cannot be {verb}", tenant.name)));
    }
    print_line(&format!("{verb}; servers notice within 30 seconds"));
    Ok(())
}

async fn weigh(args: &Weight, store: Store) -> Result<(), CliError> {
    let tenant = tenant_named(&store, &args.name).await?;
    store.set_tenant_weight(tenant.id, args.weight).await.map_err(failed)?;
    print_line(&format!("weight {}, from the next claim on", args.weight));
    Ok(())
}

async fn export(args: &Export, store: Store, stop: CancellationToken) -> Result<ExitCode, CliError> {
    let tenant = tenant_named(&store, &args.name).await?;
    export::export(&store, &args.place.blobs(&store).await?, &tenant, &args.out, &stop).await
}

async fn delete(args: &Delete, store: Store, stop: CancellationToken) -> Result<(), CliError> {
    let tenant = tenant_named(&store, &args.name).await?;
    let blobs = args.place.blobs(&store).await?;
    let holdings = store.holdings(tenant.id).await.map_err(failed)?;
    if tenant.state != TenantState::Deleting {
        confirm(args, &tenant, &holdings)?;
        store.delete_tenant(tenant.id).await.map_err(failed)?;
    }
    let bar = progress_bar("{bar:32} {pos} of {len} jobs, {per_sec}, {eta} left", holdings.jobs);
    let mut left = holdings.jobs;
    // This process runs the maintenance itself; the service continues what it does not finish.
    let mut eraser = Eraser::new(store.clone(), blobs);
    let broken_off = |why: &dyn std::fmt::Display| {
        CliError::Failed(format!("interrupted: {why}; the service or the same command continues"))
    };
    loop {
        maintenance::rescue(&store).await.map_err(|error| broken_off(&error))?;
        let stays = eraser.round().await.map_err(|error| broken_off(&error))?;
        let there = store.tenant_named(&tenant.name).await.map_err(failed)?;
        if there.is_none_or(|there| there.id != tenant.id || there.state != TenantState::Deleting) {
            break;
        }
        let now = store.holdings(tenant.id).await.map_err(failed)?.jobs;
        bar.set_position(holdings.jobs.saturating_sub(now));
        if let Some(why) = stays
            && now == left
        {
            return Err(broken_off(&why));
        }
        let pause = if now < left { Duration::ZERO } else { LOOK };
        left = now;
        tokio::select! {
            () = stop.cancelled() => {
                return Err(CliError::Failed("stopped: the service or the same command continues".into()));
            }
            () = tokio::time::sleep(pause) => {}
        }
    }
    bar.finish_and_clear();
    print_line(&match tenant.id {
        TenantId::LOCAL => format!("all that {:?} had is erased; the tenant itself stays", tenant.name),
        _ => format!("{:?} is erased", tenant.name),
    });
    Ok(())
}

/// Has the name typed once more.
fn confirm(args: &Delete, tenant: &Tenant, holdings: &Holdings) -> Result<(), CliError> {
    let typed = match &args.yes_delete {
        Some(name) => name.clone(),
        None if io::stdin().is_terminal() => {
            let Holdings { keys, running, jobs, .. } = holdings;
            let _ = write!(
                io::stderr(),
                "This erases {jobs} jobs ({running} of them running) with all their objects, and {keys} keys, for good.\n\
                 Type the tenant's name to continue: "
            );
            let mut line = String::new();
            let read = io::stdin().lock().read_line(&mut line);
            read.map_err(|error| CliError::Failed(format!("the name cannot be read: {}", error.kind())))?;
            line.trim_end_matches(['\r', '\n']).to_owned()
        }
        None => {
            let wanted =
                format!("this would erase {:?} for good; add --yes-delete {:?}", tenant.name, tenant.name);
            return Err(CliError::Input(format!("{wanted} to confirm")));
        }
    };
    if typed == tenant.name {
        return Ok(());
    }
    Err(CliError::Input(format!("nothing was erased: wanted the name {:?}, got {typed:?}", tenant.name)))
}
