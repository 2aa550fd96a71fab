//! Object keys: identifiers, numbers and fixed names, never a client's text.
//!
//! ```text
//! t/{tenant}/j/{job}/photos/{n}.png                             uploaded photos, decoded and encoded again
//! t/{tenant}/j/{job}/a/{run_lease}/{name}                       artifacts of one claim; no other claim writes there
//! t/{tenant}/class/{settings}/{seed}-{job}-{run_lease}.png      class images, shared by the tenant's trainings; each
//!                                                               was drawn by that claim of that job
//! t/{tenant}/class/{settings}/{seed}.png                        the same, of earlier versions
//! ```

use std::fmt;

use crate::job::{Format, JobId, Lease, Object, TenantId};

/// Longest name within a job, and longest `settings`.
const NAME_CHARS_MAX: usize = 64;

/// The key of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

/// Names of the artifacts that a claim may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    /// The fine-tuned weights: `weights.safetensors`.
    Weights,
    /// The weights of the last step, if those of another are served: `weights-last.safetensors`.
    LastWeights,
    /// The report: `report.json`.
    Report,
    /// The report as a page: `report.html`.
    Page,
    /// A training's state after that many steps: `checkpoint-{step}.safetensors`.
    Checkpoint(u64),
    /// An image of the result, by its index: `image-{n}.png`.
    Image(usize, Format),
    /// A preview drawn during the training, by its step: `preview-{step}.png`.
    Preview(u64, Format),
    /// The mask of the product in a photo, by the photo's index: `mask-{n}.png`.
    Mask(usize, Format),
    /// The discriminator's attention, by the photo's index: `attention-{n}.png`.
    Attention(usize, Format),
    /// A view that is learned from, by its index: `view-{n}.png`.
    View(usize, Format),
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Weights => f.write_str("weights.safetensors"),
            Self::LastWeights => f.write_str("weights-last.safetensors"),
            Self::Report => f.write_str("report.json"),
            Self::Page => f.write_str("report.html"),
            Self::Checkpoint(step) => write!(f, "checkpoint-{step}.safetensors"),
            Self::Image(n, format) => write!(f, "image-{n}.{}", format.extension()),
            Self::Preview(step, format) => write!(f, "preview-{step}.{}", format.extension()),
            Self::Mask(n, format) => write!(f, "mask-{n}.{}", format.extension()),
            Self::Attention(n, format) => write!(f, "attention-{n}.{}", format.extension()),
            Self::View(n, format) => write!(f, "view-{n}.{}", format.extension()),
        }
    }
}

impl Key {
    /// The `n`th photo of a training, from 0.
    pub fn photo(tenant: TenantId, job: JobId, n: usize) -> Self {
        Self(format!("t/{tenant}/j/{job}/photos/{n}.png"))
    }

    /// An artifact that the holder of `lease` writes.
    pub fn artifact(tenant: TenantId, lease: Lease, name: Name) -> Self {
        Self(format!("t/{tenant}/j/{}/a/{}/{name}", lease.job, lease.run_lease))
    }

    /// The class image of `seed` with `settings`, the hash from [`crate::engine::ClassImages`], as drawn by the holder
    /// of `lease`: different kinds of devices draw the same image in different bytes.
    ///
    /// Panics if `settings` is not 1 to 64 ASCII letters and digits: that would be a bug in the engine.
    pub fn class_image(tenant: TenantId, settings: &str, seed: u64, lease: Lease) -> Self {
        assert!(is_settings(settings), "settings are a hash in hexadecimal");
        let Lease { job, run_lease } = lease;
        Self(format!("t/{tenant}/class/{settings}/{seed}-{job}-{run_lease}.png"))
    }

    /// Parses a key that one of the constructors made; nothing else is a key.
    pub fn parse(text: &str) -> Option<Self> {
        let parts: Vec<_> = text.split('/').collect();
        let known = match parts[..] {
            ["t", tenant, "j", job, "photos", photo] => {
                is_id(tenant) && is_id(job) && photo.strip_suffix(".png").is_some_and(is_number)
            }
            ["t", tenant, "j", job, "a", lease, name] => {
                is_id(tenant) && is_id(job) && is_number(lease) && is_name(name)
            }
            ["t", tenant, "class", settings, image] => {
                is_id(tenant)
                    && is_settings(settings)
                    && image.strip_suffix(".png").is_some_and(is_class_image)
            }
            _ => false,
        };
        known.then(|| Self(text.to_owned()))
    }

    /// The key as rows keep it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The object's name within its job: the last part of its key, but `photo-0.png` for a photo.
    pub fn name(&self) -> String {
        let (place, last) = self.0.rsplit_once('/').unwrap_or(("", &self.0));
        if place.ends_with("/photos") { format!("photo-{last}") } else { last.to_owned() }
    }

    /// The media type, by the extension.
    pub fn content_type(&self) -> &'static str {
        match self.0.rsplit_once('.') {
            Some((_, "png")) => Format::Png.content_type(),
            Some((_, "jpg")) => Format::Jpeg.content_type(),
            Some((_, "webp")) => Format::Webp.content_type(),
            Some((_, "json")) => "application/json",
            Some((_, "html")) => "text/html; charset=utf-8",
            _ => "application/octet-stream",
        }
    }

    /// The tenant, the job, and the claim that wrote the object; no claim for a photo. `None` for a class image, which
    /// belongs to no job.
    pub fn owner(&self) -> Option<(TenantId, JobId, Option<i64>)> {
        let parts: Vec<_> = self.0.split('/').collect();
        let id = |at: usize| parts.get(at).copied();
        if id(2) != Some("j") {
            return None;
        }
        let lease = if id(4) == Some("a") { id(5)?.parse().ok() } else { None };
        Some((id(1)?.parse().ok()?, id(3)?.parse().ok()?, lease))
    }

    /// The object with this key.
    pub(super) fn object(&self, size: u64, sha256: String) -> Object {
        Object {
            name: self.name(),
            key: self.as_str().into(),
            size,
            sha256,
            content_type: self.content_type().into(),
            meta: serde_json::Value::Null,
        }
    }

    /// The tenant and the settings of a class image; `None` for an object of a job.
    pub fn class_image_of(&self) -> Option<(TenantId, &str)> {
        let mut parts = self.0.split('/').skip(1);
        let tenant = parts.next()?.parse().ok()?;
        if parts.next()? == "class" { Some((tenant, parts.next()?)) } else { None }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A prefix: all objects of one owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope(String);

impl Scope {
    /// All objects of a tenant.
    pub fn tenant(tenant: TenantId) -> Self {
        Self(format!("t/{tenant}"))
    }

    /// All objects of a job.
    pub fn job(tenant: TenantId, job: JobId) -> Self {
        Self(format!("t/{tenant}/j/{job}"))
    }

    /// All objects that the holder of one lease wrote.
    pub fn attempt(tenant: TenantId, lease: Lease) -> Self {
        Self(format!("t/{tenant}/j/{}/a/{}", lease.job, lease.run_lease))
    }

    /// All class images of a tenant.
    pub fn class_images(tenant: TenantId) -> Self {
        Self(format!("t/{tenant}/class"))
    }

    /// All objects.
    pub fn all() -> Self {
        Self("t".into())
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_id(text: &str) -> bool {
    text.parse::<JobId>().is_ok()
}

/// A number without sign and leading zeros.
fn is_number(text: &str) -> bool {
    text.parse::<u64>().is_ok_and(|number| number.to_string() == text)
}

/// A class image's seed and the claim that drew it, or the seed alone.
fn is_class_image(text: &str) -> bool {
    let Some((seed, claim)) = text.split_once('-') else { return is_number(text) };
    is_number(seed) && claim.rsplit_once('-').is_some_and(|(job, lease)| is_id(job) && is_number(lease))
}

fn is_settings(text: &str) -> bool {
    (1..=NAME_CHARS_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    text.len() <= NAME_CHARS_MAX
        && text.bytes().all(plain)
        && text.as_bytes().first().is_some_and(|&b| b != b'.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_says_whose_it_is_and_reads_back() {
        let (tenant, job) = (TenantId::new(), JobId::new());
        let lease = Lease { job, run_lease: 7 };
        let weights = Key::artifact(tenant, lease, Name::Weights);
        let photo = Key::photo(tenant, job, 2);
        let class = Key::class_image(tenant, "00ff", 3, lease);
        let older = Key::parse(&format!("t/{tenant}/class/00ff/3.png")).unwrap();
        for key in [&weights, &photo, &class, &older] {
            assert_eq!(Key::parse(key.as_str()).as_ref(), Some(key));
        }
        for key in [&class, &older] {
            assert_eq!(key.class_image_of(), Some((tenant, "00ff")));
        }
        assert_eq!((weights.class_image_of(), photo.class_image_of()), (None, None));
        assert_eq!(weights.owner(), Some((tenant, job, Some(7))));
        assert_eq!(photo.owner(), Some((tenant, job, None)));
        assert_eq!(class.owner(), None);
        assert_eq!(photo.name(), "photo-2.png");
        assert_eq!(weights.content_type(), "application/octet-stream");
        assert_eq!(Key::artifact(tenant, lease, Name::Image(0, Format::Jpeg)).content_type(), "image/jpeg");
    }

    #[test]
    fn nothing_else_is_a_key() {
        let (tenant, job) = (TenantId::new(), JobId::new());
        let good = format!("t/{tenant}/j/{job}/photos/0.png");
        let bad = [
            String::new(),
            format!("/{good}"),
            format!("{good}/"),
            good.replace("photos", "photos/.."),
            good.replace("0.png", "00.png"),
            good.replace("0.png", "+1.png"),
            good.replace("0.png", "%30.png"),
            good.replace('t', "T"),
            good.to_uppercase(),
            format!("t/{tenant}/j/{job}/a/1/../../../../x"),
            format!("t/{tenant}/j/{job}/a/1/.."),
            format!("t/{tenant}/j/{job}/a/-1/weights.safetensors"),
            format!("t/{tenant}/j/{job}/a/1/Weights"),
            format!("t/{tenant}/j/{job}/a/1/weights#1"),
            format!("t/{tenant}/class//0.png"),
            format!("t/{tenant}/class/../0.png"),
            format!("t/{tenant}/class/a/0-{job}.png"),
            format!("t/{tenant}/class/a/0-{job}-01.png"),
            format!("t/{tenant}/class/a/-{job}-1.png"),
            format!("t/{tenant}/class/a/0-x-1.png"),
            format!("t/{}/class/a/0.png", tenant.0.simple()),
        ];
        for text in bad {
            assert_eq!(Key::parse(&text), None, "{text}");
        }
    }
}
