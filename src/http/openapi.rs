//! The OpenAPI document: the handlers' own descriptions, completed with what is common to all of them.
//!
//! An operation lists its problem types by slug (`x-problems`); here they become responses, one for each status,
//! together with those that any operation may return.

use serde_json::{Map, Value, json};
use utoipa::OpenApi;

use super::problem::{self, Document, Kind};
use super::routes::{api, public};
use crate::job::{CLASS_NAME_PATTERN, PROMPT_PATTERN, STEPS_MAX, template_pattern};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Hypnos",
        description = "Turns 3-5 photos of a product into a model that draws that product anywhere.",
    ),
    components(schemas(Document)),
    tags(
        (name = "jobs", description = "Trainings: photos in, a model out."),
        (name = "samples", description = "Pictures drawn with a training's result."),
        (name = "models", description = "What the workers hold."),
        (name = "photos", description = "Photos, inspected before a job is created."),
        (name = "files", description = "Files by signed URLs."),
        (name = "operations", description = "For operators of the server."),
    ),
)]
struct ApiDoc;

/// Problems that any operation may return.
const COMMON: [Kind; 3] = [Kind::Internal, Kind::Unavailable, Kind::Overloaded];
/// Problems that any operation with a key may return, those of a server without keys included.
const AUTHENTICATED: [Kind; 7] = [
    Kind::KeyInQuery,
    Kind::Unauthorized,
    Kind::TenantDisabled,
    Kind::Proxied,
    Kind::Host,
    Kind::CrossSite,
    Kind::TooMany,
];

/// The OpenAPI document as indented JSON; the same bytes every time.
pub fn openapi() -> String {
    let mut text = serde_json::to_string_pretty(&document()).expect("a document is plain JSON");
    text.push('\n');
    text
}

/// The OpenAPI document.
pub(super) fn document() -> Value {
    let mut spec = ApiDoc::openapi();
    spec.merge(api().into_openapi());
    spec.merge(public().into_openapi());
    let mut document = serde_json::to_value(&spec).expect("a document is plain JSON");
    document["info"].as_object_mut().expect("an object").remove("license");
    document["components"]["securitySchemes"] = json!({
        "key": { "type": "http", "scheme": "bearer", "bearerFormat": "hyp_ID_SECRET",
            "description": "An API key from `hypnos keys create`. A server on loopback may do without." }
    });
    document["components"]["headers"] = json!({
        "X-Request-Id": {
            "description": "Id of the request in the server's log; the client's own if it sent one",
            "schema": { "type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$" }
        },
        "Retry-After": {
            "description": "Seconds to wait before trying again",
            "schema": { "type": "integer", "minimum": 0 }
        }
    });
    document["security"] = json!([{ "key": [] }]);
    let paths = document["paths"].as_object_mut().expect("paths");
    // A key contains slashes, for which only the router has a syntax.
    let file = paths.remove("/v1/files/{*key}").expect("the route of files");
    paths.insert("/v1/files/{key}".into(), file);
    for (path, item) in paths {
        for (method, operation) in item.as_object_mut().expect("operations") {
            complete_operation(path, method, operation.as_object_mut().expect("an operation"));
        }
    }
    describe_forms(&mut document);
    describe_texts(&mut document);
    leave_defaults_to_models(&mut document);
    document
}

fn complete_operation(path: &str, method: &str, operation: &mut Map<String, Value>) {
    let authenticated =
        operation.get("security").is_none_or(|security| security != &json!([]) && security != &json!([{}]));
    if !authenticated {
        operation.insert("security".into(), json!([]));
    }
    let declared = operation.remove("x-problems").unwrap_or_default();
    let declared = declared.as_array().into_iter().flatten().filter_map(Value::as_str);
    let mut kinds: Vec<Kind> = declared.map(kind).chain(COMMON).collect();
    if authenticated {
        kinds.extend(AUTHENTICATED);
        if method != "get" {
            kinds.push(Kind::Scope);
        }
    }
    if authenticated && method != "get" && path != "/v1/photos/inspect" {
        kinds.push(Kind::OutcomeUnknown);
    }
    kinds.sort_by_key(|kind| kind.slug());
    kinds.dedup();
    let responses = operation["responses"].as_object_mut().expect("responses");
    for (status, response) in responses.iter_mut() {
        if let Some(links) = links(path, method, status) {
            response["links"] = links;
        }
    }
    for &kind in &kinds {
        let status = kind.status();
        let response = responses.entry(status.as_str()).or_insert_with(|| {
            json!({
                "description": "",
                "content": { problem::CONTENT_TYPE: { "schema": { "$ref": "#/components/schemas/Problem" } } },
            })
        });
        let line = format!("- `{}`: {}", kind.slug(), kind.title());
        let before = response["description"].as_str().unwrap_or_default();
        response["description"] =
            if before.is_empty() { line.into() } else { format!("{before}\n{line}").into() };
        if status.as_u16() == 429 || status.as_u16() == 503 {
            response["headers"]["Retry-After"] = json!({ "$ref": "#/components/headers/Retry-After" });
        }
        if status.as_u16() == 401 {
            response["headers"]["WWW-Authenticate"] = json!({ "schema": { "type": "string" } });
        }
    }
    for response in responses.values_mut() {
        let headers = response["headers"].as_object_mut();
        headers.into_iter().flatten().for_each(|(_, header)| drop_null(&mut header["schema"]));
        response["headers"]["X-Request-Id"] = json!({ "$ref": "#/components/headers/X-Request-Id" });
    }
    let parameters = operation.get_mut("parameters").and_then(Value::as_array_mut);
    parameters.into_iter().flatten().for_each(|parameter| drop_null(&mut parameter["schema"]));
    operation.insert("x-problems".into(), kinds.iter().map(|kind| kind.slug()).collect());
}

/// Headers and parameters may be absent, but are never null.
fn drop_null(schema: &mut Value) {
    if let Some(only) = schema["type"].as_array().and_then(|types| types.first().cloned()) {
        schema["type"] = only;
    }
}

fn kind(slug: &str) -> Kind {
    let found = Kind::ALL.iter().copied().find(|kind| kind.slug() == slug);
    found.unwrap_or_else(|| panic!("an operation names the problem {slug}, which is none"))
}

/// Links from the id in a response to operations on it.
fn links(path: &str, method: &str, status: &str) -> Option<Value> {
    const SAMPLE: [(&str, &str); 4] = [
        ("get", "get_sample"),
        ("cancel", "cancel_sample"),
        ("retry", "retry_sample"),
        ("delete", "delete_sample"),
    ];
    let to = |operations: &[(&str, &str)]| {
        let link = |&(name, operation): &(&str, &str)| {
            let id = json!({ "operationId": operation, "parameters": { "id": "$response.body#/id" } });
            (name.to_owned(), id)
        };
        Some(operations.iter().map(link).collect::<Map<_, _>>().into())
    };
    match (method, path, status) {
        ("post", "/v1/jobs" | "/v1/jobs/{id}/retry", "202") => to(&[
            ("get", "get_job"),
            ("cancel", "cancel_job"),
            ("retry", "retry_job"),
            ("delete", "delete_job"),
            ("sample", "create_sample"),
            ("artifacts", "list_artifacts"),
            ("report", "get_report"),
        ]),
        ("post", "/v1/jobs/{id}/sample", "200" | "202") | ("post", "/v1/samples/{id}/retry", "202") => {
            to(&SAMPLE)
        }
        _ => None,
    }
}

/// Completes the schemas of the two forms: which parts are files or JSON, and that there are no others.
fn describe_forms(document: &mut Value) {
    for name in ["NewJob", "Photos"] {
        let schema = &mut document["components"]["schemas"][name];
        schema["additionalProperties"] = false.into();
        schema["properties"]["images"]["items"] = json!({ "type": "string", "format": "binary" });
        for part in ["class_name", "model"] {
            drop_null(&mut schema["properties"][part]); // absent, but never null
        }
    }
    let options = &mut document["components"]["schemas"]["NewJob"]["properties"]["options"];
    *options = json!({ "$ref": "#/components/schemas/TrainOptions" }); // absent, but never null
    for (path, parts) in [("/v1/jobs", &["images", "options"][..]), ("/v1/photos/inspect", &["images"])] {
        let form = &mut document["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"];
        for part in parts {
            let content_type =
                if *part == "images" { "image/png, image/jpeg, image/webp" } else { "application/json" };
            form["encoding"][*part] = json!({ "contentType": content_type });
        }
    }
}

/// Removes the defaults of training options, which the derive macro takes from Rust's: they are those of a model for a
/// method, as `/v1/models` lists them.
fn leave_defaults_to_models(document: &mut Value) {
    const OPTIONS: [&str; 7] =
        ["TrainOptions", "LossWeights", "Views", "Discriminator", "Perceptual", "Templates", "Evaluation"];
    for schema in OPTIONS {
        let properties = document["components"]["schemas"][schema]["properties"].as_object_mut();
        for (name, property) in properties.expect("a schema of options") {
            if !["method", "priority"].contains(&name.as_str()) {
                property.as_object_mut().expect("a property").remove("default");
            }
        }
    }
}

/// Adds what the derive macro cannot express: patterns that are constants, and bounds of lists' items.
fn describe_texts(document: &mut Value) {
    let schemas = &mut document["components"]["schemas"];
    for form in ["NewJob", "Photos"] {
        schemas[form]["properties"]["class_name"]["pattern"] = CLASS_NAME_PATTERN.into();
    }
    let prompt = json!({ "type": "string", "minLength": 1, "maxLength": 1000, "pattern": PROMPT_PATTERN });
    let sample = &mut schemas["SampleSpec"]["properties"];
    sample["prompts"]["items"] = prompt.clone();
    sample["negative_prompt"]["pattern"] = format!("^$|{PROMPT_PATTERN}").into();
    schemas["Evaluation"]["properties"]["prompts"]["items"] = prompt;
    for (template, word) in [("photo", "product"), ("view", "product"), ("class", "class")] {
        schemas["Templates"]["properties"][template]["pattern"] = template_pattern(word).into();
    }
    for (schema, list) in [("Evaluation", "trials"), ("TrainOptions", "previews")] {
        let step = &mut schemas[schema]["properties"][list]["items"];
        (step["minimum"], step["maximum"]) = (1.into(), STEPS_MAX.into());
    }
    let weight = &mut schemas["Perceptual"]["properties"]["strides"]["items"];
    (weight["minimum"], weight["maximum"]) = (0.into(), 100.into());
    for path in ["/v1/jobs", "/v1/samples"] {
        let parameters = document["paths"][path]["get"]["parameters"].as_array_mut().expect("parameters");
        let name =
            parameters.iter_mut().find(|parameter| parameter["name"] == "class_name").expect("a filter");
        name["schema"]["pattern"] = CLASS_NAME_PATTERN.into();
    }
}
