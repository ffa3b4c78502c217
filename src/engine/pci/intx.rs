//! INTx: one function's interrupt pin with the disable and status bits of its configuration space.

use std::sync::{Arc, Mutex, PoisonError};

use crate::engine::irq::IrqLine;

/// The pin between a function and its PIRQ.
#[derive(Clone)]
pub struct Intx(Arc<Mutex<State>>);

struct State {
    level: bool,
    disabled: bool,
    line: IrqLine,
}

impl Intx {
    pub fn new(line: IrqLine) -> Intx {
        Intx(Arc::new(Mutex::new(State { level: false, disabled: false, line })))
    }
    /// What the device holds: the interrupt status bit (status register, bit 3), whatever the disable bit says.
    pub fn level(&self) -> bool {
        self.state().level
    }
    /// Command register, bit 10.
    pub fn set_disabled(&self, disabled: bool) {
        self.change(|state| state.disabled = disabled);
    }
    /// The line that the device is handed.
    pub fn line(&self) -> IrqLine {
        let pin = self.clone();
        IrqLine::new(move |high| pin.change(|state| state.level = high))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn change(&self, work: impl FnOnce(&mut State)) {
        let mut state = self.state();
        let before = state.level && !state.disabled;
        work(&mut state);
        let after = state.level && !state.disabled;
        if before != after {
            state.line.set(after);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::irq::tests::recorder;

    #[test]
    fn the_disable_bit_holds_the_pin_low_and_keeps_the_status() {
        let (line, levels) = recorder();
        let intx = Intx::new(line);
        let device = intx.line();
        device.set(true);
        intx.set_disabled(true);
        assert!(intx.level());
        device.set(false);
        device.set(true);
        intx.set_disabled(false);
        assert_eq!(*levels.lock().unwrap(), [true, false, true]);
    }
}
