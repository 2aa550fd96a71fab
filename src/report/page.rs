//! A training's report as a page of HTML, and several trainings side by side.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::{Value, json};

use super::document::{Report, ReportImage, TrialScores};
use super::plot::{losses, panel};
use super::scores::{Metric, Protocol, Score, Scores};
use super::table::{Evaluated, comparison_table, formatted, scores_table};
use super::{Gallery, Thumbnail};
use crate::job::Phase;

/// The protocols with their titles and what they show.
const PROTOCOLS: [(Protocol, &str, &str); 2] = [
    (
        Protocol::PromptInvariant,
        "One standard prompt (prompt-invariant)",
        "The product as it is: what it looks like, not where it stands.",
    ),
    (
        Protocol::PromptVarying,
        "A prompt each (prompt-varying)",
        "The product in other scenes: whether it stays recognisable, and whether the prompt is followed.",
    ),
];

/// A training's report as a page.
///
/// * `report`: the training's report
/// * `gallery`: its pictures
pub fn page(report: &Report, gallery: &Gallery) -> String {
    let title = format!("{}, by {}", report.class_name, report.method);
    let body = html! {
        h1 { (title) }
        p class="soft" {
            (report.steps) " steps on " (report.bundle.name) ", " (report.resolution) " pixels, seed "
            (report.seeds.training) ". "
            @if let Some(step) = report.served_step.filter(|&step| step != report.steps) {
                "The weights of step " (step) " are served: they scored best."
            }
        }
        (warnings(&report.warnings))
        @if let Some(scores) = &report.evaluation { (cards(scores)) }
        @for (protocol, title, meaning) in PROTOCOLS { (pictures(report, gallery, protocol, title, meaning)) }
        @match &report.evaluation {
            Some(scores) => { (numbers(scores)) }
            None => { p class="soft" { "Nothing was evaluated." } }
        }
        (trials(&report.trials))
        (training_pictures(gallery))
        h2 { "Losses" }
        div class="plots" { @for panel in losses(&report.curve) { (panel) } }
        (facts(report))
    };
    html_page(&title, &body)
}

/// Several methods on several subjects as a page: both tables, and the pictures of each method.
///
/// * `drawn`: for each of `all`, its report and its pictures
pub fn comparison_page(title: &str, all: &[Evaluated<'_>], drawn: &[(&Report, &Gallery)]) -> String {
    let mut subjects: Vec<&str> = Vec::new();
    all.iter().for_each(|one| {
        if !subjects.contains(&one.subject) {
            subjects.push(one.subject);
        }
    });
    let body = html! {
        h1 { (title) }
        @for (i, (protocol, title, meaning)) in PROTOCOLS.into_iter().enumerate() {
            h2 { "Table " (i + 1) ". " (title) }
            p class="soft" { (meaning) " The best of each subject in bold." }
            (comparison_table(protocol, all).html())
        }
        @if let Some(scores) = all.iter().find_map(|one| one.scores) {
            p class="soft" { small { (scores.pairing) } }
        }
        @for subject in subjects {
            h2 { (subject) }
            @for (one, (report, gallery)) in all.iter().zip(drawn).filter(|(one, _)| one.subject == subject) {
                h3 { (one.method) }
                div class="grid small" { @for (thumbnail, image) in gallery.pictures.iter().zip(&report.images) {
                    (generated_picture(thumbnail, image))
                } }
            }
        }
    };
    html_page(title, &body)
}

/// A whole HTML document.
fn html_page(title: &str, body: &Markup) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                // The page needs nothing from anywhere, so the browser need not load anything.
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

fn warnings(warnings: &[String]) -> Markup {
    html! {
        @if !warnings.is_empty() {
            div class="warn" { ul { @for warning in warnings { li { (warning) } } } }
        }
    }
}

/// The scores to look at first.
fn cards(scores: &Scores) -> Markup {
    let of_photos = |score: &Score| format!("photos among themselves: {}", formatted(Some(score)));
    let (invariant, varying) = (scores.prompt_invariant.as_ref(), scores.prompt_varying.as_ref());
    let cards = [
        ("likeness, DINO", invariant.map(|of| &of.dino), of_photos(&scores.real.dino)),
        ("likeness, CLIP-I", invariant.map(|of| &of.clip_i), of_photos(&scores.real.clip_i)),
        ("prompt adherence, CLIP-T", varying.map(|of| &of.clip_t), "pictures of a prompt each".to_owned()),
        ("SSIM", invariant.map(|of| &of.ssim), "with the photos, pixel by pixel".to_owned()),
        ("PSNR", invariant.map(|of| &of.psnr), "dB, with the photos".to_owned()),
        (
            "class preservation, PRES",
            Some(&scores.pres),
            "likeness of other objects of the class to the photos: lower is better".to_owned(),
        ),
    ];
    let known = cards.iter().filter(|(_, score, _)| score.is_some_and(|score| score.value.is_some()));
    html! {
        div class="cards" { @for (title, score, explanation) in known {
            div class="card" { span { (title) } b { (formatted(*score)) } span { (explanation) } }
        } }
    }
}

/// The pictures of one protocol with their prompts and scores.
fn pictures(report: &Report, gallery: &Gallery, protocol: Protocol, title: &str, meaning: &str) -> Markup {
    let all = gallery.pictures.iter().zip(&report.images);
    let of_protocol: Vec<_> = all.filter(|(_, image)| image.protocol == Some(protocol)).collect();
    html! {
        @if !of_protocol.is_empty() {
            h2 { (title) }
            p class="soft" { (meaning) }
            div class="grid" {
                @for (thumbnail, image) in of_protocol { (generated_picture(thumbnail, image)) }
            }
        }
    }
}

/// A picture with a bar for its likeness to the photos.
fn generated_picture(thumbnail: &Thumbnail, image: &ReportImage) -> Markup {
    let fidelity = image.fidelity.as_ref();
    let likeness = fidelity.and_then(|scores| scores.dino.or(scores.clip_i));
    let scores = fidelity.map_or([None; 3], |scores| [scores.dino, scores.clip_i, scores.clip_t]);
    let scores = ["DINO", "CLIP-I", "CLIP-T"].into_iter().zip(scores);
    let scores = scores.filter_map(|(title, score)| Some(format!("{title} {:.3}", score?)));
    let numbers: Vec<String> = scores.chain([format!("seed {}", image.seed)]).collect();
    html! {
        figure {
            (img(thumbnail))
            @if let Some(likeness) = likeness {
                span class="bar" { i style={ "width:" (format!("{:.0}", likeness.clamp(0.0, 1.0) * 100.0)) "%" } {} }
            }
            figcaption { (thumbnail.caption) br; small { (numbers.join(" · ")) } }
        }
    }
}

fn numbers(scores: &Scores) -> Markup {
    let of_protocol = |column: &'static str, protocol: Protocol| {
        let scores = scores.protocol(protocol).into_iter();
        scores.flat_map(move |of| {
            Metric::ALL.map(|metric| (format!("{}, {column}", metric.title()), of.score(metric)))
        })
    };
    let of_photos = Metric::ALL
        .into_iter()
        .filter_map(|metric| Some((format!("{}, photos", metric.title()), scores.real.score(metric)?)));
    let single = [("PRES".to_owned(), &scores.pres), ("DIV".to_owned(), &scores.div)];
    let all = of_protocol("prompt-invariant", Protocol::PromptInvariant)
        .chain(of_protocol("prompt-varying", Protocol::PromptVarying))
        .chain(of_photos)
        .chain(single);
    html! {
        h2 { "Numbers" }
        (scores_table(scores).html())
        p class="soft" { small { (scores.pairing) } }
        details {
            summary { "What each number is made of" }
            div class="wide" { table class="facts" { tbody { @for (title, score) in all {
                tr { td { (title) } td { (made_of(score)) } }
            } } } }
        }
    }
}

/// A score's n, range, network and note, in one line.
fn made_of(score: &Score) -> String {
    let mut parts = Vec::new();
    if score.value.is_some() {
        let [low, high] = score.range;
        let bound = |bound: Option<f64>, none: &str| bound.map_or(none.to_owned(), |value| value.to_string());
        parts.push(format!("mean of {} {}", score.n, score.of));
        parts.push(format!("{} to {}", bound(low, "-∞"), bound(high, "∞")));
    }
    if let Some(network) = &score.backbone {
        let hash = network.sha256.get(..12).unwrap_or(&network.sha256);
        parts.push(format!("{}, weights {hash}", network.name));
    }
    parts.extend(score.note.clone());
    parts.join("; ")
}

fn trials(trials: &[TrialScores]) -> Markup {
    let points = |of: fn(&TrialScores) -> f64| -> Vec<(f64, f64)> {
        trials.iter().map(|trial| (trial.step as f64, of(trial))).collect()
    };
    html! {
        @if !trials.is_empty() {
            h2 { "Which step is served" }
            p class="soft" {
                "After each of these steps a few pictures were scored: likeness to the photos, as a share of the \
                 photos' likeness among themselves, and adherence to prompts, as a share of the untrained model's. \
                 The score is the harmonic mean of both; the step with the best score is served."
            }
            div class="plots" {
                (panel("score", &points(|trial| trial.score)))
                (panel("likeness", &points(|trial| trial.likeness)))
                (panel("adherence", &points(|trial| trial.adherence)))
            }
        }
    }
}

/// The pictures that were learned from.
fn training_pictures(gallery: &Gallery) -> Markup {
    let rows = [
        ("Photos", &gallery.photos),
        ("Masks of the product", &gallery.masks),
        ("Attention of the discriminator", &gallery.attention),
        ("Views that were learned from", &gallery.views),
    ];
    html! {
        h2 { "What the model learned from" }
        @for (title, thumbnails) in rows.iter().filter(|(_, thumbnails)| !thumbnails.is_empty()) {
            h3 { (title) }
            div class="grid small" { @for thumbnail in *thumbnails {
                figure {
                    (img(thumbnail))
                    @if !thumbnail.caption.is_empty() { figcaption { (thumbnail.caption) } }
                }
            } }
        }
    }
}

/// Times, hashes, seeds, prompts and settings: everything of the report that is not shown elsewhere.
fn facts(report: &Report) -> Markup {
    let time =
        |phase: &Phase| Some((format!("time, {phase}"), format!("{:.1} s", report.seconds.get(phase)?)));
    let mut rows: Vec<(String, String)> = Phase::ALL.iter().filter_map(time).collect();
    for (name, value) in [
        ("bundle", json!(report.bundle)),
        ("seeds", json!(report.seeds)),
        ("prompts", json!(report.prompts)),
        ("instance_token", json!(report.instance_token)),
        ("background_token", json!(report.background_token)),
        ("class_images", json!(report.class_images)),
        ("hypnos", json!(report.version)),
        ("precision", json!(report.precision)),
    ] {
        flatten(name, &value, &mut rows);
    }
    let mut options = Vec::new();
    flatten("", &report.options, &mut options);
    html! {
        h2 { "How the model was trained" }
        (fact_table(&rows))
        details { summary { "All settings" } (fact_table(&options)) }
    }
}

fn fact_table(rows: &[(String, String)]) -> Markup {
    html! {
        div class="wide" { table class="facts" { tbody { @for (key, value) in rows {
            tr { td { (key) } td { code { (value) } } }
        } } } }
    }
}

/// Every leaf of a value, by its dotted name. Lists are one leaf; long ones are cut.
fn flatten(name: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                flatten(&name, value, rows);
            }
        }
        Value::Null => {}
        Value::Array(list) if list.len() > 16 => {
            let first: Vec<String> = list.iter().take(3).map(text).collect();
            rows.push((name.to_owned(), format!("{}, … {} in all", first.join(", "), list.len())));
        }
        Value::Array(list) => {
            rows.push((name.to_owned(), list.iter().map(text).collect::<Vec<_>>().join(", ")));
        }
        leaf => rows.push((name.to_owned(), text(leaf))),
    }
}

/// A string without its quotes; anything else as JSON.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn img(thumbnail: &Thumbnail) -> Markup {
    let data = STANDARD.encode(&thumbnail.webp);
    html! { img loading="lazy" alt=(thumbnail.caption) src={ "data:image/webp;base64," (data) }; }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::report::document::LossCurve;
    use crate::report::scores::{PictureScores, example};

    fn gallery() -> Gallery {
        let thumbnail = |caption: &str| Thumbnail { webp: vec![1, 2, 3], caption: caption.to_owned() };
        Gallery {
            photos: vec![thumbnail("")],
            pictures: vec![thumbnail("a photo of sks mug"), thumbnail("a <b>mug</b> & \"more\"")],
            ..Gallery::default()
        }
    }

    fn report() -> Report {
        let image = |seed, protocol, dino| ReportImage {
            prompt: String::new(),
            seed,
            protocol: Some(protocol),
            fidelity: Some(PictureScores { dino, clip_i: None, clip_t: None }),
        };
        Report {
            class_name: "<script>alert(1)</script>".into(),
            steps: 8,
            served_step: Some(4),
            seconds: BTreeMap::from([(Phase::Training, 12.5)]),
            options: json!({ "views": { "n": 64 }, "seed": null }),
            images: vec![
                image(1, Protocol::PromptInvariant, Some(0.75)),
                image(2, Protocol::PromptVarying, None),
            ],
            evaluation: Some(example(Some(0.5), None)),
            trials: vec![TrialScores { step: 4, likeness: 0.5, adherence: 0.5, score: 0.5 }],
            curve: LossCurve {
                step: vec![1, 2],
                loss: vec![Some(0.5), Some(0.25)],
                prior: vec![None, None],
                ..LossCurve::default()
            },
            warnings: vec!["small photos".into()],
            ..Report::default()
        }
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
        let evaluated = |method| Evaluated { method, subject: "mug", scores: report.evaluation.as_ref() };
        let all = [evaluated("hypnos"), evaluated("dreambooth")];
        let page = comparison_page("A comparison", &all, &[(&report, &gallery), (&report, &gallery)]);
        assert_eq!(page.matches("<h3>").count(), 2);
        assert_eq!(page.matches("<h2>").count(), 2 + 1, "two tables, one subject");
        assert_eq!(page.matches("data:image").count(), 4);
    }
}
