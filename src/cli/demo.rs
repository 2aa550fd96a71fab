//! `hypnos demo`: runs the whole service locally with an embedded product.
//!
//! It starts what `hypnos serve --workers 1` starts. Everything else is done by HTTP, as any client would: upload,
//! follow, draw, and compose photos and images on one sheet.

mod client;
mod products;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::bundle;
use super::error::CliError;
use super::output::print_line;
use super::serve::{self, Serve};
use super::service::{self, Instrumentation, Log};
use crate::config::{Monitoring, Serving, Storage, Working};
use crate::job::Method;
use crate::ml::{contact_sheet, image_io};
use client::Client;
use products::Product;

/// Prompts of the sample.
const PROMPTS: [&str; 8] = [
    "a photo of {product} on a wooden table",
    "a photo of {product} on the beach",
    "a photo of {product} in the grass",
    "a photo of {product} in the snow",
    "a photo of {product} on white marble",
    "a photo of {product} in front of a brick wall",
    "a photo of {product} in a city at night",
    "a photo of {product} in the forest",
];

/// Images in a row of the sheet.
const COLUMNS: usize = 4;
/// Side of an image on the sheet, in pixels.
const SIDE: u32 = 256;

#[derive(Debug, Args)]
pub(super) struct Demo {
    /// The product; `list` names all
    #[arg(long, value_name = "NAME", default_value = products::FIRST)]
    product: String,
    /// hypnos, dreambooth or textual_inversion
    #[arg(long, default_value = "hypnos")]
    method: Method,
    /// Output file with the photos and the pictures side by side
    #[arg(long, value_name = "FILE", default_value = "hypnos-demo.png")]
    sheet: PathBuf,
    /// Stop the service when the pictures are done
    #[arg(long)]
    exit: bool,
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    serving: Serving,
    #[command(flatten)]
    working: Working,
    #[command(flatten)]
    monitoring: Monitoring,
    #[command(flatten)]
    log: Log,
}

pub(super) fn run(args: Demo) -> Result<ExitCode, CliError> {
    if args.product == "list" {
        products::all()
            .iter()
            .for_each(|product| print_line(&format!("{} ({})", product.name, product.class_name)));
        return Ok(ExitCode::SUCCESS);
    }
    let product = products::find(&args.product).map_err(CliError::Input)?;
    if args.serving.keys_wanted()? {
        return Err(CliError::Input("HYPNOS_AUTH requires keys, but the demo runs without them".into()));
    }
    if args.serving.listen.port() == 0 {
        return Err(CliError::Input(
            "HYPNOS_LISTEN: the demo needs a known port for its own client, got 0".into(),
        ));
    }
    let options = json!({ "method": args.method });
    let working = bundle::opened(&args.working)?;
    let Demo { method, sheet, exit, storage, serving, monitoring, log, .. } = args;
    let log = log.quieter();
    let serve = Serve { workers: 1, migrate: true, storage, serving, working, monitoring, log };
    let instrumentation = Instrumentation::start(&serve.log, "demo")?;
    let work = service::worker(&serve.storage, &serve.working, 1)?;
    instrumentation.run(async |instrumentation, stop| {
        let client = Client::new(format!("http://{}", serve.serving.listen))?;
        let show = async {
            client.is_ready(&stop).await?;
            let laid =
                contact_sheet::contact_sheet(&draw(&client, product, method, options).await?, COLUMNS, SIDE)?;
            let size = (laid.width() as usize, laid.height() as usize);
            image_io::save_png(&sheet, laid.as_raw(), size, &[])?;
            print_line(&format!("sheet      {}", sheet.display()));
            if exit {
                stop.cancel();
            } else {
                print_line("The service keeps running; Ctrl-C ends it.");
            }
            Ok(())
        };
        // If one fails, both end.
        tokio::try_join!(
            ending(serve::serve(&serve, Some(work), instrumentation, stop.clone()), &stop),
            ending(show, &stop)
        )?;
        Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Cancels `stop` when `work` fails.
async fn ending(
    work: impl Future<Output = Result<(), CliError>>,
    stop: &CancellationToken,
) -> Result<(), CliError> {
    let done = work.await;
    if done.is_err() {
        stop.cancel();
    }
    done
}

/// Trains on the photos, draws the images, prints each step, and writes both to files.
async fn draw(
    client: &Client,
    product: Product,
    method: Method,
    options: serde_json::Value,
) -> Result<[Vec<Vec<u8>>; 2], CliError> {
    print_line(&format!("product    {}, {} photos; {method}", product.name, product.photos.len()));
    let job = client.upload(&product, &options).await?;
    let id = job["id"].as_str().unwrap_or_default().to_owned();
    print_line(&format!("watch      {}/#job={id}", client.url()));
    client.follow(&job).await?;
    for name in ["report.html", "weights.safetensors"] {
        print_line(&format!(
            "{:10} {}/v1/jobs/{id}/artifacts/{name}",
            name.split('.').next().unwrap_or(name),
            client.url()
        ));
    }
    let prompts: Vec<_> = PROMPTS.into_iter().filter(|prompt| !prompt.ends_with(&product.place)).collect();
    let sample = client.draw(&id, &prompts).await?;
    let mut pictures = Vec::new();
    let drawn = sample["id"].as_str().unwrap_or_default();
    for (i, (image, prompt)) in sample["images"].as_array().into_iter().flatten().zip(&prompts).enumerate() {
        let (url, place) =
            (image["url"].as_str().unwrap_or_default(), prompt.trim_start_matches("a photo of {product} "));
        print_line(&format!("picture    {}/v1/samples/{drawn}/images/{i}  {place}", client.url()));
        pictures.push(client.fetch(url).await?);
    }
    Ok([product.photos, pictures])
}
