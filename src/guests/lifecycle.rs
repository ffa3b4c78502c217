//! The lifecycle of a guest as a pure table: a state and an event give the next state and what to do. `supervisor.rs` does it.
//!
//! ```text
//!            Start             Attached              Shutdown       (Suspended: as Stopped, with the guest's state on disk;
//!                                                                    Start goes on from it, Kill discards it)
//!  Stopped ─────────▶ Starting ─────────▶ Running ─────────────▶ Stopping ──┐ EngineGone
//!     ▲  ▲               │                 ▲   │ Told(Paused)      ▲   │     │
//!     │  └───────────────┼── Failed ◀──────┼───┼──── EngineGone ───┼───┘     │
//!     │     EngineGone(Off)  (Failed,      │   ▼      (Failed)     │         │
//!     │                      Killed)      Paused ──── Kill ────────┘         │
//!     └──────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Pause, resume and reset are requests: the state follows what the engine says (`Told`), not what was asked. What was asked
//! lasting (on or off) is not here but in the guest's `desired` column.

use std::fmt;

use crate::wire::{EndKind, Observed};

/// What a guest is doing, as far as the server knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// No engine; the last one ended in order.
    Stopped,
    /// No engine; the guest's state is on disk, and the next start goes on from there.
    Suspended,
    /// An engine was asked for, or was found alive, and has not greeted yet.
    Starting,
    Running,
    /// The engine holds the guest still: by request or because something is wrong.
    Paused,
    /// The guest was asked to shut down, or its plug is being pulled.
    Stopping,
    /// No engine; the last one did not end in order, or could not be started.
    Failed,
}

/// What happened, from people, the engine and `hostd`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Start,
    Shutdown,
    /// Pull the plug.
    Kill,
    Pause,
    Resume,
    Reset,
    /// Write the guest's state to disk and end its engine.
    Suspend,
    /// A connection to the engine stands and it greeted: after a start, and when the server finds it again.
    Attached(Observed),
    /// The engine said what it does now.
    Told(Observed),
    /// `hostd` did not start an engine.
    StartRefused,
    /// The engine's process has ended.
    EngineGone(EndKind),
    /// The engine, or `hostd`, could not go on from the saved state, which is still there.
    ResumeFailed,
}

/// What the supervisor must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    StartEngine,
    SendPause,
    SendResume,
    SendReset,
    SendSuspend,
    /// Take the saved state away.
    Discard,
    PressPowerButton,
    /// End the engine: in order when it listens, by force when it does not. Nothing it says meanwhile counts.
    PullPlug,
}

/// The event does not fit the state. From a person it becomes a conflict; from an engine it is ignored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub state: State,
    pub event: Event,
}

/// The whole lifecycle.
pub fn step(state: State, event: Event) -> Result<(State, Option<Action>), Refused> {
    use {Action as A, Event as E, State as S};
    Ok(match (state, event) {
        (S::Stopped | S::Suspended | S::Failed, E::Start) => (S::Starting, Some(A::StartEngine)),
        (S::Starting, E::StartRefused) => (S::Failed, None),
        (S::Starting | S::Stopping, E::ResumeFailed) => (S::Suspended, None),
        (S::Suspended, E::Kill) => (S::Stopped, Some(A::Discard)),

        // An engine that greets is the truth, whatever was believed before: the server may have been away.
        (S::Stopping, E::Attached(Observed::Running) | E::Told(Observed::Running)) => (S::Stopping, None),
        (_, E::Attached(Observed::Running)) => (S::Running, None),
        (_, E::Attached(Observed::Paused { .. })) => (S::Paused, None),
        (S::Running | S::Paused, E::Told(Observed::Running)) => (S::Running, None),
        (S::Running | S::Paused | S::Stopping, E::Told(Observed::Paused { .. })) => (S::Paused, None),

        (S::Running, E::Pause) => (S::Running, Some(A::SendPause)),
        (S::Paused, E::Resume) => (S::Paused, Some(A::SendResume)),
        (S::Running | S::Paused, E::Suspend) => (state, Some(A::SendSuspend)),
        (S::Running | S::Paused, E::Reset) => (state, Some(A::SendReset)),
        (S::Running | S::Stopping, E::Shutdown) => (S::Stopping, Some(A::PressPowerButton)),
        (S::Starting | S::Running | S::Paused | S::Stopping, E::Kill) => (S::Stopping, Some(A::PullPlug)),

        (S::Starting | S::Running | S::Paused | S::Stopping, E::EngineGone(EndKind::Off)) => (S::Stopped, None),
        (S::Starting | S::Running | S::Paused | S::Stopping, E::EngineGone(EndKind::Suspended)) => (S::Suspended, None),
        (S::Stopping, E::EngineGone(EndKind::Killed)) => (S::Stopped, None),
        (S::Starting | S::Running | S::Paused, E::EngineGone(EndKind::Killed)) => (S::Failed, None),
        (S::Starting | S::Running | S::Paused | S::Stopping, E::EngineGone(EndKind::Failed)) => (S::Failed, None),
        (state, event) => return Err(Refused { state, event }),
    })
}

impl State {
    pub const ALL: [State; 7] = [
        State::Stopped,
        State::Suspended,
        State::Starting,
        State::Running,
        State::Paused,
        State::Stopping,
        State::Failed,
    ];

    /// Whether an engine lives, or is believed to.
    pub fn is_live(self) -> bool {
        match self {
            State::Starting | State::Running | State::Paused | State::Stopping => true,
            State::Stopped | State::Suspended | State::Failed => false,
        }
    }

    /// The word for people.
    pub fn word(self) -> &'static str {
        match self {
            State::Stopped => "stopped",
            State::Suspended => "suspended",
            State::Starting => "starting",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopping => "stopping",
            State::Failed => "failed",
        }
    }

    /// Whether a person may ask for this now; buttons and `step` agree by construction.
    pub fn allows(self, event: Event) -> bool {
        step(self, event).is_ok()
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The sentence for the person whose request does not fit.
impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use {Event as E, State as S};
        let text = match (&self.event, self.state) {
            (E::Start, S::Starting) => "The guest is starting already.",
            (E::Start, S::Paused) => "The guest is paused. Resume it instead.",
            (E::Start, S::Stopping) => "The guest is still stopping. Wait until it has stopped, or power it off.",
            (E::Start, _) => "The guest runs already.",
            (E::Pause, S::Paused) => "The guest is paused already.",
            (E::Resume, S::Running) => "The guest runs already.",
            (E::Shutdown, S::Paused) => "The guest is paused and cannot shut down. Resume it first, or power it off.",
            (_, S::Suspended) => "The guest is suspended. Start it to go on, or discard its saved state.",
            (E::Shutdown | E::Pause | E::Resume | E::Reset | E::Suspend, S::Starting) => {
                "The guest is just starting. Try again in a moment."
            }
            (E::Pause | E::Reset | E::Resume | E::Suspend, S::Stopping) => {
                "The guest is shutting down. Wait, or power it off."
            }
            (_, S::Stopped | S::Failed) => "The guest does not run.",
            (event, state) => return write!(f, "A guest that is {state} cannot do this ({event:?})."),
        };
        f.write_str(text)
    }
}
impl std::error::Error for Refused {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn paused() -> Observed {
        Observed::Paused { reason: None }
    }

    fn all_events() -> Vec<Event> {
        use Event as E;
        vec![
            E::Start,
            E::Shutdown,
            E::Kill,
            E::Pause,
            E::Resume,
            E::Reset,
            E::Suspend,
            E::Attached(Observed::Running),
            E::Attached(paused()),
            E::Told(Observed::Running),
            E::Told(paused()),
            E::StartRefused,
            E::EngineGone(EndKind::Off),
            E::EngineGone(EndKind::Failed),
            E::EngineGone(EndKind::Killed),
            E::EngineGone(EndKind::Suspended),
            E::ResumeFailed,
        ]
    }

    fn event_word(event: &Event) -> String {
        match event {
            Event::Attached(Observed::Paused { .. }) => "Attached(Paused)".into(),
            Event::Told(Observed::Paused { .. }) => "Told(Paused)".into(),
            other => format!("{other:?}"),
        }
    }

    fn matrix() -> String {
        let mut text =
            String::from("# state, event -> next state, action. Written by the test in src/guests/lifecycle.rs.\n");
        for state in State::ALL {
            text += &format!("\n{state:?}\n");
            for event in all_events() {
                let word = event_word(&event);
                text += &match step(state, event) {
                    Ok((next, Some(action))) => format!("  {word:<21} -> {next:?}, {action:?}\n"),
                    Ok((next, None)) => format!("  {word:<21} -> {next:?}\n"),
                    Err(_) => format!("  {word:<21}    refused\n"),
                };
            }
        }
        text
    }

    #[test]
    fn the_whole_table_is_the_reviewed_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/lifecycle.txt");
        let now = matrix();
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(path, &now).unwrap();
        }
        let reviewed = std::fs::read_to_string(path).unwrap();
        assert_eq!(now, reviewed, "run with UPDATE_GOLDEN=1 and review the difference");
    }

    #[test]
    fn every_refusal_of_a_person_is_a_sentence() {
        for state in State::ALL {
            for event in all_events().into_iter().take(7) {
                if let Err(refused) = step(state, event.clone()) {
                    let text = refused.to_string();
                    assert!(text.starts_with("The guest") && text.ends_with('.'), "{state:?} {event:?}: {text}");
                }
            }
        }
    }

    fn any_event() -> impl Strategy<Value = Event> {
        proptest::sample::select(all_events())
    }

    proptest! {
        #[test]
        fn a_live_guest_can_always_be_powered_off(events in proptest::collection::vec(any_event(), 0..40)) {
            let mut state = State::Stopped;
            for event in events {
                state = step(state, event).map_or(state, |(next, _)| next);
                if state.is_live() {
                    let (killed, action) = step(state, Event::Kill).unwrap();
                    prop_assert_eq!(action, Some(Action::PullPlug));
                    for how in [EndKind::Killed, EndKind::Off] {
                        prop_assert_eq!(step(killed, Event::EngineGone(how)), Ok((State::Stopped, None)));
                    }
                }
            }
        }

        #[test]
        fn an_engine_is_only_started_when_none_lives(events in proptest::collection::vec(any_event(), 0..40)) {
            let mut state = State::Stopped;
            for event in events {
                if let Ok((next, action)) = step(state, event) {
                    prop_assert!(action != Some(Action::StartEngine) || !state.is_live());
                    state = next;
                }
            }
        }

        #[test]
        fn the_end_of_the_engine_ends_every_live_state(events in proptest::collection::vec(any_event(), 0..40)) {
            let mut state = State::Stopped;
            for event in events {
                state = step(state, event).map_or(state, |(next, _)| next);
            }
            for how in [EndKind::Off, EndKind::Failed, EndKind::Killed, EndKind::Suspended] {
                let after = step(state, Event::EngineGone(how)).map_or(state, |(next, _)| next);
                prop_assert!(!after.is_live());
            }
        }
    }
}
