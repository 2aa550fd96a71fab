//! Pages.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;

use super::plot::{Curve, losses, panel};
use super::table::{Found, comparison, of_evaluation, shown};
use super::{Gallery, Shot};
use crate::job::Phase;
use crate::ml::evaluate::METRICS;

/// Titles of the protocols, by their names in a report.
const PROTOCOLS: [(&str, &str, &str); 2] = [
    (
        "prompt_invariant",
        "One standard prompt (prompt-invariant)",
        "The product as it is: what it looks like, not where it stands.",
    ),
    (
        "prompt_varying",
        "A prompt each (prompt-varying)",
        "The product elsewhere: whether it stays itself and the prompt is heard.",
    ),
];

/// A training's report as a page.
///
/// * `report`: the training's `report.json`
/// * `gallery`: its pictures
pub fn page(report: &Value, gallery: &Gallery) -> String {
    let text = |key: &str| report[key].as_str().unwrap_or_default();
    let title = format!("{}, by {}", text("class_name"), text("method"));
    let bundle = &report["bundle"];
    let body = html! {
        h1 { (title) }
        p class="soft" {
            (report["steps"]) " steps on " (bundle["name"].as_str().unwrap_or("a bundle")) ", "
            (report["resolution"]) " pixels, seed " (report["seeds"]["training"]) ". "
            @if report["served_step"] != report["steps"] {
                "The weights of step " (report["served_step"]) " are served: they scored best."
            }
        }
        (warnings(report))
        (cards(&report["evaluation"]))
        @for (name, title, meaning) in PROTOCOLS { (pictures(report, gallery, name, title, meaning)) }
        (numbers(&report["evaluation"]))
        (trials(&report["trials"]))
        (refined(gallery))
        (curves(&report["curve"]))
        (facts(report))
    };
    whole(&title, &body)
}

/// Several methods on several subjects as a page: both tables, and what each method drew.
///
/// * `drawn`: for each of `all`, its report and its pictures
pub fn comparison_page(title: &str, all: &[Found<'_>], drawn: &[(&Value, &Gallery)]) -> String {
    let mut subjects: Vec<&str> = Vec::new();
    all.iter().for_each(|one| {
        if !subjects.contains(&one.subject) {
            subjects.push(one.subject);
        }
    });
    let body = html! {
        h1 { (title) }
        @for (i, (name, title, meaning)) in PROTOCOLS.iter().enumerate() {
            h2 { "Table " (i + 1) ". " (title) }
            p class="soft" { (meaning) " The best of each subject in bold." }
            (comparison(name, all).html())
        }
        @if let Some(pairing) = all.iter().find_map(|one| one.evaluation["pairing"].as_str()) {
            p class="soft" { small { (pairing) } }
        }
        @for subject in subjects {
            h2 { (subject) }
            @for (one, (report, gallery)) in all.iter().zip(drawn).filter(|(one, _)| one.subject == subject) {
                h3 { (one.recipe) }
                div class="grid small" { @for (i, shot) in gallery.pictures.iter().enumerate() {
                    (drawn_picture(shot, &report["images"][i]))
                } }
            }
        }
    };
    whole(title, &body)
}

fn whole(title: &str, body: &Markup) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                // It needs nothing from anywhere, and says so to the browser.
                meta http-equiv="Content-Security-Policy"
                    content="default-src 'none'; style-src 'unsafe-inline'; img-src data:";
                title { (title) }
                style { (PreEscaped(include_str!("style.css"))) }
            }
            body { (body) }
        }
    };
    page.into_string()
}

fn warnings(report: &Value) -> Markup {
    let warnings = report["warnings"].as_array().map_or(&[][..], Vec::as_slice);
    html! {
        @if !warnings.is_empty() {
            div class="warn" { ul { @for warning in warnings { li { (warning.as_str().unwrap_or_default()) } } } }
        }
    }
}

/// The few numbers to look at first.
fn cards(evaluation: &Value) -> Markup {
    let of_photos = |metric: &str| format!("photos among themselves: {}", shown(&evaluation["real"][metric]));
    let (invariant, varying) = (&evaluation["prompt_invariant"], &evaluation["prompt_varying"]);
    let cards = [
        ("likeness, DINO", &invariant["dino"], of_photos("dino")),
        ("likeness, CLIP-I", &invariant["clip_i"], of_photos("clip_i")),
        ("prompt, CLIP-T", &varying["clip_t"], "pictures of a prompt each".to_owned()),
        ("SSIM", &invariant["ssim"], "with the photos, pixel by pixel".to_owned()),
        ("PSNR", &invariant["psnr"], "dB, with the photos".to_owned()),
        (
            "class kept, PRES",
            &evaluation["pres"],
            "likeness of other things of the class: low is good".to_owned(),
        ),
    ];
    let known = cards.iter().filter(|(_, number, _)| number["value"].is_number());
    html! {
        div class="cards" { @for (title, number, beside) in known {
            div class="card" { span { (title) } b { (shown(number)) } span { (beside) } }
        } }
    }
}

/// The pictures of one protocol with their prompts and how near each is.
fn pictures(report: &Value, gallery: &Gallery, protocol: &str, title: &str, meaning: &str) -> Markup {
    let images = report["images"].as_array().map_or(&[][..], Vec::as_slice);
    let of_protocol: Vec<_> =
        gallery.pictures.iter().zip(images).filter(|(_, image)| image["protocol"] == protocol).collect();
    html! {
        @if !of_protocol.is_empty() {
            h2 { (title) }
            p class="soft" { (meaning) }
            div class="grid" { @for (shot, image) in of_protocol { (drawn_picture(shot, image)) } }
        }
    }
}

fn drawn_picture(shot: &Shot, image: &Value) -> Markup {
    let fidelity = &image["fidelity"];
    let near = fidelity["dino"].as_f64().or(fidelity["clip_i"].as_f64());
    let named = [("DINO", "dino"), ("CLIP-I", "clip_i"), ("CLIP-T", "clip_t")];
    let numbers =
        named.iter().filter_map(|(title, key)| Some(format!("{title} {:.3}", fidelity[key].as_f64()?)));
    let numbers: Vec<String> = numbers.chain([format!("seed {}", image["seed"])]).collect();
    html! {
        figure {
            (img(shot))
            @if let Some(near) = near {
                span class="bar" { i style={ "width:" (format!("{:.0}", near.clamp(0.0, 1.0) * 100.0)) "%" } {} }
            }
            figcaption { (shot.caption) br; small { (numbers.join(" · ")) } }
        }
    }
}

fn numbers(evaluation: &Value) -> Markup {
    if evaluation.is_null() {
        return html! { p class="soft" { "Nothing was evaluated." } };
    }
    let columns =
        [("prompt-invariant", "prompt_invariant"), ("prompt-varying", "prompt_varying"), ("photos", "real")];
    let of_column = |(column, key): (&'static str, &'static str)| {
        METRICS.iter().map(move |(name, title)| (format!("{title}, {column}"), &evaluation[key][*name]))
    };
    let single = [("PRES", "pres"), ("DIV", "div")].map(|(title, key)| (title.to_owned(), &evaluation[key]));
    let all = columns.into_iter().flat_map(of_column).chain(single).filter(|(_, number)| number.is_object());
    html! {
        h2 { "Numbers" }
        (of_evaluation(evaluation).html())
        p class="soft" { small { (evaluation["pairing"].as_str().unwrap_or_default()) } }
        details {
            summary { "What each number is made of" }
            div class="wide" { table class="facts" { tbody { @for (title, number) in all {
                tr { td { (title) } td { (made_of(number)) } }
            } } } }
        }
    }
}

/// A number's n, range, backbone and note, in one line.
fn made_of(number: &Value) -> String {
    let bound = |i: usize, open: &str| number["range"][i].as_f64().map_or(open.to_owned(), |v| v.to_string());
    let mut parts = Vec::new();
    if number["value"].is_number() {
        let of = number["of"].as_str().unwrap_or_default();
        parts.push(format!("mean of {} {of}", number["n"]));
        parts.push(format!("{} to {}", bound(0, "-∞"), bound(1, "∞")));
    }
    if let Some(name) = number["backbone"]["name"].as_str() {
        let hash = number["backbone"]["sha256"].as_str().unwrap_or_default();
        parts.push(format!("{name}, weights {}", hash.get(..12).unwrap_or(hash)));
    }
    parts.extend(number["note"].as_str().map(str::to_owned));
    parts.join("; ")
}

fn trials(trials: &Value) -> Markup {
    let all = trials.as_array().map_or(&[][..], Vec::as_slice);
    let curve = |name: &str| -> Curve {
        all.iter().filter_map(|trial| Some((trial["step"].as_f64()?, trial[name].as_f64()?))).collect()
    };
    html! {
        @if !all.is_empty() {
            h2 { "Which step is served" }
            p class="soft" {
                "At these steps a few pictures were scored: likeness to the photos, as a share of what they have among \
                 themselves, and adherence to prompts, as a share of what the untrained model has. The score is their \
                 harmonic mean; the best is served."
            }
            div class="plots" {
                @for (name, title) in [("score", "score"), ("likeness", "likeness"), ("adherence", "adherence")] {
                    (panel(title, &curve(name)))
                }
            }
        }
    }
}

/// What was learned from.
fn refined(gallery: &Gallery) -> Markup {
    let rows = [
        ("Photos", &gallery.photos),
        ("Where the product was found", &gallery.masks),
        ("Where the discriminator looks", &gallery.attention),
        ("Views that were learned from", &gallery.views),
    ];
    html! {
        h2 { "What it was learned from" }
        @for (title, shots) in rows.iter().filter(|(_, shots)| !shots.is_empty()) {
            h3 { (title) }
            div class="grid small" { @for shot in *shots {
                figure { (img(shot)) @if !shot.caption.is_empty() { figcaption { (shot.caption) } } }
            } }
        }
    }
}

fn curves(curve: &Value) -> Markup {
    let column = |name: &str| curve[name].as_array().map_or(&[][..], Vec::as_slice);
    let of = |name: &str| -> Curve {
        column("step")
            .iter()
            .zip(column(name))
            .filter_map(|(x, y)| Some((x.as_f64()?, y.as_f64()?)))
            .collect()
    };
    html! { h2 { "Losses" } div class="plots" { @for panel in losses(of) { (panel) } } }
}

/// Settings, hashes, seeds, prompts, times: everything of the report that is not shown elsewhere.
fn facts(report: &Value) -> Markup {
    let seconds = |phase: &Phase| report["seconds"][phase.as_str()].as_f64();
    let took = |phase: &Phase| Some((format!("time, {phase}"), format!("{:.1} s", seconds(phase)?)));
    let mut rows: Vec<(String, String)> = Phase::ALL.iter().filter_map(took).collect();
    for key in ["bundle", "seeds", "prompts", "instance_token", "background_token", "class_images", "hypnos"]
    {
        flat(key, &report[key], &mut rows);
    }
    let mut options = Vec::new();
    flat("", &report["options"], &mut options);
    html! {
        h2 { "How it came about" }
        (pairs(&rows))
        details { summary { "All settings" } (pairs(&options)) }
    }
}

fn pairs(rows: &[(String, String)]) -> Markup {
    html! {
        div class="wide" { table class="facts" { tbody { @for (key, value) in rows {
            tr { td { (key) } td { code { (value) } } }
        } } } }
    }
}

/// Every leaf of a value, by its dotted name. Lists are one leaf; long ones are cut.
fn flat(name: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                flat(&name, value, rows);
            }
        }
        Value::Null => {}
        Value::String(text) => rows.push((name.to_owned(), text.clone())),
        Value::Array(list) if list.len() > 16 => {
            let first: Vec<String> = list.iter().take(3).map(plain).collect();
            rows.push((name.to_owned(), format!("{}, … {} in all", first.join(", "), list.len())));
        }
        Value::Array(list) => {
            rows.push((name.to_owned(), list.iter().map(plain).collect::<Vec<_>>().join(", ")));
        }
        other => rows.push((name.to_owned(), other.to_string())),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn img(shot: &Shot) -> Markup {
    html! { img loading="lazy" alt=(shot.caption) src={ "data:image/webp;base64," (STANDARD.encode(&shot.webp)) }; }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn gallery() -> Gallery {
        let shot = |caption: &str| Shot { webp: vec![1, 2, 3], caption: caption.to_owned() };
        Gallery {
            photos: vec![shot("")],
            pictures: vec![shot("a photo of sks mug"), shot("a <b>mug</b> & \"more\"")],
            ..Gallery::default()
        }
    }

    fn report() -> Value {
        let number = json!({"value": 0.5, "n": 8, "of": "pairs", "range": [-1.0, 1.0], "better": "higher",
            "backbone": {"name": "dino_vits16", "sha256": "0123456789abcdef"}, "note": "indicative: 2 pictures"});
        json!({
            "class_name": "<script>alert(1)</script>", "method": "hypnos", "steps": 8, "served_step": 4,
            "seconds": {"training": 12.5}, "options": {"views": {"n": 64}, "seed": null},
            "images": [
                {"seed": 1, "protocol": "prompt_invariant", "fidelity": {"dino": 0.75}},
                {"seed": 2, "protocol": "prompt_varying", "fidelity": {}},
            ],
            "evaluation": {"prompt_invariant": {"dino": number}, "real": {}, "pairing": "every one"},
            "trials": [{"step": 4, "likeness": 0.5, "adherence": 0.5, "score": 0.5}],
            "curve": {"step": [1, 2], "loss": [0.5, 0.25], "prior": [null, null]},
            "warnings": ["small photos"],
        })
    }

    #[test]
    fn a_page_needs_nothing_beside_it_and_escapes_what_clients_wrote() {
        let page = page(&report(), &gallery());
        assert!(!page.contains("<script") && page.contains("&lt;script&gt;alert(1)"), "{page}");
        assert!(page.contains("a &lt;b&gt;mug&lt;/b&gt; &amp; &quot;more&quot;"), "{page}");
        for outside in ["http://", "https://", "src=\"/", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(page.contains("data:image/webp;base64,AQID"));
        assert!(page.contains("prefers-color-scheme:dark") && page.contains("width=device-width"));
    }

    #[test]
    fn a_page_says_what_the_report_says() {
        let page = page(&report(), &gallery());
        for wanted in [
            "weights of step 4 are served",
            "mean of 8 pairs; -1 to 1; dino_vits16, weights 0123456789ab; indicative: 2 pictures",
            "width:75%",
            "views.n",
            "time, training",
            "12.5 s",
            "small photos",
            "every one",
        ] {
            assert!(page.contains(wanted), "{wanted}");
        }
        assert_eq!(page.matches("<svg").count(), 3 + 1, "three of the trials, one loss");
        assert!(!page.contains("prior preservation"), "it was not computed");
    }

    #[test]
    fn a_comparison_shows_each_subject_s_pictures_under_their_method() {
        let (report, gallery) = (report(), gallery());
        let found = |recipe| Found { recipe, subject: "mug", evaluation: &report["evaluation"] };
        let all = [found("hypnos"), found("dreambooth")];
        let page = comparison_page("A comparison", &all, &[(&report, &gallery), (&report, &gallery)]);
        assert_eq!(page.matches("<h3>").count(), 2);
        assert_eq!(page.matches("<h2>").count(), 2 + 1, "two tables, one subject");
        assert_eq!(page.matches("data:image").count(), 4);
    }
}
