//! Problem details (RFC 9457): the only place where errors become HTTP statuses.
//!
//! A handler returns a [`Problem`]; the outermost layer writes its body with the request's id. Internal causes are
//! logged here, once, and never shown to clients.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::blobs::{self, BadLink};
use crate::job::Invalid;
use crate::photo::Refusal;
use crate::store;

/// Every problem type: slug, status, title, and what a client can do about it. The OpenAPI document and the reference
/// page are generated from the same table.
macro_rules! kinds {
    ($($variant:ident = $slug:literal, $status:ident, $title:literal, $advice:literal;)+) => {
        /// A problem type. Its slug is stable: clients may rely on it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Kind {
            $(#[doc = $title] $variant,)+
        }

        impl Kind {
            /// All types.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The last part of its URI.
            pub fn slug(self) -> &'static str {
                match self { $(Self::$variant => $slug,)+ }
            }

            /// Its HTTP status.
            pub fn status(self) -> StatusCode {
                match self { $(Self::$variant => StatusCode::$status,)+ }
            }

            /// Its title, the same for each problem of this type.
            pub fn title(self) -> &'static str {
                match self { $(Self::$variant => $title,)+ }
            }

            /// What a client can do about it.
            pub fn advice(self) -> &'static str {
                match self { $(Self::$variant => $advice,)+ }
            }
        }
    };
}

kinds! {
    BadParameter = "bad-parameter", BAD_REQUEST, "A parameter or header is wrong",
        "`detail` names it and says what is expected.";
    BadBody = "bad-body", BAD_REQUEST, "The body cannot be read",
        "It is not the JSON or the multipart form that its Content-Type promises.";
    KeyInQuery = "key-in-query", BAD_REQUEST, "A key was sent in the URL",
        "URLs end up in logs. Revoke the key and send its successor in the Authorization header.";
    Unauthorized = "unauthorized", UNAUTHORIZED, "A valid API key is needed",
        "Send `Authorization: Bearer hyp_...`. A key that is missing, mistyped, revoked or expired is answered alike.";
    Scope = "scope", FORBIDDEN, "The key's scope does not allow this",
        "`detail` says which scope is needed. Keys are made by `hypnos keys create --scope`.";
    Proxied = "proxied", FORBIDDEN, "The request came through a proxy",
        "A server without keys answers its own machine only. Start it with `--auth keys` or with the `--public-url` that clients use, and make a key with `hypnos keys create`.";
    TenantDisabled = "tenant-disabled", FORBIDDEN, "The tenant is disabled",
        "The operator of the service has disabled it; ask them.";
    Host = "host", FORBIDDEN, "The Host header is not this server's",
        "A server without keys answers to names of its own machine only.";
    CrossSite = "cross-site", FORBIDDEN, "Another site's page sent the request",
        "A server without keys answers no pages of other sites.";
    UrlForged = "url-forged", FORBIDDEN, "The URL's signature is invalid",
        "Request the artifact again.";
    UrlExpired = "url-expired", FORBIDDEN, "The URL has expired",
        "Request the artifact again.";
    NotFound = "not-found", NOT_FOUND, "Not found",
        "What belongs to another tenant is answered alike.";
    MethodNotAllowed = "method-not-allowed", METHOD_NOT_ALLOWED, "The path does not support this method",
        "`Allow` lists those that it supports.";
    BodyTimeout = "body-timeout", REQUEST_TIMEOUT, "The body was sent too slowly",
        "Send it again.";
    WrongState = "wrong-state", CONFLICT, "The job's state does not allow this",
        "`detail` says which state it is in.";
    BodyTooLarge = "body-too-large", PAYLOAD_TOO_LARGE, "The body is too large",
        "`detail` says what is accepted.";
    MediaType = "media-type", UNSUPPORTED_MEDIA_TYPE, "The body's media type is not accepted",
        "`detail` says which are. A Content-Encoding is not accepted either.";
    ImageType = "image-type-unsupported", UNSUPPORTED_MEDIA_TYPE, "The photo's type is not accepted",
        "Send PNG, JPEG or WebP. The content decides, not the name.";
    Field = "field", UNPROCESSABLE_ENTITY, "A value is invalid",
        "`pointer` is the JSON pointer to it; `detail` says what was sent and what is expected.";
    ImageEmpty = "image-empty", UNPROCESSABLE_ENTITY, "The photo's file is empty",
        "Send the picture's bytes.";
    ImageTooLarge = "image-too-large", UNPROCESSABLE_ENTITY, "The photo is too large",
        "`detail` says what is accepted.";
    ImageTooSmall = "image-too-small", UNPROCESSABLE_ENTITY, "The photo is too small",
        "`detail` says what is accepted.";
    ImageAspect = "image-aspect", UNPROCESSABLE_ENTITY, "The photo is too long and narrow",
        "Crop it closer to the product.";
    ImageAnimated = "animated-not-supported", UNPROCESSABLE_ENTITY, "The photo is an animation",
        "Send a single picture.";
    ImageColor = "image-color-unsupported", UNPROCESSABLE_ENTITY, "The photo's colour space is not supported",
        "Send it in RGB or grey.";
    ImageTooComplex = "image-too-complex", UNPROCESSABLE_ENTITY, "The photo takes too long to decode",
        "Save it again with another program.";
    ImageDamaged = "image-damaged", UNPROCESSABLE_ENTITY, "The photo is cut short or damaged",
        "Send the whole file.";
    KeyReused = "idempotency-key-reused", UNPROCESSABLE_ENTITY, "The Idempotency-Key was used for another request",
        "Use a new key for each new request.";
    TooMany = "too-many-requests", TOO_MANY_REQUESTS, "The tenant has too many concurrent requests",
        "Try again after `Retry-After` seconds, with fewer at once.";
    QueueFull = "queue-full", TOO_MANY_REQUESTS, "Too many jobs are waiting",
        "Try again after `Retry-After` seconds.";
    Internal = "internal", INTERNAL_SERVER_ERROR, "Internal error",
        "Report the `request_id` to the operator of the service.";
    ArtifactMissing = "artifact-missing", INTERNAL_SERVER_ERROR, "An object of the job is missing",
        "Report the `request_id` to the operator of the service. A training can be started again.";
    ArtifactDamaged = "artifact-damaged", BAD_GATEWAY, "An object of the job is damaged",
        "Try again; if it persists, report the `request_id` to the operator of the service.";
    Unavailable = "unavailable", SERVICE_UNAVAILABLE, "The database or the object store is unavailable",
        "Try again after `Retry-After` seconds.";
    OutcomeUnknown = "outcome-unknown", SERVICE_UNAVAILABLE, "Whether the request was executed is not known",
        "It may have been. Send the same request with the same Idempotency-Key after `Retry-After` seconds: the answer \
         tells. Without a key, check whether it was executed before sending it again.";
    Overloaded = "overloaded", SERVICE_UNAVAILABLE, "The server is overloaded",
        "Try again after `Retry-After` seconds.";
    DecoderBusy = "decoder-busy", SERVICE_UNAVAILABLE, "Too many photos are being decoded",
        "Try again after `Retry-After` seconds.";
    StorageFull = "storage-full", INSUFFICIENT_STORAGE, "The object store is full",
        "Try again later.";
}

/// Prefix of the types' URIs.
pub(super) const TYPE_PREFIX: &str = "/problems/";
/// Media type of a problem.
pub(super) const CONTENT_TYPE: &str = "application/problem+json";

const RETRY_AFTER_SECS: u64 = 5;

/// Why a request was refused or failed.
#[derive(Clone, Debug)]
pub struct Problem {
    kind: Kind,
    detail: String,
    pointer: Option<String>,
    retry_after: Option<Duration>,
}

impl Problem {
    /// A problem; `detail` says in one line what was sent and what is expected.
    pub fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into(), pointer: None, retry_after: None }
    }

    /// Sets the JSON pointer to the value in the body.
    #[must_use]
    pub fn at(mut self, pointer: impl Into<String>) -> Self {
        self.pointer = Some(pointer.into());
        self
    }

    /// Sets the `Retry-After`.
    #[must_use]
    pub(super) fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Sets the JSON pointer, and prefixes the detail with it.
    pub(super) fn prefixed_with_pointer(mut self, pointer: String) -> Self {
        self.detail = format!("{pointer}: {}", self.detail);
        self.at(pointer)
    }

    /// Its type.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The caller has nothing with that id or name.
    pub(super) fn not_found(what: &str) -> Self {
        Self::new(Kind::NotFound, format!("no such {what}"))
    }

    /// The tenant of the key is disabled.
    pub(super) fn tenant_disabled() -> Self {
        Self::new(Kind::TenantDisabled, "the operator of this service has disabled this key's tenant")
    }

    /// An internal error: logged with its causes, shown without.
    pub(super) fn internal(error: &dyn std::error::Error) -> Self {
        tracing::error!(error = %error_chain(error), "request failed with an internal error");
        Self::internal_already_logged()
    }

    /// An internal error that was already logged.
    pub(super) fn internal_already_logged() -> Self {
        Self::new(Kind::Internal, "an internal error occurred")
    }

    /// The database or the object store is unavailable: logged with its causes, shown without.
    pub(super) fn unavailable(what: &str, error: &dyn std::error::Error) -> Self {
        tracing::warn!(backend = what, error = %error_chain(error), "backend unavailable");
        Self::new(Kind::Unavailable, format!("the {what} cannot be reached at the moment"))
    }

    /// The body, with the id of the request.
    pub(super) fn document<'a>(&'a self, request_id: &'a str) -> Document<'a> {
        Document {
            r#type: format!("{TYPE_PREFIX}{}", self.kind.slug()),
            title: self.kind.title(),
            status: self.kind.status().as_u16(),
            detail: &self.detail,
            request_id,
            pointer: self.pointer.as_deref(),
        }
    }
}

impl From<Invalid> for Problem {
    fn from(invalid: Invalid) -> Self {
        Self::new(Kind::Field, format!("{}: {}", invalid.pointer, invalid.message)).at(invalid.pointer)
    }
}

impl From<Refusal> for Problem {
    /// The codes of refusals are slugs of problem types; a test checks that.
    fn from(refusal: Refusal) -> Self {
        let kind = Kind::ALL.iter().copied().find(|kind| kind.slug() == refusal.code);
        Self::new(kind.unwrap_or(Kind::ImageDamaged), refusal.message)
    }
}

impl From<store::Error> for Problem {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Unavailable(_) | store::Error::Schema(_) => Self::unavailable("database", &error),
            store::Error::Unknown(_) => {
                tracing::warn!(error = %error_chain(&error), "request outcome unknown: the database did not confirm a commit");
                Self::new(
                    Kind::OutcomeUnknown,
                    "the database did not confirm the request; the same request with the same Idempotency-Key will get its outcome",
                )
            }
            store::Error::LeaseLost | store::Error::Corrupt(_) | store::Error::InvalidSettings(_) => {
                Self::internal(&error)
            }
        }
    }
}

impl From<blobs::Error> for Problem {
    fn from(error: blobs::Error) -> Self {
        let (kind, detail) = match error {
            blobs::Error::Unavailable(_) | blobs::Error::Refused(_) | blobs::Error::Local(_) => {
                return Self::unavailable("object store", &error);
            }
            blobs::Error::Missing => (Kind::ArtifactMissing, "an object of the job is missing"),
            blobs::Error::Damaged => (Kind::ArtifactDamaged, "an object of the job is damaged"),
            blobs::Error::Full => (Kind::StorageFull, "the object store is full"),
        };
        tracing::error!(%error, "cannot read or write an object");
        Self::new(kind, detail)
    }
}

impl From<BadLink> for Problem {
    fn from(bad: BadLink) -> Self {
        match bad {
            BadLink::Forged => Self::new(Kind::UrlForged, "the URL's signature is invalid"),
            BadLink::Expired => {
                Self::new(Kind::UrlExpired, "the URL has expired; request the artifact again")
            }
        }
    }
}

impl IntoResponse for Problem {
    /// Sets status and headers; the outermost layer takes the problem from the extensions and writes the body.
    fn into_response(self) -> Response {
        let mut response = self.kind.status().into_response();
        let headers = response.headers_mut();
        match self.kind {
            Kind::Unauthorized => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"hypnos\""));
            }
            Kind::Unavailable
            | Kind::OutcomeUnknown
            | Kind::Overloaded
            | Kind::DecoderBusy
            | Kind::TooMany
            | Kind::QueueFull => {
                let secs = self.retry_after.map_or(RETRY_AFTER_SECS, |wait| wait.as_secs());
                headers.insert(header::RETRY_AFTER, HeaderValue::from(secs));
            }
            _ => {}
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// Why a request was refused or failed (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
pub(super) struct Document<'a> {
    /// URI of the type of problem, relative to the server; stable.
    #[schema(pattern = "^/problems/[a-z-]+$", example = "/problems/field")]
    r#type: String,
    /// The title of the type.
    #[schema(example = "A value is invalid")]
    title: &'a str,
    /// The response's status.
    #[schema(minimum = 400, maximum = 599, example = 422)]
    status: u16,
    /// What was sent and what is expected, in one line.
    #[schema(example = "/options/steps: wanted 1 to 10000, got 0")]
    detail: &'a str,
    /// Id of the request in the server's log; also in `X-Request-Id`.
    #[schema(pattern = "^[A-Za-z0-9._-]{1,64}$")]
    request_id: &'a str,
    /// JSON pointer to the value in the body; a form counts as an object of its parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "/options/steps")]
    pointer: Option<&'a str>,
}

/// An error and its sources, in one line.
pub(super) fn error_chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// A client's text as it may be repeated in a detail: shortened, and with control characters escaped.
pub(super) fn excerpt(text: &str) -> String {
    const CHARS_MAX: usize = 200;
    let mut short: String = text.chars().take(CHARS_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(CHARS_MAX).is_some() {
        short.push_str("...");
    }
    short
}
