//! What is known of a guest now: published by its supervisor, shown by pages, API and command line.

use super::{engine_client::EngineClient, lifecycle::State};
use crate::wire::AgentFacts;

/// What is known of a guest now; a copy for everybody who shows it.
#[derive(Clone, Debug)]
pub struct Status {
    pub state: State,
    /// Why it failed or was paused, or what it waits for.
    pub reason: Option<String>,
    /// Since when it has this state; unknown for what was found at the server's start.
    pub since_ms: Option<i64>,
    pub started_ms: Option<i64>,
    pub engine: Option<Engine>,
    pub addresses: Vec<String>,
    /// Whether a medium is in the drive of the running guest.
    pub cd_present: Option<bool>,
    /// Its kernel has said that it crashed.
    pub crashed: bool,
    /// What it shall give back of its memory while it runs.
    pub balloon_bytes: u64,
    /// What its agent says, while there is one.
    pub agent: Option<AgentFacts>,
    /// To ask the running engine; nothing while it is not connected.
    pub client: Option<EngineClient>,
}

impl Status {
    /// Of a guest that nobody has looked at yet.
    pub(super) fn unknown() -> Status {
        Status {
            state: State::Stopped,
            reason: None,
            since_ms: None,
            started_ms: None,
            engine: None,
            addresses: Vec::new(),
            cd_present: None,
            crashed: false,
            balloon_bytes: 0,
            agent: None,
            client: None,
        }
    }

    /// What it keeps of so much memory; nothing while that is all of it.
    pub fn memory_now(&self, memory_bytes: u64) -> Option<u64> {
        (self.balloon_bytes > 0).then(|| memory_bytes.saturating_sub(self.balloon_bytes))
    }

    /// What a person should know beside the state.
    pub fn words(&self) -> Option<String> {
        let crash = "The guest's kernel has crashed. Its consoles show what it said last; reset it to go on.";
        self.reason.clone().or_else(|| self.crashed.then(|| crash.to_owned()))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engine {
    pub pid: u32,
    pub version: String,
}
