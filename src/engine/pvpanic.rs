//! Panic port, 0x505: the guest's kernel says that it has crashed (QEMU, docs/specs/pvpanic).

use super::{
    bus::{Access, BusDevice, BusFault, Effect},
    saved::{BadState, SaveState, State},
};

/// The kernel has panicked and does nothing more.
const PANICKED: u64 = 1 << 0;
/// The kernel has panicked, and another kernel that writes a dump of it starts.
const CRASH_LOADED: u64 = 1 << 1;

/// What the guest said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Panic {
    Halted,
    DumpFollows,
}

/// Tells each panic to `sink`, which is called by a vCPU thread and must not block.
pub struct PanicPort {
    sink: Box<dyn FnMut(Panic) + Send>,
    /// The guest may write as often as it likes; the first time after a reset counts.
    said: bool,
}

impl PanicPort {
    pub fn new(sink: impl FnMut(Panic) + Send + 'static) -> PanicPort {
        PanicPort { sink: Box::new(sink), said: false }
    }

    pub fn reset(&mut self) {
        self.said = false;
    }
}

impl BusDevice for PanicPort {
    /// The events that are understood.
    fn read(&mut self, _: Access) -> Result<u64, BusFault> {
        Ok(PANICKED | CRASH_LOADED)
    }

    fn write(&mut self, _: Access, value: u64) -> Result<Effect, BusFault> {
        let said = match value {
            value if value & CRASH_LOADED != 0 => Panic::DumpFollows,
            value if value & PANICKED != 0 => Panic::Halted,
            _ => return Ok(Effect::None),
        };
        if !self.said {
            self.said = true;
            (self.sink)(said);
        }
        Ok(Effect::None)
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    pub(super) const KIND: &str = "pvpanic";

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) said: bool,
    }
}

impl SaveState for PanicPort {
    fn save(&self) -> State {
        let PanicPort { sink: _, said } = self;
        State::new(saved::KIND, 1, &saved::V1 { said: *said })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { said } = state.fields(saved::KIND, 1)?;
        self.said = said;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::engine::{bus::Width, saved::testing};

    #[test]
    fn a_panic_is_told_once_until_the_guest_is_reset() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&told);
        let mut port = PanicPort::new(move |panic| sink.lock().unwrap().push(panic));
        let at = Access::new(0, Width::B1);
        assert_eq!(port.read(at), Ok(3), "the driver looks for what is understood");
        for value in [0, 0x80, 1, 1, 2, 0xff] {
            assert_eq!(port.write(at, value), Ok(Effect::None));
        }
        assert_eq!(*told.lock().unwrap(), [Panic::Halted]);
        port.reset();
        port.write(Access::new(0, Width::B4), u64::MAX).unwrap();
        assert_eq!(*told.lock().unwrap(), [Panic::Halted, Panic::DumpFollows]);
    }

    #[test]
    fn a_panic_that_was_told_is_not_told_again_after_a_restore() {
        let make = || {
            let told = Arc::new(Mutex::new(Vec::new()));
            let sink = Arc::clone(&told);
            (PanicPort::new(move |panic| sink.lock().unwrap().push(panic)), told)
        };
        let at = Access::new(0, Width::B1);
        let (mut first, _) = make();
        first.write(at, PANICKED).unwrap();
        let state = testing::matches_golden(&first.save());
        let (mut second, told) = make();
        second.restore(&state).unwrap();
        second.write(at, PANICKED).unwrap();
        assert!(told.lock().unwrap().is_empty());
        testing::spoil(&state, |bad| {
            let (mut port, _) = make();
            let _ = port.restore(bad);
            port.write(at, u64::MAX).unwrap();
        });
    }
}
