//! The chain: which filters there are and in which order they run. The order is code, the settings are configuration.
//! Dispatch is static: a route's chain is a struct with one optional field per filter.

use pingora_http::ResponseHeader;

use crate::error::Result;
use crate::exchange::{Arrival, Exchange};
use crate::filter::{Filter, Flow};

macro_rules! chain {
    ($($(#[$doc:meta])* $field:ident: $filter:ty),* $(,)?) => {
        /// The filters of one route, in order.
        #[derive(Debug, Default)]
        pub struct Chain { $($(#[$doc])* pub $field: Option<$filter>,)* }

        impl Chain {
            /// Names of the filters that are on, in order.
            pub fn names(&self) -> Vec<&'static str> {
                let mut names = Vec::new();
                $(if self.$field.is_some() { names.push(<$filter as Filter>::NAME); })*
                names
            }

            /// Runs the head through the chain.
            ///
            /// # Errors
            /// The first refusal.
            pub async fn arrive(&self, head: &http::request::Parts, arrival: &mut Arrival) -> Result<Flow> {
                $(if let Some(filter) = &self.$field {
                    if let answer @ Flow::Answer(_) = filter.arrive(head, arrival).await? { return Ok(answer); }
                })*
                Ok(Flow::Next)
            }

            /// Runs the call through the chain.
            ///
            /// # Errors
            /// The first refusal.
            pub async fn request(&self, exchange: &mut Exchange) -> Result<Flow> {
                $(if let Some(filter) = &self.$field {
                    if let answer @ Flow::Answer(_) = filter.request(exchange).await? { return Ok(answer); }
                })*
                Ok(Flow::Next)
            }

            /// Runs a response header through the chain, last filter first.
            ///
            /// # Errors
            /// The first that a filter reports.
            pub fn response(&self, head: &mut ResponseHeader, exchange: &Exchange) -> Result<()> {
                chain!(@backward self, response, (head, exchange), [?], [$($field)*] []);
                Ok(())
            }

            /// Tells all filters that the request is over, last filter first.
            pub fn logging(&self, exchange: &mut Exchange) {
                chain!(@backward self, logging, (exchange), [], [$($field)*] []);
            }
        }
    };
    (@backward $self:ident, $hook:ident, $args:tt, $try:tt, [$first:ident $($rest:ident)*] [$($done:ident)*]) => {
        chain!(@backward $self, $hook, $args, $try, [$($rest)*] [$first $($done)*])
    };
    (@backward $self:ident, $hook:ident, $args:tt, $try:tt, [] [$($field:ident)*]) => {
        chain!(@each $self, $hook, $args, $try, $($field)*)
    };
    (@each $self:ident, $hook:ident, $args:tt, $try:tt, $($field:ident)*) => {
        $(if let Some(filter) = &$self.$field { chain!(@call filter, $hook, $args, $try); })*
    };
    (@call $filter:ident, $hook:ident, ($($arg:ident),*), [$($try:tt)?]) => { Filter::$hook($filter, $($arg),*)$($try)? };
}

chain! {
    /// Answers preflights before a key is asked for, and marks answers for browsers.
    cors: crate::cors::CorsPolicy,
    /// Who calls; before the body is read, so that a stranger costs nothing.
    auth: crate::auth::Auth,
    /// What may be asked for; before anything is counted, so that a refused call costs no quota.
    guard: crate::guard::Guard,
    /// How much may be used: one reservation for the whole call, before any attempt.
    limit: crate::limit::filter::Limit,
}
