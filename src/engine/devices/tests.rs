//! The machine without KVM: what firmware does to it is replayed from `tests/golden/traces`, and what it is, is compared.

mod plug;

use std::{
    io::{Seek, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    engine::{
        bus::{BusView, Effect, Width},
        event::Event,
        facts::{BootDevice, FirstBoot, tests::sample},
        irq::MsiMessage,
        memory::Gpa,
        pci::{BarKind, root::PciRoot},
        saved::{BadState, State},
        suspend::States,
    },
    spec::{
        Boot, BootFrom, DiskBus, DiskSpec, NetworkBackend, NetworkModel, NetworkSpec, RateLimit,
        tests::sample as sample_spec,
    },
    switches::Switches,
    types::{Id, MacAddr},
};

const DEADLINE: Duration = Duration::from_secs(20);
const DISK_BYTES: u64 = 1 << 20;

/// Stands in for KVM.
#[derive(Default)]
struct Recorder {
    video_at: Mutex<Option<u64>>,
    doorbells: Mutex<Vec<u64>>,
}

impl Placement for Recorder {
    fn place_video_ram(&self, at: Option<u64>) {
        *self.video_at.lock().unwrap() = at;
    }
    fn place_doorbell(&self, _: &Event, at: u64, on: bool) {
        let mut doorbells = self.doorbells.lock().unwrap();
        if on { doorbells.push(at) } else { doorbells.retain(|other| *other != at) }
    }
}

impl MsiSink for Recorder {
    fn send(&self, _: MsiMessage) -> io::Result<()> {
        Ok(())
    }
}

impl Board for Recorder {
    fn set_irq(&self, _: u32, _: bool) {}
    fn set_video_ram(&self, _: &HostRegion) {}
    fn settle_writes(&self) {}
    fn set_flash(&self, _: u64, _: &HostRegion) {}
    fn show_flash(&self, _: bool) {}
    fn take_dirty_video(&self) -> Vec<u64> {
        Vec::new()
    }
}

struct Rig {
    devices: Devices,
    board: Arc<Recorder>,
    ram: GuestRam,
    pio: BusView,
    mmio: BusView,
    /// The other end of the card's.
    network: UnixStream,
}

/// `pc-1` with two processors, a virtio disk, an AHCI disk, a network and an empty CD drive.
fn rig(memory_bytes: u64) -> Rig {
    rig_with(memory_bytes, &[DiskBus::Virtio, DiskBus::Ahci], NetworkModel::Virtio)
}

fn rig_with(memory_bytes: u64, buses: &[DiskBus], model: NetworkModel) -> Rig {
    let disk = |bus| DiskSpec { id: Id::random(), bus, read_only: false, slot: None, limit: RateLimit::default() };
    rig_of(GuestSpec {
        memory_bytes,
        disks: buses.iter().map(|bus| disk(*bus)).collect(),
        network: Some(card(model)),
        ..sample_spec()
    })
}

fn card(model: NetworkModel) -> NetworkSpec {
    NetworkSpec { mac: MacAddr([0x52, 0x54, 0, 1, 2, 3]), backend: NetworkBackend::Passt, model }
}

fn image() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"BOOT").unwrap();
    file.rewind().unwrap();
    file.set_len(DISK_BYTES).unwrap();
    file
}

/// With two processors.
fn rig_of(spec: GuestSpec) -> Rig {
    let spec = GuestSpec { cpus: 2, ..spec };
    let memory_bytes = spec.memory_bytes;
    let (near, far) = UnixStream::pair().unwrap();
    // Its emulator has gone; the registers are there all the same.
    let socket = || UnixStream::pair().unwrap().0;
    let tpm = spec.switches.tpm.then(|| EmulatorSockets { control: socket(), commands: socket() });
    let files = DeviceFiles {
        disks: spec.disks.iter().map(|_| image()).collect(),
        cd: None,
        network: vec![near.into()],
        vsock: None,
        tpm,
        vga_rom: Some(vec![0x55; 512]),
        network_rom: Some(vec![0xaa; 512]),
        flash: None,
    };
    let listeners = Listeners {
        host_fault: Arc::new(|_| ()),
        addresses: Arc::new(|_| ()),
        panic: Arc::new(|_| ()),
        agent: Arc::new(|| ()),
        watchdog: Arc::new(|| ()),
    };
    let facts =
        MachineFacts { cpus: 2, tpm: spec.switches.tpm, memory_bytes, boot_order: boot_order(&spec), ..sample() };
    let board = Arc::new(Recorder::default());
    let seen: Arc<dyn Board> = Arc::clone(&board) as _;
    let ram = GuestRam::new(memory_bytes).unwrap();
    let log = GuestLog::new(tempfile::tempfile().unwrap());
    let devices = Devices::new(&seen, &ram, &spec, &facts, files, &listeners, &log).unwrap();
    let (pio, mmio) = (devices.pio.view(), devices.mmio.view());
    Rig { devices, board, ram, pio, mmio, network: far }
}

/// Where an access goes.
#[derive(Debug, Clone, Copy)]
enum Place {
    Port(u64, Width),
    Config { address: u64, register: u64, width: Width },
    Memory(u64, Width),
    Ram(u64),
}

fn number(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap_or_else(|_| panic!("{text} is not a number"))
}

/// The place and the words after it.
fn place<'a>(words: &'a [&'a str]) -> (Place, &'a [&'a str]) {
    if words[0] == "ram" {
        return (Place::Ram(number(words[1])), &words[2..]);
    }
    let width = Width::from_bytes(number(words[1]) as usize).unwrap();
    let place = match words[0] {
        "port" => Place::Port(number(words[2]), width),
        "mmio" => Place::Memory(number(words[2]), width),
        "config" => {
            let (function, register) = words[2].split_once(':').unwrap();
            let (slot, function) = function.split_once('.').unwrap();
            let register = number(register);
            let address = 1 << 31 | number(slot) << 11 | number(function) << 8 | register & 0xfc;
            Place::Config { address, register, width }
        }
        other => panic!("no place {other}"),
    };
    (place, &words[3..])
}

impl Rig {
    fn read(&mut self, place: Place) -> u64 {
        match place {
            Place::Port(at, width) => self.pio.read(at, width),
            Place::Memory(at, width) => self.mmio.read(at, width),
            Place::Config { address, register, width } => {
                assert_eq!(self.pio.write(0xcf8, Width::B4, address), Effect::None);
                self.pio.read(0xcfc + (register & 3), width)
            }
            Place::Ram(at) => self.ram.get_u16(Gpa(at)).unwrap().into(),
        }
    }

    fn write(&mut self, place: Place, value: u64) {
        let effect = match place {
            Place::Port(at, width) => self.pio.write(at, width, value),
            Place::Memory(at, width) => self.mmio.write(at, width, value),
            Place::Config { address, register, width } => {
                assert_eq!(self.pio.write(0xcf8, Width::B4, address), Effect::None);
                self.pio.write(0xcfc + (register & 3), width, value)
            }
            Place::Ram(at) => {
                self.ram.write(Gpa(at), &[value as u8]).unwrap();
                Effect::None
            }
        };
        assert_eq!(effect, Effect::None, "{place:?}");
    }

    fn misses(&self) -> u64 {
        self.devices.pio.misses() + self.devices.mmio.misses()
    }

    /// Carries out one line of a trace.
    fn step(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (mode, words) = match words[0] {
            mode @ ("absent" | "poll") => (mode, &words[1..]),
            _ => ("", &words[..]),
        };
        let (place, rest) = place(words);
        let (what, values) = (rest[0], rest[1..].iter().map(|value| number(value)).collect::<Vec<_>>());
        let before = self.misses();
        if mode == "absent" {
            return self.nobody_answers(place, what, &values, before);
        }
        let end = Instant::now() + if mode == "poll" { DEADLINE } else { Duration::ZERO };
        match (what, place) {
            ("r", Place::Ram(at)) => {
                let expected: Vec<u8> = values.iter().map(|value| *value as u8).collect();
                loop {
                    let mut seen = vec![0; expected.len()];
                    self.ram.read(Gpa(at), &mut seen).unwrap();
                    if seen == expected {
                        break;
                    }
                    assert!(Instant::now() < end, "{seen:x?} and not {expected:x?}");
                    thread::sleep(Duration::from_micros(100));
                }
            }
            ("w", Place::Ram(at)) => {
                (at..).zip(values).for_each(|(at, value)| self.write(Place::Ram(at), value));
            }
            ("r", _) => loop {
                let seen = self.read(place);
                if values.first().is_none_or(|expected| seen == *expected) {
                    break;
                }
                assert!(Instant::now() < end, "{seen:#x}");
                thread::sleep(Duration::from_micros(100));
            },
            ("w", _) => values.into_iter().for_each(|value| self.write(place, value)),
            (other, _) => panic!("no access {other}"),
        }
        assert_eq!(self.misses(), before, "no device answered");
    }

    fn nobody_answers(&mut self, place: Place, what: &str, values: &[u64], before: u64) {
        if let Place::Config { width, .. } = place {
            return assert_eq!(self.read(place), width.mask(), "a function is there");
        }
        if what == "w" {
            values.iter().for_each(|value| self.write(place, *value));
        } else {
            self.read(place);
        }
        assert!(self.misses() > before, "a device answered; the trace says that ours has none");
    }

    fn replay(&mut self, name: &str) {
        let text = std::fs::read_to_string(golden(&format!("traces/{name}.txt"))).unwrap();
        for (number, line) in text.lines().enumerate() {
            let access = line.split('#').next().unwrap_or_default().trim();
            if !access.is_empty() {
                let step = std::panic::AssertUnwindSafe(|| self.step(access));
                assert!(std::panic::catch_unwind(step).is_ok(), "{name}.txt, line {}: {line}", number + 1);
            }
        }
    }

    /// A file of fw_cfg, through its ports.
    fn file(&mut self, name: &str) -> Vec<u8> {
        let byte = |rig: &mut Rig| rig.pio.read(0x511, Width::B1) as u8;
        let number = |rig: &mut Rig, bytes: usize| (0..bytes).fold(0usize, |sum, _| sum << 8 | usize::from(byte(rig)));
        self.pio.write(0x510, Width::B2, 0x19);
        for _ in 0..number(self, 4) {
            let (bytes, key) = (number(self, 4), number(self, 2));
            number(self, 2);
            let found: Vec<u8> = (0..56).map(|_| number(self, 1) as u8).take_while(|byte| *byte != 0).collect();
            number(self, 55 - found.len());
            if found == name.as_bytes() {
                self.pio.write(0x510, Width::B2, key as u64);
                return (0..bytes).map(|_| number(self, 1) as u8).collect();
            }
        }
        panic!("no file {name}");
    }

    /// The PM ports that the ACPI tables name.
    fn pm_ports_in_tables(&mut self) -> [u32; 3] {
        let tables = self.file("etc/acpi/tables");
        let fadt = tables.windows(4).position(|word| word == b"FACP").unwrap();
        [56, 64, 76].map(|at| u32::from_le_bytes(tables[fadt + at..fadt + at + 4].try_into().unwrap()))
    }
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

#[test]
fn seabios_finds_every_device_that_it_touches() {
    let mut rig = rig(256 << 20);
    assert_eq!(*rig.board.video_at.lock().unwrap(), None);
    rig.replay("seabios-pc");
    assert_eq!(*rig.board.video_at.lock().unwrap(), Some(0xfd00_0000));
    assert_eq!(rig.pm_ports_in_tables(), [0x600, 0x604, 0x608]);
    assert_eq!(rig.file("vgaroms/vgabios-stdvga.bin").len(), 512);
    assert_eq!(rig.file("pci1af4,1041.rom"), [0xaa; 512]);
}

#[test]
fn ovmf_finds_every_device_that_it_touches() {
    let mut rig = rig(512 << 20);
    rig.replay("ovmf-pc");
    assert_eq!(*rig.board.video_at.lock().unwrap(), Some(0x8000_0000));
    assert_eq!(rig.pm_ports_in_tables(), [0xb000, 0xb004, 0xb008], "the tables follow the PM block");
    assert_eq!(*rig.board.doorbells.lock().unwrap(), [0xe0_0000_3000, 0xe0_0000_3004], "two queues");
}

#[test]
fn seabios_reads_a_sector_from_virtio() {
    let mut rig = rig(256 << 20);
    rig.replay("seabios-virtio-blk");
    assert_eq!(*rig.board.doorbells.lock().unwrap(), [0xfe00_3000, 0xfe00_3004], "two queues");
}

#[test]
fn a_reset_lets_the_firmware_begin_anew() {
    let mut rig = rig(256 << 20);
    for _ in 0..3 {
        for trace in ["seabios-pc", "ovmf-pc"] {
            rig.replay(trace);
            rig.replay("seabios-virtio-blk");
            rig.devices.hold();
            rig.devices.reset();
            rig.devices.release();
            assert_eq!(*rig.board.video_at.lock().unwrap(), None);
            assert_eq!(*rig.board.doorbells.lock().unwrap(), [0u64; 0]);
        }
    }
}

/// One function a paragraph: identity, BARs, capabilities byte by byte.
fn describe(rig: &Rig) -> String {
    let mut root = rig.devices.pci.lock().unwrap();
    let mut out = String::new();
    for at in (0..32).flat_map(|slot| (0..8).map(move |function| DevFn::new(slot, function))) {
        let mut get = |register: u8, width| root.read(at, register, width);
        if get(0, Width::B2) == 0xffff {
            continue;
        }
        out += &format!(
            "{:02x}.{} {:04x}:{:04x} class {:06x} revision {:02x} subsystem {:04x}:{:04x} pin {} header {:02x}\n",
            at.slot(),
            at.function(),
            get(0x00, Width::B2),
            get(0x02, Width::B2),
            get(0x08, Width::B4) >> 8,
            get(0x08, Width::B1),
            get(0x2c, Width::B2),
            get(0x2e, Width::B2),
            get(0x3d, Width::B1),
            get(0x0e, Width::B1),
        );
        out += &bars(&mut root, at);
        out += &capabilities(&mut root, at);
    }
    out
}

fn bars(root: &mut PciRoot, at: DevFn) -> String {
    let mut out = String::new();
    let mut index = 0;
    while index < 6 {
        let register = 0x10 + 4 * index;
        root.write(at, register, Width::B4, 0xffff_ffff);
        let probe = root.read(at, register, Width::B4);
        root.write(at, register, Width::B4, 0);
        let (kind, mask) = match probe & 0xf {
            1 => (BarKind::Io, !3),
            0 => (BarKind::Registers, !15),
            4 => (BarKind::Registers64, !15),
            _ => (BarKind::Ram, !15),
        };
        if probe != 0 {
            out += &format!("  bar {index} {kind:?} {:#x}\n", (!(probe & mask) & 0xffff_ffff) + 1);
        }
        index += if kind == BarKind::Registers64 && probe != 0 { 2 } else { 1 };
    }
    out
}

fn capabilities(root: &mut PciRoot, at: DevFn) -> String {
    const MSIX: u64 = 0x11;
    let mut out = String::new();
    let mut offset = root.read(at, 0x34, Width::B1) as u8;
    while offset != 0 {
        let bytes = match root.read(at, offset, Width::B1) {
            MSIX => 12,
            _ => root.read(at, offset + 2, Width::B1) as u8,
        };
        let hex: Vec<String> =
            (0..bytes).map(|index| format!("{:02x}", root.read(at, offset + index, Width::B1))).collect();
        out += &format!("  capability {offset:02x}: {}\n", hex.join(" "));
        offset = root.read(at, offset + 1, Width::B1) as u8;
    }
    out
}

#[test]
fn the_machine_pc_1_is_what_it_was() {
    let found = describe(&rig(16 << 20));
    let expected = std::fs::read_to_string(golden("pc-1.txt")).unwrap_or_default();
    assert!(found == expected, "tests/golden/pc-1.txt is a promise to guests that exist. Now the machine is:\n{found}");
}

#[test]
fn firmware_is_told_the_order_that_the_specification_says() {
    let disk = |bus| DiskSpec { id: Id::random(), bus, read_only: false, slot: None, limit: RateLimit::default() };
    let disks = vec![disk(DiskBus::Virtio), disk(DiskBus::Ahci), disk(DiskBus::Virtio)];
    let network = NetworkSpec {
        mac: MacAddr([0x52, 0x54, 0, 1, 2, 3]),
        backend: NetworkBackend::Passt,
        model: NetworkModel::Virtio,
    };
    let last = BootFrom::Disk(disks[2].id.clone());
    let mut spec = GuestSpec { boot: Boot::Bios, disks, network: Some(network), ..sample_spec() };
    let [first, ahci, third] = [
        BootDevice::VirtioDisk { slot: slot::DISK },
        BootDevice::AhciDisk { port: 0 },
        BootDevice::VirtioDisk { slot: slot::DISK + 1 },
    ];
    let cd = BootDevice::AhciCd { port: CD_PORT };
    assert_eq!(boot_order(&spec), [first, ahci, third, cd], "the network is asked only when it is named");
    assert_eq!(first_boot(&spec), None);
    spec.boot_order = vec![BootFrom::Cd, last.clone()];
    assert_eq!(boot_order(&spec), [cd, third, first, ahci]);
    spec.first_boot = Some(spec::FirstBoot::From(BootFrom::Network));
    let pxe = BootDevice::Network { slot: slot::NETWORK };
    assert_eq!(first_boot(&spec), Some(FirstBoot::From(vec![pxe, cd, third, first, ahci])));
    spec.first_boot = Some(spec::FirstBoot::From(last));
    assert_eq!(first_boot(&spec), Some(FirstBoot::From(vec![third, cd, first, ahci])));
    spec.first_boot = Some(spec::FirstBoot::Setup);
    assert_eq!(first_boot(&spec), Some(FirstBoot::Menu));
}

#[test]
fn a_renewed_generation_is_an_event_at_the_port_of_the_tables() {
    let mut rig = rig(16 << 20);
    rig.devices.generation.placed(Gpa(0x7_0028));
    rig.devices.generation.renew([7; 16]);
    assert_eq!(rig.read(Place::Port(layout::GPE0.start, Width::B2)), 1 << layout::GPE_GENERATION);
    assert_eq!(rig.read(Place::Ram(0x7_0028)), 0x0707);
    rig.devices.hold();
    rig.devices.reset();
    rig.devices.release();
    assert_eq!(rig.devices.generation.address(), Gpa(0));
    assert_eq!(rig.read(Place::Port(layout::GPE0.start, Width::B2)), 0);
    assert_eq!(rig.file("etc/vmgenid_guid")[40..56], [7; 16]);
}

#[test]
fn disks_on_virtio_and_nvme_share_the_slots_in_their_order() {
    let rig = rig_with(16 << 20, &[DiskBus::Nvme, DiskBus::Ahci, DiskBus::Virtio, DiskBus::Nvme], NetworkModel::Virtio);
    {
        let mut root = rig.devices.pci.lock().unwrap();
        let ids = [8, 9, 10, 11].map(|slot| root.read(DevFn::new(slot, 0), 0, Width::B4));
        assert_eq!(ids, [0x0010_1b36, 0x1042_1af4, 0x0010_1b36, 0xffff_ffff]);
    }
    rig.devices.hold();
    rig.devices.reset();
    rig.devices.release();
    let disk = |bus| DiskSpec { id: Id::random(), bus, read_only: false, slot: None, limit: RateLimit::default() };
    let disks = [DiskBus::Nvme, DiskBus::Ahci, DiskBus::Virtio, DiskBus::Nvme].map(disk).to_vec();
    let order = boot_order(&GuestSpec { disks, ..sample_spec() });
    let expected = [
        BootDevice::NvmeDisk { slot: 8 },
        BootDevice::AhciDisk { port: 0 },
        BootDevice::VirtioDisk { slot: 9 },
        BootDevice::NvmeDisk { slot: 10 },
        BootDevice::AhciCd { port: CD_PORT },
    ];
    assert_eq!(order, expected);
}

#[test]
fn a_usb_disk_brings_its_controller_and_takes_no_slot() {
    let rig = rig_with(16 << 20, &[DiskBus::Usb, DiskBus::Virtio, DiskBus::Usb], NetworkModel::Virtio);
    assert!(rig.devices.usb.is_some());
    {
        let mut root = rig.devices.pci.lock().unwrap();
        let ids = [8, 9, slot::XHCI].map(|slot| root.read(DevFn::new(slot, 0), 0, Width::B4));
        assert_eq!(ids, [0x1042_1af4, 0xffff_ffff, 0x000d_1b36]);
    }
    let disk = |bus| DiskSpec { id: Id::random(), bus, read_only: false, slot: None, limit: RateLimit::default() };
    let disks = [DiskBus::Usb, DiskBus::Virtio, DiskBus::Usb].map(disk).to_vec();
    let expected = [
        BootDevice::UsbDisk { number: 1 },
        BootDevice::VirtioDisk { slot: 8 },
        BootDevice::UsbDisk { number: 2 },
        BootDevice::AhciCd { port: CD_PORT },
    ];
    assert_eq!(boot_order(&GuestSpec { disks, ..sample_spec() }), expected);
    assert!(rig_with(16 << 20, &[DiskBus::Virtio], NetworkModel::Virtio).devices.usb.is_none());
}

#[test]
fn an_e1000_is_in_the_place_of_the_virtio_card() {
    let mut rig = rig_with(16 << 20, &[DiskBus::Virtio], NetworkModel::E1000);
    let found = describe(&rig);
    let card = "04.0 8086:100e class 020000 revision 03 subsystem 1af4:1100 pin 1 header 00\n  \
                bar 0 Registers 0x20000\n  bar 1 Io 0x40\n05.0";
    assert!(found.contains(card), "{found}");
    crate::engine::pci::assign::assign(&mut rig.devices.pci.lock().unwrap());
    let [memory, ports] = [0x10, 0x14].map(|bar| {
        let at = Place::Config { address: 1 << 31 | 4 << 11 | bar, register: bar, width: Width::B4 };
        rig.read(at) & !15
    });
    rig.write(Place::Port(ports, Width::B4), 8);
    for at in [Place::Memory(memory + 8, Width::B4), Place::Port(ports + 4, Width::B4)] {
        assert_eq!(rig.read(at), 0x283, "its status register");
    }
    for _ in 0..2 {
        rig.devices.hold();
        rig.devices.reset();
        rig.devices.release();
    }
    assert_eq!(rig.board.doorbells.lock().unwrap().len(), 0);
}

/// A state by its name, which a machine that is restored asks for once.
fn taken(states: &mut States, name: &str) -> Result<State, BadState> {
    let at = states.iter().position(|(other, _)| other == name);
    let at = at.ok_or_else(|| BadState::new(name, "is not there"))?;
    Ok(states.swap_remove(at).1)
}

#[test]
fn a_card_that_is_both_answers_as_both_and_goes_on_after_a_suspension() {
    const STATUS: u64 = 0x14;
    const DISPI_WIDTH: u64 = 0x502;
    let spec = GuestSpec { switches: Switches { gpu: true, ..Switches::default() }, ..sample_spec() };
    let bar = |rig: &mut Rig, register: u64| {
        let address = 1 << 31 | u64::from(slot::VGA) << 11 | register;
        rig.read(Place::Config { address, register, width: Width::B4 }) & !15
    };
    let mut rig = rig_of(spec.clone());
    crate::engine::pci::assign::assign(&mut rig.devices.pci.lock().unwrap());
    let [video, vga, virtio] = [0x10, 0x18, 0x20].map(|register| bar(&mut rig, register));
    assert!(video != 0 && vga != 0 && virtio != 0);
    rig.write(Place::Memory(vga + DISPI_WIDTH, Width::B2), 800);
    rig.write(Place::Memory(virtio + STATUS, Width::B1), 3);
    rig.devices.hold();
    let mut states = rig.devices.save();
    let mut again = rig_of(spec);
    again.devices.hold();
    again.devices.restore(&mut |name| taken(&mut states, name)).unwrap();
    again.devices.release();
    assert!(states.is_empty(), "{states:?}");
    assert_eq!([0x10, 0x18, 0x20].map(|register| bar(&mut again, register)), [video, vga, virtio]);
    assert_eq!(again.read(Place::Memory(vga + DISPI_WIDTH, Width::B2)), 800);
    assert_eq!(again.read(Place::Memory(virtio + STATUS, Width::B1)), 3);
}

#[test]
fn the_vga_is_a_virtio_card_as_well_when_the_guest_wants_one() {
    let card = DevFn::new(slot::VGA, 0);
    for gpu in [false, true] {
        let rig = rig_of(GuestSpec { switches: Switches { gpu, ..Switches::default() }, ..sample_spec() });
        let mut root = rig.devices.pci.lock().unwrap();
        assert_eq!(root.read(card, 0, Width::B4), if gpu { 0x1050_1af4 } else { 0x1111_1234 });
        assert_eq!(root.read(card, 0x0a, Width::B2), 0x0300, "a VGA either way");
        drop(root);
        assert_eq!(rig.devices.screen.wish_size(800, 600), gpu);
        rig.devices.hold();
        assert_eq!(
            rig.devices.save().iter().any(|(_, state)| state.bytes.windows(10).any(|part| part == b"virtio-gpu")),
            gpu
        );
    }
}

#[test]
fn a_virtio_keyboard_is_in_its_slot_only_of_a_guest_that_wants_one() {
    for virtio_keyboard in [false, true] {
        let rig = rig_of(GuestSpec { switches: Switches { virtio_keyboard, ..Switches::default() }, ..sample_spec() });
        let found = rig.devices.pci.lock().unwrap().read(DevFn::new(slot::KEYBOARD, 0), 0, Width::B4);
        assert_eq!(found, if virtio_keyboard { 0x1052_1af4 } else { 0xffff_ffff });
        assert_eq!(rig.devices.keyboard.is_some(), virtio_keyboard);
        assert!(rig.devices.keyboard.as_ref().is_none_or(|keyboard| !keyboard.has_driver()));
        rig.devices.hold();
        let states = rig.devices.save();
        let has =
            |kind: &[u8]| states.iter().any(|(_, state)| state.bytes.windows(kind.len()).any(|part| part == kind));
        assert_eq!((has(b"virtio-keyboard"), has(b"virtio-input")), (virtio_keyboard, true));
    }
}

#[test]
fn a_tpm_is_in_its_place_and_in_the_tables_only_of_a_guest_that_wants_one() {
    for tpm in [false, true] {
        let mut rig = rig_of(GuestSpec { switches: Switches { tpm, ..Switches::default() }, ..sample_spec() });
        let interface = rig.read(Place::Memory(layout::TPM.start + 0x30, Width::B4));
        assert_eq!(interface & 0xf, if tpm { 1 } else { 0xf });
        let tables = rig.file("etc/acpi/tables");
        assert_eq!(tables.windows(4).any(|word| word == b"TPM2"), tpm);
        if tpm {
            assert_eq!(rig.file("etc/tpm/log"), vec![0; 64 << 10]);
        }
        rig.devices.release();
        rig.devices.hold();
        rig.devices.settle().unwrap();
        assert_eq!(rig.devices.save().iter().any(|(name, _)| name == "tpm"), tpm);
        rig.devices.reset();
        rig.devices.release();
    }
}
