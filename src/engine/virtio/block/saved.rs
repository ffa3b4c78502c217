//! The saved state of a disk: the requests that wait for the host. Nothing is in flight while the machine is paused.

use serde::{Deserialize, Serialize};

use super::{Block, IN_FLIGHT_MAX, QUEUE_SIZE, Waiting, requests::Requests};
use crate::engine::saved::{BadState, SaveState, State};

pub(super) const KIND: &str = "virtio-block";

#[derive(Serialize, Deserialize)]
pub(super) struct V1 {
    /// Oldest first. What each asks for is read from its chain in RAM again, and checked as when it was taken from its queue.
    pub(super) waiting: Vec<WaitingV1>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct WaitingV1 {
    queue: u16,
    head: u16,
}

impl SaveState for Block {
    fn save(&self) -> State {
        // The disk is another when its size, its features or its queues are.
        let Block { worker, config: _, offered: _, queues: _ } = self;
        let waiting = worker.while_out(|requests: &mut Requests, _| requests.waiting());
        let waiting = waiting.into_iter().map(|Waiting { queue, head }| WaitingV1 { queue, head }).collect();
        State::new(KIND, 1, &V1 { waiting })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let V1 { waiting } = state.fields(KIND, 1)?;
        // What waits was begun once. The driver may have made one request available twice.
        BadState::unless(waiting.len() <= IN_FLIGHT_MAX, KIND, "fewer requests can wait")?;
        let there = |each: &WaitingV1| each.queue < self.queues && each.head < QUEUE_SIZE;
        BadState::unless(waiting.iter().all(there), KIND, "a request is in no queue")?;
        let waiting = waiting.into_iter().map(|WaitingV1 { queue, head }| Waiting { queue, head }).collect();
        self.worker.while_out(|requests: &mut Requests, _| requests.set_waiting(waiting));
        Ok(())
    }
}
