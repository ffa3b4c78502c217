//! The ATA disk behind a port (ATA8-ACS). Runs on the worker thread; the port around it is in `port.rs`.

use std::sync::Arc;

use super::{
    super::{
        disk::{BlockBackend, BlockError, SECTOR_BYTES},
        saved::BadState,
    },
    fis::{Command, CommandFis, Registers, Transfer},
    identify,
    saved::{DiskV1, QueueErrorV1, check},
};

/// Status register: ready, and the bit that old drivers take for "seek complete".
pub(super) const READY: u8 = 0x50;
pub(super) const STATUS_ERROR: u8 = 0x01;
/// Error register: the command was aborted.
pub(super) const ABORT: u8 = 0x04;
const ID_NOT_FOUND: u8 = 0x10;

/// A command that ended well.
#[derive(Debug, Default)]
pub(super) struct Finish {
    pub(super) registers: Registers,
    /// Bytes moved, for PRDBC.
    pub(super) moved: u32,
    pub(super) frames: Frames,
    /// The device had more than the PRDT takes.
    pub(super) overflow: bool,
    /// A region that asked for an interrupt was used up.
    pub(super) region_done: bool,
}

/// Which frames the device sends at the end of a command (ATA8-AST, the transport protocols).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Frames {
    /// Without data, and DMA.
    #[default]
    Register,
    /// A queued command's: a Register FIS at its beginning, and Set Device Bits.
    Queued,
    /// PIO data-in: the last PIO Setup carries the ending status. The last block's bytes.
    PioIn(u16),
    /// PIO data-out, and packets in PIO mode.
    PioThenRegister { to_host: bool, last_block: u16 },
}

/// Why a command did not end well.
#[derive(Debug)]
pub(super) enum Stop {
    /// The device answers with an error.
    Error(Registers),
    /// A queued command failed: the device answers with Set Device Bits.
    Queued(Registers),
    /// The PRDT names what is not RAM.
    BadMemory,
    /// The host cannot do it now: to be tried again.
    Host(String),
}

/// A disk as seen through ATA commands.
pub(super) struct Disk {
    /// For log page 10h, until that is read.
    pub(super) queue_error: Option<QueueErrorV1>,
    backend: Arc<dyn BlockBackend>,
    serial: String,
    multiple: u8,
    mode: u8,
    write_cache: bool,
    look_ahead: bool,
    standby: bool,
    heads: u64,
    sectors_per_track: u64,
}

/// How one read or write command names its sectors and moves its data.
#[derive(Clone, Copy)]
struct Form {
    write: bool,
    extended: bool,
    way: Way,
    through: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Dma,
    /// Sector by sector.
    Pio,
    /// In blocks of SET MULTIPLE MODE.
    Multiple,
    /// READ VERIFY: nothing moves.
    Verify,
}

/// A checked run of sectors.
#[derive(Clone, Copy)]
struct Extent {
    at: u64,
    bytes: u64,
    sectors: u64,
}

impl Form {
    /// The read, write and verify commands; `None` for all others.
    fn of(command: u8) -> Option<Form> {
        let form = |write, extended, way| Some(Form { write, extended, way, through: false });
        match command {
            0x20 | 0x21 => form(false, false, Way::Pio),
            0x24 => form(false, true, Way::Pio),
            0x25 => form(false, true, Way::Dma),
            0x29 => form(false, true, Way::Multiple),
            0x30 | 0x31 => form(true, false, Way::Pio),
            0x34 => form(true, true, Way::Pio),
            0x35 => form(true, true, Way::Dma),
            0x39 => form(true, true, Way::Multiple),
            0x3d => Some(Form { write: true, extended: true, way: Way::Dma, through: true }),
            0x40 | 0x41 => form(false, false, Way::Verify),
            0x42 => form(false, true, Way::Verify),
            0xc4 => form(false, false, Way::Multiple),
            0xc5 => form(true, false, Way::Multiple),
            0xc8 | 0xc9 => form(false, false, Way::Dma),
            0xca | 0xcb => form(true, false, Way::Dma),
            0xce => Some(Form { write: true, extended: true, way: Way::Multiple, through: true }),
            _ => None,
        }
    }
}

impl Disk {
    pub(super) fn new(serial: String, backend: Arc<dyn BlockBackend>) -> Disk {
        Disk {
            queue_error: None,
            backend,
            serial,
            multiple: 0,
            mode: identify::DEFAULT_MODE,
            write_cache: true,
            look_ahead: true,
            standby: false,
            heads: identify::HEADS.into(),
            sectors_per_track: identify::SECTORS_PER_TRACK.into(),
        }
    }

    /// Back to the settings of power on.
    pub(super) fn reset(&mut self) {
        *self = Disk::new(std::mem::take(&mut self.serial), Arc::clone(&self.backend));
    }

    /// Does one command. May be called again with the same command after `Stop::Host`.
    pub(super) fn execute(&mut self, command: &Command, data: &Transfer<'_>) -> Result<Finish, Stop> {
        let fis = &command.fis;
        if command.header.packet {
            return Err(abort(fis));
        }
        if command.is_queued() {
            self.standby = false;
            return self.queued(command, data);
        }
        if command.outstanding != 0 {
            return Err(self.refuse_between_queued(fis));
        }
        if let Some(form) = Form::of(fis.command) {
            self.standby = false;
            return self.transfer(form, fis, data);
        }
        let done = |registers| Ok(Finish { registers, ..Finish::default() });
        match fis.command {
            // RECALIBRATE, SEEK and the power commands: nothing moves or sleeps here.
            0x10 | 0x70 => done(good(fis)),
            0x27 => done(Registers { lba: self.last_lba(u64::MAX), ..good(fis) }),
            0x2f => self.read_log(fis, data, Frames::PioIn(512)),
            0x47 => self.read_log(fis, data, Frames::Register),
            0x90 => done(Registers { status: READY, error: 1, lba: 1, device: 0, count: 1 }),
            0x91 => self.set_geometry(fis).map(|()| good(fis)).and_then(done),
            0xc6 => self.set_multiple(fis).map(|()| good(fis)).and_then(done),
            0xe0 | 0xe2 | 0xe6 => {
                self.standby = true;
                done(good(fis))
            }
            0xe1 | 0xe3 => {
                self.standby = false;
                done(good(fis))
            }
            0xe5 => done(Registers { count: if self.standby { 0 } else { 0xff }, ..good(fis) }),
            0xe7 | 0xea => self.flush(fis).map(|()| good(fis)).and_then(done),
            0xec => self.identify(fis, data),
            0xef => self.set_features(fis).map(|()| good(fis)).and_then(done),
            0xf8 => {
                let last = self.last_lba(0x0fff_ffff);
                done(Registers { lba: last & 0xff_ffff, device: 0x40 | (last >> 24) as u8 & 0xf, ..good(fis) })
            }
            // SMART, DATA SET MANAGEMENT, and SECURITY are not announced; all else is unknown.
            _ => Err(abort(fis)),
        }
    }

    /// The transfer of a queued command; `fis` has the count where other commands have it.
    pub(super) fn transfer_queued(
        &mut self,
        write: bool,
        through: bool,
        fis: &CommandFis,
        data: &Transfer<'_>,
    ) -> Result<Finish, Stop> {
        self.transfer(Form { write, extended: true, way: Way::Dma, through }, fis, data)
    }

    fn transfer(&mut self, form: Form, fis: &CommandFis, data: &Transfer<'_>) -> Result<Finish, Stop> {
        if form.way == Way::Multiple && self.multiple == 0 {
            return Err(abort(fis));
        }
        let extent = self.extent(form, fis)?;
        if form.way == Way::Verify {
            return Ok(Finish { registers: good(fis), ..Finish::default() });
        }
        let part = data.part(extent.bytes);
        let overflow = part.bytes < extent.bytes;
        let answer = match (form.write, overflow) {
            (false, _) => self.backend.read(data.ram, extent.at, &part.spans),
            // The host ends its data early: nothing is written rather than some of it.
            (true, true) => return Err(abort(fis)),
            (true, false) => self
                .backend
                .write(data.ram, extent.at, &part.spans)
                .and_then(|()| if form.through || !self.write_cache { self.backend.flush() } else { Ok(()) }),
        };
        answer.map_err(|error| stop(error, fis))?;
        let per_block = if form.way == Way::Multiple { u64::from(self.multiple) } else { 1 };
        let last_block = (((extent.sectors - 1) % per_block + 1) * SECTOR_BYTES) as u16; // at most MULTIPLE_MAX sectors
        let frames = match (form.way, form.write) {
            (Way::Dma | Way::Verify, _) => Frames::Register,
            (_, false) => Frames::PioIn(last_block),
            (_, true) => Frames::PioThenRegister { to_host: false, last_block },
        };
        Ok(Finish {
            registers: good(fis),
            moved: part.bytes as u32, // at most TRANSFER_BYTES_MAX
            frames,
            overflow,
            region_done: part.interrupt,
        })
    }

    /// The sectors that the command names; an error when the disk does not have them.
    fn extent(&self, form: Form, fis: &CommandFis) -> Result<Extent, Stop> {
        let (lba, sectors) = if form.extended {
            (Some(fis.lba), if fis.count == 0 { 65536 } else { u64::from(fis.count) })
        } else {
            let count = u64::from(fis.count & 0xff);
            (self.lba28(fis), if count == 0 { 256 } else { count })
        };
        let known = self.backend.shape().size_bytes / SECTOR_BYTES;
        match lba {
            Some(lba) if lba + sectors <= known => {
                Ok(Extent { at: lba * SECTOR_BYTES, bytes: sectors * SECTOR_BYTES, sectors })
            }
            _ => Err(Stop::Error(Registers { error: ID_NOT_FOUND, ..failed(fis) })),
        }
    }

    /// The address of a 28-bit command; `None` for a sector that no track has.
    fn lba28(&self, fis: &CommandFis) -> Option<u64> {
        let (low, high) = (fis.lba & 0xff_ffff, u64::from(fis.device & 0xf));
        if fis.device & 0x40 != 0 {
            return Some(high << 24 | low);
        }
        let sector = (low & 0xff).checked_sub(1)?;
        Some(((low >> 8) * self.heads + high) * self.sectors_per_track + sector)
    }

    fn last_lba(&self, at_most: u64) -> u64 {
        (self.backend.shape().size_bytes / SECTOR_BYTES).saturating_sub(1).min(at_most)
    }

    fn flush(&self, fis: &CommandFis) -> Result<(), Stop> {
        self.backend.flush().map_err(|error| stop(error, fis))
    }

    fn identify(&self, fis: &CommandFis, data: &Transfer<'_>) -> Result<Finish, Stop> {
        let identity = identify::DiskIdentity {
            serial: &self.serial,
            sectors: self.backend.shape().size_bytes / SECTOR_BYTES,
            multiple: self.multiple,
            mode: self.mode,
            write_cache: self.write_cache,
            look_ahead: self.look_ahead,
        };
        give_block(&identify::disk(&identity), good(fis), data)
    }

    pub(super) fn save(&self) -> DiskV1 {
        let Disk {
            queue_error,
            backend: _,
            serial: _,
            multiple,
            mode,
            write_cache,
            look_ahead,
            standby,
            heads,
            sectors_per_track,
        } = *self;
        // At most 16 heads and 255 sectors.
        let (heads, sectors_per_track) = (heads as u8, sectors_per_track as u8);
        DiskV1 { multiple, mode, write_cache, look_ahead, standby, heads, sectors_per_track, queue_error }
    }

    pub(super) fn restore(&mut self, saved: DiskV1) -> Result<(), BadState> {
        let DiskV1 { multiple, mode, write_cache, look_ahead, standby, heads, sectors_per_track, queue_error } = saved;
        check(is_multiple(multiple) && is_mode(mode), "a transfer mode that there is not")?;
        check((1..=16).contains(&heads) && sectors_per_track > 0, "a geometry without sectors")?;
        check(queue_error.and_then(|error| error.tag).is_none_or(|tag| tag < 32), "a tag that there is not")?;
        self.queue_error = queue_error;
        (self.multiple, self.mode, self.standby) = (multiple, mode, standby);
        (self.write_cache, self.look_ahead) = (write_cache, look_ahead);
        (self.heads, self.sectors_per_track) = (heads.into(), sectors_per_track.into());
        Ok(())
    }

    fn set_geometry(&mut self, fis: &CommandFis) -> Result<(), Stop> {
        let sectors = u64::from(fis.count & 0xff);
        if sectors == 0 {
            return Err(abort(fis));
        }
        (self.heads, self.sectors_per_track) = (u64::from(fis.device & 0xf) + 1, sectors);
        Ok(())
    }

    fn set_multiple(&mut self, fis: &CommandFis) -> Result<(), Stop> {
        let wanted = (fis.count & 0xff) as u8;
        if !is_multiple(wanted) {
            return Err(abort(fis));
        }
        self.multiple = wanted;
        Ok(())
    }

    /// SET FEATURES (ATA8-ACS, 7.45): the subcommand is in the features register.
    fn set_features(&mut self, fis: &CommandFis) -> Result<(), Stop> {
        match fis.features {
            0x02 => self.write_cache = true,
            0x03 => self.mode = transfer_mode(fis, self.mode)?,
            0x55 => self.look_ahead = false,
            0xaa => self.look_ahead = true,
            0x82 => {
                self.flush(fis)?;
                self.write_cache = false;
            }
            0x66 | 0xcc => {} // whether a soft reset keeps the settings: it does
            _ => return Err(abort(fis)),
        }
        Ok(())
    }
}

/// The mode that SET FEATURES selects; PIO modes leave the DMA mode as it is.
pub(super) fn transfer_mode(fis: &CommandFis, now: u8) -> Result<u8, Stop> {
    match fis.count & 0xff {
        0x00 | 0x01 | 0x08..=0x0c => Ok(now),
        mode if is_mode(mode as u8) => Ok(mode as u8),
        _ => Err(abort(fis)),
    }
}

/// Whether it is one of the DMA modes, which all are the same here.
pub(super) fn is_mode(mode: u8) -> bool {
    matches!(mode, 0x20..=0x22 | 0x40..=0x45)
}

/// Whether a block of READ MULTIPLE may have so many sectors; with none there is no READ MULTIPLE.
fn is_multiple(sectors: u8) -> bool {
    sectors <= identify::MULTIPLE_MAX && (sectors == 0 || sectors.is_power_of_two())
}

/// Sends one block as PIO data-in.
pub(super) fn give_block(block: &[u8; 512], registers: Registers, data: &Transfer<'_>) -> Result<Finish, Stop> {
    let part = data.give(block).map_err(|_| Stop::BadMemory)?;
    Ok(Finish {
        registers,
        moved: part.bytes as u32, // at most 512
        frames: Frames::PioIn(512),
        overflow: part.bytes < 512,
        region_done: part.interrupt,
    })
}

/// The registers after a command that ended well.
pub(super) fn good(fis: &CommandFis) -> Registers {
    Registers { status: READY, error: 0, lba: fis.lba, device: fis.device, count: 0 }
}

pub(super) fn failed(fis: &CommandFis) -> Registers {
    Registers { status: READY | STATUS_ERROR, error: ABORT, lba: fis.lba, device: fis.device, count: fis.count }
}

/// The answer to a command that the device does not do.
pub(super) fn abort(fis: &CommandFis) -> Stop {
    Stop::Error(failed(fis))
}

fn stop(error: BlockError, fis: &CommandFis) -> Stop {
    if let Some(reason) = error.host_fault() {
        return Stop::Host(reason);
    }
    match error {
        BlockError::BadSpan => Stop::BadMemory,
        BlockError::OutOfRange { .. } => Stop::Error(Registers { error: ID_NOT_FOUND, ..failed(fis) }),
        BlockError::ReadOnly | BlockError::NoSpace | BlockError::Shrunk | BlockError::Io(_) => abort(fis),
    }
}
