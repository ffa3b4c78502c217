//! The worker of a device: one thread, parked until the driver runs, that serves its queues.
//!
//! ```text
//! parked ──activate──▶ working ──reset──▶ parked          (the thread exists before the first vCPU runs)
//!                       │   ▲
//!                      hold release                        (pause of the machine; a host fault holds by itself)
//! ```

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use super::{Running, queue::Malformed};
use crate::engine::event::Event;
use rustix::event::{PollFd, PollFlags, poll};

/// What a device does on its thread.
pub trait Work: Send + 'static {
    /// Serves until `stop` is asked or nothing can be done. Called again after a hold: it first looks at every queue, as
    /// kicks may have been lost meanwhile.
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed>;
    /// The driver reset the device: forget what belonged to it.
    fn forget(&mut self) {}
}

/// Why `serve` returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// `stop` was asked.
    Stopped,
    /// The host cannot serve the guest now; the worker holds until it is released.
    HostFault,
}

/// The stop signal, and waiting for it together with other descriptors.
pub struct Stop {
    event: Event,
}

impl Stop {
    /// Waits until one of `others` is readable or the stop is asked. Returns which are ready, in their order; `None` to stop.
    pub fn wait(&self, others: &[BorrowedFd<'_>]) -> Option<Vec<bool>> {
        let mut fds: Vec<PollFd<'_>> = vec![PollFd::new(&self.event, PollFlags::IN)];
        fds.extend(others.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)));
        loop {
            match poll(&mut fds, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return None,
            }
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        if ready.next() == Some(true) { None } else { Some(ready.collect()) }
    }

    /// Whether the stop is asked, without waiting.
    pub fn asked(&self) -> bool {
        let mut fds = [PollFd::new(&self.event, PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|count| count > 0)
    }
}

/// The machine's and the transport's hold on a worker.
#[derive(Clone)]
pub struct Worker(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stop: Stop,
}

#[derive(Default)]
struct State {
    running: Option<Running>,
    /// The machine is paused, or a host fault waits for its cause to go away.
    held: bool,
    /// The thread has `running` taken out.
    busy: bool,
    forget: bool,
}

const STACK_BYTES: usize = 256 << 10;

impl Worker {
    /// Makes the thread, parked.
    pub fn spawn(name: &str, work: impl Work) -> io::Result<Worker> {
        let stop = Stop { event: Event::new()? };
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), stop });
        let thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || run(&thread, Box::new(work)))?;
        Ok(Worker(shared))
    }

    /// The driver wrote DRIVER_OK. Returns at once.
    pub fn activate(&self, running: Running) {
        let mut state = self.0.lock();
        state.running = Some(running);
        self.0.changed.notify_all();
    }

    /// The driver reset the device. Returns when no request is in flight and guest RAM is not touched any more.
    pub fn reset(&self) {
        let mut state = self.stop();
        state.running = None;
        state.forget = true;
        self.0.changed.notify_all();
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
        self.0.changed.notify_all();
    }

    fn stop(&self) -> MutexGuard<'_, State> {
        let mut state = self.0.lock();
        while state.busy {
            self.0.stop.event.signal();
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        // A signal that came too late must not stop the next run.
        self.0.stop.event.clear();
        state
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn run(shared: &Shared, mut work: Box<dyn Work>) {
    let mut state = shared.lock();
    loop {
        if std::mem::take(&mut state.forget) {
            work.forget();
        }
        let ready = if state.held { None } else { state.running.take() };
        let Some(mut running) = ready else {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        state.busy = true;
        drop(state);
        let served = work.serve(&mut running, &shared.stop);
        state = shared.lock();
        state.busy = false;
        match served {
            Ok(Served::Stopped) => state.running = Some(running),
            Ok(Served::HostFault) => {
                state.held = true;
                state.running = Some(running);
            }
            // The driver must reset the device first; nothing is served until then.
            Err(Malformed) => running.interrupts.set_needs_reset(),
        }
        shared.changed.notify_all();
        if matches!(served, Ok(Served::Stopped)) && !state.held {
            // Whoever asked waits for `busy` to be false and decides what comes next.
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
