//! The HBA's saved state.
//!
//! A command that waits for the host is not saved: its slot is still set in PxCI, so the next life of the HBA takes it again.
//! Which medium is in the tray is the machine's business; what the guest knows of it is saved here.

use serde::{Deserialize, Serialize};

use super::{
    super::saved::{BadState, SaveState, State},
    Ahci,
    hba::PORTS,
};

const KIND: &str = "ahci";

#[derive(Serialize, Deserialize)]
pub(super) struct V1 {
    pub(super) hba: HbaV1,
    /// As many as there are ports; those without drive have none.
    pub(super) drives: [Option<DriveV1>; PORTS],
}

#[derive(Serialize, Deserialize)]
pub(super) struct HbaV1 {
    pub(super) interrupts: bool,
    pub(super) is: u32,
    pub(super) last_port: u8,
    pub(super) ports: [PortV1; PORTS],
}

#[derive(Serialize, Deserialize)]
pub(super) struct PortV1 {
    pub(super) list: u64,
    pub(super) frames: u64,
    pub(super) is: u32,
    pub(super) ie: u32,
    pub(super) cmd: u32,
    pub(super) current_slot: u8,
    pub(super) tfd: u32,
    pub(super) sig: u32,
    pub(super) ssts: u32,
    pub(super) sctl: u32,
    pub(super) sact: u32,
    pub(super) ci: u32,
    pub(super) halted: bool,
    pub(super) signature_waits: bool,
    pub(super) soft_reset: bool,
    pub(super) reset_device: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum DriveV1 {
    Disk(DiskV1),
    Cd(CdV1),
}

#[derive(Serialize, Deserialize)]
pub(super) struct DiskV1 {
    pub(super) multiple: u8,
    pub(super) mode: u8,
    pub(super) write_cache: bool,
    pub(super) look_ahead: bool,
    pub(super) standby: bool,
    pub(super) heads: u8,
    pub(super) sectors_per_track: u8,
    pub(super) queue_error: Option<QueueErrorV1>,
}

/// What log page 10h tells of the last error while commands were queued.
#[derive(Serialize, Deserialize, Clone, Copy)]
pub(super) struct QueueErrorV1 {
    /// The failed tag; none when a command that is not queued came in between.
    pub(super) tag: Option<u8>,
    pub(super) status: u8,
    pub(super) error: u8,
    pub(super) lba: u64,
    pub(super) device: u8,
    pub(super) count: u16,
}

#[derive(Serialize, Deserialize)]
pub(super) struct CdV1 {
    pub(super) mode: u8,
    /// Key, additional code and its qualifier.
    pub(super) sense: [u8; 3],
    pub(super) tray: TrayV1,
}

#[derive(Serialize, Deserialize)]
pub(super) struct TrayV1 {
    /// Whether a medium was in, out of reach or not.
    pub(super) loaded: bool,
    pub(super) open: bool,
    pub(super) locked: bool,
    pub(super) change: ChangeV1,
    pub(super) event: EventV1,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ChangeV1 {
    None,
    Absent,
    Changed,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum EventV1 {
    None,
    New,
    Removed,
}

/// Unless `good`: `what` cannot be.
pub(super) fn check(good: bool, what: &str) -> Result<(), BadState> {
    BadState::unless(good, KIND, what)
}

impl SaveState for Ahci {
    fn save(&self) -> State {
        let Ahci { shared, worker: _ } = self;
        State::new(KIND, 1, &shared.save())
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        self.shared.restore(state.fields(KIND, 1)?)
    }
}
