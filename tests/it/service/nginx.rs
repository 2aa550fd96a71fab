//! A real nginx in front of a [`TestApp`](super::test_app::TestApp), with its default settings.

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::test_workers::eventually;

/// nginx, until this is dropped.
pub(super) struct Nginx {
    pub(super) url: String,
    process: Child,
    _dir: TempDir,
}

impl Nginx {
    /// Passes everything on to `server`.
    pub(super) async fn before(server: SocketAddr) -> Self {
        Self::with(server, "").await
    }

    /// The same, with further directives.
    pub(super) async fn with(server: SocketAddr, more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        // What is said here is where things lie and who nginx is; how it passes requests on is left as it comes.
        let places = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
        let places = places.map(|name| format!("{name}_temp_path {name};")).concat();
        let user = if std::fs::metadata("/proc/self").unwrap().uid() == 0 { "user root; " } else { "" };
        let text = format!(
            "{user}daemon off; pid nginx.pid; error_log error.log; events {{}}\n\
             http {{ {places} access_log off; server {{ listen {address}; location / {{ proxy_pass http://{server}; {more} }} }} }}\n"
        );
        std::fs::write(dir.path().join("nginx.conf"), text).unwrap();
        let mut process = Command::new(program())
            .arg("-p")
            .arg(dir.path())
            .args(["-c", "nginx.conf", "-e", "error.log"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        eventually("nginx listens", async || {
            let ended = process.try_wait().unwrap();
            assert!(
                ended.is_none(),
                "{}",
                std::fs::read_to_string(dir.path().join("error.log")).unwrap_or_default()
            );
            tokio::net::TcpStream::connect(address).await.ok()
        })
        .await;
        Self { url: format!("http://{address}"), process, _dir: dir }
    }
}

/// Debian installs it in a directory that is only on root's path.
fn program() -> &'static str {
    let places = ["/usr/sbin/nginx", "/usr/local/sbin/nginx", "/usr/local/bin/nginx"];
    let found = places.into_iter().find(|place| std::path::Path::new(place).exists());
    found.unwrap_or("nginx")
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-TERM", &self.process.id().to_string()]).status();
        let _ = self.process.wait();
    }
}
