//! The card's worker thread: moves frames between the host and the driver's rings, without any lock.
//!
//! ```text
//! vCPU:    write TDT or RDT ──▶ store the number ──▶ signal `wake`
//! worker:  wait for `wake` and the host ──▶ clear `wake` ──▶ read the numbers, move frames ──▶ causes, pin
//! disable, reset, pause:  lock, stop ──▶ wait until the worker is out ──▶ change what belongs to it ──▶ unlock
//! ```

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use rustix::event::{PollFd, PollFlags, poll};

use super::{
    super::{event::Event, irq::IrqLine, memory::GuestRam, net_backend::NetBackend},
    interrupts::Interrupts,
    receive::Receiver,
    registers::Registers,
    transmit::Transmitter,
};

/// What the vCPUs, the worker and the control thread share.
pub(super) struct Shared {
    pub(super) registers: Registers,
    pub(super) interrupts: Interrupts,
    state: Mutex<State>,
    changed: Condvar,
    /// The worker has something to look at.
    wake: Event,
    is_stopping: AtomicBool,
    /// Until the end.
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct State {
    /// `None` while the thread serves: it has taken this out. `None` for ever after the end.
    frames: Option<Box<Frames>>,
    /// How many callers wait for the thread to come out; it does not begin anew before they have had their turn.
    stoppers: usize,
    /// The machine is paused.
    held: bool,
    /// The card goes away.
    ended: bool,
}

/// What belongs to whoever serves: the thread, or a caller while the thread is out.
pub(super) struct Frames {
    pub(super) ram: GuestRam,
    pub(super) backend: NetBackend,
    pub(super) transmitter: Transmitter,
    pub(super) receiver: Receiver,
}

impl Shared {
    pub(super) fn new(ram: GuestRam, irq: IrqLine, backend: NetBackend) -> io::Result<Shared> {
        let (transmitter, receiver) = (Transmitter::new(), Receiver::new());
        let frames = Some(Box::new(Frames { ram, backend, transmitter, receiver }));
        Ok(Shared {
            registers: Registers::new(),
            interrupts: Interrupts::new(irq),
            state: Mutex::new(State { frames, stoppers: 0, held: false, ended: false }),
            changed: Condvar::new(),
            wake: Event::new()?,
            is_stopping: AtomicBool::new(false),
            thread: Mutex::new(None),
        })
    }

    /// Makes the thread. Without an enabled ring it only sleeps.
    #[cfg(not(fuzzing))]
    pub(super) fn spawn(self: &Arc<Shared>) -> io::Result<()> {
        let shared = Arc::clone(self);
        let thread = std::thread::Builder::new().name("e1000".into()).spawn(move || shared.run())?;
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    #[cfg(fuzzing)]
    pub(super) fn spawn(self: &Arc<Shared>) -> io::Result<()> {
        let shared = Arc::clone(self);
        super::super::turns::add(move || {
            let mut state = shared.lock();
            if !state.held
                && let Some(frames) = &mut state.frames
            {
                while frames.work_off(&shared) {}
            }
        });
        Ok(())
    }

    /// A register that the worker looks at was written.
    pub(super) fn wake(&self) {
        self.wake.signal();
    }

    /// Whether somebody waits for the worker to come out.
    pub(super) fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire)
    }

    /// Does `work` while no frame is moved and guest RAM is not touched. A frame that waits for the host goes on waiting.
    pub(super) fn while_still<T>(&self, work: impl FnOnce(&mut Frames) -> T) -> T {
        let mut state = self.stop();
        work(state.frames.as_mut().expect("the thread is out"))
    }

    /// Pauses; returns when no frame is moved. None is before `release`.
    pub(super) fn hold(&self) {
        self.lock().held = true;
        drop(self.stop());
    }

    pub(super) fn release(&self) {
        self.lock().held = false;
        self.changed.notify_all();
    }

    /// The card goes away: its thread has ended and the host's end of it is closed when this returns. Again is nothing; `while_still` is
    /// not called any more.
    pub(super) fn end(&self) {
        let mut state = self.stop();
        state.ended = true;
        let frames = state.frames.take();
        self.changed.notify_all();
        drop(state);
        drop(frames);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic of the worker has been reported by its own thread.
            let _ = thread.join();
        }
    }

    /// Returns when the thread is out. It stays out while the lock is held.
    fn stop(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.stoppers += 1;
        self.is_stopping.store(true, Ordering::Release);
        self.wake.signal();
        let serving = |state: &mut State| state.frames.is_none() && !state.ended;
        state = self.changed.wait_while(state, serving).unwrap_or_else(PoisonError::into_inner);
        state.stoppers -= 1;
        if state.stoppers == 0 {
            self.is_stopping.store(false, Ordering::Release);
            self.changed.notify_all();
        }
        state
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread's life.
    fn run(&self) {
        let mut state = self.lock();
        while !state.ended {
            let taken = if state.held || state.stoppers > 0 { None } else { state.frames.take() };
            let Some(mut frames) = taken else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            frames.serve(self);
            state = self.lock();
            state.frames = Some(frames);
            self.changed.notify_all();
        }
    }
}

impl Frames {
    /// Serves until a stop is asked. First looks at everything, as the signal of a register may be lost with the stop's.
    fn serve(&mut self, card: &Shared) {
        loop {
            let more = self.work_off(card);
            if card.is_stopping() {
                return;
            }
            if !more {
                self.wait(card);
            }
        }
    }

    /// Looks at everything once. Gives whether there may be more.
    fn work_off(&mut self, card: &Shared) -> bool {
        let more = self.transmitter.serve(card, &self.ram, &mut self.backend);
        more | self.receiver.serve(card, &self.ram, &mut self.backend)
    }

    /// Waits for a register or for the host. May return for nothing.
    fn wait(&self, card: &Shared) {
        let wanted = self.backend.wanted(self.receiver.wants_frames(&card.registers), self.transmitter.waits());
        let (wake, link) =
            (PollFd::new(&card.wake, PollFlags::IN), PollFd::from_borrowed_fd(self.backend.as_fd(), wanted));
        // A call that was interrupted makes the worker look once more.
        let _ = if wanted.is_empty() { poll(&mut [wake], None) } else { poll(&mut [wake, link], None) };
        // Before the registers are looked at, so that what comes later wakes again.
        card.wake.clear();
    }
}
