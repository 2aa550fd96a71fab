//! What a training's pictures are worth: a few on the way, to know which step to serve, and those of the finished model.

use std::sync::Arc;

use image::RgbImage;
use serde_json::{Value, json};

use super::{Halt, Run};
use crate::engine::Drawn;
use crate::engine::candle::named;
use crate::job::{Phase, Progress, SEED_MAX};
use crate::ml::evaluate::{self, Evaluation, Fidelity, Generated, Judge, PromptLists};
use crate::ml::sample::Models;
use crate::ml::train::{State, Trial};
use crate::ml::{Error, random};

/// Pictures of a trial drawn at once. Part of what a seed means: the size of a batch orders sums, and a trial decides
/// which weights are served.
const TRIAL_BATCH: usize = 4;

/// Prompts and seeds of pictures.
type Wanted = Vec<(String, u64)>;

/// What trials are scored with. It is the same for all of them, and for one that goes on from a checkpoint.
pub(super) struct Trying {
    judge: Judge,
    /// CLIP-T of the untrained model, which knows the class but not the product.
    adherence: f64,
}

/// What was drawn with the finished model, and what is said of it.
pub(super) struct Judged {
    /// The files, the prompt-invariant ones first.
    pub(super) images: Vec<Drawn>,
    /// What the report says of each.
    pub(super) said: Vec<Value>,
    /// What it says of all; null where nothing could be said.
    pub(super) evaluation: Value,
}

impl Run<'_, '_> {
    /// Whether the weights as they are now are to be tried, and were not yet.
    pub(super) fn is_to_be_tried(&self, state: &State) -> bool {
        let step = state.n_steps();
        self.plan.trial_steps.contains(&step) && !state.trials().iter().any(|trial| trial.step == step)
    }

    /// Draws a few pictures with the weights as they are now and scores them.
    pub(super) fn try_out(&mut self, state: &mut State, photos: &[RgbImage]) -> Result<(), Halt> {
        let at = self.at_step(state);
        let trying = if let Some(trying) = self.trying.take() {
            trying
        } else {
            let judge = Judge::new(&self.engine.bundle, &self.engine.base.device, photos.to_vec());
            let Some(judge) = self.or_warning(judge)?.filter(Judge::can_try) else {
                self.plan.trial_steps.clear(); // nothing to score with: the last step is served
                return Ok(());
            };
            let adherence = self.adherence_of_base(&judge, &at, state)?;
            Trying { judge, adherence }
        };
        let (standard, varying) = self.trial_prompts()?;
        let models = state.frozen(&self.engine.bundle, &self.engine.base)?;
        let (mut alike, mut heard) = (Vec::new(), Vec::new());
        for batch in standard.chunks(TRIAL_BATCH) {
            alike
                .extend(self.draw_product(&models, batch, &at, state)?.into_iter().map(|(_, pixels)| pixels));
        }
        for batch in varying.chunks(TRIAL_BATCH) {
            heard.extend(self.generated(&models, batch, &at, state)?.into_iter().map(|(_, picture)| picture));
        }
        let class_name = self.plan.recipe.product.class_name.clone();
        let likeness = self.or_warning(trying.judge.likeness(&alike))?;
        let adherence = self.or_warning(trying.judge.adherence(&class_name, &heard))?;
        let (likeness, adherence) = (likeness.unwrap_or(f64::NAN), adherence.unwrap_or(f64::NAN));
        state.tried(Trial::new(state.n_steps(), likeness, adherence / trying.adherence));
        self.trying = Some(trying);
        Ok(())
    }

    /// What the bundle's own model makes of the trials' prompts, with the class name for the product.
    fn adherence_of_base(&mut self, judge: &Judge, at: &Progress, state: &State) -> Result<f64, Halt> {
        let class_name = self.plan.recipe.product.class_name.clone();
        let (_, varying) = self.trial_prompts()?;
        let of_class: Wanted = (varying.into_iter())
            .map(|(prompt, seed)| (prompt.replace(evaluate::PRODUCT, &class_name), seed))
            .collect();
        let base = Arc::clone(&self.engine.base);
        let mut heard = Vec::new();
        for batch in of_class.chunks(TRIAL_BATCH) {
            heard.extend(self.generated(&base, batch, at, state)?.into_iter().map(|(_, picture)| picture));
        }
        let adherence = judge.adherence(&class_name, &heard);
        Ok(self.or_warning(adherence)?.unwrap_or(f64::NAN))
    }

    /// Prompts and seeds of a trial: half of the pictures show the standard prompt, half a prompt each.
    fn trial_prompts(&self) -> Result<(Wanted, Wanted), Halt> {
        let n = self.input.spec.options.evaluation.trial_images as usize;
        self.prompts(n, self.plan.trial_seed)
    }

    /// Prompts and seeds of `n` pictures, the first half of the standard prompt, the others of a prompt each.
    fn prompts(&self, n: usize, seed: u64) -> Result<(Wanted, Wanted), Halt> {
        let n_varying = n / 2;
        let varying = match &self.input.spec.options.evaluation.prompts {
            Some(prompts) => prompts.iter().cycle().take(n_varying).cloned().collect(),
            None => PromptLists::default().draw(n_varying, random::derive(seed, "prompts"))?,
        };
        let standard = std::iter::repeat_n(self.plan.recipe.templates.photo.clone(), n - n_varying);
        let mut all: Wanted = (standard.chain(varying).enumerate())
            .map(|(i, prompt)| (prompt, (seed + i as u64) & SEED_MAX))
            .collect();
        let varying = all.split_off(n - n_varying);
        Ok((all, varying))
    }

    /// Draws and judges what the served weights make of both protocols. What cannot be judged is drawn all the same, with a
    /// warning: a training is not lost to a number.
    pub(super) fn evaluate(&mut self, state: &State, photos: &[RgbImage]) -> Result<Judged, Halt> {
        let evaluation = self.input.spec.options.evaluation.clone();
        if !evaluation.enabled {
            return Ok(Judged { images: Vec::new(), said: Vec::new(), evaluation: Value::Null });
        }
        let judge = match self.trying.take() {
            Some(trying) => Ok(trying.judge),
            None => Judge::new(&self.engine.bundle, &self.engine.base.device, photos.to_vec()),
        };
        let judge = self.or_warning(judge)?;
        let tells = judge.as_ref().is_some_and(Judge::can_tell_the_class);
        let n_class_images = if tells { evaluation.class_images as usize } else { 0 };
        let (standard, varying) = self.prompts(evaluation.images as usize, self.plan.evaluation_seed)?;
        let total = standard.len() + varying.len() + n_class_images;
        let models = state.served(&self.engine.bundle, &self.engine.base)?;
        let mut images = Vec::new();
        let mut draw = |run: &mut Self, wanted: &[(String, u64)]| {
            let mut drawn = Vec::new();
            for batch in wanted.chunks(run.engine.settings.batch) {
                let at = run.at(Phase::Drawing, images.len(), total);
                for (file, picture) in run.generated(&models, batch, &at, state)? {
                    images.push(file);
                    drawn.push(picture);
                }
            }
            Ok::<_, Halt>(drawn)
        };
        let invariant = draw(self, &standard)?;
        let varying = draw(self, &varying)?;
        let seed = random::derive(self.plan.evaluation_seed, "class") & SEED_MAX;
        let of_class: Wanted = (0..n_class_images as u64)
            .map(|i| (self.plan.recipe.class_prompt(), (seed + i) & SEED_MAX))
            .collect();
        let of_class = draw(self, &of_class)?;
        images.truncate(invariant.len() + varying.len()); // those of the class are looked at, not kept

        let found = match judge {
            Some(judge) => self.judged(&judge, &invariant, &varying, of_class, state)?,
            None => None,
        };
        let fidelity = |i: usize| found.as_ref().and_then(|found: &Evaluation| found.pictures.get(i));
        let said = (images.iter().enumerate())
            .map(|(i, image)| {
                let protocol = if i < invariant.len() { "prompt_invariant" } else { "prompt_varying" };
                self.said(image, protocol, fidelity(i))
            })
            .collect();
        for (picture, image) in invariant.iter().chain(&varying).zip(&images) {
            let caption = named(&image.prompt, &self.plan.recipe.product);
            self.gallery.pictures.push(super::shot(&picture.pixels, &caption)?);
        }
        Ok(Judged { images, said, evaluation: json!(found) })
    }

    fn judged(
        &mut self,
        judge: &Judge,
        invariant: &[Generated],
        varying: &[Generated],
        class_images: Vec<Generated>,
        state: &State,
    ) -> Result<Option<Evaluation>, Halt> {
        let class_name = self.plan.recipe.product.class_name.clone();
        let class_images: Vec<RgbImage> = class_images.into_iter().map(|picture| picture.pixels).collect();
        let drawn =
            evaluate::Drawn { class_name: &class_name, invariant, varying, class_images: &class_images };
        let mut halted = None;
        let found = judge.evaluate(&drawn, &mut |done, total| {
            let at = self.at(Phase::Evaluating, done, total);
            super::keep(self.beat(super::Beat::Progress(at), Some(state)), &mut halted)
        });
        match halted {
            Some(halt) => Err(halt),
            None => Ok(self.or_warning(found)?.flatten()),
        }
    }

    /// What was found, or nothing and a warning where a network or a picture is not fit for it.
    fn or_warning<T>(&mut self, found: crate::ml::Result<T>) -> Result<Option<T>, Halt> {
        match found {
            Ok(found) => Ok(Some(found)),
            Err(Error::Bad(words)) => {
                let words = words.replace(&self.engine.bundle.dir().display().to_string(), "the models");
                let warning = format!("not judged: {words}");
                if !self.plan.warnings.contains(&warning) {
                    self.plan.warnings.push(warning);
                }
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// One batch of pictures with their prompts, as files and as they are judged.
    fn generated(
        &mut self,
        models: &Models,
        wanted: &[(String, u64)],
        at: &Progress,
        state: &State,
    ) -> Result<Vec<(Drawn, Generated)>, Halt> {
        let drawn = self.draw_product(models, wanted, at, state)?;
        let picture = |(file, pixels): (Drawn, RgbImage)| {
            let prompt = file.prompt.clone();
            (file, Generated { pixels, prompt })
        };
        Ok(drawn.into_iter().map(picture).collect())
    }

    /// What the report says of one picture.
    fn said(&self, image: &Drawn, protocol: &str, fidelity: Option<&Fidelity>) -> Value {
        let prompt = named(&image.prompt, &self.plan.recipe.product);
        json!({"prompt": prompt, "seed": image.seed, "protocol": protocol, "fidelity": fidelity})
    }
}
