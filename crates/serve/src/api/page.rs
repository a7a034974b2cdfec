//! The page at `/`, whose files are in the binary.

use std::sync::Arc;

use axum::Router;
use axum::http::header;
use axum::routing::get;

use crate::server::Server;

macro_rules! files {
    ($($name:literal: $kind:literal),+ $(,)?) => {
        &[$(($name, $kind, include_str!(concat!("../page/", $name)))),+]
    };
}

/// Name, kind and content of each file.
const FILES: &[(&str, &str, &str)] = files! {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "parts.js": "text/javascript; charset=utf-8",
    "generate.js": "text/javascript; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "compare.js": "text/javascript; charset=utf-8",
    "words.js": "text/javascript; charset=utf-8",
    "adapters.js": "text/javascript; charset=utf-8",
    "jobs.js": "text/javascript; charset=utf-8",
    "job.js": "text/javascript; charset=utf-8",
    "start.js": "text/javascript; charset=utf-8",
    "chart.js": "text/javascript; charset=utf-8",
};

/// Adds a route for each file.
pub(super) fn add(mut router: Router<Arc<Server>>) -> Router<Arc<Server>> {
    for (name, kind, content) in FILES {
        let path = match *name {
            "index.html" => "/".to_owned(),
            name => format!("/{name}"),
        };
        let headers = [
            (header::CONTENT_TYPE, *kind),
            // A new version of the program brings a new page.
            (header::CACHE_CONTROL, "no-cache"),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        ];
        router = router.route(&path, get(async move || (headers, *content)));
    }
    router
}
