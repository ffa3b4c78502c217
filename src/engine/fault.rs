//! Host faults: how a device waits when the host cannot serve the guest now, such as for want of disk space.
//!
//! The machine owns one [`HostFaults`]; every device takes its [`FaultScope`] from it. A worker takes a ticket when it takes
//! a request, under the lock that its device's reset also takes. So a reset that comes later always finds the ticket, and
//! the worker cannot go to sleep after the wake-up that was meant for it.
//!
//! ```text
//! worker: ticket ── I/O fails ── wait_for_retry(reason) ─┬─ resume()  ──▶ Again: the same request once more
//!                                     │ report(reason)   └─ abandon() ──▶ Abandon: drop the request, answer nothing
//!                                     ▼
//!                            machine pauses the guest
//! ```

use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

/// Told when the host cannot serve a request: a sentence for the guest's page. The machine pauses the guest.
pub type FaultReport = Arc<dyn Fn(String) + Send + Sync>;

/// What becomes of a request that the host could not serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The guest was resumed: try the request again.
    Again,
    /// The device or the machine was reset, or ends: drop the request without an answer.
    Abandon,
}

/// Where devices report that the host cannot serve the guest now, and where the machine answers. Clones are the same one.
#[derive(Clone)]
pub struct HostFaults(Arc<Inner>);

struct Inner {
    report: Box<dyn Fn(String) + Send + Sync>,
    answers: Mutex<Answers>,
    changed: Condvar,
}

/// Both numbers only grow.
#[derive(Default)]
struct Answers {
    resumes: u64,
    abandons: u64,
}

impl HostFaults {
    /// `report` gets a sentence for the guest's page and makes the machine pause the guest. It is called on worker threads,
    /// without any lock of a device, once for every request that fails; it must not wait for devices.
    pub fn new(report: impl Fn(String) + Send + Sync + 'static) -> HostFaults {
        HostFaults(Arc::new(Inner { report: Box::new(report), answers: Mutex::default(), changed: Condvar::new() }))
    }

    /// The part of one device, or of one worker thread.
    pub fn scope(&self) -> FaultScope {
        FaultScope { faults: self.clone(), abandons: Arc::default() }
    }

    /// The guest runs again: every waiting request is tried again.
    pub fn resume(&self) {
        self.answers().resumes += 1;
        self.0.changed.notify_all();
    }

    /// The machine is reset or ends: every waiting request is dropped.
    pub fn abandon(&self) {
        self.answers().abandons += 1;
        self.0.changed.notify_all();
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.0.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One device's part of [`HostFaults`].
#[derive(Clone)]
pub struct FaultScope {
    faults: HostFaults,
    abandons: Arc<AtomicU64>, // changed only under the lock of `Answers`
}

impl FaultScope {
    /// Call this when a request is taken, under the device's lock.
    pub fn ticket(&self) -> FaultTicket {
        let answers = self.faults.answers();
        FaultTicket { seen: self.abandoned(&answers), scope: self.clone() }
    }

    /// The device is reset: its requests that wait, and those with a ticket of before this call, are dropped.
    pub fn abandon(&self) {
        let answers = self.faults.answers();
        self.abandons.fetch_add(1, Ordering::Relaxed);
        drop(answers);
        self.faults.0.changed.notify_all();
    }

    fn abandoned(&self, answers: &Answers) -> u64 {
        answers.abandons + self.abandons.load(Ordering::Relaxed)
    }
}

/// One request's right to wait.
pub struct FaultTicket {
    scope: FaultScope,
    seen: u64,
}

impl FaultTicket {
    /// Reports `reason` and waits until the machine or the device answers. Called without locks; may be called again with
    /// the same ticket when the next attempt fails too.
    pub fn wait_for_retry(&self, reason: String) -> Retry {
        let faults = &self.scope.faults;
        let answers = faults.answers();
        if self.scope.abandoned(&answers) != self.seen {
            return Retry::Abandon;
        }
        let resumes = answers.resumes;
        drop(answers);
        (faults.0.report)(reason);
        let answers = faults
            .0
            .changed
            .wait_while(faults.answers(), |answers| {
                answers.resumes == resumes && self.scope.abandoned(answers) == self.seen
            })
            .unwrap_or_else(PoisonError::into_inner);
        if self.scope.abandoned(&answers) == self.seen { Retry::Again } else { Retry::Abandon }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    fn faults() -> (HostFaults, mpsc::Receiver<String>) {
        let (tell, told) = mpsc::channel();
        let tell = Mutex::new(tell);
        (HostFaults::new(move |reason| drop(tell.lock().unwrap().send(reason))), told)
    }

    #[test]
    fn a_request_waits_until_the_guest_is_resumed() {
        let (faults, told) = faults();
        let ticket = faults.scope().ticket();
        let waiter =
            thread::spawn(move || (ticket.wait_for_retry("no space".into()), ticket.wait_for_retry("still".into())));
        assert_eq!(told.recv_timeout(DEADLINE).unwrap(), "no space");
        faults.resume();
        assert_eq!(told.recv_timeout(DEADLINE).unwrap(), "still", "a resume of before does not count twice");
        faults.abandon();
        assert_eq!(waiter.join().unwrap(), (Retry::Again, Retry::Abandon));
    }

    #[test]
    fn an_abandon_before_the_wait_is_not_missed_and_not_reported() {
        let (faults, told) = faults();
        let (mine, other) = (faults.scope(), faults.scope());
        let (first, second) = (mine.ticket(), other.ticket());
        mine.abandon();
        assert_eq!(first.wait_for_retry("late".into()), Retry::Abandon);
        assert!(told.try_recv().is_err());
        faults.abandon();
        assert_eq!(second.wait_for_retry("late".into()), Retry::Abandon);
    }

    #[test]
    fn one_device_is_reset_while_another_goes_on_waiting() {
        let (faults, told) = faults();
        let (mine, other) = (faults.scope(), faults.scope());
        let (first, second) = (mine.ticket(), other.ticket());
        let first = thread::spawn(move || first.wait_for_retry("mine".into()));
        let second = thread::spawn(move || second.wait_for_retry("other".into()));
        told.recv_timeout(DEADLINE).unwrap();
        told.recv_timeout(DEADLINE).unwrap();
        mine.abandon();
        assert_eq!(first.join().unwrap(), Retry::Abandon);
        assert!(!second.is_finished());
        faults.resume();
        assert_eq!(second.join().unwrap(), Retry::Again);
    }

    #[test]
    fn a_reset_wins_over_a_resume_that_follows_at_once() {
        let (faults, told) = faults();
        let scope = faults.scope();
        let ticket = scope.ticket();
        let waiter = thread::spawn(move || ticket.wait_for_retry("full".into()));
        told.recv_timeout(DEADLINE).unwrap();
        scope.abandon();
        faults.resume();
        assert_eq!(waiter.join().unwrap(), Retry::Abandon);
    }
}
