//! Prompts for the prompt-varying protocol: an image type, a background and a style, drawn from lists (section 3.5,
//! fig. 4 of arXiv 2410.14265).

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use crate::product::PLACEHOLDER;
use crate::{Error, Result, random};

/// Longest entry of a list, in characters: three of them and a product still fit into 75 tokens, as a rule.
const CHARS_MAX: usize = 120;

/// Lists of what a prompt is put together from. Styles belong to an image type: what suits a photo does not suit an
/// etching.
///
/// Departure: the paper prints a part of its lists, for any picture; ours are our own, and fit for products.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptLists {
    /// Where the product stands, such as `on a wooden table`.
    pub(crate) backgrounds: Vec<String>,
    /// What kind of picture it is.
    pub(crate) image_types: Vec<ImageType>,
}

/// A kind of picture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageType {
    /// How a prompt begins, such as `a photo of`.
    pub(crate) words: String,
    /// How such a picture may look.
    pub(crate) styles: Vec<String>,
}

impl Default for PromptLists {
    /// Our own: 6 image types with 24 styles each, 24 backgrounds.
    fn default() -> Self {
        Self::parse(include_str!("prompts.json")).expect("the embedded lists are valid")
    }
}

impl PromptLists {
    /// Lists as JSON: `{"backgrounds": [..], "image_types": [{"words": .., "styles": [..]}, ..]}`. [`Error::Input`] is
    /// the first thing wrong with them.
    pub fn parse(json: &str) -> Result<Self> {
        let lists: Self =
            serde_json::from_str(json).map_err(|error| Error::input(format!("prompt lists: {error}")))?;
        entries("backgrounds", &lists.backgrounds)?;
        let words: Vec<String> = lists.image_types.iter().map(|one| one.words.clone()).collect();
        entries("image_types", &words)?;
        for image_type in &lists.image_types {
            entries(&format!("styles of \"{}\"", image_type.words), &image_type.styles)?;
        }
        Ok(lists)
    }

    /// How many different prompts they hold.
    pub(crate) fn n_prompts(&self) -> usize {
        self.backgrounds.len() * self.image_types.iter().map(|one| one.styles.len()).sum::<usize>()
    }

    /// `n` different prompts with [`PLACEHOLDER`] in the product's place, each as likely as any other: a pure function
    /// of lists, `n` and `seed`, and the first of a longer draw are the shorter one. [`Error::Input`] if there are not
    /// so many.
    pub fn draw(&self, n: usize, seed: u64) -> Result<Vec<String>> {
        let all = self.n_prompts();
        if n > all {
            return Err(Error::input(format!("prompt lists: hold {all} different prompts, {n} are wanted")));
        }
        // The first n of a shuffle (Fisher and Yates), of which only what moved is kept.
        let mut moved: HashMap<usize, usize> = HashMap::new();
        let mut at = |i: usize| {
            let other = i + random::below(seed, 0, i as u64, all - i);
            let find = |moved: &HashMap<usize, usize>, place| moved.get(&place).copied().unwrap_or(place);
            let (own, picked) = (find(&moved, i), find(&moved, other));
            moved.insert(other, own);
            picked
        };
        Ok((0..n).map(|i| self.prompt(at(i))).collect())
    }

    /// The prompt with this number, below [`PromptLists::n_prompts`].
    fn prompt(&self, i: usize) -> String {
        let (background, mut style) = (i % self.backgrounds.len(), i / self.backgrounds.len());
        let mut image_types = self.image_types.iter();
        loop {
            let Some(one) = image_types.next() else {
                unreachable!("the number is below the number of prompts")
            };
            if let Some(style) = one.styles.get(style) {
                return format!("{} {PLACEHOLDER} {}, {style}", one.words, self.backgrounds[background]);
            }
            style -= one.styles.len();
        }
    }
}

fn entries(list: &str, entries: &[String]) -> Result<()> {
    if entries.is_empty() {
        return Err(Error::input(format!("prompt lists: {list}: wanted one entry at least")));
    }
    let mut seen = BTreeSet::new();
    for entry in entries {
        let n_chars = entry.chars().count();
        if entry.trim().is_empty() || n_chars > CHARS_MAX || entry.chars().any(char::is_control) {
            return Err(Error::input(format!(
                "prompt lists: {list}: wanted 1 to {CHARS_MAX} printable characters in each entry, one has {n_chars}"
            )));
        }
        if !seen.insert(entry) {
            return Err(Error::input(format!("prompt lists: {list}: \"{entry}\" is listed twice")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_lists_are_as_long_as_they_should_be_and_every_style_is_of_one_image_type() {
        let lists = PromptLists::default();
        assert!(lists.image_types.len() >= 6 && lists.backgrounds.len() >= 24);
        let styles: Vec<&String> = lists.image_types.iter().flat_map(|one| &one.styles).collect();
        assert!(lists.image_types.iter().all(|one| one.styles.len() == 24), "as likely as one another");
        assert_eq!(styles.iter().collect::<BTreeSet<_>>().len(), styles.len());
        assert_eq!(lists.n_prompts(), lists.backgrounds.len() * styles.len());
    }

    #[test]
    fn a_draw_is_of_its_seed_has_no_prompt_twice_and_begins_as_a_shorter_one() {
        let lists = PromptLists::default();
        let drawn = lists.draw(500, 7).expect("prompts");
        assert_eq!(drawn.iter().collect::<BTreeSet<_>>().len(), 500);
        assert_eq!(lists.draw(20, 7).expect("prompts"), drawn[..20]);
        assert_ne!(lists.draw(20, 8).expect("prompts"), drawn[..20]);
        assert!(drawn.iter().all(|prompt| prompt.matches(PLACEHOLDER).count() == 1), "{drawn:?}");
        for image_type in &lists.image_types {
            let n = drawn.iter().filter(|prompt| prompt.starts_with(&image_type.words)).count();
            assert!((50..120).contains(&n), "{n} of 500 are {}", image_type.words);
        }
    }

    #[test]
    fn a_draw_of_all_has_each_prompt_once_and_styles_stay_with_their_type() {
        let json = r#"{"backgrounds": ["here", "there"], "image_types":
            [{"words": "a photo of", "styles": ["sharp"]}, {"words": "a drawing of", "styles": ["ink", "chalk"]}]}"#;
        let lists = PromptLists::parse(json).expect("lists");
        let mut all = lists.draw(6, 1).expect("prompts");
        all.sort();
        let drawing = |rest: &str| format!("a drawing of {{product}} {rest}");
        let photo = |rest: &str| format!("a photo of {{product}} {rest}");
        let wanted = [
            drawing("here, chalk"),
            drawing("here, ink"),
            drawing("there, chalk"),
            drawing("there, ink"),
            photo("here, sharp"),
            photo("there, sharp"),
        ];
        assert_eq!(all, wanted);
        let words = lists.draw(7, 1).expect_err("refused").to_string();
        assert_eq!(words, "prompt lists: hold 6 different prompts, 7 are wanted");
    }

    #[test]
    fn lists_that_cannot_be_used_are_refused_in_one_line() {
        let refused = |json: &str| PromptLists::parse(json).expect_err("refused").to_string();
        let types = |styles: &str| format!(r#"[{{"words": "a photo of", "styles": [{styles}]}}]"#);
        let lists = |backgrounds: &str, types: &str| {
            format!(r#"{{"backgrounds": [{backgrounds}], "image_types": {types}}}"#)
        };
        for (json, wanted) in [
            ("{", "prompt lists: EOF"),
            (r#"{"backgrounds": ["a"]}"#, "missing field `image_types`"),
            (&lists("", &types(r#""a""#)), "backgrounds: wanted one entry at least"),
            (&lists(r#""a""#, "[]"), "image_types: wanted one entry at least"),
            (&lists(r#""a""#, &types("")), "styles of \"a photo of\": wanted one entry at least"),
            (&lists(r#""a", "a""#, &types(r#""b""#)), "backgrounds: \"a\" is listed twice"),
            (&lists(r#"" ""#, &types(r#""b""#)), "wanted 1 to 120 printable characters"),
            (&lists(r#""a""#, &types(r#""b\nc""#)), "wanted 1 to 120 printable characters"),
        ] {
            let words = refused(json);
            assert!(words.contains(wanted) && !words.contains('\n'), "{json}: {words}");
        }
    }
}
