//! Authentication of callers: the tenant of a request's API key, and the scope that the key has.

use std::ops::{Deref, DerefMut};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use tokio::time::Instant;

use super::fair_pool::Permit;
use super::keys::{CachedKey, contains_key, unauthorized};
use super::problem::{Kind, Problem};
use super::settings::Auth;
use super::state::AppState;
use crate::job::TenantId;
use crate::store::Scope;

/// An authenticated caller, with a permit of the pool of requests.
pub(super) struct Caller {
    pub(super) tenant: TenantId,
    key: Option<String>,
    expires_at: Option<Instant>,
    permit: Option<Permit>,
}

/// A caller with the scope `read`.
pub(super) struct Reader(pub(super) Caller);

/// A caller with the scope `write`.
pub(super) struct Writer(pub(super) Caller);

/// A caller with the scope `admin`, who may see what concerns all tenants. A server without keys grants it to everyone.
pub(super) struct Operator(pub(super) Caller);

impl Caller {
    /// Whether the key is still valid, for responses that last longer than a request.
    pub(super) async fn is_still_valid(&self, app: &AppState) -> bool {
        match &self.key {
            Some(key) => !app
                .keys
                .authenticate(key)
                .await
                .is_err_and(|problem| matches!(problem.kind(), Kind::Unauthorized | Kind::TenantDisabled)),
            None => true,
        }
    }

    /// When the key expires, if it does.
    pub(super) fn expires_at(&self) -> Option<Instant> {
        self.expires_at
    }

    /// Releases the permit, before something that takes long and needs a permit of another pool.
    pub(super) fn release_permit(&mut self) {
        self.permit = None;
    }

    /// Acquires the permit again.
    pub(super) async fn acquire_permit(&mut self, app: &AppState) -> Result<(), Problem> {
        self.permit = Some(app.pools.requests.acquire(self.tenant).await?);
        Ok(())
    }
}

macro_rules! callers {
    ($($caller:ident: $scope:ident),+) => {$(
        impl Deref for $caller {
            type Target = Caller;

            fn deref(&self) -> &Caller {
                &self.0
            }
        }

        impl DerefMut for $caller {
            fn deref_mut(&mut self) -> &mut Caller {
                &mut self.0
            }
        }

        impl FromRequestParts<AppState> for $caller {
            type Rejection = Problem;

            async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Result<Self, Problem> {
                authenticate(parts, app, Scope::$scope).await.map(Self)
            }
        }
    )+};
}
callers!(Reader: Read, Writer: Write, Operator: Admin);

async fn authenticate(parts: &Parts, app: &AppState, wanted: Scope) -> Result<Caller, Problem> {
    if parts.uri.query().is_some_and(contains_key) {
        return Err(Problem::new(
            Kind::KeyInQuery,
            "a key was sent in the URL; it belongs in the Authorization header",
        ));
    }
    let mut caller = Caller { tenant: TenantId::LOCAL, key: None, expires_at: None, permit: None };
    if app.settings.auth == Auth::Keys {
        let text = bearer(&parts.headers).ok_or_else(unauthorized)?;
        let CachedKey { key, expires_at } = app.keys.authenticate(text).await?;
        if !key.scope.covers(wanted) {
            let detail = format!("the key's scope is {}; wanted {wanted}", key.scope);
            return Err(Problem::new(Kind::Scope, detail));
        }
        caller = Caller { tenant: key.tenant, key: Some(text.to_owned()), expires_at, permit: None };
    }
    caller.acquire_permit(app).await?;
    Ok(caller)
}

/// The bearer token, if there is exactly one Authorization header.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut all = headers.get_all(header::AUTHORIZATION).iter();
    let (first, None) = (all.next()?, all.next()) else { return None };
    let (scheme, token) = first.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}
