//! Draws the class images that are missing, and encodes all of them.

use std::sync::Arc;

use super::plan::CLASS_IMAGE_STEPS;
use super::session::{Halt, Session};
use crate::engine::api::TrainEvent;
use crate::job::{Fault, FaultCode, Phase};
use crate::ml::image_io;
use crate::ml::models::vae::Moments;
use crate::ml::sample::ImageRequest;

/// Class images drawn at once. Part of what a seed means: the size of a batch orders sums.
pub(super) const CLASS_IMAGE_BATCH: usize = 4;

/// Those that came and those that are drawn now, encoded. All pass through the 8-bit images that are kept: a training
/// that finds them drawn learns from the same pixels as the one that drew them.
pub(super) fn class_images(session: &mut Session<'_, '_>) -> Result<Vec<Moments>, Halt> {
    let seeds = session.plan.class_images.seeds.clone();
    let mut pngs = std::mem::take(&mut session.input.class_images);
    pngs.resize(seeds.len(), None);
    let mut encoded = Vec::with_capacity(seeds.len());
    for (i, seeds) in seeds.chunks(CLASS_IMAGE_BATCH).enumerate() {
        let pngs = &mut pngs[i * CLASS_IMAGE_BATCH..][..seeds.len()];
        // A batch that was begun before is drawn whole again: a smaller one would round otherwise.
        if pngs.contains(&None) {
            draw_missing(session, i * CLASS_IMAGE_BATCH, seeds, pngs)?;
        }
        for png in pngs.iter_mut().filter_map(Option::take) {
            let at = session.at(Phase::ClassImages, encoded.len(), session.plan.recipe.n_class_images);
            session.progress(at, None)?;
            let pixels = image_io::read_png(&png).map_err(|error| {
                let message = format!("class image {}: {error}", encoded.len() + 1);
                Fault::new(FaultCode::ArtifactMissing, message)
            })?;
            encoded
                .push(session.encode(&image_io::center_square(&pixels, session.base.bundle.resolution()))?);
        }
    }
    Ok(encoded)
}

/// Draws what is missing of one batch, whose first image has the place `first`.
fn draw_missing(
    session: &mut Session<'_, '_>,
    first: usize,
    seeds: &[u64],
    pngs: &mut [Option<Vec<u8>>],
) -> Result<(), Halt> {
    let prompt = session.plan.recipe.class_prompt();
    let request = |&seed| ImageRequest { prompt: prompt.clone(), negative: String::new(), seed };
    let requests: Vec<ImageRequest> = seeds.iter().map(request).collect();
    let (base, drawing) = (Arc::clone(&session.base), session.base.drawing(CLASS_IMAGE_STEPS));
    let at = session.at(Phase::ClassImages, first, session.plan.recipe.n_class_images);
    let drawn = session.draw(&*base.models()?, &requests, &drawing, &at, None)?;
    for (i, pixels) in drawn.iter().enumerate().filter(|(i, _)| pngs[*i].is_none()).collect::<Vec<_>>() {
        let png = image_io::png(pixels, (drawing.width, drawing.height), &[])?;
        session.tell(TrainEvent::ClassImage { index: first + i, png: png.clone() }, None)?;
        pngs[i] = Some(png);
    }
    Ok(())
}
