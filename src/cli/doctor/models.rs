//! The devices and the bundle, and whether its trainings and samples fit.

use super::{Doctor, Finding, machine};
use crate::engine::memory::{Fit, MemorySettings, PHOTOS, gib, sample_fit, training_fit};
use crate::job::{Method, TrainOptions};
use crate::machine::Memory;
use crate::ml::bundle::{Bundle, Finding as Fault, Report, check as check_bundle};
use crate::ml::device::{self, DeviceKind};
use crate::ml::plan::SampleSizes;

/// A device that was opened.
struct Opened {
    name: String,
    kind: DeviceKind,
    free: Option<u64>,
}

pub(super) fn check(args: &Doctor) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut devices: Vec<Opened> = Vec::new();
    for name in &args.working.devices {
        if devices.iter().any(|known| known.name == *name) {
            continue;
        }
        match opened(name) {
            Ok(device) => {
                let free = device.free.map_or("unknown".into(), gib);
                findings.push(Finding::ok(format!("device {name}"), format!("{free} of memory free")));
                devices.push(device);
            }
            Err(finding) => findings.push(finding),
        }
    }
    let dir = &args.working.bundle;
    if !dir.is_dir() {
        let found = format!("{} is not a directory", dir.display());
        let advice = "set HYPNOS_BUNDLE to a directory in the diffusers layout; only workers need one";
        findings.push(Finding::error("bundle", found, advice));
        return findings;
    }
    let Report { errors, remarks } = check_bundle(dir);
    findings.extend(errors.iter().map(fault));
    findings.extend(remarks.iter().map(remark));
    match Bundle::open(dir) {
        Ok(bundle) => {
            if errors.is_empty() {
                let (name, side) = (&bundle.manifest().name, bundle.resolution());
                let name = if name.is_empty() { "without a name" } else { name };
                findings.push(Finding::ok("bundle", format!("sound, {name}, {side} x {side} pixels")));
            }
            for device in &devices {
                findings.extend(plan(args, &bundle, device));
            }
        }
        // What is wrong with it was said.
        Err(error) if errors.is_empty() => {
            findings.push(Finding::error("bundle", error.to_string(), "see hypnos models check"));
        }
        Err(_) => {}
    }
    findings
}

fn fault(fault: &Fault) -> Finding {
    Finding::error(
        "bundle",
        fault.to_string(),
        "repair the bundle; hypnos models check lists all that is wrong",
    )
}

fn remark(remark: &Fault) -> Finding {
    Finding::ok("bundle", format!("remark: {remark}"))
}

fn opened(name: &str) -> Result<Opened, Finding> {
    let unusable = |error: crate::ml::Error| {
        let advice = if cfg!(feature = "cuda") {
            let needed = "CUDA 13 needs driver 580 or newer, CUDA 12 driver 525 or newer";
            format!("{}; {needed}", machine::driver())
        } else {
            "build with --features cuda,cudnn, or set HYPNOS_DEVICES=cpu".into()
        };
        Finding::error(format!("device {name}"), error.to_string(), advice)
    };
    let device = device::open(name).map_err(unusable)?;
    let free = match device::free_bytes(&device).map_err(unusable)? {
        Some(bytes) => Some(bytes),
        None => Memory::now().free(),
    };
    Ok(Opened { name: name.to_owned(), kind: DeviceKind::of(&device), free })
}

/// Whether a training by each method and a sample fit a device, by the settings of the workers.
fn plan(args: &Doctor, bundle: &Bundle, device: &Opened) -> Vec<Finding> {
    let settings = MemorySettings {
        batch: args.working.batch.into(),
        checkpointing: args.working.gradient_checkpointing,
        draws_products: true,
        photos: PHOTOS,
    };
    let side = bundle.resolution();
    let sizes = SampleSizes { batch: settings.batch, width: side, height: side };
    let mut fits = vec![sample_fit(bundle, &sizes, &settings, device.kind, device.free)];
    for method in [Method::TextualInversion, Method::Dreambooth, Method::Hypnos] {
        // What HYPNOS learns with may be missing, and is then refused elsewhere.
        if method == Method::Hypnos && !(bundle.has("segmenter") && bundle.has("perceptual")) {
            let found = "has no segmenter/ and perceptual/, which method=hypnos needs";
            fits.push(Err(crate::ml::Error::input(found)));
            continue;
        }
        fits.push(training_fit(bundle, &TrainOptions::of(method), &settings, device.kind, device.free));
    }
    let check = format!("memory on {}", device.name);
    let finding = |fit: crate::ml::Result<Fit>| match fit {
        Err(error) => Finding::warning("bundle", error.to_string(), "add them, or train with other methods"),
        Ok(fit) => match fit.refusal() {
            None => Finding::ok(&check, format!("{}: {} at most", fit.what, gib(fit.wanted))),
            Some(refusal) => {
                let advice =
                    "see hypnos models plan; a worker refuses what does not fit, unless HYPNOS_IGNORE_MEMORY";
                Finding::warning(&check, refusal, advice)
            }
        },
    };
    fits.into_iter().map(finding).collect()
}
