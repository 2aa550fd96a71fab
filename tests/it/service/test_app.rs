//! Starts the whole service on a loopback port: database, objects, HTTP server and a client with keys.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hypnos::blobs::{Blobs, BlobsConfig, Links, Place};
use hypnos::health::Health;
use hypnos::http::keys::make_key;
use hypnos::http::{AppState, Auth, ProductDetector, Settings, Timeouts, serve};
use hypnos::job::{Job, JobId, Kind, Spec, State, TenantId};
use hypnos::photo::{Decoder, Limits};
use hypnos::store::{NewKey, Scope};
use image::{ImageFormat, RgbImage};
use metrics_exporter_prometheus::PrometheusBuilder;
use reqwest::multipart::{Form, Part};
use reqwest::{Client, Method, RequestBuilder, Response};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::test_workers::{TestWorkers, eventually};

/// How long a test waits for an answer.
const PATIENCE: Duration = Duration::from_mins(1);

/// Configuration of a [`TestApp`]; a test changes the part it is about.
pub(super) struct AppConfig {
    pub(super) settings: Settings,
    pub(super) timeouts: Timeouts,
    pub(super) limits: Limits,
    pub(super) connections_max: usize,
    /// Another way to the objects than the directory itself.
    pub(super) blobs: Option<Blobs>,
    pub(super) detector: Option<Arc<dyn ProductDetector>>,
    /// Workers in the server's process.
    pub(super) devices: Health,
}

impl Default for AppConfig {
    fn default() -> Self {
        let settings = Settings { auth: Auth::Keys, photo_bytes_max: 1 << 20, ..Settings::default() };
        let limits = Limits { side_min: 32, ..Limits::default() };
        let timeouts = Timeouts::default();
        Self {
            settings,
            timeouts,
            limits,
            connections_max: 256,
            blobs: None,
            detector: None,
            devices: Health::default(),
        }
    }
}

/// A running service; `tenant` and `key` are those of its first tenant.
pub(super) struct TestApp {
    pub(super) workers: TestWorkers,
    /// The objects as the server sees them, which signs URLs to them.
    pub(super) blobs: Blobs,
    pub(super) address: SocketAddr,
    pub(super) url: String,
    pub(super) tenant: TenantId,
    pub(super) key: String,
    pub(super) client: Client,
    pub(super) closing: CancellationToken,
    served: JoinHandle<()>,
}

impl TestApp {
    pub(super) async fn start() -> Self {
        Self::build(AppConfig::default()).await
    }

    pub(super) async fn build(config: AppConfig) -> Self {
        Self::on(TestWorkers::new().await, config).await
    }

    pub(super) async fn on(workers: TestWorkers, mut config: AppConfig) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default(); // the first one stays
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let url = format!("http://{address}");
        config.settings.public_url.clone_from(&url);
        let links = Links { public_url: url.clone(), secret: "a secret for this test".into() };
        let place = Place::Directory(workers.objects());
        let blobs = match config.blobs {
            Some(blobs) => blobs,
            None => Blobs::open(&BlobsConfig { place, links: Some(links) }).await.unwrap(),
        };
        let decoder = Decoder::new(config.limits, 2, Duration::from_secs(5));
        let metrics = PrometheusBuilder::new().build_recorder();
        let handle = metrics.handle();
        let _ = metrics::set_global_recorder(metrics); // one test, one process
        let closing = CancellationToken::new();
        let state = AppState::new(
            workers.store.clone(),
            blobs.clone(),
            decoder,
            config.settings,
            handle,
            closing.clone(),
            config.devices,
            config.detector,
        );
        let served =
            serve(listener, state.router(), config.connections_max, config.timeouts, closing.clone());
        let served = tokio::spawn(served);
        let tenant = workers.store.ensure_tenant("first").await.unwrap();
        let client = Client::builder().timeout(PATIENCE).redirect(reqwest::redirect::Policy::none());
        let client = client.build().unwrap();
        let mut app =
            Self { workers, blobs, address, url, tenant, key: String::new(), client, closing, served };
        app.key = app.new_key(tenant, Scope::Write, None).await;
        app
    }

    /// A key of `tenant`, which ends after so many milliseconds from now if that is given.
    pub(super) async fn new_key(&self, tenant: TenantId, scope: Scope, expires_ms: Option<i64>) -> String {
        let key = make_key().unwrap();
        let new = NewKey { id: key.id, tenant, name: "test".into(), hash: key.hash, scope, expires_ms };
        self.workers.store.create_key(&new).await.unwrap();
        key.text
    }

    /// A request with the first tenant's key.
    pub(super) fn ask(&self, method: Method, path: &str) -> RequestBuilder {
        self.ask_as(&self.key, method, path)
    }

    pub(super) fn ask_as(&self, key: &str, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url)).bearer_auth(key)
    }

    pub(super) async fn get(&self, path: &str) -> Response {
        self.ask(Method::GET, path).send().await.unwrap()
    }

    /// The metrics, as an operator sees them.
    pub(super) async fn metrics(&self) -> String {
        let operator = self.new_key(self.tenant, Scope::Admin, None).await;
        let answer = self.ask_as(&operator, Method::GET, "/metrics").send().await.unwrap();
        assert_eq!(answer.status(), 200);
        answer.text().await.unwrap()
    }

    /// Sends a form of a job.
    pub(super) async fn post_job(&self, form: Form) -> Response {
        self.ask(Method::POST, "/v1/jobs").multipart(form).send().await.unwrap()
    }

    /// A job that was accepted, as JSON.
    pub(super) async fn new_job(&self) -> Value {
        let response = self.post_job(form(3, "mug")).await;
        assert_eq!(response.status(), 202);
        response.json().await.unwrap()
    }

    /// The row of a job of the first tenant.
    pub(super) async fn row(&self, id: &str, kind: Kind) -> Option<Job> {
        self.workers.store.find(self.tenant, id.parse().unwrap(), kind).await.unwrap()
    }

    /// A training of the first tenant that a worker has brought to its end.
    pub(super) async fn trained(&self) -> JobId {
        let script = super::scripted::Script::new(Duration::ZERO);
        let worker = self.workers.start(&script);
        let options = r#"{"steps": 2, "class_images": 0, "evaluation": {"images": 1}}"#;
        let response = self.post_job(form(3, "mug").text("options", options)).await;
        let job: Value = response.json().await.unwrap();
        let id = job["id"].as_str().unwrap().to_owned();
        let done = eventually("the training has succeeded", async || {
            let row = self.row(&id, Kind::Train).await?;
            assert_ne!(row.state, State::Failed, "{:?}", row.error);
            (row.state == State::Succeeded).then_some(row.id)
        });
        let done = done.await;
        worker.stop().await;
        done
    }

    /// A finished training, made without a worker by the store's operations.
    pub(super) async fn finished(&self) -> JobId {
        let job = self.new_job().await;
        let id: JobId = job["id"].as_str().unwrap().parse().unwrap();
        let store = &self.workers.store;
        let day = Duration::from_hours(24);
        let claimed = store.claim(uuid::Uuid::now_v7(), &[Kind::Train], day, day).await.unwrap().unwrap();
        assert!(claimed.id == id && matches!(claimed.spec(), Ok(Spec::Train(_))));
        store.finish(claimed.lease(), &serde_json::json!({}), &[]).await.unwrap();
        id
    }

    /// Fails if a refused request left a row or an object.
    pub(super) async fn is_clean(&self) {
        let page: Value = self.get("/v1/jobs").await.json().await.unwrap();
        assert_eq!(page["data"], serde_json::json!([]));
        let objects = eventually("the store is empty", async || {
            let entries = self.workers.blobs.list(&hypnos::blobs::Scope::tenant(self.tenant)).await.unwrap();
            entries.is_empty().then_some(())
        });
        objects.await;
    }

    /// Sends bytes on a connection of their own and gives what comes back until the server closes or `PATIENCE` is
    /// over.
    pub(super) async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect().await;
        let _ = stream.write_all(bytes).await; // a server that has heard enough may close
        let mut answer = Vec::new();
        let reading = stream.read_to_end(&mut answer);
        let _ = tokio::time::timeout(PATIENCE, reading).await.expect("the server closes");
        String::from_utf8_lossy(&answer).into_owned()
    }

    pub(super) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Fails unless others are still served.
    pub(super) async fn is_alive(&self) {
        let response = self.client.get(format!("{}/healthz", self.url)).send().await.unwrap();
        assert_eq!(response.status(), 200);
    }

    /// Ends the server and waits for it.
    pub(super) async fn stop(self) -> TestWorkers {
        self.closing.cancel();
        tokio::time::timeout(PATIENCE, self.served).await.expect("it ends").unwrap();
        self.workers
    }
}

/// Reads a problem and checks what is true of each.
pub(super) async fn problem(response: Response) -> (u16, String, Value) {
    let status = response.status().as_u16();
    let headers = response.headers().clone();
    assert_eq!(headers["content-type"], "application/problem+json", "{status}");
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["status"], status);
    assert_eq!(body["request_id"], headers["x-request-id"].to_str().unwrap());
    assert!(!body["detail"].as_str().unwrap().is_empty());
    let slug = body["type"].as_str().unwrap().strip_prefix("/problems/").unwrap().to_owned();
    (status, slug, body)
}

/// Status and slug of a problem.
pub(super) async fn refusal(response: Response) -> (u16, String) {
    let (status, slug, _) = problem(response).await;
    (status, slug)
}

/// A picture that differs from those of other numbers.
pub(super) fn photo(n: u32) -> Vec<u8> {
    let pixel = |x: u32, y: u32| {
        let shade = (x.wrapping_mul(n * 7 + 13) ^ y.wrapping_mul(n * 11 + 5)).wrapping_mul(2_654_435_761);
        [(shade >> 24) as u8, (shade >> 16) as u8, (x * 3 + n * 40) as u8]
    };
    let picture = RgbImage::from_fn(64, 64, |x, y| image::Rgb(pixel(x, y)));
    let mut png = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut png, ImageFormat::Png).unwrap();
    png.into_inner()
}

pub(super) fn file(bytes: Vec<u8>) -> Part {
    Part::bytes(bytes).file_name("photo.png")
}

/// A form with so many photos.
pub(super) fn form(n_photos: u32, class_name: &str) -> Form {
    let form = Form::new().text("class_name", class_name.to_owned());
    (0..n_photos).fold(form, |form, n| form.part("images", file(photo(n))))
}
