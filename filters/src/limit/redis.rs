//! The counters of many gateways: scripts that Redis runs, each one step for all scopes of a call.
//!
//! What a script decides is what [`MemoryStore`](super::memory::MemoryStore) decides, to the last figure; a test of random
//! operations holds the two to each other. The clock is the server's own. Here are the commands over one connection;
//! `link` keeps that connection, `shared` knows what to do without it.

mod link;
#[cfg(test)]
mod server;
mod share;
pub(super) mod shared;
mod spent;
#[cfg(test)]
mod tests;
mod wire;

pub(super) use wire::Wire;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redis::aio::MultiplexedConnection;
use redis::{Cmd, ErrorKind, RedisError, RedisResult, ServerErrorKind, Value};
use smallvec::SmallVec;

use super::bucket::{Draw, Drawn, Grant};
use super::clock::Instant64;
use super::memory::{LeaseId, Refusing, Renewed, Settled, TOMBSTONE};
use super::rule::{Plan, ScopeId};
use super::standing::{Row, Standings};
use super::window::{Reading, Verdict};
use crate::error::Refusal;

/// Every key of the ledger: one tag, so that a cluster keeps them on one node.
pub(super) const PREFIX: &str = "tg:{tg}:";
const LEASES: &str = "tg:{tg}:l";
const EXPIRY: &str = "tg:{tg}:z";
const GATEWAYS: &str = "tg:{tg}:gw";
/// Leases that one sweep charges at most; the next one goes on.
const SWEPT: u32 = 100;
/// A gateway that was silent for so long is not counted any more.
const ALIVE_MICROS: u64 = 5_000_000;
/// How long a push is remembered, so that sending it twice counts once.
const MARKED_MS: u64 = 3_600_000;
/// Numbers in a script are doubles: from here on they would be rounded.
pub(super) const MOST: u64 = (1 << 53) - 1;

const LIB: &str = include_str!("redis/lib.lua");

/// A script, known to the server by the hash of its text.
struct Script {
    code: String,
    sha: String,
}

impl Script {
    fn new(body: &str, lib: &str) -> Self {
        let code = format!("{lib}{body}");
        let sha = redis::Script::new(&code).get_hash().to_owned();
        Self { code, sha }
    }
}

/// What became of a call.
pub(super) enum Decided {
    /// Every rule took it.
    Admitted(Standings),
    /// A rule refused it, and nothing was written.
    Refused(Refusal, Standings),
    /// Its lease is there already.
    Known,
    /// It reached the server so late that nobody waits any more; nothing was written.
    Late,
}

/// A call to decide.
pub(super) struct Asked<'a> {
    pub(super) id: LeaseId,
    pub(super) plan: &'a Plan,
    /// What to reserve.
    pub(super) tokens: u64,
    /// What to charge if nobody settles it.
    pub(super) charge: u64,
    /// It was admitted already: count it whatever the rules say.
    pub(super) admitted: bool,
    /// By the server's clock: after it nobody waits for the answer; of a call that was admitted already, when that was. 0 is
    /// not known.
    pub(super) at: u64,
}

/// A call that ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ended {
    pub(super) id: LeaseId,
    /// What it used; `None` if it never was a call, and the request is given back too.
    pub(super) tokens: Option<u64>,
    /// The life of the store's data in which it was admitted.
    pub(super) epoch: u64,
}

/// What calls used that were admitted at about one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Amount {
    /// The last of their admissions; by the server's clock, 0 is not known.
    pub(super) at: u64,
    pub(super) requests: u64,
    pub(super) tokens: u64,
}

/// What the server says of itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct Beat {
    pub(super) epoch: u64,
    pub(super) gateways: u64,
    /// How many of them come before this one.
    pub(super) before: u64,
    /// Its time in microseconds.
    pub(super) now: u64,
}

/// The scripts, and the name under which this gateway's leases stand.
pub(super) struct Commands {
    gateway: u64,
    reserve: Script,
    settle: Script,
    renew: Script,
    sweep: Script,
    query: Script,
    reset: Script,
    spend: Script,
    beat: Script,
    draw: Script,
    /// The time that the scripts are told instead of looking it up.
    #[cfg(test)]
    pub(super) now: Option<std::sync::atomic::AtomicU64>,
}

impl Commands {
    /// The commands of the gateway of this number, which no other has.
    pub(super) fn new(gateway: u64) -> Self {
        Self::with(gateway, LIB)
    }

    fn with(gateway: u64, lib: &str) -> Self {
        Self {
            gateway,
            reserve: Script::new(include_str!("redis/reserve.lua"), lib),
            settle: Script::new(include_str!("redis/settle.lua"), lib),
            renew: Script::new(include_str!("redis/renew.lua"), lib),
            sweep: Script::new(include_str!("redis/sweep.lua"), lib),
            query: Script::new(include_str!("redis/query.lua"), lib),
            reset: Script::new(include_str!("redis/reset.lua"), lib),
            spend: Script::new(include_str!("redis/spend.lua"), lib),
            beat: Script::new(include_str!("redis/beat.lua"), lib),
            draw: Script::new(include_str!("redis/draw.lua"), lib),
            #[cfg(test)]
            now: None,
        }
    }

    fn lease(&self, id: LeaseId) -> String {
        format!("{:x}.{:x}", self.gateway, id.0)
    }

    fn rules(&self, command: &mut Cmd, plan: &Plan) {
        for set in plan.sets() {
            command.arg(&*wire::of(set).rules(set.zone(), || self.second()));
        }
    }

    /// The second since the epoch, near that of the server: it only says which changes of a zone are sent.
    fn second(&self) -> i64 {
        #[cfg(test)]
        if let Some(now) = &self.now {
            return i64::try_from(now.load(std::sync::atomic::Ordering::Acquire) / 1_000_000).unwrap();
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
    }

    async fn run(
        &self,
        connection: &MultiplexedConnection,
        script: &Script,
        fill: impl Fn(&mut Cmd),
    ) -> RedisResult<SmallVec<[i64; 48]>> {
        let mut connection = connection.clone();
        let command = |name: &str, text: &str| {
            let mut command = redis::cmd(name);
            command.arg(text);
            fill(&mut command);
            #[cfg(test)]
            if let Some(now) = &self.now {
                command.arg(now.load(std::sync::atomic::Ordering::Acquire));
            }
            command
        };
        let reply: Value = match command("EVALSHA", &script.sha).query_async(&mut connection).await {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                command("EVAL", &script.code).query_async(&mut connection).await?
            }
            reply => reply?,
        };
        wire::integers(reply)
    }

    /// Decides a call; the server does it in one step.
    pub(super) async fn reserve(&self, connection: &MultiplexedConnection, asked: &Asked<'_>) -> RedisResult<Decided> {
        let plan = asked.plan;
        let reply = self.run(connection, &self.reserve, |command| {
            keys(command, plan);
            command.arg(self.lease(asked.id)).arg(LEASE_MICROS).arg(asked.tokens.min(MOST));
            command.arg(asked.charge.min(MOST)).arg(u8::from(asked.admitted)).arg(asked.at);
            self.rules(command, plan);
        });
        let reply = reply.await?;
        let mut numbers = reply.iter().copied();
        let (Some(outcome), Some(binding), Some(wait)) = (numbers.next(), numbers.next(), numbers.next()) else {
            return Err(unexpected());
        };
        if outcome == 2 {
            return Ok(Decided::Known);
        }
        if outcome == 3 {
            return Ok(Decided::Late);
        }
        let mut rows = wire::rows(plan, &mut numbers).ok_or_else(unexpected)?;
        for place in numbers {
            let row = usize::try_from(place).ok().and_then(|place| rows.get_mut(place));
            row.ok_or_else(unexpected)?.over = true;
        }
        let standings = Standings::new(plan.clone(), rows);
        if outcome == 1 {
            return Ok(Decided::Admitted(standings));
        }
        let ordinal = usize::try_from(binding).map_err(|_| unexpected())?;
        let verdict = u64::try_from(wait).map_or(Verdict::Never, Verdict::Wait);
        let (set, rule) = plan.rules().nth(ordinal).ok_or_else(unexpected)?;
        let refusal = Refusing { ordinal, set, rule, verdict }.refusal();
        Ok(Decided::Refused(refusal, standings.bound_by(ordinal)))
    }

    /// Charges calls that ended; also says how many tokens no period took.
    pub(super) async fn settle(
        &self,
        connection: &MultiplexedConnection,
        ended: &[Ended],
    ) -> RedisResult<(Vec<Settled>, u64)> {
        let reply = self.run(connection, &self.settle, |command| {
            keys(command, &Plan::new());
            for one in ended {
                let tokens = one.tokens.map_or(-1, |tokens| tokens.min(MOST).cast_signed());
                command.arg(self.lease(one.id)).arg(tokens).arg(one.epoch);
            }
        });
        let reply = reply.await?;
        let Some((lost, fates)) = reply.split_last().filter(|(_, fates)| fates.len() == ended.len()) else {
            return Err(unexpected());
        };
        let fate = |number: &i64| match number {
            1 => Settled::Done,
            0 => Settled::Duplicate,
            _ => Settled::Lost,
        };
        Ok((fates.iter().map(fate).collect(), u64::try_from(*lost).unwrap_or(0)))
    }

    /// Tells that calls live, and what they used.
    pub(super) async fn renew(
        &self,
        connection: &MultiplexedConnection,
        live: &[(LeaseId, u64)],
    ) -> RedisResult<Vec<Renewed>> {
        let reply = self.run(connection, &self.renew, |command| {
            keys(command, &Plan::new());
            command.arg(LEASE_MICROS);
            for (id, progress) in live {
                command.arg(self.lease(*id)).arg((*progress).min(MOST));
            }
        });
        let renewed = |number: &i64| match number {
            1 => Renewed::Done,
            2 => Renewed::Expired,
            _ => Renewed::Unknown,
        };
        let reply = reply.await?;
        if reply.len() == live.len() { Ok(reply.iter().map(renewed).collect()) } else { Err(unexpected()) }
    }

    /// Charges leases that expired, of this gateway and of others. How many, and how many tokens no period took.
    pub(super) async fn sweep(&self, connection: &MultiplexedConnection) -> RedisResult<(u64, u64)> {
        let reply = self.run(connection, &self.sweep, |command| {
            keys(command, &Plan::new());
            command.arg(Instant64(0).plus(TOMBSTONE).micros()).arg(SWEPT);
        });
        match reply.await?.as_slice() {
            [charged, lost] => Ok((u64::try_from(*charged).unwrap_or(0), u64::try_from(*lost).unwrap_or(0))),
            _ => Err(unexpected()),
        }
    }

    /// How the rules of a plan stand.
    pub(super) async fn query(&self, connection: &MultiplexedConnection, plan: &Plan) -> RedisResult<Standings> {
        let reply = self.run(connection, &self.query, |command| {
            keys(command, plan);
            self.rules(command, plan);
        });
        let rows = wire::rows(plan, &mut reply.await?.into_iter()).ok_or_else(unexpected)?;
        Ok(Standings::new(plan.clone(), rows))
    }

    /// Forgets what a scope used.
    pub(super) async fn reset(&self, connection: &MultiplexedConnection, id: &ScopeId) -> RedisResult<()> {
        let reply = self.run(connection, &self.reset, |command| {
            command.arg(3).arg(LEASES).arg(EXPIRY).arg(wire::key(id)).arg(wire::kinds());
        });
        reply.await.map(|_| ())
    }

    /// Charges calls that were admitted without the store and are over, each amount to its time; sending the same `mark`
    /// again changes nothing. Gives the tokens that no period took.
    pub(super) async fn spend(
        &self,
        connection: &MultiplexedConnection,
        mark: u64,
        plan: &Plan,
        amounts: &[Amount],
    ) -> RedisResult<u64> {
        let reply = self.run(connection, &self.spend, |command| {
            keys(command, plan);
            command.arg(format!("{PREFIX}once:{:x}.{mark:x}", self.gateway)).arg(MARKED_MS).arg(amounts.len());
            for Amount { at, requests, tokens } in amounts {
                command.arg(*at).arg((*requests).min(MOST)).arg((*tokens).min(MOST));
            }
            self.rules(command, plan);
        });
        match reply.await?.as_slice() {
            [_, lost] => Ok(u64::try_from(*lost).unwrap_or(0)),
            _ => Err(unexpected()),
        }
    }

    /// Draws from what the provider of an upstream grants; also gives the levels that are left.
    pub(super) async fn draw(
        &self,
        connection: &MultiplexedConnection,
        upstream: &str,
        grant: Grant,
        draw: &Draw,
    ) -> RedisResult<(Drawn, [i64; 2])> {
        let [requests, tokens] = grant.lanes();
        let reply = self.run(connection, &self.draw, |command| {
            command.arg(3).arg(LEASES).arg(EXPIRY).arg(format!("{PREFIX}b:{upstream}"));
            for (lane, asked, back) in
                [(requests, draw.requests, draw.back_requests), (tokens, draw.tokens, draw.back_tokens)]
            {
                let most = Grant::MOST.cast_signed();
                command.arg(lane.grant).arg(lane.spread).arg(asked.min(Grant::MOST)).arg(back.clamp(-most, most));
            }
            command.arg(u64::try_from(draw.wait.as_millis()).unwrap_or(MOST).min(MOST));
        });
        match reply.await?.as_slice() {
            [granted, delay, requests, tokens] => {
                let delay = Duration::from_millis(u64::try_from(*delay).unwrap_or(0));
                Ok((Drawn { granted: *granted == 1, delay }, [*requests, *tokens]))
            }
            _ => Err(unexpected()),
        }
    }

    /// Tells that this gateway lives, and learns how many do. Fails where the store takes no writes.
    pub(super) async fn beat(&self, connection: &MultiplexedConnection, epoch: u64) -> RedisResult<Beat> {
        let reply = self.run(connection, &self.beat, |command| {
            command.arg(3).arg(LEASES).arg(EXPIRY).arg(GATEWAYS);
            command.arg(format!("{:x}", self.gateway)).arg(ALIVE_MICROS).arg(epoch);
        });
        let reply = reply.await?;
        let number = |at: usize| reply.get(at).and_then(|number| u64::try_from(*number).ok()).ok_or_else(unexpected);
        Ok(Beat { epoch: number(0)?, gateways: number(1)?, now: number(2)?, before: number(3)? })
    }
}

/// A lease that was not renewed for so long is charged and its slots are freed. With the sweep of a second, a killed
/// gateway's slots are free within a minute.
const LEASE_MICROS: u64 = 55_000_000;

fn keys(command: &mut Cmd, plan: &Plan) {
    command.arg(2 + plan.sets().len()).arg(LEASES).arg(EXPIRY);
    for set in plan.sets() {
        command.arg(wire::of(set).key());
    }
}

fn unexpected() -> RedisError {
    RedisError::from((ErrorKind::UnexpectedReturnType, "a script answered something else than it does"))
}
