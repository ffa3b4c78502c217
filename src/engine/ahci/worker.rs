//! The HBA's worker thread: takes a command, does its I/O without any lock, and shows the end of it.
//!
//! ```text
//! vCPU:    write CI ──▶ lock, set bit, unlock ──▶ wake the worker
//! worker:  lock, take slot and ticket, unlock ──▶ fetch, I/O ──▶ lock, frames, registers, line, unlock
//! reset:   lock, cancel ──▶ abandon waits ──▶ wait until nothing runs ──▶ power on
//! ```

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::{
    super::{
        bus::Width,
        fault::{FaultScope, FaultTicket, Retry},
        memory::{Gpa, GuestRam},
    },
    ata::{Disk, Finish, Stop},
    atapi::CdDrive,
    fis::{Command, Transfer},
    hba::{Hba, Outcome, Running, Wish},
};

/// Device Control: software reset.
const SRST: u8 = 1 << 2;

/// What the vCPUs, the worker and the control thread share. Lock order: `hba` before the scope's own lock.
pub(super) struct Shared {
    hba: Mutex<Hba>,
    /// Tells the worker that there may be work, or that the pause or the device has ended.
    work: Condvar,
    /// Tells others that a command has ended or waits.
    still: Condvar,
    faults: FaultScope,
}

impl Shared {
    pub(super) fn new(hba: Hba, faults: FaultScope) -> Shared {
        Shared { hba: Mutex::new(hba), work: Condvar::new(), still: Condvar::new(), faults }
    }

    pub(super) fn hba(&self) -> MutexGuard<'_, Hba> {
        self.hba.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A register write by a vCPU.
    pub(super) fn write(&self, offset: u64, width: Width, value: u64) {
        let mut hba = self.hba();
        match hba.write(offset, width, value) {
            Wish::Nothing => {}
            Wish::Work => self.work.notify_all(),
            // Under the lock, so that the ticket of a later command is not given up too.
            Wish::GiveUp => self.give_up_waits(),
        }
    }

    /// Back to power on. Returns when no command runs, so nothing of before reaches guest memory any more.
    pub(super) fn reset(&self) {
        let mut hba = self.hba();
        hba.stop();
        self.give_up_waits();
        hba = self.still.wait_while(hba, |hba| hba.running.is_some()).unwrap_or_else(PoisonError::into_inner);
        hba.power_on();
    }

    /// Stops the worker; its thread ends after the running command.
    pub(super) fn end(&self) {
        let mut hba = self.hba();
        hba.ended = true;
        hba.stop();
        self.give_up_waits();
    }

    /// Returns when no I/O is in flight; none begins before `resume`. A command that waits for the host goes on waiting.
    pub(super) fn quiesce(&self) {
        let mut hba = self.hba();
        hba.paused = true;
        let busy = |hba: &mut Hba| hba.running.is_some_and(|running| !running.waits);
        drop(self.still.wait_while(hba, busy).unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn resume(&self) {
        self.hba().paused = false;
        self.work.notify_all();
    }

    fn give_up_waits(&self) {
        self.faults.abandon();
        self.work.notify_all();
    }

    /// Waits for the next command; `None` when the device goes away.
    fn next(&self, drives: &mut [Option<Drive>]) -> Option<(Running, Gpa, FaultTicket)> {
        let mut hba = self.hba();
        loop {
            if hba.ended {
                return None;
            }
            if let Some((running, list)) = hba.take() {
                if hba.take_device_reset(running.port)
                    && let Some(Some(drive)) = drives.get_mut(running.port)
                {
                    drive.reset();
                }
                // Under the lock, so that a reset that comes later finds the ticket.
                return Some((running, list, self.faults.ticket()));
            }
            hba = self.work.wait(hba).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn finish(&self, outcome: Outcome) {
        self.hba().finish(outcome);
        self.still.notify_all();
    }

    /// Waits until the command may be tried again; false when it is given up.
    fn wait_for_host(&self, ticket: &FaultTicket, reason: String) -> bool {
        self.set_waits(true);
        let retry = ticket.wait_for_retry(reason);
        let hba = self.hba();
        let held = |hba: &mut Hba| hba.paused && !hba.ended && hba.running.is_some_and(|running| !running.cancelled);
        let mut hba = self.work.wait_while(hba, held).unwrap_or_else(PoisonError::into_inner);
        match &mut hba.running {
            Some(running) if retry == Retry::Again && !running.cancelled => {
                running.waits = false;
                true
            }
            _ => false,
        }
    }

    fn set_waits(&self, waits: bool) {
        if let Some(running) = &mut self.hba().running {
            running.waits = waits;
        }
        self.still.notify_all();
    }
}

/// The device behind a port.
pub(super) enum Drive {
    Disk(Disk),
    Cd(CdDrive),
}

impl Drive {
    fn reset(&mut self) {
        match self {
            Drive::Disk(disk) => disk.reset(),
            Drive::Cd(cd) => cd.reset(),
        }
    }

    fn execute(&mut self, command: &Command, data: &Transfer<'_>) -> Result<Finish, Stop> {
        match self {
            Drive::Disk(disk) => disk.execute(command, data),
            Drive::Cd(cd) => cd.execute(command, data),
        }
    }
}

/// The thread's life.
pub(super) fn run(shared: &Shared, ram: &GuestRam, mut drives: Vec<Option<Drive>>) {
    while let Some((running, list, ticket)) = shared.next(&mut drives) {
        let outcome = match drives.get_mut(running.port) {
            Some(Some(drive)) => serve(shared, ram, drive, list, running.slot, &ticket),
            _ => Outcome::Abandoned,
        };
        shared.finish(outcome);
    }
}

fn serve(shared: &Shared, ram: &GuestRam, drive: &mut Drive, list: Gpa, slot: u8, ticket: &FaultTicket) -> Outcome {
    let command = match Command::fetch(ram, list, slot) {
        Ok(command) => command,
        Err(error) => return Outcome::NotFetched(error),
    };
    if !command.fis.is_command {
        return Outcome::DeviceControl { srst: command.fis.control & SRST != 0 };
    }
    loop {
        let data = Transfer { ram, regions: &command.regions };
        match drive.execute(&command, &data) {
            Ok(finish) => return Outcome::Finished(Box::new(command), finish),
            Err(Stop::Host(reason)) => {
                if !shared.wait_for_host(ticket, reason) {
                    return Outcome::Abandoned;
                }
            }
            Err(stop @ (Stop::Error(_) | Stop::BadMemory)) => return Outcome::Stopped(stop),
        }
    }
}
