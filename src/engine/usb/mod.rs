//! USB devices (Universal Serial Bus 2.0 and 3.1), whatever host controller they are behind.
//!
//! A host controller hands a device its control requests, asks a HID device for reports, and lets a disk move bytes over its
//! bulk pipes. Everything here is called under the controller's lock; only a disk's I/O is done outside it, see `storage.rs`.

mod descriptors;
mod hid;
mod keyboard;
pub(super) mod keymap;
mod scsi;
pub mod storage;
mod tablet;

pub use self::{hid::REPORT_BYTES_MAX, keyboard::Keyboard, storage::Storage, tablet::Tablet};

use self::descriptors::Standard;
use super::saved::{BadState, SaveState, State};

/// Endpoint addresses (USB 2.0, 9.6.6): the number, and bit 7 for those that send to the host.
pub const ENDPOINT_IN: u8 = 0x80;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speed {
    High,
    Super,
}

/// The eight bytes that begin a control transfer (USB 2.0, 9.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Setup {
    pub request_type: u8,
    pub request: u8,
    pub value: u16,
    pub index: u16,
    /// Bytes of the data stage.
    pub length: u16,
}

impl Setup {
    pub fn parse([request_type, request, v0, v1, i0, i1, l0, l1]: [u8; 8]) -> Setup {
        let half = |low, high| u16::from_le_bytes([low, high]);
        Setup { request_type, request, value: half(v0, v1), index: half(i0, i1), length: half(l0, l1) }
    }
    /// Whether the data stage, if there is one, goes to the host.
    pub fn is_in(self) -> bool {
        self.request_type & ENDPOINT_IN != 0
    }
}

/// The device refuses: it answers STALL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall;

/// How far a transfer on a bulk pipe came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Moved {
    pub bytes: usize,
    /// The host's transfer came to its end with them.
    pub ended: bool,
}

/// The bulk pipes of a device, as its host controller offers them. Nothing waits: a pipe that the host has given nothing to
/// moves no bytes.
pub trait Pipes {
    /// To the host, within one of its transfers. With `last` they end it, however much more the host would take.
    fn send(&mut self, bytes: &[u8], last: bool) -> Moved;
    /// From the host, within one of its transfers.
    fn receive(&mut self, into: &mut [u8]) -> Moved;
    /// What the host wants to read is answered with STALL.
    fn stall_send(&mut self);
    /// What the host wants to write is answered with STALL.
    fn stall_receive(&mut self);
}

/// A device that can be plugged in.
pub enum Device {
    Keyboard(Keyboard),
    Tablet(Tablet),
    Storage(Storage),
}

impl Device {
    pub fn speed(&self) -> Speed {
        match self {
            Device::Keyboard(_) | Device::Tablet(_) => Speed::High,
            Device::Storage(_) => Speed::Super,
        }
    }

    /// A control transfer to endpoint 0. `data` is what the host sent; the answer is at most `setup.length` bytes.
    pub fn control(&mut self, setup: Setup, data: &[u8]) -> Result<Vec<u8>, Stall> {
        let mut answer = match self {
            Device::Keyboard(keyboard) => keyboard.control(setup, data),
            Device::Tablet(tablet) => tablet.control(setup, data),
            Device::Storage(storage) => storage.control(setup, data),
        }?;
        answer.truncate(usize::from(setup.length));
        Ok(answer)
    }

    /// The port was reset.
    pub fn reset(&mut self) {
        match self {
            Device::Keyboard(keyboard) => keyboard.reset(),
            Device::Tablet(tablet) => tablet.reset(),
            Device::Storage(storage) => storage.reset(),
        }
    }

    /// The host chose a configuration, so that the endpoints beside 0 are there.
    pub fn is_configured(&self) -> bool {
        self.standard().is_configured()
    }

    /// The host wants to be woken when something happens while the port is suspended.
    pub fn may_wake(&self) -> bool {
        self.standard().remote_wakeup
    }

    /// Whether the host has set the halt feature of an endpoint, or the device has.
    pub fn is_halted(&self, endpoint: u8) -> bool {
        self.standard().is_halted(endpoint)
    }

    /// The report that waits for the host to ask for it.
    pub fn report(&self) -> Option<hid::Report> {
        match self {
            Device::Keyboard(keyboard) => keyboard.report(),
            Device::Tablet(tablet) => tablet.report(),
            Device::Storage(_) => None,
        }
    }

    /// The host has the report.
    pub fn report_taken(&mut self) {
        match self {
            Device::Keyboard(keyboard) => keyboard.report_taken(),
            Device::Tablet(tablet) => tablet.report_taken(),
            Device::Storage(_) => {}
        }
    }

    fn standard(&self) -> &Standard {
        match self {
            Device::Keyboard(keyboard) => keyboard.standard(),
            Device::Tablet(tablet) => tablet.standard(),
            Device::Storage(storage) => storage.standard(),
        }
    }
}

impl SaveState for Device {
    fn save(&self) -> State {
        match self {
            Device::Keyboard(keyboard) => keyboard.save(),
            Device::Tablet(tablet) => tablet.save(),
            Device::Storage(storage) => storage.save(),
        }
    }
    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        match self {
            Device::Keyboard(keyboard) => keyboard.restore(state),
            Device::Tablet(tablet) => tablet.restore(state),
            Device::Storage(storage) => storage.restore(state),
        }
    }
}
