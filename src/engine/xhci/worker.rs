//! The thread of a USB disk: takes work under the controller's lock, does it without, and hands it back under the lock.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags};

use super::controller::Controller;
use crate::engine::{
    disk::{BlockBackend, BlockError},
    event::Event,
    fault::FaultReport,
    usb::storage::{Io, Job, Step},
    worker::{Malformed, Served, Session, Stop, Work},
};

/// What vCPUs, viewers and workers share.
pub(super) struct Shared(pub(super) Mutex<Controller>);

impl Shared {
    pub(super) fn controller(&self) -> MutexGuard<'_, Controller> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A disk at its port. It lasts as long as the controller: a reset of the guest's ends what the disk does, not this.
pub(super) struct Plugged {
    pub(super) shared: Arc<Shared>,
    pub(super) port: usize,
}

impl Session for Plugged {
    /// Never called: what a driver does wrong ends its endpoints, not the worker.
    fn set_broken(&self) {}
}

pub(super) struct Disk {
    pub(super) backend: Arc<dyn BlockBackend>,
    pub(super) kick: Arc<Event>,
    pub(super) report: FaultReport,
}

impl Work<Plugged> for Disk {
    fn serve(&mut self, plugged: &mut Plugged, stop: &Stop) -> Result<Served, Malformed> {
        while !stop.asked() {
            let step = plugged.shared.controller().disk_step(plugged.port);
            match step {
                Step::Io(mut job) => {
                    let result = self.run(&mut job);
                    let fault = result.as_ref().err().and_then(BlockError::host_fault);
                    plugged.shared.controller().disk_finish(plugged.port, job, result);
                    if let Some(reason) = fault {
                        (self.report)(reason);
                        return Ok(Served::HostFault);
                    }
                }
                Step::Again => {}
                Step::Idle => {
                    if !stop.wait(&[PollFd::new(&*self.kick, PollFlags::IN)]) {
                        break;
                    }
                    // Before the next look: a kick that comes after it is not lost.
                    self.kick.clear();
                }
            }
        }
        Ok(Served::Stopped)
    }
}

impl Disk {
    fn run(&self, job: &mut Job) -> Result<(), BlockError> {
        match job.io {
            Io::Read { at, bytes } => {
                let into = job.buffer.get_mut(..bytes).ok_or(BlockError::BadSpan)?;
                self.backend.read_bytes(at, into)
            }
            Io::Write { at, bytes } => {
                let from = job.buffer.get(..bytes).ok_or(BlockError::BadSpan)?;
                self.backend.write_bytes(at, from)
            }
            Io::Flush => self.backend.flush(),
        }
    }
}
