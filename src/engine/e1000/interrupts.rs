//! Interrupt causes and their mask (317453, 13.4.17 to 13.4.21), and the pin: it is high while an unmasked cause is set.
//!
//! There is no moderation: ITR, RDTR, RADV, TIDV and TADV are kept and not obeyed, since each is only an upper bound on the
//! number of interrupts and a timer would cost more than it saves. The worker gathers causes over a burst of frames and tells
//! them once, and a pin that is high already interrupts nobody again.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{
    super::{irq::IrqLine, saved::BadState},
    saved::{InterruptsV1, check},
};

/// A descriptor that asked for it was sent.
pub(super) const TXDW: u32 = 1 << 0;
/// The transmit ring is empty.
pub(super) const TXQE: u32 = 1 << 1;
/// The link went up or down.
pub(super) const LSC: u32 = 1 << 2;
/// Few receive descriptors are left.
pub(super) const RXDMT0: u32 = 1 << 4;
/// A frame came and found no descriptor.
pub(super) const RXO: u32 = 1 << 6;
/// A frame was received.
pub(super) const RXT0: u32 = 1 << 7;
/// An access to the PHY has ended.
pub(super) const MDAC: u32 = 1 << 9;
/// Every cause that there is, reserved bits among them.
const CAUSES: u32 = 0x1_ffff;

pub(super) struct Interrupts {
    /// Causes, mask and pin change together.
    state: Mutex<State>,
    line: IrqLine,
}

#[derive(Default)]
struct State {
    causes: u32,
    mask: u32,
}

impl Interrupts {
    pub(super) fn new(line: IrqLine) -> Interrupts {
        Interrupts { state: Mutex::default(), line }
    }

    /// Sets causes; also a write to ICS.
    pub(super) fn raise(&self, causes: u32) {
        self.change(|state| state.causes |= causes & CAUSES);
    }

    /// Reading ICR clears it.
    pub(super) fn take(&self) -> u32 {
        self.change(|state| std::mem::take(&mut state.causes))
    }

    /// A write to ICR clears the bits that are set in it.
    pub(super) fn clear(&self, causes: u32) {
        self.change(|state| state.causes &= !causes);
    }

    pub(super) fn mask(&self) -> u32 {
        self.lock().mask
    }

    /// A write to IMS.
    pub(super) fn enable(&self, causes: u32) {
        self.change(|state| state.mask |= causes & CAUSES);
    }

    /// A write to IMC.
    pub(super) fn disable(&self, causes: u32) {
        self.change(|state| state.mask &= !causes);
    }

    pub(super) fn reset(&self) {
        self.change(|state| *state = State::default());
    }

    pub(super) fn save(&self) -> InterruptsV1 {
        let Interrupts { state: _, line: _ } = self;
        let State { causes, mask } = *self.lock();
        InterruptsV1 { causes, mask }
    }

    pub(super) fn restore(&self, saved: InterruptsV1) -> Result<(), BadState> {
        let InterruptsV1 { causes, mask } = saved;
        check((causes | mask) & !CAUSES == 0, "an interrupt that there is not")?;
        self.change(|state| *state = State { causes, mask });
        Ok(())
    }

    fn change<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let out = work(&mut state);
        self.line.set(state.causes & state.mask != 0);
        out
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
