//! All routes of the service, and those of operators alone.

use axum::Router;
use axum::middleware::from_fn_with_state;

use super::loopback::admit;
use super::middleware::dressed;
use super::routes::{about, api};
use super::state::Front;
use super::{reference, ui};

impl Front {
    /// All the service.
    pub fn router(&self) -> Router {
        let api = Router::from(api()).layer(from_fn_with_state(self.clone(), admit));
        dressed(
            api.merge(Router::from(about()))
                .merge(ui::routes())
                .merge(reference::routes())
                .with_state(self.clone()),
        )
    }

    /// What operators ask for, without keys, for a listener of its own.
    pub fn operations(&self) -> Router {
        self.operations.clone().router()
    }
}
