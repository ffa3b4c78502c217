//! Asynchronous events (NVM Express 1.4, section 5.2): requests that are held until something happens.

use super::{
    super::saved::BadState,
    command::Status,
    saved::{ClassV1, EventV1, EventsV1, check},
};

/// Requests that are held at once. Identify says one less.
pub(super) const HELD_MAX: usize = 4;

/// What can happen. Nothing else does: the disk neither changes its size nor wears out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    NoSuchDoorbell,
    BadDoorbellValue,
    Temperature,
}

/// Events of one class are told once, until the driver has read the class's log page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Error,
    Health,
}

impl Event {
    fn class(self) -> Class {
        match self {
            Event::NoSuchDoorbell | Event::BadDoorbellValue => Class::Error,
            Event::Temperature => Class::Health,
        }
    }

    /// Dword 0 of the completion: type, information, and the log page that says more.
    fn encode(self) -> u32 {
        match self {
            Event::NoSuchDoorbell => 0x01_00_00,
            Event::BadDoorbellValue => 0x01_01_00,
            Event::Temperature => 0x02_01_01,
        }
    }
}

#[derive(Default)]
pub(super) struct Events {
    /// Command ids of the requests, oldest first.
    held: Vec<u16>,
    classes: [ClassState; 2],
}

#[derive(Default, Clone, Copy)]
struct ClassState {
    waiting: Option<Event>,
    /// Told, and the log page not yet read.
    masked: bool,
}

impl Events {
    pub(super) fn new() -> Events {
        Events { held: Vec::with_capacity(HELD_MAX), ..Events::default() }
    }

    pub(super) fn save(&self) -> EventsV1 {
        let Events { held, classes } = self;
        let classes = classes.map(|ClassState { waiting, masked }| ClassV1 {
            waiting: waiting.map(|event| match event {
                Event::NoSuchDoorbell => EventV1::NoSuchDoorbell,
                Event::BadDoorbellValue => EventV1::BadDoorbellValue,
                Event::Temperature => EventV1::Temperature,
            }),
            masked,
        });
        EventsV1 { held: held.clone(), classes }
    }

    pub(super) fn restore(saved: EventsV1) -> Result<Events, BadState> {
        let EventsV1 { held, classes } = saved;
        check(held.len() <= HELD_MAX, "more event requests than are held")?;
        let mut events = Events::new();
        events.held.extend(held);
        for (index, (state, ClassV1 { waiting, masked })) in events.classes.iter_mut().zip(classes).enumerate() {
            let waiting = waiting.map(|event| match event {
                EventV1::NoSuchDoorbell => Event::NoSuchDoorbell,
                EventV1::BadDoorbellValue => Event::BadDoorbellValue,
                EventV1::Temperature => Event::Temperature,
            });
            check(waiting.is_none_or(|event| event.class() as usize == index), "an event of another class")?;
            *state = ClassState { waiting, masked };
        }
        Ok(events)
    }

    /// Holds a request.
    pub(super) fn hold(&mut self, id: u16) -> Result<(), Status> {
        if self.held.len() == HELD_MAX {
            return Err(Status::TOO_MANY_EVENT_REQUESTS);
        }
        self.held.push(id);
        Ok(())
    }

    /// Gives a request up; false when it is not held.
    pub(super) fn abort(&mut self, id: u16) -> bool {
        let before = self.held.len();
        self.held.retain(|held| *held != id);
        self.held.len() < before
    }

    pub(super) fn raise(&mut self, event: Event) {
        let state = &mut self.classes[event.class() as usize];
        if !state.masked {
            state.waiting.get_or_insert(event);
        }
    }

    /// The driver has read the class's log page.
    pub(super) fn clear(&mut self, class: Class) {
        self.classes[class as usize] = ClassState::default();
    }

    pub(super) fn can_deliver(&self) -> bool {
        !self.held.is_empty() && self.classes.iter().any(|state| state.waiting.is_some())
    }

    /// The request to complete, and with what.
    pub(super) fn deliver(&mut self) -> Option<(u16, u32)> {
        let id = *self.held.first()?;
        let state = self.classes.iter_mut().find(|state| state.waiting.is_some())?;
        let event = state.waiting.take()?;
        state.masked = true;
        self.held.remove(0);
        Some((id, event.encode()))
    }
}
