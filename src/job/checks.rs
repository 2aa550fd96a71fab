//! Checks of the texts and numbers in a request, and the JSON Schema patterns that say the same.

use unicode_normalization::UnicodeNormalization;

/// The characters that [`is_printable`] rejects, as a set of a regular expression, without the ASCII controls.
macro_rules! unseen {
    () => {
        concat!(
            r"\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb",
            "\u{E0000}-\u{E007F}"
        )
    };
}

/// A pattern of texts with at least one visible character, and without invisible characters and these controls.
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

/// Longest class name, in characters.
pub const CLASS_NAME_CHARS_MAX: usize = 64;
/// Largest seed: what every JSON reader keeps exactly, 2^53 - 1.
pub const SEED_MAX: u64 = (1 << 53) - 1;

/// JSON Schema pattern of a class name: at least one visible character, and no invisible ones.
pub const CLASS_NAME_PATTERN: &str = pattern!("\\u0000-\\u001f");
/// JSON Schema pattern of a prompt: like a class name, with line breaks and tabs allowed.
pub const PROMPT_PATTERN: &str = pattern!("\\u0000-\\u0008\\u000b\\u000c\\u000e-\\u001f");

/// JSON Schema pattern of a prompt template that contains `{word}`.
pub fn template_pattern(word: &str) -> String {
    let seen = concat!("[^\\u0000-\\u0008\\u000b\\u000c\\u000e-\\u001f", unseen!(), "]*");
    format!("^{seen}\\{{{word}\\}}{seen}$")
}

const PROMPT_CHARS_MAX: usize = 1000;

/// Why a value is rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{pointer}: {message}")]
pub struct Invalid {
    /// JSON pointer to the value, such as `/steps`.
    pub pointer: String,
    /// What was wanted and what came, in one line.
    pub message: String,
}

impl Invalid {
    /// The rejection of the value at `pointer`.
    pub fn new(pointer: impl Into<String>, message: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), message: message.into() }
    }
}

/// The JSON pointer of a place that serde has reached.
pub(crate) fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let segment = |segment: &Segment| match segment {
        Segment::Seq { index } => format!("/{index}"),
        Segment::Map { key } => format!("/{}", key.replace('~', "~0").replace('/', "~1")),
        Segment::Enum { .. } | Segment::Unknown => String::new(),
    };
    path.iter().map(segment).collect()
}

/// Normalizes a class name: NFC, trimmed.
pub fn class_name(text: &str) -> Result<String, Invalid> {
    let name: String = text.trim().nfc().collect();
    let invalid = |message: String| Err(Invalid::new("/class_name", message));
    let n_chars = n_chars(text, &name);
    if name.is_empty() || n_chars > CLASS_NAME_CHARS_MAX {
        return invalid(format!("wanted 1 to {CLASS_NAME_CHARS_MAX} characters, got {n_chars}"));
    }
    match text.chars().find(|&c| !is_printable(c)) {
        Some(c) => invalid(format!("holds U+{:04X}, an invisible character", c as u32)),
        None => Ok(name),
    }
}

/// The longer of a text's lengths as given and as normalized; the JSON Schema limits only the first.
fn n_chars(came: &str, kept: &str) -> usize {
    came.chars().count().max(kept.chars().count())
}

/// Normalizes a prompt to NFC. Line breaks and tabs are allowed, since the tokenizer treats them as spaces.
pub(super) fn text(pointer: &str, text: &str, min: usize) -> Result<String, Invalid> {
    let came = text;
    let text: String = came.nfc().collect();
    let n_chars = n_chars(came, &text);
    if n_chars > PROMPT_CHARS_MAX || text.trim().chars().count() < min {
        let message = format!("wanted {min} to {PROMPT_CHARS_MAX} characters, got {n_chars}");
        return Err(Invalid::new(pointer, message));
    }
    match text.chars().find(|&c| !is_printable(c) && !matches!(c, '\n' | '\r' | '\t')) {
        Some(c) => {
            let message = format!("holds U+{:04X}, an invisible character", c as u32);
            Err(Invalid::new(pointer, message))
        }
        None => Ok(text),
    }
}

/// Neither a control character nor one that only changes how others are displayed: directions, zero widths, tags.
fn is_printable(c: char) -> bool {
    let unseen = matches!(c, '\u{AD}' | '\u{61C}' | '\u{180E}' | '\u{200B}' | '\u{200E}'..='\u{200F}'
        | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{206F}' | '\u{FEFF}' | '\u{FFF9}'..='\u{FFFB}'
        | '\u{E0000}'..='\u{E007F}');
    !c.is_control() && !unseen
}

pub(super) fn check_seed(seed: Option<u64>) -> Result<(), Invalid> {
    match seed {
        Some(seed) if seed > SEED_MAX => {
            Err(Invalid::new("/seed", format!("wanted 0 to {SEED_MAX}, got {seed}")))
        }
        _ => Ok(()),
    }
}

pub(super) fn check_token(pointer: &str, token: Option<&String>) -> Result<(), Invalid> {
    let plain = |token: &String| token.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    match token {
        Some(token) if token.is_empty() || token.len() > 16 || !plain(token) => {
            Err(Invalid::new(pointer, "wanted 1 to 16 characters of a-z and 0-9"))
        }
        _ => Ok(()),
    }
}

pub(super) fn rate(pointer: &str, rate: f64) -> Result<(), Invalid> {
    if rate > 0.0 && rate <= 0.01 {
        return Ok(());
    }
    Err(Invalid::new(pointer, format!("wanted above 0 and at most 0.01, got {rate}")))
}

pub(super) fn whole<T: PartialOrd + std::fmt::Display>(
    pointer: &str,
    value: T,
    min: T,
    max: T,
) -> Result<(), Invalid> {
    if value >= min && value <= max {
        return Ok(());
    }
    Err(Invalid::new(pointer, format!("wanted {min} to {max}, got {value}")))
}

pub(super) fn real(pointer: &str, value: f64, min: f64, max: f64) -> Result<(), Invalid> {
    whole(pointer, value, min, max) // NaN is in no range
}
