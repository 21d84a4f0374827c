//! `auth:` — how callers are recognised.

use schemars::JsonSchema;
use serde::Deserialize;
use tollgate_filters::auth::Source;

/// How callers are recognised.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Auth {
    /// Where a key may be presented, in this order. Default: bearer, x-api-key, api-key. `query` must be asked for.
    pub sources: Vec<Source>,
    /// Also look keys up in Redis; needs `store.redis`. Default false.
    pub redis_keys: bool,
    /// Issuers whose JWTs are accepted in place of a key.
    pub jwt: Vec<Jwt>,
}

impl Default for Auth {
    fn default() -> Self {
        Self { sources: vec![Source::Bearer, Source::XApiKey, Source::ApiKey], redis_keys: false, jwt: Vec::new() }
    }
}

/// One issuer of JWTs.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Jwt {
    /// The `iss` claim, to the letter.
    pub issuer: String,
    /// The `aud` claim must hold this.
    pub audience: String,
    /// Signature algorithms that are accepted.
    pub algorithms: Vec<Algorithm>,
    /// The issuer's public keys.
    pub jwks: Jwks,
    /// Claim that names the caller. Default `sub`.
    #[serde(default = "sub")]
    pub id_claim: String,
    /// Claim that names the tier. Default: none, `tier` below holds for all.
    #[serde(default)]
    #[expect(dead_code, reason = "JWTs are not accepted yet, which the check says")]
    pub tier_claim: Option<String>,
    /// Tier of callers whose token names none.
    #[serde(default)]
    pub tier: Option<String>,
}

fn sub() -> String {
    "sub".to_owned()
}

/// Public keys of an issuer.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Jwks {
    /// Path of a JWKS file.
    pub file: std::path::PathBuf,
}

/// A signature algorithm with a public key. `none` and shared-secret ones are not on the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[allow(missing_docs, reason = "the names are those of RFC 7518")]
pub(crate) enum Algorithm {
    RS256,
    RS384,
    RS512,
    PS256,
    PS384,
    PS512,
    ES256,
    ES384,
    EdDSA,
}
