//! The devices and the bundle, and whether its trainings and samples fit.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Doctor, Finding, machine};
use crate::cli::models::plan::suited_options;
use crate::config;
use crate::engine::memory::{
    self, FEWEST_PHOTOS, Fit, MemorySettings, PHOTOS, Products, gib, sample_fit, training_fit,
};
use crate::engine::missing_part;
use crate::job::{Method, TrainOptions};
use crate::machine::{Memory, disk_free};
use crate::ml::bundle::{Bundle, Finding as Fault, Import, ImportOptions, Report, check as check_bundle};
use crate::ml::device::{self, DeviceKind};
use crate::ml::plan::SampleSizes;
use crate::ml::precision::Precision;

/// A device that was opened.
struct Opened {
    name: String,
    kind: DeviceKind,
    precision: Precision,
    /// For one of the workers that have it.
    free: Option<u64>,
}

pub(super) fn check(args: &Doctor) -> Vec<Finding> {
    let (mut findings, devices) = devices(args);
    let dir = match directory(&args.working.bundle, args.working.bundle_with.as_deref()) {
        Ok(dir) => dir,
        Err(finding) => {
            findings.push(finding);
            return findings;
        }
    };
    let Report { errors, remarks } = check_bundle(&dir);
    findings.extend(errors.iter().map(fault));
    findings.extend(remarks.iter().map(|remark| Finding::ok("bundle", format!("remark: {remark}"))));
    match Bundle::open(&dir) {
        Ok(bundle) => {
            if errors.is_empty() {
                let side = bundle.resolution();
                let found = format!("{}: sound, {side} x {side} pixels", bundle.name());
                findings.push(Finding::ok("bundle", found));
            }
            let methods = methods(&bundle, &mut findings);
            let mut disk_bytes = 0;
            for device in &devices {
                findings.extend(plan(args, &bundle, &methods, device, &mut disk_bytes));
            }
            findings.extend(disk(args, disk_bytes));
        }
        // What is wrong with it was said.
        Err(error) if errors.is_empty() => {
            findings.push(Finding::error("bundle", error.to_string(), "see hypnos models check"));
        }
        Err(_) => {}
    }
    findings
}

/// Opens each device once, by the first of its names.
fn devices(args: &Doctor) -> (Vec<Finding>, Vec<Opened>) {
    let (mut findings, mut devices, mut seen) = (Vec::new(), Vec::new(), Vec::<&str>::new());
    // With 0 the work is left to `hypnos work`, which has one for each device if it is told nothing else.
    let n = args.workers.filter(|n| *n > 0).map_or(args.working.devices.len(), usize::from);
    for name in &args.working.devices {
        if seen.iter().any(|known| config::is_same_device(known, name)) {
            continue;
        }
        seen.push(name);
        match opened(name, args.working.precision) {
            Ok((kind, precision, free)) => {
                let sharers = args.working.sharers(name, n);
                let words = |bytes: Option<u64>| bytes.map_or("unknown".into(), gib);
                let own = free.map(|bytes| memory::share(bytes, sharers));
                let each = if sharers == 1 {
                    String::new()
                } else {
                    format!(", {} for each of {sharers} workers", words(own))
                };
                findings.push(Finding::ok(
                    format!("device {name}"),
                    format!("{} of memory free{each}", words(free)),
                ));
                findings.push(Finding::ok(format!("precision on {name}"), precision.name()));
                devices.push(Opened { name: name.clone(), kind, precision, free: own });
            }
            Err(finding) => findings.push(finding),
        }
    }
    (findings, devices)
}

/// The directory of a bundle. A checkpoint in one file has one if a command has used it before; it is not converted here.
fn directory(path: &Path, with: Option<&Path>) -> Result<PathBuf, Finding> {
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    if !path.is_file() {
        let found = format!("there is no {}", path.display());
        let advice = "set HYPNOS_BUNDLE to a directory in the diffusers layout, or to a checkpoint in one file; \
                      only workers need one";
        return Err(Finding::error("bundle", found, advice));
    }
    let options = ImportOptions { with: with.map(Path::to_owned), ..ImportOptions::default() };
    let place = Import::open(path, &options).and_then(|import| import.place(&config::cache()));
    let place = place.map_err(|error| {
        let advice = "set HYPNOS_BUNDLE to a checkpoint of Stable Diffusion 1.x or 2.x, and HYPNOS_BUNDLE_WITH to a \
                      bundle that has what it lacks";
        Finding::error("bundle", error.to_string(), advice)
    })?;
    if place.is_dir() {
        return Ok(place);
    }
    let found = format!(
        "{} is a checkpoint in one file, not converted yet: neither weights nor memory were checked",
        path.display()
    );
    let advice = format!(
        "a worker converts it into {} when it starts, or `hypnos models import` does now; then run doctor again",
        place.display()
    );
    Err(Finding::warning("bundle", found, advice))
}

fn fault(fault: &Fault) -> Finding {
    Finding::error(
        "bundle",
        fault.to_string(),
        "repair the bundle; hypnos models check lists all that is wrong",
    )
}

/// What a device is and computes in, and the memory that is free on it.
fn opened(name: &str, asked: Option<Precision>) -> Result<(DeviceKind, Precision, Option<u64>), Finding> {
    let unusable = |error: crate::ml::Error| {
        let advice = if matches!(&error, crate::ml::Error::Setting { name, .. } if name == "precision") {
            "set HYPNOS_PRECISION=f32, or leave it unset: each device then computes in what suits it".into()
        } else if cfg!(feature = "cuda") {
            format!("{}; a build with CUDA 13.0 needs driver 580 or newer", machine::driver())
        } else {
            "set HYPNOS_DEVICES=cpu, or use a program that was built with --features cuda,cudnn".into()
        };
        Finding::error(format!("device {name}"), error.to_string(), advice)
    };
    let (device, precision) = device::open_in(name, asked).map_err(unusable)?;
    let free = match device::free_bytes(&device).map_err(unusable)? {
        Some(bytes) => Some(bytes),
        None => Memory::now().free(),
    };
    Ok((DeviceKind::of(&device), precision, free))
}

fn settings(args: &Doctor, precision: Precision) -> MemorySettings {
    MemorySettings {
        batch: args.working.batch.into(),
        checkpointing: args.working.gradient_checkpointing,
        precision,
        products: Products::of_worker(args.working.sample_share),
        photos: PHOTOS,
    }
}

/// The options that a training by each method has where the job names none. A method that the bundle cannot be trained
/// by is a finding instead.
fn methods(bundle: &Bundle, findings: &mut Vec<Finding>) -> Vec<TrainOptions> {
    let mut methods = Vec::new();
    for method in [Method::TextualInversion, Method::Dreambooth, Method::Hypnos] {
        match method_options(bundle, method) {
            Ok(options) => methods.push(options),
            Err(finding) => findings.push(finding),
        }
    }
    methods
}

/// Whether a worker starts on a device, and whether a sample and a training by each of these methods fit it. The bytes of
/// the files of the largest training are put into `disk_bytes`.
fn plan(
    args: &Doctor,
    bundle: &Bundle,
    methods: &[TrainOptions],
    device: &Opened,
    disk_bytes: &mut u64,
) -> Vec<Finding> {
    let (settings, side) = (settings(args, device.precision), bundle.resolution());
    let Opened { name, kind, free, .. } = device;
    let sizes = SampleSizes { batch: settings.batch, width: side, height: side };
    let mut findings = Vec::new();
    findings.extend(too_small(args, bundle, device).map(|refusal| {
        let found = format!("a worker does not start: {refusal}");
        Finding::error(format!("worker on {name}"), found, "give it more memory, or a smaller model")
    }));
    let sample = sample_fit(bundle, &sizes, &settings, *kind, *free).map(|(_, fit)| fit);
    let outcome = "a worker begins it and may run out of memory";
    findings.push(fitting(format!("sample on {name}"), sample, outcome));
    for options in methods {
        let training = training_fit(bundle, options, &settings, *kind, *free).map(|(plan, fit)| {
            *disk_bytes = plan.disk.total().max(*disk_bytes);
            fit
        });
        let outcome = "a worker refuses it, unless HYPNOS_IGNORE_MEMORY is set";
        findings.push(fitting(format!("{} on {name}", options.method), training, outcome));
    }
    findings
}

/// Why a worker refuses to start, if it does.
fn too_small(args: &Doctor, bundle: &Bundle, device: &Opened) -> Option<String> {
    let free = device.free.filter(|_| !args.working.ignore_memory)?;
    let smallest = MemorySettings { photos: FEWEST_PHOTOS, ..settings(args, device.precision) };
    memory::too_small(bundle, &smallest, device.kind, free).ok()?
}

/// The options of a job by this method that names none; a finding if they are wrong or the bundle lacks what they need.
fn method_options(bundle: &Bundle, method: Method) -> Result<TrainOptions, Finding> {
    let check = format!("method {method}");
    let options = suited_options(bundle, method, &json!({})).map_err(|invalid| {
        let found = format!("hypnos.json: training.{method}{}: {}", invalid.pointer, invalid.message);
        Finding::error(&check, found, "repair what hypnos.json says of this method")
    })?;
    match missing_part(bundle, &options) {
        None => Ok(options),
        Some(part) => {
            let found = format!("trainings by {method}: {}/ {}", part.part(), part.missing());
            let advice =
                "hypnos models pull fetches it, hypnos models import --with copies it from another bundle";
            Err(Finding::warning(&check, found, advice))
        }
    }
}

/// Whether something fits; `outcome` is what comes of it if it does not.
fn fitting(check: String, fit: crate::ml::Result<Fit>, outcome: &str) -> Finding {
    match fit.map(|fit| (fit.refusal(), fit)) {
        Err(error) => Finding::error(check, error.to_string(), "see hypnos models check"),
        Ok((None, fit)) => Finding::ok(check, format!("{}: {} at most", fit.what, gib(fit.wanted))),
        Ok((Some(refusal), _)) => {
            Finding::warning(check, refusal, format!("hypnos models plan shows what takes it; {outcome}"))
        }
    }
}

/// What is wrong if the files of the largest training, of so many bytes, do not fit the scratch directory.
fn disk(args: &Doctor, wanted: u64) -> Option<Finding> {
    let scratch = machine::scratch(args);
    let free = disk_free(&scratch).filter(|free| *free < wanted)?;
    let found = format!(
        "{}: {} free, a training may write {}: weights, checkpoint, the best step's weights, class images",
        scratch.display(),
        gib(free),
        gib(wanted)
    );
    let advice = "free space, or set HYPNOS_SCRATCH to a directory on another disk";
    Some(Finding::error("disk of a training", found, advice))
}
