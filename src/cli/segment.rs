//! `hypnos segment`: masks of the product in photos, to check them before a training.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::bundle::BundleArgs;
use super::error::{CliError, unusable};
use super::output::{print_error, print_line, print_warning};
use super::photos;
use crate::ml::bundle::{Bundle, write_json};
use crate::ml::device;
use crate::ml::image_io::{read_png, save_png};
use crate::ml::segment::{MaskStats, segment};

#[derive(Debug, Args)]
pub(super) struct Segment {
    #[command(flatten)]
    bundle: BundleArgs,
    /// Photos, PNG, JPEG or WebP, and directories of photos
    #[arg(long, required = true, num_args = 1.., value_name = "DIR|FILE")]
    photos: Vec<PathBuf>,
    /// Directory for masks, cut-outs and masks.json; created if it does not exist
    #[arg(long)]
    out: PathBuf,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// Prints one line for each photo; exit code 2 if one of them cannot be used.
pub(super) fn run(args: &Segment) -> Result<ExitCode, CliError> {
    let files = files(&args.photos)?;
    let device = device::open(&args.device)?;
    let bundle = Bundle::open(&args.bundle.dir()?)?;
    let segmenter = bundle.segmenter(&device)?;
    std::fs::create_dir_all(&args.out)
        .map_err(|error| CliError::Input(unusable(&args.out, "cannot be created", &error)))?;

    let (mut found, mut names, mut n_refused) = (Vec::new(), BTreeSet::new(), 0);
    for file in &files {
        let photo = match photos::decoded(file) {
            Ok(photo) => photo,
            Err(CliError::Input(line)) => {
                print_error(&line);
                n_refused += 1;
                found.push(json!({"photo": file, "refusal": line}));
                continue;
            }
            Err(stop) => return Err(stop),
        };
        for warning in &photo.inspection.warnings {
            print_warning(&format!("{}: is {warning}", file.display()));
        }
        let pixels = read_png(&photo.png)?;
        let (mask, stats) = segment(&segmenter, &pixels, &device)?.cleaned();
        let name = name(file, &mut names);
        let (mask_name, cut_out_name) = (format!("{name}-mask.png"), format!("{name}-cut-out.png"));
        let size = (photo.width as usize, photo.height as usize);
        save_png(&args.out.join(&mask_name), &mask.picture(), size, &[])?;
        save_png(&args.out.join(&cut_out_name), &mask.cut_out(&pixels), size, &[])?;
        let refusal = stats.refusal();
        match &refusal {
            None => print_line(&format!("{}: {}", file.display(), words(&stats))),
            Some(refusal) => {
                print_error(&format!("{}: {refusal}", file.display()));
                n_refused += 1;
            }
        }
        let mut entry = json!(stats);
        entry["photo"] = json!(file);
        entry["mask"] = mask_name.into();
        entry["cut_out"] = cut_out_name.into();
        entry["warnings"] = json!(stats.warnings());
        entry["refusal"] = json!(refusal);
        found.push(entry);
    }
    write_json(&args.out.join("masks.json"), &json!({ "photos": found }))?;
    Ok(if n_refused == 0 { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

/// The photos at the given places: files, and the files of directories.
fn files(places: &[PathBuf]) -> Result<Vec<PathBuf>, CliError> {
    let mut files = Vec::new();
    for place in places {
        if place.is_dir() {
            let photos = photos::of_directory(place)?;
            if photos.is_empty() {
                let (place, wanted) = (place.display(), crate::photo::ACCEPTED);
                return Err(CliError::Input(format!("{place}: has no photos; wanted {wanted}")));
            }
            files.extend(photos);
        } else {
            files.push(place.clone());
        }
    }
    Ok(files)
}

/// Name of a photo's outputs: the photo's without its extension, with a number if that is taken.
fn name(file: &Path, taken: &mut BTreeSet<String>) -> String {
    let stem = file.file_stem().map_or_else(|| "photo".into(), |stem| stem.to_string_lossy().into_owned());
    let numbered = (2..).map(|n| format!("{stem}-{n}"));
    let mut names = std::iter::once(stem.clone()).chain(numbered);
    names.find(|name| taken.insert(name.clone())).unwrap_or(stem)
}

/// The result for a photo, in a line.
fn words(stats: &MaskStats) -> String {
    let percent = stats.area * 100.0;
    let seen = format!("a product on {percent:.1} % of it, confidence {:.2}", stats.confidence);
    std::iter::once(seen).chain(stats.warnings()).collect::<Vec<_>>().join("; ")
}
