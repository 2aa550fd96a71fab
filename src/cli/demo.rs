//! `hypnos demo`: the whole service on this machine, with a product that is in the program.
//!
//! It starts what `hypnos serve --workers 1` starts. All else is a client's part, by HTTP as any other would do it: upload,
//! follow, draw, and lay photos and pictures on one sheet.

mod client;
pub(super) mod products;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::serve::{self, Serve};
use super::service::{self, Log, Watch};
use super::{Stop, say};
use crate::config::{Monitoring, Serving, Storage, Working};
use crate::job::Method;
use crate::ml::bundle::Bundle;
use crate::ml::{picture, sheet};
use client::Client;
use products::Product;

/// Where the product is drawn.
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

/// Pictures in a row of the sheet.
const COLUMNS: usize = 4;
/// Their side on it, in pixels.
const SIDE: u32 = 256;

#[derive(Debug, Args)]
pub(super) struct Demo {
    /// The product; `list` names all
    #[arg(long, value_name = "NAME", default_value = products::FIRST)]
    product: String,
    /// hypnos, dreambooth or textual_inversion
    #[arg(long, default_value = "hypnos")]
    method: Method,
    /// Where the photos and the pictures are put side by side
    #[arg(long, value_name = "FILE", default_value = "hypnos-demo.png")]
    sheet: PathBuf,
    /// End when the pictures are there, instead of serving on
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

pub(super) fn run(args: Demo) -> Result<ExitCode, Stop> {
    if args.product == "list" {
        products::all().iter().for_each(|product| say(&format!("{} ({})", product.name, product.class_name)));
        return Ok(ExitCode::SUCCESS);
    }
    let product = products::find(&args.product).map_err(Stop::Input)?;
    if args.serving.keys_wanted()? {
        return Err(Stop::Input("the demo runs without keys; HYPNOS_AUTH wants them".into()));
    }
    if args.serving.listen.port() == 0 {
        return Err(Stop::Input(
            "HYPNOS_LISTEN: the demo is its own client and wants a port that it knows, got 0".into(),
        ));
    }
    let bundle = Bundle::open(&args.working.bundle)?;
    let mut options = bundle.manifest().suited(args.method.as_str());
    options["method"] = args.method.as_str().into();
    let Demo { method, sheet, exit, storage, serving, working, monitoring, log, .. } = args;
    let log = log.quieter();
    let serve = Serve { workers: 1, migrate: true, storage, serving, working, monitoring, log };
    let watch = Watch::start(&serve.log, "demo")?;
    let work = service::worker(&serve.storage, &serve.working, 1)?;
    watch.run(async |watch, stop| {
        let client = Client::new(format!("http://{}", serve.serving.listen))?;
        let show = async {
            client.is_ready(&stop).await?;
            let laid = sheet::sheet(&draw(&client, product, method, options).await?, COLUMNS, SIDE)?;
            let size = (laid.width() as usize, laid.height() as usize);
            picture::save_png(&sheet, laid.as_raw(), size, &[])?;
            say(&format!("sheet      {}", sheet.display()));
            if exit {
                stop.cancel();
            } else {
                say("The service runs on; Ctrl-C ends it.");
            }
            Ok(())
        };
        // Whichever fails ends both.
        tokio::try_join!(
            ending(serve::serve(&serve, Some(work), watch, stop.clone()), &stop),
            ending(show, &stop)
        )?;
        Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Tells the other side when this one failed.
async fn ending(work: impl Future<Output = Result<(), Stop>>, stop: &CancellationToken) -> Result<(), Stop> {
    let done = work.await;
    if done.is_err() {
        stop.cancel();
    }
    done
}

/// Photos to pictures, told line by line; both as files.
async fn draw(
    client: &Client,
    product: Product,
    method: Method,
    options: serde_json::Value,
) -> Result<[Vec<Vec<u8>>; 2], Stop> {
    say(&format!("product    {}, {} photos; {method}", product.name, product.photos.len()));
    let job = client.upload(&product, &options).await?;
    let id = job["id"].as_str().unwrap_or_default().to_owned();
    say(&format!("watch      {}/#job={id}", client.url()));
    client.follow(&job).await?;
    for name in ["report.html", "weights.safetensors"] {
        say(&format!(
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
        say(&format!("picture    {}/v1/samples/{drawn}/images/{i}  {place}", client.url()));
        pictures.push(client.fetch(url).await?);
    }
    Ok([product.photos, pictures])
}
