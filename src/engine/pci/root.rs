//! The PCI root: configuration mechanism #1 (ports CF8 and CFC), bus 0, and where BARs are in the address spaces.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    BarKind, BarSpec, DevFn, PciFunction,
    config::{COMMAND_INTX_DISABLE, ConfigSpace},
    intx::Intx,
    msix::{Msix, MsixTable},
};
use crate::engine::{
    bus::{Access, Bus, BusDevice, BusFault, Effect, Width},
    event::Event,
    irq::{IrqLine, MsiSink},
    saved::{BadState, State},
};

/// What KVM must do when a BAR moves. `vm.rs` in the product, a recorder in tests.
pub trait Placement: Send + Sync {
    /// Maps the video RAM at `at`, or takes it away.
    fn place_video_ram(&self, at: Option<u64>);
    /// Writes to `at` signal `event` while `on`.
    fn place_doorbell(&self, event: &Event, at: u64, on: bool);
}

/// A function, shared between the root and whoever made it.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// What a function is wired to.
pub struct Wiring {
    pub irq: IrqLine,
    pub msix: Arc<Msix>,
}

/// Bus 0 and its configuration ports.
pub struct PciRoot {
    functions: BTreeMap<DevFn, Slot>,
    address: u32,
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    placement: Arc<dyn Placement>,
    sink: Arc<dyn MsiSink>,
}

struct Slot {
    config: ConfigSpace,
    function: SharedFunction,
    msix: Arc<Msix>,
    intx: Intx,
    /// Where each BAR is mapped now.
    mapped: Vec<(BarSpec, Option<u64>)>,
}

const ADDRESS_ENABLE: u32 = 1 << 31;
const KIND: &str = "pci-root";
const KIND_FUNCTION: &str = "pci-function";

mod saved {
    use serde::{Deserialize, Serialize};

    use super::super::msix::Vectors;
    use crate::engine::saved::hex;

    #[derive(Serialize, Deserialize)]
    pub(super) struct RootV1 {
        pub address: u32,
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct FunctionV1 {
        #[serde(with = "hex")]
        pub config: Vec<u8>,
        pub msix: Vectors,
    }
}

/// Names in a saved state: "pci-03.0" is what the function keeps itself.
fn function_name(at: DevFn) -> String {
    format!("pci-{:02x}.{}", at.slot(), at.function())
}
fn config_name(at: DevFn) -> String {
    function_name(at) + "-config"
}

impl PciRoot {
    pub fn new(pio: Arc<Bus>, mmio: Arc<Bus>, placement: Arc<dyn Placement>, sink: Arc<dyn MsiSink>) -> PciRoot {
        PciRoot { functions: BTreeMap::new(), address: 0, pio, mmio, placement, sink }
    }

    /// Adds a function. `make` gets its wiring; `irq` is the PIRQ behind its pin.
    pub fn add<F: PciFunction + 'static>(
        &mut self,
        at: DevFn,
        irq: IrqLine,
        msix_vectors: u16,
        make: impl FnOnce(Wiring) -> F,
    ) -> Arc<Mutex<F>> {
        let made: Result<_, std::convert::Infallible> = self.try_add(at, irq, msix_vectors, |wiring| Ok(make(wiring)));
        match made {
            Ok(function) => function,
        }
    }

    /// As `add`, for a function whose making can fail; nothing is added then.
    pub fn try_add<F: PciFunction + 'static, E>(
        &mut self,
        at: DevFn,
        irq: IrqLine,
        msix_vectors: u16,
        make: impl FnOnce(Wiring) -> Result<F, E>,
    ) -> Result<Arc<Mutex<F>>, E> {
        let intx = Intx::new(irq);
        let msix = Msix::new(msix_vectors, Arc::clone(&self.sink));
        let function = make(Wiring { irq: intx.line(), msix: Arc::clone(&msix) })?;
        let multifunction = at.function() == 0 && at.slot() == crate::engine::layout::slot::PIIX;
        let config = ConfigSpace::new(&function, msix_vectors, multifunction);
        let mapped = config.bars().iter().map(|bar| (*bar, None)).collect();
        let function = Arc::new(Mutex::new(function));
        let slot = Slot { config, function: function.clone(), msix, intx, mapped };
        let before = self.functions.insert(at, slot);
        assert!(before.is_none(), "two functions at {at:?}");
        Ok(function)
    }

    /// Everything back to the state after power on; all BARs unmapped.
    pub fn reset(&mut self) {
        self.address = 0;
        let all: Vec<DevFn> = self.functions.keys().copied().collect();
        for at in all {
            self.reset_function(at);
        }
    }

    fn reset_function(&mut self, at: DevFn) {
        if let Some(slot) = self.functions.get_mut(&at) {
            slot.config.reset();
            slot.msix.reset();
            lock(&slot.function).reset();
            slot.intx.set_disabled(false);
            let config = *slot.config.bytes();
            lock(&slot.function).config_written(&config, 0x40, Width::B8);
        }
        self.remap(at);
    }

    /// Takes a function out: it is reset, its pin is low, nothing of it is mapped any more. Every vCPU is parked; one may keep the
    /// function alive in its copy of a bus map, and reaches it no more.
    pub fn remove(&mut self, at: DevFn) {
        self.reset_function(at);
        if let Some(slot) = self.functions.remove(&at) {
            slot.intx.line().set(false);
        }
    }

    /// Whether there is a function at this place.
    pub fn has(&self, at: DevFn) -> bool {
        self.functions.contains_key(&at)
    }

    /// The root's own state, and of each function its configuration and what it keeps itself, by name.
    pub fn save(&self) -> Vec<(String, State)> {
        let own = State::new(KIND, 1, &saved::RootV1 { address: self.address });
        let mut all = vec![("pci".to_owned(), own)];
        for (at, slot) in &self.functions {
            let fields = saved::FunctionV1 { config: slot.config.bytes().to_vec(), msix: slot.msix.save() };
            all.push((config_name(*at), State::new(KIND_FUNCTION, 1, &fields)));
            all.push((function_name(*at), lock(&slot.function).save()));
        }
        all
    }

    /// Onto functions as after power on. `take` gives, and takes away, the state of a name.
    pub fn restore(&mut self, take: &mut dyn FnMut(&str) -> Result<State, BadState>) -> Result<(), BadState> {
        let root: saved::RootV1 = take("pci")?.fields(KIND, 1)?;
        self.address = root.address;
        let all: Vec<DevFn> = self.functions.keys().copied().collect();
        for at in all {
            let saved: saved::FunctionV1 = take(&config_name(at))?.fields(KIND_FUNCTION, 1)?;
            let own = take(&function_name(at))?;
            let Some(slot) = self.functions.get_mut(&at) else { continue };
            let bytes = saved.config.as_slice().try_into();
            slot.config.restore(bytes.map_err(|_| BadState::new(KIND_FUNCTION, "its configuration is not 256 bytes"))?);
            let control = slot.config.msix_at().map_or(0, |at| slot.config.u16_at(at + 2));
            let fits = slot.msix.restore(&saved.msix, control);
            BadState::unless(fits, KIND_FUNCTION, "it has another number of interrupt vectors")?;
            slot.intx.set_disabled(slot.config.command() & COMMAND_INTX_DISABLE != 0);
            lock(&slot.function).restore(&own)?;
            self.remap(at);
        }
        Ok(())
    }

    /// Reads configuration space as the guest does. No function reads as ones.
    pub fn read(&mut self, at: DevFn, offset: u8, width: Width) -> u64 {
        let Some(slot) = self.functions.get_mut(&at) else { return width.mask() };
        slot.config.set_interrupt_status(slot.intx.level());
        let config = *slot.config.bytes();
        let own = if offset >= 0x40 { lock(&slot.function).config_read(&config, offset, width) } else { None };
        own.unwrap_or_else(|| slot.config.read(offset, width)) & width.mask()
    }

    /// Writes configuration space as the guest does, and moves what that moves.
    pub fn write(&mut self, at: DevFn, offset: u8, width: Width, value: u64) {
        let Some(slot) = self.functions.get_mut(&at) else { return };
        slot.config.write(offset, width, value);
        slot.intx.set_disabled(slot.config.command() & COMMAND_INTX_DISABLE != 0);
        if let Some(msix) = slot.config.msix_at()
            && (msix..msix + 4).contains(&offset)
        {
            slot.msix.set_control(slot.config.u16_at(msix + 2));
        }
        if usize::from(offset) + width.bytes() > 0x40 {
            let config = *slot.config.bytes();
            lock(&slot.function).config_written(&config, offset, width);
        } else {
            self.remap(at);
        }
    }

    /// Brings the address spaces in line with the BARs of one function.
    fn remap(&mut self, at: DevFn) {
        let Some(slot) = self.functions.get_mut(&at) else { return };
        for index in 0..slot.mapped.len() {
            let Some(&(bar, before)) = slot.mapped.get(index) else { continue };
            let after = slot.config.bar_address(bar);
            if before == after {
                continue;
            }
            let mover = Mover { slot, pio: &self.pio, mmio: &self.mmio, placement: &*self.placement, bar };
            if let Some(address) = before {
                mover.unmap(address);
            }
            let now = after.filter(|address| mover.map(*address));
            if let Some(entry) = slot.mapped.get_mut(index) {
                entry.1 = now;
            }
        }
    }

    fn target(&self, offset: u64) -> Option<(DevFn, u8)> {
        let bus = self.address >> 16 & 0xff;
        if self.address & ADDRESS_ENABLE == 0 || bus != 0 {
            return None;
        }
        let register = (self.address & 0xfc) as u8 + (offset & 3) as u8;
        Some((DevFn((self.address >> 8) as u8), register))
    }
}

/// One BAR on its way into or out of an address space.
struct Mover<'a> {
    slot: &'a Slot,
    pio: &'a Arc<Bus>,
    mmio: &'a Arc<Bus>,
    placement: &'a dyn Placement,
    bar: BarSpec,
}

impl Mover<'_> {
    fn map(&self, at: u64) -> bool {
        if self.bar.kind == BarKind::Ram {
            self.placement.place_video_ram(Some(at));
            return true;
        }
        let device: Arc<Mutex<dyn BusDevice>> = if self.slot.config.msix_bar() == Some(self.bar.index) {
            Arc::new(Mutex::new(MsixTable(Arc::clone(&self.slot.msix))))
        } else {
            Arc::new(Mutex::new(BarRegion { function: Arc::clone(&self.slot.function), bar: self.bar.index }))
        };
        // The guest may lay a BAR over another or over a fixed device: it stays unmapped, as on a bus where nobody answers.
        let done = self.bus().map(at..at + u64::from(self.bar.size_bytes), device).is_ok();
        if done {
            self.doorbells(at, true);
        }
        done
    }

    fn unmap(&self, at: u64) {
        if self.bar.kind == BarKind::Ram {
            self.placement.place_video_ram(None);
            return;
        }
        self.doorbells(at, false);
        self.bus().unmap(at);
    }

    fn doorbells(&self, at: u64, on: bool) {
        for doorbell in lock(&self.slot.function).doorbells() {
            if doorbell.bar == self.bar.index {
                self.placement.place_doorbell(&doorbell.event, at + doorbell.offset, on);
            }
        }
    }

    fn bus(&self) -> &Arc<Bus> {
        if self.bar.kind == BarKind::Io { self.pio } else { self.mmio }
    }
}

/// A BAR of a function as a device on a bus.
struct BarRegion {
    function: SharedFunction,
    bar: u8,
}

impl BusDevice for BarRegion {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        lock(&self.function).bar_read(self.bar, at)
    }
    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        lock(&self.function).bar_write(self.bar, at, value)
    }
}

/// Port CF8.
pub struct AddressPort(pub Arc<Mutex<PciRoot>>);

impl BusDevice for AddressPort {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        if at.width != Width::B4 {
            return Err(BusFault::BadWidth);
        }
        Ok(u64::from(self.0.lock().unwrap_or_else(PoisonError::into_inner).address))
    }
    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        if at.width != Width::B4 {
            return Err(BusFault::BadWidth);
        }
        self.0.lock().unwrap_or_else(PoisonError::into_inner).address = value as u32;
        Ok(Effect::None)
    }
}

/// Ports CFC to CFF.
pub struct DataPort(pub Arc<Mutex<PciRoot>>);

impl BusDevice for DataPort {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        let mut root = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match root.target(at.offset) {
            Some((function, register)) => Ok(root.read(function, register, at.width)),
            None => Err(BusFault::NoDevice),
        }
    }
    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        let mut root = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((function, register)) = root.target(at.offset) {
            root.write(function, register, at.width, value);
        }
        Ok(Effect::None)
    }
}

fn lock(function: &SharedFunction) -> std::sync::MutexGuard<'_, dyn PciFunction + 'static> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{
        pci::{PciIdentity, msix::tests::Sent},
        saved::SaveState,
    };

    struct Probe {
        bars: [BarSpec; 2],
    }
    impl SaveState for Probe {
        fn save(&self) -> State {
            State::nothing("probe")
        }
        fn restore(&mut self, state: &State) -> Result<(), BadState> {
            state.expect_nothing("probe")
        }
    }
    impl PciFunction for Probe {
        fn identity(&self) -> PciIdentity {
            PciIdentity {
                vendor: 0x1af4,
                device: 0x1044,
                class: 0xff0000,
                revision: 1,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
                interrupt_pin: 1,
            }
        }
        fn bars(&self) -> &[BarSpec] {
            &self.bars
        }
        fn bar_read(&mut self, bar: u8, at: Access) -> Result<u64, BusFault> {
            Ok(u64::from(bar) << 8 | at.offset)
        }
        fn bar_write(&mut self, _: u8, _: Access, _: u64) -> Result<Effect, BusFault> {
            Ok(Effect::None)
        }
        fn reset(&mut self) {}
    }

    #[derive(Default)]
    struct Places;
    impl Placement for Places {
        fn place_video_ram(&self, _: Option<u64>) {}
        fn place_doorbell(&self, _: &Event, _: u64, _: bool) {}
    }

    fn machine() -> (Arc<Bus>, Arc<Bus>, Arc<Mutex<PciRoot>>) {
        let (pio, mmio) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let mut root = PciRoot::new(Arc::clone(&pio), Arc::clone(&mmio), Arc::new(Places), Arc::new(Sent::default()));
        for slot in [3, 4] {
            root.add(DevFn::new(slot, 0), IrqLine::unconnected(), 2, |_| Probe {
                bars: [
                    BarSpec { index: 0, size_bytes: 32, kind: BarKind::Io },
                    BarSpec { index: 4, size_bytes: 16 << 10, kind: BarKind::Registers64 },
                ],
            });
        }
        let root = Arc::new(Mutex::new(root));
        pio.map(0xcf8..0xcf9, Arc::new(Mutex::new(AddressPort(Arc::clone(&root))))).unwrap();
        pio.map(0xcfc..0xd00, Arc::new(Mutex::new(DataPort(Arc::clone(&root))))).unwrap();
        (pio, mmio, root)
    }

    #[test]
    fn a_bar_is_sized_placed_moved_and_disabled_like_firmware_does() {
        let (pio, mmio, _root) = machine();
        let mut ports = pio.view();
        let mut set = |register: u64, width, value| {
            ports.write(0xcf8, Width::B4, 0x8000_1800 | register & 0xfc);
            ports.write(0xcfc + (register & 3), width, value);
            ports.read(0xcfc + (register & 3), width)
        };
        assert_eq!(set(0x00, Width::B4, 0), 0x1044_1af4, "identity is read-only");
        assert_eq!(set(0x10, Width::B4, 0xffff_ffff), 0xffff_ffe1);
        assert_eq!(set(0x20, Width::B4, 0xffff_ffff), 0xffff_c004);
        set(0x20, Width::B4, 0);
        assert_eq!(set(0x24, Width::B4, 0xe0), 0xe0);
        assert_eq!(set(0x14, Width::B4, 0xffff_ffff), 0xffff_f000, "MSI-X");
        set(0x10, Width::B4, 0xc000);
        let mut memory = mmio.view();
        assert_eq!(memory.read(0xe0_0000_0010, Width::B4), 0xffff_ffff, "memory is not enabled");
        set(0x04, Width::B2, 3);
        assert_eq!(memory.read(0xe0_0000_0010, Width::B4), 0x410);
        let mut others = pio.view();
        assert_eq!(others.read(0xc004, Width::B2), 4);
        set(0x24, Width::B4, 0xe1);
        assert_eq!(memory.read(0xe0_0000_0010, Width::B4), 0xffff_ffff, "moved away");
        assert_eq!(memory.read(0xe1_0000_0010, Width::B4), 0x410);
        set(0x04, Width::B2, 0);
        assert_eq!(memory.read(0xe1_0000_0010, Width::B4), 0xffff_ffff);
    }

    #[test]
    fn a_bar_over_another_stays_unmapped_and_comes_back_when_there_is_room() {
        let (pio, _mmio, root) = machine();
        let mut root = root.lock().unwrap();
        let (first, second) = (DevFn::new(3, 0), DevFn::new(4, 0));
        for at in [first, second] {
            root.write(at, 0x10, Width::B4, 0xc000);
            root.write(at, 0x04, Width::B2, 1);
        }
        let mut ports = pio.view();
        assert_eq!(ports.read(0xc000, Width::B1), 0);
        root.write(second, 0x10, Width::B4, 0xc100);
        assert_eq!(ports.read(0xc101, Width::B1), 1);
        root.reset();
        assert_eq!(ports.read(0xc101, Width::B1), 0xff);
        assert_eq!(root.read(second, 0x10, Width::B4), 1);
    }

    #[test]
    fn functions_come_and_go_while_others_look() {
        let (pio, mmio, shared) = machine();
        let (mut ports, mut memory) = (pio.view(), mmio.view());
        let mut root = shared.lock().unwrap();
        let at = DevFn::new(4, 0);
        root.write(at, 0x10, Width::B4, 0xc000);
        root.write(at, 0x20, Width::B4, 0xe000_0000);
        root.write(at, 0x04, Width::B2, 3);
        assert_eq!((ports.read(0xc004, Width::B1), memory.read(0xe000_0008, Width::B2)), (4, 0x408));
        root.remove(at);
        root.remove(at);
        assert!(!root.has(at));
        assert_eq!((ports.read(0xc004, Width::B1), memory.read(0xe000_0008, Width::B2)), (0xff, 0xffff));
        assert_eq!(root.read(at, 0, Width::B4), 0xffff_ffff);
        root.write(at, 0x04, Width::B2, 3);
        let (line, levels) = crate::engine::irq::tests::recorder();
        let mut pin = IrqLine::unconnected();
        root.add(at, line, 0, |wiring| {
            pin = wiring.irq;
            Probe {
                bars: [
                    BarSpec { index: 0, size_bytes: 32, kind: BarKind::Io },
                    BarSpec { index: 4, size_bytes: 4 << 10, kind: BarKind::Registers64 },
                ],
            }
        });
        assert_eq!(root.read(at, 0x10, Width::B4), 1, "as after power on");
        root.write(at, 0x10, Width::B4, 0xc000);
        root.write(at, 0x04, Width::B2, 1);
        assert_eq!(ports.read(0xc004, Width::B1), 4);
        // It does not even lower its pin when it is reset.
        pin.set(true);
        root.remove(at);
        assert_eq!(*levels.lock().unwrap(), [true, false]);
        assert_eq!(ports.read(0xc004, Width::B1), 0xff);
    }

    #[test]
    fn strange_configuration_accesses_are_answered() {
        let (pio, _mmio, _root) = machine();
        let mut ports = pio.view();
        ports.write(0xcf8, Width::B4, 0x8001_1800);
        assert_eq!(ports.read(0xcfc, Width::B4), 0xffff_ffff, "no bus 1");
        ports.write(0xcf8, Width::B4, 0x8000_f800);
        assert_eq!(ports.read(0xcfc, Width::B4), 0xffff_ffff, "no such device");
        ports.write(0xcf8, Width::B4, 0x8000_18fc);
        assert_eq!(ports.read(0xcff, Width::B4), 0xffff_ff00, "past the end");
        ports.write(0xcff, Width::B8, u64::MAX);
        ports.write(0xcf8, Width::B4, 0x1800);
        assert_eq!(ports.read(0xcfc, Width::B4), 0xffff_ffff, "not enabled");
    }
}
