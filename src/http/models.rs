//! `/v1/models`: the models that workers hold, and the choice of one for a training.

use std::collections::HashSet;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::auth::Reader;
use super::problem::{Kind, Problem, excerpt};
use super::state::AppState;
use super::submit::random_seed;
use super::upload::TrainRequest;
use super::view::time;
use crate::job::{
    Invalid, Method, ModelDrawing, ModelPart, ModelRef, TrainOptions, TrainSpec, Warning, WarningCode,
};
use crate::store::{ModelDevice, RegisteredModel};

/// A model that workers hold, or held.
#[derive(Serialize, ToSchema)]
#[schema(as = Model)]
pub(super) struct ModelView {
    /// Its name, as jobs name it.
    #[schema(example = "sd15")]
    name: String,
    /// SHA-256 of its files.
    #[schema(pattern = "^[0-9a-f]{64}$")]
    sha256: String,
    /// Its family.
    #[schema(example = "sd15")]
    family: String,
    /// Whether it is trained where a job names no model.
    default: bool,
    /// Side of the pictures that it draws by default, in pixels.
    #[schema(minimum = 8)]
    resolution: u32,
    /// The optional parts that any worker so far had; `workers` says what the running ones lack.
    parts: Vec<ModelPart>,
    /// How it draws where a sample does not say.
    drawing: ModelDrawing,
    /// What each method needs of it, and the options that are taken where a job names none.
    methods: Vec<ModelMethod>,
    /// The devices of running workers that hold it; empty if none does: then its jobs wait.
    workers: Vec<WorkerView>,
    /// When a worker registered it last.
    #[schema(format = DateTime, example = "2026-11-24T09:00:00.123Z")]
    registered_at: String,
}

/// A method, for one model.
#[derive(Serialize, ToSchema)]
struct ModelMethod {
    /// The method.
    method: Method,
    /// Whether it trains this model with the default options.
    usable: bool,
    /// Parts that it needs and the model lacks.
    lacks: Vec<ModelPart>,
    /// All options as they are where a job names none.
    options: TrainOptions,
}

/// A device that holds a model.
#[derive(Serialize, ToSchema)]
#[schema(as = ModelWorker)]
struct WorkerView {
    /// The device.
    #[schema(example = "cuda:0")]
    device: String,
    /// Its memory in bytes; null if it is the machine's.
    #[schema(minimum = 0)]
    memory_bytes: Option<i64>,
    /// The parts of the model that its worker does not have: other workers take the jobs that need them.
    lacks: Vec<ModelPart>,
}

/// The models.
#[derive(Serialize, ToSchema)]
pub(super) struct ModelList {
    /// The models, the last registered first.
    data: Vec<ModelView>,
}

impl ModelView {
    fn of(model: &RegisteredModel, default: bool) -> Result<Self, Problem> {
        let RegisteredModel { card, registered_ms, devices } = model;
        let method = |&method: &Method| {
            let options = card.options(&json!({ "method": method }));
            let options = options.map_err(|invalid| Problem::internal(&invalid))?;
            let lacks: Vec<_> = card.lacking(&options).into_iter().map(|(part, ..)| part).collect();
            Ok::<_, Problem>(ModelMethod { method, usable: card.check(&options).is_ok(), lacks, options })
        };
        Ok(Self {
            name: card.name.clone(),
            sha256: card.sha256.clone(),
            family: card.family.clone(),
            default,
            resolution: card.resolution,
            parts: card.parts.clone(),
            drawing: card.drawing,
            methods: Method::ALL.iter().map(method).collect::<Result<_, _>>()?,
            workers: devices
                .iter()
                .map(|ModelDevice { name, memory_bytes, lacks }| WorkerView {
                    device: name.clone(),
                    memory_bytes: *memory_bytes,
                    lacks: lacks.clone(),
                })
                .collect(),
            registered_at: time(*registered_ms),
        })
    }
}

/// Lists models
///
/// Every model that a worker has registered, with the devices that hold it now and, for each method, the options that a
/// job takes where it names none.
#[utoipa::path(
    get, path = "/v1/models", tag = "models",
    responses((status = 200, description = "The models", body = ModelList)),
)]
pub(super) async fn list_models(State(app): State<AppState>, _: Reader) -> Result<Json<ModelList>, Problem> {
    let registered = app.store.models().await?;
    let default = match choose(&registered, None, app.settings.default_model.as_deref()) {
        Ok(Choice::Registered(model)) => Some(model.card.sha256.clone()),
        _ => None,
    };
    let view = |model: &RegisteredModel| ModelView::of(model, default.as_ref() == Some(&model.card.sha256));
    Ok(Json(ModelList { data: registered.iter().map(view).collect::<Result<_, _>>()? }))
}

/// The specification of a requested training: its model chosen, and every option resolved if that model is known.
pub(super) async fn resolve(app: &AppState, request: TrainRequest) -> Result<TrainSpec, Problem> {
    let TrainRequest { class_name, model, options } = request;
    let at_options = |invalid: Invalid| match invalid.pointer.as_str() {
        "/class_name" => Problem::from(invalid),
        pointer => Problem::from(Invalid { pointer: format!("/options{pointer}"), ..invalid }),
    };
    let registered = app.store.models().await?;
    let seed = random_seed()?;
    match choose(&registered, model.as_deref(), app.settings.default_model.as_deref()) {
        Ok(Choice::Registered(model)) => {
            let mut spec =
                TrainSpec::of_model(&model.card, &class_name, &options, seed).map_err(at_options)?;
            let words = app.vocabularies.get(&app.store, &model.card.sha256).await?;
            model.card.check_tokens(&spec.options, |word| words.contains(word)).map_err(at_options)?;
            spec.warnings.extend(model.card.class_warning(&spec.class_name, |word| words.contains(word)));
            Ok(spec)
        }
        Ok(Choice::Unknown(name)) => {
            let listed = |name: &str| app.settings.models.iter().any(|listed| listed == name);
            if let Some(name) = name.filter(|name| !listed(name)) {
                return Err(unknown_model(name, &registered));
            }
            open_spec(&class_name, name, options, seed).map_err(at_options)
        }
        Err(several) => Err(several),
    }
}

/// A training whose options wait for a worker that holds its model.
fn open_spec(class_name: &str, model: Option<&str>, given: Value, seed: u64) -> Result<TrainSpec, Invalid> {
    let options = TrainOptions::given(&given)?;
    let spec = TrainSpec::new(class_name, options, seed)?;
    let open = Warning::new(
        WarningCode::OptionsOpen,
        "no worker has registered the model yet: the one that takes the job decides options that were left out",
    );
    Ok(TrainSpec {
        model: model.map(|name| ModelRef { name: name.to_owned(), sha256: None }),
        open_options: Some(given),
        warnings: vec![open],
        ..spec
    })
}

/// Which model a training gets.
enum Choice<'a> {
    Registered(&'a RegisteredModel),
    /// No worker has registered it; none if the request names none either.
    Unknown(Option<&'a str>),
}

/// The model called `asked`, or else `default`, or else the only one: among those of that name the one that a worker
/// holds now, else the last registered. A problem if there are several to choose from.
fn choose<'a>(
    registered: &'a [RegisteredModel],
    asked: Option<&'a str>,
    default: Option<&'a str>,
) -> Result<Choice<'a>, Problem> {
    let best = |name: &str| {
        let called =
            || registered.iter().filter(|model| model.card.name == name || model.card.sha256 == name);
        called().find(|model| !model.devices.is_empty()).or_else(|| called().next())
    };
    if let Some(name) = asked.or(default) {
        return Ok(best(name).map_or(Choice::Unknown(Some(name)), Choice::Registered));
    }
    let names = |running: bool| {
        let of = registered.iter().filter(|model| !running || !model.devices.is_empty());
        of.map(|model| model.card.name.as_str()).collect::<HashSet<_>>()
    };
    let (running, all) = (names(true), names(false));
    let names = if running.is_empty() { all } else { running };
    match names.len() {
        0 => Ok(Choice::Unknown(None)),
        1 => Ok(names.into_iter().next().and_then(best).map_or(Choice::Unknown(None), Choice::Registered)),
        _ => {
            let mut names: Vec<_> = names.into_iter().collect();
            names.sort_unstable();
            let detail = format!("/model: is missing; wanted one of {}", names.join(", "));
            Err(Problem::new(Kind::Field, detail).at("/model"))
        }
    }
}

fn unknown_model(name: &str, registered: &[RegisteredModel]) -> Problem {
    let mut known: Vec<_> = registered.iter().map(|model| model.card.name.as_str()).collect();
    known.sort_unstable();
    known.dedup();
    let known = if known.is_empty() { "none".into() } else { known.join(", ") };
    let name = excerpt(name);
    let detail = format!("/model: no worker has registered a model {name:?}; registered: {known}");
    Problem::new(Kind::Field, detail).at("/model")
}

/// Warnings about a class for the model that a training would get; none if that is not known.
pub(super) async fn class_warnings(
    app: &AppState,
    class_name: &str,
    model: Option<&str>,
) -> Result<Vec<Warning>, Problem> {
    let registered = app.store.models().await?;
    match choose(&registered, model, app.settings.default_model.as_deref()) {
        Ok(Choice::Registered(model)) => {
            let words = app.vocabularies.get(&app.store, &model.card.sha256).await?;
            let warning = model.card.class_warning(class_name, |word| words.contains(word));
            Ok(warning.into_iter().collect())
        }
        Ok(Choice::Unknown(Some(name))) if model.is_some() => Err(unknown_model(name, &registered)),
        _ => Ok(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::job::{ModelCard, Scheduler};

    fn model(name: &str, sha256: &str, running: bool) -> RegisteredModel {
        let card = ModelCard {
            name: name.into(),
            sha256: sha256.into(),
            family: String::new(),
            resolution: 64,
            parts: Vec::new(),
            drawing: ModelDrawing { scheduler: Scheduler::Ddim, guidance: 1.0 },
            training: BTreeMap::new(),
            classes: None,
            rare_tokens: None,
        };
        let device = ModelDevice { name: "cpu".into(), memory_bytes: None, lacks: Vec::new() };
        RegisteredModel { card, registered_ms: 0, devices: running.then_some(device).into_iter().collect() }
    }

    /// The chosen hash; `?` and the name for a model that is not registered; `!` if there are several.
    fn chosen(registered: &[RegisteredModel], asked: Option<&str>, default: Option<&str>) -> String {
        match choose(registered, asked, default) {
            Ok(Choice::Registered(model)) => model.card.sha256.clone(),
            Ok(Choice::Unknown(name)) => format!("?{}", name.unwrap_or_default()),
            Err(_) => "!".into(),
        }
    }

    #[test]
    fn the_only_model_is_chosen_and_of_several_the_named_or_the_default() {
        assert_eq!(chosen(&[], None, None), "?");
        assert_eq!(chosen(&[], Some("a"), None), "?a");
        let one = [model("a", "1", false)];
        assert_eq!(chosen(&one, None, None), "1", "one that no worker holds now");
        let two = [model("a", "1", true), model("b", "2", true)];
        assert_eq!(chosen(&two, None, None), "!");
        assert_eq!(chosen(&two, Some("b"), Some("a")), "2");
        assert_eq!(chosen(&two, None, Some("a")), "1");
        assert_eq!(chosen(&two, Some("2"), None), "2", "by its hash");
        let replaced = [model("a", "1", false), model("b", "2", true)];
        assert_eq!(chosen(&replaced, None, None), "2", "the only one that a worker holds");
    }

    #[test]
    fn of_two_with_one_name_the_one_that_a_worker_holds_is_chosen() {
        let two = [model("a", "new", false), model("a", "old", true)];
        assert_eq!(chosen(&two, Some("a"), None), "old");
        assert_eq!(chosen(&two, None, None), "old");
        let both = [model("a", "new", true), model("a", "old", true)];
        assert_eq!(chosen(&both, None, None), "new", "the last registered");
    }
}
