//! The NVM command set (NVM Express 1.4, section 6) on a block backend: straight between the image and guest RAM.

use std::sync::Arc;

use super::{
    super::{
        disk::{BlockBackend, BlockError, SECTOR_BYTES},
        memory::{GuestRam, RamSpan},
        saved::BadState,
    },
    command::{ALL_NAMESPACES, Command, Failure, NAMESPACE, Status},
    prp,
    saved::{CountersV1, check_counts},
};

const FLUSH: u8 = 0x00;
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
const WRITE_ZEROES: u8 = 0x08;
const DATASET_MANAGEMENT: u8 = 0x09;

/// Command dword 12: the data is durable before the command ends.
const FORCE_UNIT_ACCESS: u32 = 1 << 30;
/// Command dword 11 of Dataset Management: the attribute that does something here.
const DEALLOCATE: u32 = 1 << 2;
const RANGE_BYTES: usize = 16;
const RANGES_MAX: usize = 256;

/// For the health page.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) read_blocks: u64,
    pub(super) written_blocks: u64,
}

impl Counters {
    pub(super) fn save(&self) -> CountersV1 {
        let Counters { reads, writes, read_blocks, written_blocks } = *self;
        CountersV1 { reads, writes, read_blocks, written_blocks }
    }

    pub(super) fn restore(&mut self, saved: CountersV1) -> Result<(), BadState> {
        let CountersV1 { reads, writes, read_blocks, written_blocks } = saved;
        check_counts(&[reads, writes, read_blocks, written_blocks])?;
        *self = Counters { reads, writes, read_blocks, written_blocks };
        Ok(())
    }
}

/// The namespace's disk. Its buffers are reused from command to command.
pub(super) struct Disk {
    backend: Arc<dyn BlockBackend>,
    pub(super) counters: Counters,
    pub(super) spans: Vec<RamSpan>,
}

/// A run of blocks of the disk.
struct Extent {
    at: u64,
    bytes: u64,
}

impl Disk {
    pub(super) fn new(backend: Arc<dyn BlockBackend>) -> Disk {
        Disk { backend, counters: Counters::default(), spans: Vec::new() }
    }

    pub(super) fn flush(&self) -> Result<(), Failure> {
        self.backend.flush().map_err(failure)
    }

    /// Does an I/O command. A command that fails for want of the host is as if it had not begun: done again, it does the same.
    pub(super) fn execute(&mut self, ram: &GuestRam, command: &Command, write_cache: bool) -> Result<(), Failure> {
        if !command.is_plain() {
            return Err(Status::INVALID_FIELD.into());
        }
        let every = command.opcode == FLUSH && command.namespace == ALL_NAMESPACES;
        match command.opcode {
            FLUSH | WRITE | READ | WRITE_ZEROES | DATASET_MANAGEMENT if command.namespace == NAMESPACE || every => {}
            FLUSH | WRITE | READ | WRITE_ZEROES | DATASET_MANAGEMENT => return Err(Status::INVALID_NAMESPACE.into()),
            _ => return Err(Status::INVALID_OPCODE.into()),
        }
        let durable = !write_cache || command.words[2] & FORCE_UNIT_ACCESS != 0;
        match command.opcode {
            READ => self.read(ram, command),
            WRITE => self.write(ram, command, durable),
            WRITE_ZEROES => {
                let extent = self.extent(command.start_block(), blocks(command))?;
                self.backend.write_zeroes(extent.at, extent.bytes).map_err(failure)?;
                if durable { self.flush() } else { Ok(()) }
            }
            DATASET_MANAGEMENT => self.manage(ram, command),
            _ => self.flush(),
        }
    }

    fn read(&mut self, ram: &GuestRam, command: &Command) -> Result<(), Failure> {
        let extent = self.locate(ram, command)?;
        self.backend.read(ram, extent.at, &self.spans).map_err(failure)?;
        self.counters.reads += 1;
        self.counters.read_blocks += blocks(command);
        Ok(())
    }

    fn write(&mut self, ram: &GuestRam, command: &Command, durable: bool) -> Result<(), Failure> {
        let extent = self.locate(ram, command)?;
        self.backend.write(ram, extent.at, &self.spans).map_err(failure)?;
        if durable {
            self.flush()?;
        }
        self.counters.writes += 1;
        self.counters.written_blocks += blocks(command);
        Ok(())
    }

    /// The blocks of a command on the disk, and its data in `spans`.
    fn locate(&mut self, ram: &GuestRam, command: &Command) -> Result<Extent, Failure> {
        let bytes = blocks(command) * SECTOR_BYTES;
        if bytes > u64::from(prp::TRANSFER_BYTES_MAX) {
            return Err(Status::INVALID_FIELD.into());
        }
        let extent = self.extent(command.start_block(), blocks(command))?;
        prp::gather(ram, command, bytes as u32, &mut self.spans)?;
        Ok(extent)
    }

    /// Dataset Management (6.7). Every range is checked before the first is given up; the hints are not needed.
    fn manage(&mut self, ram: &GuestRam, command: &Command) -> Result<(), Failure> {
        if command.words[1] & DEALLOCATE == 0 {
            return Ok(());
        }
        let count = (command.words[0] & 0xff) as usize + 1;
        let mut bytes = [0; RANGES_MAX * RANGE_BYTES];
        let list = bytes.get_mut(..count * RANGE_BYTES).unwrap_or_default();
        prp::take(ram, command, list, &mut self.spans)?;
        let ranges = list.as_chunks::<RANGE_BYTES>().0;
        let extent = |range: &[u8; RANGE_BYTES]| {
            let [_, _, _, _, n0, n1, n2, n3, start @ ..] = *range;
            self.extent(u64::from_le_bytes(start), u64::from(u32::from_le_bytes([n0, n1, n2, n3])))
        };
        for range in ranges {
            extent(range)?;
        }
        for range in ranges {
            let extent = extent(range)?;
            self.backend.discard(extent.at, extent.bytes).map_err(failure)?;
        }
        Ok(())
    }

    fn extent(&self, start: u64, count: u64) -> Result<Extent, Status> {
        let known = self.backend.shape().size_bytes / SECTOR_BYTES;
        match start.checked_add(count) {
            Some(end) if end <= known => Ok(Extent { at: start * SECTOR_BYTES, bytes: count * SECTOR_BYTES }),
            _ => Err(Status::LBA_OUT_OF_RANGE),
        }
    }
}

/// Command dword 12 has one less.
fn blocks(command: &Command) -> u64 {
    u64::from(command.words[2] & 0xffff) + 1
}

fn failure(error: BlockError) -> Failure {
    if let Some(reason) = error.host_fault() {
        return Failure::Host(reason);
    }
    Failure::Status(match error {
        BlockError::OutOfRange { .. } => Status::LBA_OUT_OF_RANGE,
        BlockError::ReadOnly => Status::WRITE_PROTECTED,
        BlockError::BadSpan | BlockError::NoSpace | BlockError::Shrunk | BlockError::Io(_) => {
            Status::DATA_TRANSFER_ERROR
        }
    })
}
