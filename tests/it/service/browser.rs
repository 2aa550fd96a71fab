//! A headless browser, driven through chromedriver by the few commands of the WebDriver protocol (W3C) that are needed,
//! as plain HTTP.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use reqwest::{Client, Method};
use serde_json::{Value, json};

use super::s3::http;
use super::test_workers::eventually;

/// The key of an element's id in the protocol.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";
/// The tabulator and the enter key, as the protocol writes them.
pub(super) const TAB: &str = "\u{e004}";
pub(super) const ENTER: &str = "\u{e007}";

/// A browser with one page. It ends with this value.
pub(super) struct Browser {
    client: Client,
    session: String,
    driver: Child,
    /// What the driver says; it would end if nobody held the other end.
    _said: Box<dyn Iterator<Item = String> + Send>,
}

impl Browser {
    /// Chromium with a window of that size, in pixels.
    pub(super) async fn open(width: u32, height: u32) -> Self {
        let driver =
            Command::new("chromedriver").arg("--port=0").stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let mut driver = driver.expect("chromedriver: .ci/test installs it");
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines().map_while(Result::ok);
        let port = lines.find_map(|line| {
            line.split("successfully on port ").nth(1)?.trim_end_matches('.').parse::<u16>().ok()
        });
        let session = format!("http://127.0.0.1:{}/session", port.expect("it says its port"));
        let mut browser = Self { client: http(), session, driver, _said: Box::new(lines) };
        let window = format!("--window-size={width},{height}");
        let args = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", &window];
        let wanted = json!({ "capabilities": { "alwaysMatch": { "goog:chromeOptions": { "args": args } } } });
        let made = browser.say(Method::POST, "", wanted).await;
        browser.session = format!("{}/{}", browser.session, made["sessionId"].as_str().expect("a session"));
        browser
    }

    /// One command; its value.
    async fn say(&self, method: Method, command: &str, words: Value) -> Value {
        let mut request = self.client.request(method.clone(), format!("{}{command}", self.session));
        if method == Method::POST {
            request = request.json(&words);
        }
        let answer = request.send().await.unwrap();
        let (status, mut answer) = (answer.status(), answer.json::<Value>().await.unwrap());
        assert!(status.is_success(), "{command} {words}: {answer}");
        answer["value"].take()
    }

    pub(super) async fn go_to(&self, url: &str) {
        self.say(Method::POST, "/url", json!({ "url": url })).await;
    }

    pub(super) async fn reload(&self) {
        self.say(Method::POST, "/refresh", json!({})).await;
    }

    pub(super) async fn resize(&self, width: u32, height: u32) {
        self.say(Method::POST, "/window/rect", json!({ "width": width, "height": height })).await;
    }

    async fn element(&self, selector: &str) -> String {
        let found =
            self.say(Method::POST, "/element", json!({ "using": "css selector", "value": selector })).await;
        found[ELEMENT].as_str().unwrap().to_owned()
    }

    /// Clicks, if a user could.
    pub(super) async fn click(&self, selector: &str) {
        let element = self.element(selector).await;
        self.say(Method::POST, &format!("/element/{element}/click"), json!({})).await;
    }

    /// Types into a field; for a file field, names the files, one a line.
    pub(super) async fn type_into(&self, selector: &str, text: &str) {
        let element = self.element(selector).await;
        self.say(Method::POST, &format!("/element/{element}/value"), json!({ "text": text })).await;
    }

    /// What a script returns.
    pub(super) async fn run(&self, script: &str) -> Value {
        self.say(Method::POST, "/execute/sync", json!({ "script": script, "args": [] })).await
    }

    /// Waits until an expression is true on the page.
    pub(super) async fn until(&self, expression: &str) {
        let script = format!("return Boolean({expression})");
        eventually(expression, async || (self.run(&script).await == true).then_some(())).await;
    }

    /// A picture of the page, written if `HYPNOS_TEST_SHOTS` is set to a directory.
    pub(super) async fn shot(&self, name: &str) {
        if let Some(dir) = std::env::var_os("HYPNOS_TEST_SHOTS") {
            let png = self.say(Method::GET, "/screenshot", Value::Null).await;
            let png =
                base64::Engine::decode(&base64::engine::general_purpose::STANDARD, png.as_str().unwrap());
            std::fs::write(Path::new(&dir).join(format!("{name}.png")), png.unwrap()).unwrap();
        }
    }

    pub(super) async fn close(self) {
        self.say(Method::DELETE, "", Value::Null).await;
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
