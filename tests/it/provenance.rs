//! What a picture's file says of how it was drawn: in every format, to programs of the field.
//!
//! The golden is what such programs read in the files that are made here. `HYPNOS_PICTURES=DIR` leaves the files in a
//! directory, where `tests/golden/readers.py` reads them.

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use hypnos::job::Format;
use hypnos::ml::bundle::Bundle;
use hypnos::ml::image_io;
use hypnos::ml::precision::Precision;
use hypnos::ml::provenance::{FineTune, Provenance};
use hypnos::ml::sample::{ImageRequest, SampleSettings};
use hypnos::ml::samplers::Sampler;
use image::{ImageDecoder, ImageReader};
use serde::Deserialize;
use serde_json::Value;

use crate::bundles::copy;

const SIZE: (usize, usize) = (43, 24);
const FORMATS: [(Format, &str); 3] = [(Format::Png, "png"), (Format::Jpeg, "jpg"), (Format::Webp, "webp")];
const WEIGHTS: &str = "a0123456789bcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const JOB: &str = "0196f8a0-0000-7000-8000-000000000001";

/// The texts of a PNG, by their keywords.
pub(crate) fn png_texts(png: &[u8]) -> BTreeMap<String, String> {
    let reader = png::Decoder::new(Cursor::new(png)).read_info().expect("a PNG");
    let info = reader.info();
    let plain = info.uncompressed_latin1_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.text.clone()));
    let others =
        info.utf8_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.get_text().expect("a text")));
    plain.chain(others).collect()
}

/// What a file says of how it was drawn, by its XMP packet, which is to name the source type.
pub(crate) fn drawn_json(file: &[u8], format: Format) -> Value {
    let xmp = String::from_utf8(metadata(file, format).xmp).expect("UTF-8");
    let element = |name: &str| {
        let (_, rest) = xmp.split_once(&format!("<{name}>")).expect("the element");
        rest.split_once('<').expect("its end").0.to_owned()
    };
    let source = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia";
    assert_eq!(element("Iptc4xmpExt:DigitalSourceType"), source);
    let json = element("hypnos:drawn").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
    serde_json::from_str(&json).expect("JSON")
}

struct Metadata {
    exif: Option<Vec<u8>>,
    xmp: Vec<u8>,
    pixels: Vec<u8>,
}

/// What the image crate finds in a file.
fn metadata(file: &[u8], format: Format) -> Metadata {
    let mut reader = ImageReader::new(Cursor::new(file)).with_guessed_format().expect("bytes");
    reader.no_limits();
    assert_eq!(reader.format().expect("a picture").to_mime_type(), format.content_type());
    let mut decoder = reader.into_decoder().expect("a picture");
    let (exif, xmp) = (decoder.exif_metadata().expect("EXIF"), decoder.xmp_metadata().expect("XMP"));
    let pixels = image::DynamicImage::from_decoder(decoder).expect("pixels").into_rgb8().into_raw();
    Metadata { exif, xmp: xmp.expect("a packet"), pixels }
}

/// One picture to describe.
#[derive(Clone)]
struct Case {
    name: &'static str,
    bundle: &'static str,
    prompt: &'static str,
    negative: &'static str,
    sampler: Sampler,
    guidance: f64,
    finetune: Option<FineTune<'static>>,
}

fn cases() -> Vec<Case> {
    let usual = Case {
        name: "usual",
        bundle: "miniature",
        prompt: "a photo of sks mug, blue background",
        negative: "blurry, low quality",
        sampler: Sampler::EulerAncestral,
        guidance: 7.5,
        finetune: Some(FineTune { weights_sha256: Some(WEIGHTS), job: Some(JOB) }),
    };
    let unnamed = Some(FineTune { weights_sha256: None, job: Some(JOB) });
    let by_file = Some(FineTune { weights_sha256: Some(WEIGHTS), job: None });
    vec![
        usual.clone(),
        Case { name: "karras", negative: "", sampler: Sampler::Dpmpp2mKarras, guidance: 4.0, ..usual },
        Case { name: "dpmpp", sampler: Sampler::Dpmpp2m, finetune: None, ..usual },
        Case { name: "pndm", sampler: Sampler::Pndm, finetune: unnamed, ..usual },
        Case { name: "ddim", sampler: Sampler::Ddim, finetune: by_file, ..usual },
        Case { name: "euler", prompt: "", sampler: Sampler::Euler, ..usual },
        Case {
            name: "wide", prompt: "陶瓷杯 ☕ 😀, crème brûlée", negative: "размыто", ..usual
        },
        Case { name: "lines", prompt: "a mug\r\non a table,\n\nSteps of wood: 3", ..usual },
        Case { name: "xml", prompt: "a <mug> & \"cup\" ]]> {1}: \\", ..usual },
        Case { name: "a_negative_in_the_prompt", prompt: "a mug\nNegative prompt: red", ..usual },
        Case { name: "steps_in_the_negative", negative: "red\nSteps: 3, Sampler: Euler, Seed: 1", ..usual },
        Case { name: "a_name_with_commas", bundle: "mug, \"red\": 5", ..usual },
    ]
}

impl Case {
    fn request(&self) -> ImageRequest {
        ImageRequest { prompt: self.prompt.into(), negative: self.negative.into(), seed: 1234 }
    }

    fn provenance(&self, dir: &Path) -> Provenance {
        let (width, height) = SIZE;
        let settings =
            SampleSettings { sampler: self.sampler, steps: 25, guidance: self.guidance, width, height };
        let bundle = Bundle::open(&bundle_called(self.bundle, dir)).expect("a bundle");
        let (request, f32) = (self.request(), Precision::F32);
        Provenance::new(&request, &settings, &bundle, self.finetune, false, f32).expect("a provenance")
    }
}

/// The miniature of the tests under a name.
fn bundle_called(name: &str, dir: &Path) -> PathBuf {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/bundle");
    if name == "miniature" {
        return own;
    }
    let renamed = dir.join("renamed");
    copy(&own, &renamed);
    let manifest = renamed.join("hypnos.json");
    let mut said: Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    said["name"] = name.into();
    fs::write(manifest, said.to_string()).unwrap();
    renamed
}

/// The same gradient in every picture.
fn pixels() -> Vec<u8> {
    let (width, height) = SIZE;
    (0..width * height).flat_map(|i| [(i % width * 5) as u8, (i / width * 10) as u8, 90]).collect()
}

/// The file of a picture, and the same picture's that says nothing.
fn files(provenance: &Provenance, format: Format) -> (Vec<u8>, Vec<u8>) {
    let pixels = pixels();
    match format {
        Format::Png => {
            let png = |texts: &[_]| image_io::png(&pixels, SIZE, texts).unwrap();
            (png(&provenance.texts()), png(&[]))
        }
        Format::Jpeg => {
            let bare = image_io::jpeg(&pixels, SIZE).unwrap();
            (provenance.in_jpeg(&bare), bare)
        }
        Format::Webp => {
            let bare = image_io::webp(&pixels, SIZE).unwrap();
            (provenance.in_webp(&bare, SIZE), bare)
        }
    }
}

/// A line of the golden: what other programs read in one file.
#[derive(Debug, Deserialize)]
struct Read {
    case: String,
    format: String,
    size: (usize, usize),
    /// The texts of a PNG, by Pillow.
    texts: BTreeMap<String, String>,
    /// In hexadecimal.
    exif: Option<String>,
    xmp: String,
    /// By an XML parser.
    source_type: String,
    drawn: Value,
    /// By piexif, as AUTOMATIC1111's web UI reads it.
    user_comment: Option<String>,
    sd_parsers: Option<Reading>,
    sd_prompt_reader: Option<Reading>,
}

#[derive(Debug, Deserialize, PartialEq)]
struct Reading {
    prompt: String,
    negative: String,
    sampler: String,
    steps: String,
    guidance: String,
    seed: String,
    model: Option<String>,
    /// Not of sd-prompt-reader.
    schedule: Option<String>,
    model_hash: Option<String>,
    /// Of a PNG's parameters.
    size: Option<String>,
}

/// What the golden's programs read, and the version that had written it.
fn golden() -> (String, Vec<Read>) {
    let text = fs::read_to_string(crate::golden::path("provenance.jsonl")).expect("the golden is committed");
    let (head, rows) = text.split_once('\n').expect("lines");
    let head: Value = serde_json::from_str(head).expect("versions");
    let rows = rows.lines().map(|row| serde_json::from_str(row).expect("a file")).collect();
    (head["hypnos"].as_str().expect("a version").to_owned(), rows)
}

#[test]
fn other_programs_read_in_every_format_what_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let kept = std::env::var_os("HYPNOS_PICTURES").map(PathBuf::from);
    let mut made = BTreeMap::new();
    for case in cases() {
        let provenance = case.provenance(dir.path());
        for (format, extension) in FORMATS {
            let (file, bare) = files(&provenance, format);
            assert_eq!(file, files(&provenance, format).0, "the same request, the same bytes");
            if let Some(kept) = &kept {
                fs::write(kept.join(format!("{}.{extension}", case.name)), &file).unwrap();
                fs::write(kept.join(format!("bare.{extension}")), &bare).unwrap();
            }
            made.insert((case.name.to_owned(), extension.to_owned()), (case.clone(), format, file, bare));
        }
    }
    let (version, rows) = golden();
    assert_eq!(rows.len(), made.len());
    for row in rows {
        let (case, format, file, bare) = &made[&(row.case.clone(), row.format.clone())];
        let ours = format!("\"hypnos\":\"{}\"", env!("CARGO_PKG_VERSION"));
        let now = |text: &str| text.replace(&format!("\"hypnos\":\"{version}\""), &ours);
        assert_is_what_they_read(&row, *format, file, bare, now);
        assert_was_understood(&row, case);
    }
}

/// The file has, to the byte, what the golden's programs were given, and the pixels of the one that says nothing.
fn assert_is_what_they_read(
    row: &Read,
    format: Format,
    file: &[u8],
    bare: &[u8],
    now: impl Fn(&str) -> String,
) {
    let found = metadata(file, format);
    let hex = |bytes: &[u8]| {
        bytes.iter().flat_map(|byte| format!("{byte:02x}").into_bytes()).map(char::from).collect::<String>()
    };
    assert_eq!(String::from_utf8(found.xmp).unwrap(), now(&row.xmp), "{row:?}");
    assert_eq!(found.exif.as_deref().map(hex), row.exif, "{row:?}");
    if format == Format::Png {
        let wanted: BTreeMap<_, _> = row.texts.iter().map(|(key, text)| (key.clone(), now(text))).collect();
        assert_eq!(png_texts(file), wanted);
    }
    let silent = image::load_from_memory(bare).unwrap().into_rgb8().into_raw();
    assert!(found.pixels == silent, "{row:?}: other pixels");
    assert_eq!(row.size, SIZE);
}

/// What programs read is what was asked for, or they were given nothing to misunderstand.
fn assert_was_understood(row: &Read, case: &Case) {
    let source = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia";
    assert_eq!(row.source_type, source);
    let (job, weights) =
        case.finetune.map_or((None, None), |finetune| (finetune.job, finetune.weights_sha256));
    for said in
        [Some(&row.drawn), row.texts.get("hypnos").map(|text| serde_json::from_str(text).unwrap()).as_ref()]
            .into_iter()
            .flatten()
    {
        assert_eq!((&said["prompt"], &said["negative"]), (&case.prompt.into(), &case.negative.into()));
        assert_eq!((&said["bundle"], &said["seed"]), (&case.bundle.into(), &1234.into()));
        assert_eq!((said["job"].as_str(), said["weights_sha256"].as_str()), (job, weights));
    }
    if ["a_negative_in_the_prompt", "steps_in_the_negative"].contains(&case.name) {
        assert!(row.exif.is_none() && row.user_comment.is_none() && !row.texts.contains_key("parameters"));
        assert!(row.sd_parsers.is_none() && row.sd_prompt_reader.is_none());
        return;
    }
    let comment = row.user_comment.as_ref().or(row.texts.get("parameters")).expect("parameters");
    let (sampler, schedule) = match case.sampler {
        Sampler::Ddim => ("DDIM", "Automatic"),
        Sampler::Pndm => ("PLMS", "Automatic"),
        Sampler::Dpmpp2m => ("DPM++ 2M", "Uniform"),
        Sampler::Dpmpp2mKarras => ("DPM++ 2M", "Karras"),
        Sampler::Euler => ("Euler", "Automatic"),
        Sampler::EulerAncestral => ("Euler a", "Automatic"),
    };
    let bundle_hash = row.drawn["bundle_sha256"].as_str().unwrap();
    let hash = if case.finetune.is_some() { weights } else { Some(bundle_hash) };
    let name = [Some(case.bundle), job].into_iter().flatten().collect::<Vec<_>>().join("-");
    let wanted = Reading {
        prompt: case.prompt.replace('\r', ""),
        negative: case.negative.into(),
        sampler: sampler.into(),
        steps: "25".into(),
        guidance: case.guidance.to_string(),
        seed: "1234".into(),
        model: (!case.bundle.contains(',')).then_some(name),
        schedule: Some(schedule.into()),
        model_hash: hash.map(|hash| hash[..10].to_owned()),
        size: Some(format!("{}x{}", SIZE.0, SIZE.1)),
    };
    assert!(
        comment.starts_with(&format!("{}\nNegative prompt: {}\nSteps: 25, ", wanted.prompt, wanted.negative))
    );
    assert_eq!(row.sd_parsers.as_ref(), Some(&wanted), "sd-parsers");
    let without = Reading { schedule: None, model_hash: None, ..wanted };
    assert_eq!(row.sd_prompt_reader.as_ref(), Some(&without), "sd-prompt-reader");
}

#[test]
fn prompts_too_long_for_a_segment_of_a_jpeg_leave_the_source_type() {
    let dir = tempfile::tempdir().unwrap();
    let long: &'static str = "long ".repeat(14_000).leak();
    for (prompt, has_exif, has_json) in
        [(&long[..32_000], true, true), (&long[..40_000], false, true), (long, false, false)]
    {
        let case = Case { prompt, ..cases().remove(0) };
        let provenance = case.provenance(dir.path());
        let (file, bare) = files(&provenance, Format::Jpeg);
        let found = metadata(&file, Format::Jpeg);
        let xmp = String::from_utf8(found.xmp).unwrap();
        assert_eq!((found.exif.is_some(), xmp.contains("<hypnos:drawn>")), (has_exif, has_json));
        assert!(xmp.contains("trainedAlgorithmicMedia"));
        assert!(found.pixels == image::load_from_memory(&bare).unwrap().into_rgb8().into_raw());
        for format in [Format::Png, Format::Webp] {
            assert_eq!(drawn_json(&files(&provenance, format).0, format)["prompt"], prompt);
        }
    }
}

/// PNG's own rule for texts: tEXt for what is short and Latin, iTXt for the rest.
#[test]
fn a_png_has_long_and_non_latin_texts_in_itxt() {
    let chunks = |text: &str| {
        let png = image_io::png(&pixels(), SIZE, &[("parameters", text.to_owned())]).unwrap();
        let reader = png::Decoder::new(Cursor::new(&png)).read_info().unwrap();
        let counted = (reader.info().uncompressed_latin1_text.len(), reader.info().utf8_text.len());
        assert_eq!(png_texts(&png)["parameters"], text);
        counted
    };
    assert_eq!(chunks("a mug"), (1, 0));
    assert_eq!(chunks("crème"), (0, 1));
    assert_eq!(chunks("陶瓷杯"), (0, 1));
    assert_eq!(chunks(&"long ".repeat(300)), (0, 1));
}
