//! An eventfd: a counter that a thread waits for and another thread, or KVM, bumps.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::event::{EventfdFlags, eventfd};

/// Never blocks: `signal` when the counter is full and `clear` when it is zero do nothing.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    pub fn new() -> io::Result<Event> {
        Ok(Event(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }
    pub fn signal(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
    /// Forgets what was signalled; false when nothing was.
    pub fn clear(&self) -> bool {
        rustix::io::read(&self.0, &mut [0u8; 8]).is_ok()
    }
    /// Another handle on the same counter.
    pub fn try_clone(&self) -> io::Result<Event> {
        self.0.try_clone().map(Event)
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_seen_once_through_any_handle() {
        let event = Event::new().unwrap();
        let other = event.try_clone().unwrap();
        event.signal();
        event.signal();
        assert!(other.clear());
        assert!(!event.clear());
    }
}
