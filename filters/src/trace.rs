//! Who a request is, for people and for tracing: its request id and its W3C trace context.
//!
//! Both are kept where the client sent a sane one and made where not. The randomness is the caller's, so tests are exact.
//! `tracestate` is not touched by this module: it is passed on with a kept trace, and dropped with one that was refused.

use std::fmt;

use http::HeaderValue;
use smallvec::SmallVec;

/// The longest request id that is taken from a client, in bytes.
pub const REQUEST_ID_MAX: usize = 128;
/// What our own request ids begin with; 32 hexadecimal digits follow.
pub const REQUEST_ID_PREFIX: &str = "req_";

const HEX: &[u8; 16] = b"0123456789abcdef";

/// The id under which a request is found in the answer's `x-request-id`, in the access log and at the nodes.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RequestId(SmallVec<[u8; 36]>);

/// The id of a request: the client's if it is sane, else our own, `req_` and the 32 digits of `random`.
///
/// Sane is 1 to 128 bytes of letters, digits and `._:-/+=@`: nothing that could end a header, a log line or a label.
pub fn request_id(client: Option<&[u8]>, random: u128) -> RequestId {
    match client {
        Some(id) if sane(id) => RequestId(SmallVec::from_slice(id)),
        Some(_) | None => {
            let mut id = SmallVec::from_slice(REQUEST_ID_PREFIX.as_bytes());
            id.extend_from_slice(&hex::<32>(random));
            RequestId(id)
        }
    }
}

fn sane(id: &[u8]) -> bool {
    (1..=REQUEST_ID_MAX).contains(&id.len())
        && id.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._:-/+=@".contains(byte))
}

impl RequestId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        text(&self.0)
    }

    /// The id as the value of `x-request-id`.
    pub fn header(&self) -> HeaderValue {
        HeaderValue::from_bytes(&self.0).unwrap_or_else(|_| HeaderValue::from_static(""))
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A place in a trace, as the header `traceparent` tells it (W3C Trace Context, level 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceContext {
    // Kept as the hexadecimal digits that go on the wire and into the log.
    trace: [u8; 32],
    span: [u8; 16],
    sampled: bool,
}

impl TraceContext {
    /// Reads a `traceparent`. `None` if it is not exactly what version 00 allows: lower-case digits, no id that is all zero.
    pub fn parse(header: &[u8]) -> Option<Self> {
        let (version, rest) = digits::<2>(header)?;
        let (trace, rest) = digits::<32>(rest.strip_prefix(b"-")?)?;
        let (span, rest) = digits::<16>(rest.strip_prefix(b"-")?)?;
        let (flags, rest) = digits::<2>(rest.strip_prefix(b"-")?)?;
        let zero = |digits: &[u8]| digits.iter().all(|&digit| digit == b'0');
        if version != *b"00" || !rest.is_empty() || zero(&trace) || zero(&span) {
            return None;
        }
        let [_, low] = flags;
        Some(Self { trace, span, sampled: value(low) & 1 == 1 })
    }

    /// A trace that begins here, not sampled. A zero, which no id may be, becomes 1.
    pub fn begin(trace: u128, span: u64) -> Self {
        Self { trace: hex::<32>(trace.max(1)), span: span_id(span), sampled: false }
    }

    /// The client's trace if it sent a sane one, else a new one; in both cases with a span of our own, as the nodes shall see it.
    pub fn of_request(client: Option<&[u8]>, trace: u128, span: u64) -> Self {
        client.and_then(Self::parse).map_or_else(|| Self::begin(trace, span), |parent| parent.child(span))
    }

    /// The same trace with another span: one attempt.
    #[must_use]
    pub fn child(self, span: u64) -> Self {
        Self { span: span_id(span), ..self }
    }

    /// The trace's id, 32 digits, for the log.
    pub fn trace_id(&self) -> &str {
        text(&self.trace)
    }

    /// The span's id, 16 digits.
    pub fn span_id(&self) -> &str {
        text(&self.span)
    }

    /// Whether the client asked for this trace to be recorded.
    pub const fn sampled(&self) -> bool {
        self.sampled
    }

    /// The value of `traceparent` toward a node.
    pub fn header(&self) -> HeaderValue {
        let mut out: SmallVec<[u8; 64]> = SmallVec::new();
        out.extend_from_slice(b"00-");
        out.extend_from_slice(&self.trace);
        out.push(b'-');
        out.extend_from_slice(&self.span);
        out.extend_from_slice(if self.sampled { b"-01" } else { b"-00" });
        HeaderValue::from_bytes(&out).unwrap_or_else(|_| HeaderValue::from_static(""))
    }
}

fn span_id(span: u64) -> [u8; 16] {
    hex::<16>(u128::from(span.max(1)))
}

/// The last `N` hexadecimal digits of a number.
fn hex<const N: usize>(number: u128) -> [u8; N] {
    let mut out = [b'0'; N];
    let mut rest = number;
    for digit in out.iter_mut().rev() {
        *digit = HEX.get((rest & 15) as usize).copied().unwrap_or(b'0');
        rest >>= 4;
    }
    out
}

/// `N` lower-case hexadecimal digits and what follows them.
fn digits<const N: usize>(text: &[u8]) -> Option<([u8; N], &[u8])> {
    let (digits, rest) = text.split_first_chunk::<N>()?;
    digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')).then_some((*digits, rest))
}

const fn value(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        _ => digit.wrapping_sub(b'a').wrapping_add(10),
    }
}

/// What was checked to be ASCII, as text.
fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &[u8] = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_sane_request_id_of_the_client_is_kept() {
        for id in ["1", "req-42", "a.b:c/d+e=f@g_h", &"x".repeat(128)] {
            assert_eq!(request_id(Some(id.as_bytes()), 7).as_str(), id);
        }
    }

    #[test]
    fn any_other_request_id_gives_way_to_our_own() {
        let ours = "req_0000000000000000000000000000002a";
        let long = [b'x'; 129];
        for id in [None, Some(&b""[..]), Some(b"a b"), Some(b"a\r\nb: c"), Some(b"\xff"), Some(b"a\"b"), Some(&long)] {
            assert_eq!(request_id(id, 42).as_str(), ours, "{id:?}");
        }
        assert_eq!(request_id(None, u128::MAX).header(), format!("req_{}", "f".repeat(32)));
    }

    #[test]
    fn a_trace_that_the_client_began_goes_on_with_our_span() {
        let ours = TraceContext::of_request(Some(GOOD), 1, 0xabc);
        assert_eq!(ours.header(), "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000abc-01");
        assert_eq!(ours.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(ours.sampled());
    }

    #[test]
    fn each_attempt_has_a_span_of_its_own_in_the_same_trace() {
        let call = TraceContext::begin(5, 6);
        let attempt = call.child(7);
        assert_eq!(attempt.trace_id(), call.trace_id());
        assert_eq!((call.span_id(), attempt.span_id()), ("0000000000000006", "0000000000000007"));
    }

    #[test]
    fn what_the_standard_forbids_begins_a_new_trace() {
        let bad: &[&[u8]] = &[
            b"",
            b"00",
            b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 ",
            b"01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            b"ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            b"00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            b"00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            b"00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            b"00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
            b"00_4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",
        ];
        for header in bad {
            assert_eq!(TraceContext::parse(header), None, "{}", String::from_utf8_lossy(header));
            assert_eq!(TraceContext::of_request(Some(header), 9, 1).trace_id(), format!("{:032x}", 9));
        }
    }

    #[test]
    fn only_the_sampled_flag_is_understood() {
        for (flags, sampled) in [("00", false), ("01", true), ("02", false), ("ff", true), ("fe", false)] {
            let header = format!("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-{flags}");
            assert_eq!(TraceContext::parse(header.as_bytes()).unwrap().sampled(), sampled, "{flags}");
        }
    }

    #[test]
    fn a_zero_from_the_dice_is_never_an_id() {
        let made = TraceContext::begin(0, 0);
        assert_eq!(TraceContext::parse(made.header().as_bytes()), Some(made));
    }
}
