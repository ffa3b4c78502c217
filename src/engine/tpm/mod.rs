//! A TPM 2.0 behind the Command Response Buffer interface (TCG PC Client Platform TPM Profile 1.05, 6.5), in front of `swtpm`.
//!
//! ```text
//! vCPU    command ─▶ buffer, CTRL_START ─▶ kick ─▶ worker ─▶ swtpm
//!         CTRL_START is 0 ◀─ response in the buffer ◀─ worker ◀─ swtpm
//! ```
//!
//! Locality 0 only, no interrupts: drivers poll CTRL_START.

mod emulator;
mod saved;
mod worker;

use std::{
    io,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use self::{
    emulator::Blobs,
    worker::{Commands, Powered},
};
use super::{
    bus::{Access, BusDevice, BusFault, Effect},
    event::Event,
    layout,
    log::GuestLog,
    worker::Worker,
};

/// Offset of the control area, which the TPM2 table names.
pub const CONTROL_AREA: u64 = register::CTRL_REQ;
/// The buffer fills the rest of the page.
const BUFFER_BYTES: usize = 0x1000 - register::DATA as usize;

/// Offsets in the page of a locality (6.5.3.1, table 24).
mod register {
    pub(super) const LOC_STATE: u64 = 0x00;
    pub(super) const LOC_CTRL: u64 = 0x08;
    pub(super) const LOC_STS: u64 = 0x0c;
    pub(super) const INTF_ID: u64 = 0x30;
    pub(super) const VENDOR: u64 = 0x34;
    pub(super) const CTRL_REQ: u64 = 0x40;
    pub(super) const CTRL_STS: u64 = 0x44;
    pub(super) const CTRL_CANCEL: u64 = 0x48;
    pub(super) const CTRL_START: u64 = 0x4c;
    pub(super) const CMD_SIZE: u64 = 0x58;
    pub(super) const CMD_LADDR: u64 = 0x5c;
    pub(super) const RSP_SIZE: u64 = 0x64;
    pub(super) const RSP_ADDR: u64 = 0x68;
    pub(super) const DATA: u64 = 0x80;
}

/// No dynamic launch has happened, and what the register says counts.
const LOC_STATE_ESTABLISHED: u32 = 1 << 0;
const LOC_STATE_ASSIGNED: u32 = 1 << 1;
const LOC_STATE_VALID: u32 = 1 << 7;
const LOC_CTRL_REQUEST: u32 = 1 << 0;
const LOC_CTRL_RELINQUISH: u32 = 1 << 1;
const LOC_STS_GRANTED: u32 = 1 << 0;
/// Active interface CRB, version 1; transfers of 64 bytes; only CRB is there, is selected, and stays so.
const INTERFACE: u32 = 1 | 1 << 4 | 3 << 11 | 1 << 14 | 1 << 17 | 1 << 19;
/// Vendor (IBM, who wrote the emulator) and device.
const VENDOR: u32 = 0x1014 | 1 << 16;
const REQ_READY: u32 = 1 << 0;
const REQ_IDLE: u32 = 1 << 1;
const STS_FAILED: u32 = 1 << 0;
const STS_IDLE: u32 = 1 << 1;

/// What leads to a TPM's emulator, for this TPM alone.
pub struct EmulatorSockets {
    /// Orders about the TPM itself.
    pub control: UnixStream,
    /// TPM commands and their responses. The emulator ends when this closes.
    pub commands: UnixStream,
}

/// The device on the page `layout::TPM`.
pub struct Tpm {
    shared: Arc<Shared>,
    worker: Worker<Powered>,
}

/// The machine's hold on the TPM's worker.
#[derive(Clone)]
pub struct TpmHold {
    shared: Arc<Shared>,
    worker: Worker<Powered>,
}

/// What vCPUs and the worker have in common. The lock is held for a copy of the buffer at most, never while the emulator is waited for.
struct Shared {
    state: Mutex<State>,
    /// There is something to do for the worker.
    kick: Event,
}

struct State {
    /// The guest has taken the locality.
    granted: bool,
    idle: bool,
    /// A command waits or runs.
    started: bool,
    cancel: bool,
    /// The emulator has failed.
    failed: bool,
    buffer: Box<[u8; BUFFER_BYTES]>,
    /// For the worker: the machine was reset, and the TPM is to be.
    reset_wanted: bool,
    /// For the worker: the command that runs is to end early.
    cancel_wanted: bool,
    /// The emulator's state while the machine is held, once it was asked for.
    settled: Option<Option<Blobs>>,
}

impl State {
    fn power_on() -> State {
        State {
            granted: false,
            idle: true,
            started: false,
            cancel: false,
            failed: false,
            buffer: Box::new([0; BUFFER_BYTES]),
            reset_wanted: false,
            cancel_wanted: false,
            settled: None,
        }
    }

    /// The register that begins at `offset`, a multiple of four. What is not there reads as zero.
    fn register(&self, offset: u64) -> u32 {
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        let buffer = (layout::TPM.start + register::DATA) as u32;
        match offset {
            register::LOC_STATE => LOC_STATE_VALID | LOC_STATE_ESTABLISHED | flag(self.granted, LOC_STATE_ASSIGNED),
            register::LOC_STS => flag(self.granted, LOC_STS_GRANTED),
            register::INTF_ID => INTERFACE,
            register::VENDOR => VENDOR,
            register::CTRL_STS => flag(self.failed, STS_FAILED) | flag(self.idle, STS_IDLE),
            register::CTRL_CANCEL => flag(self.cancel, 1),
            register::CTRL_START => flag(self.started, 1),
            register::CMD_SIZE | register::RSP_SIZE => BUFFER_BYTES as u32,
            register::CMD_LADDR | register::RSP_ADDR => buffer,
            _ => 0,
        }
    }

    fn byte(&self, offset: u64) -> u8 {
        if let Some(at) = offset.checked_sub(register::DATA) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            return self.buffer.get(at).copied().unwrap_or(0xff);
        }
        (self.register(offset & !3) >> (8 * (offset & 3))) as u8
    }

    /// Whether the worker has something to do.
    fn write_register(&mut self, offset: u64, value: u32) -> bool {
        match offset {
            register::LOC_CTRL => {
                if value & LOC_CTRL_RELINQUISH != 0 {
                    self.granted = false;
                }
                if value & LOC_CTRL_REQUEST != 0 {
                    self.granted = true;
                }
                false
            }
            // A command is not disturbed by either.
            register::CTRL_REQ if !self.started => {
                match value & (REQ_READY | REQ_IDLE) {
                    REQ_READY => self.idle = false,
                    REQ_IDLE => self.idle = true,
                    _ => {}
                }
                false
            }
            register::CTRL_CANCEL => {
                self.cancel = value & 1 != 0;
                self.cancel_wanted |= self.cancel && self.started;
                self.cancel_wanted
            }
            // SeaBIOS starts its first command out of idle, without asking for ready.
            register::CTRL_START if value & 1 != 0 && self.granted && !self.started => {
                self.idle = false;
                self.started = true;
                true
            }
            _ => false,
        }
    }

    fn write_buffer(&mut self, at: u64, bytes: &[u8]) {
        if self.started {
            return;
        }
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        for (place, byte) in self.buffer.iter_mut().skip(at).zip(bytes) {
            *place = *byte;
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tpm {
    /// Its worker is held; the emulator hears nothing until it is released, so that a saved state can come first.
    ///
    /// Errors: the host has no thread or descriptor for it.
    pub fn new(sockets: EmulatorSockets, log: GuestLog) -> io::Result<Tpm> {
        let shared = Arc::new(Shared { state: Mutex::new(State::power_on()), kick: Event::new()? });
        let worker = Worker::spawn("tpm", Commands::new(Arc::clone(&shared), sockets, log))?;
        worker.hold();
        worker.activate(Powered);
        Ok(Tpm { shared, worker })
    }

    pub fn hold(&self) -> TpmHold {
        TpmHold { shared: Arc::clone(&self.shared), worker: self.worker.clone() }
    }

    /// The machine is reset. A command that runs is cancelled, and the worker resets the TPM as soon as it has ended: the next command
    /// waits for that, but nobody else.
    pub fn reset(&mut self) {
        let mut state = self.shared.lock();
        let State { failed, started, .. } = *state;
        *state =
            State { failed, reset_wanted: true, cancel_wanted: started || state.reset_wanted, ..State::power_on() };
        drop(state);
        self.shared.kick.signal();
    }
}

impl Drop for Tpm {
    fn drop(&mut self) {
        self.worker.end();
    }
}

impl TpmHold {
    /// Returns when the worker does nothing; a command goes on in the emulator. Waits longer than a moment only for an emulator that does
    /// not answer, once and for seconds.
    pub fn hold(&self) {
        self.worker.hold();
    }

    pub fn release(&self) {
        self.shared.lock().settled = None;
        self.worker.release();
    }

    /// Waits for the command that runs, and fetches the emulator's state for a save. Called while held.
    ///
    /// Errors: the command takes too long; it goes on after `release`.
    pub fn settle(&self) -> io::Result<()> {
        if self.shared.lock().settled.is_some() {
            return Ok(());
        }
        let blobs = self.worker.while_out(|commands: &mut Commands, _| commands.settle())?;
        self.shared.lock().settled = Some(blobs);
        Ok(())
    }
}

impl BusDevice for Tpm {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        let state = self.shared.lock();
        let bytes = 0..at.width.bytes() as u64;
        Ok(bytes.rev().fold(0, |value, index| value << 8 | u64::from(state.byte(at.offset + index))))
    }

    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        let bytes = value.to_le_bytes();
        let bytes = bytes.get(..at.width.bytes()).unwrap_or_default();
        let mut state = self.shared.lock();
        if let Some(place) = at.offset.checked_sub(register::DATA) {
            state.write_buffer(place, bytes);
            return Ok(Effect::None);
        }
        if !at.offset.is_multiple_of(4) {
            return Err(BusFault::BadWidth);
        }
        let mut kick = false;
        for (offset, word) in (at.offset..register::DATA).step_by(4).zip(bytes.chunks(4)) {
            let word = word.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
            kick |= state.write_register(offset, word);
        }
        drop(state);
        if kick {
            self.shared.kick.signal();
        }
        Ok(Effect::None)
    }
}

#[cfg(test)]
mod tests;
