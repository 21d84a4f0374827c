//! What a call consumed, normalised once for every dialect.

/// Where the figures of a [`Usage`] come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum UsageSource {
    /// The upstream said so.
    Upstream,
    /// We counted the text that we relayed; the prompt is an estimate.
    Counted,
    /// Nothing better than the estimate made at admission.
    #[default]
    Estimated,
}

impl UsageSource {
    /// The word used in the access log.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Upstream => "upstream",
            Self::Counted => "counted",
            Self::Estimated => "estimated",
        }
    }
}

/// Tokens of one call. `input` includes `cached_input`; `output` includes reasoning tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Prompt tokens, cached ones included.
    pub input: u64,
    /// Prompt tokens that the upstream served from its prefix cache.
    pub cached_input: u64,
    /// Completion tokens, reasoning included.
    pub output: u64,
    /// Where the figures come from.
    pub source: UsageSource,
}

impl Usage {
    /// Input and output together: what token limits count. Saturates.
    pub const fn total(&self) -> u64 {
        self.input.saturating_add(self.output)
    }
}
