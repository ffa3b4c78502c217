//! While a guest is being suspended: how far it is, and who wants otherwise.

use std::{
    collections::VecDeque,
    ops::ControlFlow,
    sync::mpsc::Receiver,
    time::{Duration, Instant},
};

use super::{
    control::{Announcer, Order},
    screen::Screen,
};
use crate::wire::{BEING_SUSPENDED, EngineAction, EngineMessage, Observed};

/// Between two words about how far it is.
const TELL: Duration = Duration::from_millis(500);

/// Why the writing stops early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GivenUp {
    Resume,
    PowerOff,
}

/// What the machine's thread does between two pieces of memory.
pub(super) struct SuspendWatch<'a> {
    pub(super) inbox: &'a Receiver<Order>,
    pub(super) announcer: &'a Announcer,
    pub(super) screen: &'a Screen,
    /// Bytes of the guest's memory.
    pub(super) total: u64,
    pub(super) given_up: Option<GivenUp>,
    /// Orders that wait until it is over.
    pub(super) later: VecDeque<Order>,
    pub(super) told: Option<Instant>,
}

impl SuspendWatch<'_> {
    /// `looked` bytes of memory are done.
    pub(super) fn progress(&mut self, looked: u64) -> ControlFlow<()> {
        while let Ok(order) = self.inbox.try_recv() {
            self.hear(order);
        }
        if self.told.is_none_or(|told| told.elapsed() >= TELL) {
            self.told = Some(Instant::now());
            let percent = looked.min(self.total) * 100 / self.total.max(1);
            let observed =
                Observed::Paused { reason: Some(format!("{BEING_SUSPENDED}: {percent} % of its memory is done.")) };
            let message = EngineMessage::State(observed.clone());
            self.announcer.say(|hello| hello.observed = observed, &message);
        }
        if self.given_up.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn hear(&mut self, order: Order) {
        let (action, files, answer) = match order {
            Order::Request { action, files, answer } => (action, files, answer),
            other => return self.later.push_back(other),
        };
        match action {
            EngineAction::Resume => {
                self.given_up.get_or_insert(GivenUp::Resume);
                answer.done();
            }
            EngineAction::PowerOff => {
                self.given_up = Some(GivenUp::PowerOff);
                answer.done();
            }
            EngineAction::Screenshot { max_width } => match self.screen.png(max_width.map(|width| width as usize)) {
                Ok(png) => answer.with(png),
                Err(error) => answer.refused(format!("No picture could be made: {error}")),
            },
            EngineAction::Statistics => self.later.push_back(Order::Request { action, files, answer }),
            EngineAction::Pause
            | EngineAction::Reset
            | EngineAction::PressPowerButton
            | EngineAction::Suspend
            | EngineAction::Balloon { .. }
            | EngineAction::LimitDisk { .. }
            | EngineAction::AttachDisk(_)
            | EngineAction::AttachNetwork(_)
            | EngineAction::Detach(_)
            | EngineAction::Freeze { .. }
            | EngineAction::Thaw
            | EngineAction::ChangeCd => {
                answer.refused("The guest is being suspended. Wait, or resume it to give that up.");
            }
        }
    }
}
