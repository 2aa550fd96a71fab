//! What goes wrong on the way: connections, hubs, disks, killed programs, wrong and harmful files.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::json;
use sha2::{Digest, Sha256};

use super::hub::{Asked, Fault, Hub};
use super::published::{INCEPTION, TRACER, UNET, VOCAB, World};
use super::{ACCEPT, fails, files, run, succeeds};
use crate::cli_train::{limited, scripted};

/// Bytes after which a transfer of the UNet is cut: not at the end of a piece.
const SOME: usize = 5_000_001;

const VAE: &str = "/sd/fifteen/resolve/main/vae/diffusion_pytorch_model.safetensors";

fn for_the_file<'a>(asked: &'a [Asked], path: &str) -> Vec<&'a Asked> {
    asked.iter().filter(|asked| asked.path.trim_start_matches("/stored") == path).collect()
}

fn range(from: usize) -> String {
    format!("bytes={from}-")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_connection_goes_on_where_it_was_cut() {
    let world = World::new().await;
    world.hub.fail(UNET, [Fault::Cut(SOME), Fault::Cut(1_000_000)]);
    world.hub.fail(INCEPTION, [Fault::Cut(100_000)]);
    let said = succeeds(world.command(&["--only", "base", "inception", ACCEPT])).await;
    assert!(said.contains("a sound bundle"), "{said}");
    let asked = world.hub.asked();
    let ranges: Vec<_> = for_the_file(&asked, UNET).iter().filter_map(|asked| asked.range.clone()).collect();
    let wanted = [SOME, SOME, SOME + 1_000_000, SOME + 1_000_000].map(range);
    assert_eq!(ranges, wanted, "at the hub and at the other host");
    let tag = &for_the_file(&asked, INCEPTION)[1].if_range;
    assert_eq!(tag.as_deref().map(str::len), Some(42), "If-Range has the entity tag: {tag:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_pull_goes_on_where_it_was() {
    let world = World::new().await;
    killed_within_the_unet(&world).await;
    let left = files(&world.out());
    assert!(left.iter().all(|path| path.starts_with(world.out().join(".pull"))), "half-written: {left:?}");
    let said = succeeds(world.command(&["--only", "base", ACCEPT])).await;
    assert!(said.contains("a sound bundle"), "{said}");
    let asked = world.hub.asked();
    let unet = for_the_file(&asked, UNET);
    assert!(unet.len() == 2 && unet.iter().all(|asked| asked.range == Some(range(SOME))), "{unet:?}");
    assert!(for_the_file(&asked, VOCAB).is_empty(), "what had come is not fetched again");
    assert!(!world.out().join(".pull").exists());
}

/// Starts a pull, and kills it when the UNet has come in part and all small files in whole.
async fn killed_within_the_unet(world: &World) {
    world.hub.fail(UNET, [Fault::Stall(SOME)]);
    let mut command = world.command(&["--only", "base", ACCEPT]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    world.hub.stalled().await;
    let fetched = world.out().join(".pull/part-base/fetched");
    let is_there =
        |path: &str, n: usize| fs::metadata(fetched.join(path)).is_ok_and(|about| about.len() == n as u64);
    let vae = world.hub.file(VAE).len();
    while !is_there("unet/diffusion_pytorch_model.safetensors", SOME)
        || !is_there("vae/diffusion_pytorch_model.safetensors", vae)
        || !fs::read_to_string(fetched.join("vae/diffusion_pytorch_model.safetensors.json"))
            .is_ok_and(|record| record.contains("\"sha256\":\""))
    {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    child.kill().unwrap();
    child.wait().unwrap();
    world.hub.asked();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changed_meanwhile_is_begun_again() {
    for is_weak in [false, true] {
        let mut world = World::new().await;
        // Nothing is known of it, so only the hub's tag tells.
        for key in ["size", "sha256"] {
            let pointer = format!("/parts/0/files/{}/{key}", index_of_the_unet(&world));
            world.set(&pointer, json!(null));
        }
        if is_weak {
            world.hub.weaken_tags();
        }
        killed_within_the_unet(&world).await;
        let mut bytes = world.hub.file(UNET).to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        world.hub.put(UNET, bytes.clone());
        succeeds(world.command(&["--only", "base", ACCEPT])).await;
        assert_eq!(fs::read(world.out().join("unet/diffusion_pytorch_model.safetensors")).unwrap(), bytes);
        let asked = world.hub.asked();
        let unet = for_the_file(&asked, UNET);
        assert!(unet[..2].iter().all(|asked| asked.range == Some(range(SOME))), "{unet:?}");
        // By a strong tag the server knows that all of it is wanted; otherwise it is told.
        assert_eq!(unet[0].if_range.is_some(), !is_weak);
        assert_eq!(unet.len(), if is_weak { 4 } else { 2 }, "{unet:?}");
    }
}

fn index_of_the_unet(world: &World) -> usize {
    let files = world.sources["parts"][0]["files"].as_array().unwrap();
    files.iter().position(|file| file["path"] == "unet/diffusion_pytorch_model.safetensors").unwrap()
}

/// Changes a byte of a file that has come, in part or in whole; where it lies.
fn spoil(world: &World, file: &str) -> PathBuf {
    let path = world.out().join(".pull/part-base/fetched").join(file);
    let mut bytes = fs::read(&path).unwrap();
    bytes[1000] ^= 1;
    fs::write(&path, bytes).unwrap();
    path
}

/// What is there begins with other bytes than the file, under the same tag: only the hash tells.
#[tokio::test(flavor = "multi_thread")]
async fn a_beginning_that_was_spoilt_on_the_disk_is_begun_again() {
    let world = World::new().await;
    killed_within_the_unet(&world).await;
    spoil(&world, "unet/diffusion_pytorch_model.safetensors");
    let out = run(world.command(&["--only", "base", ACCEPT])).await;
    let (said, words) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && said.contains("a sound bundle"), "{said}{words}");
    let wanted = "safetensors: its size or hash is wrong with what was fetched before; trying again";
    assert!(words.contains(wanted), "{words}");
    assert!(for_the_file(&world.hub.asked(), UNET).last().unwrap().range.is_none());
}

/// Begun again, and then the network fails: the empty file is no whole one.
#[tokio::test(flavor = "multi_thread")]
async fn a_whole_file_that_was_spoilt_and_then_out_of_reach_comes_with_the_next_pull() {
    let world = World::new().await;
    killed_within_the_unet(&world).await;
    let path = spoil(&world, "vae/diffusion_pytorch_model.safetensors");
    world.hub.fail(VAE, [Fault::Status(503, vec![("retry-after", "7200")])]);
    let line = fails(world.command(&["--only", "base", ACCEPT]), 1).await;
    assert!(line.ends_with("asks to wait for 120 minutes"), "{line}");
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(path.with_extension("safetensors.json")).unwrap()).unwrap();
    assert!(record["sha256"].is_null() && record["etag"].is_null(), "{record}");
    let said = succeeds(world.command(&["--only", "base", ACCEPT])).await;
    assert!(said.contains("a sound bundle"), "{said}");
}

/// Without entity tags the rest of a file is fetched where its hash tells in the end, and all of it where nothing does.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_entity_tags_does_not_hold_up_a_later_pull() {
    for is_hash_known in [true, false] {
        let mut world = World::new().await;
        world.hub.forget_tags();
        if !is_hash_known {
            world.set("/parts/5/files/0/sha256", json!(null));
        }
        world.hub.fail(INCEPTION, [Fault::Stall(100_000)]);
        let mut command = world.command(&["--only", "inception", ACCEPT]);
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        world.hub.stalled().await;
        let path = world.out().join(".pull/part-inception/fetched/0-inception.pth");
        while !fs::metadata(&path).is_ok_and(|about| about.len() == 100_000) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        world.hub.asked();
        succeeds(world.command(&["--only", "inception", ACCEPT])).await;
        assert!(world.out().join("metrics/inception/model.safetensors").exists());
        let ranges: Vec<_> = world.hub.asked().into_iter().map(|asked| asked.range).collect();
        let wanted =
            if is_hash_known { vec![Some(range(100_000))] } else { vec![Some(range(100_000)), None] };
        assert_eq!(ranges, wanted);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_pulls_at_once_are_one_too_many() {
    let world = World::new().await;
    world.hub.fail(UNET, [Fault::Stall(SOME)]);
    let mut command = world.command(&["--only", "base", ACCEPT]);
    let mut first = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    world.hub.stalled().await;
    let line = fails(world.command(&["--only", "segmenter", ACCEPT]), 2).await;
    assert_eq!(line, format!("{}: another `hypnos models pull` is at work here", world.out().display()));
    // A signal ends the first, in words; then there is room.
    let pid = first.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let ended = tokio::task::spawn_blocking(move || first.wait().unwrap()).await.unwrap();
    assert_eq!(ended.code(), Some(1));
    succeeds(world.command(&["--only", "base", "segmenter", ACCEPT])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_that_is_busy_is_asked_again() {
    let world = World::new().await;
    world.hub.fail(VOCAB, [Fault::Status(429, vec![("retry-after", "1")]), Fault::Status(503, vec![])]);
    world.hub.fail(UNET, [Fault::Status(500, vec![]), Fault::Status(502, vec![])]);
    let began = std::time::Instant::now();
    let out = run(world.command(&["--only", "base", ACCEPT])).await;
    let words = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{words}");
    assert!(
        began.elapsed().as_secs_f64() >= 2.0,
        "a second as the hub says, then a longer wait than the first"
    );
    let wanted = "tokenizer/vocab.json: the server answers 429 Too Many Requests; trying again";
    assert!(words.contains(wanted), "{words}");
    assert_eq!(for_the_file(&world.hub.asked(), VOCAB).len(), 3);
    // No wait, or one that is over: the usual one.
    let past = ("retry-after", "Mon, 05 Jan 2015 09:00:00 GMT");
    world
        .hub
        .fail(INCEPTION, [Fault::Status(503, vec![("retry-after", "0")]), Fault::Status(503, vec![past])]);
    let began = std::time::Instant::now();
    succeeds(world.command(&["--only", "inception", ACCEPT])).await;
    assert!(began.elapsed().as_secs_f64() >= 1.5, "half a second, then twice that");
    // A wait that is too long for anybody.
    world.hub.fail(TRACER, [Fault::Status(429, vec![("retry-after", "3600")])]);
    let line = fails(world.command(&["--only", "segmenter", ACCEPT]), 1).await;
    assert!(line.ends_with("429 Too Many Requests, and asks to wait for 60 minutes"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_that_never_answers_is_left_in_the_end() {
    let world = World::new().await;
    let busy = Fault::Status(503, vec![("retry-after", "1")]); // without it the waits grow, up to 8 s
    world.hub.fail(INCEPTION, vec![busy; 100]);
    let line = fails(world.command(&["--only", "inception", ACCEPT]), 1).await;
    let wanted = "inception.pth: cannot be fetched: the server answers 503 Service Unavailable; the same command goes \
                  on with what is missing";
    assert!(line.ends_with(wanted), "{line}");
    assert_eq!(world.hub.asked().len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_told_apart() {
    let world = World::new().await;
    let said = ("x-error-message", "Invalid credentials in Authorization header");
    let gated =
        [("x-error-code", "GatedRepo"), ("x-error-message", "Access to model carve/tracer is restricted")];
    let gone = [("x-error-code", "RevisionNotFound"), ("x-error-message", "Invalid rev id: main")];
    let at = format!(
        "has terms that have to be accepted first, at {}/carve/tracer, by the owner of ",
        world.hub.endpoint()
    );
    let cases = [
        (
            false,
            401,
            vec![said],
            "is not there or not for everyone, and HF_TOKEN is not set (401 Unauthorized): Invalid".into(),
        ),
        (
            false,
            403,
            vec![],
            "is not there or not for everyone, and HF_TOKEN is not set (403 Forbidden)".into(),
        ),
        (
            true,
            401,
            vec![said],
            "is not for the owner of the token in HF_TOKEN (401 Unauthorized): Invalid".into(),
        ),
        (true, 403, vec![], "is not for the owner of the token in HF_TOKEN (403 Forbidden)".into()),
        (
            true,
            403,
            gated.into(),
            format!("{at}the token in HF_TOKEN: Access to model carve/tracer is restricted"),
        ),
        (false, 401, gated.into(), format!("{at}a token, which HF_TOKEN then has to hold: Access to")),
        (
            false,
            404,
            gone.into(),
            "is not there at revision 0123456789abcdef0123456789abcdef01234567 (404 Not Found): ".into(),
        ),
        (false, 418, vec![], "cannot be fetched: the server answers 418".into()),
    ];
    let n_cases = cases.len();
    for (token, status, headers, wanted) in cases {
        world.hub.fail(TRACER, [Fault::Status(status, headers)]);
        let mut command = world.command(&["--only", "segmenter", ACCEPT]);
        if token {
            command.env("HF_TOKEN", "hf_secret");
        }
        let line = fails(command, 2).await;
        let begin = format!("carve/tracer/tracer.pth: {wanted}");
        assert!(line.starts_with(&begin) && !line.contains("hf_secret"), "{line}\nwanted {begin}");
    }
    assert_eq!(world.hub.asked().len(), n_cases, "none is tried again");
    // A server that is no hub never got the token, so that is not to blame.
    world.hub.fail(INCEPTION, [Fault::Status(403, vec![])]);
    let mut command = world.command(&["--only", "inception", ACCEPT]);
    command.env("HF_TOKEN", "hf_secret");
    let line = fails(command, 2).await;
    assert!(line.ends_with("inception.pth: cannot be fetched: the server answers 403 Forbidden"), "{line}");
    assert!(!world.out().join("hypnos.json").exists() && !world.out().join("segmenter").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_within_the_hub_and_signed_urls_that_ended_are_followed() {
    let world = World::new().await;
    world.hub.fail(VOCAB, [Fault::Moved]);
    world.hub.fail(UNET, [Fault::Expired]);
    let mut command = world.command(&["--only", "base", ACCEPT]);
    command.env("HF_TOKEN", "hf_secret");
    let said = succeeds(command).await;
    assert!(said.contains("a sound bundle"), "{said}");
    let asked = world.hub.asked();
    let moved: Vec<_> = asked.iter().filter(|asked| asked.path.ends_with(VOCAB)).collect();
    assert!(moved.len() == 2 && moved[1].path == format!("/cache{VOCAB}"), "{moved:?}");
    assert!(moved.iter().all(|asked| asked.token.is_some()), "the hub is the same: {moved:?}");
    assert_eq!(for_the_file(&asked, UNET).len(), 4, "the hub is asked for another URL");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_ranges_sends_all_of_it_again() {
    let world = World::new().await;
    world.hub.forget_ranges();
    world.hub.fail(UNET, [Fault::Cut(SOME)]);
    let said = succeeds(world.command(&["--only", "base", ACCEPT])).await;
    assert!(said.contains("a sound bundle"), "{said}");
    let asked = world.hub.asked();
    let unet = for_the_file(&asked, UNET);
    assert!(unet.len() == 4 && unet[3].range == Some(range(SOME)), "{unet:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_file_never_gets_its_name() {
    let mut world = World::new().await;
    let right = world.hub.file(UNET).to_vec();
    let mut wrong = right.clone();
    wrong[SOME] ^= 1;
    // Another content.
    world.hub.put(UNET, wrong.clone());
    let line = fails(world.command(&["--only", "base", ACCEPT]), 1).await;
    let [found, wanted] = [&wrong, &right].map(|bytes| format!("{:x}", Sha256::digest(bytes)));
    assert_eq!(
        line,
        format!(
            "sd/fifteen/unet/diffusion_pytorch_model.safetensors: has SHA-256 {found}; {wanted} is wanted"
        )
    );
    assert!(!world.out().join("unet").exists() && !world.out().join("hypnos.json").exists());
    // A half of it.
    world.hub.put(UNET, right.clone());
    world.hub.fail(UNET, [Fault::Half(SOME)]);
    let line = fails(world.command(&["--only", "base", ACCEPT]), 1).await;
    assert!(line.ends_with(&format!("has {SOME} bytes; {} are wanted", right.len())), "{line}");
    // Web pages instead of it, said to be one or not.
    for kind in ["text/html; charset=utf-8", "application/octet-stream"] {
        world.hub.fail(INCEPTION, [Fault::Page(kind)]);
        world.set("/parts/5/files/0/size", json!(null));
        let line = fails(world.command(&["--only", "inception", ACCEPT]), 1).await;
        assert!(line.ends_with("web page; is there a login on the way?"), "{line}");
    }
    // Another hash of it in the published table, of the other kind.
    world.set("/parts/1/files/0/sha512", json!("0".repeat(128)));
    let line = fails(world.command(&["--only", "segmenter", ACCEPT]), 1).await;
    assert!(line.contains("tracer.pth: has SHA-512 ") && line.ends_with("0000 is wanted"), "{line}");
    // A hub that announces another content than it sends, where nothing else is known.
    let dino = format!("/timm/dino/resolve/{}/model.safetensors", super::COMMIT);
    world.hub.announce(&dino, &"1".repeat(64));
    let line = fails(world.command(&["--only", "dino", ACCEPT]), 1).await;
    assert!(line.ends_with(&format!("but the hub announces {}", "1".repeat(64))), "{line}");
    // In the end everything is right.
    succeeds(world.command(&["--only", "base", ACCEPT])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pickle_with_code_in_it_is_refused_by_the_code_s_name() {
    let mut world = World::new().await;
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/pickles/code.pth");
    world.hub.put(TRACER, fs::read(path).unwrap());
    for key in ["size", "sha512"] {
        world.set(&format!("/parts/1/files/0/{key}"), json!(null));
    }
    let line = fails(world.command(&["--only", "segmenter", ACCEPT]), 2).await;
    let wanted =
        "tracer.pth: holds code: it names `posix.getcwd`, which tensors do not need; nothing of it was run";
    assert!(line.contains(wanted), "{line}");
    assert!(!world.out().join("segmenter").exists() && !world.out().join("hypnos.json").exists());
}

/// The table knows no sizes, so that only the disk can tell how much is too much.
fn forget_sizes(world: &mut World) {
    let n_files = world.sources["parts"][0]["files"].as_array().unwrap().len();
    for i in 0..n_files {
        world.set(&format!("/parts/0/files/{i}/size"), json!(null));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_too_small_is_found_before_anything_is_fetched() {
    let mut world = World::new().await;
    let pointer = format!("/parts/0/files/{}/size", index_of_the_unet(&world));
    world.set(&pointer, json!(1_000_000_000_000_000_u64));
    let line = fails(world.command(&["--only", "base", ACCEPT]), 1).await;
    let begin = format!("{}: 1000000.0", world.out().display());
    assert!(line.starts_with(&begin) && line.contains(" GB are wanted on its disk, "), "{line}");
    assert!(world.hub.asked().is_empty());
}

/// The UNet has more bytes than a file may grow to.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_fails_ends_the_pull_and_the_next_one_goes_on() {
    let mut world = World::new().await;
    forget_sizes(&mut world);
    let plain = world.command(&["--only", "base", ACCEPT]);
    let line = fails(limited(&plain, 8 * 1024), 1).await;
    assert!(line.contains("unet/diffusion_pytorch_model.safetensors: cannot be written: "), "{line}");
    assert!(!world.out().join("hypnos.json").exists() && !world.out().join("unet").exists());
    world.hub.asked();
    let said = succeeds(plain).await;
    assert!(said.contains("a sound bundle"), "{said}");
    let asked = world.hub.asked();
    let unet = for_the_file(&asked, UNET);
    assert!(!unet.is_empty() && unet.iter().all(|asked| asked.range.is_some()), "{asked:?}");
}

/// The disk is a small one in memory, where the tests may mount one. Elsewhere the two tests above stand for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_found_before_and_on_the_way() {
    let mut world = World::new().await;
    let in_a_space_of_its_own = ["unshare", "--mount", "--map-root-user", "sh"];
    let mut try_it = Command::new(in_a_space_of_its_own[0]);
    try_it.args(&in_a_space_of_its_own[1..]).args(["-c", "mount -t tmpfs -o size=1m none /mnt"]);
    let why = match try_it.output() {
        Ok(out) if out.status.success() => None,
        Ok(out) => Some(String::from_utf8_lossy(&out.stderr).trim().to_owned()),
        Err(error) => Some(format!("unshare: {error}")),
    };
    if let Some(why) = why {
        eprintln!("skipped: no file system can be mounted here: {why}");
        return;
    }
    fs::create_dir(world.out()).unwrap();
    let out = world.out();
    let on_a_disk_of_8_mb = |script: &str, command: &Command| {
        let script = format!("mount -t tmpfs -o size=8m none {}; {script}", out.display());
        scripted(&in_a_space_of_its_own, &script, command)
    };
    // It is known how much has to come: nothing is fetched.
    let command = world.command(&["--only", "base", ACCEPT]);
    let line = fails(on_a_disk_of_8_mb("exec \"$0\" \"$@\"", &command), 1).await;
    assert!(line.starts_with(&world.out().display().to_string()), "{line}");
    assert!(line.contains("MB are wanted on its disk, 8.4 MB are free"), "{line}");
    assert!(world.hub.asked().is_empty());
    // It is not known. When there is space, it goes on.
    let script = format!(
        "\"$0\" \"$@\" && exit 9; mount -o remount,size=64m {}; exec \"$0\" \"$@\"",
        world.out().display()
    );
    let shell = on_a_disk_of_8_mb(&script, &command);
    forget_sizes(&mut world);
    let out = run(shell).await;
    let (said, words) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(
        words.contains("the disk is full; when there is space, the same command goes on where it stopped"),
        "{words}"
    );
    assert!(out.status.success() && said.contains("a sound bundle"), "{said}{words}");
    let asked = world.hub.asked();
    assert!(for_the_file(&asked, UNET).iter().any(|asked| asked.range.is_some()), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_of_the_environment_are_used() {
    let world = World::new().await;
    let proxy = Hub::start().await;
    for part in ["base", "dino"] {
        let part = world.sources["parts"].as_array().unwrap().iter().find(|one| one["name"] == part).unwrap();
        for file in part["files"].as_array().unwrap() {
            let (hub, path) = (part["hub"].as_str().unwrap(), file["path"].as_str().unwrap());
            let path = format!("/{hub}/resolve/{}/{path}", part["revision"].as_str().unwrap());
            proxy.put(&path, world.hub.file(&path).to_vec());
        }
    }
    let mut command = world.command(&["--endpoint", "http://hub.example", "--only", "base", ACCEPT]);
    command.env("HTTP_PROXY", proxy.endpoint()).env("NO_PROXY", "other.example");
    succeeds(command).await;
    let asked = proxy.asked();
    assert!(asked.len() > 10 && asked.iter().any(|asked| asked.host == "hub.example"), "{asked:?}");
    assert!(world.hub.asked().is_empty());
}
