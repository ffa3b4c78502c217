//! The controller's saved state. The queues' entries are in guest memory; here is where both sides are in them.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{
    super::saved::{BadState, SaveState, State},
    Nvme, QUEUES, SHUTDOWN_DONE, Shared,
    session::Session,
    worker::Commands,
};

const KIND: &str = "nvme";
/// Counters and the log's numbers only grow, and stay far below this in a machine's life.
const COUNT_MAX: u64 = 1 << 62;

#[derive(Serialize, Deserialize)]
struct V1 {
    registers: RegistersV1,
    fatal: bool,
    /// CSTS.SHST.
    shutdown: u8,
    doorbells: DoorbellsV1,
    interrupts: InterruptsV1,
    logs: LogsV1,
    counters: CountersV1,
    /// While the controller is ready, and nothing fatal has happened.
    session: Option<SessionV1>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct RegistersV1 {
    pub(super) cc: u32,
    pub(super) aqa: u32,
    pub(super) asq: u64,
    pub(super) acq: u64,
    pub(super) ready: bool,
}

#[derive(Serialize, Deserialize)]
pub(super) struct DoorbellsV1 {
    pub(super) tails: [DoorbellV1; QUEUES],
    pub(super) heads: [DoorbellV1; QUEUES],
    pub(super) mistakes: u8,
}

#[derive(Serialize, Deserialize)]
pub(super) struct DoorbellV1 {
    pub(super) value: u32,
    pub(super) entries: u32,
}

#[derive(Serialize, Deserialize)]
pub(super) struct InterruptsV1 {
    /// INTMS.
    pub(super) mask: u32,
    pub(super) posted: [u32; QUEUES],
    pub(super) consumed: [u32; QUEUES],
    pub(super) armed: u32,
}

#[derive(Serialize, Deserialize)]
pub(super) struct LogsV1 {
    pub(super) recorded: u64,
    pub(super) errors: Vec<ErrorV1>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct ErrorV1 {
    pub(super) count: u64,
    pub(super) queue: u16,
    pub(super) command: u16,
    pub(super) status: u16,
    pub(super) start_block: u64,
    pub(super) namespace: u32,
}

#[derive(Serialize, Deserialize)]
pub(super) struct CountersV1 {
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) read_blocks: u64,
    pub(super) written_blocks: u64,
}

#[derive(Serialize, Deserialize)]
pub(super) struct SessionV1 {
    pub(super) submissions: [Option<SubmissionV1>; QUEUES],
    pub(super) completions: [Option<CompletionV1>; QUEUES],
    pub(super) features: FeaturesV1,
    pub(super) events: EventsV1,
    /// A command that waits for the host: it has left its queue, and is done again.
    pub(super) waiting: Option<WaitingV1>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct SubmissionV1 {
    pub(super) base: u64,
    pub(super) entries: u32,
    pub(super) head: u32,
    pub(super) completion_queue: u16,
}

#[derive(Serialize, Deserialize)]
pub(super) struct CompletionV1 {
    pub(super) base: u64,
    pub(super) entries: u32,
    pub(super) tail: u32,
    pub(super) head: u32,
    pub(super) refused: Option<u32>,
    pub(super) phase: bool,
    pub(super) vector: Option<u16>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct FeaturesV1 {
    pub(super) arbitration: u32,
    pub(super) over_kelvin: u16,
    pub(super) under_kelvin: u16,
    pub(super) error_recovery: u16,
    pub(super) write_cache: bool,
    pub(super) coalescing: u16,
    pub(super) uncoalesced: u32,
    pub(super) write_atomicity: bool,
    pub(super) warnings: u8,
}

#[derive(Serialize, Deserialize)]
pub(super) struct EventsV1 {
    pub(super) held: Vec<u16>,
    /// Errors, then health.
    pub(super) classes: [ClassV1; 2],
}

#[derive(Serialize, Deserialize)]
pub(super) struct ClassV1 {
    pub(super) waiting: Option<EventV1>,
    pub(super) masked: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum EventV1 {
    NoSuchDoorbell,
    BadDoorbellValue,
    Temperature,
}

#[derive(Serialize, Deserialize)]
pub(super) struct WaitingV1 {
    pub(super) queue: u16,
    pub(super) opcode: u8,
    pub(super) flags: u8,
    pub(super) id: u16,
    pub(super) namespace: u32,
    pub(super) prp1: u64,
    pub(super) prp2: u64,
    pub(super) words: [u32; 6],
}

/// Unless `good`: `what` cannot be.
pub(super) fn check(good: bool, what: &str) -> Result<(), BadState> {
    BadState::unless(good, KIND, what)
}

/// Numbers to which one more is added for every command.
pub(super) fn check_counts(counts: &[u64]) -> Result<(), BadState> {
    check(counts.iter().all(|count| *count <= COUNT_MAX), "more commands than can have been")
}

impl SaveState for Nvme {
    fn save(&self) -> State {
        let Nvme { registers, shared, worker, ram: _ } = self;
        // Whether the entries' sizes fit follows from CC.
        let Shared { doorbells, interrupts, fatal, shutdown, entry_sizes_fit: _ } = &**shared;
        let (logs, counters, session) = worker.while_out(|commands: &mut Commands, session| {
            let Commands { identity: _, disk, logs, report: _ } = commands;
            (logs.save(), disk.counters.save(), session.map(|session| session.save()))
        });
        let fields = V1 {
            registers: registers.save(),
            fatal: fatal.load(Ordering::Acquire),
            shutdown: shutdown.load(Ordering::Acquire),
            doorbells: doorbells.save(),
            interrupts: interrupts.save(),
            logs,
            counters,
            session,
        };
        State::new(KIND, 1, &fields)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved: V1 = state.fields(KIND, 1)?;
        let works = saved.registers.ready && !saved.fatal;
        check(works == saved.session.is_some(), "queues without a controller that works, or the other way round")?;
        check(saved.shutdown <= SHUTDOWN_DONE, "a shutdown that there is not")?;
        let session = saved.session.map(|session| Session::restore(&self.ram, &self.shared, session)).transpose()?;
        if let Some(session) = &session {
            session.check_doorbells(&saved.doorbells)?;
        }
        self.registers.restore(saved.registers)?;
        self.shared.entry_sizes_fit.store(self.registers.entry_sizes_fit(), Ordering::Release);
        self.shared.fatal.store(saved.fatal, Ordering::Release);
        self.shared.shutdown.store(saved.shutdown, Ordering::Release);
        self.shared.doorbells.restore(saved.doorbells)?;
        self.shared.interrupts.restore(saved.interrupts)?;
        self.worker.while_out(|commands: &mut Commands, _| {
            commands.logs.restore(saved.logs)?;
            commands.disk.counters.restore(saved.counters)
        })?;
        if let Some(session) = session {
            // Served as soon as the machine releases the worker.
            self.worker.activate(session);
        }
        Ok(())
    }
}
