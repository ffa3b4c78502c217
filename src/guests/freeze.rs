//! Holding a running guest's file systems still, so that a copy of its disks from outside has everything that was written.

use std::time::Duration;

use super::{Guests, no_engine};
use crate::{
    error::{Error, Result},
    types::Id,
    wire::EngineAction,
};

/// The guest writes out what it has not yet.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(60);
const THAW_TIMEOUT: Duration = Duration::from_secs(10);
/// Whoever forgets a guest finds it going on after this.
pub const FROZEN_S_MAX: u32 = 600;
pub const FROZEN_S: u32 = 60;

impl Guests {
    /// Has the guest's agent freeze its file systems for at most `longest_s` seconds; how many there are.
    ///
    /// Errors: `Invalid` at `seconds`; `Conflict` when the guest does not run, or with what engine and agent say.
    pub async fn freeze(&self, id: &Id, longest_s: u32) -> Result<u64> {
        if !(1..=FROZEN_S_MAX).contains(&longest_s) {
            return Err(Error::invalid("seconds", format!("File systems are frozen for 1 to {FROZEN_S_MAX} seconds.")));
        }
        self.ask_agent(id, EngineAction::Freeze { longest_s }, FREEZE_TIMEOUT).await
    }

    /// Lets them go on.
    ///
    /// Errors: as `freeze`.
    pub async fn thaw(&self, id: &Id) -> Result<u64> {
        self.ask_agent(id, EngineAction::Thaw, THAW_TIMEOUT).await
    }

    async fn ask_agent(&self, id: &Id, action: EngineAction, longest: Duration) -> Result<u64> {
        let status = self.supervisor_of(id)?.status();
        if !status.state.is_live() {
            return Err(Error::conflict("The guest does not run."));
        }
        let count = status.client.ok_or_else(no_engine)?.call_within(longest, action, None).await?;
        serde_json::from_slice(&count).map_err(|error| Error::internal("The engine's answer cannot be read.", error))
    }
}
