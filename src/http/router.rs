//! The routers: of the whole service, and of operators' routes alone.

use axum::Router;
use axum::middleware::from_fn_with_state;

use super::loopback::local_only;
use super::middleware::with_base_layers;
use super::routes::{api, public};
use super::state::AppState;
use super::{reference, ui};

impl AppState {
    /// All routes of the service.
    pub fn router(&self) -> Router {
        let api = Router::from(api()).layer(from_fn_with_state(self.clone(), local_only));
        with_base_layers(
            api.merge(Router::from(public()))
                .merge(ui::routes())
                .merge(reference::routes())
                .with_state(self.clone()),
        )
    }

    /// Health checks and metrics, without keys, for a listener of their own.
    pub fn operations(&self) -> Router {
        self.operations.clone().router()
    }
}
