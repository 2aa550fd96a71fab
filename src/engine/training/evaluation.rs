//! Evaluation within a training: a few images on the way, to choose the step that is served, and those of the result.

use image::RgbImage;

use super::session::{Halt, Session, thumbnail};
use crate::engine::api::Image;
use crate::job::{Phase, Progress, SEED_MAX};
use crate::ml::evaluate::{Evaluation, Evaluator, Fidelity, Generated, GeneratedSet, PromptLists};
use crate::ml::product::PLACEHOLDER;
use crate::ml::sample::Models;
use crate::ml::train::{Learner, State, Trial};
use crate::ml::{Interrupt, random};
use crate::report::{PictureScores, Protocol, ReportImage, Scores};

/// Images of a trial drawn at once. Part of what a seed means: the size of a batch orders sums, and a trial decides
/// which weights are served.
pub(super) const TRIAL_BATCH: usize = 4;

/// Prompts and seeds of images.
type Wanted = Vec<(String, u64)>;

/// Scores the weights of a step by a few images. It is the same for all steps, and after a resume.
pub(super) struct CheckpointScorer {
    evaluator: Evaluator,
    /// CLIP-T of the untrained model, which knows the class but not the product.
    base_adherence: f64,
}

/// The images of the finished model, and what the report says of them.
pub(super) struct EvaluationOutput {
    /// The files, the prompt-invariant ones first.
    pub(super) images: Vec<Image>,
    /// What the report says of each.
    pub(super) said: Vec<ReportImage>,
    /// The scores of all; `None` where nothing could be evaluated.
    pub(super) evaluation: Option<Scores>,
}

/// Whether the weights as they are now are to be scored, and were not yet.
pub(super) fn is_due(session: &Session<'_, '_>, state: &State) -> bool {
    let step = state.n_steps();
    session.plan.trial_steps.contains(&step) && !state.trials().iter().any(|trial| trial.step == step)
}

/// Draws a few images with the weights as they are now and scores them. `scorer` is made when it is first needed.
pub(super) fn score_step(
    session: &mut Session<'_, '_>,
    scorer: &mut Option<CheckpointScorer>,
    state: &mut State,
    photos: &[RgbImage],
) -> Result<(), Halt> {
    let at = session.at_step(state);
    if scorer.is_none() {
        *scorer = new_scorer(session, &at, state, photos)?;
    }
    let Some(scorer) = scorer else {
        session.plan.trial_steps.clear(); // nothing to score with: the last step is served
        return Ok(());
    };
    let (standard, varying) = trial_prompts(session)?;
    let models = state.frozen(&session.base.bundle, &session.base.shared)?;
    let (mut invariant, mut varied) = (Vec::new(), Vec::new());
    for batch in standard.chunks(TRIAL_BATCH) {
        let drawn = session.draw_product(&models, batch, &at, state)?;
        invariant.extend(drawn.into_iter().map(|(_, pixels)| pixels));
    }
    for batch in varying.chunks(TRIAL_BATCH) {
        let drawn = generated(session, &models, batch, &at, state)?;
        varied.extend(drawn.into_iter().map(|(_, image)| image));
    }
    let class_name = session.plan.recipe.product.class_name.clone();
    let likeness = or_warning(session, scorer.evaluator.likeness(&invariant))?;
    let adherence = or_warning(session, scorer.evaluator.adherence(&class_name, &varied))?;
    let (likeness, adherence) = (likeness.unwrap_or(f64::NAN), adherence.unwrap_or(f64::NAN));
    state.add_trial(Trial::new(state.n_steps(), likeness, adherence / scorer.base_adherence));
    Ok(())
}

/// A scorer, if the bundle has the networks for it.
fn new_scorer(
    session: &mut Session<'_, '_>,
    at: &Progress,
    state: &State,
    photos: &[RgbImage],
) -> Result<Option<CheckpointScorer>, Halt> {
    let Some(evaluator) = evaluator(session, photos)?.filter(Evaluator::can_score_trials) else {
        return Ok(None);
    };
    let base_adherence = base_adherence(session, &evaluator, at, state)?;
    Ok(Some(CheckpointScorer { evaluator, base_adherence }))
}

/// An evaluator with the bundle's networks; none, and a warning, where one of them cannot be used.
fn evaluator(session: &mut Session<'_, '_>, photos: &[RgbImage]) -> Result<Option<Evaluator>, Halt> {
    let evaluator = Evaluator::new(&session.base.bundle, session.base.device(), photos.to_vec());
    or_warning(session, evaluator)
}

/// CLIP-T of the bundle's own model for the trials' prompts, with the class name for the product.
fn base_adherence(
    session: &mut Session<'_, '_>,
    evaluator: &Evaluator,
    at: &Progress,
    state: &State,
) -> Result<f64, Halt> {
    let class_name = session.plan.recipe.product.class_name.clone();
    let (_, varying) = trial_prompts(session)?;
    let of_class: Wanted = (varying.into_iter())
        .map(|(prompt, seed)| (prompt.replace(PLACEHOLDER, &class_name), seed))
        .collect();
    let models = session.base.models()?;
    let mut images = Vec::new();
    for batch in of_class.chunks(TRIAL_BATCH) {
        let drawn = generated(session, &models, batch, at, state)?;
        images.extend(drawn.into_iter().map(|(_, image)| image));
    }
    drop(models);
    if session.plan.recipe.learner == Learner::Weights {
        session.base.let_go();
    }
    let adherence = evaluator.adherence(&class_name, &images);
    Ok(or_warning(session, adherence)?.unwrap_or(f64::NAN))
}

/// Prompts and seeds of a trial: half of the images show the standard prompt, half a prompt each.
fn trial_prompts(session: &Session<'_, '_>) -> Result<(Wanted, Wanted), Halt> {
    let n = session.input.spec.options.evaluation.trial_images as usize;
    prompts(session, n, session.plan.trial_seed)
}

/// Prompts and seeds of `n` images, the first half of the standard prompt, the others of a prompt each.
fn prompts(session: &Session<'_, '_>, n: usize, seed: u64) -> Result<(Wanted, Wanted), Halt> {
    let n_varying = n / 2;
    let varying = match &session.input.spec.options.evaluation.prompts {
        Some(prompts) => prompts.iter().cycle().take(n_varying).cloned().collect(),
        None => PromptLists::default().draw(n_varying, random::derive(seed, "prompts"))?,
    };
    let standard = std::iter::repeat_n(session.plan.recipe.templates.photo.clone(), n - n_varying);
    let mut all: Wanted = (standard.chain(varying).enumerate())
        .map(|(i, prompt)| (prompt, (seed + i as u64) & SEED_MAX))
        .collect();
    let varying = all.split_off(n - n_varying);
    Ok((all, varying))
}

/// Draws and evaluates images of the served weights by both protocols. What cannot be evaluated is drawn all the same,
/// with a warning: a training is not lost to a number.
pub(super) fn evaluate(
    session: &mut Session<'_, '_>,
    scorer: Option<CheckpointScorer>,
    state: &State,
    photos: &[RgbImage],
) -> Result<EvaluationOutput, Halt> {
    let options = session.input.spec.options.evaluation.clone();
    if !options.enabled {
        return Ok(EvaluationOutput { images: Vec::new(), said: Vec::new(), evaluation: None });
    }
    let evaluator = match scorer {
        Some(scorer) => Some(scorer.evaluator),
        None => evaluator(session, photos)?,
    };
    let scores_class = evaluator.as_ref().is_some_and(Evaluator::can_score_class);
    let n_class_images = if scores_class { options.class_images as usize } else { 0 };
    let (standard, varying) = prompts(session, options.images as usize, session.plan.evaluation_seed)?;
    let seed = random::derive(session.plan.evaluation_seed, "class") & SEED_MAX;
    let of_class: Wanted = (0..n_class_images as u64)
        .map(|i| (session.plan.recipe.class_prompt(), (seed + i) & SEED_MAX))
        .collect();
    let models = state.served(&session.base.bundle, &session.base.shared)?;
    let total = standard.len() + varying.len() + n_class_images;
    let mut images = Vec::new();
    let mut draw = |session: &mut Session<'_, '_>, wanted: &[(String, u64)]| {
        let mut drawn = Vec::new();
        for batch in wanted.chunks(session.batch()) {
            let at = session.at(Phase::Drawing, images.len(), total);
            for (file, image) in generated(session, &models, batch, &at, state)? {
                images.push(file);
                drawn.push(image);
            }
        }
        Ok::<_, Halt>(drawn)
    };
    let (invariant, varying) = (draw(session, &standard)?, draw(session, &varying)?);
    let of_class = draw(session, &of_class)?;
    images.truncate(invariant.len() + varying.len()); // those of the class are looked at, not kept

    let found = match evaluator {
        Some(evaluator) => scored(session, &evaluator, &invariant, &varying, of_class, state)?,
        None => None,
    };
    let fidelity = |i: usize| found.as_ref().and_then(|found: &Evaluation| found.pictures.get(i));
    let product = &session.plan.recipe.product;
    let said = (images.iter().enumerate())
        .map(|(i, image)| {
            let protocol =
                if i < invariant.len() { Protocol::PromptInvariant } else { Protocol::PromptVarying };
            said(&product.named(&image.prompt), image, protocol, fidelity(i))
        })
        .collect();
    for (generated, image) in invariant.iter().chain(&varying).zip(&images) {
        session.gallery.pictures.push(thumbnail(&generated.pixels, &product.named(&image.prompt))?);
    }
    Ok(EvaluationOutput { images, said, evaluation: found.map(Scores::from) })
}

/// The numbers of the images; none, and a warning, where they cannot be computed.
fn scored(
    session: &mut Session<'_, '_>,
    evaluator: &Evaluator,
    invariant: &[Generated],
    varying: &[Generated],
    class_images: Vec<Generated>,
    state: &State,
) -> Result<Option<Evaluation>, Halt> {
    let class_name = session.plan.recipe.product.class_name.clone();
    let class_images: Vec<RgbImage> = class_images.into_iter().map(|image| image.pixels).collect();
    let drawn = GeneratedSet { class_name: &class_name, invariant, varying, class_images: &class_images };
    let found = evaluator.evaluate(&drawn, &mut |done, total| {
        let at = session.at(Phase::Evaluating, done, total);
        session.progress(at, Some(state)).map_err(Interrupt::Stopped)
    });
    match found {
        Ok(found) => Ok(Some(found)),
        Err(Interrupt::Failed(error)) => or_warning(session, Err(error)),
        Err(Interrupt::Stopped(halt)) => Err(halt),
    }
}

/// What was found, or nothing and a warning where a network or an image is not fit for it.
fn or_warning<T>(session: &mut Session<'_, '_>, found: crate::ml::Result<T>) -> Result<Option<T>, Halt> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.is_input() => {
            let error = error.renamed(session.base.bundle.dir(), "the models".as_ref());
            let warning = format!("not evaluated: {error}");
            if !session.plan.warnings.contains(&warning) {
                session.plan.warnings.push(warning);
            }
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// One batch of images with their prompts, as files and as they are evaluated.
fn generated(
    session: &mut Session<'_, '_>,
    models: &Models,
    wanted: &[(String, u64)],
    at: &Progress,
    state: &State,
) -> Result<Vec<(Image, Generated)>, Halt> {
    let drawn = session.draw_product(models, wanted, at, state)?;
    let image = |(file, pixels): (Image, RgbImage)| {
        let prompt = file.prompt.clone();
        (file, Generated { pixels, prompt })
    };
    Ok(drawn.into_iter().map(image).collect())
}

/// What the report says of one image.
fn said(prompt: &str, image: &Image, protocol: Protocol, fidelity: Option<&Fidelity>) -> ReportImage {
    ReportImage {
        prompt: prompt.to_owned(),
        seed: image.seed,
        protocol: Some(protocol),
        fidelity: fidelity.cloned().map(PictureScores::from),
    }
}
