//! fw_cfg: how firmware asks the machine what it is (QEMU's interface: selector, data port, DMA).
//!
//! All items are read-only but one, by which the firmware tells where it put the VM generation id. DMA is carried out inside the write that starts it, so an item never moves while it is read.

use std::{collections::BTreeMap, fmt::Write, mem, sync::Arc};

use super::{
    acpi::{self, AcpiTables},
    bus::{Access, BusDevice, BusFault, Effect, Width},
    facts::{BootDevice, FirstBoot, MachineFacts},
    generation::{self, Generation},
    layout,
    memory::{Gpa, GuestRam, RamSpan},
    saved::{BadState, SaveState, State},
    smbios::Smbios,
    xhci,
};

/// Numbered items.
pub mod key {
    pub const SIGNATURE: u16 = 0x00;
    pub const FEATURES: u16 = 0x01;
    pub const UUID: u16 = 0x02;
    pub const RAM_BYTES: u16 = 0x03;
    pub const NO_GRAPHIC: u16 = 0x04;
    pub const CPUS: u16 = 0x05;
    pub const NUMA: u16 = 0x0d;
    pub const BOOT_MENU: u16 = 0x0e;
    pub const CPUS_MAX: u16 = 0x0f;
    pub const DIRECTORY: u16 = 0x19;
    pub const FIRST_FILE: u16 = 0x20;
    pub const IRQ0_OVERRIDE: u16 = 0x8002;
}

/// How long the firmware waits for the key that shows its menu; and when a person asked for the menu.
const BOOT_MENU_WAIT_MS: u32 = 1_000;
const BOOT_MENU_ASKED_MS: u32 = 30_000;
const BOOT_ORDER_FILE: &str = "bootorder";
const BOOT_MENU_FILE: &str = "etc/boot-menu-wait";
/// After a failed boot SeaBIOS tries again, so that a CD can be put in.
const BOOT_FAIL_WAIT_MS: u32 = 10_000;

const FEATURE_TRADITIONAL: u32 = 1 << 0;
const FEATURE_DMA: u32 = 1 << 1;
const FILE_NAME_BYTES: usize = 56;
/// One DMA command moves at most this much; our files are far smaller.
const DMA_BYTES_MAX: u32 = 64 << 20;

/// Offsets inside `layout::FW_CFG`.
mod port {
    pub(super) const SELECTOR: u64 = 0;
    pub(super) const DATA: u64 = 1;
    pub(super) const DMA_HIGH: u64 = 4;
    pub(super) const DMA_LOW: u64 = 8;
}

/// The control word of a DMA command.
mod dma {
    pub(super) const ERROR: u32 = 1 << 0;
    pub(super) const READ: u32 = 1 << 1;
    pub(super) const SKIP: u32 = 1 << 2;
    pub(super) const SELECT: u32 = 1 << 3;
    pub(super) const WRITE: u32 = 1 << 4;
    /// Read from the DMA ports: "QEMU CFG", big-endian.
    pub(super) const SIGNATURE: u64 = 0x5145_4d55_2043_4647;
}

type Bytes = Arc<[u8]>;
/// Files whose bytes replace those of the same name and size.
pub type Replacement = Vec<(&'static str, Vec<u8>)>;

/// The ACPI files follow from where the firmware has put the PM block.
struct AcpiPatch {
    pm_base: Box<dyn FnMut() -> u16 + Send>,
    files: Box<dyn Fn(u16) -> Replacement + Send>,
}

/// The device on the ports `layout::FW_CFG`.
pub struct FwCfg {
    ram: GuestRam,
    items: BTreeMap<u16, Bytes>,
    names: Vec<(String, u16)>,
    acpi: Option<AcpiPatch>,
    /// What the next reset changes; a file may get another size, since a guest looks the size up when it has been reset.
    after_first_boot: Replacement,
    /// The PM base in the ACPI files, once the guest has looked at them after the last reset.
    acpi_pm_base: Option<u16>,
    /// The only item that the guest may write, by its key: 8 bytes, the address of the VM generation id.
    generation: Option<(u16, Generation)>,
    /// What the guest has selected since then, and its bytes.
    selected: Option<u16>,
    current: Bytes,
    offset: usize,
    dma_address: u64,
}

impl FwCfg {
    /// An empty store: signature, features and directory only.
    pub fn new(ram: GuestRam) -> FwCfg {
        let mut fw_cfg = FwCfg {
            ram,
            items: BTreeMap::new(),
            names: Vec::new(),
            acpi: None,
            after_first_boot: Vec::new(),
            acpi_pm_base: None,
            generation: None,
            selected: None,
            current: Arc::from([]),
            offset: 0,
            dma_address: 0,
        };
        fw_cfg.add_key(key::SIGNATURE, b"QEMU");
        fw_cfg.add_key(key::FEATURES, &(FEATURE_TRADITIONAL | FEATURE_DMA).to_le_bytes());
        fw_cfg
    }

    /// Everything that SeaBIOS and OVMF ask of a machine. `pm_base` says where the firmware has put the PM block; it is called
    /// when the guest first selects an ACPI file, with this device's lock held.
    pub fn for_machine(
        ram: GuestRam,
        facts: MachineFacts,
        generation: Generation,
        pm_base: impl FnMut() -> u16 + Send + 'static,
    ) -> FwCfg {
        let mut fw_cfg = FwCfg::new(ram);
        let cpus = facts.cpus.min(u32::from(u16::MAX)) as u16;
        fw_cfg.add_key(key::UUID, &facts.uuid);
        fw_cfg.add_key(key::RAM_BYTES, &facts.memory_bytes.to_le_bytes());
        fw_cfg.add_key(key::NO_GRAPHIC, &0u16.to_le_bytes());
        fw_cfg.add_key(key::CPUS, &cpus.to_le_bytes());
        fw_cfg.add_key(key::CPUS_MAX, &cpus.to_le_bytes());
        fw_cfg.add_key(key::NUMA, &0u64.to_le_bytes());
        fw_cfg.add_key(key::BOOT_MENU, &1u16.to_le_bytes());
        fw_cfg.add_key(key::IRQ0_OVERRIDE, &1u32.to_le_bytes());
        fw_cfg.add_file("etc/e820", e820(&facts));
        fw_cfg.add_boot_choice(&facts);
        fw_cfg.add_file("etc/boot-fail-wait", BOOT_FAIL_WAIT_MS.to_le_bytes().to_vec());
        // S3 and S4 are not offered; S5 is type 0.
        fw_cfg.add_file("etc/system-states", vec![128, 0, 0, 1, 2, 128]);
        for (name, bytes) in Smbios::build(&facts).files() {
            fw_cfg.add_file(name, bytes);
        }
        for (name, bytes) in AcpiTables::build(&facts).files() {
            fw_cfg.add_file(name, bytes);
        }
        fw_cfg.add_file(generation::GUID_FILE, generation.file());
        let key = fw_cfg.add_file(generation::ADDRESS_FILE, vec![0; 8]);
        fw_cfg.generation = Some((key, generation.clone()));
        let files = move |pm_base| {
            let mut files = AcpiTables::build(&MachineFacts { pm_base, ..facts.clone() }).files();
            files.push((generation::GUID_FILE, generation.file()));
            files
        };
        fw_cfg.acpi = Some(AcpiPatch { pm_base: Box::new(pm_base), files: Box::new(files) });
        fw_cfg
    }

    fn add_boot_choice(&mut self, facts: &MachineFacts) {
        let (usual, menu) = (boot_order(&facts.boot_order), |wait_ms: u32| wait_ms.to_le_bytes().to_vec());
        let (mut first, mut wait_ms) = (usual.clone(), BOOT_MENU_WAIT_MS);
        match &facts.first_boot {
            Some(FirstBoot::From(order)) => first = boot_order(order),
            Some(FirstBoot::Menu) => wait_ms = BOOT_MENU_ASKED_MS,
            None => {}
        }
        self.add_file(BOOT_ORDER_FILE, first);
        self.add_file(BOOT_MENU_FILE, menu(wait_ms));
        self.after_first_boot = vec![(BOOT_ORDER_FILE, usual), (BOOT_MENU_FILE, menu(BOOT_MENU_WAIT_MS))];
    }

    /// What firmware tries first to last, from the next reset on.
    pub fn set_boot_order(&mut self, devices: &[BootDevice]) {
        self.after_first_boot.retain(|(name, _)| *name != BOOT_ORDER_FILE);
        self.after_first_boot.push((BOOT_ORDER_FILE, boot_order(devices)));
    }

    /// Adds a numbered item.
    pub fn add_key(&mut self, key: u16, bytes: &[u8]) {
        let before = self.items.insert(key, Arc::from(bytes));
        assert!(before.is_none() && key != key::DIRECTORY, "fw_cfg item {key:#x} is there already");
    }

    /// Adds a file and gives its key. Names are ours, shorter than 56 bytes and different.
    pub fn add_file(&mut self, name: &str, bytes: Vec<u8>) -> u16 {
        assert!(name.len() < FILE_NAME_BYTES, "fw_cfg file name {name} is too long");
        assert!(self.names.iter().all(|(other, _)| other != name), "fw_cfg file {name} is there already");
        let key = key::FIRST_FILE + u16::try_from(self.names.len()).expect("a few dozen files");
        self.add_key(key, &bytes);
        self.names.push((name.to_owned(), key));
        key
    }

    /// Back to the state after power on, except that what was asked for one boot is over.
    pub fn reset(&mut self) {
        self.end_first_boot();
        self.acpi_pm_base = None;
        self.selected = None;
        self.current = Arc::from([]);
        self.offset = 0;
        self.dma_address = 0;
    }

    fn end_first_boot(&mut self) {
        for (name, bytes) in mem::take(&mut self.after_first_boot) {
            if let Some((_, key)) = self.names.iter().find(|(other, _)| other == name) {
                self.items.insert(*key, bytes.into());
            }
        }
    }

    fn select(&mut self, key: u16) {
        if self.acpi_pm_base.is_none()
            && self.is_acpi(key)
            && let Some(acpi) = &mut self.acpi
        {
            let pm_base = (acpi.pm_base)();
            self.patch_acpi(pm_base);
        }
        self.offset = 0;
        self.show(key);
    }

    /// Makes `key` what is read.
    fn show(&mut self, key: u16) {
        self.selected = Some(key);
        self.current = match &self.generation {
            Some((written, generation)) if key == *written => Arc::from(generation.address().0.to_le_bytes()),
            _ if key == key::DIRECTORY => self.directory().into(),
            _ => self.items.get(&key).cloned().unwrap_or_else(|| Arc::from([])),
        };
    }

    fn is_acpi(&self, key: u16) -> bool {
        const FILES: [&str; 4] = [acpi::TABLES_FILE, acpi::RSDP_FILE, acpi::LOADER_FILE, generation::GUID_FILE];
        self.names.iter().any(|(name, at)| *at == key && FILES.contains(&name.as_str()))
    }

    fn patch_acpi(&mut self, pm_base: u16) {
        let Some(acpi) = &self.acpi else { return };
        self.acpi_pm_base = Some(pm_base);
        for (name, bytes) in (acpi.files)(pm_base) {
            let Some((_, key)) = self.names.iter().find(|(other, _)| other == name) else { continue };
            let item = self.items.get_mut(key).expect("every name has an item");
            assert!(item.len() == bytes.len(), "the guest has read the size of {name} already");
            *item = bytes.into();
        }
    }

    /// Count, then size, key and name of each file, big-endian.
    fn directory(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(4 + 64 * self.names.len());
        out.extend((self.names.len() as u32).to_be_bytes());
        for (name, key) in &self.names {
            let size = self.items.get(key).map_or(0, |item| item.len());
            out.extend((size as u32).to_be_bytes());
            out.extend(key.to_be_bytes());
            out.extend([0, 0]);
            let mut field = [0; FILE_NAME_BYTES];
            field[..name.len()].copy_from_slice(name.as_bytes());
            out.extend(field);
        }
        out
    }

    /// The next byte; zero behind the end.
    fn next_byte(&mut self) -> u8 {
        let byte = self.current.get(self.offset).copied().unwrap_or(0);
        self.offset = self.offset.saturating_add(1);
        byte
    }

    /// Carries out the command at `at` and writes its result there. A command outside RAM has no place for a result.
    fn run_dma(&mut self, at: Gpa) {
        let mut command = [0; 16];
        if self.ram.read(at, &mut command).is_err() {
            return;
        }
        let word = |at: usize| u32::from_be_bytes([command[at], command[at + 1], command[at + 2], command[at + 3]]);
        let (control, length) = (word(0), word(4));
        let address = Gpa(u64::from(word(8)) << 32 | u64::from(word(12)));
        let result = if self.transfer(control, length, address) { 0 } else { dma::ERROR };
        // The command was read from this place, and RAM does not go away.
        let _ = self.ram.write(at, &result.to_be_bytes());
    }

    /// One DMA command. False when it cannot be done.
    fn transfer(&mut self, control: u32, length: u32, address: Gpa) -> bool {
        if control & dma::SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        if control & dma::READ != 0 {
            if length > DMA_BYTES_MAX || !self.ram.contains(RamSpan { at: address, bytes: length }) {
                return length == 0;
            }
            let from = self.offset.min(self.current.len());
            let there = &self.current[from..];
            let there = &there[..there.len().min(length as usize)];
            let zeros = vec![0; length as usize - there.len()];
            let behind = Gpa(address.0 + there.len() as u64);
            let written = self.ram.write(address, there).and_then(|()| self.ram.write(behind, &zeros));
            self.offset = self.offset.saturating_add(length as usize);
            return written.is_ok();
        }
        if control & dma::WRITE != 0 {
            return length == 0 || self.take_write(length, address);
        }
        if control & dma::SKIP != 0 {
            self.offset = self.offset.saturating_add(length as usize);
        }
        true
    }

    /// The guest writes `length` bytes from `from` into the selected item. False when it may not.
    fn take_write(&mut self, length: u32, from: Gpa) -> bool {
        let Some((key, generation)) = &self.generation else { return false };
        let mut bytes = generation.address().0.to_le_bytes();
        let end = self.offset.saturating_add(length as usize);
        let Some(into) = bytes.get_mut(self.offset..end).filter(|_| self.selected == Some(*key)) else { return false };
        if self.ram.read(from, into).is_err() {
            return false;
        }
        generation.placed(Gpa(u64::from_le_bytes(bytes)));
        self.current = Arc::from(bytes);
        self.offset = end;
        true
    }
}

impl BusDevice for FwCfg {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        match (at.offset, at.width) {
            (port::DATA, Width::B1) => Ok(u64::from(self.next_byte())),
            (port::DMA_HIGH, Width::B4) => Ok(u64::from(((dma::SIGNATURE >> 32) as u32).swap_bytes())),
            (port::DMA_LOW, Width::B4) => Ok(u64::from((dma::SIGNATURE as u32).swap_bytes())),
            (port::SELECTOR | port::DATA, _) => Err(BusFault::BadWidth),
            _ => Err(BusFault::NoRegister),
        }
    }

    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        match (at.offset, at.width) {
            (port::SELECTOR, Width::B2) => self.select(value as u16),
            (port::DATA, Width::B1) => {} // the old way to write items, gone since QEMU 2.4
            (port::DMA_HIGH, Width::B4) => self.dma_address = u64::from((value as u32).swap_bytes()) << 32,
            (port::DMA_LOW, Width::B4) => {
                let high = mem::take(&mut self.dma_address);
                self.run_dma(Gpa(high | u64::from((value as u32).swap_bytes())));
            }
            (port::SELECTOR, _) => return Err(BusFault::BadWidth),
            _ => return Err(BusFault::NoRegister),
        }
        Ok(Effect::None)
    }
}

/// The address map: 20 bytes an entry.
fn e820(facts: &MachineFacts) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in facts.firmware_map() {
        out.extend(entry.start.to_le_bytes());
        out.extend(entry.bytes.to_le_bytes());
        out.extend(if entry.usable { 1u32 } else { 2 }.to_le_bytes());
    }
    out
}

/// OpenFirmware paths, one a line, closed by a zero. OVMF wants the node names, SeaBIOS the addresses.
fn boot_order(devices: &[BootDevice]) -> Vec<u8> {
    let (ahci, usb) = (layout::slot::AHCI, layout::slot::XHCI);
    let mut out = String::new();
    for device in devices {
        let written = match device {
            BootDevice::VirtioDisk { slot } => writeln!(out, "/pci@i0cf8/scsi@{slot:x}/disk@0,0"),
            // SeaBIOS finds the controller by its address, `/pci@i0cf8/*@SLOT`, whatever follows. OVMF knows an NVMe disk only by
            // the name that QEMU's first controller had, whichever ids this one has, and by the namespace's number and
            // EUI-64 in hexadecimal, which is 0 as in Identify.
            BootDevice::NvmeDisk { slot } => writeln!(out, "/pci@i0cf8/pci8086,5845@{slot:x}/namespace@1,0"),
            // SeaBIOS counts the ports of each speed by themselves, OVMF those of the whole controller. Neither finds anything at the
            // other's.
            BootDevice::UsbDisk { number } => [*number, number + xhci::DISK_PORT - 1]
                .iter()
                .try_for_each(|port| writeln!(out, "/pci@i0cf8/usb@{usb:x}/storage@{port:x}/channel@0/disk@0,0")),
            BootDevice::AhciDisk { port } | BootDevice::AhciCd { port } => {
                writeln!(out, "/pci@i0cf8/pci8086,2922@{ahci:x}/drive@{port:x}/disk@0")
            }
            // Every card here is an Ethernet controller by its class, which is what both firmwares name it by.
            BootDevice::Network { slot } => writeln!(out, "/pci@i0cf8/ethernet@{slot:x}/ethernet-phy@0"),
        };
        written.expect("a string takes everything");
    }
    out.truncate(out.trim_end().len());
    out.push('\0');
    out.into_bytes()
}

mod saved {
    use serde::{Deserialize, Serialize};

    pub(super) const KIND: &str = "fw-cfg";

    /// The items follow from the specification and from what is told of them here.
    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) selected: Option<u16>,
        pub(super) offset: u64,
        pub(super) dma_address: u64,
        pub(super) acpi_pm_base: Option<u16>,
        /// What was asked for one boot is over.
        pub(super) first_boot_over: bool,
    }
}

impl SaveState for FwCfg {
    fn save(&self) -> State {
        let FwCfg {
            ram: _,
            items: _,
            names: _,
            acpi: _,
            after_first_boot,
            acpi_pm_base,
            generation: _, // has a state of its own
            selected,
            current: _,
            offset,
            dma_address,
        } = self;
        let fields = saved::V1 {
            selected: *selected,
            offset: *offset as u64,
            dma_address: *dma_address,
            acpi_pm_base: *acpi_pm_base,
            first_boot_over: after_first_boot.is_empty(),
        };
        State::new(saved::KIND, 1, &fields)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let fields: saved::V1 = state.fields(saved::KIND, 1)?;
        // The chipset places the block at whole pieces of 64 ports.
        let placed = fields.acpi_pm_base.is_none_or(|base| base % 64 == 0);
        BadState::unless(placed, saved::KIND, "the PM block cannot be at such a port")?;
        if fields.first_boot_over {
            self.end_first_boot();
        }
        if let Some(pm_base) = fields.acpi_pm_base {
            self.patch_acpi(pm_base);
        }
        if let Some(key) = fields.selected {
            self.show(key);
        }
        self.offset = usize::try_from(fields.offset).unwrap_or(usize::MAX);
        self.dma_address = fields.dma_address;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU16, Ordering};

    use super::*;
    use crate::engine::{
        facts::tests::sample,
        saved::testing::{matches_golden, spoil},
    };

    /// Drives the ports as firmware does.
    struct Rig {
        fw_cfg: FwCfg,
        ram: GuestRam,
        pm_base: Arc<AtomicU16>,
        generation: Generation,
    }

    fn rig() -> Rig {
        let ram = GuestRam::new(16 << 20).unwrap();
        let pm_base = Arc::new(AtomicU16::new(0x600));
        let asked = Arc::clone(&pm_base);
        let generation = Generation::new(ram.clone(), [0x5a; 16], || ());
        let pm = move || asked.load(Ordering::SeqCst);
        let fw_cfg = FwCfg::for_machine(ram.clone(), sample(), generation.clone(), pm);
        Rig { fw_cfg, ram, pm_base, generation }
    }

    const COMMAND_AT: u64 = 0x7000;
    const BUFFER: u64 = 0x1_0000;

    impl Rig {
        fn pio(&mut self, key: u16, len: usize) -> Vec<u8> {
            self.fw_cfg.write(Access::new(0, Width::B2), u64::from(key)).unwrap();
            (0..len).map(|_| self.fw_cfg.read(Access::new(1, Width::B1)).unwrap() as u8).collect()
        }
        /// Gives the control word afterwards.
        fn dma(&mut self, control: u32, len: u32, address: u64) -> u32 {
            let mut command = Vec::new();
            command.extend(control.to_be_bytes());
            command.extend(len.to_be_bytes());
            command.extend(address.to_be_bytes());
            self.ram.write(Gpa(COMMAND_AT), &command).unwrap();
            self.fw_cfg.write(Access::new(8, Width::B4), u64::from((COMMAND_AT as u32).swap_bytes())).unwrap();
            self.ram.get_u32(Gpa(COMMAND_AT)).unwrap().swap_bytes()
        }
        fn buffer(&self, len: usize) -> Vec<u8> {
            let mut bytes = vec![0; len];
            self.ram.read(Gpa(BUFFER), &mut bytes).unwrap();
            bytes
        }
        /// Key and size of a file, from the directory.
        fn find(&mut self, name: &str) -> (u16, usize) {
            let count = u32::from_be_bytes(self.pio(key::DIRECTORY, 4).try_into().unwrap()) as usize;
            let directory = self.pio(key::DIRECTORY, 4 + 64 * count);
            let entry = directory[4..]
                .chunks(64)
                .find(|entry| entry[8..].starts_with(name.as_bytes()) && entry[8 + name.len()] == 0)
                .unwrap_or_else(|| panic!("no file {name}"));
            let size = u32::from_be_bytes(entry[..4].try_into().unwrap());
            (u16::from_be_bytes([entry[4], entry[5]]), size as usize)
        }
        fn file(&mut self, name: &str) -> Vec<u8> {
            let (key, size) = self.find(name);
            assert_eq!(self.dma(u32::from(key) << 16 | dma::SELECT | dma::READ, size as u32, BUFFER), 0);
            self.buffer(size)
        }
    }

    #[test]
    fn firmware_recognises_the_interface() {
        let mut rig = rig();
        assert_eq!(rig.pio(key::SIGNATURE, 6), b"QEMU\0\0");
        assert_eq!(rig.pio(key::FEATURES, 4), [3, 0, 0, 0]);
        assert_eq!(rig.pio(key::CPUS, 2), [2, 0]);
        assert_eq!(rig.pio(0x7777, 2), [0, 0], "an unknown key reads as zeros");
        let word = |rig: &mut Rig, offset| rig.fw_cfg.read(Access::new(offset, Width::B4)).unwrap() as u32;
        assert_eq!([word(&mut rig, 4).to_le_bytes(), word(&mut rig, 8).to_le_bytes()], [*b"QEMU", *b" CFG"]);
    }

    #[test]
    fn files_are_found_by_name_and_read_by_dma() {
        let mut rig = rig();
        let order = rig.file("bootorder");
        assert_eq!(order, b"/pci@i0cf8/scsi@8/disk@0,0\n/pci@i0cf8/pci8086,2922@3/drive@5/disk@0\0");
        let map = rig.file("etc/e820");
        assert_eq!(map.len(), 40);
        assert_eq!(map[8..20], [0, 0, 0, 0x20, 0, 0, 0, 0, 1, 0, 0, 0], "512 MiB of RAM");
        for name in ["etc/table-loader", "etc/acpi/rsdp", "etc/smbios/smbios-anchor", "etc/smbios/smbios-tables"] {
            assert!(!rig.file(name).is_empty());
        }
        assert_eq!(boot_order(&[]), b"\0");
        assert_eq!(boot_order(&[BootDevice::Network { slot: 4 }]), b"/pci@i0cf8/ethernet@4/ethernet-phy@0\0");
        let nvme = boot_order(&[BootDevice::NvmeDisk { slot: 10 }]);
        assert_eq!(nvme, b"/pci@i0cf8/pci8086,5845@a/namespace@1,0\0");
        let usb = ["2", "6"].map(|port| format!("/pci@i0cf8/usb@11/storage@{port}/channel@0/disk@0,0")).join("\n");
        assert_eq!(boot_order(&[BootDevice::UsbDisk { number: 2 }]), (usb + "\0").as_bytes());
    }

    #[test]
    fn what_is_asked_for_one_boot_is_over_with_the_first_reset() {
        let mut rig = rig();
        let usual = rig.file(BOOT_ORDER_FILE);
        let network = BootDevice::Network { slot: 4 };
        let order = FirstBoot::From([vec![network], sample().boot_order].concat());
        let facts = MachineFacts { first_boot: Some(order), ..sample() };
        rig.fw_cfg = FwCfg::for_machine(rig.ram.clone(), facts, rig.generation.clone(), || 0x600);
        let once = rig.file(BOOT_ORDER_FILE);
        assert_eq!(once, [&b"/pci@i0cf8/ethernet@4/ethernet-phy@0\n"[..], &usual].concat());
        for _ in 0..2 {
            rig.fw_cfg.reset();
            assert_eq!(rig.file(BOOT_ORDER_FILE), usual);
        }
        let facts = MachineFacts { first_boot: Some(FirstBoot::Menu), ..sample() };
        rig.fw_cfg = FwCfg::for_machine(rig.ram.clone(), facts, rig.generation.clone(), || 0x600);
        assert_eq!(rig.file(BOOT_MENU_FILE), BOOT_MENU_ASKED_MS.to_le_bytes());
        rig.fw_cfg.reset();
        assert_eq!(rig.file(BOOT_MENU_FILE), BOOT_MENU_WAIT_MS.to_le_bytes());
    }

    #[test]
    fn dma_selects_skips_reads_and_pads_with_zeros() {
        let mut rig = rig();
        rig.ram.write(Gpa(BUFFER), &[0xee; 8]).unwrap();
        assert_eq!(rig.dma(dma::SELECT, 0, 0), 0);
        assert_eq!(rig.dma(dma::SKIP, 2, 0), 0);
        assert_eq!(rig.dma(dma::READ, 4, BUFFER), 0);
        assert_eq!(rig.buffer(8), *b"MU\0\0\xee\xee\xee\xee");
        assert_eq!(rig.fw_cfg.read(Access::new(1, Width::B1)), Ok(0), "both ways share the offset");
    }

    #[test]
    fn the_pm_base_of_the_moment_is_in_the_tables() {
        let mut rig = rig();
        rig.pm_base.store(0xb000, Ordering::SeqCst);
        let tables = rig.file("etc/acpi/tables");
        assert!(tables.windows(4).any(|bytes| bytes == 0xb008u32.to_le_bytes()));
        rig.pm_base.store(0x600, Ordering::SeqCst);
        assert_eq!(rig.file("etc/acpi/tables"), tables, "once a boot");
        rig.fw_cfg.reset();
        assert_ne!(rig.file("etc/acpi/tables"), tables);
    }

    #[test]
    fn firmware_tells_where_it_put_the_generation_id_and_writes_nothing_else() {
        let mut rig = rig();
        let (guid_key, guid_size) = rig.find(generation::GUID_FILE);
        let (key, size) = rig.find(generation::ADDRESS_FILE);
        assert_eq!((guid_size, size), (4096, 8));
        let page = rig.file(generation::GUID_FILE);
        assert!(page[..40].iter().chain(&page[56..]).all(|byte| *byte == 0));
        assert_eq!(page[40..56], [0x5a; 16]);
        // As SeaBIOS does, in one transfer.
        let at = 0x20_0028u64;
        rig.ram.write(Gpa(BUFFER), &at.to_le_bytes()).unwrap();
        let select = |key: u16| u32::from(key) << 16 | dma::SELECT;
        assert_eq!(rig.dma(select(key) | dma::WRITE, 8, BUFFER), 0);
        assert_eq!(rig.generation.address(), Gpa(at));
        assert_eq!(rig.file(generation::ADDRESS_FILE), at.to_le_bytes());
        // As OVMF does, and in two halves.
        rig.generation.reset();
        assert_eq!(rig.file(generation::ADDRESS_FILE), [0; 8]);
        rig.ram.write(Gpa(BUFFER), &at.to_le_bytes()).unwrap();
        assert_eq!(rig.pio(key, 0), [0u8; 0]);
        assert_eq!([rig.dma(dma::WRITE, 4, BUFFER), rig.dma(dma::WRITE, 4, BUFFER + 4)], [0, 0]);
        assert_eq!(rig.generation.address(), Gpa(at));
        assert_eq!(rig.dma(dma::WRITE, 1, BUFFER), dma::ERROR, "behind its end");
        let renewed = [0xa5; 16];
        rig.generation.renew(renewed);
        assert_eq!(rig.ram.get_u64(Gpa(at + 8)), Ok(0xa5a5_a5a5_a5a5_a5a5));
        rig.fw_cfg.reset();
        assert_eq!(rig.file(generation::GUID_FILE)[40..56], renewed, "the next boot begins with it");
        // Everything else stays as it is.
        for (length, from) in [(9, BUFFER), (u32::MAX, BUFFER), (8, 0xa_0000), (8, u64::MAX - 3), (4, u64::MAX)] {
            assert_eq!(rig.dma(select(key) | dma::WRITE, length, from), dma::ERROR, "{length:#x} from {from:#x}");
        }
        rig.ram.write(Gpa(BUFFER), &[1; 16]).unwrap();
        for other in (0..0x40).chain([key::IRQ0_OVERRIDE, u16::MAX]).filter(|other| *other != key) {
            assert_eq!(rig.dma(select(other) | dma::WRITE, 1, BUFFER), dma::ERROR, "{other:#x}");
        }
        assert_eq!(rig.dma(select(key), 0, 0), 0);
        assert_eq!([rig.dma(dma::SKIP, u32::MAX, 0), rig.dma(dma::WRITE, 8, BUFFER)], [0, dma::ERROR]);
        assert_eq!(rig.pio(guid_key, 41)[40], 0xa5);
        assert_eq!(rig.generation.address(), Gpa(at));
    }

    #[test]
    fn hostile_dma_is_refused_and_never_leaves_ram() {
        let mut rig = rig();
        for (len, address) in [(4, 0xa_0000), (8, 0x9_fffc), (4, u64::MAX - 1), (u32::MAX, 0), (DMA_BYTES_MAX, 0)] {
            assert_eq!(rig.dma(dma::SELECT | dma::READ, len, address), dma::ERROR, "{len:#x} at {address:#x}");
        }
        assert_eq!(rig.dma(dma::WRITE, 4, BUFFER), dma::ERROR);
        assert_eq!(rig.dma(dma::SKIP, u32::MAX, 0), 0);
        assert_eq!(rig.dma(dma::SKIP, u32::MAX, 0), 0);
        assert_eq!(rig.dma(dma::READ, 4, BUFFER), 0);
        assert_eq!(rig.buffer(4), [0; 4]);
        // The command itself lies outside RAM.
        rig.fw_cfg.write(Access::new(4, Width::B4), 0xffff_ffff).unwrap();
        rig.fw_cfg.write(Access::new(8, Width::B4), 0xffff_ffff).unwrap();
        for offset in 0..12 {
            for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
                let _ = rig.fw_cfg.read(Access::new(offset, width));
                let _ = rig.fw_cfg.write(Access::new(offset, width), u64::MAX);
            }
        }
        assert_eq!(rig.pio(key::SIGNATURE, 4), b"QEMU");
    }

    /// Asked for a boot from the network, which is over; the tables name a PM base that is no longer; a read and a DMA address
    /// are half done.
    fn busy(rig: &mut Rig) -> Vec<u8> {
        rig.fw_cfg.reset();
        rig.pm_base.store(0xb000, Ordering::SeqCst);
        let tables = rig.file(acpi::TABLES_FILE);
        rig.pm_base.store(0x600, Ordering::SeqCst);
        rig.pio(key::SIGNATURE, 1);
        rig.fw_cfg.write(Access::new(4, Width::B4), u64::from(1u32.swap_bytes())).unwrap();
        tables
    }

    fn rig_from_network() -> Rig {
        let mut rig = rig();
        let order = FirstBoot::From([vec![BootDevice::Network { slot: 4 }], sample().boot_order].concat());
        let (facts, asked) = (MachineFacts { first_boot: Some(order), ..sample() }, Arc::clone(&rig.pm_base));
        let generation = Generation::new(rig.ram.clone(), [0x5a; 16], || ());
        rig.fw_cfg = FwCfg::for_machine(rig.ram.clone(), facts, generation, move || asked.load(Ordering::SeqCst));
        rig
    }

    #[test]
    fn a_restored_store_reads_on_and_has_the_same_files() {
        let mut first = rig_from_network();
        let tables = busy(&mut first);
        let state = matches_golden(&first.fw_cfg.save());
        let mut second = rig_from_network();
        second.fw_cfg.restore(&state).unwrap();
        let byte = second.fw_cfg.read(Access::new(1, Width::B1));
        assert_eq!(byte, Ok(u64::from(b'E')), "the second letter of QEMU");
        for rig in [&mut first, &mut second] {
            assert_eq!(
                rig.dma(dma::SKIP, 0, 0),
                dma::SKIP,
                "the other half of the address was there, and led past RAM"
            );
        }
        assert_eq!(second.file(acpi::TABLES_FILE), tables);
        assert_eq!(second.file(BOOT_ORDER_FILE), first.file(BOOT_ORDER_FILE));
        second.fw_cfg.reset();
        assert_ne!(second.file(acpi::TABLES_FILE), tables, "the next boot looks anew");

        let mut before = rig_from_network();
        let once = before.file(BOOT_ORDER_FILE);
        let mut after = rig_from_network();
        after.fw_cfg.restore(&before.fw_cfg.save()).unwrap();
        assert_eq!(after.file(BOOT_ORDER_FILE), once, "the first boot is not over");
    }

    #[test]
    fn no_saved_state_makes_it_panic() {
        let mut first = rig_from_network();
        busy(&mut first);
        spoil(&first.fw_cfg.save(), |bad| {
            let mut other = rig_from_network();
            let _ = other.fw_cfg.restore(bad);
            other.fw_cfg.read(Access::new(1, Width::B1)).unwrap();
            other.dma(dma::SKIP, u32::MAX, 0);
            assert_eq!(other.dma(dma::READ, 16, BUFFER), 0);
            other.dma(dma::SKIP, u32::MAX, 0);
            other.file(acpi::TABLES_FILE);
            other.fw_cfg.reset();
            other.file(BOOT_ORDER_FILE);
        });
    }
}
