//! Writes a directory that diffusers loads: the bundle's, with the trained parts in place of its own.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::fine_tune::{FineTune, PARTS};
use super::format::Precision;
use crate::Result;
use crate::bundle::{
    Bundle, Manifest, Origin, copy, hash_file, make_directory, model_index, plain_name, read_json,
    weight_file, write_json,
};
use crate::tensorfile::{save_streaming, torch_metadata};

const INDEX: &str = "model_index.json";

/// Writes the directory `out`, which is not there yet. `hypnos.json` makes it a bundle: where each file comes from, and
/// what to call the product.
///
/// A part of which nothing was learned is the bundle's own file, byte for byte, whatever `precision` is.
pub(super) fn write(fine_tune: &FineTune<'_>, precision: Precision, out: &Path) -> Result<()> {
    make_directory(out, |dir| fill(fine_tune, precision, dir))
}

fn fill(fine_tune: &FineTune<'_>, precision: Precision, out: &Path) -> Result<()> {
    let bundle = fine_tune.bundle;
    // 1. What stays as it is. Weights get plain names: those of a variant are not looked for unless it is asked for.
    let (mut copied, mut made) = (bundle.small_files(), Vec::new());
    copied.retain(|path| path != Path::new(INDEX));
    for path in &copied {
        copy(&bundle.dir().join(path), &out.join(path))?;
    }
    for part in PARTS.into_iter().filter(|part| !fine_tune.changed(part)) {
        fine_tune.check_values(part)?;
        for (i, path) in bundle.weight_files(part)?.into_iter().enumerate() {
            let to = if i == 0 { Path::new(part).join(plain_name(part, &path)) } else { path.clone() };
            copy(&bundle.dir().join(&path), &out.join(&to))?;
            copied.push(to);
        }
    }
    // 2. What was learned.
    for part in PARTS.into_iter().filter(|part| fine_tune.changed(part)) {
        let file = format!("{part}/{}", weight_file(part));
        save_streaming(
            &out.join(&file),
            &fine_tune.parts[part].shapes,
            &torch_metadata(),
            precision.dtype(),
            |name| fine_tune.tensor(part, name),
        )?;
        made.push(file);
    }
    typed(&out.join("text_encoder/config.json"), precision)?;
    // 3. What it is. This comes last: a directory without it is no bundle.
    write_json(&out.join(INDEX), &index(bundle)?)?;
    made.push(INDEX.to_owned());
    let copied = copied.iter().map(|path| path.to_string_lossy().into_owned()).collect();
    write_json(&out.join("hypnos.json"), &json!(manifest(fine_tune, copied, made, out)?))
}

/// A config that names the type of its weights has to name the right one: transformers would round them to the other.
fn typed(config: &Path, precision: Precision) -> Result<()> {
    let mut value = read_json(config)?;
    let mut changed = false;
    for key in ["dtype", "torch_dtype"] {
        if let Some(word) = value.get_mut(key).filter(|word| **word != precision.word()) {
            *word = precision.word().into();
            changed = true;
        }
    }
    if changed { write_json(config, &value) } else { Ok(()) }
}

/// `model_index.json`: as the bundle has it, without parts that are not here, such as a safety checker.
fn index(bundle: &Bundle) -> Result<Value> {
    let class = bundle.schedule().config().class_name.as_deref().unwrap_or("PNDMScheduler");
    let mut index = model_index(class);
    let path = bundle.dir().join(INDEX);
    let theirs = if path.exists() { read_json(&path)? } else { json!({}) };
    for (key, value) in index.as_object_mut().into_iter().flatten() {
        let of_a_class = |own: &&Value| own.is_string() || own[1].is_string() && !value[1].is_null();
        if let Some(own) = theirs.get(key).filter(of_a_class) {
            *value = own.clone();
        }
    }
    Ok(index)
}

/// `hypnos.json`: whose files these are. One that is the bundle's to the bit comes from where that came from, if that
/// is known.
fn manifest(
    fine_tune: &FineTune<'_>,
    copied: Vec<String>,
    made: Vec<String>,
    out: &Path,
) -> Result<Manifest> {
    let (bundle, product) = (fine_tune.bundle, &fine_tune.product);
    let theirs = bundle.manifest();
    let known = copied.into_iter().filter(|path| theirs.files.contains_key(path));
    let mut files = BTreeMap::new();
    for path in known.chain(made) {
        let (sha256, before) = (hash_file(&out.join(&path))?, theirs.files.get(&path));
        let part = path.split('/').next().unwrap_or_default();
        let licence = before.map(|before| before.licence.as_str()).or(fine_tune.licence_of(part));
        let origin = match before.filter(|before| before.sha256 == sha256) {
            Some(before) => before.clone(),
            None => Origin {
                source: format!("fine-tuned from {} by hypnos", fine_tune.bundle_name()),
                revision: bundle.hash()?.to_owned(),
                sha256,
                licence: licence.unwrap_or("NOASSERTION").to_owned(), // what SPDX says where nothing is known
                converted_from: Vec::new(),
            },
        };
        files.insert(path, origin);
    }
    let rare_tokens = theirs.rare_tokens.iter().filter(|token| **token != product.token).cloned().collect();
    Ok(Manifest {
        name: fine_tune.title(),
        rare_tokens,
        product: Some(product.clone()),
        files,
        ..theirs.clone()
    })
}
