//! Checks of a server without keys: it answers only requests from its own machine.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, Uri, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::problem::{Kind, Problem};
use super::settings::Auth;
use super::state::AppState;

/// Middleware that refuses requests from elsewhere on a server without keys.
pub(super) async fn local_only(State(app): State<AppState>, request: Request, next: Next) -> Response {
    match check_local(&app, &request) {
        Ok(()) => next.run(request).await,
        Err(problem) => problem.into_response(),
    }
}

/// Headers that proxies add, besides those that begin with `x-forwarded`.
const PROXY_HEADERS: [&str; 16] = [
    "forwarded",
    "via",
    "x-real-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-original-forwarded-for",
    "x-original-host",
    "x-original-uri",
    "x-envoy-external-address",
    "true-client-ip",
    "cdn-loop",
    "cf-connecting-ip",
    "cf-ray",
    "fastly-client-ip",
    "fly-client-ip",
    "x-amzn-trace-id",
];

/// The only protection of a server without keys. It refuses requests that came through a proxy, whose Host is not a
/// name of this machine (DNS rebinding), or that a page of another site sent.
fn check_local(app: &AppState, request: &Request) -> Result<(), Problem> {
    if app.settings.auth == Auth::None {
        if let Some(evidence) = proxy_evidence(request.version(), request.headers()) {
            let detail = format!(
                "{evidence} shows that the request came through a proxy, and without keys the server answers its own machine only; \
                 start it with `--auth keys`, or with the `--public-url` that clients use, and make a key with \
                 `hypnos keys create`"
            );
            return Err(Problem::new(Kind::Proxied, detail));
        }
        if !host(request.uri(), request.headers()).is_some_and(|host| is_loopback(without_port(host))) {
            return Err(Problem::new(
                Kind::Host,
                "wanted a name of this machine: localhost or a loopback address",
            ));
        }
        if is_cross_site(request.uri(), request.headers(), &app.settings.public_url) {
            return Err(Problem::new(Kind::CrossSite, "the request comes from a page of another site"));
        }
    }
    Ok(())
}

/// What shows that a request came through a proxy, if anything does. A proxy that adds no header and sends a loopback
/// Host cannot be distinguished from a client; but nginx by default sends HTTP/1.0, which clients no longer do.
fn proxy_evidence(version: Version, headers: &HeaderMap) -> Option<String> {
    let is_evidence = |name: &&str| name.starts_with("x-forwarded") || PROXY_HEADERS.contains(name);
    let header = headers.keys().map(HeaderName::as_str).find(is_evidence);
    let is_old = version < Version::HTTP_11;
    header.map(|name| format!("the header {name}")).or_else(|| is_old.then(|| "HTTP/1.0".to_owned()))
}

/// The host and port in the request.
fn host<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Option<&'a str> {
    let authority = uri.authority().map(Authority::as_str);
    authority.or_else(|| headers.get(header::HOST)?.to_str().ok())
}

/// Whether a URL's host, without its port, always means the local machine.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    let address: Option<IpAddr> = name.trim_matches(['[', ']']).parse().ok();
    let loopback = address.is_some_and(|address| address.to_canonical().is_loopback());
    loopback || name == "localhost" || name.ends_with(".localhost") // RFC 6761
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

fn is_cross_site(uri: &Uri, headers: &HeaderMap, public_url: &str) -> bool {
    if let Some(site) = headers.get("sec-fetch-site") {
        return site != "same-origin" && site != "none"; // "same-site" is another port of this machine
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return false };
    let own = host(uri, headers).map(|host| format!("http://{host}"));
    let public = public_url
        .parse::<Uri>()
        .ok()
        .and_then(|url| Some(format!("{}://{}", url.scheme_str()?, url.authority()?)));
    !origin.to_str().is_ok_and(|origin| [own, public].into_iter().flatten().any(|own| own == origin))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_this_machine_by_its_name_only() {
        let own = ["localhost", "LocalHost.:80", "a.localhost", "127.0.0.1:8080", "[::1]:80", "127.9.9.9"];
        for own in own.into_iter().chain(["[::ffff:127.0.0.1]"]) {
            assert!(is_loopback(without_port(own)), "{own}");
        }
        for other in
            ["evil.example", "localhost.evil.example", "10.0.0.1", "", "127.0.0.1.evil.example:80", "127.1"]
        {
            assert!(!is_loopback(without_port(other)), "{other}");
        }
    }

    #[test]
    fn a_proxy_is_known_by_what_it_adds() {
        let evidence = |name: &'static str| {
            let headers =
                HeaderMap::from_iter([(HeaderName::from_static(name), "x".parse().expect("a value"))]);
            proxy_evidence(Version::HTTP_11, &headers)
        };
        for name in [
            "forwarded",
            "x-forwarded-for",
            "x-forwarded-host",
            "x-forwarded-proto",
            "x-forwarded-port",
            "via",
            "x-real-ip",
        ] {
            assert_eq!(evidence(name), Some(format!("the header {name}")));
        }
        for name in ["accept", "x-request-id", "forwarded-not", "user-agent", "traceparent"] {
            assert_eq!(evidence(name), None, "{name}");
        }
        assert_eq!(proxy_evidence(Version::HTTP_10, &HeaderMap::new()).as_deref(), Some("HTTP/1.0"));
        assert_eq!(proxy_evidence(Version::HTTP_2, &HeaderMap::new()), None);
    }
}
