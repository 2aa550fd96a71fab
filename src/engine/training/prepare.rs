//! Prepares training data: finds the product in each photo, makes views of it, encodes them.

use std::sync::Arc;

use image::RgbImage;

use super::session::{Halt, Session, thumbnail};
use crate::engine::api::Shown;
use crate::job::{Fault, FaultCode, Phase};
use crate::ml::image_io;
use crate::ml::segment::segment;
use crate::ml::train::{Instance, TrainingData};
use crate::ml::views::{self, Cut, View};
use crate::report::MaskQuality;

/// The photos, whole.
pub(super) fn photos(session: &mut Session<'_, '_>) -> Result<Vec<RgbImage>, Halt> {
    let side = session.base.bundle.resolution();
    let mut photos = Vec::new();
    for (i, png) in session.input.photos.iter().enumerate() {
        let photo = image_io::read_png(png)
            .map_err(|error| Fault::new(FaultCode::Input, format!("photo {}: {error}", i + 1)))?;
        let (width, height) = photo.dimensions();
        if (width.min(height) as usize) < side {
            session.plan.warnings.push(format!(
                "photo {}: has {width} x {height} pixels and was enlarged to the model's {side} x {side}",
                i + 1
            ));
        }
        session.gallery.photos.push(thumbnail(&photo, "")?);
        photos.push(photo);
    }
    if photos.is_empty() {
        return Err(Fault::new(FaultCode::Input, "photos: wanted at least one, got none").into());
    }
    Ok(photos)
}

/// What is learned from, but for the class images: views where the recipe wants them, else the photos as they are.
pub(super) fn instances(session: &mut Session<'_, '_>, photos: &[RgbImage]) -> Result<TrainingData, Halt> {
    if session.plan.recipe.views.is_some() { of_views(session, photos) } else { of_photos(session, photos) }
}

/// The middle of each photo, learned from as it is.
fn of_photos(session: &mut Session<'_, '_>, photos: &[RgbImage]) -> Result<TrainingData, Halt> {
    let (side, prompt) = (session.base.bundle.resolution(), session.plan.recipe.photo_prompt());
    let mut instances = Vec::with_capacity(photos.len());
    for photo in photos {
        session.progress(session.at(Phase::Preparing, instances.len(), photos.len()), None)?;
        let pixels = image_io::center_square(photo, side);
        instances.push(Instance { moments: session.encode(&pixels)?, prompt: prompt.clone(), pixels });
    }
    Ok(TrainingData { instances, ..TrainingData::default() })
}

/// The product found in each photo, and views of it.
fn of_views(session: &mut Session<'_, '_>, photos: &[RgbImage]) -> Result<TrainingData, Halt> {
    let recipe = session.plan.recipe.clone();
    let Some(settings) = &recipe.views else { return Ok(TrainingData::default()) };
    let total = photos.len() + settings.n;
    let cuts = cuts(session, photos, settings.margin, total)?;
    let mut data = TrainingData::default();
    for i in 0..settings.n {
        session.progress(session.at(Phase::Refining, photos.len() + i, total), None)?;
        let View { pixels, colour, removed, negated, .. } = views::view(&cuts, settings, recipe.seed, i);
        let prompt = recipe.view_prompt(colour.unwrap_or(&settings.background_token));
        session.show(Shown::View(i), &pixels, &prompt, recipe.seed)?;
        if recipe.has_discriminator() {
            data.negatives.extend([session.encode(&removed)?, session.encode(&negated)?]);
        }
        data.instances.push(Instance { moments: session.encode(&pixels)?, prompt, pixels });
    }
    Ok(data)
}

/// Each photo cut around the product.
fn cuts(
    session: &mut Session<'_, '_>,
    photos: &[RgbImage],
    margin: f64,
    total: usize,
) -> Result<Vec<Cut>, Halt> {
    let base = Arc::clone(&session.base);
    let (side, seed) = (base.bundle.resolution(), session.plan.recipe.seed);
    let segmenter = base.bundle.segmenter(base.device())?;
    let mut cuts = Vec::with_capacity(photos.len());
    for (i, photo) in photos.iter().enumerate() {
        session.progress(session.at(Phase::Refining, i, total), None)?;
        let (mask, stats) = segment(&segmenter, photo, base.device())?.cleaned();
        let name = format!("photo {}", i + 1);
        if let Some(refusal) = stats.refusal() {
            return Err(Fault::new(FaultCode::Input, format!("{name}: {refusal}")).into());
        }
        let warnings = stats.warnings();
        session.plan.warnings.extend(warnings.iter().map(|warning| format!("{name}: {warning}")));
        session.plan.masks.push(MaskQuality::from(&stats));
        session.show(Shown::Mask(i), &mask.picture(), "", seed)?;
        cuts.push(Cut::new(photo, mask.values(), side, margin)?);
    }
    Ok(cuts)
}
