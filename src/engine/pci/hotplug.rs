//! The controller of PCI hot plug, as QEMU's PC has it (its `docs/specs/acpi_pci_hotplug.rst`): four registers of one bit a slot.
//!
//! ```text
//! 0  up         slots that were filled; the guest's event handler reads them, which clears them        read
//! 4  down       slots that shall be emptied; a bit stays until the slot is empty                       read
//! 8  eject      one empties the slot, when that was asked for                                          write, reads as 0
//! c  removable  slots that can be filled and emptied at all                                            read
//!
//! in    machine: function on the bus ──▶ up, event ──▶ guest: Notify(slot, 1), finds it
//! out   machine: down, event ──▶ guest: Notify(slot, 3), lets go, eject ──▶ Effect::Eject ──▶ machine: takes the function out
//! ```
//!
//! A guest empties no slot by itself: what it has is what its owner configured. A slot that nobody asked for stays as it is.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::engine::{
    bus::{Access, BusDevice, BusFault, Effect, SharedDevice},
    layout,
    saved::{BadState, SaveState, State},
};

/// The controller. Cloning gives another handle on the same registers.
#[derive(Clone)]
pub struct Hotplug {
    registers: Arc<Mutex<Registers>>,
    /// Raises the event that has the guest read the registers.
    raise: Arc<dyn Fn() + Send + Sync>,
}

/// Sets of slots, a bit each.
#[derive(Default)]
struct Registers {
    up: u32,
    down: u32,
    /// Some of `down` that the guest has let go, and the machine has not taken out yet.
    ejected: u32,
}

impl Hotplug {
    pub fn new(raise: impl Fn() + Send + Sync + 'static) -> Hotplug {
        Hotplug { registers: Arc::default(), raise: Arc::new(raise) }
    }

    /// The registers, `layout::PCI_HOTPLUG`.
    pub fn ports(&self) -> SharedDevice {
        Arc::new(Mutex::new(HotplugPorts(self.clone())))
    }

    /// Tells the guest that `slot` was filled. The function is on the bus already.
    pub fn filled(&self, slot: u8) {
        self.lock().up |= bit(slot);
        (self.raise)();
    }

    /// Asks the guest to let go of what is in `slot`; again is another event.
    pub fn ask_for(&self, slot: u8) {
        self.lock().down |= bit(slot);
        (self.raise)();
    }

    /// Whether the guest was asked for what is in `slot`, and it is still there.
    pub fn is_asked_for(&self, slot: u8) -> bool {
        self.lock().down & bit(slot) != 0
    }

    /// The slots that the guest was asked for.
    pub fn asked_for(&self) -> Vec<u8> {
        slots(self.lock().down)
    }

    /// The slots that the guest has let go since the last call.
    pub fn take_ejected(&self) -> Vec<u8> {
        slots(std::mem::take(&mut self.lock().ejected))
    }

    /// `slot` is empty.
    pub fn emptied(&self, slot: u8) {
        let mut registers = self.lock();
        let others = !bit(slot);
        registers.up &= others;
        registers.down &= others;
        registers.ejected &= others;
    }

    /// Back to the state after power on. What was asked for is out already: the machine takes it out at a reset.
    pub fn reset(&self) {
        *self.lock() = Registers::default();
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bit of a slot; none for one that cannot be filled.
fn bit(slot: u8) -> u32 {
    1u32.checked_shl(slot.into()).unwrap_or(0) & layout::slot::PLUGGABLE
}

fn slots(set: u32) -> Vec<u8> {
    (0..32).filter(|slot| set & 1 << slot != 0).collect()
}

struct HotplugPorts(Hotplug);

/// Bits of the registers in the sixteen bytes of the block.
const UP_SHIFT: u32 = 0;
const DOWN_SHIFT: u32 = 32;
const EJECT_SHIFT: u32 = 64;
const REMOVABLE_SHIFT: u32 = 96;

/// Where in the block an access begins, in bits.
fn shift(at: Access) -> Result<u32, BusFault> {
    u32::try_from(at.offset).ok().filter(|offset| *offset < 16).map(|offset| 8 * offset).ok_or(BusFault::NoRegister)
}

impl BusDevice for HotplugPorts {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        let shift = shift(at)?;
        let mut registers = self.0.lock();
        let block = u128::from(registers.up) << UP_SHIFT
            | u128::from(registers.down) << DOWN_SHIFT
            | u128::from(layout::slot::PLUGGABLE) << REMOVABLE_SHIFT;
        let touched = u128::from(at.width.mask()) << shift;
        registers.up &= !((touched >> UP_SHIFT) as u32);
        Ok((block >> shift) as u64)
    }

    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        let written = u128::from(value & at.width.mask()) << shift(at)?;
        let mut registers = self.0.lock();
        let let_go = (written >> EJECT_SHIFT) as u32 & registers.down;
        registers.ejected |= let_go;
        Ok(if let_go == 0 { Effect::None } else { Effect::Eject })
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    pub(super) const KIND: &str = "pci-hotplug";

    /// Nothing is ejected and still there while a guest is suspended: what its vCPUs asked for is done before.
    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) up: u32,
        pub(super) down: u32,
    }
}

impl SaveState for Hotplug {
    fn save(&self) -> State {
        let Registers { up, down, ejected: _ } = &*self.lock();
        State::new(saved::KIND, 1, &saved::V1 { up: *up, down: *down })
    }

    /// The event is the PM block's to keep.
    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { up, down } = state.fields(saved::KIND, 1)?;
        let good = (up | down) & !layout::slot::PLUGGABLE == 0;
        BadState::unless(good, saved::KIND, "a slot that is always as it is")?;
        *self.lock() = Registers { up, down, ejected: 0 };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::engine::{
        bus::Width,
        layout::slot,
        saved::testing::{matches_golden, spoil},
    };

    struct Rig {
        hotplug: Hotplug,
        ports: SharedDevice,
        raised: Arc<AtomicUsize>,
    }

    fn rig() -> Rig {
        let raised = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&raised);
        let hotplug = Hotplug::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        Rig { ports: hotplug.ports(), hotplug, raised }
    }

    impl Rig {
        fn read(&self, offset: u64, width: Width) -> u64 {
            self.ports.lock().unwrap().read(Access::new(offset, width)).unwrap() & width.mask()
        }
        fn write(&self, offset: u64, width: Width, value: u64) -> Effect {
            self.ports.lock().unwrap().write(Access::new(offset, width), value).unwrap()
        }
    }

    #[test]
    fn a_filled_slot_is_told_once() {
        let rig = rig();
        rig.hotplug.filled(slot::DISK);
        rig.hotplug.filled(slot::DISK + 1);
        assert_eq!(rig.raised.load(Ordering::SeqCst), 2);
        assert_eq!(rig.read(0, Width::B4), 0x300);
        assert_eq!(rig.read(0, Width::B4), 0);
        rig.hotplug.filled(slot::DISK);
        rig.hotplug.filled(slot::SPARE);
        assert_eq!(rig.read(1, Width::B1), 1);
        assert_eq!(rig.read(0, Width::B4), 0x0100_0000, "what was not read stays");
        assert_eq!(rig.read(0xc, Width::B4), 0xff00_ff10, "the card, the disks, the spare ones");
    }

    #[test]
    fn a_slot_is_emptied_when_that_was_asked_for() {
        let rig = rig();
        rig.hotplug.ask_for(9);
        rig.hotplug.ask_for(4);
        assert_eq!((rig.raised.load(Ordering::SeqCst), rig.read(4, Width::B4)), (2, 0x210));
        assert_eq!(rig.read(4, Width::B4), 0x210, "not cleared by a look");
        assert_eq!(rig.write(8, Width::B4, 1 << 9), Effect::Eject);
        assert_eq!(
            rig.write(8, Width::B4, 1 << 9),
            Effect::Eject,
            "by another vCPU, before the machine has come to it"
        );
        assert_eq!(rig.hotplug.take_ejected(), [9]);
        assert_eq!(rig.hotplug.take_ejected(), [0u8; 0]);
        rig.hotplug.emptied(9);
        assert_eq!(rig.write(8, Width::B4, 1 << 9), Effect::None, "again");
        assert!(rig.hotplug.is_asked_for(4) && !rig.hotplug.is_asked_for(9));
        assert_eq!(rig.hotplug.asked_for(), [4]);
        assert_eq!(rig.write(8, Width::B1, 0x10), Effect::Eject, "a byte is enough");
        assert_eq!(rig.hotplug.take_ejected(), [4]);
    }

    #[test]
    fn slots_that_nobody_asked_for_stay_as_they_are() {
        let rig = rig();
        for value in [0, 1, 1 << 2, 1 << 8, 1 << 31, u64::MAX] {
            for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
                for offset in 0..16 {
                    assert_eq!(rig.write(offset, width, value), Effect::None, "{offset} {width:?} {value:x}");
                }
            }
        }
        for always in [slot::HOST_BRIDGE, slot::PIIX, slot::VGA, slot::AHCI, slot::XHCI, 32, 255] {
            rig.hotplug.ask_for(always);
            assert!(!rig.hotplug.is_asked_for(always));
        }
        assert_eq!(rig.write(8, Width::B4, u64::MAX), Effect::None);
        rig.hotplug.ask_for(8);
        rig.hotplug.ask_for(15);
        assert_eq!(rig.write(8, Width::B8, u64::MAX), Effect::Eject, "all ones are all that was asked for");
        assert_eq!(rig.hotplug.take_ejected(), [8, 15]);
        assert_eq!([rig.read(8, Width::B4), rig.read(15, Width::B8)], [0, 0xff]);
        assert!(rig.ports.lock().unwrap().read(Access::new(16, Width::B1)).is_err());
        assert!(rig.ports.lock().unwrap().write(Access::new(u64::MAX, Width::B8), 1).is_err());
    }

    #[test]
    fn a_reset_forgets_everything() {
        let rig = rig();
        rig.hotplug.filled(8);
        rig.hotplug.ask_for(9);
        rig.write(8, Width::B4, 1 << 9);
        rig.hotplug.reset();
        assert_eq!([rig.read(0, Width::B4), rig.read(4, Width::B4)], [0, 0]);
        assert!(rig.hotplug.take_ejected().is_empty());
    }

    #[test]
    fn what_was_asked_for_is_still_asked_for_after_a_restore() {
        let rig = rig();
        rig.hotplug.filled(10);
        rig.hotplug.ask_for(9);
        let state = matches_golden(&rig.hotplug.save());
        let mut second = self::rig();
        second.hotplug.restore(&state).unwrap();
        assert_eq!([second.read(0, Width::B4), second.read(4, Width::B4)], [1 << 10, 1 << 9]);
        assert_eq!(second.write(8, Width::B4, 1 << 9), Effect::Eject);
        assert_eq!(second.hotplug.take_ejected(), [9]);
        assert_eq!(second.raised.load(Ordering::SeqCst), 0, "the event was raised before");
    }

    #[test]
    fn a_spoilt_state_harms_nobody() {
        let first = rig();
        first.hotplug.ask_for(9);
        spoil(&first.hotplug.save(), |bad| {
            let mut rig = rig();
            let _ = rig.hotplug.restore(bad);
            rig.write(8, Width::B4, u64::MAX);
            assert!(rig.hotplug.take_ejected().iter().all(|slot| bit(*slot) != 0));
        });
    }
}
