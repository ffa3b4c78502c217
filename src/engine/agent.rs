//! The guest agent: asks qemu-guest-agent in the guest what system this is, tells it to shut down, sets the guest's clock, has it freeze
//! its file systems.
//!
//! It speaks JSON lines over the port of `virtio/console.rs` (QEMU Guest Agent Protocol Reference). All it says comes from the guest:
//! lines and texts are limited, and nothing it says is needed. An absent agent is no error.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    time::Duration,
};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    saved::{self as states, BadState, SaveState},
    virtio::console::{PortOutput, PortPeer},
};
use crate::{types::now_ms, wire::AgentFacts};

/// A longer answer is passed over.
const LINE_BYTES_MAX: usize = 64 << 10;
/// Characters of a host's or a system's name.
const TEXT_MAX: usize = 128;
/// Ends an unfinished line in the agent, so that it listens anew.
const FLUSH: u8 = 0xff;
/// Of the thread that waits for the end of a freeze.
const THAW_STACK_BYTES: usize = 64 << 10;
/// Between two tries to thaw what the guest holds longer than it may.
const THAW_AGAIN: Duration = Duration::from_secs(1);

/// Told that `Agent::news` has something else to say; not again before that is asked for.
pub type AgentSink = Arc<dyn Fn() + Send + Sync>;

/// Told how many file systems were frozen or thawed, or why not.
pub type FreezeSink = Box<dyn FnOnce(Result<u64, String>) + Send>;

/// The way to the agent. Clones are the same way.
#[derive(Clone)]
pub struct Agent(Arc<Mutex<State>>);

struct State {
    output: PortOutput,
    told: AgentSink,
    line: Vec<u8>,
    /// The line grew too long; its rest is passed over.
    skipping: bool,
    /// Sent and not answered yet, in order.
    asked: VecDeque<Question>,
    facts: AgentFacts,
    /// The facts are complete.
    known: bool,
    /// It has answered our greeting.
    ready: bool,
    /// It was asked to shut the system down. It answers nothing to that, so a second wish goes another way.
    asked_off: bool,
    /// The last greeting's number. No number comes twice in a guest's life: its answer may come late.
    greetings: u64,
    /// The guest slept: its clock is set as soon as the agent answers.
    clock_due: bool,
    /// What waits for the answer to a freeze or a thaw; there is one at a time.
    freeze_sink: Option<FreezeSink>,
    /// File systems are frozen, or about to be. Once dropped, nobody waits for the end of the freeze any more.
    frozen: Option<Sender<()>>,
    /// `told` was called, and nobody has asked since: a guest that comes and goes without end makes no queue.
    telling: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Question {
    /// The agent repeats the number; what it says before was meant for somebody else.
    Sync(u64),
    Info,
    HostName,
    System,
    Freeze,
    Thaw,
    /// An answer that nobody waits for.
    Order,
}

/// An error has no `return`.
#[derive(Deserialize)]
struct Answer {
    #[serde(default, rename = "return")]
    returned: Value,
    #[serde(default)]
    error: Value,
}

impl Agent {
    pub fn new(output: PortOutput, told: AgentSink) -> Agent {
        Agent(Arc::new(Mutex::new(State {
            output,
            told,
            line: Vec::new(),
            skipping: false,
            asked: VecDeque::new(),
            facts: AgentFacts::default(),
            known: false,
            ready: false,
            asked_off: false,
            greetings: 0,
            clock_due: false,
            freeze_sink: None,
            frozen: None,
            telling: false,
        })))
    }

    /// What the agent says now; `None` without one.
    pub fn news(&self) -> Option<AgentFacts> {
        let mut state = self.lock();
        state.telling = false;
        state.known.then(|| state.facts.clone())
    }

    /// Asks the system to shut down, once. False when there is no agent, or it was asked before and the guest still runs.
    pub fn shut_down(&self) -> bool {
        if std::mem::replace(&mut self.lock().asked_off, true) {
            return false;
        }
        // It answers only when it refuses.
        let state = self.lock();
        state.ready && state.send("guest-shutdown", &json!({ "mode": "powerdown" }))
    }

    /// Sets the guest's clock to `now_ns` since 1970. False when there is no agent.
    pub fn set_clock(&self, now_ns: i64) -> bool {
        self.lock().set_clock(now_ns)
    }

    /// Has the guest write its file systems out and hold them still, for at most `longest`; then they are thawed whoever forgot it.
    pub fn freeze(&self, longest: Duration, sink: FreezeSink) {
        let mut state = self.lock();
        if let Some(why) = state.no_freeze() {
            return sink(Err(why.into()));
        }
        if state.frozen.is_some() {
            return sink(Err("The guest's file systems are frozen already.".into()));
        }
        let (hold, held) = channel();
        let agent = self.clone();
        let waiting = std::thread::Builder::new().name("thaw".into()).stack_size(THAW_STACK_BYTES).spawn(move || {
            // The guest may still be busy with freezing then, or refuse: until they are thawed nothing in it can write.
            let mut wait = longest;
            while held.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                agent.thaw(Box::new(|_| {}));
                wait = THAW_AGAIN;
            }
        });
        if let Err(error) = waiting {
            return sink(Err(format!("Nobody could thaw them again: {error}.")));
        }
        if state.order("guest-fsfreeze-freeze", Question::Freeze, sink) {
            state.frozen = Some(hold);
        }
    }

    /// Lets the guest's file systems go on.
    pub fn thaw(&self, sink: FreezeSink) {
        let mut state = self.lock();
        match state.no_freeze() {
            Some(why) => sink(Err(why.into())),
            None if state.frozen.is_none() => sink(Err("The guest's file systems are not frozen.".into())),
            None => _ = state.order("guest-fsfreeze-thaw", Question::Thaw, sink),
        }
    }

    /// Whether the guest's file systems are frozen, or about to be.
    pub fn is_frozen(&self) -> bool {
        self.lock().frozen.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PortPeer for Agent {
    fn opened(&mut self, open: bool) {
        let mut state = self.lock();
        state.line.clear();
        state.skipping = false;
        state.asked.clear();
        state.facts = AgentFacts::default();
        (state.ready, state.asked_off) = (false, false);
        state.frozen = None;
        if let Some(sink) = state.freeze_sink.take() {
            sink(Err("The guest's agent has gone.".into()));
        }
        if std::mem::take(&mut state.known) {
            state.tell();
        }
        if open {
            state.greet();
        }
    }

    fn received(&mut self, bytes: &[u8]) {
        let mut state = self.lock();
        for byte in bytes {
            match *byte {
                b'\n' => {
                    let line = std::mem::take(&mut state.line);
                    if !std::mem::take(&mut state.skipping) {
                        state.hear(&line);
                    }
                }
                // Sent before the answer to a greeting: nothing before it counts.
                FLUSH => {
                    state.line.clear();
                    state.skipping = false;
                }
                _ if state.line.len() == LINE_BYTES_MAX => state.skipping = true,
                byte => state.line.push(byte),
            }
        }
    }
}

impl State {
    fn greet(&mut self) {
        self.greetings = self.greetings.wrapping_add(1);
        let number = self.greetings;
        if self.output.send(&[FLUSH]) && self.send("guest-sync-delimited", &json!({ "id": number })) {
            self.asked.push_back(Question::Sync(number));
        }
    }

    fn tell(&mut self) {
        if !std::mem::replace(&mut self.telling, true) {
            (self.told)();
        }
    }

    fn send(&self, command: &str, arguments: &Value) -> bool {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string().into_bytes();
        line.push(b'\n');
        self.output.send(&line)
    }

    fn set_clock(&mut self, now_ns: i64) -> bool {
        let sent = self.ready && self.send("guest-set-time", &json!({ "time": now_ns }));
        if sent {
            self.asked.push_back(Question::Order);
        }
        sent
    }

    /// Why nothing can be frozen or thawed now.
    fn no_freeze(&self) -> Option<&'static str> {
        if !self.ready {
            return Some("The guest has no agent that answers.");
        }
        self.freeze_sink.is_some().then_some("The guest's agent is busy with the last wish of this kind.")
    }

    /// False when the guest takes nothing more; `sink` knows then.
    fn order(&mut self, command: &str, question: Question, sink: FreezeSink) -> bool {
        let sent = self.send(command, &json!({}));
        if sent {
            self.asked.push_back(question);
            self.freeze_sink = Some(sink);
        } else {
            sink(Err("The guest's agent takes nothing more.".into()));
        }
        sent
    }

    /// The answer to a freeze or a thaw.
    fn ordered(&mut self, answer: &Answer) {
        let why = || answer.error["desc"].as_str().map_or("no reason".into(), shown);
        let result = answer.returned.as_u64().ok_or_else(|| format!("The guest's agent refuses: {}", why()));
        if let Some(sink) = self.freeze_sink.take() {
            sink(result);
        }
    }

    fn ask(&mut self) {
        for (command, question) in [
            ("guest-info", Question::Info),
            ("guest-get-host-name", Question::HostName),
            ("guest-get-osinfo", Question::System),
        ] {
            if self.send(command, &json!({})) {
                self.asked.push_back(question);
            }
        }
    }

    fn hear(&mut self, line: &[u8]) {
        let Ok(answer) = serde_json::from_slice::<Answer>(line) else { return };
        let returned = &answer.returned;
        match self.asked.front() {
            Some(Question::Sync(number)) => {
                if returned.as_u64() == Some(*number) {
                    self.asked.pop_front();
                    self.ready = true;
                    self.ask();
                    if std::mem::take(&mut self.clock_due) {
                        self.set_clock(now_ms().saturating_mul(1_000_000));
                    }
                }
                return;
            }
            Some(_) => {}
            None => return,
        }
        let text = |value: &Value| value.as_str().map(shown).unwrap_or_default();
        match self.asked.pop_front() {
            Some(Question::Info) => self.facts.version = text(&returned["version"]),
            Some(Question::HostName) => self.facts.host_name = text(&returned["host-name"]),
            Some(Question::System) => {
                self.facts.system = text(&returned["pretty-name"]);
                if self.facts.system.is_empty() {
                    self.facts.system = text(&returned["name"]);
                }
                // The last of the questions, also when it cannot answer it.
                self.known = true;
                self.tell();
            }
            Some(Question::Freeze) => {
                if returned.as_u64().is_none() {
                    self.frozen = None;
                }
                self.ordered(&answer);
            }
            Some(Question::Thaw) => {
                if returned.as_u64().is_some() {
                    self.frozen = None;
                }
                self.ordered(&answer);
            }
            Some(Question::Order | Question::Sync(_)) | None => {}
        }
    }
}

/// A text of the guest for a page: printable and short.
fn shown(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control()).take(TEXT_MAX).collect()
}

/// A port's output and the agent behind it.
pub fn make(told: AgentSink) -> io::Result<(Agent, PortOutput)> {
    let output = PortOutput::new()?;
    Ok((Agent::new(output.clone(), told), output))
}

mod saved {
    use serde::{Deserialize, Serialize};

    pub(super) const KIND: &str = "agent";

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) greetings: u64,
    }
}

/// The talk begins anew after a restore, when the port says that it is open: whatever was asked can be asked again.
impl SaveState for Agent {
    fn save(&self) -> states::State {
        let state = self.lock();
        let State {
            output: _,
            told: _,
            line: _,
            skipping: _,
            asked: _,
            facts: _,
            known: _,
            ready: _,
            asked_off: _,
            greetings,
            clock_due: _, // a guest that is saved sleeps
            freeze_sink: _,
            frozen: _, // none is suspended
            telling: _,
        } = &*state;
        states::State::new(saved::KIND, 1, &saved::V1 { greetings: *greetings })
    }

    fn restore(&mut self, state: &states::State) -> Result<(), BadState> {
        let saved::V1 { greetings } = state.fields(saved::KIND, 1)?;
        let mut state = self.lock();
        state.greetings = greetings;
        state.clock_due = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::engine::saved::testing::{matches_golden, spoil};

    struct Rig {
        agent: Agent,
        output: PortOutput,
        told: Arc<AtomicUsize>,
    }

    fn rig() -> Rig {
        let told: Arc<AtomicUsize> = Arc::default();
        let heard = Arc::clone(&told);
        let (agent, output) = make(Arc::new(move || _ = heard.fetch_add(1, Ordering::SeqCst))).unwrap();
        Rig { agent, output, told }
    }

    impl Rig {
        /// What was sent to the guest since the last call.
        fn sent(&self) -> String {
            String::from_utf8_lossy(&self.output.take()).replace('\u{fffd}', "~")
        }
        fn say(&mut self, text: &str) {
            self.agent.received(text.as_bytes());
        }
        fn connect(&mut self) {
            self.agent.opened(true);
            let number = self.agent.lock().greetings;
            self.agent.received(&[FLUSH]);
            self.say(&format!("{{\"return\": {number}}}\n"));
            self.sent();
        }
    }

    #[test]
    fn it_is_greeted_asked_and_told_of() {
        let mut rig = rig();
        assert!(!rig.agent.shut_down(), "there is none yet");
        rig.agent.opened(true);
        let greeting = rig.sent();
        assert!(greeting.starts_with('~') && greeting.contains("guest-sync-delimited"), "{greeting}");
        // An answer to somebody before us, then half a line that was interrupted.
        rig.say("{\"return\": 77}\n{\"retu");
        rig.agent.received(&[FLUSH]);
        rig.say("{\"return\": 1}\n");
        assert_eq!(rig.sent().lines().count(), 3);
        rig.say("{\"return\": {\"version\": \"7.2.9\"}}\n{\"return\": {\"host-name\": \"web01\"}}\n");
        rig.say("{\"return\": {\"pretty-name\": \"Debian GNU/Linux 12 \\u0007(bookworm)\", \"name\": \"x\"}}\n");
        let facts = AgentFacts {
            version: "7.2.9".into(),
            host_name: "web01".into(),
            system: "Debian GNU/Linux 12 (bookworm)".into(),
        };
        assert_eq!((rig.told.load(Ordering::SeqCst), rig.agent.news()), (1, Some(facts)));
        assert!(rig.agent.shut_down());
        assert!(rig.sent().contains("guest-shutdown"));
        assert!(!rig.agent.shut_down(), "one that hangs does not keep the power button from being pressed");
        rig.agent.opened(false);
        assert!(!rig.agent.set_clock(1));
        for _ in 0..100 {
            rig.agent.opened(true);
            rig.agent.opened(false);
        }
        assert_eq!((rig.told.load(Ordering::SeqCst), rig.agent.news()), (2, None), "told once until somebody asks");
    }

    #[test]
    fn what_it_cannot_do_leaves_a_gap_and_orders_are_answered_in_turn() {
        let mut rig = rig();
        rig.connect();
        assert!(rig.agent.set_clock(1_700_000_000_000_000_000));
        rig.say("{\"return\": {\"version\": \"1\"}}\n{\"error\": {\"class\": \"CommandNotFound\"}}\n");
        rig.say("{\"return\": {\"name\": \"Plan 9\"}}\n{\"return\": {}}\n");
        let facts = AgentFacts { version: "1".into(), host_name: String::new(), system: "Plan 9".into() };
        assert_eq!(rig.agent.news(), Some(facts));
        assert!(rig.agent.lock().asked.is_empty());
    }

    #[test]
    fn lines_without_end_and_names_without_end_are_cut() {
        let mut rig = rig();
        rig.connect();
        rig.agent.received(&vec![b'x'; LINE_BYTES_MAX * 3]);
        assert_eq!(rig.agent.lock().line.len(), LINE_BYTES_MAX);
        rig.say("\n{\"return\": {\"version\": \"");
        rig.agent.received(&vec![b'y'; 10_000]);
        rig.say("\"}}\n");
        assert_eq!(rig.agent.lock().facts.version.len(), TEXT_MAX);
    }

    /// A sink, and what it was told.
    fn heard() -> (FreezeSink, std::sync::mpsc::Receiver<Result<u64, String>>) {
        let (tell, heard) = channel();
        (Box::new(move |result| tell.send(result).unwrap()), heard)
    }

    #[test]
    fn file_systems_are_frozen_and_thawed_and_each_refusal_is_told() {
        let mut rig = rig();
        let long = Duration::from_secs(600);
        let refused = |result: Result<u64, String>, what: &str| assert!(result.unwrap_err().contains(what));
        let freeze = |rig: &Rig| {
            let (sink, heard) = heard();
            rig.agent.freeze(long, sink);
            heard
        };
        let thaw = |rig: &Rig| {
            let (sink, heard) = heard();
            rig.agent.thaw(sink);
            heard
        };
        refused(freeze(&rig).try_recv().unwrap(), "no agent");
        rig.connect();
        rig.say("{\"return\": {}}\n{\"return\": {}}\n{\"return\": {}}\n");
        refused(thaw(&rig).try_recv().unwrap(), "not frozen");
        let frozen = freeze(&rig);
        assert!(rig.sent().contains("guest-fsfreeze-freeze"));
        assert!(rig.agent.is_frozen() && frozen.try_recv().is_err(), "not answered yet");
        refused(thaw(&rig).try_recv().unwrap(), "busy");
        rig.say("{\"return\": 3}\n");
        assert_eq!(frozen.try_recv().unwrap(), Ok(3));
        refused(freeze(&rig).try_recv().unwrap(), "already");
        // It may refuse to thaw, and is asked again.
        let thawed = thaw(&rig);
        rig.say("{\"error\": {\"class\": \"GenericError\", \"desc\": \"not \\u0007now\"}}\n");
        refused(thawed.try_recv().unwrap(), "refuses: not now");
        assert!(rig.agent.is_frozen());
        let thawed = thaw(&rig);
        rig.say("{\"return\": 3}\n");
        assert_eq!((thawed.try_recv().unwrap(), rig.agent.is_frozen()), (Ok(3), false));
        // One that refuses, then one that goes away in the middle.
        let frozen = freeze(&rig);
        rig.say("{\"error\": {}}\n");
        refused(frozen.try_recv().unwrap(), "no reason");
        assert!(!rig.agent.is_frozen());
        let frozen = freeze(&rig);
        rig.agent.opened(false);
        refused(frozen.try_recv().unwrap(), "has gone");
        assert!(!rig.agent.is_frozen(), "a guest that starts again has thawed");
    }

    /// Returns when the guest was asked to thaw.
    fn wait_for_thaw(rig: &Rig) {
        for _ in 0..1000 {
            if rig.agent.lock().asked.front() == Some(&Question::Thaw) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("nobody asks for a thaw");
    }

    #[test]
    fn a_freeze_that_everybody_forgets_ends_by_itself() {
        let mut rig = rig();
        rig.connect();
        rig.say("{\"return\": {}}\n{\"return\": {}}\n{\"return\": {}}\n");
        rig.agent.freeze(Duration::from_millis(20), Box::new(|_| {}));
        rig.say("{\"return\": 1}\n");
        rig.sent();
        wait_for_thaw(&rig);
        assert!(rig.sent().contains("guest-fsfreeze-thaw"));
        rig.say("{\"return\": 1}\n");
        assert!(!rig.agent.is_frozen());
    }

    #[test]
    fn a_freeze_that_takes_longer_than_it_may_is_thawed_when_it_is_done() {
        let mut rig = rig();
        rig.connect();
        rig.say("{\"return\": {}}\n{\"return\": {}}\n{\"return\": {}}\n");
        rig.agent.freeze(Duration::from_millis(1), Box::new(|_| {}));
        // It is tried in vain meanwhile.
        std::thread::sleep(Duration::from_millis(200));
        rig.say("{\"return\": 1}\n");
        assert!(rig.agent.is_frozen());
        wait_for_thaw(&rig);
        rig.say("{\"return\": 1}\n");
        assert!(!rig.agent.is_frozen());
    }

    proptest! {
        #[test]
        fn nothing_it_says_makes_it_panic(
            lines in proptest::collection::vec("[\\x00-\\xff]{0,80}|\\{\"return\": (null|1|\\[\\]|\\{\"version\": 5\\})\\}", 0..20)
        ) {
            let mut rig = rig();
            rig.connect();
            for line in lines {
                rig.say(&line);
                rig.say("\n");
            }
        }
    }

    #[test]
    fn after_a_restore_an_answer_to_an_old_greeting_is_not_taken_for_one_to_the_new() {
        let mut first = rig();
        first.connect();
        let state = matches_golden(&first.agent.save());
        let mut second = rig();
        second.agent.restore(&state).unwrap();
        second.agent.opened(true);
        assert!(second.sent().contains("\"id\":2"));
        second.say("{\"return\": 1}\n{\"return\": {}}\n");
        assert!(!second.agent.set_clock(1), "that was for the process before");
        second.say("{\"return\": 2}\n");
        assert!(second.sent().contains("guest-set-time"), "it slept");
        assert!(second.agent.set_clock(1));
        spoil(&state, |bad| {
            let mut rig = rig();
            let _ = rig.agent.restore(bad);
            rig.agent.opened(true);
            rig.agent.opened(false);
        });
    }
}
