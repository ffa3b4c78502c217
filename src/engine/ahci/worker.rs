//! The HBA's worker thread: takes a command, does its I/O without the HBA's lock, and shows the end of it.
//!
//! ```text
//! vCPU:    write CI ──▶ lock, set bit, unlock ──▶ wake the worker
//! worker:  lock, take slot and ticket, unlock ──▶ fetch, I/O ──▶ lock, frames, registers, line, unlock
//! reset:   lock, cancel ──▶ abandon waits ──▶ wait until nothing runs ──▶ power on
//! ```

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use super::{
    super::{
        bus::Width,
        fault::{FaultScope, FaultTicket, Retry},
        memory::{Gpa, GuestRam},
        saved::BadState,
    },
    ata::{Disk, Finish, Stop},
    atapi::CdDrive,
    fis::{Command, Transfer},
    hba::{Hba, Outcome, PORTS, Running, Wish},
    saved::{DriveV1, V1, check},
};

/// Device Control: software reset.
const SRST: u8 = 1 << 2;

/// What is behind each port; fixed for life.
pub(super) type Drives = [Option<Mutex<Drive>>; PORTS];

/// What the vCPUs, the worker and the control thread share. Lock order: `hba`, then a drive or the scope's own lock.
pub(super) struct Shared {
    hba: Mutex<Hba>,
    /// The worker's while it runs a command, unless that waits for the host; otherwise whoever has `hba` may look.
    drives: Drives,
    /// Tells the worker that there may be work, or that the pause or the device has ended.
    work: Condvar,
    /// Tells others that a command has ended or waits.
    still: Condvar,
    faults: FaultScope,
}

impl Shared {
    pub(super) fn new(hba: Hba, drives: Drives, faults: FaultScope) -> Shared {
        Shared { hba: Mutex::new(hba), drives, work: Condvar::new(), still: Condvar::new(), faults }
    }

    pub(super) fn hba(&self) -> MutexGuard<'_, Hba> {
        self.hba.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drive(&self, port: usize) -> Option<MutexGuard<'_, Drive>> {
        let drive = self.drives.get(port)?.as_ref()?;
        Some(drive.lock().unwrap_or_else(PoisonError::into_inner))
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

    /// Returns when no I/O is in flight; none begins before `resume`. A command that waits for the host goes on waiting, unless
    /// it was cancelled: its end is near, and may write guest memory.
    pub(super) fn quiesce(&self) {
        let mut hba = self.hba();
        hba.paused = true;
        let busy = |hba: &mut Hba| hba.running.is_some_and(|running| !running.waits || running.cancelled);
        drop(self.still.wait_while(hba, busy).unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn resume(&self) {
        self.hba().paused = false;
        self.work.notify_all();
    }

    /// Called while paused, so that no drive is in the middle of a command.
    pub(super) fn save(&self) -> V1 {
        let Shared { hba: _, drives, work: _, still: _, faults: _ } = self;
        let hba = self.hba().save();
        let drives = drives
            .each_ref()
            .map(|drive| drive.as_ref().map(|drive| drive.lock().unwrap_or_else(PoisonError::into_inner).save()));
        V1 { hba, drives }
    }

    /// Called while paused; what is issued goes on at `resume`.
    pub(super) fn restore(&self, V1 { hba, drives }: V1) -> Result<(), BadState> {
        for (port, saved) in drives.into_iter().enumerate() {
            match (self.drive(port), saved) {
                (Some(mut drive), Some(saved)) => drive.restore(saved)?,
                (None, None) => {}
                (Some(_), None) | (None, Some(_)) => check(false, "drives on other ports than here")?,
            }
        }
        self.hba().restore(hba)
    }

    fn give_up_waits(&self) {
        self.faults.abandon();
        self.work.notify_all();
    }

    /// Waits for the next command; `None` when the device goes away.
    fn next(&self) -> Option<(Running, Gpa, FaultTicket)> {
        let mut hba = self.hba();
        loop {
            if hba.ended {
                return None;
            }
            if let Some((running, list)) = hba.take() {
                if hba.take_device_reset(running.port)
                    && let Some(mut drive) = self.drive(running.port)
                {
                    drive.reset();
                }
                // Under the lock, so that a reset that comes later finds the ticket.
                return Some((running, list, self.faults.ticket()));
            }
            if cfg!(fuzzing) {
                // Where the thread would sleep its turn ends.
                return None;
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

    fn save(&self) -> DriveV1 {
        match self {
            Drive::Disk(disk) => DriveV1::Disk(disk.save()),
            Drive::Cd(cd) => DriveV1::Cd(cd.save()),
        }
    }

    fn restore(&mut self, saved: DriveV1) -> Result<(), BadState> {
        match (self, saved) {
            (Drive::Disk(disk), DriveV1::Disk(saved)) => disk.restore(saved),
            (Drive::Cd(cd), DriveV1::Cd(saved)) => cd.restore(saved),
            (Drive::Disk(_), DriveV1::Cd(_)) | (Drive::Cd(_), DriveV1::Disk(_)) => check(false, "another drive"),
        }
    }
}

/// Makes the thread.
#[cfg(not(fuzzing))]
pub(super) fn spawn(shared: Arc<Shared>, ram: GuestRam) -> io::Result<Option<JoinHandle<()>>> {
    std::thread::Builder::new().name("ahci".into()).spawn(move || run(&shared, &ram)).map(Some)
}

#[cfg(fuzzing)]
pub(super) fn spawn(shared: Arc<Shared>, ram: GuestRam) -> io::Result<Option<JoinHandle<()>>> {
    super::super::turns::add(move || run(&shared, &ram));
    Ok(None)
}

/// The thread's life.
fn run(shared: &Shared, ram: &GuestRam) {
    while let Some((running, list, ticket)) = shared.next() {
        let outcome = serve(shared, ram, running, list, &ticket);
        shared.finish(outcome);
    }
}

fn serve(shared: &Shared, ram: &GuestRam, running: Running, list: Gpa, ticket: &FaultTicket) -> Outcome {
    let command = match Command::fetch(ram, list, running.slot, running.outstanding) {
        Ok(command) => command,
        Err(error) => return Outcome::NotFetched(error),
    };
    if !command.fis.is_command {
        return Outcome::DeviceControl { srst: command.fis.control & SRST != 0 };
    }
    if command.is_queued() {
        shared.hba().begin_queued();
    }
    loop {
        let data = Transfer { ram, regions: &command.regions };
        let Some(mut drive) = shared.drive(running.port) else { return Outcome::Abandoned };
        let answer = drive.execute(&command, &data);
        // Nobody has it while the command waits for the host, so that it can be saved.
        drop(drive);
        match answer {
            Ok(finish) => return Outcome::Finished(Box::new(command), finish),
            Err(Stop::Host(reason)) => {
                if !shared.wait_for_host(ticket, reason) {
                    return Outcome::Abandoned;
                }
            }
            Err(stop @ (Stop::Error(_) | Stop::Queued(_) | Stop::BadMemory)) => return Outcome::Stopped(stop),
        }
    }
}
