//! With the feature `cuda`: compiles `src/ops/cuda/*.cu` to PTX, once for f32 and once for bf16 storage, and writes
//! `kernels.rs`, a table of the texts and the version of CUDA. Without it: nothing.
//!
//! nvcc is looked for in `NVCC`, under `CUDA_HOME` and `CUDA_PATH`, on `PATH` and in `/usr/local/cuda`.
//! `CUDA_COMPUTE_CAP` (80) is the oldest GPU that the result runs on: 80 for Ampere, 90 for Hopper.
#![allow(clippy::print_stdout)] // that is how a build script speaks to cargo

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const KERNELS: &str = "src/ops/cuda";
const STORAGES: [(&str, &str); 2] = [("f32", "float"), ("bf16", "bf16")];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed={KERNELS}");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if let Err(message) = compile_all() {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
    }
}

/// Compiles every kernel file for every storage, and writes the table.
fn compile_all() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo gave no OUT_DIR")?);
    let nvcc = find_nvcc()?;
    let arch = format!("-arch=compute_{}", compute_cap()?);
    let mut entries = Vec::new();
    for source in sources()? {
        let stem = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        for (suffix, real) in STORAGES {
            let name = format!("{stem}_{suffix}");
            let ptx = out.join(format!("{name}.ptx"));
            compile(&nvcc, &arch, real, &source, &ptx)?;
            title(&ptx, &name)?;
            entries.push(format!("    (\"{name}\", include_str!(\"{name}.ptx\")),\n"));
        }
    }
    let head = "/// The kernels as PTX, by module name.\nconst PTX: &[(&str, &str)] = &[\n";
    let version = format!(
        "/// CUDA's version, 1000 times the major one and 10 times the minor one.\nconst CUDA_VERSION: i32 = {};\n",
        version(&nvcc)?
    );
    let table = format!("{head}{}];\n{version}", entries.concat());
    fs::write(out.join("kernels.rs"), table).map_err(|e| format!("kernels.rs: {e}"))
}

/// The version of the CUDA toolkit, as its driver interface writes it.
fn version(nvcc: &Path) -> Result<u32, String> {
    let output =
        Command::new(nvcc).arg("--version").output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = || -> Option<u32> {
        let (_, rest) = said.split_once("release ")?;
        let (major, rest) = rest.split_once('.')?;
        let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        Some(1000 * major.parse::<u32>().ok()? + 10 * minor.parse::<u32>().ok()?)
    };
    version().ok_or_else(|| format!("{} --version names no release: {said:?}", nvcc.display()))
}

/// One nvcc run. No fast-math: division, square root and the elementary functions stay as exact as IEEE and CUDA's
/// library make them, so that the CPU and the GPU can be compared.
fn compile(nvcc: &Path, arch: &str, real: &str, source: &Path, ptx: &Path) -> Result<(), String> {
    let mut command = Command::new(nvcc);
    command.args(["-ptx", "-O3", "-std=c++17", arch]).arg(format!("-DREAL={real}"));
    command.arg("-o").arg(ptx).arg(source);
    let output = command.output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{} could not compile {}:\n{said}", nvcc.display(), source.display()))
}

/// Writes the module's name into the first line of its PTX, as a comment. The driver of `tests/software_cuda`, which
/// cannot run PTX, reads it and loads the same kernels compiled for the CPU.
fn title(ptx: &Path, name: &str) -> Result<(), String> {
    let text = fs::read_to_string(ptx).map_err(|e| format!("{}: {e}", ptx.display()))?;
    fs::write(ptx, format!("// hypnos {name}\n{text}")).map_err(|e| format!("{}: {e}", ptx.display()))
}

/// The kernel files in the order of their names.
fn sources() -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(KERNELS).map_err(|e| format!("{KERNELS}: {e}"))?;
    let mut files: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "cu"));
    files.sort();
    Ok(files)
}

fn find_nvcc() -> Result<PathBuf, String> {
    if let Some(nvcc) = env::var_os("NVCC") {
        return Ok(nvcc.into());
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os)
        .map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = homes.chain(env::split_paths(&path)).chain(["/usr/local/cuda/bin".into()]);
    folders.map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file()).ok_or_else(|| {
        "the feature `cuda` needs nvcc, and none is in NVCC, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda; install the \
         CUDA toolkit, or build with `.ci/cuda build`, which brings its own"
            .into()
    })
}

/// `8.0`, `80` and nothing all mean 80.
fn compute_cap() -> Result<u32, String> {
    let text = env::var_os("CUDA_COMPUTE_CAP").unwrap_or_else(|| "80".into()).to_string_lossy().into_owned();
    let cap = text.replace('.', "").parse().ok().filter(|cap| (70..1000).contains(cap));
    cap.ok_or_else(|| format!("CUDA_COMPUTE_CAP: wanted a number such as 80 or 9.0, got {text:?}"))
}
