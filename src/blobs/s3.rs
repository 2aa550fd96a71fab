//! A bucket of an S3-compatible server: its address, its credentials, and the differences between servers.
//!
//! Every answer passes [`ErrorInterceptor`] before the library sees it. It keeps what the library drops and operators
//! need: the code of a rejection, the bucket's region, the difference of the clocks. It stops retries of rejected
//! requests. And it renames foreign keys in listings, one of which would make the whole listing fail.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    ReqwestConnector,
};
use object_store::path::Path as ObjectPath;
use object_store::{ClientOptions, RetryConfig};
use secrecy::{ExposeSecret, SecretString};

use super::error::{Error, Refusal};
use super::link::{hex, unhex};

/// One request and all its retries end well below a lease of 60 s.
const RETRY: Duration = Duration::from_secs(20);
const REQUEST: Duration = Duration::from_secs(20);
const CONNECT: Duration = Duration::from_secs(5);
/// The largest clock difference, in seconds, that is not reported; S3 accepts 15 minutes.
const CLOCK: i64 = 5 * 60;
/// Characters shown of a server's message.
const MESSAGE_CHARS_MAX: usize = 200;
/// Prefix that marks a renamed foreign key in a listing; the key's bytes in hexadecimal follow.
const FOREIGN: &str = "foreign key in hexadecimal ";

/// A bucket, its address and its credentials.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// Its name.
    pub name: String,
    /// Prefix of all keys; may be empty.
    pub prefix: String,
    /// The server, such as `https://s3.example`; Amazon's if not given. `http://` is unencrypted.
    pub endpoint: Option<String>,
    /// The same server's address for clients, if it differs: a link's signature covers its host.
    pub public_endpoint: Option<String>,
    /// Its region.
    pub region: String,
    /// The credentials.
    pub credentials: Credentials,
}

/// Credentials for the server.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// Static keys.
    Keys {
        /// Access key id.
        access_key: String,
        /// Secret access key.
        secret_key: SecretString,
        /// The session token of temporary keys.
        session_token: Option<SecretString>,
    },
    /// A role assumed with a token in a file that the platform renews: `AssumeRoleWithWebIdentity`.
    WebIdentity {
        /// The file with the token; read again whenever keys are fetched.
        token_file: PathBuf,
        /// The role.
        role_arn: String,
        /// The session's name in the server's logs.
        session_name: String,
        /// The `https://` address of the STS; Amazon's STS of the region if not given.
        sts_endpoint: Option<String>,
    },
    /// Keys from an agent beside the container.
    Container {
        /// A path on Amazon ECS' agent, or the full URL of another.
        place: String,
        /// The file with the agent's `Authorization` header; needed with a full URL.
        token_file: Option<PathBuf>,
    },
    /// Keys of the virtual machine, from its metadata service.
    Instance {
        /// The service's address, if it is not the usual one.
        endpoint: Option<String>,
    },
}

impl Bucket {
    /// A client that deletes objects with one request each.
    pub(super) fn client(&self) -> Result<AmazonS3, Error> {
        let endpoint = self.endpoint.as_deref();
        Ok(self.credentials.apply_to(self.builder(endpoint)).with_disable_bulk_delete(true).build()?)
    }

    /// A client with the same credentials that deletes a thousand objects with one request.
    pub(super) fn in_bulk(&self, client: &AmazonS3) -> Result<AmazonS3, Error> {
        let credentials = Arc::clone(client.credentials());
        Ok(self.builder(self.endpoint.as_deref()).with_credentials(credentials).build()?)
    }

    /// A client for the public endpoint with the same credentials.
    pub(super) fn in_public(&self, client: &AmazonS3, endpoint: &str) -> Result<AmazonS3, Error> {
        let credentials = Arc::clone(client.credentials());
        Ok(self.builder(Some(endpoint)).with_credentials(credentials).build()?)
    }

    fn builder(&self, endpoint: Option<&str>) -> AmazonS3Builder {
        // If one is installed already, it is the same.
        let _ = rustls::crypto::ring::default_provider().install_default();

        let base = match endpoint {
            Some(endpoint) => format!("{}/{}", endpoint.trim_end_matches('/'), self.name),
            None => format!("https://{}.s3.", self.name),
        };
        let client = ClientOptions::new()
            .with_allow_http(endpoint.is_some_and(|endpoint| endpoint.starts_with("http://")))
            .with_timeout(REQUEST)
            .with_connect_timeout(CONNECT);
        let builder = AmazonS3Builder::new()
            .with_bucket_name(&self.name)
            .with_region(&self.region)
            .with_virtual_hosted_style_request(endpoint.is_none())
            .with_retry(RetryConfig { retry_timeout: RETRY, ..RetryConfig::default() })
            .with_client_options(client)
            .with_http_connector(Connector { base });
        match endpoint {
            Some(endpoint) => builder.with_endpoint(endpoint),
            None => builder,
        }
    }
}

impl Credentials {
    fn apply_to(&self, builder: AmazonS3Builder) -> AmazonS3Builder {
        use AmazonS3ConfigKey as Is;
        let set = |builder: AmazonS3Builder, key: Is, value: Option<String>| match value {
            Some(value) => builder.with_config(key, value),
            None => builder,
        };
        let path = |path: &PathBuf| path.to_string_lossy().into_owned();
        match self {
            Self::Keys { access_key, secret_key, session_token } => {
                let builder =
                    builder.with_access_key_id(access_key).with_secret_access_key(secret_key.expose_secret());
                match session_token {
                    Some(token) => builder.with_token(token.expose_secret()),
                    None => builder,
                }
            }
            Self::WebIdentity { token_file, role_arn, session_name, sts_endpoint } => {
                let builder = builder
                    .with_config(Is::WebIdentityTokenFile, path(token_file))
                    .with_config(Is::RoleArn, role_arn)
                    .with_config(Is::RoleSessionName, session_name);
                set(builder, Is::StsEndpoint, sts_endpoint.clone())
            }
            Self::Container { place, token_file } => {
                let is_url = place.starts_with("http://") || place.starts_with("https://");
                let key = if is_url {
                    Is::ContainerCredentialsFullUri
                } else {
                    Is::ContainerCredentialsRelativeUri
                };
                let token_file = token_file.as_ref().map(path);
                set(builder.with_config(key, place), Is::ContainerAuthorizationTokenFile, token_file)
            }
            Self::Instance { endpoint } => set(builder, Is::MetadataEndpoint, endpoint.clone()),
        }
    }
}

/// Makes the HTTP clients of a bucket and of its credentials service.
#[derive(Debug)]
struct Connector {
    /// Prefix of the bucket's URLs.
    base: String,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(ErrorInterceptor { inner, base: self.base.clone() }))
    }
}

/// Processes every answer before the library does.
#[derive(Debug)]
struct ErrorInterceptor {
    inner: HttpClient,
    base: String,
}

#[async_trait]
impl HttpService for ErrorInterceptor {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (uri, method) = (request.uri().to_string(), request.method().as_str().to_owned());
        let of_credentials = !uri.starts_with(&self.base);
        let answer = self.inner.execute(request).await?;
        match answer.status().as_u16() {
            200 if method == "GET" && !of_credentials && uri.contains("list-type=2") => {
                let (head, body) = answer.into_parts();
                let bytes = body.bytes().await?;
                let text = String::from_utf8_lossy(&bytes);
                let text = rename_foreign(&text).into_owned();
                Ok(HttpResponse::from_parts(head, text.into()))
            }
            // The library handles these, or retries them.
            200..=299 | 304 | 408 | 409 | 412 | 416 | 429 | 500 | 502.. => Ok(answer),
            status => {
                let (head, body) = answer.into_parts();
                let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
                let (region, date) = (header("x-amz-bucket-region"), header("date"));
                let clock_ahead = date.and_then(clock_ahead);
                let region = region.map(str::to_owned);
                let bytes = body.bytes().await?;
                let text = String::from_utf8_lossy(&bytes);
                let refusal = refusal(status, &text, region, clock_ahead, of_credentials);
                let is_transient =
                    matches!(refusal.code.as_str(), "RequestTimeout" | "IncompleteBody" | "BadDigest");
                if is_transient || status == 404 && refusal.code != "NoSuchBucket" {
                    return Ok(HttpResponse::from_parts(head, bytes.into()));
                }
                Err(HttpError::new(HttpErrorKind::Unknown, refusal))
            }
        }
    }
}

/// What may be shown of an answer: no key, no path, no XML.
fn refusal(
    status: u16,
    answer: &str,
    region: Option<String>,
    clock_ahead: Option<i64>,
    of_credentials: bool,
) -> Refusal {
    let element = |name: &str| {
        let (_, after) = answer.split_once(&format!("<{name}>"))?;
        Some(after.split_once("</")?.0)
    };
    let word = |text: &str| text.chars().take_while(char::is_ascii_alphanumeric).take(40).collect::<String>();
    let plain = |text: &str| {
        let text: String = text.chars().filter(|c| *c == ' ' || c.is_ascii_graphic()).collect();
        let shown = unescape(&text);
        shown.chars().filter(|c| !c.is_control()).take(MESSAGE_CHARS_MAX).collect::<String>()
    };
    let is_region =
        |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    let region = region.or_else(|| element("Region").map(str::to_owned)).filter(|text| is_region(text));
    let code = word(element("Code").unwrap_or_default());
    // In other answers the region is the configured one.
    let of_region = matches!(status, 300..=399) || matches!(code.as_str(), "AuthorizationHeaderMalformed");
    Refusal {
        status,
        message: plain(element("Message").unwrap_or_default()),
        region: region.filter(|_| of_region),
        clock_ahead: clock_ahead.filter(|_| status == 403 || status == 400),
        code,
        of_credentials,
    }
}

/// By how many seconds the clock of this date is ahead of this machine's, if it is minutes.
fn clock_ahead(date: &str) -> Option<i64> {
    let date = jiff::fmt::rfc2822::parse(date).ok()?;
    let ahead = date.timestamp().as_second() - jiff::Timestamp::now().as_second();
    (ahead.abs() > CLOCK).then_some(ahead)
}

/// Renames every key of a listing that the library cannot represent, or would take for another key. The library rejects
/// a whole listing for one doubled slash, and takes a folder's marker for an object of another name.
fn rename_foreign(listing: &str) -> Cow<'_, str> {
    let mut renamed = String::new();
    let mut rest = listing;
    while let Some((before, key, after)) = next_key(rest) {
        let plain = ObjectPath::parse(key).is_ok_and(|path| path.as_ref() == key) && !key.contains('&');
        renamed += before;
        if plain {
            renamed += key;
        } else {
            renamed += FOREIGN;
            renamed += &hex(unescape(key).as_bytes());
        }
        rest = after;
    }
    if renamed.is_empty() { Cow::Borrowed(listing) } else { Cow::Owned(renamed + rest) }
}

/// What precedes the first key of a listing, the key, and what follows it.
fn next_key(listing: &str) -> Option<(&str, &str, &str)> {
    let start = listing.find("<Key>")? + "<Key>".len();
    let end = start + listing[start..].find("</Key>")?;
    Some((&listing[..start], &listing[start..end], &listing[end..]))
}

/// The foreign key that [`rename_foreign`] renamed to this.
pub(super) fn foreign(listed: &str) -> Option<String> {
    let bytes = unhex(listed.strip_prefix(FOREIGN)?)?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Unescapes the text of an XML element.
fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('&') {
        plain += before;
        let Some((entity, after)) = after.split_once(';') else {
            plain.push('&');
            rest = after;
            continue;
        };
        let number = entity.strip_prefix("#x").map(|digits| u32::from_str_radix(digits, 16));
        let number = number.or_else(|| entity.strip_prefix('#').map(str::parse));
        match (entity, number) {
            ("amp", _) => plain.push('&'),
            ("lt", _) => plain.push('<'),
            ("gt", _) => plain.push('>'),
            ("quot", _) => plain.push('"'),
            ("apos", _) => plain.push('\''),
            (_, Some(Ok(number))) => {
                plain.push(char::from_u32(number).unwrap_or(char::REPLACEMENT_CHARACTER));
            }
            _ => plain.push(char::REPLACEMENT_CHARACTER),
        }
        rest = after;
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_keeps_what_an_operator_needs_and_nothing_else() {
        let said = "<Error><Code>AuthorizationHeaderMalformed</Code><Message>The region 'us-east-1' is wrong; \
                    expecting 'eu-west-1'</Message><Region>eu-west-1</Region><HostId>private</HostId></Error>";
        let refused = refusal(400, said, None, None, false);
        assert_eq!(refused.to_string(), "400 AuthorizationHeaderMalformed");
        assert_eq!(
            refused.details(),
            "400 AuthorizationHeaderMalformed (The region 'us-east-1' is wrong; expecting 'eu-west-1'); the bucket \
             is in the region eu-west-1, which HYPNOS_S3_REGION must name"
        );
        // A redirect without a place to go: the header has the region, the body may be empty.
        let moved = refusal(301, "", Some("eu-west-1".into()), None, false);
        assert_eq!(moved.region.as_deref(), Some("eu-west-1"));
        let skewed = refusal(403, "<Code>RequestTimeTooSkewed</Code>", None, Some(-3600), false);
        assert_eq!(
            skewed.details(),
            "403 RequestTimeTooSkewed; this machine's clock is 3600 s ahead of the store's"
        );
        // A region is named by many answers; only some mean that ours is wrong.
        assert_eq!(refusal(403, "", Some("us-east-1".into()), None, false).region, None);
        assert_eq!(refusal(301, "", Some("<b>".into()), None, false).region, None);
        let rude = refusal(400, "<Message>a\n\u{1b}[31mred&#x1b;[0m</Message>", None, None, false);
        assert!(rude.message.bytes().all(|b| (32..127).contains(&b)), "{rude:?}");
        assert_eq!(refusal(403, "no XML at all", None, None, true).code, "");
    }

    #[test]
    fn foreign_keys_of_a_listing_are_renamed_and_told_back() {
        let foreign_keys = [
            "t/a/",
            "t/a//b.png",
            "/t/a",
            "t/../a",
            "t/b\u{1}c",
            "t/a&amp;b",
            "t/&lt;x&gt;&quot;&apos;",
            "//",
        ];
        let ours = "t/a/j/b/photos/0.png";
        let keys = foreign_keys
            .iter()
            .chain([&ours])
            .map(|key| format!("<Contents><Key>{key}</Key><Size>1</Size></Contents>"));
        let listing = format!("<ListBucketResult>{}</ListBucketResult>", keys.collect::<String>());
        let renamed = rename_foreign(&listing);
        let mut rest = renamed.as_ref();
        let mut found = Vec::new();
        while let Some((_, key, after)) = next_key(rest) {
            assert_eq!(ObjectPath::parse(key).unwrap().as_ref(), key);
            found.push(foreign(key).unwrap_or_else(|| format!("ours: {key}")));
            rest = after;
        }
        let mut wanted: Vec<String> = foreign_keys.iter().map(|key| unescape(key)).collect();
        wanted.push(format!("ours: {ours}"));
        assert_eq!(found, wanted);
        assert!(matches!(rename_foreign("<ListBucketResult/>"), Cow::Borrowed(_)));
    }

    #[test]
    fn entities_of_any_kind_are_undone() {
        assert_eq!(unescape("a&amp;lt;&#65;&#x42;&unknown;&#x110000;b"), "a&lt;AB\u{fffd}\u{fffd}b");
        assert_eq!(unescape("a & b && c"), "a & b && c");
    }
}
