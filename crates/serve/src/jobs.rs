//! Training on the served base.

use std::sync::Arc;

use axum::Router;

use crate::server::Server;

/// The jobs of a server.
pub(crate) struct Jobs;

/// Adds the routes.
pub(crate) fn add(router: Router<Arc<Server>>) -> Router<Arc<Server>> {
    router
}
