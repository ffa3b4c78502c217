//! An enabled controller: its queues, features and events, from CC.EN to the reset. Made by a vCPU, then the worker's alone.

use std::sync::{Arc, atomic::Ordering};

use super::{
    super::{
        memory::GuestRam,
        saved::BadState,
        worker::{self, Malformed},
    },
    QUEUES, Shared,
    command::{Command, Completion, Status},
    doorbells::{BAD_VALUE, NO_SUCH_DOORBELL},
    events::{Event, Events},
    features::Features,
    logs::Logs,
    queue::{CompletionQueue, SubmissionQueue},
    registers::AdminQueues,
    saved::{DoorbellsV1, SessionV1, check},
};

/// A command and the submission queue it came from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fetched {
    pub(super) queue: usize,
    pub(super) command: Command,
}

pub(super) struct Session {
    pub(super) ram: GuestRam,
    pub(super) shared: Arc<Shared>,
    submissions: [Option<SubmissionQueue>; QUEUES],
    completions: [Option<CompletionQueue>; QUEUES],
    pub(super) features: Features,
    pub(super) events: Events,
    /// It met a host fault and is done again when the guest goes on.
    pub(super) waiting: Option<Fetched>,
}

impl worker::Session for Session {
    fn set_broken(&self) {
        self.shared.fatal.store(true, Ordering::Release);
    }
}

impl Session {
    /// With the admin queues; `None` when the controller cannot work with what the driver configured.
    pub(super) fn new(ram: &GuestRam, shared: &Arc<Shared>, admin: AdminQueues) -> Option<Session> {
        if !admin.configuration_fits {
            return None;
        }
        let submission = SubmissionQueue::new(ram, admin.submission, admin.submission_entries, 0)?;
        let completion = CompletionQueue::new(ram, admin.completion, admin.completion_entries, Some(0))?;
        let mut session = Session {
            ram: ram.clone(),
            shared: Arc::clone(shared),
            submissions: [const { None }; QUEUES],
            completions: [const { None }; QUEUES],
            features: Features::default(),
            events: Events::new(),
            waiting: None,
        };
        session.add_completion_queue(0, completion);
        session.add_submission_queue(0, submission);
        Some(session)
    }

    pub(super) fn save(&self) -> SessionV1 {
        let Session { ram: _, shared: _, submissions, completions, features, events, waiting } = self;
        SessionV1 {
            submissions: submissions.each_ref().map(|queue| queue.as_ref().map(SubmissionQueue::save)),
            completions: completions.each_ref().map(|queue| queue.as_ref().map(CompletionQueue::save)),
            features: features.save(),
            events: events.save(),
            waiting: waiting.as_ref().map(|Fetched { queue, command }| command.save(*queue)),
        }
    }

    /// A session that goes on where another stopped. Doorbells and interrupts are told by themselves.
    pub(super) fn restore(ram: &GuestRam, shared: &Arc<Shared>, saved: SessionV1) -> Result<Session, BadState> {
        let mut session = Session {
            ram: ram.clone(),
            shared: Arc::clone(shared),
            submissions: [const { None }; QUEUES],
            completions: [const { None }; QUEUES],
            features: Features::restore(saved.features),
            events: Events::restore(saved.events)?,
            waiting: None,
        };
        for (place, saved) in session.completions.iter_mut().zip(saved.completions) {
            *place = saved.map(|queue| CompletionQueue::restore(ram, queue)).transpose()?;
        }
        for (place, saved) in session.submissions.iter_mut().zip(saved.submissions) {
            *place = saved.map(|queue| SubmissionQueue::restore(ram, queue)).transpose()?;
        }
        let admin = session.has_submission_queue(0) && session.has_completion_queue(0);
        check(admin, "a controller without admin queues")?;
        let mut used = session.submissions.iter().flatten().map(|queue| queue.completion_queue);
        check(used.all(|queue| session.has_completion_queue(queue)), "a queue whose completions go nowhere")?;
        if let Some(waiting) = saved.waiting {
            let queue = usize::from(waiting.queue);
            check(session.has_room(queue), "a command that cannot be answered")?;
            session.waiting = Some(Fetched { queue, command: Command::restore(waiting) });
        }
        Ok(session)
    }

    /// Whether the answer to a command of submission queue `index` has its place.
    fn has_room(&self, index: usize) -> bool {
        let Some(Some(queue)) = self.submissions.get(index) else { return false };
        matches!(self.completions.get(queue.completion_queue), Some(Some(queue)) if queue.free() > 0)
    }

    /// Checks that doorbells take the values that their queues have.
    pub(super) fn check_doorbells(&self, saved: &DoorbellsV1) -> Result<(), BadState> {
        let entries = |queue: Option<u32>| queue.unwrap_or(0);
        let tails = self.submissions.iter().map(|queue| entries(queue.as_ref().map(SubmissionQueue::entries)));
        let heads = self.completions.iter().map(|queue| entries(queue.as_ref().map(CompletionQueue::entries)));
        let saved = saved.tails.iter().chain(&saved.heads).map(|doorbell| doorbell.entries);
        check(tails.chain(heads).eq(saved), "doorbells that do not fit the queues")
    }

    pub(super) fn has_submission_queue(&self, index: usize) -> bool {
        matches!(self.submissions.get(index), Some(Some(_)))
    }
    pub(super) fn has_completion_queue(&self, index: usize) -> bool {
        matches!(self.completions.get(index), Some(Some(_)))
    }
    pub(super) fn has_io_queues(&self) -> bool {
        self.submissions.iter().skip(1).any(Option::is_some) || self.completions.iter().skip(1).any(Option::is_some)
    }
    /// Whether a submission queue completes there.
    pub(super) fn is_used(&self, completion_queue: usize) -> bool {
        self.submissions.iter().flatten().any(|queue| queue.completion_queue == completion_queue)
    }

    pub(super) fn add_completion_queue(&mut self, index: usize, queue: CompletionQueue) {
        if let Some(place) = self.completions.get_mut(index) {
            self.shared.doorbells.open_completion(index, queue.entries());
            self.shared.interrupts.open(index, queue.vector.is_some());
            *place = Some(queue);
        }
    }
    pub(super) fn add_submission_queue(&mut self, index: usize, queue: SubmissionQueue) {
        if let Some(place) = self.submissions.get_mut(index) {
            self.shared.doorbells.open_submission(index, queue.entries());
            *place = Some(queue);
        }
    }
    pub(super) fn remove_completion_queue(&mut self, index: usize) {
        if let Some(place) = self.completions.get_mut(index) {
            self.shared.doorbells.open_completion(index, 0);
            self.shared.interrupts.close(index);
            *place = None;
        }
    }
    /// Commands that are still in it are dropped.
    pub(super) fn remove_submission_queue(&mut self, index: usize) {
        if let Some(place) = self.submissions.get_mut(index) {
            self.shared.doorbells.open_submission(index, 0);
            *place = None;
        }
    }

    /// The next command of a queue whose completion queue has room for its answer.
    pub(super) fn fetch(&mut self, index: usize) -> Result<Option<Fetched>, Malformed> {
        let Some(Some(queue)) = self.submissions.get_mut(index) else { return Ok(None) };
        if !queue.has_commands(self.shared.doorbells.tail(index)) {
            return Ok(None);
        }
        let completions = queue.completion_queue;
        if !has_room(&mut self.completions, &self.shared, completions) {
            return Ok(None);
        }
        Ok(Some(Fetched { queue: index, command: queue.fetch(&self.ram)? }))
    }

    /// Looks at the doorbells for what the driver did wrong, and tells it if it asked to hear of it. True when it did something.
    pub(super) fn tell_events(&mut self, logs: &mut Logs) -> Result<bool, Malformed> {
        let mistakes = self.shared.doorbells.take_mistakes();
        for (bit, event) in [(NO_SUCH_DOORBELL, Event::NoSuchDoorbell), (BAD_VALUE, Event::BadDoorbellValue)] {
            if mistakes & bit != 0 {
                logs.record_doorbell();
                self.events.raise(event);
            }
        }
        if !self.events.can_deliver() || !has_room(&mut self.completions, &self.shared, 0) {
            return Ok(mistakes != 0);
        }
        if let Some((id, result)) = self.events.deliver() {
            self.post(0, id, Status::SUCCESS, result)?;
        }
        Ok(true)
    }

    /// Whether one more entry fits beside the answer to the command that is being done.
    pub(super) fn has_room_for_two(&self) -> bool {
        match self.completions.first() {
            Some(Some(queue)) => queue.free() > 1,
            _ => false,
        }
    }

    /// Posts the answer to a command of submission queue `index`. There is room for it.
    pub(super) fn post(&mut self, index: usize, id: u16, status: Status, result: u32) -> Result<Completion, Malformed> {
        let Some(Some(queue)) = self.submissions.get(index) else { return Err(Malformed) };
        let completion = Completion { result, queue: index as u16, queue_head: queue.head(), id, status };
        let to = queue.completion_queue;
        let Some(Some(queue)) = self.completions.get_mut(to) else { return Err(Malformed) };
        self.shared.interrupts.post(to, queue.next_tail());
        queue.post(&self.ram, &completion)?;
        self.shared.interrupts.signal(queue.vector);
        Ok(completion)
    }
}

/// Whether a completion queue takes one more entry. If not, the worker is woken when the driver has consumed some.
fn has_room(completions: &mut [Option<CompletionQueue>], shared: &Shared, index: usize) -> bool {
    let Some(Some(queue)) = completions.get_mut(index) else { return false };
    let mut look = || {
        if !queue.consume(shared.doorbells.head(index)) {
            shared.doorbells.note_bad_value();
        }
        queue.free() > 0
    };
    if look() {
        return true;
    }
    shared.doorbells.wait_for_room();
    look()
}
