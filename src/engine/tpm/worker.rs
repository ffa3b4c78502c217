//! The thread of a TPM: it gives commands to the emulator, waits for responses, and resets the TPM when the machine was reset.
//!
//! A pause leaves a command running in the emulator; its response waits in the channel until the machine goes on.

use std::{
    io, mem,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags};

use super::{
    BUFFER_BYTES, EmulatorSockets, Shared, State,
    emulator::{Blobs, Emulator, HEADER_BYTES, stated_bytes, wait_until},
};
use crate::engine::{
    log::GuestLog,
    worker::{Malformed, Served, Session, Stop, Work},
};

/// A command may make keys for minutes; a TPM that takes longer is taken for dead.
const COMMAND_TIME: Duration = if cfg!(test) { Duration::from_secs(3) } else { Duration::from_secs(300) };
/// How long a save waits for a command.
const SETTLE_TIME: Duration = if cfg!(test) { Duration::from_secs(1) } else { Duration::from_secs(10) };
/// The response to a command whose size cannot be: no sessions, ten bytes, TPM_RC_COMMAND_SIZE (TPM 2.0 Library, Part 2, 6.6).
const WRONG_SIZE: [u8; HEADER_BYTES] = [0x80, 0x01, 0, 0, 0, 10, 0, 0, 0x01, 0x42];

/// A TPM works as long as its machine.
pub(super) struct Powered;

impl Session for Powered {
    fn set_broken(&self) {}
}

/// Where the emulator is.
enum Link {
    /// Nothing was asked of it yet.
    New(EmulatorSockets),
    Up(Emulator),
    /// It failed; its channels are closed, and it ends.
    Gone,
}

pub(super) struct Commands {
    shared: Arc<Shared>,
    log: GuestLog,
    link: Link,
    /// The TPM was powered on.
    powered: bool,
    /// When the command that runs must have ended.
    running: Option<Instant>,
    response: [u8; BUFFER_BYTES],
    received: usize,
}

impl Commands {
    pub(super) fn new(shared: Arc<Shared>, sockets: EmulatorSockets, log: GuestLog) -> Commands {
        let link = Link::New(sockets);
        Commands { shared, log, link, powered: false, running: None, response: [0; BUFFER_BYTES], received: 0 }
    }

    /// Powers the TPM on with a saved state.
    pub(super) fn resume(&mut self, blobs: &Blobs) -> io::Result<()> {
        self.power_on(Some(blobs))
    }

    /// Waits for what runs and carries out what is wished for; then gives the TPM's state. `None` of one that has failed.
    ///
    /// Errors: a command takes too long; it goes on.
    pub(super) fn settle(&mut self) -> io::Result<Option<Blobs>> {
        let end = Instant::now() + SETTLE_TIME;
        self.advance();
        while self.running.is_some() {
            if let Link::Up(emulator) = &self.link {
                let waited = wait_until(&emulator.data(), PollFlags::IN, end);
                waited.map_err(|_| io::Error::other("its TPM is at work on a command that takes long"))?;
            }
            self.advance();
        }
        if self.shared.lock().failed {
            return Ok(None);
        }
        let Link::Up(emulator) = &mut self.link else { return Ok(None) };
        match emulator.blobs() {
            Ok(blobs) => Ok(Some(blobs)),
            Err(error) => {
                self.fail(&error);
                Ok(None)
            }
        }
    }

    /// Does all that can be done without waiting for a command.
    fn advance(&mut self) {
        if let Err(error) = self.try_advance() {
            self.fail(&error);
        }
    }

    fn try_advance(&mut self) -> io::Result<()> {
        if !self.end_command()? {
            return Ok(());
        }
        let (reset, failed) = {
            let mut state = self.shared.lock();
            state.cancel_wanted = false;
            (mem::take(&mut state.reset_wanted), state.failed)
        };
        // An emulator that has gone stays so, and was told of.
        if (reset || (!self.powered && !failed)) && !matches!(self.link, Link::Gone) {
            self.power_on(None)?;
            self.shared.lock().failed = false;
        }
        self.begin_command()
    }

    /// Whether no command runs any more.
    fn end_command(&mut self) -> io::Result<bool> {
        let Some(end) = self.running else { return Ok(true) };
        let Link::Up(emulator) = &mut self.link else { return Ok(true) };
        if mem::take(&mut self.shared.lock().cancel_wanted) {
            emulator.cancel()?;
        }
        let Some(bytes) = emulator.receive(&mut self.response, &mut self.received)? else {
            return if Instant::now() < end { Ok(false) } else { Err(io::ErrorKind::TimedOut.into()) };
        };
        self.running = None;
        let mut state = self.shared.lock();
        // After a reset nobody waits for it.
        if !state.reset_wanted {
            state.finish(self.response.get(..bytes).unwrap_or_default());
        }
        Ok(true)
    }

    fn begin_command(&mut self) -> io::Result<()> {
        let mut state = self.shared.lock();
        if !state.started || state.reset_wanted {
            return Ok(());
        }
        let Link::Up(emulator) = &mut self.link else {
            state.fail();
            return Ok(());
        };
        if state.failed {
            state.fail();
            return Ok(());
        }
        let command = stated_bytes(&state.buffer[..]).filter(|bytes| *bytes >= HEADER_BYTES);
        let Some(command) = command.and_then(|bytes| state.buffer.get(..bytes)) else {
            state.finish(&WRONG_SIZE);
            return Ok(());
        };
        // Never waits: the channel has room for one command.
        let begun = emulator.start(command);
        drop(state);
        begun?;
        self.received = 0;
        self.running = Some(Instant::now() + COMMAND_TIME);
        Ok(())
    }

    fn power_on(&mut self, blobs: Option<&Blobs>) -> io::Result<()> {
        let mut emulator = match mem::replace(&mut self.link, Link::Gone) {
            Link::New(sockets) => Emulator::new(sockets, BUFFER_BYTES)?,
            Link::Up(emulator) => emulator,
            Link::Gone => return Err(io::Error::other("its emulator has gone")),
        };
        emulator.power_on(blobs)?;
        self.link = Link::Up(emulator);
        self.powered = true;
        Ok(())
    }

    /// The TPM is of no more use; the guest goes on without it.
    fn fail(&mut self, error: &io::Error) {
        self.link = Link::Gone;
        self.running = None;
        self.powered = false;
        self.log.say(&format!("engine: the guest's TPM has failed: {error}"));
        self.shared.lock().fail();
    }
}

impl Work<Powered> for Commands {
    fn serve(&mut self, _: &mut Powered, stop: &Stop) -> Result<Served, Malformed> {
        loop {
            // Before the look, so that what comes during it is not lost.
            self.shared.kick.clear();
            self.advance();
            let kick = PollFd::new(&self.shared.kick, PollFlags::IN);
            let go_on = match (&self.link, self.running) {
                (Link::Up(emulator), Some(end)) => {
                    let data = emulator.data();
                    let left = end.saturating_duration_since(Instant::now());
                    stop.wait_for(&[kick, PollFd::new(&data, PollFlags::IN)], Some(left))
                }
                _ => stop.wait(&[kick]),
            };
            if !go_on {
                return Ok(Served::Stopped);
            }
        }
    }
}

impl State {
    /// The command has ended with a response.
    fn finish(&mut self, response: &[u8]) {
        if let Some(place) = self.buffer.get_mut(..response.len()) {
            place.copy_from_slice(response);
        }
        self.started = false;
    }

    /// As fatal as a TPM can fail: until the machine is reset, if then.
    fn fail(&mut self) {
        self.failed = true;
        self.started = false;
    }
}
