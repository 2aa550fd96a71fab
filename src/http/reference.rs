//! The API reference at `/docs`: the OpenAPI document as a page, without scripts and without external resources.

use std::fmt::Write;
use std::sync::OnceLock;

use axum::Router;
use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use serde_json::Value;

use super::openapi::{document, openapi};
use super::problem::{Kind, Problem, TYPE_PREFIX};
use super::state::AppState;

const STYLE: &str = include_str!("reference.css");
const METHODS: [&str; 3] = ["post", "get", "delete"];

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/docs", get(docs))
        .route("/openapi.json", get(json))
        .route(&format!("{TYPE_PREFIX}{{slug}}"), get(explain))
}

async fn json() -> Response {
    static TEXT: OnceLock<String> = OnceLock::new();
    ([(header::CONTENT_TYPE, "application/json")], TEXT.get_or_init(openapi).as_str()).into_response()
}

async fn docs() -> Response {
    static PAGE: OnceLock<String> = OnceLock::new();
    let policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'";
    let page = Html(PAGE.get_or_init(|| page(&document())).as_str());
    ([(header::CONTENT_SECURITY_POLICY, policy)], page).into_response()
}

/// Redirects a problem type's URI to its explanation.
async fn explain(Path(slug): Path<String>) -> Result<Response, Problem> {
    let kind = Kind::ALL.iter().find(|kind| kind.slug() == slug);
    let kind = kind.ok_or_else(|| Problem::not_found("problem"))?;
    let anchor = format!("/docs#problem-{}", kind.slug());
    Ok((StatusCode::SEE_OTHER, [(header::LOCATION, anchor)]).into_response())
}

fn page(document: &Value) -> String {
    let (mut menu, mut body) = (String::new(), String::new());
    for tag in list(&document["tags"]) {
        let name = text(&tag["name"]);
        push(&mut menu, format_args!("<li class=tag>{}</li>", escape(name)));
        push(&mut body, format_args!("<h2>{}</h2><p>{}</p>", escape(name), prose(text(&tag["description"]))));
        for (path, method, operation) in operations(document) {
            if operation["tags"][0] == tag["name"] {
                let id = escape(text(&operation["operationId"]));
                let label = format!("<b class={method}>{method}</b> <code>{}</code>", escape(path));
                push(&mut menu, format_args!("<li><a href=\"#{id}\">{label}</a></li>"));
                push(&mut body, format_args!("<section id=\"{id}\"><h3>{label}</h3>"));
                describe(&mut body, operation);
                body.push_str("</section>");
            }
        }
    }
    push(
        &mut menu,
        format_args!(
            "<li class=tag>more</li><li><a href=\"#schemas\">Schemas</a></li><li><a href=\"#problems\">Problems</a></li>"
        ),
    );
    body.push_str("<h2 id=schemas>Schemas</h2>");
    for (name, schema) in entries(&document["components"]["schemas"]) {
        push(&mut body, format_args!("<section id=\"schema-{0}\"><h3>{0}</h3>", escape(name)));
        push(&mut body, format_args!("<p>{}</p>", prose(text(&schema["description"]))));
        properties(&mut body, schema);
        body.push_str("</section>");
    }
    problems(&mut body);
    let title = escape(text(&document["info"]["title"]));
    let lead = prose(text(&document["info"]["description"]));
    format!(
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>{title}</title>\
         <meta name=viewport content=\"width=device-width, initial-scale=1\"><style>{STYLE}</style></head>\
         <body><nav><ul>{menu}</ul></nav><main><h1>{title}</h1><p class=lead>{lead}</p>\
         <p>Send <code>Authorization: Bearer hyp_...</code> with every request under <code>/v1</code>. \
         This page as data: <a href=\"/openapi.json\">openapi.json</a>.</p>{body}</main></body></html>"
    )
}

fn operations(document: &Value) -> impl Iterator<Item = (&str, &'static str, &Value)> {
    entries(&document["paths"]).flat_map(|(path, item)| {
        METHODS.into_iter().filter_map(move |method| Some((path, method, item.get(method)?)))
    })
}

fn describe(page: &mut String, operation: &Value) {
    push(
        page,
        format_args!(
            "<p><b>{}.</b> {}</p>",
            prose(text(&operation["summary"])),
            prose(text(&operation["description"]))
        ),
    );
    let parameters: Vec<_> = list(&operation["parameters"]).collect();
    if !parameters.is_empty() {
        page.push_str("<table><tr><th>parameter<th>in<th>type<th></tr>");
        for parameter in parameters {
            row(
                page,
                text(&parameter["name"]),
                parameter["required"] == true,
                &[
                    escape(text(&parameter["in"])),
                    kind_of(&parameter["schema"]),
                    prose(text(&parameter["description"])),
                ],
            );
        }
        page.push_str("</table>");
    }
    for (media, content) in entries(&operation["requestBody"]["content"]) {
        push(
            page,
            format_args!("<p>Body: <code>{}</code> {}</p>", escape(media), kind_of(&content["schema"])),
        );
    }
    page.push_str("<table><tr><th>status<th>body<th></tr>");
    for (status, response) in entries(&operation["responses"]) {
        let bodies: Vec<_> =
            entries(&response["content"]).map(|(_, content)| kind_of(&content["schema"])).collect();
        row(page, status, false, &[bodies.join(", "), prose(text(&response["description"]))]);
    }
    page.push_str("</table>");
}

fn properties(page: &mut String, schema: &Value) {
    let required: Vec<_> = list(&schema["required"]).map(text).collect();
    if schema["properties"].is_object() {
        page.push_str("<table><tr><th>field<th>type<th></tr>");
        for (name, property) in entries(&schema["properties"]) {
            let about = prose(text(&property["description"]));
            row(page, name, required.contains(&name), &[kind_of(property), about]);
        }
        page.push_str("</table>");
    } else {
        push(page, format_args!("<p>{}</p>", kind_of(schema)));
    }
}

fn problems(page: &mut String) {
    page.push_str(
        "<h2 id=problems>Problems</h2><p>Every refusal is an <code>application/problem+json</code> document. \
        Its <code>type</code> is one of these.</p><table><tr><th>type<th>status<th></tr>",
    );
    for kind in Kind::ALL {
        let about = format!("<b>{}.</b> {}", escape(kind.title()), prose(kind.advice()));
        push(
            page,
            format_args!(
                "<tr id=\"problem-{0}\"><td><code>{TYPE_PREFIX}{0}</code><td>{1}<td>{about}</tr>",
                kind.slug(),
                kind.status().as_u16()
            ),
        );
    }
    page.push_str("</table>");
}

fn row(page: &mut String, name: &str, required: bool, cells: &[String]) {
    let mark = if required { "<i title=required>*</i>" } else { "" };
    push(page, format_args!("<tr><td><code>{}</code>{mark}", escape(name)));
    for cell in cells {
        push(page, format_args!("<td>{cell}"));
    }
    page.push_str("</tr>");
}

/// HTML of a schema: type, range and default; a link if it has a name.
fn kind_of(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
        return format!("<a href=\"#schema-{0}\">{0}</a>", escape(name));
    }
    for choice in ["oneOf", "anyOf", "allOf"] {
        if schema[choice].is_array() {
            return list(&schema[choice]).map(kind_of).collect::<Vec<_>>().join(" or ");
        }
    }
    let mut words = Vec::new();
    match &schema["type"] {
        Value::Array(types) => words.push(types.iter().map(text).collect::<Vec<_>>().join(" or ")),
        one => words.push(text(one).to_owned()),
    }
    let mut html: String = escape(&words.join(" "));
    if schema["items"].is_object() {
        let _ = write!(html, " of {}", kind_of(&schema["items"]));
    }
    if schema["enum"].is_array() {
        let all: Vec<_> =
            list(&schema["enum"]).map(|one| format!("<code>{}</code>", escape(text(one)))).collect();
        let _ = write!(html, ": {}", all.join(" "));
    }
    let bounds = bounds(schema);
    if !bounds.is_empty() {
        push(&mut html, format_args!("<br><small>{}</small>", escape(&bounds.join(", "))));
    }
    html
}

/// Constraints of a value, beyond its type.
fn bounds(schema: &Value) -> Vec<String> {
    let mut bounds = Vec::new();
    let range = |least: &str, most: &str| match (&schema[least], &schema[most]) {
        (Value::Null, Value::Null) => None,
        (least, Value::Null) => Some(format!("from {least}")),
        (Value::Null, most) => Some(format!("to {most}")),
        (least, most) => Some(format!("{least} to {most}")),
    };
    bounds
        .extend(schema["format"].as_str().filter(|format| !format.starts_with("int")).map(ToOwned::to_owned));
    bounds.extend(range("minimum", "maximum"));
    bounds.extend(range("exclusiveMinimum", "").map(|range| format!("{range}, exclusive")));
    bounds.extend(range("minLength", "maxLength").map(|range| format!("{range} characters")));
    bounds.extend(range("minItems", "maxItems").map(|range| format!("{range} items")));
    match &schema["multipleOf"] {
        Value::Null => {}
        factor => bounds.push(format!("a multiple of {factor}")),
    }
    match &schema["default"] {
        Value::Null | Value::Object(_) => {}
        default => bounds.push(format!("default {default}")),
    }
    bounds
}

/// HTML of a Markdown text with `code` and lists.
fn prose(markdown: &str) -> String {
    let escaped = escape(markdown).replace("\n- ", "<br>").replace('\n', " ");
    let escaped = escaped.strip_prefix("- ").unwrap_or(&escaped);
    let mark = |(n, piece): (usize, &str)| {
        if n % 2 == 1 { format!("<code>{piece}</code>") } else { piece.to_owned() }
    };
    escaped.split('`').enumerate().map(mark).collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn push(page: &mut String, html: std::fmt::Arguments<'_>) {
    let _ = page.write_fmt(html); // writing to a string never fails
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn entries(value: &Value) -> impl Iterator<Item = (&str, &Value)> {
    value.as_object().into_iter().flatten().map(|(name, value)| (name.as_str(), value))
}
