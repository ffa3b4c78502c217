//! What one guest is: `GuestSpec`, checked before an engine sees it. Files are slots here; `hostd` opens them and passes descriptors.

use std::{fmt, num::NonZeroU64, ops::Range, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    switches::Switches,
    types::{BadValue, Id, MacAddr, Name, show_size},
};

/// The frozen hardware of this release: slots, ids and features never change within a version.
pub const MACHINE: &str = "pc-1";

pub const CPUS_MAX: u32 = 64;
pub const MEMORY_BYTES_MIN: u64 = 1 << 20;
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;
pub const DISKS_MAX: usize = 8;
/// The controller has six ports; the CD drive is on one.
pub const AHCI_DISKS_MAX: usize = 5;
/// One for each USB 3 port of the controller.
pub const USB_DISKS_MAX: usize = 4;
/// PCI slots of disks with a function of their own: on virtio or NVMe.
pub const DISK_SLOTS: Range<u8> = 8..16;
pub const CMDLINE_LEN_MAX: usize = 2047;
pub const DISK_BYTES_MIN: u64 = 512;
pub const DISK_BYTES_MAX: u64 = 64 << 40;

/// Everything the engine needs to know, without one path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestSpec {
    pub id: Id,
    pub name: Name,
    pub machine: String,
    pub cpus: u32,
    /// What the vCPUs are divided into; each socket has the same number of cores.
    #[serde(default = "one")]
    pub sockets: u32,
    /// Of each core.
    #[serde(default = "one")]
    pub threads: u32,
    #[serde(default)]
    pub cpu_model: CpuModel,
    pub memory_bytes: u64,
    pub boot: Boot,
    pub disks: Vec<DiskSpec>,
    /// The machine always has a CD drive; this says whether a medium is in it at start.
    pub cd: bool,
    pub network: Option<NetworkSpec>,
    #[serde(default)]
    pub watchdog: Watchdog,
    #[serde(flatten)]
    pub switches: Switches,
    /// What firmware tries first to last. What is not named comes after it: the disks, then the CD; the network only when named.
    #[serde(default)]
    pub boot_order: Vec<BootFrom>,
    /// Counts until the first reset.
    #[serde(default)]
    pub first_boot: Option<FirstBoot>,
}

fn one() -> u32 {
    1
}

/// Something that firmware can boot from. Its word: `cd`, `network`, or the id of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum BootFrom {
    Disk(Id),
    Cd,
    Network,
}

impl fmt::Display for BootFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BootFrom::Disk(id) => id.fmt(f),
            BootFrom::Cd => f.write_str("cd"),
            BootFrom::Network => f.write_str("network"),
        }
    }
}

impl FromStr for BootFrom {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<BootFrom, BadValue> {
        match text {
            "cd" => Ok(BootFrom::Cd),
            "network" => Ok(BootFrom::Network),
            id => id
                .parse()
                .map(BootFrom::Disk)
                .map_err(|_| BadValue("A guest boots from \"cd\", \"network\" or the id of one of its disks.".into())),
        }
    }
}
impl TryFrom<String> for BootFrom {
    type Error = BadValue;
    fn try_from(text: String) -> Result<BootFrom, BadValue> {
        text.parse()
    }
}
impl From<BootFrom> for String {
    fn from(from: BootFrom) -> String {
        from.to_string()
    }
}

/// What one start does otherwise than the guest is set up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FirstBoot {
    /// This device is tried before all others.
    From(BootFrom),
    /// Into the setup of UEFI firmware; BIOS waits long for the key of its boot menu.
    Setup,
}

/// How the guest starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Boot {
    /// SeaBIOS, from its package.
    Bios,
    /// OVMF with a store of variables; with Secure Boot the store begins with the usual keys.
    Uefi { secure_boot: bool },
    /// A bzImage or a PVH ELF kernel, without firmware.
    Kernel { initrd: bool, cmdline: String },
    /// The built-in test guest.
    Test { cmdline: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    pub id: Id,
    pub bus: DiskBus,
    pub read_only: bool,
    /// One of `DISK_SLOTS`, for a disk that must stay where it is though others came and went. Those that name none get the first
    /// that are free, in their order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
    /// Of a disk on virtio.
    #[serde(default, skip_serializing_if = "RateLimit::is_none")]
    pub limit: RateLimit,
}

/// How much a guest may ask of a device in a second; `None` for as much as it can.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<NonZeroU64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations_per_s: Option<NonZeroU64>,
}

impl RateLimit {
    /// Below it, one request of a driver would take longer than the driver waits.
    pub const BYTES_PER_S_MIN: u64 = 1 << 20;
    pub const OPERATIONS_PER_S_MIN: u64 = 10;

    pub fn is_none(&self) -> bool {
        *self == RateLimit::default()
    }

    /// "at most 50 MiB and 500 operations a second"; nothing without a limit.
    pub fn words(&self) -> Option<String> {
        let bytes = self.bytes_per_s.map(|rate| show_size(rate.get()));
        let operations = self.operations_per_s.map(|rate| format!("{rate} operations"));
        let both: Vec<String> = bytes.into_iter().chain(operations).collect();
        (!both.is_empty()).then(|| format!("at most {} a second", both.join(" and ")))
    }

    /// Errors: less than a guest can work with.
    pub fn check(&self) -> Result<(), BadSpec> {
        let too_low = |rate: Option<NonZeroU64>, least: u64| rate.is_some_and(|rate| rate.get() < least);
        if too_low(self.bytes_per_s, RateLimit::BYTES_PER_S_MIN) {
            let message = format!("A disk is limited to {} a second or more.", show_size(RateLimit::BYTES_PER_S_MIN));
            return Err(BadSpec { field: "bytes_per_s", message });
        }
        if too_low(self.operations_per_s, RateLimit::OPERATIONS_PER_S_MIN) {
            let message =
                format!("A disk is limited to {} operations a second or more.", RateLimit::OPERATIONS_PER_S_MIN);
            return Err(BadSpec { field: "operations_per_s", message });
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskBus {
    Virtio,
    Ahci,
    Nvme,
    /// As a stick: behind the xHCI controller, which the guest then has.
    Usb,
}

impl DiskBus {
    const ALL: [DiskBus; 4] = [DiskBus::Virtio, DiskBus::Ahci, DiskBus::Nvme, DiskBus::Usb];

    /// Whether each disk on it is a PCI function of its own: it has a slot, and can come and go while the guest runs.
    pub fn has_slots(self) -> bool {
        match self {
            DiskBus::Virtio | DiskBus::Nvme => true,
            DiskBus::Ahci | DiskBus::Usb => false,
        }
    }

    /// The word in forms, tables and the database.
    pub fn as_str(self) -> &'static str {
        match self {
            DiskBus::Virtio => "virtio",
            DiskBus::Ahci => "ahci",
            DiskBus::Nvme => "nvme",
            DiskBus::Usb => "usb",
        }
    }
}

impl FromStr for DiskBus {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<DiskBus, BadValue> {
        DiskBus::ALL
            .into_iter()
            .find(|bus| bus.as_str() == text)
            .ok_or_else(|| BadValue("A disk is on virtio, ahci, nvme or usb.".into()))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    pub mac: MacAddr,
    pub backend: NetworkBackend,
    /// Specifications that were written before there was a choice do not say it.
    #[serde(default)]
    pub model: NetworkModel,
}

/// Which card the guest sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkModel {
    #[default]
    Virtio,
    /// Intel's 82540EM, for systems without virtio drivers.
    E1000,
}

impl NetworkModel {
    /// The word in forms, tables and the database.
    pub fn as_str(self) -> &'static str {
        match self {
            NetworkModel::Virtio => "virtio",
            NetworkModel::E1000 => "e1000",
        }
    }
}

impl FromStr for NetworkModel {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<NetworkModel, BadValue> {
        [NetworkModel::Virtio, NetworkModel::E1000]
            .into_iter()
            .find(|model| model.as_str() == text)
            .ok_or_else(|| BadValue("A network card is virtio or e1000.".into()))
    }
}

/// The processor that the guest sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CpuModel {
    /// That of this host, as far as KVM gives it to guests.
    #[default]
    Host,
    /// x86-64-v2 and nothing more: the same on every host of the last fifteen years.
    Portable,
}

impl CpuModel {
    pub const ALL: [CpuModel; 2] = [CpuModel::Host, CpuModel::Portable];

    /// The word in forms and the database.
    pub fn as_str(self) -> &'static str {
        match self {
            CpuModel::Host => "host",
            CpuModel::Portable => "portable",
        }
    }

    /// For people.
    pub fn words(self) -> &'static str {
        match self {
            CpuModel::Host => "This host's",
            CpuModel::Portable => "Portable (x86-64-v2)",
        }
    }
}

impl FromStr for CpuModel {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<CpuModel, BadValue> {
        CpuModel::ALL
            .into_iter()
            .find(|model| model.as_str() == text)
            .ok_or_else(|| BadValue("A processor is host or portable.".into()))
    }
}

/// What happens when the guest does not feed its watchdog in time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Watchdog {
    /// There is none.
    #[default]
    None,
    Reset,
    PowerOff,
    Pause,
}

impl Watchdog {
    pub const ALL: [Watchdog; 4] = [Watchdog::None, Watchdog::Reset, Watchdog::PowerOff, Watchdog::Pause];

    /// The word in forms and the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Watchdog::None => "none",
            Watchdog::Reset => "reset",
            Watchdog::PowerOff => "power_off",
            Watchdog::Pause => "pause",
        }
    }

    /// For people.
    pub fn words(self) -> &'static str {
        match self {
            Watchdog::None => "None",
            Watchdog::Reset => "Resets the guest",
            Watchdog::PowerOff => "Powers the guest off",
            Watchdog::Pause => "Pauses the guest",
        }
    }
}

impl FromStr for Watchdog {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<Watchdog, BadValue> {
        Watchdog::ALL
            .into_iter()
            .find(|watchdog| watchdog.as_str() == text)
            .ok_or_else(|| BadValue("A watchdog is none, reset, power_off or pause.".into()))
    }
}

/// What the passed network descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkBackend {
    /// A tap with virtio-net headers.
    Tap,
    /// A stream socket to `passt`: frames behind a 32-bit big-endian length.
    Passt,
}

/// A wrong field of a spec and a sentence about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadSpec {
    pub field: &'static str,
    pub message: String,
}

impl GuestSpec {
    /// Checks every number and count. Called where a guest is made or changed, and again by `hostd` and the engine.
    pub fn check(&self) -> Result<(), BadSpec> {
        let bad = |field, message: String| Err(BadSpec { field, message });
        if self.machine != MACHINE {
            return bad("machine", format!("This release runs the machine \"{MACHINE}\", not \"{}\".", self.machine));
        }
        if self.cpus == 0 || self.cpus > CPUS_MAX {
            return bad("cpus", format!("A guest has 1 to {CPUS_MAX} vCPUs."));
        }
        let groups = self.sockets.saturating_mul(self.threads);
        if groups == 0 || !self.cpus.is_multiple_of(groups) {
            let (cpus, sockets, threads) = (self.cpus, self.sockets, self.threads);
            return bad(
                "sockets",
                format!("{cpus} vCPUs cannot be divided evenly: sockets {sockets}, threads of each core {threads}."),
            );
        }
        if self.memory_bytes < MEMORY_BYTES_MIN
            || self.memory_bytes > MEMORY_BYTES_MAX
            || !self.memory_bytes.is_multiple_of(1 << 20)
        {
            return bad(
                "memory",
                format!("Memory is {} to {}, in whole MiB.", show_size(MEMORY_BYTES_MIN), show_size(MEMORY_BYTES_MAX)),
            );
        }
        if self.disks.len() > DISKS_MAX {
            return bad("disk", format!("A guest has at most {DISKS_MAX} disks."));
        }
        for (bus, name, max) in [(DiskBus::Ahci, "AHCI", AHCI_DISKS_MAX), (DiskBus::Usb, "USB", USB_DISKS_MAX)] {
            if self.disks.iter().filter(|disk| disk.bus == bus).count() > max {
                return bad("disk", format!("At most {max} disks are on {name}; put the others on virtio or NVMe."));
            }
        }
        for disk in &self.disks {
            disk.limit.check()?;
            if disk.bus != DiskBus::Virtio && !disk.limit.is_none() {
                return bad("disk", "Only a disk on virtio can be limited.".into());
            }
        }
        self.check_disk_slots()?;
        match &self.boot {
            Boot::Kernel { cmdline, .. } | Boot::Test { cmdline } => check_cmdline(cmdline)?,
            Boot::Bios | Boot::Uefi { .. } => {}
        }
        self.check_boot_order()
    }

    /// The slot of each of `disks`, in their order; `None` for those on AHCI, and for a ninth.
    pub fn disk_slots(&self) -> Vec<Option<u8>> {
        let is_named = |slot: &u8| self.disks.iter().any(|disk| disk.slot == Some(*slot));
        let mut free = DISK_SLOTS.filter(|slot| !is_named(slot));
        let mut slot_of = |disk: &DiskSpec| if disk.bus.has_slots() { disk.slot.or_else(|| free.next()) } else { None };
        self.disks.iter().map(&mut slot_of).collect()
    }

    /// The same guest, with each disk's slot named.
    pub fn with_slots(&self) -> GuestSpec {
        let mut spec = self.clone();
        for (disk, slot) in spec.disks.iter_mut().zip(self.disk_slots()) {
            disk.slot = slot;
        }
        spec
    }

    /// Everything that firmware tries, first to last. The network is not in it unless named: UEFI firmware asks for minutes
    /// there before it gives up.
    pub fn full_boot_order(&self) -> Vec<BootFrom> {
        let mut order = self.boot_order.clone();
        for from in self.disks.iter().map(|disk| BootFrom::Disk(disk.id.clone())).chain([BootFrom::Cd]) {
            if !order.contains(&from) {
                order.push(from);
            }
        }
        order
    }

    fn check_disk_slots(&self) -> Result<(), BadSpec> {
        let bad = |message: String| Err(BadSpec { field: "disk", message });
        for (at, disk) in self.disks.iter().enumerate() {
            let Some(slot) = disk.slot else { continue };
            let (first, last) = (DISK_SLOTS.start, DISK_SLOTS.end - 1);
            if !disk.bus.has_slots() || !DISK_SLOTS.contains(&slot) {
                return bad(format!("Only disks on virtio or NVMe have a slot, from {first} to {last}."));
            }
            if self.disks.iter().take(at).any(|before| before.slot == disk.slot) {
                return bad(format!("Two disks are in slot {slot}."));
            }
        }
        Ok(())
    }

    fn check_boot_order(&self) -> Result<(), BadSpec> {
        let bad = |message: String| Err(BadSpec { field: "boot_order", message });
        let has_firmware = matches!(self.boot, Boot::Bios | Boot::Uefi { .. });
        if self.first_boot.is_some() && !has_firmware {
            return bad("Only firmware can choose what to boot from; this guest starts without it.".into());
        }
        for (at, from) in self.boot_order.iter().enumerate() {
            if self.boot_order.iter().take(at).any(|before| before == from) {
                return bad(format!("\"{from}\" is in the boot order twice."));
            }
        }
        let first = self.first_boot.iter().filter_map(|first| match first {
            FirstBoot::From(from) => Some(from),
            FirstBoot::Setup => None,
        });
        for from in self.boot_order.iter().chain(first) {
            match from {
                BootFrom::Disk(id) if self.disks.iter().all(|disk| disk.id != *id) => {
                    return bad(format!("The guest has no disk \"{id}\" to boot from."));
                }
                BootFrom::Network if self.network.is_none() => {
                    return bad("The guest has no network to boot from.".into());
                }
                BootFrom::Disk(_) | BootFrom::Network | BootFrom::Cd => {}
            }
        }
        Ok(())
    }
}

fn check_cmdline(cmdline: &str) -> Result<(), BadSpec> {
    if cmdline.len() > CMDLINE_LEN_MAX {
        return Err(BadSpec {
            field: "cmdline",
            message: format!("The command line has at most {CMDLINE_LEN_MAX} characters."),
        });
    }
    if cmdline.chars().any(|c| c.is_control()) {
        return Err(BadSpec {
            field: "cmdline",
            message: "The command line is one line without control characters.".into(),
        });
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::switches::SWITCHES;

    /// The smallest guest that is right.
    pub(crate) fn sample() -> GuestSpec {
        GuestSpec {
            id: Id::random(),
            name: "sample".parse().unwrap(),
            machine: MACHINE.into(),
            cpus: 1,
            sockets: 1,
            threads: 1,
            memory_bytes: 16 << 20,
            boot: Boot::Test { cmdline: String::new() },
            disks: vec![],
            cd: false,
            network: None,
            cpu_model: CpuModel::Host,
            switches: Switches::default(),
            watchdog: Watchdog::None,
            boot_order: vec![],
            first_boot: None,
        }
    }

    #[test]
    fn switches_stand_beside_everything_else_and_are_off_when_they_are_not_named() {
        let with = GuestSpec { switches: Switches { gpu: true, ..Switches::default() }, ..sample() };
        let mut value = serde_json::to_value(&with).unwrap();
        assert_eq!((&value["gpu"], &value["usb"]), (&true.into(), &false.into()));
        assert_eq!(serde_json::from_value::<GuestSpec>(value.clone()).unwrap(), with);
        for switch in SWITCHES {
            value.as_object_mut().unwrap().remove(switch.key);
        }
        assert_eq!(serde_json::from_value::<GuestSpec>(value).unwrap(), GuestSpec { id: with.id, ..sample() });
    }

    #[test]
    fn each_wrong_field_is_named() {
        assert_eq!(sample().check(), Ok(()));
        type Spoil = fn(&mut GuestSpec);
        let cases: [(&str, Spoil); 9] = [
            ("machine", |spec| spec.machine = "q35".into()),
            ("cpus", |spec| spec.cpus = 0),
            ("cpus", |spec| spec.cpus = 65),
            ("sockets", |spec| spec.sockets = 0),
            ("sockets", |spec| spec.threads = u32::MAX),
            ("sockets", |spec| (spec.cpus, spec.sockets) = (4, 3)),
            ("memory", |spec| spec.memory_bytes = (1 << 20) + 1),
            ("memory", |spec| spec.memory_bytes = 0),
            ("cmdline", |spec| spec.boot = Boot::Kernel { initrd: false, cmdline: "a\nb".into() }),
        ];
        for (field, spoil) in cases {
            let mut spec = sample();
            spoil(&mut spec);
            assert_eq!(spec.check().unwrap_err().field, field);
        }
    }

    #[test]
    fn the_ahci_controller_has_room_for_five_disks_beside_the_cd() {
        let disk = |bus| DiskSpec { id: Id::random(), bus, read_only: false, slot: None, limit: RateLimit::default() };
        let mut spec = sample();
        spec.disks = std::iter::repeat_with(|| disk(DiskBus::Ahci)).take(AHCI_DISKS_MAX).collect();
        spec.disks.push(disk(DiskBus::Virtio));
        assert_eq!(spec.check(), Ok(()));
        for (bus, max) in [(DiskBus::Ahci, AHCI_DISKS_MAX), (DiskBus::Usb, USB_DISKS_MAX)] {
            let mut spec = spec.clone();
            spec.disks = std::iter::repeat_with(|| disk(bus)).take(max + 1).collect();
            assert!(spec.check().unwrap_err().message.contains("virtio or NVMe"), "{bus:?}");
        }
        spec.disks.push(disk(DiskBus::Ahci));
        assert_eq!(spec.check().unwrap_err().field, "disk");
    }

    #[test]
    fn disks_keep_the_slots_that_they_name_and_the_others_share_what_is_left() {
        let limit = RateLimit::default();
        let disk = |bus, slot| DiskSpec { id: Id::random(), bus, read_only: false, slot, limit };
        let (virtio, nvme, ahci) = (DiskBus::Virtio, DiskBus::Nvme, DiskBus::Ahci);
        let with = |disks: &[(DiskBus, Option<u8>)]| GuestSpec {
            disks: disks.iter().map(|(bus, slot)| disk(*bus, *slot)).collect(),
            ..sample()
        };
        let plain = with(&[(virtio, None), (ahci, None), (nvme, None)]);
        assert_eq!(plain.disk_slots(), [Some(8), None, Some(9)]);
        let named = with(&[(virtio, None), (virtio, Some(8)), (ahci, None), (nvme, Some(15)), (nvme, None)]);
        assert_eq!(named.disk_slots(), [Some(9), Some(8), None, Some(15), Some(10)]);
        assert_eq!(named.check(), Ok(()));
        let whole = named.with_slots();
        assert_eq!((whole.disk_slots(), whole.with_slots()), (named.disk_slots(), whole.clone()));
        assert!(serde_json::to_string(&whole).unwrap().contains("\"slot\":15"));
        assert!(!serde_json::to_string(&plain).unwrap().contains("slot"), "as it was written before");
        for wrong in [&[(virtio, Some(7))][..], &[(nvme, Some(16))], &[(ahci, Some(8))], &[(virtio, Some(9)); 2]] {
            assert_eq!(with(wrong).check().unwrap_err().field, "disk");
        }
        assert_eq!(with(&[(virtio, None); 9]).disk_slots().last(), Some(&None));
    }

    #[test]
    fn a_guest_boots_only_from_what_it_has() {
        let disk = DiskSpec {
            id: Id::random(),
            bus: DiskBus::Virtio,
            read_only: false,
            slot: None,
            limit: RateLimit::default(),
        };
        let from = BootFrom::Disk(disk.id.clone());
        let spec = GuestSpec { boot: Boot::Bios, disks: vec![disk], ..sample() };
        let with = |boot_order: &[BootFrom], first_boot| {
            GuestSpec { boot_order: boot_order.to_vec(), first_boot, ..spec.clone() }.check().map_err(|bad| bad.message)
        };
        assert_eq!(with(&[BootFrom::Cd, from.clone()], Some(FirstBoot::From(from.clone()))), Ok(()));
        assert!(with(&[BootFrom::Cd, BootFrom::Cd], None).unwrap_err().contains("twice"));
        assert!(with(&[BootFrom::Network], None).unwrap_err().contains("no network"));
        let stranger = BootFrom::Disk(Id::random());
        assert!(with(&[], Some(FirstBoot::From(stranger))).unwrap_err().contains("no disk"));
        let kernel = GuestSpec { first_boot: Some(FirstBoot::Setup), ..sample() };
        assert_eq!(kernel.check().unwrap_err().field, "boot_order");
    }

    #[test]
    fn a_disk_on_virtio_may_be_limited_but_not_to_nothing() {
        let limited = |bus, bytes_per_s, operations_per_s| {
            let limit = RateLimit {
                bytes_per_s: NonZeroU64::new(bytes_per_s),
                operations_per_s: NonZeroU64::new(operations_per_s),
            };
            let disks = vec![DiskSpec { id: Id::random(), bus, read_only: false, slot: None, limit }];
            GuestSpec { disks, ..sample() }.check().map_err(|bad| bad.field)
        };
        assert_eq!(limited(DiskBus::Virtio, 1 << 20, 10), Ok(()));
        assert_eq!(limited(DiskBus::Virtio, (1 << 20) - 1, 0), Err("bytes_per_s"));
        assert_eq!(limited(DiskBus::Virtio, 0, 9), Err("operations_per_s"));
        assert_eq!(limited(DiskBus::Nvme, 0, 0), Ok(()));
        assert_eq!(limited(DiskBus::Nvme, 0, 100), Err("disk"));
    }

    #[test]
    fn every_bus_is_read_as_it_is_written() {
        for bus in DiskBus::ALL {
            assert_eq!(bus.as_str().parse(), Ok(bus));
            assert_eq!(serde_json::to_string(&bus).unwrap(), format!("\"{}\"", bus.as_str()));
        }
        assert!("ide".parse::<DiskBus>().is_err());
    }

    #[test]
    fn a_spec_survives_its_json() {
        let order = vec![BootFrom::Cd, BootFrom::Network, BootFrom::Disk(Id::random())];
        let spec = GuestSpec { boot_order: order, first_boot: Some(FirstBoot::Setup), ..sample() };
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<GuestSpec>(&json).unwrap(), spec);
        assert!(json.contains("[\"cd\",\"network\",\""), "{json}");
    }

    #[test]
    fn a_network_that_names_no_card_has_virtios() {
        let json = r#"{"mac":"52:54:00:01:02:03","backend":"tap"}"#;
        let network: NetworkSpec = serde_json::from_str(json).unwrap();
        assert_eq!(network.model, NetworkModel::Virtio);
        for model in [NetworkModel::Virtio, NetworkModel::E1000] {
            assert_eq!(model.as_str().parse(), Ok(model));
            let spec = NetworkSpec { model, ..network.clone() };
            let json = serde_json::to_string(&spec).unwrap();
            assert!(json.contains(&format!(r#""model":"{}""#, model.as_str())));
            assert_eq!(serde_json::from_str::<NetworkSpec>(&json).unwrap(), spec);
        }
        assert!("rtl8139".parse::<NetworkModel>().is_err());
    }
}
