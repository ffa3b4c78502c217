//! The client of `swtpm`: its control channel (swtpm's `tpm_ioctl.h`, numbers big-endian) and its data channel, which both come from hostd.
//!
//! The emulator is trusted less than ourselves: each answer is limited in size and in time. After any error the channels may be out of
//! step, and nothing is asked any more.

use std::{
    io::{self, IoSlice, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, SendFlags},
};

use super::EmulatorSockets;

/// Commands of the control channel.
mod control {
    pub(super) const GET_CAPABILITY: u32 = 0x01;
    pub(super) const INIT: u32 = 0x02;
    pub(super) const CANCEL_TPM_CMD: u32 = 0x09;
    pub(super) const GET_STATEBLOB: u32 = 0x0c;
    pub(super) const SET_STATEBLOB: u32 = 0x0d;
    pub(super) const STOP: u32 = 0x0e;
    pub(super) const SET_BUFFERSIZE: u32 = 0x11;
}

mod capability {
    pub(super) const INIT: u64 = 1 << 0;
    pub(super) const CANCEL_TPM_CMD: u64 = 1 << 5;
    pub(super) const GET_STATEBLOB: u64 = 1 << 8;
    pub(super) const SET_STATEBLOB: u64 = 1 << 9;
    pub(super) const STOP: u64 = 1 << 10;
    pub(super) const SET_BUFFERSIZE: u64 = 1 << 13;
    pub(super) const NEEDED: u64 = INIT | GET_STATEBLOB | SET_STATEBLOB | STOP | SET_BUFFERSIZE;
}

/// Delete the volatile state once it was read: what a TPM resumes from must not be there at its next reset.
const INIT_DELETE_VOLATILE: u32 = 1 << 0;
/// Of a blob: it is encrypted with the emulator's key.
const BLOB_ENCRYPTED: u32 = 1 << 1;
/// In a result: nothing is wrong, but there is no such blob.
const RESULT_NOT_FATAL: u32 = 0x800;
/// Types of blobs, in the order of `Blobs`.
const BLOB_TYPES: [u32; 3] = [1, 2, 3];
/// All blobs of one TPM together; a usual one has 10 KiB.
pub(super) const BLOB_BYTES_MAX: usize = 256 << 10;

/// How long it may take to give its whole state: the guest stands still meanwhile.
const BLOBS_TIME: Duration = Duration::from_secs(20);
/// How long an answer on the control channel may take while no command runs. Milliseconds are usual.
const CONTROL_TIME: Duration = if cfg!(fuzzing) {
    Duration::ZERO
} else if cfg!(test) {
    Duration::from_secs(2)
} else {
    Duration::from_secs(10)
};

/// Tag, size and code, which both commands and responses begin with (TPM 2.0 Library, Part 1, 18).
pub(super) const HEADER_BYTES: usize = 10;

/// A part of the TPM's state. The emulator alone knows what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Blob {
    pub(super) encrypted: bool,
    pub(super) bytes: Vec<u8>,
}

/// The state of a TPM: permanent, volatile, and what it saves for a sleep (empty in a TPM 2.0).
pub(super) type Blobs = [Blob; 3];

/// The emulator of one TPM.
pub(super) struct Emulator {
    control: UnixStream,
    data: UnixStream,
    /// It can cancel a command.
    cancels: bool,
    /// It owes the answer to a cancellation, which may come when the command is over only.
    cancelled: bool,
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// The size in the header of a command or a response.
pub(super) fn stated_bytes(message: &[u8]) -> Option<usize> {
    let size = message.get(2..6)?.first_chunk::<4>()?;
    usize::try_from(u32::from_be_bytes(*size)).ok()
}

impl Emulator {
    /// Gets an emulator ready that was just started. Its TPM is not powered yet.
    ///
    /// Errors: it does not answer in time, lacks something, or is not what speaks here.
    pub(super) fn new(sockets: EmulatorSockets, buffer_bytes: usize) -> io::Result<Emulator> {
        let EmulatorSockets { control, commands: data } = sockets;
        control.set_nonblocking(true)?;
        data.set_nonblocking(true)?;
        let mut emulator = Emulator { control, data, cancels: false, cancelled: false };
        let capabilities = u64::from_be_bytes(emulator.ask(control::GET_CAPABILITY, &[])?);
        if capabilities & capability::NEEDED != capability::NEEDED {
            return Err(wrong("it cannot do what is needed"));
        }
        emulator.cancels = capabilities & capability::CANCEL_TPM_CMD != 0;
        emulator.command(control::SET_BUFFERSIZE, &[buffer_bytes as u32], "limit its answers")?;
        let [used, ..] = emulator.numbers::<3>()?;
        if used as usize > buffer_bytes {
            return Err(wrong("its answers are longer than the buffer"));
        }
        Ok(emulator)
    }

    /// Powers the TPM, or resets it by another power cycle: from `blobs`, or from what it keeps on its disk. No command runs.
    pub(super) fn power_on(&mut self, blobs: Option<&Blobs>) -> io::Result<()> {
        self.command(control::STOP, &[], "stop")?;
        for (kind, blob) in BLOB_TYPES.into_iter().zip(blobs.into_iter().flatten()) {
            if blob.bytes.is_empty() {
                continue;
            }
            let flags = if blob.encrypted { BLOB_ENCRYPTED } else { 0 };
            let head = [control::SET_STATEBLOB, flags, kind, blob.bytes.len() as u32];
            let mut message: Vec<u8> = head.iter().flat_map(|number| number.to_be_bytes()).collect();
            message.extend(&blob.bytes);
            self.send_control(&message)?;
            self.expect_done("take its state back")?;
        }
        let flags = if blobs.is_some() { INIT_DELETE_VOLATILE } else { 0 };
        self.command(control::INIT, &[flags], "start")
    }

    /// The whole state of the TPM. No command runs.
    pub(super) fn blobs(&mut self) -> io::Result<Blobs> {
        let mut blobs = Blobs::default();
        let mut left = BLOB_BYTES_MAX;
        let deadline = Instant::now() + BLOBS_TIME;
        for (kind, blob) in BLOB_TYPES.into_iter().zip(&mut blobs) {
            loop {
                if Instant::now() > deadline {
                    return Err(wrong("it takes too long to give its state"));
                }
                self.send_numbers(&[control::GET_STATEBLOB, 0, kind, blob.bytes.len() as u32])?;
                let [result] = self.numbers()?;
                if result != 0 && result & RESULT_NOT_FATAL == 0 {
                    return Err(wrong(&format!("it does not give its state (error {result:#x})")));
                }
                let [flags, total, length] = self.numbers()?;
                if result != 0 && (total, length) != (0, 0) {
                    return Err(wrong("it has a state and has none"));
                }
                let (total, length) = (total as usize, length as usize);
                blob.encrypted = flags & BLOB_ENCRYPTED != 0;
                let rest = total.saturating_sub(blob.bytes.len());
                if length > left || length > total || (length == 0 && rest != 0) {
                    return Err(wrong("its state is longer than it may be, or has no end"));
                }
                left -= length;
                let start = blob.bytes.len();
                blob.bytes.resize(start + length, 0);
                receive_all(&self.control, blob.bytes.get_mut(start..).unwrap_or_default())?;
                if blob.bytes.len() >= total {
                    break;
                }
            }
        }
        Ok(blobs)
    }

    /// Begins a command; its response is ready when `data` is.
    pub(super) fn start(&mut self, command: &[u8]) -> io::Result<()> {
        if !matches!(receive_some(&self.data, &mut [0]), Ok(None)) {
            return Err(wrong("it spoke without being asked, or has gone"));
        }
        // The emulator reads a command at once; the channel is empty, and has room for it.
        let sent = rustix::net::send(&self.data, command, SendFlags::NOSIGNAL)?;
        if sent == command.len() { Ok(()) } else { Err(wrong("it does not take a command")) }
    }

    pub(super) fn data(&self) -> BorrowedFd<'_> {
        self.data.as_fd()
    }

    /// Takes what is there of a response. `received` bytes of it are in `into` already; gives how many it has when it is complete.
    pub(super) fn receive(&mut self, into: &mut [u8], received: &mut usize) -> io::Result<Option<usize>> {
        loop {
            let wanted = if *received < HEADER_BYTES { HEADER_BYTES } else { stated_bytes(into).unwrap_or(0) };
            if wanted < HEADER_BYTES || wanted > into.len() {
                return Err(wrong("a response has a wrong size"));
            }
            if *received == wanted {
                self.end_cancel()?;
                return Ok(Some(wanted));
            }
            let Some(bytes) = receive_some(&self.data, into.get_mut(*received..wanted).unwrap_or_default())? else {
                return Ok(None);
            };
            *received += bytes;
        }
    }

    /// Asks for an early end of the command that runs, which responds then. It may come too late, or be beyond the emulator.
    pub(super) fn cancel(&mut self) -> io::Result<()> {
        if self.cancels && !self.cancelled {
            self.send_control(&control::CANCEL_TPM_CMD.to_be_bytes())?;
            self.cancelled = true;
        }
        Ok(())
    }

    /// Takes the answer to a cancellation, whatever it says: the command is over.
    fn end_cancel(&mut self) -> io::Result<()> {
        if self.cancelled {
            self.cancelled = false;
            let [_] = self.numbers::<1>()?;
        }
        Ok(())
    }

    /// Sends a command with its numbers, and takes its result.
    fn command(&mut self, command: u32, numbers: &[u32], what: &str) -> io::Result<()> {
        self.send_numbers(&[&[command], numbers].concat())?;
        self.expect_done(what)
    }

    fn send_numbers(&mut self, numbers: &[u32]) -> io::Result<()> {
        let message: Vec<u8> = numbers.iter().flat_map(|number| number.to_be_bytes()).collect();
        self.send_control(&message)
    }

    fn ask<const N: usize>(&mut self, command: u32, body: &[u8]) -> io::Result<[u8; N]> {
        self.send_control(&[&command.to_be_bytes(), body].concat())?;
        let mut answer = [0; N];
        receive_all(&self.control, &mut answer)?;
        Ok(answer)
    }

    fn expect_done(&mut self, what: &str) -> io::Result<()> {
        let [result] = self.numbers()?;
        if result == 0 { Ok(()) } else { Err(wrong(&format!("it does not {what} (error {result:#x})"))) }
    }

    fn numbers<const N: usize>(&mut self) -> io::Result<[u32; N]> {
        let mut numbers = [0; N];
        for number in &mut numbers {
            let mut bytes = [0; 4];
            receive_all(&self.control, &mut bytes)?;
            *number = u32::from_be_bytes(bytes);
        }
        Ok(numbers)
    }

    fn send_control(&mut self, message: &[u8]) -> io::Result<()> {
        let end = Instant::now() + CONTROL_TIME;
        let mut left = message;
        while !left.is_empty() {
            match (&self.control).write_vectored(&[IoSlice::new(left)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => left = left.get(sent..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait_until(&self.control, PollFlags::OUT, end)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// What is there, at most `into`; `None` when nothing is.
fn receive_some(from: &UnixStream, into: &mut [u8]) -> io::Result<Option<usize>> {
    match rustix::net::recv(from, into, RecvFlags::DONTWAIT) {
        Ok((0, _)) => Err(wrong("it has gone")),
        Ok((bytes, _)) => Ok(Some(bytes)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// All of `into`, in the time that an answer may take.
fn receive_all(from: &UnixStream, into: &mut [u8]) -> io::Result<()> {
    let end = Instant::now() + CONTROL_TIME;
    let mut received = 0;
    while received < into.len() {
        match receive_some(from, into.get_mut(received..).unwrap_or_default())? {
            Some(bytes) => received += bytes,
            None => wait_until(from, PollFlags::IN, end)?,
        }
    }
    Ok(())
}

/// Waits for a descriptor; may return for nothing.
///
/// Errors: the time is over.
pub(super) fn wait_until(fd: &impl AsFd, what: PollFlags, end: Instant) -> io::Result<()> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not answer in time"));
    }
    let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
    match poll(&mut [PollFd::new(fd, what)], Some(&left)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
