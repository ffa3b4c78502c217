//! The KVM virtual machine: memory slots, interrupt controllers, doorbells. Only this, `vcpu.rs` and `start_state.rs` name kvm-ioctls.

#![expect(unsafe_code, reason = "KVM memory slots take host addresses")]

use std::{
    ffi::c_ulong,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use kvm_bindings::{
    CpuId, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_enable_cap, kvm_irqchip, kvm_msi, kvm_pit_config, kvm_pit_state2,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::{
    bus::BusView,
    coalesced::{self, CoalescedWrites},
    devices::Board,
    event::Event,
    hyperv::Enlightenments,
    irq::{MsiMessage, MsiSink},
    irq_routes::IrqRoutes,
    layout,
    memory::{Gpa, GuestRam, HostRegion},
    pci::root::Placement,
    saved::{BadState, State},
};

const KVM_API_VERSION: i32 = 12;

/// One virtual machine. Shared by everyone who raises an interrupt or moves a slot.
pub struct Vm {
    fd: VmFd,
    kvm: Kvm,
    /// Kept so that no slot outlives the memory behind it.
    _ram: GuestRam,
    slots: Mutex<Slots>,
    routes: Mutex<IrqRoutes>,
    at_power_on: Mutex<Option<Controllers>>,
    /// The writes to the VGA window that KVM keeps, where it can.
    coalesced: OnceLock<CoalescedWrites>,
}

struct Slots {
    next: u32,
    roms: Vec<HostRegion>,
    video: Option<VideoSlot>,
    flash: Option<FlashSlot>,
}

struct FlashSlot {
    slot: u32,
    array: HostRegion,
    at: u64,
}

struct VideoSlot {
    slot: u32,
    region: HostRegion,
    at: Option<u64>,
}

/// PIC, IOAPIC and PIT. As they were before the first instruction they are kept for resets.
#[derive(Serialize, Deserialize)]
struct Controllers {
    chips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

const KIND_CONTROLLERS: &str = "kvm-controllers";
const KIND_CLOCK: &str = "kvm-clock";
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

fn kvm_error(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> io::Error {
    move |error| io::Error::other(format!("{what}: {}", io::Error::from_raw_os_error(error.errno())))
}

impl Vm {
    /// Makes the machine with its RAM, interrupt controllers and timer.
    ///
    /// Errors: what KVM refused, by name. A machine belongs to the process that calls this.
    pub fn new(kvm: OwnedFd, ram: &GuestRam) -> io::Result<Arc<Vm>> {
        // SAFETY: the descriptor is owned and given away here, and `Kvm` closes it once.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        if kvm.get_api_version() != KVM_API_VERSION {
            return Err(io::Error::other("the kernel's KVM interface is not version 12"));
        }
        let fd = kvm.create_vm().map_err(kvm_error("cannot create the virtual machine"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(kvm_error("cannot place the identity map"))?;
        fd.set_tss_address(layout::KVM_TSS as usize).map_err(kvm_error("cannot place the task state"))?;
        fd.create_irq_chip().map_err(kvm_error("cannot create the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(kvm_error("cannot create the interval timer"))?;
        let routes = IrqRoutes::default();
        fd.set_gsi_routing(&routes.table()?).map_err(kvm_error("cannot route interrupts"))?;
        report_emulation_failures(&fd);
        let slots = Mutex::new(Slots { next: 0, roms: Vec::new(), video: None, flash: None });
        let (routes, at_power_on) = (Mutex::new(routes), Mutex::new(None));
        let vm = Vm { fd, kvm, _ram: ram.clone(), slots, routes, at_power_on, coalesced: OnceLock::new() };
        for range in ram.ranges() {
            vm.add_slot(range.start.0, range.bytes, range.host_address, 0)?;
        }
        Ok(Arc::new(vm))
    }

    /// Maps a region that the guest can read and not write: the firmware below 4 GiB.
    pub fn add_rom(&self, at: Gpa, region: &HostRegion) -> io::Result<()> {
        self.add_slot(at.0, region.bytes() as u64, region.host_address(), KVM_MEM_READONLY)?;
        self.slots().roms.push(region.clone());
        Ok(())
    }

    /// The processor features that this host gives to guests.
    pub fn supported_cpuid(&self) -> io::Result<CpuId> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm_error("cannot read the processor's features"))
    }

    /// What of Hyper-V this KVM can be.
    pub(super) fn enlightenments(&self) -> Option<Enlightenments> {
        Enlightenments::of(|cap| self.fd.check_extension_raw(c_ulong::from(cap)) > 0)
    }

    /// Whether the local timer can run in deadline mode.
    pub fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// The model-specific registers that KVM saves and restores.
    pub fn msr_indexes(&self) -> io::Result<Vec<u32>> {
        let list = self.kvm.get_msr_index_list().map_err(kvm_error("cannot list the model-specific registers"))?;
        Ok(list.as_slice().to_vec())
    }

    pub fn create_vcpu(&self, apic_id: u32) -> io::Result<VcpuFd> {
        self.fd.create_vcpu(u64::from(apic_id)).map_err(kvm_error("cannot create a vCPU"))
    }

    /// Lets KVM keep the guest's writes to the VGA window until [`Board::settle_writes`] puts them on `bus`. Where KVM or the
    /// host's memory does not allow it, each write exits, which is only slower. `vcpu` is any of the machine's: they share the ring.
    pub fn coalesce_window(&self, vcpu: &VcpuFd, bus: BusView) {
        let (window, offset) = (layout::VGA_WINDOW, KVM_COALESCED_MMIO_PAGE_OFFSET);
        // The capability's value is where KVM shows the ring, in pages.
        if self.fd.check_extension_int(Cap::CoalescedMmio) != offset as i32 {
            return;
        }
        // SAFETY: the descriptor is that of `vcpu`, which is borrowed for the whole call.
        let Ok(fd) = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) }.try_clone_to_owned() else { return };
        let at = u64::from(offset) * coalesced::PAGE_BYTES as u64;
        let Ok(page) = HostRegion::shared(File::from(fd), at, coalesced::PAGE_BYTES) else { return };
        // The ring is read before anything is put into it.
        if self.coalesced.set(CoalescedWrites::new(page, window.clone(), bus)).is_ok() {
            let size = (window.end - window.start) as u32;
            let _ = self.fd.register_coalesced_mmio(IoEventAddress::Mmio(window.start), size);
        }
    }

    /// Remembers interrupt controllers and timer as they are; before the first vCPU runs.
    pub fn remember_power_on(&self) -> io::Result<()> {
        *self.at_power_on.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.controllers()?);
        Ok(())
    }

    /// Puts interrupt controllers and timer back; every vCPU is parked.
    pub fn reset(&self) -> io::Result<()> {
        let controllers = self.at_power_on.lock().unwrap_or_else(PoisonError::into_inner);
        controllers.as_ref().map_or(Ok(()), |controllers| self.set_controllers(controllers))
    }

    /// Interrupt controllers and timer; every vCPU is parked.
    pub fn save_controllers(&self) -> io::Result<State> {
        Ok(State::new(KIND_CONTROLLERS, 1, &self.controllers()?))
    }

    /// After the vCPUs, which take what the controllers deliver, and before the devices: a line that was high is known here
    /// already, so that it does not become an edge when its device sets it.
    pub fn restore_controllers(&self, state: &State) -> io::Result<()> {
        let controllers: Controllers = state.fields(KIND_CONTROLLERS, 1).map_err(io::Error::other)?;
        if controllers.chips.iter().map(|chip| chip.chip_id).ne(CHIPS) {
            let bad = BadState::new(KIND_CONTROLLERS, "these are not the interrupt controllers of this machine");
            return Err(io::Error::other(bad));
        }
        self.set_controllers(&controllers)
    }

    /// The guest's clock (kvmclock), in nanoseconds.
    pub fn save_clock(&self) -> io::Result<State> {
        let clock = self.fd.get_clock().map_err(kvm_error("cannot read the guest's clock"))?;
        Ok(State::new(KIND_CLOCK, 1, &clock.clock))
    }

    /// Before the vCPUs: what they tell the guest of time follows from this.
    pub fn restore_clock(&self, state: &State) -> io::Result<()> {
        let clock = state.fields(KIND_CLOCK, 1).map_err(io::Error::other)?;
        let clock = kvm_clock_data { clock, ..Default::default() };
        self.fd.set_clock(&clock).map_err(kvm_error("cannot set the guest's clock"))
    }

    fn controllers(&self) -> io::Result<Controllers> {
        let mut chips = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        for chip in &mut chips {
            self.fd.get_irqchip(chip).map_err(kvm_error("cannot read an interrupt controller"))?;
        }
        let pit = self.fd.get_pit2().map_err(kvm_error("cannot read the interval timer"))?;
        Ok(Controllers { chips, pit })
    }

    fn set_controllers(&self, controllers: &Controllers) -> io::Result<()> {
        for chip in &controllers.chips {
            self.fd.set_irqchip(chip).map_err(kvm_error("cannot set an interrupt controller"))?;
        }
        self.fd.set_pit2(&controllers.pit).map_err(kvm_error("cannot set the interval timer"))
    }

    /// Makes ISA interrupts level-triggered, one bit each: what firmware does through ports 4D0 and 4D1.
    pub fn set_level_triggered(&self, mask: u16) -> io::Result<()> {
        let failed = "cannot set interrupts level-triggered";
        for (chip_id, bits) in [(KVM_IRQCHIP_PIC_MASTER, mask as u8), (KVM_IRQCHIP_PIC_SLAVE, (mask >> 8) as u8)] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).map_err(kvm_error(failed))?;
            chip.chip.pic.elcr = bits;
            self.fd.set_irqchip(&chip).map_err(kvm_error(failed))?;
        }
        Ok(())
    }

    /// How many bits a guest-physical address has.
    pub fn physical_bits(&self) -> u32 {
        const OLDEST: u32 = 36;
        let Ok(cpuid) = self.supported_cpuid() else { return OLDEST };
        let leaf = cpuid.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
        leaf.map_or(OLDEST, |entry| entry.eax & 0xff).clamp(OLDEST, 52)
    }

    fn add_slot(&self, at: u64, bytes: u64, host_address: u64, flags: u32) -> io::Result<()> {
        let mut slots = self.slots();
        self.set_slot(slots.next, at, bytes, host_address, flags)?;
        slots.next += 1;
        Ok(())
    }

    fn set_slot(&self, slot: u32, at: u64, bytes: u64, host_address: u64, flags: u32) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: at,
            memory_size: bytes,
            userspace_addr: host_address,
        };
        // SAFETY: the range is a live mapping: RAM is kept by `_ram`, firmware, flash and video RAM by `slots`, all for as long as
        // the machine. The guest writes there at any time; nothing in this process holds references into it.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(kvm_error("cannot map guest memory"))
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Another handle on the event, as kvm-ioctls takes it. KVM keeps its own reference.
fn eventfd(event: &Event) -> io::Result<EventFd> {
    let duplicate = event.as_fd().try_clone_to_owned()?;
    // SAFETY: the duplicate is owned, and given away here to be closed once.
    Ok(unsafe { EventFd::from_raw_fd(duplicate.into_raw_fd()) })
}

/// Asks for an exit with the instruction's bytes where KVM cannot emulate it. Older kernels do not know this.
fn report_emulation_failures(fd: &VmFd) {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE, ..Default::default() };
    cap.args[0] = 1;
    let _ = fd.enable_cap(&cap);
}

impl Board for Vm {
    fn set_irq(&self, number: u32, high: bool) {
        // Refused only for a pin that is not there, which is our own mistake.
        let _ = self.fd.set_irq_line(number, high);
    }

    fn set_video_ram(&self, region: &HostRegion) {
        let mut slots = self.slots();
        let slot = slots.next;
        slots.next += 1;
        slots.video = Some(VideoSlot { slot, region: region.clone(), at: None });
    }

    fn settle_writes(&self) {
        if let Some(writes) = self.coalesced.get() {
            writes.settle();
        }
    }

    fn set_flash(&self, at: u64, array: &HostRegion) {
        let mut slots = self.slots();
        let slot = slots.next;
        slots.next += 1;
        slots.flash = Some(FlashSlot { slot, array: array.clone(), at });
        drop(slots);
        self.show_flash(true);
    }

    fn show_flash(&self, shown: bool) {
        let slots = self.slots();
        let Some(flash) = &slots.flash else { return };
        let bytes = if shown { flash.array.bytes() as u64 } else { 0 };
        // A slot that KVM refuses leaves the array unmapped: reads exit, and the chip answers them all the same.
        let _ = self.set_slot(flash.slot, flash.at, bytes, flash.array.host_address(), KVM_MEM_READONLY);
    }

    fn take_dirty_video(&self) -> Vec<u64> {
        let slots = self.slots();
        match &slots.video {
            Some(video) if video.at.is_some() => {
                self.fd.get_dirty_log(video.slot, video.region.bytes()).unwrap_or_default()
            }
            _ => Vec::new(),
        }
    }
}

impl MsiSink for Vm {
    fn send(&self, message: MsiMessage) -> io::Result<()> {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        self.fd.signal_msi(msi).map(|_| ()).map_err(kvm_error("cannot send an interrupt message"))
    }

    fn connect(&self, event: &Event, message: MsiMessage) -> io::Result<u32> {
        let event = eventfd(event)?;
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let number = routes.add(message)?;
        let connected = routes.table().and_then(|table| {
            self.fd.set_gsi_routing(&table).map_err(kvm_error("cannot route interrupts"))?;
            self.fd.register_irqfd(&event, number).map_err(kvm_error("cannot connect an interrupt"))
        });
        if connected.is_err() {
            routes.remove(number);
        }
        connected.map(|()| number)
    }

    fn disconnect(&self, event: &Event, number: u32) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        // KVM's table keeps the message until the next change: nothing leads to it. A number that something may still lead to, because
        // this process had no descriptor left, is not used again.
        if eventfd(event).is_ok_and(|event| self.fd.unregister_irqfd(&event, number).is_ok()) {
            routes.remove(number);
        }
    }
}

impl Placement for Vm {
    fn place_video_ram(&self, at: Option<u64>) {
        let mut slots = self.slots();
        let Some(video) = &mut slots.video else { return };
        if video.at == at {
            return;
        }
        let (slot, bytes, host) = (video.slot, video.region.bytes() as u64, video.region.host_address());
        if let Some(old) = video.at.take() {
            let _ = self.set_slot(slot, old, 0, host, 0);
        }
        // A BAR over RAM is refused by KVM: the video RAM is then nowhere, as on a bus with two answers.
        if let Some(new) = at
            && self.set_slot(slot, new, bytes, host, KVM_MEM_LOG_DIRTY_PAGES).is_ok()
            && let Some(video) = &mut slots.video
        {
            video.at = Some(new);
        }
    }

    fn place_doorbell(&self, event: &Event, at: u64, on: bool) {
        let Ok(event) = eventfd(event) else { return };
        let address = IoEventAddress::Mmio(at);
        // Two doorbells at one address can only come from overlapping BARs, which the root refuses.
        let _ = if on {
            self.fd.register_ioevent(&event, &address, NoDatamatch)
        } else {
            self.fd.unregister_ioevent(&event, &address, NoDatamatch)
        };
    }
}
