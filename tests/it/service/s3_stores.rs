//! Differences of S3-compatible servers: each rejects something that another supports, in its own way.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hypnos::blobs::{Blobs, BlobsConfig, Bucket, Credentials, Error, Key, Name, Place, Scope};
use hypnos::job::{JobId, Lease, TenantId};
use jiff::{SignedDuration, Timestamp};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::chaos::keys;
use super::s3::{ACCESS_KEY, Answer, BUCKET, Faulty, Garage, SECRET_KEY};

async fn open(bucket: Bucket) -> Blobs {
    Blobs::open(&BlobsConfig { place: Place::Bucket(bucket), links: None }).await.unwrap()
}

/// Photos of a job, in the store.
async fn photos(blobs: &Blobs, tenant: TenantId, job: JobId, n: usize) {
    for n in 0..n {
        blobs.put(&Key::photo(tenant, job, n), "x").await.unwrap();
    }
}

fn is_bulk(asked: &str) -> bool {
    asked.starts_with("POST ") && asked.contains("?delete")
}

/// Ways in which stores refuse to remove in bulk.
fn refusals() -> Vec<(&'static str, Answer)> {
    vec![
        ("not implemented", Answer::refusal(501, "NotImplemented", "")),
        ("no such method", Answer::refusal(405, "MethodNotAllowed", "")),
        ("not allowed", Answer::refusal(403, "AccessDenied", "")),
        ("no such resource", Answer::refusal(404, "NoSuchKey", "")),
        ("a header that it does not know", Answer::refusal(400, "InvalidArgument", "")),
        ("no XML", Answer { status: 400, headers: vec![], body: "Bad Request".into() }),
        ("done without a word", Answer { status: 200, headers: vec![], body: "<DeleteResult/>".into() }),
        ("done, in HTML", Answer { status: 200, headers: vec![], body: "<html>ok".into() }),
    ]
}

// case A13
#[tokio::test]
async fn where_bulk_delete_is_refused_objects_are_deleted_one_by_one_and_it_is_tried_once() {
    for (what, refusal) in refusals() {
        let server = Faulty::start().await;
        let blobs = open(server.bucket()).await;
        server.has(move |request| {
            let is_bulk = request.method == Method::POST && request.uri.query() == Some("delete");
            is_bulk.then(|| refusal.clone())
        });
        let (tenant, job) = (TenantId::new(), JobId::new());
        for n_bulk in [1, 0] {
            photos(&blobs, tenant, job, 5).await;
            server.asked();
            let began = Instant::now();
            assert_eq!(blobs.delete_all(&Scope::job(tenant, job)).await, Ok(5), "{what}");
            assert!(began.elapsed() < Duration::from_secs(5), "{what}: asked again and again");
            assert!(keys(&*server.store()).await.is_empty(), "{what}");
            let asked = server.asked();
            assert_eq!(asked.iter().filter(|asked| is_bulk(asked)).count(), n_bulk, "{what}: {asked:?}");
        }
        // One object is one request in any case.
        photos(&blobs, tenant, job, 1).await;
        server.asked();
        blobs.delete(&Key::photo(tenant, job, 0)).await.unwrap();
        let asked = server.asked();
        assert!(matches!(&asked[..], [one] if one.starts_with("DELETE ")), "{what}: {asked:?}");
    }
}

#[tokio::test]
async fn where_bulk_delete_works_a_thousand_objects_are_one_request() {
    let server = Faulty::start().await;
    let blobs = open(server.bucket()).await;
    let (tenant, job) = (TenantId::new(), JobId::new());
    photos(&blobs, tenant, job, 30).await;
    server.asked();
    assert_eq!(blobs.delete_all(&Scope::job(tenant, job)).await, Ok(30));
    let asked = server.asked();
    assert_eq!(asked.iter().filter(|asked| is_bulk(asked)).count(), 1);
    assert_eq!(asked.len(), 2, "a listing and a removal: {asked:?}");
    assert!(keys(&*server.store()).await.is_empty());
}

// case A12, A13
#[tokio::test]
async fn an_object_that_cannot_be_removed_does_not_keep_others() {
    for bulk in [true, false] {
        let server = Faulty::start().await;
        let blobs = open(server.bucket()).await;
        server.has(move |request| {
            let refused = Answer::refusal(403, "AccessDenied", "");
            let is_bulk = request.method == Method::POST && request.uri.query() == Some("delete");
            let is_locked = request.method == Method::DELETE && request.uri.path().ends_with("/3.png");
            (is_locked || is_bulk && !bulk).then_some(refused)
        });
        let (tenant, job) = (TenantId::new(), JobId::new());
        photos(&blobs, tenant, job, 8).await;
        let failed = if bulk {
            // The library's bulk removal knows no lock here: one by one is where it shows.
            let mut failed = Vec::new();
            for n in 0..8 {
                failed.extend(blobs.delete_each(&[Key::photo(tenant, job, n)]).await);
            }
            failed
        } else {
            let all: Vec<Key> = (0..8).map(|n| Key::photo(tenant, job, n)).collect();
            blobs.delete_each(&all).await
        };
        let [(key, Error::Refused(refusal))] = &failed[..] else { panic!("{failed:?}") };
        assert_eq!((key, refusal.to_string().as_str()), (&Key::photo(tenant, job, 3), "403 AccessDenied"));
        assert_eq!(keys(&*server.store()).await, [format!("test/pre/{key}")]);
        assert!(blobs.delete_all(&Scope::job(tenant, job)).await.is_err());
    }
}

// case A13
#[tokio::test]
async fn a_store_that_refuses_checksum_headers_is_sent_none() {
    let server = Faulty::start().await;
    let blobs = open(server.bucket()).await;
    server.has(|request| {
        let mut names = request.headers.keys().map(hyper::http::HeaderName::as_str);
        let refused =
            names.any(|name| name.contains("checksum") || name == "content-md5" || name.contains("sdk"));
        refused.then(|| Answer::refusal(400, "InvalidArgument", ""))
    });
    let (tenant, job) = (TenantId::new(), JobId::new());
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("weights");
    std::fs::write(&file, vec![7; 20 << 20]).unwrap();
    let key = Key::artifact(tenant, Lease { job, run_lease: 1 }, Name::Weights);
    let weights = blobs.put_file(&key, &file, |_| {}).await.unwrap();
    blobs.get_to_file(&weights, &directory.path().join("back")).await.unwrap();
    photos(&blobs, tenant, job, 3).await;
    blobs.probe().await.unwrap();
    assert_eq!(blobs.delete_all(&Scope::job(tenant, job)).await, Ok(4));
    assert!(keys(&*server.store()).await.is_empty());
}

// case A13
#[tokio::test]
async fn readiness_needs_no_permission_that_work_does_not_need() {
    let server = Faulty::start().await;
    let blobs = open(server.bucket()).await;
    server.asked();
    blobs.probe().await.unwrap();
    let methods: BTreeSet<String> =
        server.asked().iter().map(|asked| asked.split(' ').next().unwrap().to_owned()).collect();
    assert_eq!(methods, BTreeSet::from(["DELETE".into(), "GET".into(), "PUT".into()]));
    assert!(keys(&*server.store()).await.is_empty());
    // Nor is it in the way that nothing may be removed; what the probe leaves the sweep takes.
    let refused = |request: &hyper::http::request::Parts| {
        let may = request.method == Method::PUT || request.method == Method::GET;
        (!may).then(|| Answer::refusal(403, "AccessDenied", ""))
    };
    server.has(refused);
    blobs.probe().await.unwrap();
    blobs.probe().await.unwrap();
    assert_eq!(keys(&*server.store()).await.len(), 1);
    server.calm();
    assert_eq!(blobs.sweep_unfinished(Duration::from_hours(1)).await, Ok(0));
    assert_eq!(blobs.sweep_unfinished(Duration::ZERO).await, Ok(1));
    assert!(keys(&*server.store()).await.is_empty());
}

/// What stores answer whose region or clock is not ours, and what an operator must find in our words.
fn misunderstandings() -> Vec<(Answer, &'static str)> {
    let date = |hours: i64| {
        let at = Timestamp::now() + SignedDuration::from_hours(hours);
        jiff::fmt::rfc2822::to_string(&at.to_zoned(jiff::tz::TimeZone::UTC)).unwrap().replace("+0000", "GMT")
    };
    let region = ("x-amz-bucket-region", "eu-central-1".to_owned());
    let moved =
        Answer::refusal(301, "PermanentRedirect", "<Endpoint>hypnos.s3.eu-central-1.example</Endpoint>");
    let skewed =
        Answer::refusal(403, "RequestTimeTooSkewed", "<Message>The difference is too large.</Message>");
    vec![
        (
            Answer { headers: vec![region], ..moved },
            "301 PermanentRedirect; the bucket is in the region eu-central-1, which HYPNOS_S3_REGION must name",
        ),
        (
            Answer::refusal(
                400,
                "AuthorizationHeaderMalformed",
                "<Message>The region 'us-east-1' is wrong; expecting 'eu-west-3'</Message><Region>eu-west-3</Region>",
            ),
            "expecting 'eu-west-3'); the bucket is in the region eu-west-3, which HYPNOS_S3_REGION must name",
        ),
        (
            Answer::refusal(400, "InvalidRegionName", "<Message>Must be one of: wnam, auto</Message>"),
            "400 InvalidRegionName (Must be one of: wnam, auto)",
        ),
        (
            Answer { headers: vec![("date", date(2))], ..skewed.clone() },
            "403 RequestTimeTooSkewed (The difference is too large); this machine's clock is 7",
        ),
        (Answer { headers: vec![("date", date(-2))], ..skewed }, "s ahead of the store's"),
        (Answer::refusal(403, "InvalidAccessKeyId", ""), "403 InvalidAccessKeyId"),
    ]
}

// case A13
#[tokio::test]
async fn a_wrong_region_or_clock_is_reported_at_once_in_the_store_s_own_words() {
    let server = Faulty::start().await;
    let blobs = open(server.bucket()).await;
    let key = Key::photo(TenantId::new(), JobId::new(), 0);
    let object = blobs.put(&key, "x").await.unwrap();
    for (answer, wanted) in misunderstandings() {
        server.has(move |_| Some(answer.clone()));
        server.asked();
        let errors = [
            blobs.marker().await.unwrap_err(),
            blobs.get(&object).await.unwrap_err(),
            blobs.put(&key, "x").await.unwrap_err(),
            blobs.delete(&key).await.unwrap_err(),
            blobs.probe().await.unwrap_err(),
        ];
        for error in errors {
            let Error::Refused(refusal) = &error else { panic!("{wanted}: {error}") };
            assert!(refusal.details().contains(wanted), "{wanted}: {}", refusal.details());
            assert!(!error.is_transient());
            let short = error.to_string();
            assert!(!short.contains('<') && !short.contains('(') && !short.contains("HYPNOS"), "{short}");
        }
        assert_eq!(server.asked().len(), 5, "what is refused is not asked again");
    }
}

/// Keys that consoles and other programs write, and one of ours between them.
fn foreign(tenant: TenantId, job: JobId) -> Vec<String> {
    vec![
        "test/pre/t/".to_owned(),
        format!("test/pre/t/{tenant}/j/{job}/"),
        format!("test/pre/t/{tenant}/j/{job}/photos/"),
        format!("test/pre/t/{tenant}/j/{job}/photos//0.png"),
        format!("test/pre/t/{tenant}/j/{job}//"),
        format!("test/pre/t/{tenant}/j/{job}/a/../photos/0.png"),
        format!("test/pre/t/{tenant}/j/{job}/photos/0.png/"),
    ]
}

async fn foreign_keys_end_nothing(blobs: &Blobs, tenant: TenantId, job: JobId, foreign: &[String]) {
    photos(blobs, tenant, job, 3).await;
    let found = blobs.list_all(&Scope::all()).await.unwrap();
    assert_eq!(found.entries.len(), 3);
    assert_eq!(found.foreign.iter().collect::<BTreeSet<_>>(), foreign.iter().collect::<BTreeSet<_>>());
    assert_eq!(blobs.list(&Scope::job(tenant, job)).await.unwrap().len(), 3);
    assert_eq!(blobs.delete_all(&Scope::job(tenant, job)).await, Ok(3), "ours are gone");
    let left = blobs.list_all(&Scope::all()).await.unwrap();
    assert_eq!((left.entries.len(), left.foreign.len()), (0, foreign.len()));
}

// case A13
#[tokio::test]
async fn foreign_keys_in_a_listing_are_skipped_and_reported() {
    let server = Faulty::start().await;
    let blobs = open(server.bucket()).await;
    let (tenant, job) = (TenantId::new(), JobId::new());
    let mut foreign = foreign(tenant, job);
    // As XML has them.
    server.lists(
        &[&foreign[..], &["test/pre/t/a&amp;b&lt;c&gt;".into(), "test/pre/t/x&#x1;y".into()]].concat(),
    );
    foreign.extend(["test/pre/t/a&b<c>".into(), "test/pre/t/x\u{1}y".into()]);
    foreign_keys_end_nothing(&blobs, tenant, job, &foreign).await;
    let asked = server.asked();
    let touched = asked.iter().filter(|asked| asked.starts_with("DELETE ")).count();
    assert_eq!(touched, 0, "three of ours went in bulk, and nothing else: {asked:?}");
}

// case A13
#[tokio::test]
async fn foreign_keys_in_a_real_bucket_are_skipped_and_kept() {
    let garage = Garage::start().await;
    let blobs = open(garage.bucket()).await;
    let (tenant, job) = (TenantId::new(), JobId::new());
    let mut written = Vec::new();
    for key in foreign(tenant, job) {
        // A client normalises dots in a URL, so that no such key can be written by one.
        if !key.contains("..") {
            assert_eq!(garage.raw(Method::PUT, &key, b"foreign").await.status(), 200, "{key}");
            written.push(key);
        }
    }
    foreign_keys_end_nothing(&blobs, tenant, job, &written).await;
    for key in written {
        let answer = garage.raw(Method::GET, &key, b"").await;
        assert_eq!(
            (answer.status().as_u16(), answer.text().await.unwrap().as_str()),
            (200, "foreign"),
            "{key}"
        );
    }
}

/// Refuses requests without this token.
fn wants_token(server: &Faulty, token: &'static str) {
    server.has(move |request| {
        let brought = request.headers.get("x-amz-security-token").and_then(|value| value.to_str().ok());
        (brought != Some(token)).then(|| Answer::refusal(403, "InvalidToken", ""))
    });
}

#[tokio::test]
async fn temporary_credentials_send_their_session_token() {
    let server = Faulty::start().await;
    wants_token(&server, "a session");
    let key = Key::photo(TenantId::new(), JobId::new(), 0);
    let error = open(server.bucket()).await.put(&key, "x").await.unwrap_err();
    assert_eq!(error.to_string(), "the store rejects the request: 403 InvalidToken");
    let blobs = open(Bucket {
        credentials: Credentials::Keys {
            access_key: ACCESS_KEY.into(),
            secret_key: SECRET_KEY.to_owned().into(),
            session_token: Some("a session".to_owned().into()),
        },
        ..server.bucket()
    });
    let blobs = blobs.await;
    let object = blobs.put(&key, "x").await.unwrap();
    let url = blobs.sign(&object, Duration::from_mins(1), Timestamp::now()).await.unwrap();
    assert!(url.contains("X-Amz-Security-Token=a+session"), "{url}");
    photos(&blobs, TenantId::new(), JobId::new(), 2).await;
    assert_eq!(blobs.delete_all(&Scope::all()).await, Ok(3));
}

/// What a service that gives credentials answers: method, path with query and what came in `Authorization` to an
/// answer.
type CredentialsHandler = dyn Fn(&str, &str, Option<&str>) -> (u16, String) + Send + Sync;

async fn serve_credentials(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    handler: Arc<CredentialsHandler>,
) {
    while let Ok((socket, _)) = listener.accept().await {
        let (handler, tls) = (handler.clone(), tls.clone());
        tokio::spawn(async move {
            let answer = service_fn(move |request: Request<Incoming>| {
                let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
                let (method, uri) = (request.method().to_string(), request.uri().to_string());
                let shown = header("authorization").or_else(|| header("x-aws-ec2-metadata-token"));
                let (status, body) = handler(&method, &uri, shown);
                let answer = Response::builder().status(status).body(Full::new(bytes::Bytes::from(body)));
                async move { answer }
            });
            let server = auto::Builder::new(TokioExecutor::new());
            let _ = match tls {
                Some(tls) => {
                    let Ok(socket) = tls.accept(socket).await else { return };
                    server.serve_connection(TokioIo::new(socket), answer).await
                }
                None => server.serve_connection(TokioIo::new(socket), answer).await,
            };
        });
    }
}

/// A credentials service on a port of its own, without TLS.
async fn credentials_service(
    handler: impl Fn(&str, &str, Option<&str>) -> (u16, String) + Send + Sync + 'static,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve_credentials(listener, None, Arc::new(handler)));
    format!("http://{address}")
}

fn handed_out() -> String {
    let until = Timestamp::now() + SignedDuration::from_hours(1);
    format!(
        r#"{{"Code": "Success", "AccessKeyId": "{ACCESS_KEY}", "SecretAccessKey": "{SECRET_KEY}", "Token": "a session",
            "Expiration": "{until}"}}"#
    )
}

/// Writes, signs and removes with the given credentials.
async fn works(server: &Faulty, credentials: Credentials) {
    let blobs = open(Bucket { credentials, ..server.bucket() }).await;
    let (tenant, job) = (TenantId::new(), JobId::new());
    photos(&blobs, tenant, job, 3).await;
    blobs.probe().await.unwrap();
    assert_eq!(blobs.delete_all(&Scope::job(tenant, job)).await, Ok(3));
    assert!(blobs.is_empty().await.unwrap());
}

#[tokio::test]
async fn containers_and_virtual_machines_get_credentials() {
    let server = Faulty::start().await;
    wants_token(&server, "a session");
    let dir = tempfile::tempdir().unwrap();
    let token_file = dir.path().join("token");
    std::fs::write(&token_file, "shown to the agent").unwrap();
    let agent = credentials_service(|_, uri, shown| match (uri, shown) {
        ("/v1/credentials", Some("shown to the agent")) => (200, handed_out()),
        _ => (401, "who are you".into()),
    });
    let place = format!("{}/v1/credentials", agent.await);
    works(&server, Credentials::Container { place: place.clone(), token_file: Some(token_file.clone()) })
        .await;

    let metadata = credentials_service(|method, uri, shown| match (method, uri, shown) {
        ("PUT", "/latest/api/token", _) => (200, "metadata token".into()),
        ("GET", "/latest/meta-data/iam/security-credentials/", Some("metadata token")) => {
            (200, "role".into())
        }
        ("GET", "/latest/meta-data/iam/security-credentials/role", Some("metadata token")) => {
            (200, handed_out())
        }
        _ => (401, String::new()),
    });
    works(&server, Credentials::Instance { endpoint: Some(metadata.await) }).await;

    // Whoever refuses is named.
    std::fs::write(&token_file, "somebody else's").unwrap();
    let blobs = Bucket {
        credentials: Credentials::Container { place, token_file: Some(token_file) },
        ..server.bucket()
    };
    let error = open(blobs).await.marker().await.unwrap_err();
    assert_eq!(error.to_string(), "the store rejects the request: the credentials service answers 401");
}

/// The whole program assumes a role with a token in a file, at a service with TLS as STS has it.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_is_assumed_with_the_token_in_a_file() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let server = Faulty::start().await;
    wants_token(&server, "a session");
    let dir = tempfile::tempdir().unwrap();
    let issued = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
    let authority = dir.path().join("authority.pem");
    std::fs::write(&authority, issued.cert.pem()).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(issued.signing_key.serialize_der()).unwrap();
    let tls = rustls::ServerConfig::builder().with_no_client_auth();
    let tls = tls.with_single_cert(vec![issued.cert.der().clone()], key).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let sts = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let answer = |method: &str, uri: &str, _: Option<&str>| {
        let wanted = [
            "Action=AssumeRoleWithWebIdentity",
            "WebIdentityToken=of+the+platform",
            "RoleSessionName=hypnos",
        ];
        if method != "POST"
            || !wanted.iter().all(|wanted| uri.contains(wanted))
            || !uri.contains("RoleArn=arn")
        {
            let body = "<ErrorResponse><Error><Code>InvalidIdentityToken</Code></Error></ErrorResponse>";
            return (400, body.into());
        }
        let until = Timestamp::now() + SignedDuration::from_hours(1);
        let body = format!(
            "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>\
             <AccessKeyId>{ACCESS_KEY}</AccessKeyId><SecretAccessKey>{SECRET_KEY}</SecretAccessKey>\
             <SessionToken>a session</SessionToken><Expiration>{until}</Expiration>\
             </Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        );
        (200, body)
    };
    tokio::spawn(serve_credentials(listener, Some(TlsAcceptor::from(Arc::new(tls))), Arc::new(answer)));

    let token_file = dir.path().join("token");
    let migrate = |settings: Vec<(&'static str, String)>| {
        let mut command = hypnos(dir.path(), &["migrate"]);
        command
            .env("SSL_CERT_FILE", &authority)
            .env_remove("SSL_CERT_DIR")
            .env("HYPNOS_OBJECTS", format!("s3://{BUCKET}/role"))
            .env("HYPNOS_S3_ENDPOINT", &server.endpoint)
            .env("HYPNOS_S3_CREDENTIALS", "web-identity")
            .envs(settings);
        tokio::task::spawn_blocking(move || command.output().unwrap())
    };
    // By our settings.
    std::fs::write(&token_file, "of the platform").unwrap();
    let ours = vec![
        ("HYPNOS_S3_ROLE_ARN", "arn:aws:iam::1:role/hypnos".to_owned()),
        ("HYPNOS_S3_WEB_IDENTITY_FILE", token_file.display().to_string()),
        ("HYPNOS_S3_STS_ENDPOINT", sts.clone()),
    ];
    let done = migrate(ours.clone()).await.unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    server.calm();
    assert_eq!(keys(&*server.store()).await, ["role/deployment.json"]);
    wants_token(&server, "a session");
    // By what the platform sets.
    let platform = vec![
        ("AWS_ROLE_ARN", "arn:aws:iam::1:role/hypnos".to_owned()),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", token_file.display().to_string()),
        ("AWS_ENDPOINT_URL_STS", sts),
    ];
    let done = migrate(platform).await.unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    // One line says who refused.
    std::fs::write(&token_file, "expired").unwrap();
    let done = migrate(ours).await.unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(2), "{said}");
    let wanted = "error: HYPNOS_OBJECTS: the object store rejects the request: the credentials service answers 400 \
                  InvalidIdentityToken\n";
    assert_eq!(said, wanted);
}

/// The program in a data directory of its own, with none of our environment's settings.
fn hypnos(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hypnos"));
    let ours = std::env::vars_os().map(|(name, _)| name).filter(|name| {
        let name = name.to_string_lossy();
        name.starts_with("HYPNOS_") || name.starts_with("AWS_")
    });
    for name in ours {
        command.env_remove(name);
    }
    command.args(args).env("HYPNOS_DATA", dir.join("data")).env("HYPNOS_LOG", "error");
    command
}

// case A13
#[tokio::test(flavor = "multi_thread")]
async fn a_rejection_by_the_store_is_one_line_at_startup() {
    let server = Faulty::start().await;
    let dir = tempfile::tempdir().unwrap();
    for (answer, wanted) in misunderstandings() {
        server.has(move |_| Some(answer.clone()));
        for args in [&["serve", "--listen", "127.0.0.1:0"][..], &["work"], &["pair"]] {
            let mut command = hypnos(dir.path(), args);
            command
                .env("HYPNOS_OBJECTS", format!("s3://{BUCKET}"))
                .env("HYPNOS_S3_ENDPOINT", &server.endpoint)
                .env("HYPNOS_S3_ACCESS_KEY", ACCESS_KEY)
                .env("HYPNOS_S3_SECRET_KEY", SECRET_KEY);
            let ended = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
            let said = String::from_utf8_lossy(&ended.stderr);
            assert_eq!(ended.status.code(), Some(2), "{args:?}: {said}");
            assert!(
                said.starts_with("error: HYPNOS_OBJECTS: the object store rejects the request: "),
                "{args:?}: {said}"
            );
            assert!(said.contains(wanted) && said.lines().count() == 1, "{args:?}: {wanted}: {said}");
        }
    }
}
