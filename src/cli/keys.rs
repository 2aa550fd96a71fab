//! `hypnos keys`: creates, revokes and lists API keys.

use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::error::CliError;
use super::output::print_line;
use super::service::{self, Log};
use crate::config::Storage;
use crate::http::keys::make_key;
use crate::store::{self, NewKey, Scope, Store, TenantState};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Create a key and print it once.
    Create(Create),
    /// Revoke a key. Servers notice within a minute.
    Revoke(Revoke),
    /// List the keys, without their secrets.
    List(List),
}

#[derive(Debug, Args)]
pub(super) struct Create {
    /// Tenant of the key; created if it does not exist
    #[arg(long)]
    tenant: String,
    /// What it is for: a note for people
    #[arg(long, default_value = "")]
    name: String,
    /// read; write, which may read as well; or admin, which may write as well and see the server's metrics
    #[arg(long, default_value = "write")]
    scope: Scope,
    /// Days until it expires; by default never
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    days: Option<u32>,
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    log: Log,
}

#[derive(Debug, Args)]
pub(super) struct Revoke {
    /// The key's id, the part between the underscores
    id: String,
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    log: Log,
}

#[derive(Debug, Args)]
pub(super) struct List {
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    log: Log,
}

pub(super) fn run(command: &Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Create(args) => with_store(&args.storage, &args.log, |store| create(args, store))?,
        Command::Revoke(args) => with_store(&args.storage, &args.log, |store| revoke(args, store))?,
        Command::List(args) => with_store(&args.storage, &args.log, list)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn with_store<F: Future<Output = Result<(), CliError>>>(
    storage: &Storage,
    log: &Log,
    work: impl FnOnce(Store) -> F,
) -> Result<(), CliError> {
    log.start()?;
    service::run(|stop| async move {
        let store = service::open_store(storage, storage.is_sqlite()?, &stop).await?;
        work(store).await
    })
}

async fn create(args: &Create, store: Store) -> Result<(), CliError> {
    let tenant = args.tenant.trim();
    if tenant.is_empty() {
        return Err(CliError::Input("--tenant: wanted a name, got nothing".into()));
    }
    let there = store.tenant_named(tenant).await.map_err(failed)?;
    if there.is_some_and(|there| there.state == TenantState::Deleting) {
        return Err(CliError::Input(format!("--tenant: {tenant:?} is being deleted")));
    }
    let key = make_key().map_err(|error| CliError::Failed(format!("no random numbers: {error}")))?;
    let now_ms = jiff::Timestamp::now().as_millisecond();
    let new = NewKey {
        id: key.id,
        tenant: store.ensure_tenant(tenant).await.map_err(failed)?,
        name: args.name.clone(),
        hash: key.hash,
        scope: args.scope,
        expires_ms: args.days.map(|days| now_ms + i64::from(days) * 86_400_000),
    };
    store.create_key(&new).await.map_err(failed)?;
    print_line(&key.text);
    Ok(())
}

async fn revoke(args: &Revoke, store: Store) -> Result<(), CliError> {
    if store.revoke_key(&args.id).await.map_err(failed)? {
        print_line("revoked");
        return Ok(());
    }
    Err(CliError::Input(format!("there is no valid key with the id {:?}", args.id)))
}

async fn list(store: Store) -> Result<(), CliError> {
    let tenants = store.tenants().await.map_err(failed)?;
    for key in store.list_keys().await.map_err(failed)? {
        let tenant = tenants.iter().find(|tenant| tenant.id == key.tenant);
        let tenant = tenant.map_or("?", |tenant| tenant.name.as_str());
        let ends = match (key.revoked_ms, key.expires_ms) {
            (Some(ms), _) => format!("revoked {}", day(ms)),
            (None, Some(ms)) => format!("until {}", day(ms)),
            (None, None) => "no end".into(),
        };
        print_line(&format!(
            "{}\t{tenant}\t{}\tmade {}\t{ends}\t{}",
            key.id,
            key.scope,
            day(key.created_ms),
            key.name
        ));
    }
    Ok(())
}

fn day(ms: i64) -> String {
    let time = jiff::Timestamp::from_millisecond(ms).unwrap_or(jiff::Timestamp::MAX);
    time.strftime("%Y-%m-%d").to_string()
}

fn failed(error: store::Error) -> CliError {
    CliError::Failed(error.to_string())
}
