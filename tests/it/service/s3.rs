//! Two S3 servers: Garage, a real one in a process of its own, and s3s-fs, in this process behind faults.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::http::request::Parts;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hypnos::blobs::{Bucket, Credentials};
use hypnos::ml::random;
use object_store::aws::{AmazonS3, AmazonS3Builder, AwsAuthorizer, AwsCredential};
use object_store::client::HttpRequestBody;
use object_store::signer::{SignedUrlOptions, Signer};
use object_store::{ClientOptions, ObjectStore};
use tempfile::TempDir;

pub(crate) const REGION: &str = "us-east-1";
pub(crate) const ACCESS_KEY: &str = "GK31c2f218a2e44f485b94239e";
pub(crate) const SECRET_KEY: &str = "b892c0665f0ada8a4755dae98baa3b133590e11dae3bcc1f9d769d67f16c3835";
pub(crate) const BUCKET: &str = "hypnos";
const INSTALL: &str = "no `garage` in $HYPNOS_TEST_GARAGE, PATH or ~/.cache/hypnos/tools/bin: run .ci/test, or \
                       cargo install garage --version 2.5.0 --locked --debug --no-default-features \
                       --features bundled-libs,sqlite --root ~/.cache/hypnos/tools";

/// An HTTP client. There is one TLS library, which the first user installs.
pub(crate) fn http() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().timeout(Duration::from_secs(30)).build().unwrap()
}

fn bucket(endpoint: &str) -> Bucket {
    Bucket {
        name: BUCKET.into(),
        prefix: "test/pre".into(),
        endpoint: Some(endpoint.into()),
        public_endpoint: None,
        region: REGION.into(),
        credentials: keys(SECRET_KEY),
    }
}

/// Our keys, with this secret.
pub(crate) fn keys(secret_key: &str) -> Credentials {
    Credentials::Keys {
        access_key: ACCESS_KEY.into(),
        secret_key: secret_key.to_owned().into(),
        session_token: None,
    }
}

fn client(endpoint: &str) -> AmazonS3 {
    let _ = rustls::crypto::ring::default_provider().install_default();
    AmazonS3Builder::new()
        .with_endpoint(endpoint)
        .with_bucket_name(BUCKET)
        .with_region(REGION)
        .with_access_key_id(ACCESS_KEY)
        .with_secret_access_key(SECRET_KEY)
        .with_client_options(ClientOptions::new().with_allow_http(true))
        .build()
        .unwrap()
}

/// A Garage of this test's own. It ends with this value, or with this process however that ends.
pub(crate) struct Garage {
    /// Where it answers.
    pub(crate) endpoint: String,
    process: Child,
    _directory: TempDir,
}

impl Garage {
    pub(crate) async fn start() -> Self {
        let program = find_garage().expect(INSTALL);
        let client = http();
        for _ in 0..5 {
            if let Some(garage) = Self::try_start(&program, &client).await {
                return garage;
            }
        }
        panic!("Garage did not start in five tries, each on ports that were free just before");
    }

    async fn try_start(program: &Path, client: &reqwest::Client) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().display();
        let free: Vec<_> = (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let ports: Vec<_> = free.iter().map(|listener| listener.local_addr().unwrap().port()).collect();
        drop(free);
        let (rpc, s3, admin) = (ports[0], ports[1], ports[2]);
        let settings = format!(
            "metadata_dir = \"{place}/meta\"\ndata_dir = \"{place}/data\"\ndb_engine = \"sqlite\"\n\
             replication_factor = 1\ncompression_level = \"none\"\nrpc_bind_addr = \"127.0.0.1:{rpc}\"\nrpc_public_addr = \"127.0.0.1:{rpc}\"\n\
             rpc_secret = \"{SECRET_KEY}\"\n[s3_api]\ns3_region = \"{REGION}\"\n\
             api_bind_addr = \"127.0.0.1:{s3}\"\n[admin]\napi_bind_addr = \"127.0.0.1:{admin}\"\n"
        );
        let file = directory.path().join("garage.toml");
        std::fs::write(&file, settings).unwrap();
        let log = directory.path().join("log");
        // The shell kills Garage when its standard input ends, which it does when this process does.
        let watch = "exec 3<&0; \"$@\" </dev/null & pid=$!; (cat <&3 >/dev/null; kill -9 $pid) & wait $pid";
        let mut process = Command::new("sh")
            .args(["-c", watch, "sh"])
            .arg(program)
            .arg("-c")
            .arg(&file)
            .args(["server", "--single-node", "--default-access-key", "--default-bucket"])
            .env("GARAGE_DEFAULT_ACCESS_KEY", ACCESS_KEY)
            .env("GARAGE_DEFAULT_SECRET_KEY", SECRET_KEY)
            .env("GARAGE_DEFAULT_BUCKET", BUCKET)
            .stdin(Stdio::piped())
            .stdout(std::fs::File::create(&log).unwrap())
            .stderr(std::fs::File::options().append(true).open(&log).unwrap())
            .spawn()
            .unwrap();

        let deadline = Instant::now() + Duration::from_mins(1);
        let health = format!("http://127.0.0.1:{admin}/health");
        loop {
            if process.try_wait().unwrap().is_some() {
                eprintln!("{}", std::fs::read_to_string(&log).unwrap());
                return None;
            }
            if client.get(&health).send().await.is_ok_and(|answer| answer.status().is_success()) {
                let endpoint = format!("http://127.0.0.1:{s3}");
                return Some(Self { endpoint, process, _directory: directory });
            }
            assert!(Instant::now() < deadline, "Garage is not healthy after a minute");
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// How the service reaches its bucket.
    pub(crate) fn bucket(&self) -> Bucket {
        bucket(&self.endpoint)
    }

    /// Its bucket, without the service between.
    pub(crate) fn store(&self) -> Arc<dyn ObjectStore> {
        Arc::new(client(&self.endpoint))
    }

    /// Writes or reads an object under any key, which the library would refuse.
    pub(crate) async fn raw(&self, method: Method, key: &str, bytes: &'static [u8]) -> reqwest::Response {
        let url = format!("{}/{BUCKET}/{key}", self.endpoint);
        let body = HttpRequestBody::from(Bytes::from_static(bytes));
        let mut request = Request::builder().method(method.clone()).uri(&url).body(body).unwrap();
        let credential =
            AwsCredential { key_id: ACCESS_KEY.into(), secret_key: SECRET_KEY.into(), token: None };
        AwsAuthorizer::new(&credential, "s3", REGION).try_authorize(&mut request, None).unwrap();
        let headers = request.headers().clone();
        http().request(method, url).headers(headers).body(bytes).send().await.unwrap()
    }

    /// The answer to the question which uploads are unfinished.
    pub(crate) async fn unfinished(&self) -> usize {
        let options = SignedUrlOptions::new().with_query([("uploads", "")]);
        let root = object_store::path::Path::default();
        let ttl = Duration::from_mins(1);
        let url = client(&self.endpoint).signed_url_opts(Method::GET, &root, ttl, &options).await.unwrap();
        let answer = http().get(url).send().await.unwrap().error_for_status().unwrap().text().await.unwrap();
        assert!(answer.contains("ListMultipartUploadsResult"), "{answer}");
        answer.matches("<Upload>").count()
    }
}

impl Drop for Garage {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

fn find_garage() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let path = set("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|place| place.join("garage"));
    let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".cache")));
    let cached = cache.map(|cache| cache.join("hypnos/tools/bin/garage"));
    set("HYPNOS_TEST_GARAGE")
        .map(PathBuf::from)
        .into_iter()
        .chain(in_path)
        .chain(cached)
        .find(|place| place.is_file())
}

/// What happens to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Answered with 503 SlowDown; nothing done.
    SlowDown,
    /// Answered with 500 and an XML that holds what no client may see; nothing done.
    Broken,
    /// The connection ends without an answer; nothing done.
    Deaf,
    /// Done; the connection ends without an answer.
    Lost,
    /// The answer's body breaks off half-way, against its promised length.
    Cut,
    /// The answer's body is half as long, and says so.
    Short,
    /// One bit of the answer's body is turned.
    Flip,
    /// Answered a tenth of a second later.
    Slow,
}

impl Fault {
    pub(crate) const ALL: [Self; 8] = [
        Self::SlowDown,
        Self::Broken,
        Self::Deaf,
        Self::Lost,
        Self::Cut,
        Self::Short,
        Self::Flip,
        Self::Slow,
    ];
}

/// Selects a request by its method and its path with query.
type Choice = fn(&Method, &str) -> bool;

/// What a store answers in its own way: to this request, instead of doing it.
pub(crate) type Quirk = dyn Fn(&Parts) -> Option<Answer> + Send + Sync;

/// An answer of a store.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: String,
}

impl Answer {
    /// A refusal in S3's form.
    pub(crate) fn refusal(status: u16, code: &str, more: &str) -> Self {
        let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code>{more}</Error>");
        Self { status, headers: Vec::new(), body }
    }

    fn sent(self) -> Response<Body> {
        let mut answer = Response::builder().status(self.status);
        for (name, value) in self.headers {
            answer = answer.header(name, value);
        }
        answer.body(whole(self.body.into())).unwrap()
    }
}

#[derive(Default)]
struct Faults {
    planned: VecDeque<(Choice, Fault, usize)>,
    quirk: Option<Arc<Quirk>>,
    /// Keys that are added to listings.
    listed: Vec<String>,
    /// Method and path with query of every request.
    asked: Vec<String>,
    /// One in so many requests fails, by a stream of random numbers.
    random: Option<(u64, u64, u64)>,
}

impl Faults {
    fn next(&mut self, method: &Method, uri: &str) -> Option<Fault> {
        let fits = self.planned.iter_mut().find(|(choice, _, left)| *left > 0 && choice(method, uri));
        if let Some((_, fault, left)) = fits {
            *left -= 1;
            return Some(*fault);
        }
        let (seed, one_in, n) = self.random.as_mut()?;
        *n += 1;
        let drawn = random::derive(*seed, &n.to_string());
        drawn.is_multiple_of(*one_in).then(|| Fault::ALL[(drawn / *one_in) as usize % Fault::ALL.len()])
    }
}

/// s3s-fs in this process, behind faults.
pub(crate) struct Faulty {
    /// Where it answers.
    pub(crate) endpoint: String,
    directory: TempDir,
    faults: Arc<Mutex<Faults>>,
    serving: tokio::task::JoinHandle<()>,
}

type Body = BoxBody<Bytes, io::Error>;

impl Faulty {
    pub(crate) async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join(BUCKET)).unwrap();
        let files = s3s_fs::FileSystem::new(directory.path()).unwrap();
        let mut builder = s3s::service::S3ServiceBuilder::new(files);
        builder.set_auth(s3s::auth::SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let service = builder.build();

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let faults: Arc<Mutex<Faults>> = Arc::default();
        let plan = Arc::clone(&faults);
        let serving = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (service, plan) = (service.clone(), Arc::clone(&plan));
                tokio::spawn(async move {
                    let answer =
                        service_fn(move |request| answer(service.clone(), Arc::clone(&plan), request));
                    let server = auto::Builder::new(TokioExecutor::new());
                    // Connections that faults end end with an error, as they should.
                    let _ = server.serve_connection(TokioIo::new(socket), answer).await;
                });
            }
        });
        Self { endpoint, directory, faults, serving }
    }

    /// The next `n` requests that `choice` selects fail.
    pub(crate) fn inject(&self, choice: Choice, fault: Fault, n: usize) {
        self.faults.lock().unwrap().planned.push_back((choice, fault, n));
    }

    /// One in `one_in` requests fails, the same ones for the same seed.
    pub(crate) fn strike_at_random(&self, seed: u64, one_in: u64) {
        self.faults.lock().unwrap().random = Some((seed, one_in, 0));
    }

    /// No request fails any more.
    pub(crate) fn calm(&self) {
        *self.faults.lock().unwrap() = Faults::default();
    }

    /// From now on it answers some requests in its own way.
    pub(crate) fn has(&self, quirk: impl Fn(&Parts) -> Option<Answer> + Send + Sync + 'static) {
        self.faults.lock().unwrap().quirk = Some(Arc::new(quirk));
    }

    /// From now on it lists these keys too, as a store does that others write to.
    pub(crate) fn lists(&self, keys: &[String]) {
        self.faults.lock().unwrap().listed = keys.to_vec();
    }

    /// Methods and paths with queries of the requests since the last time that this was asked.
    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.faults.lock().unwrap().asked)
    }

    /// How the service reaches its bucket.
    pub(crate) fn bucket(&self) -> Bucket {
        bucket(&self.endpoint)
    }

    /// Its bucket, without the service between.
    pub(crate) fn store(&self) -> Arc<dyn ObjectStore> {
        Arc::new(client(&self.endpoint))
    }

    /// Files of unfinished uploads.
    pub(crate) fn unfinished(&self) -> usize {
        files(self.directory.path()).iter().filter(|name| name.starts_with(".upload")).count()
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// The names of all files below `directory`.
pub(crate) fn files(directory: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        if entry.path().is_dir() {
            names.extend(files(&entry.path()));
        } else {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names
}

async fn answer(
    service: s3s::service::S3Service,
    plan: Arc<Mutex<Faults>>,
    request: Request<Incoming>,
) -> Result<Response<Body>, io::Error> {
    let uri = request.uri().to_string();
    let (fault, quirk, listed) = {
        let mut plan = plan.lock().unwrap();
        plan.asked.push(format!("{} {uri}", request.method()));
        (plan.next(request.method(), &uri), plan.quirk.clone(), plan.listed.clone())
    };
    let (head, body) = request.into_parts();
    if let Some(answer) = quirk.and_then(|quirk| quirk(&head)) {
        return Ok(answer.sent());
    }
    let request = Request::from_parts(head, body);
    let is_listing = request.method() == Method::GET && uri.contains("list-type=2");
    let broken = |_| io::Error::other("the request broke off");
    match fault {
        Some(Fault::SlowDown) => return Ok(refusal(503, "SlowDown")),
        Some(Fault::Broken) => return Ok(refusal(500, "InternalError")),
        Some(Fault::Deaf) => return Err(io::Error::other("deaf")),
        Some(Fault::Slow) => tokio::time::sleep(Duration::from_millis(100)).await,
        _ => {}
    }
    let (mut head, body) =
        service.call(request.map(s3s::Body::from)).await.map_err(|_| io::Error::other("s3s"))?.into_parts();
    let mut bytes = body.collect().await.map_err(broken)?.to_bytes();
    if is_listing {
        let prefix = listed_prefix(&uri);
        let entries = listed.iter().filter(|key| key.starts_with(&prefix)).map(|key| {
            format!(
                "<Contents><Key>{key}</Key><LastModified>2020-01-01T00:00:00.000Z</LastModified><Size>1</Size></Contents>"
            )
        });
        let entries: String = entries.collect();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        bytes = text.replace("</ListBucketResult>", &format!("{entries}</ListBucketResult>")).into();
        head.headers.remove("content-length");
    }
    if fault == Some(Fault::Lost) {
        return Err(io::Error::other("lost"));
    }
    let mut answer = Response::from_parts(head, ());
    let half = bytes.slice(..bytes.len() / 2);
    let body = match fault {
        Some(Fault::Cut) => {
            let end = Err(io::Error::other("cut"));
            StreamBody::new(stream::iter([Ok(Frame::data(half)), end])).boxed()
        }
        Some(Fault::Short) => {
            if answer.headers().contains_key("content-length") {
                answer.headers_mut().insert("content-length", half.len().into());
            }
            whole(half)
        }
        Some(Fault::Flip) => {
            let mut bytes = bytes.to_vec();
            let middle = bytes.len() / 2;
            if let Some(byte) = bytes.get_mut(middle) {
                *byte ^= 4;
            }
            whole(bytes.into())
        }
        _ => whole(bytes),
    };
    Ok(answer.map(|()| body))
}

/// What the keys of a listing are to begin with.
fn listed_prefix(uri: &str) -> String {
    let prefix = uri.split(['?', '&']).find_map(|field| field.strip_prefix("prefix="));
    prefix.unwrap_or_default().replace("%2F", "/")
}

fn refusal(status: u16, code: &str) -> Response<Body> {
    let xml = format!(
        "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>secret words</Message>\
         <Resource>/{BUCKET}/private</Resource></Error>"
    );
    Response::builder().status(status).body(whole(xml.into())).unwrap()
}

fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never: Infallible| match never {}).boxed()
}
