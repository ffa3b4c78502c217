//! The worker of a device: one thread, parked until the driver runs, that serves its queues.
//!
//! ```text
//! parked ──activate──▶ working ──reset──▶ parked          (the thread exists before the first vCPU runs)
//!                       │   ▲
//!                      hold release                        (pause of the machine; a host fault holds by itself)
//! ```
//!
//! A device that is put in while the guest runs gets its thread from the machine's; one that is taken out ends it.

use std::{
    any::Any,
    array, io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::event::Event;

/// The driver broke the rules so that its queue or ring cannot be served: the device needs a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// What a worker has while the driver runs: moved in by `activate`, dropped by `reset`.
pub trait Session: Send + 'static {
    /// The driver broke the rules: nothing more is served until it resets the device, and it is told so. Called under the
    /// worker's lock, so that this never comes after a reset.
    fn set_broken(&self);
}

/// What a device does on its thread, with what it has while the driver runs.
pub trait Work<S>: Any + Send {
    /// Serves until `stop` is asked or nothing can be done. Called again after a hold: it first looks at every queue, as
    /// kicks may have been lost meanwhile. A loop that the driver can keep busy looks at `stop` in every round.
    fn serve(&mut self, session: &mut S, stop: &Stop) -> Result<Served, Malformed>;
    /// The driver reset the device: forget what belonged to it. Called by the thread that resets, while nothing is served.
    fn forget(&mut self) {}
}

/// Why `serve` returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// `stop` was asked.
    Stopped,
    /// The host cannot serve the guest now; the worker waits until it is released.
    HostFault,
}

/// The stop signal, and waiting for it together with other descriptors.
pub struct Stop {
    asked: AtomicBool,
    event: Event,
}

/// The stop signal and what a device waits for beside it.
const DESCRIPTORS_MAX: usize = 8;

/// Which of the descriptors that were waited for are ready, by their place in the list.
#[derive(Debug, Clone, Copy)]
pub struct Ready(u8);

impl Ready {
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    pub fn has(self, index: usize) -> bool {
        index < DESCRIPTORS_MAX && self.0 & 1 << index != 0
    }
}

impl Stop {
    /// Waits until one of `others`, at most seven, is ready or the stop is asked; false to stop. May return for nothing.
    pub fn wait(&self, others: &[PollFd<'_>]) -> bool {
        self.poll(others, None).is_some()
    }

    /// As `wait`, for at most so long.
    pub fn wait_for(&self, others: &[PollFd<'_>], timeout: Option<Duration>) -> bool {
        self.poll(others, timeout).is_some()
    }

    /// As `wait`, and says which of `others` are ready; `None` to stop.
    pub fn wait_ready(&self, others: &[PollFd<'_>]) -> Option<Ready> {
        self.poll(others, None)
    }

    /// As `wait_ready`, for at most so long: none is ready then.
    pub fn wait_ready_for(&self, others: &[PollFd<'_>], timeout: Duration) -> Option<Ready> {
        self.poll(others, Some(timeout))
    }

    fn poll(&self, others: &[PollFd<'_>], timeout: Option<Duration>) -> Option<Ready> {
        assert!(others.len() < DESCRIPTORS_MAX, "a device waits for a few descriptors");
        let mut fds: [PollFd<'_>; DESCRIPTORS_MAX] = array::from_fn(|_| PollFd::new(&self.event, PollFlags::IN));
        for (fd, other) in fds.iter_mut().zip(others) {
            *fd = other.clone();
        }
        // The last entry is always the stop signal. A call that was interrupted makes the worker look once more.
        let timeout = if cfg!(fuzzing) { Some(Duration::ZERO) } else { timeout };
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let found = poll(&mut fds, timeout.as_ref());
        if cfg!(fuzzing) && found == Ok(0) {
            // Where the thread would sleep its turn ends.
            self.ask();
        }
        let ready = fds.iter().enumerate().filter(|(_, fd)| !fd.revents().is_empty());
        let ready = Ready(ready.fold(0, |bits, (index, _)| bits | 1 << index));
        (!self.asked()).then_some(ready)
    }

    /// Whether the stop is asked, without waiting.
    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// Ready for reading while the stop is asked: for a worker that waits in the kernel by other means.
    pub fn signal(&self) -> &Event {
        &self.event
    }

    fn ask(&self) {
        self.asked.store(true, Ordering::Release);
        self.event.signal();
    }

    fn clear(&self) {
        self.asked.store(false, Ordering::Release);
        self.event.clear();
    }
}

/// The machine's and the transport's hold on a worker.
pub struct Worker<S>(Arc<Shared<S>>);

impl<S> Clone for Worker<S> {
    fn clone(&self) -> Worker<S> {
        Worker(Arc::clone(&self.0))
    }
}

struct Shared<S> {
    state: Mutex<State<S>>,
    changed: Condvar,
    stop: Stop,
    /// Until the end.
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct State<S> {
    /// `None` while the thread serves: it has taken this and `session` out. `None` for ever after the end.
    work: Option<Box<dyn Work<S>>>,
    session: Option<S>,
    /// How many callers wait for the thread to come out; it does not begin anew before they have had their turn.
    stoppers: usize,
    /// The machine is paused.
    held: bool,
    /// A host fault waits for its cause to go away.
    faulted: bool,
    /// The device goes away.
    ended: bool,
}

const STACK_BYTES: usize = 256 << 10;

impl<S: Session> Worker<S> {
    /// Makes the thread, parked.
    pub fn spawn(name: &str, work: impl Work<S>) -> io::Result<Worker<S>> {
        let stop = Stop { asked: AtomicBool::new(false), event: Event::new()? };
        let work: Option<Box<dyn Work<S>>> = Some(Box::new(work));
        let state = State { work, session: None, stoppers: 0, held: false, faulted: false, ended: false };
        let (state, thread) = (Mutex::new(state), Mutex::new(None));
        let shared = Arc::new(Shared { state, changed: Condvar::new(), stop, thread });
        *shared.thread.lock().unwrap_or_else(PoisonError::into_inner) = start(name, Arc::clone(&shared))?;
        Ok(Worker(shared))
    }

    /// The driver set the device to work: virtio's DRIVER_OK, NVMe's CC.EN. Returns at once.
    pub fn activate(&self, session: S) {
        let mut state = self.0.lock();
        if state.ended {
            return;
        }
        state.session = Some(session);
        self.0.changed.notify_all();
    }

    /// The driver reset the device. Returns when no request is in flight and guest RAM is not touched any more. A request
    /// that waits for the host is dropped.
    pub fn reset(&self) {
        let mut state = self.stop();
        state.session = None;
        state.faulted = false;
        if let Some(work) = &mut state.work {
            work.forget();
        }
    }

    /// Pauses; returns when no request is in flight.
    pub fn hold(&self) {
        self.0.lock().held = true;
        drop(self.stop());
    }

    /// Goes on where `hold` or a host fault stopped.
    pub fn release(&self) {
        let mut state = self.0.lock();
        state.held = false;
        state.faulted = false;
        self.0.changed.notify_all();
    }

    /// The device goes away for good. Returns when its thread has ended, and what it did its work with is dropped and closed. Whatever
    /// is called afterwards does nothing; `while_out` is not called any more.
    pub fn end(&self) {
        let mut state = self.stop();
        state.ended = true;
        let gone = (state.session.take(), state.work.take());
        self.0.changed.notify_all();
        drop(state);
        drop(gone);
        let thread = self.0.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic of the worker has been reported by its own thread.
            let _ = thread.join();
        }
    }

    /// Looks at what a worker has; nothing when the driver does not run, or broke the rules.
    pub fn look<T>(&self, at: impl FnOnce(&S) -> T) -> Option<T> {
        let state = self.stop();
        state.session.as_ref().map(at)
    }

    /// Gives `look` what the device does on its thread and what it has while the driver runs, for its saved state. The thread
    /// is out of `serve` meanwhile.
    ///
    /// Panics: `W` is not what `spawn` was given.
    pub fn while_out<W: Work<S>, T>(&self, look: impl FnOnce(&mut W, Option<&mut S>) -> T) -> T {
        let mut state = self.stop();
        let State { work, session, .. } = &mut *state;
        let work: &mut dyn Any = work.as_deref_mut().expect("the thread is out");
        look(work.downcast_mut().expect("a worker keeps what it was made with"), session.as_mut())
    }

    /// Whether somebody waits for the thread.
    #[cfg(test)]
    pub(crate) fn is_stopping(&self) -> bool {
        self.0.stop.asked()
    }

    /// Returns when the thread is out of `serve`. It stays out while the lock is held.
    fn stop(&self) -> MutexGuard<'_, State<S>> {
        let mut state = self.0.lock();
        state.stoppers += 1;
        self.0.stop.ask();
        while state.work.is_none() && !state.ended {
            state = self.0.wait(state);
        }
        state.stoppers -= 1;
        if state.stoppers == 0 {
            self.0.stop.clear();
            self.0.changed.notify_all();
        }
        state
    }
}

impl<S> Shared<S> {
    fn lock(&self) -> MutexGuard<'_, State<S>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State<S>>) -> MutexGuard<'a, State<S>> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S> State<S> {
    /// What to serve, if it is time to.
    fn take(&mut self) -> Option<(Box<dyn Work<S>>, S)> {
        if self.held || self.faulted || self.stoppers > 0 {
            return None;
        }
        let session = self.session.take()?;
        Some((self.work.take()?, session))
    }
}

#[cfg(not(fuzzing))]
fn start<S: Session>(name: &str, shared: Arc<Shared<S>>) -> io::Result<Option<JoinHandle<()>>> {
    let run = move || {
        let mut state = shared.lock();
        while !state.ended {
            state = match state.take() {
                Some((work, session)) => {
                    drop(state);
                    serve(&shared, work, session)
                }
                None => shared.wait(state),
            };
        }
    };
    std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(run).map(Some)
}

#[cfg(fuzzing)]
fn start<S: Session>(_: &str, shared: Arc<Shared<S>>) -> io::Result<Option<JoinHandle<()>>> {
    super::turns::add(move || {
        let taken = shared.lock().take();
        if let Some((work, session)) = taken {
            drop(serve(&shared, work, session));
            shared.stop.clear();
        }
    });
    Ok(None)
}

fn serve<S: Session>(shared: &Shared<S>, mut work: Box<dyn Work<S>>, mut session: S) -> MutexGuard<'_, State<S>> {
    let served = work.serve(&mut session, &shared.stop);
    let mut state = shared.lock();
    state.work = Some(work);
    match served {
        Ok(Served::Stopped) => state.session = Some(session),
        Ok(Served::HostFault) => {
            state.faulted = true;
            state.session = Some(session);
        }
        // The driver must reset the device first; nothing is served until then.
        Err(Malformed) => session.set_broken(),
    }
    shared.changed.notify_all();
    state
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
            mpsc,
        },
        thread,
    };

    use super::*;
    use crate::engine::{
        irq::IrqLine,
        memory::GuestRam,
        pci::msix::{Msix, tests::Sent},
        virtio::{
            Interrupts, Running,
            testing::{DEADLINE, eventually},
        },
    };

    /// Counts while it works, and fails when told so.
    #[derive(Default)]
    struct Counts {
        serving: AtomicBool,
        served: AtomicUsize,
        forgotten: AtomicUsize,
        fail: AtomicBool,
        /// The features of the run, as its name.
        run: AtomicU64,
    }

    struct Counter(Arc<Counts>);

    impl Work<Running> for Counter {
        fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
            self.0.served.fetch_add(1, Ordering::SeqCst);
            self.0.run.store(running.features, Ordering::SeqCst);
            if self.0.fail.load(Ordering::SeqCst) {
                return Ok(Served::HostFault);
            }
            self.0.serving.store(true, Ordering::SeqCst);
            while stop.wait(&[]) {}
            self.0.serving.store(false, Ordering::SeqCst);
            Ok(Served::Stopped)
        }
        fn forget(&mut self) {
            self.0.forgotten.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn running(name: u64) -> Running {
        let msix = Msix::new(1, Arc::new(Sent::default()));
        let interrupts = Interrupts::new(msix, IrqLine::unconnected(), 0);
        Running { ram: GuestRam::new(1 << 20).unwrap(), queues: Vec::new(), interrupts, features: name }
    }

    fn worker() -> (Worker<Running>, Arc<Counts>) {
        let counts = Arc::new(Counts::default());
        (Worker::spawn("test", Counter(Arc::clone(&counts))).unwrap(), counts)
    }

    fn serving(counts: &Counts) -> bool {
        counts.serving.load(Ordering::SeqCst)
    }

    #[test]
    fn hold_and_reset_return_when_the_worker_is_out() {
        let (worker, counts) = worker();
        for name in 1..200 {
            worker.activate(running(name));
            eventually("work", || serving(&counts));
            worker.hold();
            assert!(!serving(&counts));
            worker.hold();
            worker.release();
            worker.release();
            eventually("work again", || serving(&counts));
            assert_eq!(counts.run.load(Ordering::SeqCst), name);
            worker.reset();
            assert!(!serving(&counts));
        }
        worker.reset();
        eventually("forgotten", || counts.forgotten.load(Ordering::SeqCst) > 0);
    }

    #[test]
    fn a_look_finds_the_worker_out_with_all_it_has_and_lets_it_go_on() {
        let (worker, counts) = worker();
        let name = || worker.while_out(|_: &mut Counter, running| running.map(|running| running.features));
        assert_eq!(name(), None);
        worker.activate(running(7));
        for _ in 0..100 {
            eventually("work", || serving(&counts));
            let out = worker.while_out(|counter: &mut Counter, running| !serving(&counter.0) && running.is_some());
            assert!(out);
        }
        worker.hold();
        assert_eq!(name(), Some(7));
        worker.release();
        eventually("work", || serving(&counts));
    }

    #[test]
    fn what_is_activated_while_held_starts_on_release_and_what_is_reset_does_not() {
        let (worker, counts) = worker();
        worker.hold();
        worker.activate(running(1));
        worker.reset();
        worker.activate(running(2));
        worker.hold();
        assert_eq!(counts.served.load(Ordering::SeqCst), 0);
        worker.release();
        eventually("work", || serving(&counts));
        assert_eq!((counts.served.load(Ordering::SeqCst), counts.run.load(Ordering::SeqCst)), (1, 2));
    }

    #[test]
    fn a_host_fault_waits_for_a_release_or_a_reset() {
        let (worker, counts) = worker();
        let served = || counts.served.load(Ordering::SeqCst);
        counts.fail.store(true, Ordering::SeqCst);
        worker.activate(running(1));
        eventually("a fault", || served() == 1);
        worker.hold();
        worker.release();
        eventually("another attempt", || served() == 2);
        worker.hold();
        assert_eq!(served(), 2, "one attempt for each release");
        worker.release();
        eventually("a third attempt", || served() == 3);
        worker.reset();
        counts.fail.store(false, Ordering::SeqCst);
        worker.activate(running(2));
        eventually("work", || serving(&counts));
    }

    #[test]
    fn an_end_in_the_middle_of_work_drops_everything_and_cannot_be_followed_by_more() {
        let (worker, counts) = worker();
        worker.activate(running(1));
        eventually("work", || serving(&counts));
        let other = worker.clone();
        worker.end();
        assert!(!serving(&counts));
        assert_eq!(Arc::strong_count(&counts), 1, "what it worked with is gone");
        assert!(worker.0.thread.lock().unwrap().is_none());
        other.activate(running(2));
        other.hold();
        other.release();
        other.reset();
        other.end();
        assert_eq!((counts.served.load(Ordering::SeqCst), other.look(|running| running.features)), (1, None));
    }

    #[test]
    fn an_end_comes_through_while_held_or_stopped_by_a_host_fault() {
        for fault in [false, true] {
            let (worker, counts) = worker();
            counts.fail.store(fault, Ordering::SeqCst);
            worker.activate(running(1));
            eventually("an attempt", || counts.served.load(Ordering::SeqCst) == 1);
            worker.hold();
            worker.end();
            worker.release();
            assert_eq!(Arc::strong_count(&counts), 1);
        }
        let (worker, counts) = worker();
        worker.end();
        assert_eq!(Arc::strong_count(&counts), 1, "never at work");
    }

    #[test]
    fn pause_resume_reset_and_start_from_several_threads_leave_it_working() {
        let (worker, counts) = worker();
        let (tell, told) = mpsc::channel();
        let rounds = 3_000;
        type Job = Box<dyn Fn(&Worker<Running>, u64) + Send>;
        let jobs: [Job; 3] = [
            Box::new(|worker, _| {
                worker.hold();
                worker.release();
            }),
            Box::new(|worker, round| {
                worker.reset();
                worker.activate(running(round));
            }),
            Box::new(|worker, _| worker.hold()),
        ];
        for job in jobs {
            let (worker, tell) = (worker.clone(), tell.clone());
            thread::spawn(move || {
                (0..rounds).for_each(|round| job(&worker, round));
                tell.send(()).unwrap();
            });
        }
        for _ in 0..3 {
            told.recv_timeout(DEADLINE).expect("nobody waits for ever");
        }
        worker.release();
        eventually("work", || serving(&counts));
        worker.reset();
        assert!(!serving(&counts));
    }
}
