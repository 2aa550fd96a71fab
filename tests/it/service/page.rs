//! The page at `/` in a browser, with an engine that computes nothing: a user's whole workflow, by mouse, by keyboard,
//! on a phone.

use std::time::Duration;

use reqwest::Method;

use super::browser::{Browser, ENTER, TAB};
use super::scripted::Script;
use super::test_app::{TestApp, photo};

/// Writes photos to a directory; what a file dialogue would give back for them.
fn files(dir: &std::path::Path, n: u32) -> String {
    let paths = (0..n).map(|i| {
        let path = dir.join(format!("photo-{i}.png"));
        std::fs::write(&path, photo(i)).unwrap();
        path.display().to_string()
    });
    paths.collect::<Vec<_>>().join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_drops_photos_trains_draws_and_downloads() {
    let app = TestApp::start().await;
    let script = Script::new(Duration::from_millis(20));
    let worker = app.workers.start(&script);
    let dir = tempfile::tempdir().unwrap();
    let browser = Browser::open(1100, 1500).await;
    browser.go_to(&app.url).await;

    // This server wants a key.
    browser.until("!document.querySelector('#key').hidden").await;
    browser.type_into("#key-text", &app.key).await;
    browser.click("#key button").await;
    browser.until("document.querySelector('#key').hidden").await;

    // Two photos are too few, and one that is none is told apart.
    let not_a_photo = dir.path().join("broken.png");
    std::fs::write(&not_a_photo, b"no picture").unwrap();
    let chosen = format!("{}\n{}", files(dir.path(), 2), not_a_photo.display());
    browser.type_into("#files", &chosen).await;
    browser.until("document.querySelectorAll('#photos li .bad').length === 1").await;
    browser.until("document.querySelector('#start').disabled").await;
    browser.shot("1-refused").await;
    browser.click("#photos li:nth-child(3) button").await;
    browser.until("document.querySelectorAll('#photos li').length === 2").await;
    browser.until("document.querySelector('#start').disabled").await;
    for i in 2..4 {
        let path = dir.path().join(format!("more-{i}.png"));
        std::fs::write(&path, photo(i)).unwrap();
        browser.type_into("#files", &path.display().to_string()).await;
        browser.until(&format!("document.querySelectorAll('#photos li').length === {}", i + 1)).await;
    }
    browser.until("!document.querySelector('#start').disabled").await;
    browser.shot("2-photos").await;

    // What is wrong is said beside the button, and nothing is lost.
    browser.type_into("#class-name", "mug").await;
    browser.run("document.querySelector('details').open = true").await;
    browser.run("document.querySelector('#options').value = ''").await;
    browser.type_into("#options", "{\"steps\": 0}").await;
    browser.click("#start").await;
    browser.until("document.querySelector('#new-note').textContent.includes('/options/steps')").await;
    browser.run("document.querySelector('#options').value = ''").await;
    browser
        .type_into("#options", "{\"steps\": 300, \"class_images\": 2, \"evaluation\": {\"images\": 1}}")
        .await;
    browser.click("#start").await;

    // It is followed as it goes.
    browser.until("location.hash.startsWith('#job=')").await;
    browser.until("document.querySelector('#phases [aria-current]')?.textContent === 'training'").await;
    browser.until("document.querySelector('#plot polyline')").await;
    browser.shot("3-training").await;
    browser.until("document.querySelector('#state').textContent === 'succeeded'").await;
    let loaded = |list: &str, n: usize| {
        format!(
            "[...document.querySelectorAll('{list} img')].filter((i) => i.complete && i.naturalWidth > 0).length === {n}"
        )
    };
    browser.until("document.querySelector('#images img') && (document.querySelector('#images').scrollIntoView(), true)").await;
    browser.until(&loaded("#images", 1)).await;
    browser.until("[...document.querySelectorAll('#files-list a')].some((a) => a.textContent.startsWith('weights'))").await;

    // It draws; what was drawn can be had.
    browser.run("document.querySelector('#n').value = 1").await;
    browser.click("#draw button.main").await;
    browser.until("document.querySelectorAll('#drawn li').length === 2").await;
    browser.run("document.querySelector('#drawn').scrollIntoView()").await;
    browser.until(&loaded("#drawn", 2)).await;
    browser.shot("4-drawn").await;
    let link = browser.run("return document.querySelector('#drawn a[download]').href").await;
    let file = app.client.get(link.as_str().unwrap()).send().await.unwrap();
    assert_eq!(file.status(), 200);
    assert!(image::load_from_memory(&file.bytes().await.unwrap()).is_ok());

    // Another day: the training is in the list, and its address leads back to it. On a phone nothing is cut off.
    browser.resize(390, 844).await;
    browser.reload().await;
    browser.until("document.querySelector('#state').textContent === 'succeeded'").await;
    browser.until("document.querySelectorAll('#jobs a').length === 1").await;
    browser.until("document.documentElement.scrollWidth <= window.innerWidth").await;
    browser.shot("5-phone").await;
    let jobs: serde_json::Value =
        app.ask(Method::GET, "/v1/jobs").send().await.unwrap().json().await.unwrap();
    assert_eq!(jobs["data"].as_array().unwrap().len(), 1, "the refused form made no training");
    browser.close().await;
    worker.stop().await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_can_be_used_by_keyboard_and_every_field_has_a_name() {
    let app = TestApp::start().await;
    let browser = Browser::open(1100, 1000).await;
    browser.go_to(&app.url).await;
    browser.until("document.querySelector('#method option')").await;
    let nameless = "return [...document.querySelectorAll('input, textarea, select, progress, svg')].filter((field) => \
        !field.labels?.length && !field.getAttribute('aria-label')).map((field) => field.id)";
    assert_eq!(browser.run(nameless).await, serde_json::json!([]));

    // From the key on, the next stops are its button, the photos, the name, the method.
    browser.until("!document.querySelector('#key').hidden").await;
    browser.run("document.querySelector('#key-text').focus()").await;
    let mut stops = Vec::new();
    for focused in ["#key-text", "#key button", "#files", "#class-name"] {
        if focused == "#files" {
            // Typing into a file field names files; the stop after it is asked for by script.
            browser.run("document.querySelector('#class-name').focus()").await;
        } else {
            browser.type_into(focused, TAB).await;
        }
        let stop =
            browser.run("return document.activeElement.id || document.activeElement.textContent").await;
        stops.push(stop.as_str().unwrap().to_owned());
    }
    assert_eq!(stops, ["Use it", "files", "class-name", "method"]);
    browser.type_into("#key-text", &format!("{}{ENTER}", app.key)).await;
    browser.until("document.querySelector('#key').hidden").await;
    browser.close().await;
    app.stop().await;
}
