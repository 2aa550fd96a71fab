//! `hypnos models pull` against a hub on this machine: what it fetches becomes a sound bundle, what is interrupted goes
//! on, and every fault of a hub, a network or a disk gets one clear line and leaves nothing half-written.

mod faults;
mod hub;
mod published;
pub(crate) mod torch_files;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use hypnos::ml::tensorfile::TensorFile;
use serde_json::{Value, json};

use crate::cli_train::with_environment_of;
use hub::COMMIT;
use published::{INCEPTION, VOCAB, World};

/// Shapes and values by name.
pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

pub(crate) fn tensors(path: &Path) -> Tensors {
    let file = TensorFile::open(path).unwrap();
    let tensor = |name: &str| (file.shape(name).unwrap().to_vec(), file.read(name).unwrap());
    file.names().map(|name| (name.to_owned(), tensor(name))).collect()
}

/// Kernels of one pixel as the matrices that they are: networks are converted to what they read, which may be either.
fn as_matrices(mut tensors: Tensors) -> Tensors {
    for (shape, _) in tensors.values_mut() {
        if let [_, _, 1, 1] = shape.as_slice() {
            shape.truncate(2);
        }
    }
    tensors
}

const ACCEPT: &str = "--accept-licences";

/// Runs the program to its end without holding up the hub.
async fn run(mut command: Command) -> Output {
    command.stdin(Stdio::null());
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

async fn succeeds(command: Command) -> String {
    let out = run(command).await;
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// The last line of the error stream of a program that ends with this code.
async fn fails(command: Command, code: i32) -> String {
    let out = run(command).await;
    let words = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(code), "{words}");
    assert!(!words.contains("panicked"), "{words}");
    let line = words.lines().last().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or_else(|| panic!("is no error: {words}")).to_owned()
}

/// Every file below a directory, by its path.
fn files(dir: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.insert(entry.path());
        }
    }
    found
}

fn manifest(world: &World) -> Value {
    serde_json::from_slice(&fs::read(world.out().join("hypnos.json")).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_becomes_one_sound_bundle() {
    let world = World::new().await;
    let mut command = world.command(&[ACCEPT]);
    command.env("HF_TOKEN", "hf_secret");
    let said = succeeds(command).await;
    assert!(said.contains("a sound bundle for 64x64 pixels"), "{said}");
    for part in ["text_encoder", "unet", "vae"] {
        let name = if part == "text_encoder" { "model" } else { "diffusion_pytorch_model" };
        let path = format!("{part}/{name}.safetensors");
        let [found, wanted] =
            [world.out(), world.bundle.clone()].map(|dir| fs::read(dir.join(&path)).unwrap());
        assert!(found == wanted, "{path}");
    }
    let judges = ["dino", "clip", "inception", "lpips"].map(|name| format!("metrics/{name}"));
    for part in ["segmenter", "perceptual"].map(str::to_owned).iter().chain(&judges) {
        let path = format!("{part}/model.safetensors");
        let [found, wanted] =
            [world.out(), world.bundle.clone()].map(|dir| as_matrices(tensors(&dir.join(&path))));
        let names = found.keys().chain(wanted.keys());
        let differing: BTreeSet<&String> =
            names.filter(|name| found.get(*name) != wanted.get(*name)).collect();
        let first = differing.first().map(|name| {
            let shape = |all: &Tensors| all.get(*name).map(|(shape, _)| shape.clone());
            format!("{name}, {:?} for {:?}", shape(&found), shape(&wanted))
        });
        assert!(
            first.is_none(),
            "{part}: {} of {} tensors differ, the first {first:?}",
            differing.len(),
            wanted.len()
        );
    }
    let listed: BTreeSet<PathBuf> =
        manifest(&world)["files"].as_object().unwrap().keys().map(|path| world.out().join(path)).collect();
    let there: BTreeSet<PathBuf> =
        files(&world.out()).into_iter().filter(|path| !path.ends_with("hypnos.json")).collect();
    assert_eq!(there, listed, "nothing is left over, and everything is listed");
}

#[tokio::test(flavor = "multi_thread")]
async fn hypnos_json_says_where_everything_came_from() {
    let world = World::new().await;
    succeeds(world.command(&[ACCEPT])).await;
    let manifest = manifest(&world);
    assert_eq!((&manifest["name"], &manifest["kind"]), (&json!("Small Diffusion"), &json!("small")));
    assert_eq!(manifest["rare_tokens"], json!(["sks", "ohwx", "olis"]));
    assert_eq!(manifest["accepted_licences"], json!(["BSD-2-Clause", "MIT", "OpenRAIL"]));
    let unet = &manifest["files"]["unet/diffusion_pytorch_model.safetensors"];
    assert_eq!(unet["source"], "sd/fifteen/unet/diffusion_pytorch_model.safetensors");
    assert_eq!(unet["revision"], format!("main@{COMMIT}"), "the commit that `main` was");
    assert_eq!(unet["licence"], "OpenRAIL");
    let lpips = &manifest["files"]["metrics/lpips/model.safetensors"];
    assert_eq!(lpips["licence"], "BSD-2-Clause AND MIT");
    let from = lpips["converted_from"].as_array().unwrap();
    assert_eq!(from.len(), 2);
    assert_eq!(from[1]["source"], format!("{}/plain/heads.pth", world.hub.endpoint()));
    assert_eq!(from[1]["revision"], "v2");
    let tracer = &manifest["files"]["segmenter/model.safetensors"]["converted_from"][0];
    assert_eq!(tracer["revision"], COMMIT);
    assert_eq!(tracer["sha256"].as_str().unwrap().len(), 64);
    assert_eq!(manifest["files"]["segmenter/config.json"]["source"], "written by hypnos");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_goes_to_the_hub_and_to_no_other_host() {
    let world = World::new().await;
    let mut command = world.command(&[ACCEPT]);
    command.env("HF_TOKEN", "hf_secret");
    succeeds(command).await;
    let asked = world.hub.asked();
    let (here, elsewhere): (Vec<_>, Vec<_>) =
        asked.iter().partition(|asked| asked.host.starts_with("127.0.0.1"));
    assert!(here.iter().all(|asked| asked.token.as_deref() == Some("Bearer hf_secret")));
    assert!(elsewhere.len() >= 6 && elsewhere.iter().all(|asked| asked.host.starts_with("localhost")));
    assert!(elsewhere.iter().all(|asked| asked.token.is_none()), "{elsewhere:?}");
    let mut command = world.command(&["--endpoint", "http://hub.example", ACCEPT]);
    command.env("HF_TOKEN", "hf_secret").env("HTTP_PROXY", world.hub.endpoint());
    let line = fails(command, 2).await;
    assert!(line.contains("unencrypted") && !line.contains("hf_secret"), "{line}");
    assert_eq!(world.hub.asked().len(), 0);
}

/// A proxy is another machine, where the token would arrive in clear.
#[tokio::test(flavor = "multi_thread")]
async fn a_hub_on_this_machine_is_asked_through_no_proxy() {
    let (world, proxy) = (World::new().await, hub::Hub::start().await);
    let mut command = world.command(&["--only", "segmenter", ACCEPT]);
    // The other host, to which the hub sends large files, is `localhost`.
    command.env("HF_TOKEN", "hf_secret").env("HTTP_PROXY", proxy.endpoint()).env("NO_PROXY", "localhost");
    succeeds(command).await;
    assert!(proxy.asked().is_empty());
    assert!(world.hub.asked().iter().any(|asked| asked.token.is_some()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_token_is_refused_before_anything_is_asked() {
    let world = World::new().await;
    let mut command = world.command(&["--only", "segmenter", ACCEPT]);
    command.env("HF_TOKEN", "hf_secret\nhf_other");
    let out = run(command).await;
    let words = String::from_utf8(out.stderr).unwrap();
    assert_eq!((out.status.code(), words.lines().count()), (Some(2), 1), "{words}");
    assert!(
        words.starts_with("error: HF_TOKEN: has a space, a line break") && !words.contains("hf_"),
        "{words}"
    );
    assert!(world.hub.asked().is_empty() && !world.out().exists());
}

/// Addresses that storages sign have a secret in their query.
#[tokio::test(flavor = "multi_thread")]
async fn the_query_of_a_url_is_neither_shown_nor_recorded() {
    let mut world = World::new().await;
    let url = format!("{}{INCEPTION}", world.hub.endpoint());
    world.set("/parts/5/files/0/url", json!(format!("{url}?signature=hunter2#hunter2")));
    let said = succeeds(world.command(&["--only", "inception", "--dry-run"])).await;
    assert!(said.contains(&format!("{url}\n")) && !said.contains("hunter2"), "{said}");
    world.hub.fail(INCEPTION, [hub::Fault::Status(404, vec![])]);
    let line = fails(world.command(&["--only", "inception", ACCEPT]), 2).await;
    assert!(line.starts_with(&format!("{url}: ")) && !line.contains("hunter2"), "{line}");
    world.hub.asked();
    succeeds(world.command(&["--only", "inception", ACCEPT])).await;
    assert_eq!(world.hub.asked()[0].query.as_deref(), Some("signature=hunter2"));
    let manifest = manifest(&world).to_string();
    assert!(manifest.contains(&url) && !manifest.contains("hunter2"), "{manifest}");
    succeeds(world.command(&["--only", "inception"])).await;
    assert!(world.hub.asked().is_empty(), "it is there");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_there_is_not_fetched_again() {
    let world = World::new().await;
    succeeds(world.command(&["--only", "base", "segmenter", ACCEPT])).await;
    let n_asked = world.hub.asked().len();
    assert!(n_asked > 10, "{n_asked}");
    // The same again, without accepting anything.
    let said = succeeds(world.command(&["--only", "base,segmenter"])).await;
    assert!(said.contains("a sound bundle"), "{said}");
    assert_eq!(world.hub.asked().len(), 0);
    // Other parts, whose licence was accepted before.
    succeeds(world.command(&["--only", "perceptual"])).await;
    assert_eq!(world.hub.asked().len(), 2);
    // A file that has changed on the disk, and no other.
    fs::write(world.out().join("tokenizer/vocab.json"), "{}").unwrap();
    succeeds(world.command(&["--only", "base", "segmenter", "perceptual"])).await;
    let asked = world.hub.asked();
    assert!(asked.len() == 1 && asked[0].path == VOCAB, "{asked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn half_precision_replaces_the_weights_only() {
    let world = World::new().await;
    succeeds(world.command(&["--only", "base", ACCEPT])).await;
    world.hub.asked();
    let said = succeeds(world.command(&["--only", "base", "--dtype", "f16"])).await;
    assert!(said.contains("a sound bundle"), "{said}");
    let paths: BTreeSet<String> = world.hub.asked().into_iter().map(|asked| asked.path).collect();
    assert!(paths.iter().all(|path| path.ends_with(".fp16.safetensors")) && paths.len() == 6, "{paths:?}");
    let size = |dir: &Path| fs::metadata(dir.join("unet/diffusion_pytorch_model.safetensors")).unwrap().len();
    assert!(size(&world.out()) < size(&world.bundle) * 6 / 10);
    succeeds(world.command(&["--only", "base", "--dtype", "f16"])).await;
    assert_eq!(world.hub.asked().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_table_fetches_what_it_changes() {
    let mut world = World::new().await;
    succeeds(world.command(&["--only", "inception", "dino", ACCEPT])).await;
    world.hub.asked();
    world.set("/parts/5/files/0/revision", json!("v9"));
    succeeds(world.command(&["--only", "inception", "dino"])).await;
    let asked = world.hub.asked();
    assert!(asked.len() == 1 && asked[0].path == INCEPTION, "{asked:?}");
    // A config that the weights do not fit.
    world.set("/parts/5/config/channel_divisor", json!(8));
    let line = fails(world.command(&["--only", "inception"]), 2).await;
    let source = format!("{}{INCEPTION}", world.hub.endpoint());
    assert!(line.starts_with(&format!("{source}: tensor `Conv2d_1a_3x3.bn.bias` has shape ")), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_accepted_licences_nothing_is_fetched() {
    let world = World::new().await;
    let line = fails(world.command(&[]), 2).await;
    assert_eq!(
        line,
        "not accepted: BSD-2-Clause, MIT, OpenRAIL; --accept-licences accepts them without asking"
    );
    let line = fails(world.command(&["--only", "dino"]), 2).await;
    assert_eq!(line, "not accepted: MIT; --accept-licences accepts them without asking");
    assert!(world.hub.asked().is_empty() && !world.out().exists());
}

/// On a terminal, which `script` makes: the licences are shown, and the answer counts.
#[tokio::test(flavor = "multi_thread")]
async fn on_a_terminal_the_licences_are_asked_for() {
    let world = World::new().await;
    for (answer, code) in [("n\n", 2), ("\n", 2), ("y\n", 0)] {
        let command = world.command(&["--only", "base"]);
        let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
        let line =
            words.iter().map(|word| format!("'{}'", word.to_str().unwrap())).collect::<Vec<_>>().join(" ");
        let mut script = Command::new("script");
        script.args(["-q", "-e", "-c", &line, "/dev/null"]);
        let mut script = with_environment_of(script, &command);
        script.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let out = tokio::task::spawn_blocking(move || {
            let mut child = script.spawn().unwrap();
            std::io::Write::write_all(&mut child.stdin.take().unwrap(), answer.as_bytes()).unwrap();
            child.wait_with_output().unwrap()
        });
        let out = out.await.unwrap();
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert_eq!(out.status.code(), Some(code), "{said}");
        assert!(
            said.contains("licence OpenRAIL: https://licences.example/rail (has an attachment)"),
            "{said}"
        );
        assert!(said.contains("Accept them? [y/N]"), "{said}");
    }
    assert!(world.out().join("unet/config.json").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_shows_everything_and_does_nothing() {
    let world = World::new().await;
    let said = succeeds(world.command(&["--dry-run"])).await;
    for wanted in [
        "base: draws; 26.3 MB\n",
        "19.3 MB  OpenRAIL  http://127.0.0.1",
        "/sd/fifteen/resolve/main/unet/diffusion_pytorch_model.safetensors\n",
        "size unknown  MIT  http",
        ", becomes metrics/lpips/\n",
        "licence OpenRAIL: https://licences.example/rail (has an attachment)\n",
        "MB to fetch into ",
        "GB are free\n",
    ] {
        assert!(said.contains(wanted), "{said}\nwanted {wanted}");
    }
    assert!(world.hub.asked().is_empty() && !world.out().exists());
    succeeds(world.command(&["--only", "base", ACCEPT])).await;
    let said = succeeds(world.command(&["--dry-run", "--only", "base"])).await;
    assert!(said.starts_with("base: draws; 26.3 MB, is there\n"), "{said}");
    assert!(said.contains("\n0 B to fetch into "), "{said}");
    let said = succeeds(world.command(&["--dry-run", "--only", "base", "--dtype", "f16"])).await;
    assert!(said.contains("model.fp16.safetensors as unet/diffusion_pytorch_model.safetensors\n"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_in_the_program_is_printed_and_is_the_default() {
    let hypnos = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hypnos"));
        command.args(["models", "pull", "sd15"]).args(args).env_remove("HF_ENDPOINT").env_remove("HF_TOKEN");
        command
    };
    let table: Value = serde_json::from_str(&succeeds(hypnos(&["--print-sources"])).await).unwrap();
    assert_eq!(table["kind"], "sd15");
    let said = succeeds(hypnos(&["--dry-run", "--out", "/nowhere"])).await;
    let url = "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/\
               451f4fe16113bff5a5d2269ed5ad43b0592e9a14/unet/diffusion_pytorch_model.safetensors";
    assert!(said.contains(url) && said.contains("5.60 GB to fetch into /nowhere, where "), "{said}");
    // A part brings along what it is of no use without.
    let parts = |said: &str| -> Vec<String> {
        let heads = said.lines().filter(|line| !line.starts_with([' ', 'l']) && line.contains("; "));
        heads.filter_map(|line| Some(line.split_once(": ")?.0.to_owned())).collect()
    };
    let said = succeeds(hypnos(&["--only", "base", "--dry-run"])).await;
    assert_eq!(parts(&said), ["tokenizer", "base"], "{said}");
    let said = succeeds(hypnos(&["--only", "tokenizer", "--dry-run"])).await;
    assert_eq!(parts(&said), ["tokenizer"], "{said}");
    let line = fails(hypnos(&["--only", "unet", "--dry-run"]), 2).await;
    assert!(
        line.starts_with("--only: there is no part `unet`; there are tokenizer, base, segmenter, "),
        "{line}"
    );
    let line = fails(hypnos(&["--sources", "/nowhere.json"]), 2).await;
    assert_eq!(line, "/nowhere.json: cannot be read: no such file or directory");
}

/// A directory as people have it who fetched the repositories by other means.
fn downloaded(world: &World, dir: &Path) {
    let put = |name: &str, path: &str| {
        let to = dir.join(name);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::write(to, world.hub.file(path)).unwrap();
    };
    for part in world.sources["parts"].as_array().unwrap() {
        for file in part["files"].as_array().unwrap() {
            let Some(path) = file["path"].as_str() else {
                let name = file["url"].as_str().unwrap().rsplit('/').next().unwrap();
                put(name, &format!("/plain/{name}"));
                continue;
            };
            let (hub, revision) = (part["hub"].as_str().unwrap(), part["revision"].as_str().unwrap());
            let from = format!("/{hub}/resolve/{revision}/{path}");
            match part["name"].as_str().unwrap() {
                "base" => put(path, &from),
                "clip" => put(&format!("models--timm--clip/snapshots/{revision}/{path}"), &from),
                "dino" => put(&format!("{hub}/{path}"), &from),
                _ => put(&format!("{}/{path}", hub.rsplit('/').next().unwrap()), &from),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_on_this_machine_need_no_network() {
    let world = World::new().await;
    let from = world.dir.path().join("downloads");
    downloaded(&world, &from);
    let offline = |more: &[&str]| {
        let mut command = world.command(&["--from", from.to_str().unwrap(), ACCEPT]);
        command.args(more).env("HF_ENDPOINT", "http://127.0.0.1:1");
        command
    };
    let said = succeeds(offline(&[])).await;
    assert!(said.contains("a sound bundle"), "{said}");
    assert!(world.hub.asked().is_empty());
    assert!(from.join("tracer/tracer.pth").exists(), "they are copied, not taken away");
    // What is there, but is something else.
    fs::remove_dir_all(world.out()).unwrap();
    let path = from.join("unet/diffusion_pytorch_model.safetensors");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..1000]).unwrap();
    let line = fails(offline(&[]), 2).await;
    assert_eq!(line, format!("{}: has 1000 bytes; {} are wanted", path.display(), whole.len()));
    fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n").unwrap();
    let line = fails(offline(&[]), 2).await;
    assert!(line.contains("is a git-lfs pointer"), "{line}");
    let dino = from.join("timm/dino/model.safetensors");
    fs::write(&dino, "<!DOCTYPE html><html>Please log in</html>").unwrap();
    let line = fails(offline(&["--only", "dino"]), 2).await;
    assert!(line.starts_with("timm/dino/model.safetensors: ") && line.contains("web page"), "{line}");
    fs::remove_file(from.join("inception.pth")).unwrap();
    let line = fails(offline(&["--only", "inception"]), 2).await;
    assert_eq!(line, format!("--from {}: has no inception.pth", from.display()));
    assert!(!world.out().join("hypnos.json").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_others_stay_as_they_are() {
    let world = World::new().await;
    let own = world.out().join("unet/config.json");
    fs::create_dir_all(own.parent().unwrap()).unwrap();
    fs::write(&own, "mine").unwrap();
    let line = fails(world.command(&["--only", "base", ACCEPT]), 2).await;
    let what = "is there, and hypnos.json does not list it: move it away, or choose another --out";
    assert_eq!(line, format!("{}: {what}", own.display()));
    assert_eq!(fs::read(&own).unwrap(), b"mine");
    // One with the content that is wanted is welcome.
    fs::copy(world.bundle.join("unet/config.json"), &own).unwrap();
    succeeds(world.command(&["--only", "base", ACCEPT])).await;
    assert!(world.hub.asked().iter().all(|asked| !asked.path.ends_with("unet/config.json")));
    // Another bundle.
    fs::remove_dir_all(world.out()).unwrap();
    crate::bundles::copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bundle"), &world.out());
    let line = fails(world.command(&[ACCEPT]), 2).await;
    assert!(line.contains("holds a bundle of the kind `"), "{line}");
}
