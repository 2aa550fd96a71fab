//! Names of methods and their ablations, and their training options.

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value, json};

use crate::cli::train::set;
use crate::job::{Method, TrainOptions, merge_json};
use crate::ml::bundle::Manifest;

/// Parts that can be left out of a method (section 4.2 of arXiv 2410.14265).
const PARTS: [&str; 5] = ["s_p", "perceptual", "discriminator", "views", "prior"];

/// A method, the parts left out of it, and its learning rate: `hypnos-no-s_p`, `dreambooth@1e-6`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Recipe {
    method: Method,
    without: Vec<&'static str>,
    learning_rate: Option<f64>,
    /// As it was written.
    name: String,
}

impl FromStr for Recipe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = |what: &str| {
            let all: Vec<&str> = Method::ALL.iter().map(|method| method.as_str()).collect();
            let (all, parts) = (all.join(", "), PARTS.join(", "));
            format!(
                "{text:?}: {what}; wanted METHOD[-no-PART][@RATE], METHOD one of {all}, PART one of {parts}"
            )
        };
        let (words, rate) = match text.split_once('@') {
            Some((words, rate)) => (words, Some(rate)),
            None => (text, None),
        };
        let mut words = words.split("-no-");
        let method = words.next().unwrap_or_default().parse();
        let method: Method = method.map_err(|_| refused("is not a method"))?;
        let without = words.map(|word| PARTS.into_iter().find(|part| *part == word));
        let without = without.collect::<Option<_>>().ok_or_else(|| refused("omits an unknown part"))?;
        let learning_rate = rate.map(str::parse).transpose();
        let learning_rate = learning_rate.map_err(|_| refused("has an invalid learning rate"))?;
        Ok(Self { method, without, learning_rate, name: text.to_owned() })
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Recipe {
    /// The options of a training. Later ones override earlier ones: what suits the `bundle` for this method, what is
    /// `common` to all, what was `asked` for, and the recipe itself.
    pub(super) fn options(
        &self,
        bundle: &Manifest,
        common: &Value,
        asked: &Map<String, Value>,
    ) -> Map<String, Value> {
        let mut all = bundle.suited(self.method.as_str());
        merge_json(&mut all, common);
        merge_json(&mut all, &Value::Object(asked.clone()));
        let mut all = all.as_object().cloned().unwrap_or_default();
        all.insert("method".to_owned(), json!(self.method));
        let steps = all.get("steps").cloned().unwrap_or_else(|| json!(TrainOptions::of(self.method).steps));
        let without = self.without.iter().map(|part| match *part {
            "s_p" => ("s_p", steps.clone()), // it counts to the end
            "perceptual" => ("loss_weights.perceptual", json!(0.0)),
            "discriminator" => ("loss_weights.discriminator", json!(0.0)),
            "views" => ("views.enabled", json!(false)),
            _ => ("loss_weights.prior", json!(0.0)),
        });
        let rate = self.learning_rate.map(|rate| ("learning_rate", json!(rate)));
        for (key, value) in without.chain(rate) {
            // If the path leads through something other than an object, the options' own check reports it.
            let _ = set(&mut all, key, value);
        }
        all
    }
}

/// The class name from the name of a directory: `rattan_chair-2` is a rattan chair.
pub(super) fn class_of(name: &str) -> String {
    let words = name.trim_end_matches(|c: char| c.is_ascii_digit() || matches!(c, '-' | '_' | ' '));
    words.replace(['_', '-'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(recipe: &str, common: &Value, asked: &Value) -> Map<String, Value> {
        let recipe: Recipe = recipe.parse().expect("a recipe");
        let suited =
            json!({"training": {"dreambooth": {"steps": 30, "learning_rate": 1e-4, "class_images": 7}}});
        let bundle: Manifest = serde_json::from_value(suited).expect("a manifest");
        recipe.options(&bundle, common, asked.as_object().expect("an object"))
    }

    #[test]
    fn a_name_says_method_ablations_and_learning_rate() {
        let asked = json!({"steps": 40, "loss_weights": {"prior": 0.5}, "evaluation": {"steps": 5}});
        let common = json!({"evaluation": {"images": 8, "steps": 25}});
        let found = options("hypnos-no-s_p-no-perceptual@3e-6", &common, &asked);
        let wanted = json!({
            "method": "hypnos", "steps": 40, "s_p": 40, "learning_rate": 3e-6,
            "loss_weights": {"prior": 0.5, "perceptual": 0.0}, "evaluation": {"images": 8, "steps": 5},
        });
        assert_eq!(Value::Object(found), wanted);
        let found = options("hypnos-no-s_p", &json!({}), &json!({}));
        assert_eq!(found["s_p"], 800, "the method's own steps");
        let found = options("dreambooth@2e-4", &common, &json!({"steps": 40}));
        let suited = [&found["class_images"], &found["steps"], &found["learning_rate"]].map(Value::to_string);
        assert_eq!(suited, ["7", "40", "0.0002"], "what suits the bundle lies below all else");
    }

    #[test]
    fn what_is_no_recipe_is_refused_in_one_line_that_names_all() {
        for (text, wanted) in [
            ("hypno", "is not a method"),
            ("hypnos-no-magic", "omits an unknown part"),
            ("dreambooth@fast", "has an invalid learning rate"),
            ("", "is not a method"),
        ] {
            let words = text.parse::<Recipe>().expect_err("refused");
            assert!(words.contains(wanted) && words.contains("textual_inversion"), "{words}");
            assert!(words.contains("s_p") && !words.contains('\n'), "{words}");
        }
    }

    #[test]
    fn a_directory_is_named_for_its_class() {
        assert_eq!(["mug", "rattan_chair-2", "toy-car"].map(class_of), ["mug", "rattan chair", "toy car"]);
    }
}
