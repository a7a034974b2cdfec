//! Whose page a request comes from.
//!
//! A browser sends requests to any address for any page, also to the loopback one. It does not show a page of another site the answers (CORS is off), but a
//! request that changes something has then done so. Where a key is needed this cannot happen, since browsers send none by themselves.

use std::net::IpAddr;

use axum::http::{HeaderMap, Method, StatusCode, header};

use crate::error::ApiError;

/// Refuses what a page of another site makes a browser ask for. On the loopback address names of others are refused, too, since a site can let its own name
/// mean that address.
///
/// # Errors
/// `forbidden_origin` or `forbidden_host`.
pub(super) fn check(
    method: &Method,
    headers: &HeaderMap,
    is_loopback: bool,
) -> Result<(), ApiError> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    let host = text(header::HOST);
    if let Some(host) = host
        && is_loopback
        && !is_local(host)
    {
        return Err(forbidden(
            "forbidden_host",
            format!(
                "the request is for the host {host:?}, and a server without keys on the loopback address answers for localhost alone; \
                 start it with --api-key to have other names"
            ),
        ));
    }
    let changes = !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
    let site = text(header::HeaderName::from_static("sec-fetch-site"));
    let is_foreign = match text(header::ORIGIN) {
        Some(origin) => origin.split_once("://").map(|(_, host)| host) != host,
        None => changes && site.is_some_and(|site| matches!(site, "cross-site" | "same-site")),
    };
    if is_foreign {
        return Err(forbidden(
            "forbidden_origin",
            "the request comes from a page of another site; start the server with --api-key to let whoever has the key ask from anywhere",
        ));
    }
    Ok(())
}

/// Whether a host, with or without a port, is this machine.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    let is_loopback = |address: IpAddr| address.is_loopback();
    name == "localhost" || name.ends_with(".localhost") || name.parse().is_ok_and(is_loopback)
}

fn forbidden(code: &'static str, message: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::FORBIDDEN, code, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(method: &Method, given: &[(&'static str, &str)], is_loopback: bool) -> &'static str {
        let mut headers = HeaderMap::new();
        for (name, value) in given {
            headers.insert(*name, value.parse().expect("a header"));
        }
        match check(method, &headers, is_loopback) {
            Ok(()) => "",
            Err(error) => error.code,
        }
    }

    #[test]
    fn pages_of_other_sites_change_nothing() {
        let (get, post) = (&Method::GET, &Method::POST);
        let here = ("host", "127.0.0.1:8080");
        assert_eq!(code(post, &[here], true), "");
        assert_eq!(
            code(post, &[here, ("origin", "http://127.0.0.1:8080")], true),
            ""
        );
        for origin in ["http://evil.example", "http://127.0.0.1:9000", "null"] {
            assert_eq!(
                code(post, &[here, ("origin", origin)], true),
                "forbidden_origin"
            );
            assert_eq!(
                code(get, &[here, ("origin", origin)], false),
                "forbidden_origin"
            );
        }
        for site in ["cross-site", "same-site"] {
            let given = [here, ("sec-fetch-site", site)];
            assert_eq!(code(post, &given, true), "forbidden_origin");
            // A link of another page to this server's.
            assert_eq!(code(get, &given, true), "");
        }
        assert_eq!(
            code(post, &[here, ("sec-fetch-site", "same-origin")], true),
            ""
        );
    }

    #[test]
    fn other_names_are_not_the_loopback_address() {
        let get = &Method::GET;
        for host in [
            "localhost",
            "LOCALHOST:1",
            "a.localhost:80",
            "127.1.2.3",
            "[::1]:8080",
        ] {
            assert_eq!(code(get, &[("host", host)], true), "", "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example:80",
            "10.0.0.1",
            "[::2]",
            "",
        ] {
            assert_eq!(
                code(get, &[("host", host)], true),
                "forbidden_host",
                "{host}"
            );
            assert_eq!(code(get, &[("host", host)], false), "");
        }
        assert_eq!(code(get, &[], true), "");
    }
}
