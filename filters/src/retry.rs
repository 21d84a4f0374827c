//! What may follow a failed attempt. Pure: the failure and the target in, a decision out.

mod after;
mod backoff;
mod budget;
mod refusal;
mod rest;

use std::fmt;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de};

use crate::error::GatewayError;
use crate::metrics::Attempted;

pub use after::retry_after;
pub use backoff::backoff;
pub use budget::RetryBudget;
pub use refusal::class_of_refusal;
pub use rest::{Admits, Probe, Rest};

macro_rules! classes {
    ($($(#[$doc:meta])* $variant:ident $name:literal;)*) => {
        /// Classes of failures; a target's `on:` lists those after which it is tried.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Class { $($(#[$doc])* $variant,)* }

        impl Class {
            /// Every class.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];
            const NAMES: &'static [&'static str] = &[$($name,)*];

            /// The word in configuration, metrics and logs.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            fn named(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)* _ => None }
            }
        }

        impl From<Class> for Attempted {
            fn from(class: Class) -> Self {
                match class { $(Class::$variant => Self::$variant,)* }
            }
        }
    };
}

classes! {
    /// No connection, or it broke before an answer.
    Connect "connect";
    /// No answer in time.
    Timeout "timeout";
    /// The upstream said 429.
    RateLimited "429";
    /// The upstream said 5xx, or failed inside a 200.
    ServerError "5xx";
    /// A stream that brought no token in time, or none at all.
    FirstToken "first_token";
    /// The upstream refused our credential.
    Auth "auth";
    /// The prompt is too long for the model.
    ContextLength "context_length";
    /// The provider's content filter refused.
    ContentFilter "content_filter";
}

impl Class {
    /// The classes that lead to the next target unless a target says otherwise.
    pub const DEFAULT: [Self; 6] =
        [Self::Connect, Self::Timeout, Self::RateLimited, Self::ServerError, Self::FirstToken, Self::Auth];
}

impl<'de> Deserialize<'de> for Class {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Class;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "one of {}", Class::NAMES.join(", "))
            }

            fn visit_str<E: de::Error>(self, name: &str) -> std::result::Result<Class, E> {
                Class::named(name).ok_or_else(|| E::unknown_variant(name, Class::NAMES))
            }

            // Written without quotes, 429 is a number.
            fn visit_u64<E: de::Error>(self, number: u64) -> std::result::Result<Class, E> {
                self.visit_str(&number.to_string())
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Class {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Failure".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let names = Self::NAMES.iter().map(|name| serde_json::Value::from(*name));
        let names: Vec<_> = names.chain([serde_json::Value::from(429)]).collect();
        json_schema!({ "description": "A class of failures that sends a call to the next target", "enum": names })
    }
}

/// A failed attempt, before anything of its answer reached the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What went wrong.
    pub class: Class,
    /// When the upstream says it may be asked again.
    pub retry_after: Option<Duration>,
    /// For the log: what happened in words, without bodies or keys.
    pub detail: String,
    /// Whether the node surely did not start on the request.
    pub unprocessed: bool,
    /// The node let a deadline pass without a word: it is not asked again for this call.
    pub silent: bool,
}

impl Failure {
    /// A failure of a class with a word for the log.
    pub fn new(class: Class, detail: impl Into<String>) -> Self {
        Self { class, retry_after: None, detail: detail.into(), unprocessed: false, silent: false }
    }

    /// A failure by a deadline that passed.
    pub fn silent(class: Class, detail: impl Into<String>) -> Self {
        Self { silent: true, ..Self::new(class, detail) }
    }

    /// Whether it speaks against the node, and not only against our credential or the call.
    pub const fn is_of_node(&self) -> bool {
        matches!(self.class, Class::Connect | Class::Timeout | Class::ServerError | Class::FirstToken)
    }

    /// What the client gets when this was the last attempt.
    pub fn into_error(self) -> GatewayError {
        match self.class {
            Class::Connect => GatewayError::UpstreamUnreachable,
            Class::Timeout | Class::FirstToken => GatewayError::UpstreamTimeout,
            Class::RateLimited => GatewayError::UpstreamRateLimited { retry_after: self.retry_after },
            Class::ServerError | Class::Auth | Class::ContextLength | Class::ContentFilter => {
                GatewayError::UpstreamError
            }
        }
    }
}

/// The class of an upstream's status, if it is a failure of the upstream rather than the client's business.
pub const fn class_of_status(status: u16, ours: bool) -> Option<Class> {
    match status {
        429 => Some(Class::RateLimited),
        // The client has no part in our credentials: their refusal is never its business.
        401 | 403 if ours => Some(Class::Auth),
        408 | 500..=599 => Some(Class::ServerError),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_own_mistake_is_not_a_failure() {
        for status in [400, 404, 413, 422, 200, 302] {
            assert_eq!(class_of_status(status, true), None, "{status}");
        }
        assert_eq!(class_of_status(401, false), None);
        assert_eq!(class_of_status(401, true), Some(Class::Auth));
        assert_eq!(class_of_status(503, true), Some(Class::ServerError));
    }
}
