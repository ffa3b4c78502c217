//! Interrupts as devices see them: a pin that is already wired, and a sink for message-signalled interrupts.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use super::event::Event;

/// One interrupt pin, already wired. Devices never learn its number.
///
/// Level is the device's business: after every change of state it computes the level anew and sets it.
#[derive(Clone)]
pub struct IrqLine(Arc<dyn Fn(bool) + Send + Sync>);

impl IrqLine {
    pub fn new(set: impl Fn(bool) + Send + Sync + 'static) -> IrqLine {
        IrqLine(Arc::new(set))
    }
    /// A pin that leads nowhere.
    pub fn unconnected() -> IrqLine {
        IrqLine::new(|_| ())
    }
    pub fn set(&self, high: bool) {
        (self.0)(high);
    }
}

/// A memory write that is an interrupt (PCI Local Bus 3.0, section 6.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    pub address: u64,
    pub data: u32,
}

/// Takes messages to the interrupt controller. Called by vCPU and worker threads.
pub trait MsiSink: Send + Sync {
    fn send(&self, message: MsiMessage) -> io::Result<()>;

    /// Has `message` sent whenever `event` is signalled, without this process, until `disconnect` with the number that is returned.
    ///
    /// Errors: this sink cannot, or not now.
    fn connect(&self, _event: &Event, _message: MsiMessage) -> io::Result<u32> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn disconnect(&self, _event: &Event, _number: u32) {}
}

/// A pin that several devices share: high while any of them holds it high.
#[derive(Clone)]
pub struct SharedPin(Arc<PinInner>);

struct PinInner {
    asserters: Mutex<u32>,
    line: IrqLine,
}

impl SharedPin {
    pub fn new(line: IrqLine) -> SharedPin {
        SharedPin(Arc::new(PinInner { asserters: Mutex::new(0), line }))
    }

    /// A line for one more device. Setting the same level twice changes nothing.
    pub fn join(&self) -> IrqLine {
        let pin = Arc::clone(&self.0);
        let mine = Mutex::new(false);
        IrqLine::new(move |high| {
            let mut mine = mine.lock().unwrap_or_else(PoisonError::into_inner);
            if *mine == high {
                return;
            }
            *mine = high;
            let mut asserters = pin.asserters.lock().unwrap_or_else(PoisonError::into_inner);
            if high {
                *asserters += 1;
            } else {
                *asserters -= 1;
            }
            // The line is set under the lock, so that two devices cannot leave it at the older level.
            match (high, *asserters) {
                (true, 1) => pin.line.set(true),
                (false, 0) => pin.line.set(false),
                _ => {}
            }
        })
    }

    pub fn is_high(&self) -> bool {
        *self.0.asserters.lock().unwrap_or_else(PoisonError::into_inner) > 0
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A line that records every level it was set to.
    pub(crate) fn recorder() -> (IrqLine, Arc<Mutex<Vec<bool>>>) {
        let levels = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&levels);
        (IrqLine::new(move |high| sink.lock().unwrap().push(high)), levels)
    }

    #[test]
    fn a_shared_pin_is_high_while_anyone_holds_it() {
        let (line, levels) = recorder();
        let pin = SharedPin::new(line);
        let (first, second) = (pin.join(), pin.join());
        first.set(true);
        first.set(true);
        second.set(true);
        first.set(false);
        assert!(pin.is_high());
        second.set(false);
        second.set(false);
        assert!(!pin.is_high());
        assert_eq!(*levels.lock().unwrap(), [true, false]);
    }
}
