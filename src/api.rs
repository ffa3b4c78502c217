//! The JSON of `/api/v1` about guests, as the server writes it and the command line reads it. Other JSON is beside its handlers.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    spec::{CpuModel, DiskBus, NetworkModel, RateLimit, Watchdog},
    switches::{SwitchWishes, Switches},
    types::{Id, MacAddr, Name},
    wire::AgentFacts,
};

/// One guest, as `GET /api/v1/guests` and `/api/v1/guests/{id}` answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    pub id: Id,
    pub name: Name,
    pub state: State,
    /// Why it failed or was paused, or what it waits for.
    pub reason: Option<String>,
    /// Since when it has this state, milliseconds since 1970; unknown after a restart of the server.
    pub since_ms: Option<i64>,
    /// Whether it is meant to run: such a guest starts with the host.
    pub desired: Desired,
    pub cpus: u32,
    /// What the vCPUs are divided into, and how many threads each core has.
    #[serde(default = "one")]
    pub sockets: u32,
    #[serde(default = "one")]
    pub threads: u32,
    pub memory_bytes: u64,
    pub boot: Boot,
    /// What firmware tries, first to last: `cd`, `network`, ids of disks.
    #[serde(default)]
    pub boot_order: Vec<String>,
    pub disks: Vec<Disk>,
    pub cdrom: Option<ImageName>,
    pub network: Network,
    #[serde(default)]
    pub watchdog: Watchdog,
    #[serde(default)]
    pub cpu_model: CpuModel,
    #[serde(flatten)]
    pub switches: Switches,
    /// What a running guest keeps of its memory; left out while that is all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_now_bytes: Option<u64>,
    /// The guest's own addresses, as its packets show them.
    pub addresses: Vec<String>,
    /// What qemu-guest-agent in the running guest says; nothing without one.
    #[serde(default)]
    pub agent: Option<AgentFacts>,
    /// When the running engine was started.
    pub started_ms: Option<i64>,
    /// The running engine.
    pub engine: Option<Engine>,
    /// The task that still prepares this guest's disks.
    pub task: Option<Id>,
    /// What is right but perhaps not meant, such as more memory than the host has.
    #[serde(default)]
    pub warnings: Vec<String>,
}

fn one() -> u32 {
    1
}

/// What a guest is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Stopped,
    /// Its state is on disk; the next start goes on from there.
    Suspended,
    Starting,
    Running,
    Paused,
    Stopping,
    Failed,
}

impl State {
    /// Whether there is an engine.
    pub fn is_live(self) -> bool {
        !matches!(self, State::Stopped | State::Suspended | State::Failed)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Stopped => "stopped",
            State::Suspended => "suspended",
            State::Starting => "starting",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopping => "stopping",
            State::Failed => "failed",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Desired {
    On,
    Off,
}

/// How a guest starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Boot {
    /// Firmware, which goes by the boot order.
    Disk {
        /// Left out: what the guest has; for a new one UEFI where the host has it, BIOS elsewhere.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        firmware: Option<Firmware>,
    },
    /// A Linux kernel without firmware. Images are named by id or name.
    Kernel {
        kernel: String,
        #[serde(default)]
        initrd: Option<String>,
        #[serde(default)]
        cmdline: String,
    },
    /// The built-in test guest.
    Test {
        #[serde(default)]
        cmdline: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Firmware {
    Bios,
    Uefi,
    /// UEFI with Secure Boot.
    UefiSecure,
}

impl Firmware {
    pub const ALL: [Firmware; 3] = [Firmware::Uefi, Firmware::UefiSecure, Firmware::Bios];

    /// The word in JSON and forms.
    pub fn as_str(self) -> &'static str {
        match self {
            Firmware::Bios => "bios",
            Firmware::Uefi => "uefi",
            Firmware::UefiSecure => "uefi_secure",
        }
    }

    /// For people.
    pub fn words(self) -> &'static str {
        match self {
            Firmware::Bios => "BIOS",
            Firmware::Uefi => "UEFI",
            Firmware::UefiSecure => "UEFI with Secure Boot",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    pub id: Id,
    pub size_bytes: u64,
    pub bus: DiskBus,
    /// False while an image is being copied into it.
    pub ready: bool,
    /// The running guest was asked to let it go for good, and has not yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
    #[serde(default, skip_serializing_if = "RateLimit::is_none")]
    pub limit: RateLimit,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageName {
    pub id: Id,
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// `nat`, `user`, `none` or `bridge:NAME`.
    pub mode: String,
    #[serde(default)]
    pub model: NetworkModel,
    pub mac: MacAddr,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Engine {
    pub pid: u32,
    pub version: String,
}

/// `POST /api/v1/guests`. What is left out has the value that the page offers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateGuest {
    /// As typed; checked by the service, so that a wrong one is an error at its field.
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// Left out: one, as `threads`. The cores of a socket are what is left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sockets: Option<u32>,
    /// Of a core.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<Boot>,
    /// What firmware tries first: `cd`, `network`, `disk1`. What is not named follows: the disks, then the CD.
    #[serde(default)]
    pub boot_order: Vec<String>,
    #[serde(default)]
    pub disks: Vec<NewDisk>,
    /// An image by id or name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cdrom: Option<String>,
    /// `nat`, `user`, `none` or `bridge:NAME`; left out: `nat` where there is privilege, `user` otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// The card that the guest sees; left out: virtio.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_model: Option<NetworkModel>,
    /// What happens when the guest does not feed its watchdog; `none` is a guest without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<Watchdog>,
    /// The processor that the guest sees; left out for a new guest: `host`.
    pub cpu_model: Option<CpuModel>,
    #[serde(flatten)]
    pub switches: SwitchWishes,
    /// Start it as soon as it is complete.
    #[serde(default)]
    pub start: bool,
}

/// A disk to make: empty of a size, or a copy of an image, made larger when `size_bytes` says so.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewDisk {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// An image by id or name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bus: Option<DiskBus>,
    /// Of a disk on virtio.
    #[serde(default, skip_serializing_if = "RateLimit::is_none")]
    pub limit: RateLimit,
}

/// `PATCH /api/v1/guests/{id}`, while it is stopped. What is left out stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeGuest {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sockets: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<Boot>,
    /// What firmware tries first: `cd`, `network`, disks by id or as `disk1`. What is not named follows: the disks, then the CD.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_order: Option<Vec<String>>,
    /// An image by id or name; the empty text takes the medium out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cdrom: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_model: Option<NetworkModel>,
    /// What happens when the guest does not feed its watchdog; `none` is a guest without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<Watchdog>,
    /// The processor that the guest sees; left out for a new guest: `host`.
    pub cpu_model: Option<CpuModel>,
    #[serde(flatten)]
    pub switches: SwitchWishes,
    #[serde(default)]
    pub add_disks: Vec<NewDisk>,
    /// Deleted with their files.
    #[serde(default)]
    pub remove_disks: Vec<Id>,
}

/// `POST /api/v1/guests/{id}/start`; the body may be left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartGuest {
    /// For this one start: `cd`, `network`, a disk by id or as `disk1`, or `setup` for the firmware's own. A reset goes back to
    /// the boot order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<String>,
}

/// `POST /api/v1/guests/{id}/cd`: a medium by image id or name, or none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeCd {
    #[serde(default)]
    pub image: Option<String>,
}

/// `POST /api/v1/guests/{id}/memory`: what a running guest keeps of its memory; the rest it gives back to the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetMemory {
    pub memory_bytes: u64,
}

/// `POST /api/v1/guests/{id}/freeze`: for at most so many seconds; 60 when none are named.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Freeze {
    pub seconds: Option<u32>,
}

/// What `freeze` and `thaw` answer: how many file systems of the guest it was.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    pub file_systems: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_needs_only_a_name_and_knows_its_fields() {
        let least: CreateGuest = serde_json::from_str(r#"{"name":"web01"}"#).unwrap();
        assert_eq!(least, CreateGuest { name: "web01".into(), ..CreateGuest::default() });
        assert!(serde_json::from_str::<CreateGuest>(r#"{"name":"web01","cpu":2}"#).is_err());
        assert!(serde_json::from_str::<CreateGuest>(r#"{"name":"web01","cpus":-2}"#).is_err());
        let boot: Boot = serde_json::from_str(r#"{"kind":"disk"}"#).unwrap();
        assert_eq!(boot, Boot::Disk { firmware: None });
    }
}
