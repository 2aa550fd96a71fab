//! `hypnos train`: trains on a directory of photos, resumes after a kill, and refuses invalid input.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use tempfile::TempDir;

pub(crate) fn bundle() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/bundle")
}

pub(crate) fn demo_photos() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/photos")
}

pub(crate) fn scratch() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

/// The program with these words; what it says is kept.
pub(crate) fn hypnos(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hypnos"));
    command.args(words).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("a path in Unicode")
}

/// The command, a few cheap steps long; later options win over these.
pub(crate) fn train(photos: &Path, out: &Path, more: &[&str]) -> Command {
    train_from(&bundle(), photos, out, more)
}

pub(crate) fn train_from(bundle: &Path, photos: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hypnos"));
    command.arg("train").arg("--bundle").arg(bundle).arg("--photos").arg(photos).arg("--out").arg(out);
    if !more.contains(&"--class-name") {
        command.args(["--class-name", "mug"]);
    }
    let cheap = ["seed=5", "steps=6", "class_images=2", "learning_rate=1e-4", "evaluation.enabled=false"];
    let method = ["views.n=6", "discriminator.steps=3", "discriminator.batch=2"];
    cheap.iter().chain(&method).for_each(|pair| {
        command.args(["--set", pair]);
    });
    command.args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(command: &mut Command) -> Output {
    command.output().expect("the program starts")
}

#[track_caller]
pub(crate) fn succeeds(command: &mut Command) -> String {
    let out = run(command);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text")
}

/// The one line of a refusal by its exit code.
#[track_caller]
pub(crate) fn refused(command: &mut Command, code: i32) -> String {
    let out = run(command);
    let words = String::from_utf8(out.stderr).expect("text");
    let line = words.lines().last().unwrap_or_default().to_owned();
    assert_eq!(out.status.code(), Some(code), "{words}");
    assert_eq!(words.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{words}");
    line.strip_prefix("error: ").expect("an error").to_owned()
}

/// A command for a shell whose script runs another one as `"$0" "$@"`, with the environment of that.
pub(crate) fn scripted(shell: &[&str], script: &str, command: &Command) -> Command {
    let mut outer = Command::new(shell[0]);
    outer.args(&shell[1..]).args(["-c", script]).arg(command.get_program()).args(command.get_args());
    with_environment_of(outer, command)
}

/// The first command with what is set and removed for the second.
pub(crate) fn with_environment_of(mut command: Command, other: &Command) -> Command {
    for (name, value) in other.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

/// The command, whose files may grow to so many KiB, or twice as many where the shell does not count in blocks of 512
/// bytes: a write beyond that fails as on a full disk, with another word.
pub(crate) fn limited(command: &Command, kib: u32) -> Command {
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", 2 * kib);
    scripted(&["sh"], &script, command)
}

fn weights(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("weights.safetensors")).expect("weights")
}

fn log(dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("log.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Kills a training by SIGKILL as soon as it has logged `n` steps; gives whether it was still alive then.
fn killed_after(mut training: Child, dir: &Path, n: usize) -> bool {
    let patience = Instant::now() + Duration::from_mins(2);
    loop {
        if training.try_wait().expect("a state").is_some() {
            return false;
        }
        if log(dir).len() >= n {
            training.kill().expect("a signal");
            training.wait().expect("an end");
            return true;
        }
        assert!(Instant::now() < patience, "{n} steps were never taken");
        sleep(Duration::from_millis(3));
    }
}

/// Two unbroken runs and one that is killed twice, at steps that differ from day to day.
fn survives_kills(method: &str) {
    let (dir, steps) = (scratch(), "steps=12");
    let place = |name: &str| dir.path().join(name);
    let more = ["--method", method, "--set", steps, "--checkpoint-every", "2"];
    let start = |name: &str, resume: &[&str]| {
        let mut command = train(&demo_photos(), &place(name), &[&more, resume].concat());
        command.stderr(Stdio::null()).stdout(Stdio::null());
        command.spawn().expect("the program starts")
    };
    succeeds(&mut train(&demo_photos(), &place("once"), &more));
    succeeds(&mut train(&demo_photos(), &place("twice"), &more));
    assert!(weights(&place("once")) == weights(&place("twice")), "the same seed gives the same bytes");

    let now =
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time").subsec_nanos() as usize;
    let (first, second) = (1 + now % 5, 6 + now / 7 % 5);
    let broken = place("broken");
    assert!(killed_after(start("broken", &[]), &broken, first), "it ended before step {first}");
    assert!(!broken.join("weights.safetensors").exists());
    assert!(killed_after(start("broken", &["--resume"]), &broken, second), "it ended before step {second}");
    succeeds(&mut train(&demo_photos(), &broken, &[&more[..], &["--resume"]].concat()));
    assert!(weights(&broken) == weights(&place("once")), "killed after steps {first} and {second}");
    let without_time = |dir: &Path| -> Vec<Value> {
        let mut lines = log(dir);
        lines.iter_mut().for_each(|line| line["seconds"] = Value::Null);
        lines
    };
    assert_eq!(without_time(&broken), without_time(&place("once")));
    assert_eq!(without_time(&broken).len(), 12);
}

#[test]
fn hypnos_killed_at_any_step_and_resumed_gives_the_bytes_of_an_unbroken_run() {
    survives_kills("hypnos");
}

#[test]
fn dreambooth_killed_at_any_step_and_resumed_gives_the_bytes_of_an_unbroken_run() {
    survives_kills("dreambooth");
}

#[test]
fn textual_inversion_killed_at_any_step_and_resumed_gives_the_bytes_of_an_unbroken_run() {
    survives_kills("textual_inversion");
}

#[test]
fn a_training_writes_masks_views_images_a_report_and_weights() {
    let (dir, traces) = (scratch(), scratch());
    let out = dir.path().join("mug");
    let trace = traces.path().to_str().expect("a path");
    let more = ["--trace", trace, "--trace-steps", "1,6", "--set", "evaluation.enabled=true"];
    let pictures = ["--set", "evaluation.images=2", "--set", "evaluation.steps=2", "--set", "previews=[3]"];
    succeeds(&mut train(&demo_photos(), &out, &[&more[..], &pictures].concat()));
    for file in [
        "masks/1.png",
        "masks/4.png",
        "views/000.png",
        "views/005.png",
        "attention/1.png",
        "previews/00003.png",
        "images/01.png",
        "losses.svg",
        "report.html",
        "report.json",
        "weights.safetensors",
    ] {
        assert!(out.join(file).is_file(), "{file} is missing");
    }
    assert!(!out.join("checkpoint.safetensors").exists());
    let steps = log(&out);
    assert_eq!(steps.len(), 6);
    for name in ["loss", "reconstruction", "prior", "adversarial", "critic", "grad_norm", "cut", "seconds"] {
        assert!(
            steps.iter().all(|step| step[name].as_f64().is_some_and(f64::is_finite)),
            "{name}: {steps:?}"
        );
    }
    // s_p is five eighths of the steps.
    let perceptual: Vec<bool> = steps.iter().map(|step| step["perceptual"].is_number()).collect();
    assert_eq!(perceptual, [true, true, true, false, false, false]);
    let traced = fs::read(traces.path().join("step-0001.safetensors")).expect("a trace");
    let traced = safetensors::SafeTensors::deserialize(&traced).expect("safetensors");
    for name in [
        "latents",
        "noise",
        "t",
        "ids",
        "prediction",
        "z0",
        "decoded",
        "reference",
        "loss.total",
        "grad_norm",
    ] {
        assert!(traced.tensor(name).is_ok(), "the trace has no {name}: {:?}", traced.names());
    }
    assert!(traces.path().join("step-0006.safetensors").is_file());
}

#[test]
fn an_invalid_training_is_refused_in_one_line_and_nothing_is_written() {
    let dir = scratch();
    let refuse = |more: &[&str], wanted: &[&str]| {
        let out = dir.path().join("out");
        let line = refused(&mut train(&demo_photos(), &out, more), 2);
        assert!(wanted.iter().all(|words| line.contains(words)), "{more:?}: {line}");
        assert!(!out.exists(), "{more:?} left something");
    };
    refuse(&["--set", "steps=0"], &["steps", "wanted 1 to 10000, got 0"]);
    refuse(&["--set", "s_p=7"], &["s_p", "wanted 0 to 6, got 7"]);
    refuse(&["--set", "loss_weights.prio=1"], &["--set loss_weights", "unknown field `prio`"]);
    refuse(&["--set", "adamw_moments=4bit"], &["--set adamw_moments: unknown variant `4bit`"]);
    refuse(&["--set", "steps"], &["--set: wanted KEY=VALUE, got \"steps\""]);
    refuse(&["--set", "sigma=0"], &["sigma", "wanted 0.1 to 100, got 0"]);
    refuse(&["--class-name", "  "], &["--class-name", "wanted 1 to 64 characters"]);
    refuse(&["--class-name", "mug\u{202e}"], &["--class-name", "U+202E"]);
    refuse(&["--class-name", "?!*"], &["class_name: wanted words, \"?!*\" has no letter"]);
    refuse(&["--trace", "t", "--trace-steps", "7"], &["--trace-steps: wanted 1 to 6, got 7"]);
    // What only the model can know.
    refuse(
        &["--set", "instance_token=unbelievable"],
        &["instance_token: wanted one token", "\"unbelievable\" is"],
    );
    refuse(
        &["--set", "instance_token=sks", "--set", "background_token=sks"],
        &["background_token: is \"sks\", the same as instance_token; wanted another"],
    );
}

#[test]
fn three_to_five_photos_are_required_and_each_must_be_one() {
    let dir = scratch();
    let photos = dir.path().join("photos");
    fs::create_dir(&photos).expect("a directory");
    let out = dir.path().join("out");
    let copy =
        |n: usize| fs::copy(demo_photos().join("mug-1.jpg"), photos.join(format!("{n}.jpg"))).map(|_| ());
    (1..=2).for_each(|n| copy(n).expect("a copy"));
    let line = refused(&mut train(&photos, &out, &[]), 2);
    assert!(line.contains("wanted 3 to 5 photos") && line.ends_with("got 2"), "{line}");
    (3..=6).for_each(|n| copy(n).expect("a copy"));
    let line = refused(&mut train(&photos, &out, &[]), 2);
    assert!(line.contains("wanted 3 to 5 photos") && line.ends_with("got 6"), "{line}");
    fs::remove_file(photos.join("6.jpg")).expect("a file");
    let whole = fs::read(photos.join("5.jpg")).expect("a photo");
    fs::write(photos.join("5.jpg"), &whole[..whole.len() / 2]).expect("half a photo");
    let line = refused(&mut train(&photos, &out, &[]), 2);
    assert!(line.contains("5.jpg: "), "{line}");
    let line = refused(&mut train(&dir.path().join("nowhere"), &out, &[]), 2);
    assert!(line.contains("nowhere: cannot be read"), "{line}");
    assert!(!out.exists());
}

#[test]
fn a_photo_that_cannot_be_cut_is_refused_by_its_number() {
    let (dir, blind) = (scratch(), crate::segment::segmenting(60.0)); // it sees the product everywhere
    let out = dir.path().join("out");
    let line = refused(&mut train_from(blind.path(), &demo_photos(), &out, &[]), 2);
    assert!(line.contains("photo 1: no background was found"), "{line}");
    assert!(!out.join("weights.safetensors").exists() && !out.join("checkpoint.safetensors").exists());
}

#[test]
fn a_directory_with_other_contents_is_left_alone() {
    let dir = scratch();
    fs::write(dir.path().join("mine"), "precious").expect("a file");
    let line = refused(&mut train(&demo_photos(), dir.path(), &[]), 2);
    assert!(line.contains("is not empty"), "{line}");
    let line = refused(&mut train(&demo_photos(), dir.path(), &["--resume"]), 2);
    assert!(line.contains("has no training to resume"), "{line}");
    assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1);
}

#[test]
fn a_disk_that_is_full_at_a_checkpoint_ends_the_training_and_keeps_the_one_before() {
    let dir = scratch();
    let out = dir.path().join("out");
    let dreambooth = ["--method", "dreambooth", "--checkpoint-every", "2"];
    // A checkpoint of the miniature has 77 MiB, so that the first one does not fit.
    let plain = train(&demo_photos(), &out, &dreambooth);
    let line = refused(&mut limited(&plain, 20 * 1024), 1);
    assert!(line.contains("checkpoint") && line.contains("cannot be written"), "{line}");
    let left = |suffix: &str| -> Vec<String> {
        let names = fs::read_dir(&out).expect("a directory").flatten();
        let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.contains(suffix)).collect()
    };
    assert_eq!((left("checkpoint"), left("scratch"), left("weights")), (vec![], vec![], vec![]));
    // With room again it goes on.
    succeeds(&mut train(&demo_photos(), &out, &[&dreambooth[..], &["--resume"]].concat()));
}
