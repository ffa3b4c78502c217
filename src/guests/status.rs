//! What is known of a guest now: published by its supervisor, shown by pages, API and command line.

use super::{engine_client::EngineClient, lifecycle::State};
use crate::{
    types::Id,
    wire::{AgentFacts, Plugged, PluggedDevice},
};

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
    /// What can be taken out while it runs; nothing of an engine that cannot do that.
    pub plugged: Option<Vec<Plugged>>,
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
            plugged: None,
            agent: None,
            client: None,
        }
    }

    /// What it keeps of so much memory; nothing while that is all of it.
    pub fn memory_now(&self, memory_bytes: u64) -> Option<u64> {
        (self.balloon_bytes > 0).then(|| memory_bytes.saturating_sub(self.balloon_bytes))
    }

    /// Whether a disk is where it could be taken out.
    pub fn has_plugged(&self, disk: &Id) -> bool {
        let is_it = |plugged: &Plugged| matches!(&plugged.device, PluggedDevice::Disk(id) if id == disk);
        self.plugged.iter().flatten().any(is_it)
    }

    /// Whether the guest has a network card, as far as its engine says.
    pub fn has_card(&self) -> bool {
        self.plugged.iter().flatten().any(Plugged::is_card)
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
