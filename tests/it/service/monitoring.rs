//! Monitoring: a worker's own listener, and export to OpenTelemetry collectors.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::routing::post;
use hypnos::health::Health;
use hypnos::http::{Operations, Timeouts, serve};
use metrics_exporter_prometheus::PrometheusBuilder;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::e2e::{Process, free_address, is_ready, photo};
use super::s3::http;
use super::test_workers::{TestWorkers, eventually};

/// A collector of OpenTelemetry's, which keeps what it is sent.
#[derive(Clone, Default)]
struct Collector {
    traces: Arc<Mutex<Vec<Bytes>>>,
    metrics: Arc<Mutex<Vec<Bytes>>>,
}

impl Collector {
    async fn start() -> (Self, String) {
        let collector = Self::default();
        let (traces, metrics) = (collector.traces.clone(), collector.metrics.clone());
        let keep = |kept: Arc<Mutex<Vec<Bytes>>>| {
            post(move |body: Bytes| async move { kept.lock().unwrap().push(body) })
        };
        let router = Router::new().route("/v1/traces", keep(traces)).route("/v1/metrics", keep(metrics));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async { axum::serve(listener, router).await });
        (collector, url)
    }

    fn spans(&self) -> Vec<Span> {
        let sent = self.traces.lock().unwrap();
        let sent = sent.iter().map(|body| ExportTraceServiceRequest::decode(body.clone()).unwrap());
        let of_resource = sent.flat_map(|sent| sent.resource_spans);
        of_resource.flat_map(|one| one.scope_spans).flat_map(|scope| scope.spans).collect()
    }

    /// What is said of who sends.
    fn resource(&self) -> BTreeMap<String, String> {
        let sent = self.traces.lock().unwrap();
        let first = ExportTraceServiceRequest::decode(sent[0].clone()).unwrap();
        texts(&first.resource_spans[0].resource.as_ref().unwrap().attributes)
    }

    fn metrics(&self) -> BTreeSet<String> {
        let sent = self.metrics.lock().unwrap();
        let sent = sent.iter().map(|body| ExportMetricsServiceRequest::decode(body.clone()).unwrap());
        let of_resource = sent.flat_map(|sent| sent.resource_metrics);
        let metrics = of_resource.flat_map(|one| one.scope_metrics).flat_map(|scope| scope.metrics);
        metrics.map(|metric| metric.name).collect()
    }

    /// Whether these bytes are anywhere in what was sent.
    fn heard(&self, text: &str) -> bool {
        let all = [self.traces.lock().unwrap().clone(), self.metrics.lock().unwrap().clone()].concat();
        all.iter().any(|body| body.windows(text.len()).any(|window| window == text.as_bytes()))
    }
}

fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |attribute: &KeyValue| match attribute.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Any::StringValue(text)) => text.clone(),
        Some(Any::IntValue(number)) => number.to_string(),
        other => panic!("{other:?}"),
    };
    attributes.iter().map(|attribute| (attribute.key.clone(), text(attribute))).collect()
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// Settings of a service of its own with the small bundle, and where it listens.
fn settings(dir: &Path) -> (BTreeMap<&'static str, String>, SocketAddr) {
    let address = free_address();
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bundle");
    let settings = BTreeMap::from([
        ("HYPNOS_DATA", dir.join("data").display().to_string()),
        ("HYPNOS_LISTEN", address.to_string()),
        ("HYPNOS_BUNDLE", bundle.display().to_string()),
    ]);
    (settings, address)
}

fn training(class_name: &'static str) -> Form {
    let options = json!({
        "steps": 4, "learning_rate": 1e-4, "class_images": 2, "seed": 5, "views": { "n": 12 },
        "discriminator": { "steps": 2, "batch": 4 }, "evaluation": { "images": 1, "steps": 2 },
    });
    let form = Form::new().text("class_name", class_name).text("options", options.to_string());
    (1..=4).fold(form, |form, n| {
        form.part("images", Part::bytes(std::fs::read(photo(n)).unwrap()).file_name("photo.jpg"))
    })
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
async fn a_request_and_its_job_are_one_trace_and_metrics_keep_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let (collector, endpoint) = Collector::start().await;
    let (mut settings, address) = settings(dir.path());
    let operators = free_address();
    settings.extend([
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint),
        ("OTEL_BSP_SCHEDULE_DELAY", "100".into()),
        ("OTEL_METRIC_EXPORT_INTERVAL", "200".into()),
        ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test".into()),
        ("HYPNOS_METRICS_LISTEN", operators.to_string()),
    ]);
    let mut process = Process::start(dir.path(), "serve", &["serve", "--workers", "1"], &settings);
    let url = format!("http://{address}");
    is_ready(&url).await;
    let client = http();
    let [trace, caller] = ["0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"];
    let request = client.post(format!("{url}/v1/jobs")).multipart(training("unmentionable"));
    let answer = request.header("traceparent", format!("00-{trace}-{caller}-01")).send().await.unwrap();
    assert_eq!(answer.status(), 202);
    let job = answer.headers()["location"].to_str().unwrap().to_owned();
    let ended = eventually("the job ends", async || {
        let job: Value = client.get(&job).send().await.unwrap().json().await.unwrap();
        (job["state"] == "succeeded" || job["state"] == "failed").then_some(job)
    });
    let ended = ended.await;
    assert_eq!(ended["state"], "succeeded", "{ended}\n{}", process.log());
    let sample = client.post(format!("{job}/sample")).header("prefer", "wait=60");
    let sample =
        sample.json(&json!({ "prompts": ["{product} unmentionable"], "steps": 2 })).send().await.unwrap();
    assert_eq!(sample.status(), 200, "{}", process.log());
    let shown = client.get(format!("http://{operators}/metrics")).send().await.unwrap().text().await.unwrap();
    process.signal("-TERM");
    assert!(process.ended().await, "{}", process.log());

    // The request, the job and its phases are one trace, below the caller's span.
    let spans = collector.spans();
    let ours: Vec<&Span> = spans.iter().filter(|span| hex(&span.trace_id) == trace).collect();
    let find = |name: &str| {
        *ours.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("{name}: {ours:?}"))
    };
    let request = find("POST /v1/jobs");
    assert_eq!((hex(&request.parent_span_id).as_str(), request.kind), (caller, 2), "a server's");
    let said = texts(&request.attributes);
    assert_eq!(
        (said["http.route"].as_str(), said["http.response.status_code"].as_str()),
        ("/v1/jobs", "202")
    );
    let work = find("job train");
    assert_eq!((&work.parent_span_id, work.kind), (&request.span_id, 5), "a consumer's");
    assert_eq!(texts(&work.attributes)["hypnos.job.id"], ended["id"].as_str().unwrap());
    for phase in ["preparing", "class_images", "discriminating", "training", "storing"] {
        let span = find(phase);
        assert_eq!(span.parent_span_id, work.span_id, "{phase}");
        assert!(
            work.start_time_unix_nano <= span.start_time_unix_nano
                && span.end_time_unix_nano <= work.end_time_unix_nano
        );
    }
    let drawn = spans.iter().find(|span| span.name == "job sample").expect("the sample's");
    assert_ne!(hex(&drawn.trace_id), trace, "its request named no trace");
    assert!(
        spans
            .iter()
            .any(|span| span.name == "POST /v1/jobs/{id}/sample" && span.span_id == drawn.parent_span_id)
    );
    assert!(spans.iter().all(|span| span.name != "worker"), "that one has no end");

    // Nothing of what a client wrote is sent, and no attribute that nobody thought of.
    assert!(!collector.heard("unmentionable"));
    let keys: BTreeSet<String> = spans.iter().flat_map(|span| texts(&span.attributes).into_keys()).collect();
    assert!(keys.iter().all(|key| key.starts_with("http.") || key.starts_with("hypnos.")), "{keys:?}");
    let resource = collector.resource();
    assert_eq!((resource["service.name"].as_str(), resource["hypnos.role"].as_str()), ("hypnos", "serve"));
    assert_eq!(resource["deployment.environment"], "test");

    let pushed = collector.metrics();
    let names = shown.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let names: BTreeSet<String> = names.map(ToOwned::to_owned).collect();
    assert!(
        names.contains("hypnos_jobs_queued") && names.contains("hypnos_http_request_seconds"),
        "{names:?}"
    );
    assert_eq!(
        names.difference(&pushed).collect::<Vec<_>>(),
        [""; 0].iter().collect::<Vec<_>>(),
        "{pushed:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_collector_is_logged_once_and_slows_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut settings, address) = settings(dir.path());
    settings.extend([
        ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{}", free_address())),
        ("OTEL_BSP_SCHEDULE_DELAY", "50".into()),
        ("OTEL_METRIC_EXPORT_INTERVAL", "100".into()),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "100".into()),
    ]);
    let mut process = Process::start(dir.path(), "serve", &["serve"], &settings);
    let url = format!("http://{address}");
    is_ready(&url).await;
    let client = http();
    let away = "OpenTelemetry's collector cannot be reached: no connection";
    eventually("it is said", async || process.log().contains(away).then_some(())).await;
    for _ in 0..20 {
        assert_eq!(client.get(format!("{url}/v1/jobs")).send().await.unwrap().status(), 200);
        tokio::time::sleep(Duration::from_millis(100)).await; // for two seconds of failing to send
    }
    process.signal("-TERM");
    assert!(process.ended().await, "{}", process.log());
    assert_eq!(process.log().matches("OpenTelemetry").count(), 1, "{}", process.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_never_answers_does_not_delay_the_shutdown() {
    let dir = tempfile::tempdir().unwrap();
    let (mut settings, address) = settings(dir.path());
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap(); // its backlog takes connections
    settings.insert("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{}", silent.local_addr().unwrap()));
    let mut process = Process::start(dir.path(), "serve", &["serve"], &settings);
    is_ready(&format!("http://{address}")).await;
    process.signal("-TERM");
    let signaled = Instant::now();
    assert!(process.ended().await, "{}", process.log());
    assert!(signaled.elapsed() < Duration::from_secs(30), "{:?}", signaled.elapsed());
    drop(silent);
}

#[test]
fn invalid_opentelemetry_variables_are_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318");
    for (given, wanted) in [
        (
            vec![("OTEL_EXPORTER_OTLP_ENDPOINT", "127.0.0.1:4318")],
            "wanted http(s)://HOST:PORT, got \"127.0.0.1:4318\"",
        ),
        (
            vec![endpoint, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
            "OTEL_EXPORTER_OTLP_PROTOCOL: wanted http/protobuf",
        ),
        (
            vec![endpoint, ("OTEL_EXPORTER_OTLP_COMPRESSION", "snappy")],
            "OTEL_EXPORTER_OTLP_COMPRESSION: wanted none or gzip",
        ),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hypnos"));
        command.args(["serve", "--listen", "127.0.0.1:0"]).env("HYPNOS_DATA", dir.path().join("data"));
        let ended = command.envs(given.iter().copied()).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(2), "{given:?}: {said}");
        assert!(
            said.lines().count() == 1 && said.starts_with("error: ") && said.contains(wanted),
            "{given:?}: {said}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_answers_operators_on_a_listener_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (mut settings, address) = settings(dir.path());
    settings.remove("HYPNOS_LISTEN");
    settings.insert("HYPNOS_METRICS_LISTEN", address.to_string());
    let mut process = Process::start(dir.path(), "work", &["work"], &settings);
    let url = format!("http://{address}");
    is_ready(&url).await;
    let get = async |path: &str| http().get(format!("{url}{path}")).send().await.unwrap();
    assert_eq!(get("/readyz").await.text().await.unwrap(), "ok\ncpu: working\n");
    assert_eq!(get("/healthz").await.text().await.unwrap(), "ok\n");
    let metrics = get("/metrics").await;
    assert_eq!(metrics.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let metrics = metrics.text().await.unwrap();
    assert!(metrics.contains("hypnos_device_working{worker=\"0\",device=\"cpu\"} 1"), "{metrics}");
    assert!(!metrics.contains("hypnos_jobs_queued"), "the queue metrics belong to the server: {metrics}");
    assert_eq!(get("/v1/jobs").await.status(), 404, "nothing of the API");
    process.signal("-TERM");
    assert!(process.ended().await, "{}", process.log());

    let taken = std::net::TcpListener::bind(address).unwrap();
    let mut second = Process::start(dir.path(), "second", &["work"], &settings);
    assert!(!second.ended().await);
    let last = second.log().lines().last().unwrap_or_default().to_owned();
    assert!(
        last.starts_with("error: HYPNOS_METRICS_LISTEN: ") && last.contains("cannot listen on"),
        "{last}"
    );
    drop(taken);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_ready_while_its_database_answers_and_a_device_takes_jobs() {
    let workers = TestWorkers::new().await;
    let (health, closing, ended) = (Health::default(), CancellationToken::new(), CancellationToken::new());
    let metrics = PrometheusBuilder::new().build_recorder().handle();
    let (store, blobs) = (workers.store.clone(), workers.blobs.clone());
    let operations = Operations::for_worker(store, blobs, metrics, closing.clone(), health.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/readyz", listener.local_addr().unwrap());
    let served = serve(listener, Arc::new(operations).router(), 8, Timeouts::default(), ended.clone());
    let served = tokio::spawn(served);
    let ready = async || {
        let answer = http().get(&url).send().await.unwrap();
        let status = answer.status().as_u16();
        (status, answer.text().await.unwrap())
    };

    let (status, said) = ready().await;
    assert!(status == 503 && said.contains("no device takes jobs: starting"), "{said}");
    let (first, second) = (health.add("cuda:0"), health.add("cuda:1"));
    assert_eq!(ready().await.0, 503);
    first.working();
    second.dead("an illegal address was used");
    let (status, said) = ready().await;
    assert!(status == 200 && said.starts_with("ok\ncuda:0: working\ncuda:1: dead since "), "{said}");
    first.backing_off("out of memory", Duration::from_secs(5));
    let (status, said) = ready().await;
    assert!(
        status == 503 && said.contains("cuda:0: backing off since ") && said.contains("out of memory"),
        "{said}"
    );
    first.working();
    assert_eq!(ready().await.0, 200);
    workers.store.close().await;
    let (status, said) = ready().await;
    assert!(status == 503 && said.contains("the database cannot be reached"), "{said}");
    closing.cancel();
    let (status, said) = ready().await;
    assert!(status == 503 && said.contains("about to end"), "{said}");
    ended.cancel();
    served.await.unwrap();
}
