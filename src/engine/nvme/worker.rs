//! The controller's thread: fetches commands from all queues in turn, does them one after another, posts their completions.

use std::sync::{Arc, atomic::Ordering};

use rustix::event::{PollFd, PollFlags};

use super::{
    super::{
        disk::BlockBackend,
        fault::FaultReport,
        worker::{Malformed, Served, Stop, Work},
    },
    QUEUES, SHUTDOWN_DONE, SHUTDOWN_NONE,
    admin::Answer,
    command::{Failure, Status},
    identify::Identity,
    io::Disk,
    logs::Logs,
    session::{Fetched, Session},
};

/// What outlives a reset of the controller.
pub(super) struct Commands {
    pub(super) identity: Identity,
    pub(super) disk: Disk,
    pub(super) logs: Logs,
    pub(super) report: FaultReport,
}

/// What one look at everything came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    Busy,
    Idle,
    HostFault,
}

impl Commands {
    pub(super) fn new(backend: Arc<dyn BlockBackend>, identity: Identity, report: FaultReport) -> Commands {
        Commands { identity, disk: Disk::new(backend), logs: Logs::default(), report }
    }
}

impl Work<Session> for Commands {
    fn serve(&mut self, session: &mut Session, stop: &Stop) -> Result<Served, Malformed> {
        let shared = Arc::clone(&session.shared);
        let doorbells = &shared.doorbells;
        doorbells.woke_up();
        loop {
            match self.work_off(session, stop)? {
                Round::HostFault => return Ok(Served::HostFault),
                Round::Busy => return Ok(Served::Stopped),
                Round::Idle => {}
            }
            doorbells.fall_asleep();
            // Whoever comes from here on signals; what came just before is found by one more look.
            match self.round(session, stop)? {
                Round::HostFault => return Ok(Served::HostFault),
                Round::Idle if !stop.wait(&[PollFd::new(doorbells.kick(), PollFlags::IN)]) => {
                    return Ok(Served::Stopped);
                }
                Round::Idle | Round::Busy => doorbells.woke_up(),
            }
            if stop.asked() {
                return Ok(Served::Stopped);
            }
        }
    }
}

impl Commands {
    /// Goes on until nothing is left, or the stop is asked: `Busy` then.
    fn work_off(&mut self, session: &mut Session, stop: &Stop) -> Result<Round, Malformed> {
        loop {
            match self.round(session, stop)? {
                Round::Busy if !stop.asked() => {}
                other => return Ok(other),
            }
        }
    }

    /// At most one command of each queue.
    fn round(&mut self, session: &mut Session, stop: &Stop) -> Result<Round, Malformed> {
        let mut round = Round::Idle;
        if let Some(fetched) = session.waiting.take() {
            if !self.run(session, fetched)? {
                return Ok(Round::HostFault);
            }
            round = Round::Busy;
        }
        if session.shared.shutdown.load(Ordering::Acquire) != SHUTDOWN_NONE {
            return Ok(self.shut_down(session));
        }
        if session.tell_events(&mut self.logs)? {
            round = Round::Busy;
        }
        for queue in 0..QUEUES {
            let Some(fetched) = session.fetch(queue)? else { continue };
            if !self.run(session, fetched)? {
                return Ok(Round::HostFault);
            }
            round = Round::Busy;
            if stop.asked() {
                break;
            }
        }
        Ok(round)
    }

    /// CC.SHN (7.6.2): the write cache goes to the disk, and nothing is served any more before a reset.
    fn shut_down(&mut self, session: &Session) -> Round {
        if session.shared.shutdown_asked() {
            match self.disk.flush() {
                Err(Failure::Host(reason)) => {
                    (self.report)(reason);
                    return Round::HostFault;
                }
                Ok(()) | Err(Failure::Status(_)) => session.shared.shutdown.store(SHUTDOWN_DONE, Ordering::Release),
            }
        }
        Round::Idle
    }

    /// Does a command and posts its completion; false when the host cannot serve it now and it waits.
    fn run(&mut self, session: &mut Session, fetched: Fetched) -> Result<bool, Malformed> {
        let Fetched { queue, command } = fetched;
        let answer = if queue == 0 {
            self.admin(session, &command)
        } else {
            self.disk.execute(&session.ram, &command, session.features.write_cache).map(|()| Answer::Done(0))
        };
        match answer {
            Ok(Answer::Done(result)) => {
                session.post(queue, command.id, Status::SUCCESS, result)?;
            }
            Ok(Answer::Held) => {}
            Ok(Answer::Aborted(id)) => {
                session.post(0, id, Status::ABORT_REQUESTED, 0)?;
                session.post(0, command.id, Status::SUCCESS, 0)?;
            }
            Err(Failure::Status(status)) => {
                let completion = session.post(queue, command.id, status, 0)?;
                let start_block = if queue == 0 { 0 } else { command.start_block() };
                self.logs.record(&completion, start_block, command.namespace);
            }
            Err(Failure::Host(reason)) => {
                session.waiting = Some(fetched);
                (self.report)(reason);
                return Ok(false);
            }
        }
        Ok(true)
    }
}
