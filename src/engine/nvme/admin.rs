//! The admin command set (NVM Express 1.4, section 5). What is not here is answered as an invalid opcode.

use std::sync::atomic::Ordering;

use super::{
    super::memory::Gpa,
    IO_QUEUES, PAGE_BYTES,
    command::{ALL_NAMESPACES, Command, Failure, NAMESPACE, Status},
    events::Event,
    features,
    identify::Identity,
    prp,
    queue::{CompletionQueue, SubmissionQueue},
    registers::ENTRIES_MAX,
    session::Session,
    worker::Commands,
};

const DELETE_SUBMISSION_QUEUE: u8 = 0x00;
const CREATE_SUBMISSION_QUEUE: u8 = 0x01;
const GET_LOG_PAGE: u8 = 0x02;
const DELETE_COMPLETION_QUEUE: u8 = 0x04;
const CREATE_COMPLETION_QUEUE: u8 = 0x05;
const IDENTIFY: u8 = 0x06;
const ABORT: u8 = 0x08;
const SET_FEATURES: u8 = 0x09;
const GET_FEATURES: u8 = 0x0a;
const ASYNC_EVENT_REQUEST: u8 = 0x0c;

/// Command dword 11 of both Create commands: the queue is one piece, as CAP.CQR demands.
const CONTIGUOUS: u32 = 1 << 0;
const INTERRUPTS: u32 = 1 << 1;
/// Command dword 10 of Get Log Page: reading does not clear the event.
const RETAIN_EVENT: u32 = 1 << 15;

/// How a command ends.
pub(super) enum Answer {
    /// With dword 0 of its completion.
    Done(u32),
    /// Not now: it is an event request.
    Held,
    /// Abort found its command: that one is completed too, as aborted.
    Aborted(u16),
}

impl Commands {
    pub(super) fn admin(&mut self, session: &mut Session, command: &Command) -> Result<Answer, Failure> {
        if !command.is_plain() {
            return Err(Status::INVALID_FIELD.into());
        }
        let done = |()| Answer::Done(0);
        match command.opcode {
            CREATE_COMPLETION_QUEUE => Ok(create_completion_queue(session, command).map(done)?),
            CREATE_SUBMISSION_QUEUE => Ok(create_submission_queue(session, command).map(done)?),
            DELETE_COMPLETION_QUEUE => Ok(delete_completion_queue(session, command).map(done)?),
            DELETE_SUBMISSION_QUEUE => Ok(delete_submission_queue(session, command).map(done)?),
            IDENTIFY => Ok(self.identify(session, command).map(done)?),
            GET_LOG_PAGE => Ok(self.get_log_page(session, command).map(done)?),
            GET_FEATURES => {
                let vectors = session.shared.interrupts.vectors();
                Ok(Answer::Done(session.features.get(command, vectors)?))
            }
            SET_FEATURES => self.set_features(session, command).map(Answer::Done),
            ABORT => Ok(abort(session, command)),
            ASYNC_EVENT_REQUEST => {
                session.events.hold(command.id)?;
                Ok(Answer::Held)
            }
            _ => Err(Status::INVALID_OPCODE.into()),
        }
    }

    /// Section 5.15; the controller or namespace structure is in the low byte of dword 10.
    fn identify(&mut self, session: &Session, command: &Command) -> Result<(), Status> {
        let namespace = command.namespace;
        let data = match command.words[0] as u8 {
            0x00 if namespace == NAMESPACE => self.identity.namespace(),
            0x01 => self.identity.controller(),
            0x02 if namespace < ALL_NAMESPACES - 1 => Identity::active_namespaces(namespace),
            0x03 if namespace == NAMESPACE => self.identity.descriptors(),
            0x00 | 0x02 | 0x03 => return Err(Status::INVALID_NAMESPACE),
            _ => return Err(Status::INVALID_FIELD),
        };
        prp::give(&session.ram, command, &data, &mut self.disk.spans)
    }

    /// Section 5.14. What is asked for past a page's end stays as it was.
    fn get_log_page(&mut self, session: &mut Session, command: &Command) -> Result<(), Status> {
        let [select, upper, offset_low, offset_high, ..] = command.words;
        if !matches!(command.namespace, 0 | NAMESPACE | ALL_NAMESPACES) {
            return Err(Status::INVALID_FIELD);
        }
        let page = self.logs.page(select as u8, &self.disk.counters, &session.features)?;
        let wanted = ((u64::from(upper & 0xffff) << 16 | u64::from(select >> 16)) + 1) * 4;
        let offset = u64::from(offset_high) << 32 | u64::from(offset_low);
        let part = page.part(offset, wanted).filter(|_| offset.is_multiple_of(4)).ok_or(Status::INVALID_FIELD)?;
        if !part.is_empty() {
            prp::give(&session.ram, command, part, &mut self.disk.spans)?;
        }
        if let Some(class) = page.class
            && select & RETAIN_EVENT == 0
        {
            session.events.clear(class);
        }
        Ok(())
    }

    fn set_features(&mut self, session: &mut Session, command: &Command) -> Result<u32, Failure> {
        let (vectors, queues_exist) = (session.shared.interrupts.vectors(), session.has_io_queues());
        if command.words[0] as u8 == features::WRITE_CACHE && command.words[1] & 1 == 0 {
            self.disk.flush()?; // what is in the cache now must not stay there
        }
        let result = session.features.set(command, vectors, queues_exist)?;
        if session.features.temperature_event() {
            session.events.raise(Event::Temperature);
        }
        Ok(result)
    }
}

/// The number of a new queue or of one to delete.
fn queue_id(command: &Command) -> Result<usize, Status> {
    match command.words[0] as u16 {
        id @ 1..=IO_QUEUES => Ok(usize::from(id)),
        _ => Err(Status::INVALID_QUEUE_ID),
    }
}

/// Entries and place of a new queue.
fn new_ring(session: &Session, command: &Command) -> Result<(u32, Gpa), Status> {
    let entries = (command.words[0] >> 16) + 1;
    let fits = session.shared.entry_sizes_fit.load(Ordering::Acquire);
    if !(2..=ENTRIES_MAX).contains(&entries) || !fits {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    if command.words[1] & CONTIGUOUS == 0 {
        return Err(Status::INVALID_FIELD);
    }
    if !command.prp1.is_multiple_of(u64::from(PAGE_BYTES)) {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    Ok((entries, Gpa(command.prp1)))
}

/// Section 5.3. A queue outside RAM is refused at once, so that no later access to it can fail.
fn create_completion_queue(session: &mut Session, command: &Command) -> Result<(), Status> {
    let id = queue_id(command)?;
    if session.has_completion_queue(id) {
        return Err(Status::INVALID_QUEUE_ID);
    }
    let (entries, base) = new_ring(session, command)?;
    let vector = (command.words[1] >> 16) as u16;
    if vector >= session.shared.interrupts.vectors() {
        return Err(Status::INVALID_VECTOR);
    }
    let vector = (command.words[1] & INTERRUPTS != 0).then_some(vector);
    let queue = CompletionQueue::new(&session.ram, base, entries, vector).ok_or(Status::INVALID_FIELD)?;
    session.add_completion_queue(id, queue);
    Ok(())
}

/// Section 5.4.
fn create_submission_queue(session: &mut Session, command: &Command) -> Result<(), Status> {
    let id = queue_id(command)?;
    if session.has_submission_queue(id) {
        return Err(Status::INVALID_QUEUE_ID);
    }
    let (entries, base) = new_ring(session, command)?;
    let completions = match (command.words[1] >> 16) as u16 {
        id @ 1..=IO_QUEUES => usize::from(id),
        _ => return Err(Status::INVALID_QUEUE_ID),
    };
    if !session.has_completion_queue(completions) {
        return Err(Status::COMPLETION_QUEUE_INVALID);
    }
    let queue = SubmissionQueue::new(&session.ram, base, entries, completions).ok_or(Status::INVALID_FIELD)?;
    session.add_submission_queue(id, queue);
    Ok(())
}

/// Section 5.5.
fn delete_completion_queue(session: &mut Session, command: &Command) -> Result<(), Status> {
    let id = queue_id(command)?;
    if !session.has_completion_queue(id) {
        return Err(Status::INVALID_QUEUE_ID);
    }
    if session.is_used(id) {
        return Err(Status::INVALID_QUEUE_DELETION);
    }
    session.remove_completion_queue(id);
    Ok(())
}

/// Section 5.6.
fn delete_submission_queue(session: &mut Session, command: &Command) -> Result<(), Status> {
    let id = queue_id(command)?;
    if !session.has_submission_queue(id) {
        return Err(Status::INVALID_QUEUE_ID);
    }
    session.remove_submission_queue(id);
    Ok(())
}

/// Section 5.1. Every other command than an event request is done, or not yet fetched, when this is: bit 0 says not aborted.
fn abort(session: &mut Session, command: &Command) -> Answer {
    let (queue, id) = (command.words[0] as u16, (command.words[0] >> 16) as u16);
    if queue == 0 && session.has_room_for_two() && session.events.abort(id) {
        return Answer::Aborted(id);
    }
    Answer::Done(1)
}
