//! The layers of the code: who may use whom, and where dangerous code may be. What `crates/hypnos-ml` and
//! `crates/hypnos-photo` may use of other packages is in their Cargo.toml; the compiler checks it.

use std::fs;
use std::path::{Path, PathBuf};

const CORE: &str = "crates/hypnos-ml/src";

/// Every source file below `dir`, by its path from the root of the repository, and its code without comments.
fn sources(dir: &str) -> Vec<(String, String)> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut waiting = vec![root.join(dir)];
    while let Some(place) = waiting.pop() {
        for entry in fs::read_dir(&place).expect("a directory").flatten() {
            let path = entry.path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push((name(&path, &root), code(&path)));
            }
        }
    }
    assert!(!found.is_empty(), "{dir} holds no source");
    found
}

fn name(path: &Path, root: &Path) -> String {
    path.strip_prefix(root).expect("below the root").to_string_lossy().into_owned()
}

fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a source file");
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// Fails if any file below `dir`, but for those that `may` accepts, holds one of `words`.
fn nobody_says(dir: &str, words: &[&str], may: impl Fn(&str) -> bool) {
    for (file, code) in sources(dir).into_iter().filter(|(file, _)| !may(file)) {
        for word in words {
            assert!(!code.contains(word), "{file} says `{word}`");
        }
    }
}

#[test]
fn the_core_uses_no_network_clock_environment_or_terminal() {
    let words = ["std::net", "std::env", "std::time", "SystemTime", "Instant::now", "println!"];
    nobody_says(CORE, &words, |_| false);
}

#[test]
fn the_core_draws_no_hidden_random_numbers() {
    for place in ["src", CORE] {
        nobody_says(place, &["rand::", "thread_rng", "randn(", "Tensor::rand"], |_| false);
    }
}

#[test]
fn models_do_not_import_one_another() {
    for (file, code) in sources("crates/hypnos-ml/src/models") {
        for other in ["clip", "unet", "vae"] {
            let own = file.ends_with(&format!("/{other}.rs")) || file.ends_with("/mod.rs");
            assert!(
                own || !code.contains(&format!("models::{other}"))
                    && !code.contains(&format!("super::{other}"))
            );
        }
    }
}

#[test]
fn unsafe_code_is_in_the_kernels_and_memory_settings_only() {
    let may = |file: &str| file.starts_with("crates/hypnos-ml/src/ops/") || file == "src/memory.rs";
    for place in ["src", CORE] {
        nobody_says(place, &["unsafe "], may);
    }
}

#[test]
fn only_operations_add_to_the_gradient_of_a_weight() {
    for place in ["src", CORE] {
        nobody_says(place, &[".add_grad("], |file| file.starts_with("crates/hypnos-ml/src/ops/"));
    }
}

#[test]
fn the_http_server_and_the_worker_do_not_depend_on_each_other() {
    nobody_says("src/http", &["crate::worker", "crate::engine", "crate::ml", "candle"], |_| false);
    nobody_says("src/worker", &["crate::http", "axum", "crate::ml", "candle"], |_| false);
}

#[test]
fn shared_types_engine_and_report_do_no_io() {
    let words = ["tokio", "axum", "sqlx", "object_store", "crate::store", "crate::blobs", "crate::http"];
    nobody_says("src/job", &words, |_| false);
    nobody_says("src/engine", &words, |_| false);
    nobody_says("src/report", &words, |_| false);
    nobody_says("src/report", &["std::fs", "crate::engine", "candle"], |_| false);
}

#[test]
fn each_library_is_used_in_one_place() {
    let only = |word: &str, places: &[&str]| {
        nobody_says("src", &[word], |file| places.iter().any(|place| file.starts_with(place)));
    };
    only("sqlx", &["src/store/"]);
    only("object_store", &["src/blobs/"]);
    only("axum", &["src/http/"]);
    only("hyper", &["src/http/"]);
    only("candle_core", &["src/engine/", "src/cli/models.rs", "src/cli/sample.rs"]);
    only("image::", &["src/engine/"]);
    only("maud::", &["src/report/"]);
    only("opentelemetry", &["src/telemetry/"]);
    only("std::env", &["src/cli/", "src/config.rs"]);
}

#[test]
fn every_file_that_the_architecture_page_names_exists() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/architecture.md")).expect("the page");
    let named = text.split('`').filter(|word| {
        ["src/", "crates/", "tests/", "benches/", "migrations/"].iter().any(|place| word.starts_with(place))
    });
    let missing: Vec<&str> = named.clone().filter(|path| !root.join(path).exists()).collect();
    assert!(named.count() > 40 && missing.is_empty(), "docs/architecture.md names {missing:?}");
}
