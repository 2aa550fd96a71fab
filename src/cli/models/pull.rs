//! `hypnos models pull`: fetches published models into a bundle.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use super::run_check;
use crate::cli::error::{CliError, unusable};
use crate::cli::output::{print_line, print_warning, progress_bar};
use crate::cli::service;
use crate::pull::{self, Hub, Licence, Listener, Plan, SD15, Sources, Step, WeightType};

/// Fetches what HYPNOS needs into one bundle: Stable Diffusion 1.5, TRACER-B7, EfficientNet-B1, and for the evaluation
/// DINO ViT-S/16, CLIP ViT-B/32, Inception-v3 and LPIPS.
///
/// Large files are compared with their published hashes, PyTorch's pickles are converted to safetensors without running
/// anything in them, and hypnos.json says of each file where it came from. A pull that was stopped goes on where it was
/// when the same command is run again; parts that are there are not fetched again. Proxies are those of HTTPS_PROXY,
/// HTTP_PROXY, ALL_PROXY and NO_PROXY.
#[derive(Debug, Args)]
pub(in crate::cli) struct Pull {
    /// Which models
    #[arg(value_enum)]
    model: ModelName,
    /// Directory of the bundle; created if it does not exist [default: the name of the model]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Type of Stable Diffusion's weights in their files: f16 is half as large, f32 is what was trained
    #[arg(long, value_enum, default_value_t = DTypeName::F32)]
    dtype: DTypeName,
    /// Fetch only these parts and what they need, such as `base segmenter`; --dry-run lists them
    #[arg(long, value_name = "PART", num_args = 1.., value_delimiter = ',')]
    only: Vec<String>,
    /// Copy the files from these directories instead of the network: PATH as in the repository, NAME/PATH, OWNER/NAME/PATH,
    /// or a cache of the hub
    #[arg(long, value_name = "DIR", num_args = 1..)]
    from: Vec<PathBuf>,
    /// Accept the licences of all that is fetched, without asking on the terminal
    #[arg(long, alias = "accept-licenses")]
    accept_licences: bool,
    /// Show parts, sizes, sources and licences, and fetch nothing
    #[arg(long)]
    dry_run: bool,
    /// Table of sources to use instead of the built-in one: other mirrors, revisions or hashes
    #[arg(long, value_name = "FILE.json")]
    sources: Option<PathBuf>,
    /// Print the built-in table of sources, to start another one from
    #[arg(long, conflicts_with_all = ["sources", "dry_run"])]
    print_sources: bool,
    /// URL of the Hugging Face hub or of a mirror of it
    #[arg(long, env = "HF_ENDPOINT", value_name = "URL", default_value = "https://huggingface.co")]
    endpoint: String,
    /// Access token for models with restricted access; the variable keeps it out of process lists
    #[arg(long, env = "HF_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    token: Option<SecretString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ModelName {
    /// Stable Diffusion 1.5 and what HYPNOS learns and is evaluated with: 5.6 GB, with f16 3.5 GB
    Sd15,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DTypeName {
    F32,
    F16,
}

impl ModelName {
    fn table(self) -> (&'static str, &'static str) {
        match self {
            Self::Sd15 => ("sd15", SD15),
        }
    }
}

/// The parts of Stable Diffusion 1.5's bundle that are converted: the directory and the config of each.
pub(super) fn published_parts() -> Result<Vec<(String, Value)>, CliError> {
    let parts = sources(None, SD15)?.parts.into_iter();
    Ok(parts.filter_map(|part| Some((part.into?, part.config))).collect())
}

pub(super) fn run(args: &Pull) -> Result<ExitCode, CliError> {
    let (name, table) = args.model.table();
    if args.print_sources {
        print_line(table.trim_end());
        return Ok(ExitCode::SUCCESS);
    }
    let token = args.token.clone().filter(|token| !token.expose_secret().is_empty());
    let hub = Hub::new(&args.endpoint, token)?;
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from(name));
    let pull = pull::Pull {
        out: out.clone(),
        sources: sources(args.sources.as_deref(), table)?,
        only: args.only.clone(),
        dtype: match args.dtype {
            DTypeName::F32 => WeightType::F32,
            DTypeName::F16 => WeightType::F16,
        },
        from: args.from.clone(),
    };
    let plan = pull.plan()?;
    let licences = plan.licences(&pull.sources);
    if args.dry_run {
        show(&pull, &plan, &hub)?;
        show_licences(&mut io::stdout(), &licences);
        return Ok(ExitCode::SUCCESS);
    }
    if plan.missing().next().is_some() {
        accept(&licences, args.accept_licences)?;
        service::run(|stop| async move {
            let progress = Progress::new();
            let (bar, listener): (_, Arc<dyn Listener>) = (progress.bar.clone(), Arc::new(progress));
            let done = stop.run_until_cancelled(pull.run(&plan, &hub, &listener)).await;
            bar.finish_and_clear();
            done.unwrap_or_else(|| {
                Err(pull::Error::Failed("stopped; the same command goes on where it stopped".into()))
            })?;
            Ok(())
        })?;
    }
    // Parts alone are no bundle that could be checked.
    if out.join("unet").is_dir() { Ok(run_check(&out)?) } else { Ok(ExitCode::SUCCESS) }
}

/// The table in a file, or the one in the program.
fn sources(file: Option<&Path>, table: &str) -> Result<Sources, CliError> {
    let Some(path) = file else { return Ok(Sources::parse(table, Path::new("the table in the program"))?) };
    let text = fs::read_to_string(path)
        .map_err(|error| CliError::Input(unusable(path, "cannot be read", &error)))?;
    Ok(Sources::parse(&text, path)?)
}

/// Prints what would be done.
fn show(pull: &pull::Pull, plan: &Plan, hub: &Hub) -> Result<(), CliError> {
    for Step { part, files, is_there } in &plan.steps {
        let total: u64 = files.iter().filter_map(pull::File::expected_size).sum();
        let into = part.into.as_ref().map_or(String::new(), |into| format!(", becomes {into}/"));
        let state = if *is_there { ", is there" } else { "" };
        print_line(&format!("{}: {}; {}{into}{state}", part.name, part.about, pull::bytes(total)));
        for file in files {
            let size = match (file.size, file.expected_size()) {
                (Some(size), _) => pull::bytes(size),
                (None, Some(size)) => format!("about {}", pull::bytes(size)),
                (None, None) => "size unknown".into(),
            };
            let mut url = hub.url(file)?;
            url.set_query(None); // it may be a secret
            url.set_fragment(None);
            let renamed = part.into.is_none() && !url.path().ends_with(&format!("/{}", file.to));
            let to = if renamed { format!(" as {}", file.to) } else { String::new() };
            print_line(&format!("  {size:>14}  {}  {url}{to}", file.licence));
        }
    }
    let missing = plan.missing().flat_map(|step| &step.files);
    let total: u64 = missing.filter_map(pull::File::expected_size).sum();
    let (total, free) = (pull::bytes(total), pull::bytes(pull.free()?));
    print_line(&format!("{total} to fetch into {}, where {free} are free", pull.out.display()));
    Ok(())
}

fn show_licences(out: &mut impl Write, licences: &[(&str, &Licence)]) {
    for (name, Licence { url, note }) in licences {
        let note = if note.is_empty() { String::new() } else { format!(" ({note})") };
        let _ = writeln!(out, "licence {name}: {url}{note}"); // a closed pipe is no reason to fail
    }
}

/// Shows the licences, and asks whether they are accepted unless that was said.
fn accept(licences: &[(&str, &Licence)], accepted: bool) -> Result<(), CliError> {
    if licences.is_empty() {
        return Ok(());
    }
    let mut terminal = io::stderr();
    show_licences(&mut terminal, licences);
    if accepted {
        return Ok(());
    }
    let names: Vec<&str> = licences.iter().map(|(name, _)| *name).collect();
    let refused = || {
        let names = names.join(", ");
        CliError::Input(format!("not accepted: {names}; --accept-licences accepts them without asking"))
    };
    if !io::stdin().is_terminal() || !terminal.is_terminal() {
        return Err(refused());
    }
    let _ = write!(terminal, "Accept them? [y/N] ").and_then(|()| terminal.flush());
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(|_| refused())?;
    let accepts = matches!(answer.trim().to_lowercase().as_str(), "y" | "yes");
    if accepts { Ok(()) } else { Err(refused()) }
}

/// A bar on the terminal.
struct Progress {
    bar: ProgressBar,
}

impl Progress {
    fn new() -> Self {
        let template =
            "{bar:32} {decimal_bytes} of {decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left";
        Self { bar: progress_bar(template, 0) }
    }
}

impl Listener for Progress {
    fn expect(&self, n_bytes: u64) {
        self.bar.inc_length(n_bytes);
    }

    fn moved(&self, n_bytes: i64) {
        if n_bytes >= 0 {
            self.bar.inc(n_bytes.unsigned_abs());
        } else {
            self.bar.dec(n_bytes.unsigned_abs());
        }
    }

    fn resumed(&self, n_bytes: u64) {
        self.bar.inc(n_bytes);
        self.bar.reset_eta();
    }

    fn say(&self, line: &str) {
        self.bar.suspend(|| print_warning(line));
    }

    fn finished(&self, part: &str) {
        self.bar.suspend(|| print_line(&format!("{part}: in its place")));
    }
}
