//! Log pages (NVM Express 1.4, section 5.14.1): errors, health, firmware slots.

use super::{
    super::saved::BadState,
    command::{Completion, Status},
    events::Class,
    features::Features,
    identify::{FIRMWARE, TEMPERATURE_KELVIN},
    io::Counters,
    saved::{ErrorV1, LogsV1, check, check_counts},
};

/// Errors that are kept. Identify says one less.
pub(super) const ERRORS_KEPT: usize = 4;
const ERROR_BYTES: usize = 64;
/// Bytes of the health and the firmware page; the longest of the pages.
const PAGE_BYTES: usize = 512;
/// No queue and no command.
const NONE: u16 = 0xffff;

const ERROR_INFORMATION: u8 = 0x01;
const HEALTH: u8 = 0x02;
const FIRMWARE_SLOTS: u8 = 0x03;

/// A log page: `bytes` of it are there.
pub(super) struct Page {
    data: [u8; PAGE_BYTES],
    bytes: usize,
    /// Reading it clears this class of events.
    pub(super) class: Option<Class>,
}

impl Page {
    fn new(bytes: usize, class: Option<Class>) -> Page {
        Page { data: [0; PAGE_BYTES], bytes, class }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.data[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// At most `wanted` bytes from `offset` on; `None` when the page ends before.
    pub(super) fn part(&self, offset: u64, wanted: u64) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        let rest = self.data.get(..self.bytes)?.get(start..)?;
        rest.get(..usize::try_from(wanted).map_or(rest.len(), |wanted| wanted.min(rest.len())))
    }
}

/// Kept over resets of the controller, lost with the process.
#[derive(Default)]
pub(super) struct Logs {
    /// Newest first.
    errors: [ErrorEntry; ERRORS_KEPT],
    recorded: u64,
}

#[derive(Default, Clone, Copy)]
struct ErrorEntry {
    count: u64,
    queue: u16,
    command: u16,
    status: u16,
    start_block: u64,
    namespace: u32,
}

impl Logs {
    /// A command failed.
    pub(super) fn record(&mut self, completion: &Completion, start_block: u64, namespace: u32) {
        self.push(ErrorEntry {
            count: 0,
            queue: completion.queue,
            command: completion.id,
            status: completion.status.bits() << 1,
            start_block,
            namespace,
        });
    }

    /// The driver wrote a doorbell that it should not.
    pub(super) fn record_doorbell(&mut self) {
        let status = Status::INVALID_FIELD.bits() << 1;
        self.push(ErrorEntry { queue: NONE, command: NONE, status, ..ErrorEntry::default() });
    }

    fn push(&mut self, entry: ErrorEntry) {
        self.recorded += 1;
        self.errors.rotate_right(1);
        self.errors[0] = ErrorEntry { count: self.recorded, ..entry };
    }

    /// The page with this number.
    pub(super) fn page(&self, number: u8, counters: &Counters, features: &Features) -> Result<Page, Status> {
        match number {
            ERROR_INFORMATION => Ok(self.errors()),
            HEALTH => Ok(self.health(counters, features)),
            FIRMWARE_SLOTS => {
                let mut page = Page::new(PAGE_BYTES, None);
                page.put(0, &[1]); // slot 1 is active
                page.put(8, FIRMWARE);
                Ok(page)
            }
            _ => Err(Status::INVALID_LOG_PAGE),
        }
    }

    pub(super) fn save(&self) -> LogsV1 {
        let Logs { errors, recorded } = self;
        let errors = errors.map(|error| {
            let ErrorEntry { count, queue, command, status, start_block, namespace } = error;
            ErrorV1 { count, queue, command, status, start_block, namespace }
        });
        LogsV1 { recorded: *recorded, errors: errors.into() }
    }

    pub(super) fn restore(&mut self, saved: LogsV1) -> Result<(), BadState> {
        let LogsV1 { recorded, errors } = saved;
        check_counts(&[recorded])?;
        check(errors.len() <= ERRORS_KEPT, "more errors than are kept")?;
        self.recorded = recorded;
        for (entry, saved) in self.errors.iter_mut().zip(errors) {
            let ErrorV1 { count, queue, command, status, start_block, namespace } = saved;
            *entry = ErrorEntry { count, queue, command, status, start_block, namespace };
        }
        Ok(())
    }

    fn errors(&self) -> Page {
        let mut page = Page::new(ERRORS_KEPT * ERROR_BYTES, Some(Class::Error));
        for (index, error) in self.errors.iter().enumerate().filter(|(_, error)| error.count > 0) {
            let at = index * ERROR_BYTES;
            page.put(at, &error.count.to_le_bytes());
            page.put(at + 8, &error.queue.to_le_bytes());
            page.put(at + 10, &error.command.to_le_bytes());
            page.put(at + 12, &error.status.to_le_bytes());
            page.put(at + 14, &NONE.to_le_bytes()); // which parameter: not said
            page.put(at + 16, &error.start_block.to_le_bytes());
            page.put(at + 24, &error.namespace.to_le_bytes());
        }
        page
    }

    fn health(&self, counters: &Counters, features: &Features) -> Page {
        let mut page = Page::new(PAGE_BYTES, Some(Class::Health));
        page.put(0, &[u8::from(features.temperature_warning()) << 1]);
        page.put(1, &TEMPERATURE_KELVIN.to_le_bytes());
        page.put(3, &[100, 10]); // spare and its threshold, in percent
        page.put(32, &counters.read_blocks.div_ceil(1000).to_le_bytes());
        page.put(48, &counters.written_blocks.div_ceil(1000).to_le_bytes());
        page.put(64, &counters.reads.to_le_bytes());
        page.put(80, &counters.writes.to_le_bytes());
        page.put(112, &1u64.to_le_bytes()); // power cycles
        page.put(176, &self.recorded.to_le_bytes());
        page
    }
}
