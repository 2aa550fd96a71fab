//! Evaluation of generated pictures against the photos by the field's standard scores (arXiv 2410.14265, section 3.5;
//! Ruiz et al. 2023, arXiv 2208.12242, sections 4.1 to 4.3).
//!
//! Two protocols with the same scores: *prompt-invariant*, pictures of one standard prompt, measures whether the
//! product is there; *prompt-varying*, a prompt for each picture, measures whether it stays recognisable elsewhere and
//! whether the prompt is followed.
//!
//! Pairs: every generated picture with every photo. For SSIM, PSNR and LPIPS, which compare pixels, the middle square
//! of the photo is brought to the picture's size; the networks get photos and pictures whole, each through its own
//! preprocessing. No pictures are drawn here.

mod prompts;
mod score;

use std::collections::BTreeMap;
use std::convert::Infallible;

use candle_core::Device;
use image::RgbImage;

pub use prompts::{ImageType, PromptLists};
pub use score::{BackboneInfo, Better, Evaluation, Fidelity, Number, Protocol, Real};

use super::bundle::{Backbones, Bundle, MetricBackbone};
use super::metrics::{self, Features};
use super::product::PLACEHOLDER;
use super::{Error, Interrupt, Result, image_io};

/// A generated picture.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The image.
    pub pixels: RgbImage,
    /// Its prompt, with [`PLACEHOLDER`] in the product's place.
    pub prompt: String,
}

/// What a model drew.
#[derive(Clone, Copy, Debug)]
pub struct GeneratedSet<'a> {
    /// The class name of the product, which stands for it in the prompts that CLIP reads.
    pub class_name: &'a str,
    /// Pictures of one standard prompt; may be empty.
    pub invariant: &'a [Generated],
    /// Pictures of a prompt each; may be empty.
    pub varying: &'a [Generated],
    /// Pictures of the class, for PRES; may be empty.
    pub class_images: &'a [RgbImage],
}

/// Scores pictures against the photos of one product.
pub struct Evaluator {
    backbones: Backbones,
    photos: Vec<RgbImage>,
    seen: Seen,
}

/// What the networks see in a set of pictures, row by row.
#[derive(Default)]
struct Seen {
    dino: Option<Features>,
    clip: Option<Features>,
    /// Inception's after its first pooling.
    pool64: Option<Features>,
    /// Inception's after its last.
    pool2048: Option<Features>,
}

/// Gets the calls done and the calls in all, and may stop.
type Observe<'a, B> = dyn FnMut(usize, usize) -> Result<(), Interrupt<B>> + 'a;

/// Counts what is done.
struct Count<'a, 'o, B> {
    done: usize,
    total: usize,
    observe: &'a mut Observe<'o, B>,
}

impl<B> Count<'_, '_, B> {
    fn one(&mut self) -> Result<(), Interrupt<B>> {
        self.done += 1;
        (self.observe)(self.done, self.total)
    }
}

impl Evaluator {
    /// An evaluator with the networks of `bundle`, which may have none. [`Error::Input`] if there are no photos or a
    /// network cannot be loaded.
    pub fn new(bundle: &Bundle, device: &Device, photos: Vec<RgbImage>) -> Result<Self> {
        if photos.is_empty() {
            return Err(Error::input("photos: wanted at least one to compare with, got none"));
        }
        let backbones = Backbones::load(bundle, device)?;
        let mut evaluator = Self { backbones, photos, seen: Seen::default() };
        let mut count = Count::<Infallible> { done: 0, total: 0, observe: &mut |_, _| Ok(()) };
        evaluator.seen = evaluator.look(evaluator.photos.iter(), &mut count)?;
        Ok(evaluator)
    }

    /// Whether it can score a trial: it needs CLIP for the prompts.
    pub fn can_score_trials(&self) -> bool {
        self.backbones.clip.is_some()
    }

    /// Whether it can score the preservation of the class (PRES).
    pub fn can_score_class(&self) -> bool {
        self.backbones.dino.is_some()
    }

    /// Similarity of pictures to the photos as a share of the photos' similarity among themselves: of DINO, or of
    /// CLIP-I where there is no DINO. NaN where there is neither.
    pub fn likeness(&self, pictures: &[RgbImage]) -> Result<f64> {
        let (theirs, ours) = match (&self.backbones.dino, &self.backbones.clip) {
            (Some(dino), _) => (dino.model.features(pictures)?, self.seen.dino.as_ref()),
            (None, Some(clip)) => (clip.model.images(pictures)?, self.seen.clip.as_ref()),
            (None, None) => return Ok(f64::NAN),
        };
        let Some(ours) = ours else { return Ok(f64::NAN) };
        // One photo can be compared with itself only.
        let bound = if self.photos.len() > 1 { metrics::mean_self_cosine(ours)? } else { 1.0 };
        Ok(metrics::mean_pairwise_cosine(&theirs, ours)? / bound)
    }

    /// Mean CLIP-T of pictures: each with its own prompt. NaN without CLIP.
    pub fn adherence(&self, class_name: &str, pictures: &[Generated]) -> Result<f64> {
        let Some(clip) = &self.backbones.clip else { return Ok(f64::NAN) };
        let pixels: Vec<RgbImage> = pictures.iter().map(|one| one.pixels.clone()).collect();
        let texts = texts(clip, class_name, pictures)?;
        metrics::mean_paired_cosine(&clip.model.images(&pixels)?, &texts)
    }

    /// All scores of what a model drew. `observe` is called after every picture that a network has seen and after every
    /// pair, and may stop. [`Error::Input`] if a score is NaN: then a network's weights are broken.
    pub fn evaluate<B>(
        &self,
        drawn: &GeneratedSet<'_>,
        observe: &mut Observe<'_, B>,
    ) -> Result<Evaluation, Interrupt<B>> {
        let total = self.n_calls(drawn);
        let mut count = Count { done: 0, total, observe };
        let mut pictures = Vec::with_capacity(drawn.invariant.len() + drawn.varying.len());
        let mut protocol = |generated: &[Generated], count: &mut Count<'_, '_, B>| {
            (!generated.is_empty())
                .then(|| self.protocol(drawn.class_name, generated, &mut pictures, count))
                .transpose()
        };
        let prompt_invariant = protocol(drawn.invariant, &mut count)?;
        let prompt_varying = protocol(drawn.varying, &mut count)?;
        Ok(Evaluation {
            n_photos: self.photos.len(),
            prompt_invariant,
            prompt_varying,
            real: self.real()?,
            pres: self.pres(drawn.class_images, &mut count)?,
            div: self.div(drawn, &mut count)?,
            pictures,
            pairing: score::PAIRING,
        })
    }

    /// How often `observe` is called.
    fn n_calls(&self, drawn: &GeneratedSet<'_>) -> usize {
        let Backbones { dino, clip, inception, lpips } = &self.backbones;
        let looks =
            usize::from(dino.is_some()) + usize::from(clip.is_some()) + usize::from(inception.is_some());
        let n_pictures = drawn.invariant.len() + drawn.varying.len();
        let n_class_images = if dino.is_some() { drawn.class_images.len() } else { 0 };
        let n_groups = if lpips.is_some() { alike(drawn).len() } else { 0 };
        n_pictures * (looks + self.photos.len()) + n_class_images + n_groups
    }

    /// Everything that the networks see in pictures, one after the other to bound memory.
    fn look<'a, B>(
        &self,
        pictures: impl Iterator<Item = &'a RgbImage>,
        count: &mut Count<'_, '_, B>,
    ) -> Result<Seen, Interrupt<B>> {
        let mut seen = Seen::default();
        let append = |to: &mut Option<Features>, found: Features| {
            to.get_or_insert_with(|| Features { values: Vec::new() }).values.extend(found.values);
        };
        for picture in pictures {
            let picture = std::slice::from_ref(picture);
            if let Some(dino) = &self.backbones.dino {
                append(&mut seen.dino, dino.model.features(picture)?);
                count.one()?;
            }
            if let Some(clip) = &self.backbones.clip {
                append(&mut seen.clip, clip.model.images(picture)?);
                count.one()?;
            }
            if let Some(inception) = &self.backbones.inception {
                let found = inception.model.features(picture)?;
                append(&mut seen.pool64, found.pool64);
                append(&mut seen.pool2048, found.pool2048);
                count.one()?;
            }
        }
        Ok(seen)
    }

    /// One protocol's numbers; each picture's own are added to `pictures`.
    fn protocol<B>(
        &self,
        class_name: &str,
        generated: &[Generated],
        pictures: &mut Vec<Fidelity>,
        count: &mut Count<'_, '_, B>,
    ) -> Result<Protocol, Interrupt<B>> {
        let (n, n_pairs) = (generated.len(), generated.len() * self.photos.len());
        let seen = self.look(generated.iter().map(|one| &one.pixels), count)?;
        let Backbones { dino, clip, inception, .. } = &self.backbones;
        let texts = clip.as_ref().map(|clip| texts(clip, class_name, generated)).transpose()?;
        let of_photos = |seen: &Option<Features>, photos: &Option<Features>| match (seen, photos) {
            (Some(seen), Some(photos)) => {
                rows(seen).map(|row| metrics::mean_pairwise_cosine(&row, photos)).collect()
            }
            _ => Ok(Vec::new()),
        };
        let by_dino = of_photos(&seen.dino, &self.seen.dino)?;
        let by_clip = of_photos(&seen.clip, &self.seen.clip)?;
        let by_text: Vec<f64> = match (&seen.clip, &texts) {
            (Some(seen), Some(texts)) => rows(seen)
                .zip(rows(texts))
                .map(|(picture, text)| metrics::mean_paired_cosine(&picture, &text))
                .collect::<Result<_>>()?,
            _ => Vec::new(),
        };
        pictures.extend((0..n).map(|i| Fidelity {
            dino: by_dino.get(i).copied(),
            clip_i: by_clip.get(i).copied(),
            clip_t: by_text.get(i).copied(),
        }));
        let cosine = |values: &[f64], n_values, backbone, part| {
            of(backbone, part, Number::cosine(mean(values), n_values, n))
        };
        let clip_t = cosine(&by_text, n, named(clip.as_ref()), "clip");
        let [ssim, psnr, lpips] = self.pixel_by_pixel(generated, count)?;
        let fid = |seen: &Option<Features>, photos: &Option<Features>| {
            self.fid(seen.as_ref(), photos.as_ref(), named(inception.as_ref()), n)
        };
        Ok(Protocol {
            n_pictures: n,
            dino: cosine(&by_dino, n_pairs, named(dino.as_ref()), "dino"),
            clip_i: cosine(&by_clip, n_pairs, named(clip.as_ref()), "clip"),
            clip_t: Number { of: "pictures", ..clip_t },
            fid_64: fid(&seen.pool64, &self.seen.pool64)?,
            fid_2048: fid(&seen.pool2048, &self.seen.pool2048)?,
            ssim,
            psnr,
            lpips,
        })
    }

    fn fid(
        &self,
        seen: Option<&Features>,
        photos: Option<&Features>,
        backbone: Option<BackboneInfo>,
        n: usize,
    ) -> Result<Number> {
        let (n_photos, number) = (self.photos.len(), |value| Number::distance(value, n, n));
        let number = |value| Number { of: "pictures", ..number(value) };
        let (Some(seen), Some(photos)) = (seen, photos) else {
            return Ok(of(backbone, "inception", number(None)));
        };
        if n < 2 || n_photos < 2 {
            let number = number(None).noted("needs 2 pictures and 2 photos at least");
            return Ok(of(backbone, "inception", number));
        }
        let found = Number { note: None, ..number(Some(metrics::frechet(seen, photos)?)) };
        let width = seen.values.first().map_or(0, Vec::len);
        let found = if n.min(n_photos) > width {
            found
        } else {
            found.noted(format!("indicative: {n} pictures and {n_photos} photos for {width} features"))
        };
        Ok(of(backbone, "inception", found))
    }

    /// SSIM, PSNR and LPIPS of every picture with every photo.
    fn pixel_by_pixel<B>(
        &self,
        generated: &[Generated],
        count: &mut Count<'_, '_, B>,
    ) -> Result<[Number; 3], Interrupt<B>> {
        let mut found = [Vec::new(), Vec::new(), Vec::new()];
        for one in generated {
            let (width, height) = one.pixels.dimensions();
            for photo in &self.photos {
                let photo = image_io::crop_to_fill(photo, width, height);
                found[0].push(metrics::ssim(&one.pixels, &photo)?);
                found[1].push(metrics::psnr(&one.pixels, &photo)?);
                if let Some(lpips) = &self.backbones.lpips {
                    found[2].push(lpips.model.distance(&one.pixels, &photo)?);
                }
                count.one()?;
            }
        }
        let (n, n_pairs) = (generated.len(), generated.len() * self.photos.len());
        let [ssim, psnr, lpips] = found;
        let psnr = match mean(&psnr) {
            Some(value) if value.is_infinite() => {
                Number::cosine(None, n_pairs, n).noted("infinite: a picture equals a photo")
            }
            value => Number::cosine(value, n_pairs, n),
        };
        Ok([
            Number::cosine(mean(&ssim), n_pairs, n),
            Number { range: [Some(0.0), None], ..psnr },
            of(named(self.backbones.lpips.as_ref()), "lpips", Number::distance(mean(&lpips), n_pairs, n)),
        ])
    }

    /// The photos against themselves.
    fn real(&self) -> Result<Real> {
        let n = self.photos.len();
        let number = |seen: &Option<Features>, backbone, part| {
            let value = seen.as_ref().filter(|_| n > 1).map(metrics::mean_self_cosine).transpose()?;
            let number = Number { note: None, ..Number::cosine(value, n * (n - 1) / 2, n) };
            let number = if n > 1 { number } else { number.noted("needs 2 photos at least") };
            Ok::<Number, Error>(of(backbone, part, number))
        };
        Ok(Real {
            dino: number(&self.seen.dino, named(self.backbones.dino.as_ref()), "dino")?,
            clip_i: number(&self.seen.clip, named(self.backbones.clip.as_ref()), "clip")?,
        })
    }

    fn pres<B>(
        &self,
        class_images: &[RgbImage],
        count: &mut Count<'_, '_, B>,
    ) -> Result<Number, Interrupt<B>> {
        let (n, mut seen) = (class_images.len(), Vec::new());
        for picture in class_images {
            if let (Some(dino), Some(photos)) = (&self.backbones.dino, &self.seen.dino) {
                let found = dino.model.features(std::slice::from_ref(picture))?;
                seen.push(metrics::mean_pairwise_cosine(&found, photos)?);
                count.one()?;
            }
        }
        let number =
            Number { better: Better::Lower, ..Number::cosine(mean(&seen), n * self.photos.len(), n) };
        let number = if n == 0 { number.noted("no pictures of the class") } else { number };
        Ok(of(named(self.backbones.dino.as_ref()), "dino", number))
    }

    fn div<B>(&self, drawn: &GeneratedSet<'_>, count: &mut Count<'_, '_, B>) -> Result<Number, Interrupt<B>> {
        let (mut sum, mut n_pairs, mut n_pictures) = (0.0, 0, 0);
        let groups = alike(drawn);
        for group in &groups {
            if let Some(lpips) = &self.backbones.lpips {
                let pairs = group.len() * (group.len() - 1) / 2;
                sum += lpips.model.mean_pairwise(group)? * pairs as f64;
                n_pairs += pairs;
                n_pictures += group.len();
                count.one()?;
            }
        }
        let value = (n_pairs > 0).then(|| sum / n_pairs as f64);
        let number = Number { better: Better::Higher, ..Number::distance(value, n_pairs, n_pictures) };
        let number = if groups.is_empty() { number.noted("no two pictures of one prompt") } else { number };
        Ok(of(named(self.backbones.lpips.as_ref()), "lpips", number))
    }
}

/// Groups of pictures of one size and one prompt, two at least in each.
fn alike(drawn: &GeneratedSet<'_>) -> Vec<Vec<RgbImage>> {
    let mut groups: BTreeMap<(&str, (u32, u32)), Vec<RgbImage>> = BTreeMap::new();
    for one in drawn.invariant.iter().chain(drawn.varying) {
        groups.entry((&one.prompt, one.pixels.dimensions())).or_default().push(one.pixels.clone());
    }
    groups.into_values().filter(|group| group.len() > 1).collect()
}

/// The prompts as CLIP reads them: with the class name for the product, since the rare token means nothing to it.
fn texts(clip: &MetricBackbone<metrics::Clip>, class_name: &str, pictures: &[Generated]) -> Result<Features> {
    let words: Vec<String> = pictures.iter().map(|one| one.prompt.replace(PLACEHOLDER, class_name)).collect();
    clip.model.texts(&words.iter().map(String::as_str).collect::<Vec<_>>())
}

/// A number with what looked, or with the part that is missing for it.
fn of(backbone: Option<BackboneInfo>, part: &str, number: Number) -> Number {
    match backbone {
        None => number.noted(format!("these models have no metrics/{part}")),
        backbone => Number { backbone, ..number },
    }
}

fn named<M>(backbone: Option<&MetricBackbone<M>>) -> Option<BackboneInfo> {
    backbone.map(|one| BackboneInfo { name: one.name.clone(), sha256: one.sha256.clone() })
}

fn rows(features: &Features) -> impl Iterator<Item = Features> {
    features.values.iter().map(|row| Features { values: vec![row.clone()] })
}

/// The mean; none of nothing.
fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}
