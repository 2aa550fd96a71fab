//! What may be asked for: every option with its range and default. An invalid specification cannot be made.

use serde::{Deserialize, Serialize};
use unicode_normalization::UnicodeNormalization;
use utoipa::ToSchema;

use super::words;

/// What [`is_printable`] refuses, as a regular expression's set has it, but for the controls of ASCII.
macro_rules! unseen {
    () => {
        concat!(
            r"\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb",
            "\u{E0000}-\u{E007F}"
        )
    };
}

/// A pattern of texts with something to see, and with nothing unseen and none of these controls.
macro_rules! pattern {
    ($controls:literal) => {
        concat!(
            "^[^",
            $controls,
            unseen!(),
            "]*[^\\s",
            $controls,
            unseen!(),
            "][^",
            $controls,
            unseen!(),
            "]*$"
        )
    };
}

/// Fewest photos of a product.
pub const N_PHOTOS_MIN: usize = 3;
/// Most photos of a product.
pub const N_PHOTOS_MAX: usize = 5;
/// Longest class name, in characters.
pub const CLASS_NAME_CHARS_MAX: usize = 64;
/// Largest seed: what every JSON reader keeps exactly, 2^53 - 1.
pub const SEED_MAX: u64 = (1 << 53) - 1;
/// What stands for the product in a prompt.
pub const PRODUCT: &str = "{product}";

/// What a class name looks like, as JSON Schema says it: something to see, and nothing that cannot be seen.
pub const CLASS_NAME_PATTERN: &str = pattern!("\\u0000-\\u001f");
/// What a prompt looks like: the same, but line breaks and tabs may stand.
pub const PROMPT_PATTERN: &str = pattern!("\\u0000-\\u0008\\u000b\\u000c\\u000e-\\u001f");

const PROMPT_CHARS_MAX: usize = 1000;
const N_PROMPTS_MAX: usize = 16;

/// Why a value cannot be accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// JSON pointer to the value, such as `/steps`.
    pub pointer: String,
    /// What came and what was wanted, in one line.
    pub message: String,
}

impl Invalid {
    /// A value at `pointer` that cannot be accepted.
    pub fn new(pointer: impl Into<String>, message: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), message: message.into() }
    }
}

words!(
    /// How a training goes about it.
    Method {
        /// Noise loss with prior preservation on UNet and text encoder (Ruiz et al. 2023, arXiv 2208.12242).
        Dreambooth = "dreambooth",
    }
);

words!(
    /// What a picture is written as.
    Format {
        /// Lossless; carries its parameters.
        Png = "png",
        /// Quality 90.
        Jpeg = "jpeg",
        /// Quality 90.
        Webp = "webp",
    }
);

impl Format {
    /// Its media type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::Webp => "image/webp",
        }
    }

    /// The end of its file names.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpg",
            Self::Webp => "webp",
        }
    }
}

/// Weights of the losses in their sum.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LossWeights {
    /// Of the prior preservation: what the class images count.
    #[schema(minimum = 0.0, maximum = 100.0, default = 1.0)]
    pub prior: f64,
}

impl Default for LossWeights {
    fn default() -> Self {
        Self { prior: 1.0 }
    }
}

/// What is drawn with the finished model, for people to look at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Evaluation {
    /// Whether anything is drawn.
    #[schema(default = true)]
    pub enabled: bool,
    /// Pictures.
    #[schema(minimum = 1, maximum = 64, default = 4)]
    pub images: u32,
    /// Sampler steps of each.
    #[schema(minimum = 1, maximum = 200, default = 25)]
    pub steps: u32,
}

impl Default for Evaluation {
    fn default() -> Self {
        Self { enabled: true, images: 4, steps: 25 }
    }
}

/// How a model is trained. Everything has a default; an unknown name is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainOptions {
    /// The method.
    #[schema(default = "dreambooth")]
    pub method: Method,
    /// Steps of the optimiser.
    #[schema(minimum = 1, maximum = 10_000, default = 800)]
    pub steps: u32,
    /// Learning rate of AdamW, constant.
    #[schema(exclusive_minimum = 0.0, maximum = 0.01, default = 2e-6)]
    pub learning_rate: f64,
    /// Where all random numbers come from. Drawn by the server if not given, and said in the job.
    #[schema(minimum = 0, maximum = 9_007_199_254_740_991_i64)]
    pub seed: Option<u64>,
    /// The word for this one product: one token of the model's vocabulary that means next to nothing. The model's own
    /// choice if not given.
    #[schema(min_length = 1, max_length = 16, pattern = "^[a-z0-9]+$")]
    pub instance_token: Option<String>,
    /// Pictures of the class, drawn by the untrained model, that keep the class what it was; 0 for none.
    #[schema(minimum = 0, maximum = 1000, default = 200)]
    pub class_images: u32,
    /// Weights of the losses.
    pub loss_weights: LossWeights,
    /// Pictures drawn at the end.
    pub evaluation: Evaluation,
    /// Which of one's own waiting jobs goes first: the larger.
    #[schema(minimum = -100, maximum = 100, default = 0)]
    pub priority: i32,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            method: Method::Dreambooth,
            steps: 800,
            learning_rate: 2e-6, // Assumption: the paper gives none
            seed: None,
            instance_token: None,
            class_images: 200,
            loss_weights: LossWeights::default(),
            evaluation: Evaluation::default(),
            priority: 0,
        }
    }
}

impl TrainOptions {
    /// Refuses what is out of range, by its JSON pointer.
    pub fn check(&self) -> Result<(), Invalid> {
        whole("/steps", self.steps, 1, 10_000)?;
        let rate = self.learning_rate;
        if !(rate > 0.0 && rate <= 0.01) {
            return Err(Invalid::new(
                "/learning_rate",
                format!("wanted above 0 and at most 0.01, got {rate}"),
            ));
        }
        check_seed(self.seed)?;
        if let Some(token) = &self.instance_token {
            let plain = token.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
            if token.is_empty() || token.len() > 16 || !plain {
                return Err(Invalid::new("/instance_token", "wanted 1 to 16 characters of a-z and 0-9"));
            }
        }
        whole("/class_images", self.class_images, 0, 1000)?;
        real("/loss_weights/prior", self.loss_weights.prior, 0.0, 100.0)?;
        whole("/evaluation/images", self.evaluation.images, 1, 64)?;
        whole("/evaluation/steps", self.evaluation.steps, 1, 200)?;
        whole("/priority", self.priority, -100, 100)
    }
}

/// A training, complete.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainSpec {
    /// What kind of thing the product is, such as `mug`.
    pub class_name: String,
    /// How it is trained.
    pub options: TrainOptions,
    /// The seed, asked for or drawn.
    pub seed: u64,
}

impl TrainSpec {
    /// A training of `options`, which takes `drawn_seed` where they name none.
    pub fn new(class_name: &str, options: TrainOptions, drawn_seed: u64) -> Result<Self, Invalid> {
        options.check()?;
        let seed = options.seed.unwrap_or(drawn_seed & SEED_MAX);
        Ok(Self { class_name: self::class_name(class_name)?, options, seed })
    }
}

/// A class name as it is kept: NFC, trimmed.
pub fn class_name(text: &str) -> Result<String, Invalid> {
    let name: String = text.trim().nfc().collect();
    let invalid = |message: String| Err(Invalid::new("/class_name", message));
    let n_chars = n_chars(text, &name);
    if name.is_empty() || n_chars > CLASS_NAME_CHARS_MAX {
        return invalid(format!("wanted 1 to {CLASS_NAME_CHARS_MAX} characters, got {n_chars}"));
    }
    match text.chars().find(|&c| !is_printable(c)) {
        Some(c) => invalid(format!("holds U+{:04X}, a character that cannot be seen", c as u32)),
        None => Ok(name),
    }
}

/// A text may be too long as it came or as it is kept; the JSON Schema knows the first only.
fn n_chars(came: &str, kept: &str) -> usize {
    came.chars().count().max(kept.chars().count())
}

/// Pictures to draw with a finished training. Everything but the prompts has a default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SampleSpec {
    /// What the pictures show; `{product}` stands for the product.
    #[schema(min_items = 1, max_items = 16, example = json!(["a photo of {product} on a wooden table"]))]
    pub prompts: Vec<String>,
    /// What they must not show.
    #[serde(default)]
    #[schema(max_length = 1000, default = "")]
    pub negative_prompt: String,
    /// Pictures for each prompt.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 8, default = 1)]
    pub n: u32,
    /// Seed of the first picture, drawn by the server if not given; each further one takes the next. A picture's own
    /// seed is said with it and draws it again.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 9_007_199_254_740_991_i64)]
    pub seed: Option<u64>,
    /// Steps from noise to picture.
    #[serde(default = "twenty_five")]
    #[schema(minimum = 1, maximum = 200, default = 25)]
    pub steps: u32,
    /// Weight of the prompt against the negative prompt; 1 switches guidance off.
    #[serde(default = "seven_and_a_half")]
    #[schema(minimum = 0.0, maximum = 30.0, default = 7.5)]
    pub guidance: f64,
    /// The way from noise to picture.
    #[serde(default)]
    pub scheduler: Scheduler,
    /// Pixels, a multiple of 8; the model's own size if not given.
    #[serde(default)]
    #[schema(minimum = 64, maximum = 1024, multiple_of = 8)]
    pub width: Option<u32>,
    /// Pixels, a multiple of 8; the model's own size if not given.
    #[serde(default)]
    #[schema(minimum = 64, maximum = 1024, multiple_of = 8)]
    pub height: Option<u32>,
    /// What the pictures are written as.
    #[serde(default = "png")]
    #[schema(default = "png")]
    pub format: Format,
}

words!(
    /// Ways from noise to picture.
    Scheduler {
        /// Song et al. 2021.
        Ddim = "ddim",
        /// Liu et al. 2022.
        Pndm = "pndm",
        /// Lu et al. 2022, second order, multistep.
        Dpmpp2m = "dpmpp-2m",
        /// The same on the noise levels of Karras et al. 2022.
        Dpmpp2mKarras = "dpmpp-2m-karras",
        /// Karras et al. 2022, algorithm 2 without churn.
        Euler = "euler",
        /// With fresh noise at each step.
        EulerA = "euler-a",
    }
);

#[allow(clippy::derivable_impls)] // the macro makes the enum
impl Default for Scheduler {
    fn default() -> Self {
        Self::Dpmpp2m
    }
}

impl SampleSpec {
    /// Refuses what is out of range, brings texts to NFC, and takes `drawn_seed` if none is named.
    pub fn complete(mut self, drawn_seed: u64) -> Result<Self, Invalid> {
        let n_prompts = self.prompts.len();
        if n_prompts == 0 || n_prompts > N_PROMPTS_MAX {
            let message = format!("wanted 1 to {N_PROMPTS_MAX} prompts, got {n_prompts}");
            return Err(Invalid::new("/prompts", message));
        }
        for (i, prompt) in self.prompts.iter_mut().enumerate() {
            *prompt = text(&format!("/prompts/{i}"), prompt, 1)?;
        }
        self.negative_prompt = text("/negative_prompt", &self.negative_prompt, 0)?;
        whole("/n", self.n, 1, 8)?;
        check_seed(self.seed)?;
        self.seed.get_or_insert(drawn_seed & SEED_MAX);
        whole("/steps", self.steps, 1, 200)?;
        real("/guidance", self.guidance, 0.0, 30.0)?;
        for (pointer, side) in [("/width", self.width), ("/height", self.height)] {
            if let Some(side) = side {
                whole(pointer, side, 64, 1024)?;
                if side % 8 != 0 {
                    return Err(Invalid::new(pointer, format!("wanted a multiple of 8, got {side}")));
                }
            }
        }
        Ok(self)
    }

    /// Every picture in order: its prompt and its seed.
    pub fn pictures(&self) -> impl Iterator<Item = (&str, u64)> {
        let seed = self.seed.unwrap_or(0);
        let prompts = self.prompts.iter().flat_map(|prompt| (0..self.n).map(move |_| prompt.as_str()));
        prompts.enumerate().map(move |(i, prompt)| (prompt, (seed + i as u64) & SEED_MAX))
    }
}

/// A prompt as it is kept: NFC. Line breaks and tabs are spaces to the tokenizer and may stand.
fn text(pointer: &str, text: &str, min: usize) -> Result<String, Invalid> {
    let came = text;
    let text: String = came.nfc().collect();
    let n_chars = n_chars(came, &text);
    if n_chars > PROMPT_CHARS_MAX || text.trim().chars().count() < min {
        let message = format!("wanted {min} to {PROMPT_CHARS_MAX} characters, got {n_chars}");
        return Err(Invalid::new(pointer, message));
    }
    match text.chars().find(|&c| !is_printable(c) && !matches!(c, '\n' | '\r' | '\t')) {
        Some(c) => {
            let message = format!("holds U+{:04X}, a character that cannot be seen", c as u32);
            Err(Invalid::new(pointer, message))
        }
        None => Ok(text),
    }
}

/// Neither a control character nor one that only changes how others are shown: directions, zero widths, tags.
fn is_printable(c: char) -> bool {
    let unseen = matches!(c, '\u{AD}' | '\u{61C}' | '\u{180E}' | '\u{200B}' | '\u{200E}'..='\u{200F}'
        | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{206F}' | '\u{FEFF}' | '\u{FFF9}'..='\u{FFFB}'
        | '\u{E0000}'..='\u{E007F}');
    !c.is_control() && !unseen
}

fn check_seed(seed: Option<u64>) -> Result<(), Invalid> {
    match seed {
        Some(seed) if seed > SEED_MAX => {
            Err(Invalid::new("/seed", format!("wanted 0 to {SEED_MAX}, got {seed}")))
        }
        _ => Ok(()),
    }
}

fn whole<T: PartialOrd + std::fmt::Display>(pointer: &str, value: T, min: T, max: T) -> Result<(), Invalid> {
    if value >= min && value <= max {
        return Ok(());
    }
    Err(Invalid::new(pointer, format!("wanted {min} to {max}, got {value}")))
}

fn real(pointer: &str, value: f64, min: f64, max: f64) -> Result<(), Invalid> {
    whole(pointer, value, min, max) // not a number is in no range
}

fn one() -> u32 {
    1
}

fn twenty_five() -> u32 {
    25
}

fn seven_and_a_half() -> f64 {
    7.5
}

fn png() -> Format {
    Format::Png
}
