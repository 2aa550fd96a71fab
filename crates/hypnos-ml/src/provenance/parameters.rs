//! The text that AUTOMATIC1111's web UI writes and the field's programs read, in files of 1.9 and later:
//!
//! ```text
//! the prompt
//! Negative prompt: the negative prompt
//! Steps: 25, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7.5, Seed: 1, Size: 64x64, Model hash: …, Model: …
//! ```
//!
//! Nothing in a prompt can be escaped: no reader undoes it. So there is no text where one would take a prompt for more
//! than it is.
//! Departure: the second line is there without a negative prompt too, since ComfyUI reads nothing without it.

use std::fmt::Write;

use crate::diffusion::Schedule;
use crate::sample::{ImageRequest, SampleSettings};
use crate::samplers::Sampler;

/// What begins the second line. Some readers look for it anywhere, others at the beginning of a line.
const NEGATIVE: &str = "Negative prompt:";
/// What begins the last line. Some readers take the first line that begins with it, others the last.
const STEPS: &str = "Steps:";

/// How the model is called.
pub(super) struct Model<'a> {
    pub(super) name: String,
    pub(super) hash: Option<&'a str>,
}

/// A sampler and how its noise levels are spaced, as the web UI calls them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SamplerNames {
    sampler: &'static str,
    schedule: &'static str,
}

/// The web UI's names.
///
/// Its `Automatic` means Karras' noise levels for DPM++ 2M and evenly spaced timesteps for the others.
/// Assumption: `Uniform` is the nearest to DPM++ 2M without Karras, whatever spacing the bundle's file asks for.
pub(super) fn sampler_names(sampler: Sampler, schedule: &Schedule) -> SamplerNames {
    let (sampler, schedule) = match sampler {
        Sampler::Ddim => ("DDIM", "Automatic"),
        Sampler::Pndm => ("PLMS", "Automatic"),
        Sampler::Dpmpp2m => ("DPM++ 2M", "Uniform"),
        Sampler::Dpmpp2mKarras => ("DPM++ 2M", "Karras"),
        Sampler::Euler if schedule.config().is_set("use_karras_sigmas") => ("Euler", "Karras"),
        Sampler::Euler => ("Euler", "Automatic"),
        Sampler::EulerAncestral => ("Euler a", "Automatic"),
    };
    SamplerNames { sampler, schedule }
}

/// The text; `None` where a reader would take a prompt for more than it is.
pub(super) fn text(
    picture: &ImageRequest,
    settings: &SampleSettings,
    SamplerNames { sampler, schedule }: SamplerNames,
    model: &Model<'_>,
) -> Option<String> {
    let (prompt, negative) = (with_plain_breaks(&picture.prompt), with_plain_breaks(&picture.negative));
    if !is_safe(&prompt) || !is_safe(&negative) {
        return None;
    }
    let SampleSettings { steps, guidance, width, height, .. } = settings;
    let seed = picture.seed;
    let mut text = format!(
        "{prompt}\n{NEGATIVE} {negative}\n{STEPS} {steps}, Sampler: {sampler}, Schedule type: {schedule}, \
         CFG scale: {guidance}, Seed: {seed}, Size: {width}x{height}"
    );
    for (key, value) in [("Model hash", model.hash), ("Model", plain(&model.name))] {
        if let Some(value) = value {
            let _ = write!(text, ", {key}: {value}"); // a String takes everything
        }
    }
    Some(text)
}

/// Line breaks as PNG has them.
fn with_plain_breaks(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\r', "\n")
}

fn is_safe(prompt: &str) -> bool {
    let is_kept = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
    !prompt.contains(NEGATIVE)
        && !prompt.lines().any(|line| line.trim_start().starts_with(STEPS))
        && prompt.chars().all(is_kept)
}

/// The name of a model, if it can stand in the last line as it is. The web UI puts others in quotes, which only some
/// readers undo; the hash names the model to all of them.
fn plain(name: &str) -> Option<&str> {
    let is_plain = |c: char| !c.is_control() && !matches!(c, ',' | ':' | '"' | '{' | '}');
    (!name.is_empty() && name.chars().all(is_plain)).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> SampleSettings {
        SampleSettings { sampler: Sampler::Euler, steps: 25, guidance: 7.5, width: 512, height: 768 }
    }

    fn said(prompt: &str, negative: &str, model: &Model<'_>) -> Option<String> {
        let picture = ImageRequest { prompt: prompt.into(), negative: negative.into(), seed: 9 };
        text(&picture, &settings(), SamplerNames { sampler: "Euler", schedule: "Automatic" }, model)
    }

    #[test]
    fn what_the_form_cannot_hold_is_not_put_into_it() {
        let model = Model { name: "sd15".into(), hash: Some("0123456789") };
        for bad in [
            "a mug\nNegative prompt: blue",
            "a mug, Negative prompt: blue",
            "Steps: 3",
            "a mug\nSteps: 3, Sampler: Euler",
            "a mug\r\n  Steps: 3",
            "a mug\rSteps: 3",
            "a mug\0",
            "a mug\u{1b}[31m",
        ] {
            assert_eq!(said(bad, "", &model), None, "{bad:?}");
            assert_eq!(said("a mug", bad, &model), None, "{bad:?}");
        }
        for good in ["", "Footsteps: 3", "two Steps: up", "negative prompts", "a\r\nb", "a, b: c \"d\" {e}"] {
            let wanted = good.replace('\r', "");
            let text = said(good, good, &model).expect("a text");
            assert!(text.starts_with(&format!("{wanted}\nNegative prompt: {wanted}\nSteps: 25, ")), "{text}");
        }
    }

    #[test]
    fn a_model_is_called_by_its_name_only_if_no_reader_mistakes_it() {
        let last = |name: &str, hash| {
            let text = said("a", "", &Model { name: name.into(), hash }).expect("a text");
            text.rsplit_once("Size: 512x768").expect("a size").1.to_owned()
        };
        assert_eq!(
            last("Stable Diffusion v1.5-pruned", Some("01ab")),
            ", Model hash: 01ab, Model: Stable Diffusion v1.5-pruned"
        );
        assert_eq!(last("sd15", None), ", Model: sd15");
        for name in ["", "a, b", "a: b", "\"a\"", "{a}", "a\nb"] {
            assert_eq!(last(name, Some("01ab")), ", Model hash: 01ab", "{name:?}");
        }
    }
}
