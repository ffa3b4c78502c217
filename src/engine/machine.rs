//! One machine from a specification: made once, then run, paused, reset and ended. Owned by the engine's main thread.
//!
//! ```text
//! pause   vCPUs park  →  held writes land  →  workers hold     reset   pause  →  devices, KVM's chips, memory image, vCPUs
//! resume  workers go  →  vCPUs run                                     →  resume
//! suspend pause  →  states of devices, chips, vCPUs; memory          restore  memory, clock, vCPUs, chips, devices  →  resume
//! ```

use std::{
    fs::File,
    io::{self, Read, Seek},
    ops::ControlFlow,
    os::{
        fd::OwnedFd,
        unix::{fs::FileExt, net::UnixListener},
    },
    sync::{Arc, PoisonError},
};

use sha2::{Digest, Sha256};

use super::{
    boot::{self, DirectBoot, StartMode, StartState},
    devices::{Board, DeviceFiles, Devices, Listeners, boot_order, first_boot},
    facts::{MachineFacts, pci_memory_64},
    layout,
    log::GuestLog,
    memory::{Gpa, GuestRam, HostRegion},
    pci::assign,
    suspend::{self, Memory, Reader, States, Written},
    topology::Topology,
    tpm::EmulatorSockets,
    variables,
    vcpu::{EventSink, Vcpu, VcpuConfig},
    vm::Vm,
};
use crate::spec::{Boot, FirstBoot, GuestSpec, RateLimit};

/// The built-in test guest, assembled from `testguest.S`.
const TEST_GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/testguest.bin"));
const TEST_GUEST_AT: Gpa = Gpa(0x7c00);
const TEST_GUEST_CMDLINE_AT: Gpa = Gpa(0x600);
/// What of a firmware image appears below 1 MiB.
const LOW_FIRMWARE_BYTES: usize = 128 << 10;
const FIRMWARE_BYTES_MAX: u64 = 16 << 20;
/// To catch devices and controllers in one moment; events from outside are milliseconds apart.
const SAVE_ATTEMPTS: u32 = 1000;
const VGA_ROM_BYTES_MAX: u64 = 256 << 10;
/// The space for option ROMs below 1 MiB.
const NETWORK_ROM_BYTES_MAX: u64 = 128 << 10;
/// SCI and the PCI interrupts, as firmware sets them in ELCR.
const LEVEL_TRIGGERED: u16 = 1 << 9 | 1 << 10 | 1 << 11;

/// The descriptors that the engine was handed for the machine itself.
pub struct MachineFiles {
    pub kvm: OwnedFd,
    pub firmware: Option<File>,
    /// Of UEFI firmware.
    pub variables: Option<File>,
    pub vga_rom: Option<File>,
    /// For a BIOS that is to boot from the network.
    pub network_rom: Option<File>,
    pub kernel: Option<File>,
    pub initrd: Option<File>,
    pub disks: Vec<File>,
    pub cd: Option<File>,
    /// The queues of a tap, or one socket; empty without a network.
    pub network: Vec<OwnedFd>,
    /// Of a guest with a socket device.
    pub vsock: Option<UnixListener>,
    /// Of a guest with a TPM.
    pub tpm: Option<EmulatorSockets>,
    /// The saved state that the machine goes on from.
    pub saved: Option<File>,
}

/// What is in memory before the first instruction.
enum BootImage {
    Firmware(HostRegion),
    Test { cmdline: String },
    Kernel { kernel: File, initrd: Option<File>, cmdline: String },
}

pub struct Machine {
    /// Ends first: no vCPU touches a device that is gone.
    vcpus: Vec<Vcpu>,
    pub devices: Devices,
    vm: Arc<Vm>,
    ram: GuestRam,
    facts: MachineFacts,
    image: BootImage,
    /// What it was restored from, until it goes on.
    saved: Option<Reader>,
}

impl Machine {
    /// Makes the machine, paused: powered on and before its first instruction, or where a saved state stopped.
    pub fn new(
        spec: &GuestSpec,
        files: MachineFiles,
        listeners: &Listeners,
        vcpu_events: EventSink,
        log: &GuestLog,
    ) -> io::Result<Machine> {
        let saved = files.saved.map(|file| saved_state_of(spec, file)).transpose()?;
        let ram = GuestRam::with_pages(spec.memory_bytes, spec.switches.huge_pages)?;
        let vm = Vm::new(files.kvm, &ram)?;
        let facts = facts(spec, &vm);
        let rom = |file: Option<File>, bytes_max, name| file.map(|file| read_all(file, bytes_max, name)).transpose();
        let vga_rom = rom(files.vga_rom, VGA_ROM_BYTES_MAX, "the VGA option ROM")?;
        let network_rom = rom(files.network_rom, NETWORK_ROM_BYTES_MAX, "the network card's option ROM")?;
        let image = match &spec.boot {
            Boot::Bios | Boot::Uefi { .. } => BootImage::Firmware(map_firmware(&vm, files.firmware)?),
            Boot::Test { cmdline } => BootImage::Test { cmdline: cmdline.clone() },
            Boot::Kernel { cmdline, .. } => {
                let kernel = files.kernel.ok_or_else(|| io::Error::other("no kernel was handed to the engine"))?;
                BootImage::Kernel { kernel, initrd: files.initrd, cmdline: cmdline.clone() }
            }
        };
        let flash = match (&spec.boot, &image, files.variables) {
            (Boot::Uefi { .. }, BootImage::Firmware(code), Some(file)) => {
                if spec.first_boot == Some(FirstBoot::Setup) {
                    ask_for_setup(&file)?;
                }
                Some(place_flash(file, code)?)
            }
            (Boot::Uefi { .. }, ..) => return Err(io::Error::other("no variables were handed to the engine")),
            _ => None,
        };
        let device_files = DeviceFiles {
            disks: files.disks,
            cd: files.cd,
            network: files.network,
            vsock: files.vsock,
            tpm: files.tpm,
            vga_rom,
            network_rom,
            flash,
        };
        let board: Arc<dyn Board> = Arc::clone(&vm) as _;
        let devices = Devices::new(&board, &ram, spec, &facts, device_files, listeners, log)?;
        let mut machine = Machine { vcpus: Vec::new(), devices, vm, ram, facts, image, saved: None };
        machine.vm.remember_power_on()?;
        let start = if saved.is_some() { None } else { machine.load()? };
        for index in 0..spec.cpus {
            let config = VcpuConfig {
                index,
                topology: machine.facts.topology,
                model: spec.cpu_model,
                hyperv: spec.switches.hyperv,
                start: if index == 0 { start } else { None },
                pio: machine.devices.pio.view(),
                mmio: machine.devices.mmio.view(),
                events: Arc::clone(&vcpu_events),
            };
            machine.vcpus.push(Vcpu::new(&machine.vm, config)?);
        }
        if let Some(reader) = saved {
            machine.restore(reader)?;
        }
        Ok(machine)
    }

    /// Writes the paused machine to a file, from which another goes on. `progress` gets the bytes of memory that were looked at.
    ///
    /// Errors: as `suspend::write`; this machine can go on after any.
    pub fn suspend(
        &self,
        spec: &GuestSpec,
        file: &File,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> io::Result<Written> {
        self.devices.settle()?;
        let mut states = self.save_at_rest()?;
        states.push(("clock".into(), self.vm.save_clock()?));
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            states.push((format!("vcpu-{index}"), vcpu.save(&self.vm)?));
        }
        suspend::write(file, spec, &states, &self.memory(), progress)
    }

    /// Devices and interrupt controllers of the same moment. People type and clocks ring while a guest is paused: a line that rose between
    /// the two would be known to one of them only, and never become an edge again.
    fn save_at_rest(&self) -> io::Result<States> {
        for _ in 0..SAVE_ATTEMPTS {
            let before = self.vm.save_controllers()?;
            let mut states = self.devices.save();
            if self.vm.save_controllers()? == before {
                states.push(("controllers".into(), before));
                return Ok(states);
            }
        }
        Err(io::Error::other("its devices do not come to rest"))
    }

    /// Onto a machine as after power on. The order matters: what takes long comes first, since clocks go on from the moment in which
    /// they are set; then each part before those that signal to it.
    fn restore(&mut self, mut reader: Reader) -> io::Result<()> {
        self.devices.hold();
        reader.read_memory(&self.memory())?;
        self.vm.restore_clock(&reader.take("clock").map_err(io::Error::other)?)?;
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            vcpu.restore(&reader.take(&format!("vcpu-{index}")).map_err(io::Error::other)?)?;
        }
        self.vm.restore_controllers(&reader.take("controllers").map_err(io::Error::other)?)?;
        self.devices.restore(&mut |name| reader.take(name)).map_err(io::Error::other)?;
        if let Some(name) = reader.left() {
            return Err(io::Error::other(format!("the saved state has a part that this machine has not: {name}")));
        }
        self.devices.screen.redraw();
        // Switches and neighbours may have forgotten the guest. Its card's worker, which is held, has it announce itself when it
        // goes on.
        if let Some(link) = self.devices.network_link() {
            link.announce();
        }
        self.saved = Some(reader);
        Ok(())
    }

    /// From here on the guest goes on in this machine and in no other: what it was restored from is of no more use. Before the
    /// first `resume`; says whether it was restored.
    pub fn begin(&mut self) -> io::Result<bool> {
        match self.saved.take() {
            Some(reader) => reader.spend().map(|()| true),
            None => Ok(false),
        }
    }

    fn memory(&self) -> Memory<'_> {
        Memory { ram: &self.ram, video: &self.devices.video }
    }

    /// Stops the guest; returns when no vCPU runs and no I/O is in flight. Again is nothing.
    pub fn pause(&self) {
        for vcpu in &self.vcpus {
            vcpu.ask_to_park();
        }
        for vcpu in &self.vcpus {
            vcpu.wait_parked();
        }
        self.vm.settle_writes();
        self.devices.hold();
    }

    pub fn resume(&self) {
        self.devices.release();
        for vcpu in &self.vcpus {
            vcpu.run();
        }
    }

    /// As a reset button: leaves the machine paused before its first instruction.
    ///
    /// Errors: the image cannot be loaded again, or KVM refuses a state; the guest cannot go on then.
    pub fn reset(&mut self) -> io::Result<()> {
        self.pause();
        self.devices.reset();
        self.vm.reset()?;
        let start = self.load()?;
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            vcpu.reset(if index == 0 { start } else { None })?;
        }
        Ok(())
    }

    /// When the first vCPU went into the guest for the first time, on the monotonic clock.
    pub fn first_run_us(&self) -> Option<u64> {
        self.vcpus.first().and_then(Vcpu::first_run_us)
    }

    /// Exits of all vCPUs to this process.
    pub fn exits(&self) -> u64 {
        self.vcpus.iter().map(Vcpu::exits).sum()
    }

    /// Puts the boot image into memory. Returns where the first vCPU begins; `None` for the processor's own reset vector.
    fn load(&mut self) -> io::Result<Option<StartState>> {
        match &self.image {
            BootImage::Firmware(region) => {
                let mut low = vec![0; LOW_FIRMWARE_BYTES.min(region.bytes())];
                region.read(region.bytes() - low.len(), &mut low);
                let at = Gpa(layout::BIOS_AREA.end - low.len() as u64);
                self.ram.write(at, &low).map_err(io::Error::other)?;
                Ok(None)
            }
            BootImage::Test { cmdline } => {
                self.without_firmware()?;
                self.ram.write(TEST_GUEST_AT, TEST_GUEST).map_err(io::Error::other)?;
                let mut text = cmdline.clone().into_bytes();
                text.push(0);
                self.ram.write(TEST_GUEST_CMDLINE_AT, &text).map_err(io::Error::other)?;
                let mode = StartMode::Real { cs: 0, ip: TEST_GUEST_AT.0 as u16 };
                Ok(Some(StartState { mode }))
            }
            BootImage::Kernel { kernel, initrd, cmdline } => {
                self.without_firmware()?;
                let facts = MachineFacts { pm_base: layout::PM_BASE, ..self.facts.clone() };
                let generation = &self.devices.generation;
                let direct = DirectBoot { kernel, initrd: initrd.as_ref(), cmdline, generation };
                boot::load(&self.ram, &facts, &direct).map(Some).map_err(io::Error::other)
            }
        }
    }

    /// What firmware would have done (engine's part of a direct boot): PCI, interrupt triggers, a text screen.
    fn without_firmware(&self) -> io::Result<()> {
        assign::assign(&mut self.devices.pci.lock().unwrap_or_else(PoisonError::into_inner));
        self.vm.set_level_triggered(LEVEL_TRIGGERED)?;
        self.devices.vga.lock().unwrap_or_else(PoisonError::into_inner).start_in_text_mode();
        Ok(())
    }
}

/// Opens the saved state of the very same machine.
fn saved_state_of(spec: &GuestSpec, file: File) -> io::Result<Reader> {
    let reader = Reader::open(file)?;
    // What a single start does otherwise is over; limits, the boot order and the medium in the drive may change at any time; and disks
    // are where their slots say, in whatever order they came.
    let lasting = |spec: &GuestSpec| {
        let mut spec = GuestSpec { first_boot: None, cd: false, boot_order: Vec::new(), ..spec.with_slots() };
        spec.disks.iter_mut().for_each(|disk| disk.limit = RateLimit::default());
        spec.disks.sort_by_key(|disk| disk.slot);
        spec
    };
    if lasting(reader.spec()) != lasting(spec) {
        return Err(io::Error::other("the guest was changed after it was suspended; discard its saved state"));
    }
    Ok(reader)
}

fn facts(spec: &GuestSpec, vm: &Vm) -> MachineFacts {
    let digest = Sha256::digest(spec.id.as_str());
    let (mut uuid, mut generation) = ([0; 16], [0; 16]);
    uuid.copy_from_slice(&digest[..16]);
    generation.copy_from_slice(&digest[16..]);
    // RFC 9562, version 8: made by our own rule, from the guest's id.
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    MachineFacts {
        cpus: spec.cpus,
        topology: Topology::of(spec),
        memory_bytes: spec.memory_bytes,
        name: spec.name.to_string(),
        uuid,
        generation,
        pm_base: layout::PM_BASE,
        pci_memory_64: pci_memory_64(spec.memory_bytes, vm.physical_bits()),
        tpm: spec.switches.tpm,
        boot_order: boot_order(spec),
        first_boot: first_boot(spec),
    }
}

/// The firmware's end is at 4 GiB; the guest reads it there and cannot write it.
fn map_firmware(vm: &Vm, file: Option<File>) -> io::Result<HostRegion> {
    let file = file.ok_or_else(|| io::Error::other("no firmware was handed to the engine"))?;
    let bytes = read_all(file, FIRMWARE_BYTES_MAX, "the firmware")?;
    if bytes.len() < LOW_FIRMWARE_BYTES || !bytes.len().is_multiple_of(4096) {
        return Err(io::Error::other(format!("the firmware has {} bytes: it is cut or no firmware", bytes.len())));
    }
    let region = HostRegion::new(bytes.len())?;
    region.write(0, &bytes);
    vm.add_rom(Gpa(layout::HIGH_RAM_START - bytes.len() as u64), &region)?;
    Ok(region)
}

/// The variables end where the firmware's code begins.
fn place_flash(file: File, code: &HostRegion) -> io::Result<(File, Gpa)> {
    let below_4_gib = code.bytes() as u64 + file.metadata()?.len();
    if below_4_gib > FIRMWARE_BYTES_MAX {
        return Err(io::Error::other("the file with the firmware's variables is damaged: it is too large"));
    }
    Ok((file, Gpa(layout::HIGH_RAM_START - below_4_gib)))
}

/// Has the firmware show its setup at the next boot, as a running system asks for it: by its variable OsIndications.
fn ask_for_setup(mut file: &File) -> io::Result<()> {
    file.rewind()?;
    let mut store = Vec::new();
    file.take(FIRMWARE_BYTES_MAX).read_to_end(&mut store)?;
    let change = variables::ask_for_setup(&store).map_err(|bad| {
        io::Error::other(format!(
            "{bad}, so the firmware's setup cannot be asked for; reset the firmware, or start without it"
        ))
    })?;
    file.write_all_at(&change.bytes, change.at as u64)
}

fn read_all(file: File, at_most: u64, what: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(at_most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > at_most {
        return Err(io::Error::other(format!("{what} is larger than {at_most} bytes")));
    }
    Ok(bytes)
}
