//! API keys.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use axum::http::{HeaderMap, StatusCode, header};
use subtle::ConstantTimeEq as _;

use crate::error::ApiError;
use crate::sync::lock;

/// What a key allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Access {
    /// To ask for answers.
    Use,
    /// To change what is served, too.
    Admin,
}

/// The keys of a server. Without any, everything is allowed to everybody who can reach it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Keys {
    all: Vec<String>,
    admin: Option<String>,
    /// Whether the server listens on the loopback address.
    is_loopback: bool,
    /// Requests under way, by the place of the key.
    under_way: Arc<Mutex<HashMap<usize, usize>>>,
}

/// Whose request it is.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    access: Access,
    place: usize,
}

/// A request of a caller, until it is dropped.
pub(crate) struct Turn {
    under_way: Arc<Mutex<HashMap<usize, usize>>>,
    place: usize,
}

impl Keys {
    pub(crate) fn new(keys: Vec<String>, admin: Option<String>, is_loopback: bool) -> Self {
        Self {
            all: keys,
            admin,
            is_loopback,
            under_way: Arc::default(),
        }
    }

    /// Where no key is needed to ask, whether that is on the loopback address alone.
    pub(crate) fn open_on(&self) -> Option<bool> {
        self.all.is_empty().then_some(self.is_loopback)
    }

    /// Who calls.
    pub(crate) fn caller(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let given = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, key)| key.trim());
        if let Some(admin) = &self.admin
            && given.is_some_and(|given| is_same(given, admin))
        {
            let place = usize::MAX;
            return Ok(Caller {
                access: Access::Admin,
                place,
            });
        }
        // Where there is no admin key, whoever may ask may change.
        let access = if self.admin.is_some() {
            Access::Use
        } else {
            Access::Admin
        };
        if self.all.is_empty() {
            return Ok(Caller { access, place: 0 });
        }
        let Some(given) = given else {
            return Err(ApiError::new(
                StatusCode::UNAUTHORIZED,
                "missing_api_key",
                "give the key in the header Authorization: Bearer KEY",
            ));
        };
        // Every key is compared, so that the time tells nothing of which one was near.
        let mut place = None;
        for (at, key) in self.all.iter().enumerate() {
            if is_same(given, key) {
                place = Some(at);
            }
        }
        match place {
            Some(place) => Ok(Caller { access, place }),
            None => Err(ApiError::new(
                StatusCode::UNAUTHORIZED,
                "invalid_api_key",
                "the API key is not one of this server's",
            )),
        }
    }

    /// Counts a request of a caller, of which `most` may be under way at once; 0: any number.
    pub(crate) fn enter(&self, caller: &Caller, most: usize) -> Result<Turn, ApiError> {
        let mut under_way = lock(&self.under_way);
        let count = under_way.entry(caller.place).or_default();
        if most > 0 && *count >= most {
            return Err(ApiError::busy(
                "rate_limit_exceeded",
                format!("{count} requests of this key are under way, and {most} may be"),
                1,
            ));
        }
        *count += 1;
        Ok(Turn {
            under_way: Arc::clone(&self.under_way),
            place: caller.place,
        })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut under_way = lock(&self.under_way);
        if let Some(count) = under_way.get_mut(&self.place) {
            *count = count.saturating_sub(1);
        }
    }
}

impl Caller {
    /// Refuses whoever may only ask for answers.
    pub(crate) fn require_admin(&self) -> Result<(), ApiError> {
        if self.access == Access::Admin {
            return Ok(());
        }
        Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "admin_key_required",
            "this changes what is served, and needs the admin key",
        ))
    }
}

/// Compares in a time that depends on the lengths alone.
fn is_same(given: &str, key: &str) -> bool {
    given.as_bytes().ct_eq(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(keys: &Keys, given: Option<&str>) -> Result<Access, &'static str> {
        let mut headers = HeaderMap::new();
        if let Some(given) = given {
            let value = format!("Bearer {given}").parse().expect("a header");
            headers.insert(header::AUTHORIZATION, value);
        }
        let caller = keys.caller(&headers);
        caller
            .map(|caller| caller.access)
            .map_err(|error| error.code)
    }

    #[test]
    fn keys_open_what_they_should() {
        let none = Keys::new(vec![], None, true);
        assert_eq!(access(&none, None), Ok(Access::Admin));
        let both = Keys::new(vec!["a".into(), "b".into()], Some("root".into()), true);
        assert_eq!(access(&both, Some("b")), Ok(Access::Use));
        assert_eq!(access(&both, Some("root")), Ok(Access::Admin));
        assert_eq!(access(&both, Some("c")), Err("invalid_api_key"));
        assert_eq!(access(&both, None), Err("missing_api_key"));
        let admin = Keys::new(vec![], Some("root".into()), true);
        assert_eq!(access(&admin, None), Ok(Access::Use));
        let plain = Keys::new(vec!["a".into()], None, true);
        assert_eq!(access(&plain, Some("a")), Ok(Access::Admin));
    }

    #[test]
    fn so_many_requests_of_a_key_at_once() {
        let keys = Keys::new(vec!["a".into()], None, true);
        let caller = Caller {
            access: Access::Use,
            place: 0,
        };
        let first = keys.enter(&caller, 1).expect("the first");
        assert_eq!(
            keys.enter(&caller, 1).err().map(|e| e.code),
            Some("rate_limit_exceeded")
        );
        drop(first);
        assert!(keys.enter(&caller, 1).is_ok());
    }
}
