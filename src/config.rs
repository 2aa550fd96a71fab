//! Settings of the service: environment variable, flag, default and meaning of each.
//!
//! What changes a training's result is not a setting but part of the job, so that a job can be repeated. Flags take
//! precedence over the environment. An unknown variable that begins with `HYPNOS_` is refused: a typing error would go
//! unnoticed.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use secrecy::{ExposeSecret, SecretString};

use crate::blobs::{Bucket, Credentials, Place};
use crate::http;
use crate::ml::bundle::{MINIATURE_NAME, miniature};
use crate::ml::device::ordinal;
use crate::ml::precision::Precision;

/// An invalid setting, in one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

/// A result whose error is an invalid setting.
pub type Result<T, E = ConfigError> = std::result::Result<T, E>;

/// Types of network file systems, as the kernel names them.
const NETWORK_FILE_SYSTEMS: [&str; 9] =
    ["nfs", "cifs", "smb", "afs", "9p", "ceph", "glusterfs", "fuse.sshfs", "lustre"];

/// Type of the file system that contains `dir`, from the text of Linux's mountinfo.
fn file_system<'a>(mounts: &'a str, dir: &Path) -> Option<&'a str> {
    let parsed = mounts.lines().filter_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        Some((place.split(' ').nth(4)?, kind.split(' ').next()?))
    });
    let holding = parsed.filter(|(place, _)| dir.starts_with(place));
    holding.max_by_key(|(place, _)| place.len()).map(|(_, kind)| kind)
}

fn invalid<T>(message: impl Into<String>) -> Result<T> {
    Err(ConfigError(message.into()))
}

/// Prefixes of variables of the tests and the build, which are not settings.
const IGNORED_PREFIXES: [&str; 2] = ["HYPNOS_TEST_", "HYPNOS_CUDA_"];

/// Refuses environment variables that begin with `HYPNOS_` and are not `known`.
pub fn check_environment(names: impl Iterator<Item = String>, known: &BTreeSet<String>) -> Result<()> {
    let ours =
        |name: &String| name.starts_with("HYPNOS_") && !IGNORED_PREFIXES.iter().any(|p| name.starts_with(p));
    match names.filter(ours).find(|name| !known.contains(name)) {
        Some(name) => invalid(format!("{name} is set, but there is no such setting")),
        None => Ok(()),
    }
}

/// Where rows and objects are.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Storage")]
pub struct Storage {
    /// Directory of the embedded default: the SQLite file, the objects, the scratch files
    #[arg(long, env = "HYPNOS_DATA", value_name = "DIR", default_value = "hypnos-data")]
    pub data: PathBuf,
    /// sqlite:PATH or postgres://USER:PASSWORD@HOST/DATABASE; by default sqlite:DATA/hypnos.db
    #[arg(long, env = "HYPNOS_DATABASE", value_name = "URL", hide_env_values = true)]
    pub database: Option<SecretString>,
    /// File that holds the URL of the database
    #[arg(long, env = "HYPNOS_DATABASE_FILE", value_name = "FILE")]
    pub database_file: Option<PathBuf>,
    /// URL of the same Postgres past a pooler in transaction mode, for notifications of new jobs; without it the queue
    /// is polled
    #[arg(long, env = "HYPNOS_DATABASE_DIRECT", value_name = "URL", hide_env_values = true)]
    pub database_direct: Option<SecretString>,
    /// File that holds this URL
    #[arg(long, env = "HYPNOS_DATABASE_DIRECT_FILE", value_name = "FILE")]
    pub database_direct_file: Option<PathBuf>,
    /// Maximum number of connections to Postgres
    #[arg(long, env = "HYPNOS_DATABASE_CONNECTIONS", value_name = "N", default_value_t = 16)]
    pub database_connections: u32,
    /// A directory, or s3://BUCKET[/PREFIX]; by default DATA/objects
    #[arg(long, env = "HYPNOS_OBJECTS", value_name = "PLACE")]
    pub objects: Option<String>,
    /// URL of the S3 service, if it is not Amazon's
    #[arg(long, env = "HYPNOS_S3_ENDPOINT", value_name = "URL")]
    pub s3_endpoint: Option<String>,
    /// URL of the S3 service as clients reach it, for the links that they are given; by default the endpoint
    #[arg(long, env = "HYPNOS_S3_PUBLIC_ENDPOINT", value_name = "URL")]
    pub s3_public_endpoint: Option<String>,
    /// Region of the bucket
    #[arg(long, env = "HYPNOS_S3_REGION", value_name = "NAME", default_value = "us-east-1")]
    pub s3_region: String,
    /// How to authenticate to the S3 service: keys, web-identity (a role assumed with the token in a file, as on EKS),
    /// container (the agent beside a container, as on ECS) or instance (the virtual machine's metadata)
    #[arg(long, env = "HYPNOS_S3_CREDENTIALS", value_name = "HOW", default_value = "keys")]
    pub s3_credentials: S3Credentials,
    /// Access key id
    #[arg(long, env = "HYPNOS_S3_ACCESS_KEY", value_name = "ID")]
    pub s3_access_key: Option<String>,
    /// Secret access key
    #[arg(long, env = "HYPNOS_S3_SECRET_KEY", value_name = "KEY", hide_env_values = true)]
    pub s3_secret_key: Option<SecretString>,
    /// File that holds the secret access key
    #[arg(long, env = "HYPNOS_S3_SECRET_KEY_FILE", value_name = "FILE")]
    pub s3_secret_key_file: Option<PathBuf>,
    /// Session token of temporary keys
    #[arg(long, env = "HYPNOS_S3_SESSION_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    pub s3_session_token: Option<SecretString>,
    /// File that holds the session token
    #[arg(long, env = "HYPNOS_S3_SESSION_TOKEN_FILE", value_name = "FILE")]
    pub s3_session_token_file: Option<PathBuf>,
    /// With web-identity: the role; by default the platform's AWS_ROLE_ARN
    #[arg(long, env = "HYPNOS_S3_ROLE_ARN", value_name = "ARN")]
    pub s3_role_arn: Option<String>,
    /// With web-identity: name of the session in the service's logs; by default the platform's AWS_ROLE_SESSION_NAME,
    /// else hypnos
    #[arg(long, env = "HYPNOS_S3_ROLE_SESSION", value_name = "NAME")]
    pub s3_role_session: Option<String>,
    /// With web-identity: file with the token, read again as it is renewed; by default the platform's
    /// AWS_WEB_IDENTITY_TOKEN_FILE
    #[arg(long, env = "HYPNOS_S3_WEB_IDENTITY_FILE", value_name = "FILE")]
    pub s3_web_identity_file: Option<PathBuf>,
    /// With web-identity: https:// URL of the service where the role is assumed; by default the platform's
    /// AWS_ENDPOINT_URL_STS, else Amazon's in the region
    #[arg(long, env = "HYPNOS_S3_STS_ENDPOINT", value_name = "URL")]
    pub s3_sts_endpoint: Option<String>,
    /// With container: path on the agent of ECS, or whole URL of another; by default the platform's
    /// AWS_CONTAINER_CREDENTIALS_RELATIVE_URI or AWS_CONTAINER_CREDENTIALS_FULL_URI
    #[arg(long, env = "HYPNOS_S3_CONTAINER_CREDENTIALS", value_name = "PLACE")]
    pub s3_container_credentials: Option<String>,
    /// With container: file with the authorization token for the agent, required with a whole URL; by default the
    /// platform's AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE
    #[arg(long, env = "HYPNOS_S3_CONTAINER_TOKEN_FILE", value_name = "FILE")]
    pub s3_container_token_file: Option<PathBuf>,
    /// With instance: URL of the metadata service; by default http://169.254.169.254
    #[arg(long, env = "HYPNOS_S3_METADATA_ENDPOINT", value_name = "URL")]
    pub s3_metadata_endpoint: Option<String>,
}

/// How to authenticate to the S3 service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum S3Credentials {
    /// With keys that are settings.
    Keys,
    /// With a role that is assumed with the token in a file.
    WebIdentity,
    /// With credentials from the agent beside the container.
    Container,
    /// With credentials from the virtual machine's metadata service.
    Instance,
}

impl Storage {
    /// URL of the database. Creates its directory if the URL is the default one.
    pub fn database_url(&self) -> Result<SecretString> {
        if self.database.is_none() && self.database_file.is_none() {
            std::fs::create_dir_all(&self.data).map_err(|error| {
                ConfigError(format!(
                    "HYPNOS_DATA: {} cannot be created: {}",
                    self.data.display(),
                    error.kind()
                ))
            })?;
        }
        self.existing_database_url()
    }

    /// URL of the database; creates nothing.
    pub fn existing_database_url(&self) -> Result<SecretString> {
        if let Some(url) = secret("HYPNOS_DATABASE", self.database.as_ref(), self.database_file.as_deref())? {
            let shown = url.expose_secret();
            if shown.starts_with("sqlite:")
                || shown.starts_with("postgres://")
                || shown.starts_with("postgresql://")
            {
                return Ok(url);
            }
            let scheme = shown.split(':').next().unwrap_or_default().to_owned();
            return invalid(format!("HYPNOS_DATABASE: wanted sqlite:… or postgres://…, got {scheme:?}"));
        }
        Ok(format!("sqlite:{}", self.data.join("hypnos.db").display()).into())
    }

    /// The file of a SQLite database, whether it exists or not.
    pub fn sqlite_file(&self) -> Result<Option<PathBuf>> {
        let Some(url) = secret("HYPNOS_DATABASE", self.database.as_ref(), self.database_file.as_deref())?
        else {
            return Ok(Some(self.data.join("hypnos.db")));
        };
        let path = url.expose_secret().strip_prefix("sqlite:").map(|path| path.trim_start_matches("//"));
        Ok(path.map(|path| path.split('?').next().unwrap_or_default().into()))
    }

    /// URL of the database past a pooler, if it is set.
    pub fn database_direct(&self) -> Result<Option<SecretString>> {
        let (url, file) = (self.database_direct.as_ref(), self.database_direct_file.as_deref());
        let Some(url) = secret("HYPNOS_DATABASE_DIRECT", url, file)? else { return Ok(None) };
        let shown = url.expose_secret();
        if shown.starts_with("postgres://") || shown.starts_with("postgresql://") {
            return Ok(Some(url));
        }
        let scheme = shown.split(':').next().unwrap_or_default();
        invalid(format!("HYPNOS_DATABASE_DIRECT: wanted postgres://…, got {scheme:?}"))
    }

    /// Whether the database is a SQLite file.
    pub fn is_sqlite(&self) -> Result<bool> {
        Ok(self.existing_database_url()?.expose_secret().starts_with("sqlite:"))
    }

    /// The object store.
    pub fn place(&self) -> Result<Place> {
        let place = self.objects.clone().unwrap_or_else(|| self.data.join("objects").display().to_string());
        let Some(bucket) = place.strip_prefix("s3://") else {
            if let Some(name) = self.given_s3_settings().into_iter().next() {
                return invalid(format!("{name} is set, but HYPNOS_OBJECTS is not s3://BUCKET"));
            }
            let dir = place.strip_prefix("file://").unwrap_or(&place);
            return match dir.split_once("://") {
                Some((scheme, _)) => {
                    invalid(format!("HYPNOS_OBJECTS: wanted a directory or s3://BUCKET, got {scheme}://…"))
                }
                None => Ok(Place::Directory(dir.into())),
            };
        };
        let (name, prefix) = bucket.split_once('/').unwrap_or((bucket, ""));
        if name.is_empty() {
            return invalid("HYPNOS_OBJECTS: s3:// names no bucket");
        }
        Ok(Place::Bucket(Bucket {
            name: name.into(),
            prefix: prefix.trim_matches('/').into(),
            endpoint: self.s3_endpoint.clone(),
            public_endpoint: self.s3_public_endpoint.clone(),
            region: self.s3_region.clone(),
            credentials: self.credentials(&platform)?,
        }))
    }

    /// Variables of the S3 settings that are given.
    fn given_s3_settings(&self) -> Vec<&'static str> {
        let places = [
            ("HYPNOS_S3_ENDPOINT", self.s3_endpoint.is_some()),
            ("HYPNOS_S3_PUBLIC_ENDPOINT", self.s3_public_endpoint.is_some()),
            ("HYPNOS_S3_CREDENTIALS", self.s3_credentials != S3Credentials::Keys),
        ];
        let places = places.into_iter().filter(|(_, given)| *given).map(|(name, _)| name);
        places.chain(self.given_s3_credentials().into_iter().map(|(_, name)| name)).collect()
    }

    /// Variables of the S3 credentials that are given, each with the way of authentication that it belongs to.
    fn given_s3_credentials(&self) -> Vec<(S3Credentials, &'static str)> {
        use S3Credentials::{Container, Instance, Keys, WebIdentity};
        let all = [
            (Keys, "HYPNOS_S3_ACCESS_KEY", self.s3_access_key.is_some()),
            (Keys, "HYPNOS_S3_SECRET_KEY", self.s3_secret_key.is_some()),
            (Keys, "HYPNOS_S3_SECRET_KEY_FILE", self.s3_secret_key_file.is_some()),
            (Keys, "HYPNOS_S3_SESSION_TOKEN", self.s3_session_token.is_some()),
            (Keys, "HYPNOS_S3_SESSION_TOKEN_FILE", self.s3_session_token_file.is_some()),
            (WebIdentity, "HYPNOS_S3_ROLE_ARN", self.s3_role_arn.is_some()),
            (WebIdentity, "HYPNOS_S3_ROLE_SESSION", self.s3_role_session.is_some()),
            (WebIdentity, "HYPNOS_S3_WEB_IDENTITY_FILE", self.s3_web_identity_file.is_some()),
            (WebIdentity, "HYPNOS_S3_STS_ENDPOINT", self.s3_sts_endpoint.is_some()),
            (Container, "HYPNOS_S3_CONTAINER_CREDENTIALS", self.s3_container_credentials.is_some()),
            (Container, "HYPNOS_S3_CONTAINER_TOKEN_FILE", self.s3_container_token_file.is_some()),
            (Instance, "HYPNOS_S3_METADATA_ENDPOINT", self.s3_metadata_endpoint.is_some()),
        ];
        all.into_iter().filter(|(_, _, given)| *given).map(|(how, name, _)| (how, name)).collect()
    }

    /// The credentials for the S3 service. `platform` reads the platform's variables for the chosen way of
    /// authentication; those of other ways are not read.
    fn credentials(&self, platform: &dyn Fn(&str) -> Option<String>) -> Result<Credentials> {
        let how = self.s3_credentials;
        let chosen = how.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        if let Some((_, name)) = self.given_s3_credentials().into_iter().find(|(of, _)| *of != how) {
            return invalid(format!(
                "{name} is set, but HYPNOS_S3_CREDENTIALS is {chosen}, which does not use it"
            ));
        }
        let either = |own: &Option<String>, variable: &str| own.clone().or_else(|| platform(variable));
        let path = |own: &Option<PathBuf>, variable: &str| {
            own.clone().or_else(|| platform(variable).map(PathBuf::from))
        };
        let missing = |own: &str, variable: &str| {
            invalid(format!("HYPNOS_S3_CREDENTIALS is {chosen}, but neither {own} nor {variable} is set"))
        };
        let readable = |own: &str, file: PathBuf| match std::fs::read_to_string(&file) {
            Ok(_) => Ok(file),
            Err(error) => invalid(format!("{own}: {} cannot be read: {}", file.display(), error.kind())),
        };
        match how {
            S3Credentials::Keys => {
                let (key, file) = (self.s3_secret_key.as_ref(), self.s3_secret_key_file.as_deref());
                let secret_key = secret("HYPNOS_S3_SECRET_KEY", key, file)?;
                let (token, file) = (self.s3_session_token.as_ref(), self.s3_session_token_file.as_deref());
                let session_token = secret("HYPNOS_S3_SESSION_TOKEN", token, file)?;
                match (self.s3_access_key.clone(), secret_key) {
                    (Some(access_key), Some(secret_key)) => {
                        Ok(Credentials::Keys { access_key, secret_key, session_token })
                    }
                    (None, _) => invalid("HYPNOS_OBJECTS is s3://…, but HYPNOS_S3_ACCESS_KEY is not set"),
                    (_, None) => invalid("HYPNOS_OBJECTS is s3://…, but HYPNOS_S3_SECRET_KEY is not set"),
                }
            }
            S3Credentials::WebIdentity => {
                let Some(role_arn) = either(&self.s3_role_arn, "AWS_ROLE_ARN") else {
                    return missing("HYPNOS_S3_ROLE_ARN", "AWS_ROLE_ARN");
                };
                let Some(file) = path(&self.s3_web_identity_file, "AWS_WEB_IDENTITY_TOKEN_FILE") else {
                    return missing("HYPNOS_S3_WEB_IDENTITY_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE");
                };
                let sts_endpoint = either(&self.s3_sts_endpoint, "AWS_ENDPOINT_URL_STS");
                if let Some(url) = sts_endpoint.as_ref().filter(|url| !url.starts_with("https://")) {
                    return invalid(format!("HYPNOS_S3_STS_ENDPOINT: wanted https://HOST, got {url:?}"));
                }
                let session_name = either(&self.s3_role_session, "AWS_ROLE_SESSION_NAME");
                Ok(Credentials::WebIdentity {
                    token_file: readable("HYPNOS_S3_WEB_IDENTITY_FILE", file)?,
                    role_arn,
                    session_name: session_name.unwrap_or_else(|| "hypnos".into()),
                    sts_endpoint,
                })
            }
            S3Credentials::Container => {
                let relative = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI";
                let place = either(&self.s3_container_credentials, relative)
                    .or_else(|| platform("AWS_CONTAINER_CREDENTIALS_FULL_URI"));
                let Some(place) = place else { return missing("HYPNOS_S3_CONTAINER_CREDENTIALS", relative) };
                let whole = place.starts_with("http://") || place.starts_with("https://");
                if !whole && !place.starts_with('/') {
                    return invalid(format!(
                        "HYPNOS_S3_CONTAINER_CREDENTIALS: wanted /PATH or http(s)://HOST/PATH, got {place:?}"
                    ));
                }
                let file = path(&self.s3_container_token_file, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE");
                let token_file =
                    file.map(|file| readable("HYPNOS_S3_CONTAINER_TOKEN_FILE", file)).transpose()?;
                if whole && token_file.is_none() {
                    return invalid(
                        "HYPNOS_S3_CONTAINER_CREDENTIALS is a whole URL, but HYPNOS_S3_CONTAINER_TOKEN_FILE is not set",
                    );
                }
                Ok(Credentials::Container { place, token_file })
            }
            S3Credentials::Instance => {
                Ok(Credentials::Instance { endpoint: self.s3_metadata_endpoint.clone() })
            }
        }
    }

    /// Refuses a SQLite file on a network file system: its locks and shared memory work on one machine only.
    pub fn check_local(&self) -> Result<()> {
        let url = self.existing_database_url()?;
        let Some(path) = url.expose_secret().strip_prefix("sqlite:") else { return Ok(()) };
        let path = Path::new(path.trim_start_matches("//").split('?').next().unwrap_or_default());
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let Ok(dir) = dir.canonicalize() else { return Ok(()) }; // opening the database reports the error
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        match file_system(&mounts, &dir) {
            Some(kind) if NETWORK_FILE_SYSTEMS.iter().any(|networked| kind.starts_with(networked)) => {
                invalid(format!(
                    "HYPNOS_DATABASE is a SQLite file on a network file system ({kind}); wanted a local disk, or Postgres"
                ))
            }
            _ => Ok(()),
        }
    }

    /// Default directory for temporary files.
    pub fn scratch(&self) -> PathBuf {
        self.data.join("scratch")
    }
}

/// Who may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Auth {
    /// Callers with an API key.
    Keys,
    /// Everyone on this machine.
    None,
}

/// Settings of the HTTP server.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Serving")]
pub struct Serving {
    /// Address to listen on
    #[arg(long, env = "HYPNOS_LISTEN", value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// URL under which clients reach the service, for the links that they are given; by default the listening address
    #[arg(long, env = "HYPNOS_PUBLIC_URL", value_name = "URL")]
    pub public_url: Option<String>,
    /// Who may call: keys, or none (without keys, on this machine only); by default none where address and public URL
    /// are loopback, else keys
    #[arg(long, env = "HYPNOS_AUTH", value_name = "WHO")]
    pub auth: Option<Auth>,
    /// Secret that signs links to objects in a directory; by default generated once and kept in DATA
    #[arg(long, env = "HYPNOS_URL_SECRET", value_name = "SECRET", hide_env_values = true)]
    pub url_secret: Option<SecretString>,
    /// File that holds the secret that signs links
    #[arg(long, env = "HYPNOS_URL_SECRET_FILE", value_name = "FILE")]
    pub url_secret_file: Option<PathBuf>,
    /// The model that is trained where a job names none; by default the only one that workers hold
    #[arg(long, env = "HYPNOS_DEFAULT_MODEL", value_name = "NAME")]
    pub default_model: Option<String>,
    /// Names of models whose jobs are accepted before a worker has registered them, with commas between them
    #[arg(long, env = "HYPNOS_MODELS", value_name = "LIST", value_delimiter = ',')]
    pub models: Vec<String>,
    /// Lifetime of a link to an object, in seconds
    #[arg(long, env = "HYPNOS_URL_SECS", value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub url_secs: u64,
    /// Maximum size of a photo, in MiB
    #[arg(long, env = "HYPNOS_PHOTO_MB", value_name = "MIB", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=100))]
    pub photo_mb: u64,
    /// Minimum width and height of a photo, in pixels
    #[arg(long, env = "HYPNOS_PHOTO_SIDE_MIN", value_name = "PIXELS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..=4096))]
    pub photo_side_min: u32,
    /// Maximum number of queued jobs of one tenant; more are answered with 429
    #[arg(long, env = "HYPNOS_QUEUE_MAX", value_name = "N", default_value_t = 10_000)]
    pub queue_max: u32,
    /// Maximum number of attempts of a job
    #[arg(long, env = "HYPNOS_ATTEMPTS_MAX", value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub attempts_max: u32,
    /// Maximum number of uploads at a time, queued ones included; each has up to five photos in the scratch directory
    #[arg(long, env = "HYPNOS_UPLOADS_MAX", value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub uploads_max: u32,
    /// Maximum number of connections
    #[arg(long, env = "HYPNOS_CONNECTIONS_MAX", value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections_max: u32,
    /// Maximum number of event streams and downloads; tenants share them fairly
    #[arg(long, env = "HYPNOS_STREAMS_MAX", value_name = "N", default_value_t = 1000)]
    pub streams_max: u32,
    /// How long a request's head may take to arrive, in seconds
    #[arg(long, env = "HYPNOS_HEADER_SECS", value_name = "SECONDS", default_value_t = 10.0)]
    pub header_secs: f64,
    /// How long a request's body may take to arrive, in seconds
    #[arg(long, env = "HYPNOS_BODY_SECS", value_name = "SECONDS", default_value_t = 60.0)]
    pub body_secs: f64,
    /// How long requests in flight may take when the service stops, in seconds
    #[arg(long, env = "HYPNOS_DRAIN_SECS", value_name = "SECONDS", default_value_t = 25.0)]
    pub drain_secs: f64,
}

impl Serving {
    /// Refuses invalid settings, before anything is opened.
    pub fn check(&self) -> Result<()> {
        self.public_url(self.listen)?;
        seconds("HYPNOS_HEADER_SECS", self.header_secs)?;
        seconds("HYPNOS_BODY_SECS", self.body_secs)?;
        seconds("HYPNOS_DRAIN_SECS", self.drain_secs).map(drop)
    }

    /// Whether callers need keys. They do unless only this machine can call. With a public URL that is not loopback
    /// others can, whatever the listening address is: a proxy forwards their requests.
    pub fn keys_wanted(&self) -> Result<bool> {
        let elsewhere = self.public_url.as_deref().filter(|url| !host(url).is_some_and(http::is_loopback));
        let reached = match elsewhere {
            _ if !self.listen.ip().to_canonical().is_loopback() => {
                Some(format!("HYPNOS_LISTEN is {}", self.listen))
            }
            Some(url) => Some(format!("HYPNOS_PUBLIC_URL is {url}")),
            None => None,
        };
        match (self.auth, reached) {
            (Some(Auth::None), Some(reached)) => invalid(format!(
                "HYPNOS_AUTH is none, but {reached}, which other machines can reach; wanted HYPNOS_AUTH=keys, or a loopback address and URL"
            )),
            (Some(auth), _) => Ok(auth == Auth::Keys),
            (None, reached) => Ok(reached.is_some()),
        }
    }

    /// Prefix of links, without a slash at the end. `bound` is the address that the listener is bound to.
    pub fn public_url(&self, bound: SocketAddr) -> Result<String> {
        let Some(url) = &self.public_url else {
            return match bound.ip() {
                ip if ip.is_unspecified() => {
                    Ok(format!("http://{}:{}", IpAddr::from([127, 0, 0, 1]), bound.port()))
                }
                _ => Ok(format!("http://{bound}")),
            };
        };
        match host(url) {
            Some(host) if !host.is_empty() && !url.contains(['?', '#', ' ']) => {
                Ok(url.trim_end_matches('/').to_owned())
            }
            _ => invalid(format!("HYPNOS_PUBLIC_URL: wanted http(s)://HOST[/PATH], got {url:?}")),
        }
    }

    /// The secret that signs links: the one given, or one generated once and kept in `data`.
    pub fn url_secret(&self, data: &Path) -> Result<SecretString> {
        let given = secret("HYPNOS_URL_SECRET", self.url_secret.as_ref(), self.url_secret_file.as_deref())?;
        match given {
            Some(secret) if secret.expose_secret().len() < 16 => {
                invalid("HYPNOS_URL_SECRET: wanted at least 16 characters")
            }
            Some(secret) => Ok(secret),
            None => load_or_create_secret(&data.join("url-secret")),
        }
    }
}

/// The host of an `http(s)://` URL, without its port; none if it is no such URL. A URL with a user's name is refused:
/// the text before the `@` looks like a host to people.
fn host(url: &str) -> Option<&str> {
    let lower = url.to_ascii_lowercase();
    let scheme = ["https://", "http://"].into_iter().find(|scheme| lower.starts_with(scheme))?;
    let authority = url[scheme.len()..].split(['/', '?', '#', '\\']).next()?;
    if authority.contains('@') {
        return None;
    }
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => Some(host),
        _ => Some(authority),
    }
}

/// Settings of monitoring.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Monitoring")]
pub struct Monitoring {
    /// Address of a listener for /metrics, /healthz and /readyz, without keys
    #[arg(long, env = "HYPNOS_METRICS_LISTEN", value_name = "ADDRESS")]
    pub metrics_listen: Option<SocketAddr>,
}

/// What is exported to an OpenTelemetry collector, as OpenTelemetry's own variables request it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signals {
    /// Spans of requests and jobs.
    pub traces: bool,
    /// The metrics of `/metrics`.
    pub metrics: bool,
}

impl Signals {
    /// What the environment requests.
    pub fn from_environment() -> Result<Self> {
        Self::read(|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    /// What `variable` requests: a signal is exported if it has an endpoint, unless it is turned off. OpenTelemetry's
    /// own library reads how to export it from the other variables, and ignores values that it does not know; here they
    /// are refused.
    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let set = |name: &str| {
            variable(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
        };
        if set("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Ok(Self::default());
        }
        let first = |names: [String; 2]| names.into_iter().find_map(|name| Some((set(&name)?, name)));
        let one_of = |name: &str, words: &[&str]| match set(name) {
            Some(word) if !words.contains(&word.as_str()) => {
                invalid(format!("{name}: wanted {}, got {word:?}", words.join(" or ")))
            }
            word => Ok(word),
        };
        let asked = |signal: &str| {
            let own = |what: &str| format!("OTEL_EXPORTER_OTLP_{signal}_{what}");
            let endpoints = [own("ENDPOINT"), "OTEL_EXPORTER_OTLP_ENDPOINT".into()];
            let Some((endpoint, name)) = first(endpoints) else { return Ok(false) };
            if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
                return invalid(format!("{name}: wanted http(s)://HOST:PORT, got {endpoint:?}"));
            }
            for prefix in [format!("OTEL_EXPORTER_OTLP_{signal}"), "OTEL_EXPORTER_OTLP".into()] {
                one_of(&format!("{prefix}_PROTOCOL"), &["http/protobuf"])?;
                one_of(&format!("{prefix}_COMPRESSION"), &["none", "gzip"])?;
                number(&format!("{prefix}_TIMEOUT"), set(&format!("{prefix}_TIMEOUT")))?;
            }
            let exporter = one_of(&format!("OTEL_{signal}_EXPORTER"), &["otlp", "none"])?;
            Ok(exporter.as_deref() != Some("none"))
        };
        let signals = Self { traces: asked("TRACES")?, metrics: asked("METRICS")? };
        if signals != Self::default() {
            let sampler = one_of("OTEL_TRACES_SAMPLER", &OTEL_SAMPLERS)?;
            if sampler.is_some_and(|sampler| sampler.ends_with("ratio")) {
                let ratio = set("OTEL_TRACES_SAMPLER_ARG").unwrap_or_default();
                if !ratio.parse().is_ok_and(|ratio: f64| (0.0..=1.0).contains(&ratio)) {
                    return invalid(format!("OTEL_TRACES_SAMPLER_ARG: wanted 0 to 1, got {ratio:?}"));
                }
            }
            OTEL_NUMBERS.iter().try_for_each(|name| number(name, set(name)))?;
        }
        Ok(signals)
    }
}

/// OpenTelemetry's samplers of traces.
const OTEL_SAMPLERS: [&str; 6] = [
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
];

/// OpenTelemetry's variables that are milliseconds or counts.
const OTEL_NUMBERS: [&str; 5] = [
    "OTEL_BSP_SCHEDULE_DELAY",
    "OTEL_BSP_MAX_QUEUE_SIZE",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
    "OTEL_BSP_EXPORT_TIMEOUT",
    "OTEL_METRIC_EXPORT_INTERVAL",
];

/// Refuses a value that is not an integer above 0.
fn number(name: &str, value: Option<String>) -> Result<()> {
    match value {
        Some(value) if !value.parse::<u64>().is_ok_and(|number| number > 0) => {
            invalid(format!("{name}: wanted a number above 0, got {value:?}"))
        }
        _ => Ok(()),
    }
}

/// Settings of the workers.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Working")]
pub struct Working {
    /// Directory of the models, in the diffusers layout, or a checkpoint in one file; `miniature` is the small one that
    /// is in the program
    #[arg(long, env = "HYPNOS_BUNDLE", value_name = "PATH", default_value = MINIATURE_NAME, value_parser = bundle)]
    pub bundle: PathBuf,
    /// Bundle that has what a checkpoint in one file lacks: tokenizer, segmenter, perceptual, metrics
    #[arg(long = "with", env = "HYPNOS_BUNDLE_WITH", value_name = "DIR", value_parser = bundle)]
    pub bundle_with: Option<PathBuf>,
    /// Devices, with commas between them: cpu, cuda, cuda:N. Each worker takes the next one
    #[arg(long, env = "HYPNOS_DEVICES", value_name = "LIST", default_value = "cpu", value_delimiter = ',')]
    pub devices: Vec<String>,
    /// What models compute in, on every device: f32, tf32 or bf16; by default bf16 on GPUs from Ampere on, f32 elsewhere
    #[arg(long, env = "HYPNOS_PRECISION", value_name = "PRECISION")]
    pub precision: Option<Precision>,
    /// Pictures drawn at once: more is quicker for each and takes more memory
    #[arg(long, env = "HYPNOS_BATCH", value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub batch: u16,
    /// Gradient checkpointing: a training step takes less memory and a third more time
    #[arg(long, env = "HYPNOS_GRADIENT_CHECKPOINTING")]
    pub gradient_checkpointing: bool,
    /// Start, and begin trainings, even if the memory estimate says that they do not fit
    #[arg(long, env = "HYPNOS_IGNORE_MEMORY")]
    pub ignore_memory: bool,
    /// Cache of fine-tuned models in each device's memory, in GiB; 0 keeps the one in use; a training shrinks it to the memory that is left
    #[arg(long, env = "HYPNOS_MODELS_GB", value_name = "GIB", default_value_t = 8.0)]
    pub models_gb: f64,
    /// Cache of weights on disk, in GiB; 0 keeps those in use
    #[arg(long, env = "HYPNOS_WEIGHTS_GB", value_name = "GIB", default_value_t = 40.0)]
    pub weights_gb: f64,
    /// Directory for temporary files; by default DATA/scratch
    #[arg(long, env = "HYPNOS_SCRATCH", value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// How often a training's checkpoint is stored, in seconds
    #[arg(long, env = "HYPNOS_CHECKPOINT_SECS", value_name = "SECONDS", default_value_t = 300.0)]
    pub checkpoint_secs: f64,
    /// How long a worker's lease of a job lasts without heartbeats, in seconds
    #[arg(long, env = "HYPNOS_LEASE_SECS", value_name = "SECONDS", default_value_t = 60.0)]
    pub lease_secs: f64,
    /// Interval of a worker's heartbeats, in seconds; at most a third of the lease
    #[arg(long, env = "HYPNOS_BEAT_SECS", value_name = "SECONDS", default_value_t = 2.0)]
    pub beat_secs: f64,
    /// How long one attempt of a job may take, in hours
    #[arg(long, env = "HYPNOS_ATTEMPT_HOURS", value_name = "HOURS", default_value_t = 12.0)]
    pub attempt_hours: f64,
    /// Part of a device's time that samples may take while it trains, 0 to 1; 0: they wait, and the training takes less memory
    #[arg(long, env = "HYPNOS_SAMPLE_SHARE", value_name = "PART", default_value_t = 0.5)]
    pub sample_share: f64,
    /// How long running jobs may take to be stored when the worker stops, in seconds
    #[arg(long, env = "HYPNOS_WORK_DRAIN_SECS", value_name = "SECONDS", default_value_t = 300.0)]
    pub work_drain_secs: f64,
    /// How often the queue is polled when no notification comes, in seconds
    #[arg(long, env = "HYPNOS_POLL_SECS", value_name = "SECONDS", default_value_t = 1.0)]
    pub poll_secs: f64,
}

/// The times and sizes of [`Working`].
pub(crate) struct WorkLimits {
    pub(crate) lease: Duration,
    pub(crate) heartbeat: Duration,
    pub(crate) attempt: Duration,
    pub(crate) poll: Duration,
    pub(crate) checkpoint: Duration,
    pub(crate) drain: Duration,
    pub(crate) weights_bytes: u64,
    pub(crate) models_bytes: u64,
}

impl Working {
    /// Its times and sizes. Refuses invalid settings and combinations.
    pub(crate) fn limits(&self) -> Result<WorkLimits> {
        let limits = WorkLimits {
            lease: seconds("HYPNOS_LEASE_SECS", self.lease_secs)?,
            heartbeat: seconds("HYPNOS_BEAT_SECS", self.beat_secs)?,
            attempt: seconds("HYPNOS_ATTEMPT_HOURS", self.attempt_hours * 3600.0)?,
            poll: seconds("HYPNOS_POLL_SECS", self.poll_secs)?,
            checkpoint: seconds("HYPNOS_CHECKPOINT_SECS", self.checkpoint_secs)?,
            drain: seconds("HYPNOS_WORK_DRAIN_SECS", self.work_drain_secs)?,
            weights_bytes: gigabytes("HYPNOS_WEIGHTS_GB", self.weights_gb)?,
            models_bytes: gigabytes("HYPNOS_MODELS_GB", self.models_gb)?,
        };
        if !(0.0..=1.0).contains(&self.sample_share) {
            return invalid(format!("HYPNOS_SAMPLE_SHARE: wanted 0 to 1, got {}", self.sample_share));
        }
        if self.beat_secs * 3.0 > self.lease_secs {
            return invalid(format!(
                "HYPNOS_BEAT_SECS is {}, more than a third of HYPNOS_LEASE_SECS, {}",
                self.beat_secs, self.lease_secs
            ));
        }
        Ok(limits)
    }

    /// The device of each of `n` workers.
    pub fn devices(&self, n: usize) -> Vec<String> {
        self.devices.iter().cycle().take(n).cloned().collect()
    }

    /// How many of `n` workers have the memory of this device together; 1 if none takes it.
    pub fn sharers(&self, device: &str, n: usize) -> usize {
        self.devices(n).iter().filter(|other| is_same_device(other, device)).count().max(1)
    }
}

/// Whether two names are of one device: `cuda` is the first GPU, as `cuda:0` is.
pub fn is_same_device(one: &str, other: &str) -> bool {
    one == other || matches!((ordinal(one), ordinal(other)), (Ok(one), Ok(other)) if one == other)
}

/// The directory of a bundle. The miniature is written to the user's cache directory when it is first used.
pub fn bundle(name: &str) -> std::result::Result<PathBuf, String> {
    if name != MINIATURE_NAME {
        return Ok(name.into());
    }
    miniature(&cache()).map_err(|error| error.to_string())
}

/// The user's cache directory of this program, which may not be there yet.
pub fn cache() -> PathBuf {
    let set =
        |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    cache.unwrap_or_else(std::env::temp_dir).join("hypnos")
}

/// A setting in seconds as a duration.
pub fn seconds(name: &str, value: f64) -> Result<Duration> {
    match Duration::try_from_secs_f64(value) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => invalid(format!("{name}: wanted seconds above 0, got {value}")),
    }
}

/// A setting in GiB as bytes.
pub fn gigabytes(name: &str, value: f64) -> Result<u64> {
    if value.is_finite() && (0.0..=1e6).contains(&value) {
        return Ok((value * f64::from(1 << 30)) as u64);
    }
    invalid(format!("{name}: wanted GiB from 0 on, got {value}"))
}

/// A variable that the platform sets; read only where a setting asks for it.
fn platform(name: &str) -> Option<String> {
    std::env::var_os(name)?.into_string().ok().filter(|value| !value.is_empty())
}

/// A secret that is given directly or in a file, but not both.
fn secret(name: &str, itself: Option<&SecretString>, file: Option<&Path>) -> Result<Option<SecretString>> {
    match (itself, file) {
        (Some(_), Some(_)) => invalid(format!("{name} and {name}_FILE are both set; wanted one")),
        (Some(secret), None) => Ok(Some(secret.clone())),
        (None, Some(file)) => match std::fs::read_to_string(file) {
            Ok(text) if !text.trim().is_empty() => Ok(Some(text.trim().into())),
            Ok(_) => invalid(format!("{name}_FILE: {} is empty", file.display())),
            Err(error) => {
                invalid(format!("{name}_FILE: {} cannot be read: {}", file.display(), error.kind()))
            }
        },
        (None, None) => Ok(None),
    }
}

/// A secret that is generated at the first start. Two processes that start at once both use the one stored first.
fn load_or_create_secret(file: &Path) -> Result<SecretString> {
    let failed =
        |error: std::io::Error| ConfigError(format!("{} cannot be used: {}", file.display(), error.kind()));
    if !file.exists() {
        let (mut high, mut low) = ([0; 16], [0; 16]);
        for half in [&mut high, &mut low] {
            getrandom::fill(half).map_err(|error| ConfigError(format!("no random numbers: {error}")))?;
        }
        let text = format!("{:032x}{:032x}", u128::from_ne_bytes(high), u128::from_ne_bytes(low));
        if let Some(dir) = file.parent() {
            std::fs::create_dir_all(dir).map_err(failed)?;
        }
        let part = file.with_extension(std::process::id().to_string());
        write_private(&part, &text).map_err(failed)?;
        let placed = std::fs::hard_link(&part, file);
        std::fs::remove_file(&part).map_err(failed)?;
        if let Err(error) = placed
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            return Err(failed(error));
        }
    }
    Ok(std::fs::read_to_string(file).map_err(failed)?.into())
}

fn write_private(file: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(file)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_mount_decides_what_a_directory_lies_on() {
        let mounts =
            "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 21 0:40 / /srv/share rw shared:1 - nfs4 host:/x rw\n";
        assert_eq!(file_system(mounts, Path::new("/srv/share/data")), Some("nfs4"));
        assert_eq!(file_system(mounts, Path::new("/srv/shared")), Some("ext4"));
    }

    /// Whether `serve` with these flags requires keys.
    fn keys_wanted(flags: &[&str]) -> Result<bool> {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            serving: Serving,
        }
        let line = <Line as clap::Parser>::parse_from(["serve"].iter().chain(flags));
        line.serving.keys_wanted()
    }

    #[test]
    fn whoever_others_reach_asks_for_keys() {
        let here = [
            "http://localhost:8080",
            "http://127.0.0.1/hypnos",
            "http://[::1]:80",
            "HTTP://LOCALHOST",
            "https://a.localhost",
        ];
        for url in here {
            assert_eq!(keys_wanted(&["--public-url", url]), Ok(false), "{url}");
            assert_eq!(keys_wanted(&["--public-url", url, "--auth", "none"]), Ok(false), "{url}");
            assert_eq!(keys_wanted(&["--public-url", url, "--auth", "keys"]), Ok(true), "{url}");
            assert_eq!(keys_wanted(&["--public-url", url, "--listen", "0.0.0.0:80"]), Ok(true), "{url}");
        }
        let elsewhere = [
            "https://hypnos.example",
            "http://10.0.0.1:8080",
            "https://localhost.example",
            "http://127.0.0.1@x.example",
            "http://127.0.0.1.example",
            "http://x\\@localhost",
        ];
        for url in elsewhere {
            assert_eq!(keys_wanted(&["--public-url", url]), Ok(true), "{url}");
            let error = keys_wanted(&["--public-url", url, "--auth", "none"]).unwrap_err().to_string();
            assert!(error.contains(url) && error.contains("HYPNOS_AUTH") && !error.contains('\n'), "{error}");
        }
        assert_eq!(keys_wanted(&[]), Ok(false));
        assert_eq!(keys_wanted(&["--listen", "[::ffff:127.0.0.1]:80"]), Ok(false));
        assert!(keys_wanted(&["--listen", "192.0.2.1:80", "--auth", "none"]).is_err());
    }

    #[test]
    fn workers_with_one_device_share_its_memory() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            working: Working,
        }
        let of = |devices: &str| {
            <Line as clap::Parser>::parse_from(["work", "--bundle", "dir", "--devices", devices]).working
        };
        assert_eq!(of("cpu").sharers("cpu", 3), 3);
        assert_eq!(of("cuda,cuda:00").sharers("cuda:0", 2), 2);
        let mixed = of("cuda,cpu,cuda:0,cuda:1");
        assert_eq!(["cuda", "cuda:0", "cuda:1", "cpu"].map(|device| mixed.sharers(device, 4)), [2, 2, 1, 1]);
        assert_eq!(["cuda", "cuda:0", "cuda:1", "cpu"].map(|device| mixed.sharers(device, 6)), [3, 3, 1, 2]);
        assert_eq!(mixed.sharers("cuda:1", 2), 1, "none takes it");
    }

    #[test]
    fn variables_that_begin_as_ours_and_are_not_are_refused() {
        let known = BTreeSet::from(["HYPNOS_DATA".to_owned()]);
        let check = |name: &str| check_environment(std::iter::once(name.to_owned()), &known);
        assert_eq!(check("HYPNOS_DATA"), Ok(()));
        assert_eq!(check("HYPNOS_TEST_GARAGE"), Ok(()));
        assert_eq!(check("PATH"), Ok(()));
        let error = check("HYPNOS_DATABSE").unwrap_err();
        assert_eq!(error.to_string(), "HYPNOS_DATABSE is set, but there is no such setting");
    }

    #[test]
    fn the_collector_s_own_variables_say_what_is_sent() {
        let read = |given: &[(&str, &str)]| {
            let given: Vec<(String, String)> =
                given.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
            Signals::read(|name| {
                given.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
            })
        };
        let (all, none) = (Signals { traces: true, metrics: true }, Signals::default());
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318");
        assert_eq!(read(&[]), Ok(none));
        assert_eq!(read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")]), Ok(none));
        assert_eq!(read(&[endpoint]), Ok(all));
        assert_eq!(read(&[endpoint, ("OTEL_SDK_DISABLED", "TRUE")]), Ok(none));
        assert_eq!(
            read(&[endpoint, ("OTEL_METRICS_EXPORTER", "none")]),
            Ok(Signals { traces: true, ..none })
        );
        let metrics = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "https://collector/v1/metrics");
        assert_eq!(read(&[metrics]), Ok(Signals { metrics: true, ..none }));
        let refused = [
            (
                ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317"),
                "wanted http(s)://HOST:PORT, got \"collector:4317\"",
            ),
            (("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "snappy"), "wanted none or gzip, got \"snappy\""),
            (("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"), "OTEL_EXPORTER_OTLP_TIMEOUT: wanted a number above 0"),
            (("OTEL_BSP_SCHEDULE_DELAY", "0"), "OTEL_BSP_SCHEDULE_DELAY: wanted a number above 0, got \"0\""),
            (("OTEL_TRACES_SAMPLER", "traceidratio"), "OTEL_TRACES_SAMPLER_ARG: wanted 0 to 1, got \"\""),
            (("OTEL_TRACES_SAMPLER", "half"), "OTEL_TRACES_SAMPLER: wanted always_on or "),
            (("OTEL_TRACES_EXPORTER", "zipkin"), "OTEL_TRACES_EXPORTER: wanted otlp or none, got \"zipkin\""),
            (("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), "OTEL_EXPORTER_OTLP_PROTOCOL: wanted http/protobuf"),
        ];
        for (given, wanted) in refused {
            let line = read(&[given, endpoint]).unwrap_err().to_string();
            assert!(line.contains(wanted), "{line}");
        }
    }

    #[test]
    fn a_secret_is_drawn_once_and_only_its_owner_may_read_it() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("data/url-secret");
        let first = load_or_create_secret(&file).unwrap();
        assert_eq!(first.expose_secret().len(), 64);
        assert_eq!(load_or_create_secret(&file).unwrap().expose_secret(), first.expose_secret());
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path().join("data")).unwrap().count(), 1);
    }
}
