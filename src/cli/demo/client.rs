//! A client of the service, as a shop's backend would use it.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use reqwest::header::{ETAG, HeaderValue, IF_NONE_MATCH};
use reqwest::multipart::{Form, Part};
use reqwest::{RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::products::Product;
use crate::cli::error::CliError;
use crate::cli::output::{print_line, progress_bar};

/// Query parameter: how long an answer may wait for a change, in seconds.
const WAIT: &str = "wait=20";

pub(super) struct Client {
    http: reqwest::Client,
    url: String,
}

impl Client {
    pub(super) fn new(url: String) -> Result<Self, CliError> {
        let _ = rustls::crypto::ring::default_provider().install_default(); // the first one stays
        let http = reqwest::Client::builder().timeout(Duration::from_mins(2)).build().map_err(failed)?;
        Ok(Self { http, url })
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Waits until the service is ready and its worker has a model, or until it stops.
    pub(super) async fn is_ready(&self, stop: &CancellationToken) -> Result<(), CliError> {
        let ready = async {
            while !self
                .http
                .get(format!("{}/readyz", self.url))
                .send()
                .await
                .is_ok_and(|a| a.status().is_success())
            {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            // A training that is sent before the worker has registered its model has no options yet to show.
            while !self.has_model().await {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        stop.run_until_cancelled(ready)
            .await
            .ok_or_else(|| CliError::Failed("the service did not start".into()))
    }

    async fn has_model(&self) -> bool {
        let models = json_of(self.http.get(format!("{}/v1/models", self.url))).await;
        models.is_ok_and(|models| models["data"][0]["workers"][0].is_object())
    }

    /// Queues a training.
    pub(super) async fn upload(&self, product: &Product, options: &Value) -> Result<Value, CliError> {
        let mut form =
            Form::new().text("class_name", product.class_name.clone()).text("options", options.to_string());
        for (i, photo) in product.photos.iter().enumerate() {
            form = form.part("images", Part::bytes(photo.clone()).file_name(format!("{i}.jpg")));
        }
        json_of(self.http.post(format!("{}/v1/jobs", self.url)).multipart(form)).await
    }

    /// Follows a training to its end: shows a progress bar, and prints a line with the duration of each finished phase.
    pub(super) async fn follow(&self, job: &Value) -> Result<(), CliError> {
        let url = job["links"]["self"].as_str().unwrap_or_default();
        let bar = progress_bar("{prefix:18} {bar:32} {pos} of {len}  {msg}", 0);
        let (mut etag, mut phase) = (HeaderValue::from_static("\"none\""), Phase::begin("waiting"));
        loop {
            let answer = self.http.get(url).header("Prefer", WAIT).header(IF_NONE_MATCH, &etag).send().await;
            let answer = answer.map_err(failed)?;
            if answer.status() == StatusCode::NOT_MODIFIED {
                continue;
            }
            etag = answer.headers().get(ETAG).cloned().unwrap_or(etag);
            let job = good(answer).await?;
            let state = job["state"].as_str().unwrap_or_default();
            let now = job["progress"]["phase"].as_str().unwrap_or(if state == "queued" {
                "waiting"
            } else {
                state
            });
            if now != phase.name {
                bar.suspend(|| print_line(&phase.summary()));
                phase = Phase::begin(now);
            }
            match state {
                "succeeded" => break,
                "queued" | "running" => phase.shown(&bar, &job["progress"]),
                _ => {
                    bar.finish_and_clear();
                    let why = job["error"]["message"].as_str().unwrap_or("it was canceled");
                    return Err(CliError::Failed(format!("the training {state}: {why}")));
                }
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Draws a sample, and waits for its images.
    pub(super) async fn draw(&self, job: &str, prompts: &[&str]) -> Result<Value, CliError> {
        let spec = json!({ "prompts": prompts, "seed": 1 });
        let begun = Instant::now();
        let asked = self.http.post(format!("{}/v1/jobs/{job}/sample", self.url)).json(&spec);
        let mut sample = json_of(asked.header("Prefer", WAIT)).await?;
        while sample["finished_at"].is_null() {
            let url = sample["links"]["self"].as_str().unwrap_or_default();
            sample = json_of(self.http.get(url).header("Prefer", WAIT)).await?;
        }
        if sample["state"] != "succeeded" {
            let why = sample["error"]["message"].as_str().unwrap_or("it was canceled");
            return Err(CliError::Failed(format!("no image was generated: {why}")));
        }
        print_line(&format!(
            "{:10} {} pictures, {:.0} s",
            "sample",
            prompts.len(),
            begun.elapsed().as_secs_f64()
        ));
        Ok(sample)
    }

    /// Fetches the bytes of a link.
    pub(super) async fn fetch(&self, url: &str) -> Result<Vec<u8>, CliError> {
        let answer = self.http.get(url).send().await.and_then(Response::error_for_status).map_err(failed)?;
        Ok(answer.bytes().await.map_err(failed)?.to_vec())
    }
}

/// A phase of the job, since it was first seen.
struct Phase {
    name: String,
    begun: Instant,
    total: u64,
}

impl Phase {
    fn begin(name: &str) -> Self {
        Self { name: name.to_owned(), begun: Instant::now(), total: 0 }
    }

    fn shown(&mut self, bar: &ProgressBar, progress: &Value) {
        self.total = progress["total"].as_u64().unwrap_or(0);
        bar.set_prefix(self.name.replace('_', " "));
        bar.set_length(self.total);
        bar.set_position(progress["step"].as_u64().unwrap_or(0));
        let left =
            progress["eta_seconds"].as_f64().map(|seconds| format!("about {seconds:.0} s left in all"));
        bar.set_message(left.unwrap_or_default());
    }

    fn summary(&self) -> String {
        let steps = if self.total > 0 { format!("{} steps, ", self.total) } else { String::new() };
        format!("{:18} {steps}{:.0} s", self.name.replace('_', " "), self.begun.elapsed().as_secs_f64())
    }
}

async fn json_of(request: RequestBuilder) -> Result<Value, CliError> {
    good(request.send().await.map_err(failed)?).await
}

/// The JSON document of an answer; an error with the problem's detail otherwise.
async fn good(answer: Response) -> Result<Value, CliError> {
    let status = answer.status();
    let document: Value = answer.json().await.map_err(failed)?;
    if status.is_success() {
        return Ok(document);
    }
    let why = document["detail"].as_str().unwrap_or("no reason was given");
    Err(CliError::Failed(format!("the service answered {status}: {why}")))
}

fn failed(error: reqwest::Error) -> CliError {
    CliError::Failed(format!("the service: {error}"))
}
