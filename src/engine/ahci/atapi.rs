//! The CD drive behind a port: its few ATA commands, and the packet commands (MMC-6, SPC-3).
//!
//! Data that describes the drive or the medium is built in `mmc.rs`; here is who may ask for it when.

use std::sync::Arc;

use super::{
    super::{
        disk::{BlockBackend, BlockError},
        saved::BadState,
    },
    ata::{self, ABORT, Finish, Frames, READY, STATUS_ERROR, Stop},
    fis::{Command, CommandFis, Registers, TRANSFER_BYTES_MAX, Transfer},
    identify, mmc,
    saved::{CdV1, check},
    tray::{CdTray, Medium},
};

/// The signature of a packet device, in the LBA registers.
pub(super) const SIGNATURE_LBA: u64 = 0xeb_1401;

/// The interrupt reason at the end of a packet command: command and input, in the count register.
const REASON_STATUS: u16 = 3;
/// The features register's bit that makes a packet command use DMA.
const PACKET_DMA: u8 = 1;

/// Sense key, additional sense code and its qualifier (SPC-3, 4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Sense(u8, u8, u8);

impl Sense {
    const NONE: Sense = Sense(0, 0, 0);
    const NO_MEDIUM: Sense = Sense(2, 0x3a, 0);
    const TRAY_OPEN: Sense = Sense(2, 0x3a, 2);
    const BAD_COMMAND: Sense = Sense(5, 0x20, 0);
    const BAD_ADDRESS: Sense = Sense(5, 0x21, 0);
    const BAD_FIELD: Sense = Sense(5, 0x24, 0);
    const INCOMPATIBLE_MEDIUM: Sense = Sense(5, 0x30, 0);
    const NO_SAVED_PAGES: Sense = Sense(5, 0x39, 0);
    const LOCKED: Sense = Sense(5, 0x53, 2);
    const MEDIUM_CHANGED: Sense = Sense(6, 0x28, 0);
}

/// Why a packet command did not end well.
enum Fault {
    Sense(Sense),
    Stop(Stop),
}

impl From<Sense> for Fault {
    fn from(sense: Sense) -> Fault {
        Fault::Sense(sense)
    }
}

/// What a packet command gives.
enum Reply {
    Nothing,
    /// Data, already cut to the allocation length.
    Data(Vec<u8>),
    /// Blocks of the medium: where, and how many bytes.
    Blocks(Arc<dyn BlockBackend>, u64, u64),
}

/// The CD drive.
pub(super) struct CdDrive {
    tray: CdTray,
    serial: String,
    mode: u8,
    sense: Sense,
}

impl CdDrive {
    pub(super) fn new(serial: String, tray: CdTray) -> CdDrive {
        CdDrive { tray, serial, mode: identify::DEFAULT_MODE, sense: Sense::NONE }
    }

    /// Back to the settings of power on; the tray stays as it is, unlocked.
    pub(super) fn reset(&mut self) {
        self.mode = identify::DEFAULT_MODE;
        self.sense = Sense::NONE;
        self.tray.set_locked(false);
    }

    pub(super) fn save(&self) -> CdV1 {
        let CdDrive { tray, serial: _, mode, sense: Sense(key, code, qualifier) } = self;
        CdV1 { mode: *mode, sense: [*key, *code, *qualifier], tray: tray.save() }
    }

    pub(super) fn restore(&mut self, saved: CdV1) -> Result<(), BadState> {
        let CdV1 { mode, sense: [key, code, qualifier], tray } = saved;
        check(ata::is_mode(mode), "a transfer mode that there is not")?;
        (self.mode, self.sense) = (mode, Sense(key, code, qualifier));
        self.tray.restore(tray);
        Ok(())
    }

    /// Does one command. May be called again with the same command after `Stop::Host`.
    pub(super) fn execute(&mut self, command: &Command, data: &Transfer<'_>) -> Result<Finish, Stop> {
        let fis = &command.fis;
        let done = |registers| Ok(Finish { registers, ..Finish::default() });
        match fis.command {
            0xa0 if command.header.packet => self.packet(command, data),
            0xa1 => ata::give_block(&identify::cd(&self.serial, self.mode), ata::good(fis), data),
            // DEVICE RESET and EXECUTE DEVICE DIAGNOSTIC answer with the signature.
            0x08 | 0x90 => done(Registers { status: READY, error: 1, lba: SIGNATURE_LBA, device: 0, count: 1 }),
            // IDENTIFY DEVICE and READ SECTORS are refused in the way that tells what this is (ATA8-ACS, 4.12).
            0x20 | 0xec => Err(Stop::Error(Registers {
                status: READY | STATUS_ERROR,
                error: ABORT,
                lba: SIGNATURE_LBA,
                device: fis.device,
                count: 1,
            })),
            0xe0..=0xe3 | 0xe6 => done(ata::good(fis)),
            0xe5 => done(Registers { count: 0xff, ..ata::good(fis) }),
            0xef => {
                match fis.features {
                    0x03 => self.mode = ata::transfer_mode(fis, self.mode)?,
                    0x66 | 0xcc => {}
                    _ => return Err(ata::abort(fis)),
                }
                done(ata::good(fis))
            }
            _ => Err(ata::abort(fis)),
        }
    }

    fn packet(&mut self, command: &Command, data: &Transfer<'_>) -> Result<Finish, Stop> {
        let fis = &command.fis;
        let answer = self.answer(&Cdb(command.packet)).and_then(|reply| give(reply, fis, data));
        match answer {
            Ok(finish) => Ok(finish),
            Err(Fault::Stop(stop)) => Err(stop),
            Err(Fault::Sense(sense)) => {
                self.sense = sense;
                Err(Stop::Error(Registers {
                    status: READY | STATUS_ERROR,
                    error: sense.0 << 4 | ABORT,
                    count: REASON_STATUS,
                    ..ata::good(fis)
                }))
            }
        }
    }

    fn answer(&mut self, cdb: &Cdb) -> Result<Reply, Fault> {
        let last_sense = std::mem::replace(&mut self.sense, Sense::NONE);
        let reply = match cdb.byte(0) {
            0x00 => self.ready().map(|_| Reply::Nothing),
            0x03 => Ok(Reply::Data(cdb.cut(self.sense_data(last_sense), cdb.byte(4).into()))),
            0x12 => self.inquiry(cdb),
            0x1a => self.mode_sense(cdb, 4),
            0x1b => self.start_stop(cdb),
            0x1e => {
                self.tray.set_locked(cdb.byte(4) & 1 != 0);
                Ok(Reply::Nothing)
            }
            0x25 => self.ready().map(|medium| Reply::Data(mmc::capacity(blocks(&*medium)).to_vec())),
            0x28 => self.read(cdb, cdb.u16(7).into()),
            0x2b => self.seek(cdb),
            0x43 => self.toc(cdb),
            0x46 => self.configuration(cdb),
            0x4a => self.events(cdb),
            0x51 => self.ready().map(|_| Reply::Data(cdb.cut(mmc::disc_information().to_vec(), cdb.u16(7)))),
            0x52 => self.track_information(cdb),
            0x5a => self.mode_sense(cdb, 8),
            0xa8 => self.read(cdb, cdb.u32(6)),
            0xad => self.dvd_structure(cdb),
            0xbb => Ok(Reply::Nothing), // SET CD SPEED: the medium is as fast as it is
            0xbd => Ok(Reply::Data(cdb.cut(mmc::mechanism_status(self.tray.is_open()).to_vec(), cdb.u16(8)))),
            0xbe => self.read_cd(cdb),
            _ => Err(Sense::BAD_COMMAND),
        };
        reply.map_err(Fault::Sense)
    }

    /// The medium, or what the guest must hear first.
    fn ready(&self) -> Result<Arc<dyn BlockBackend>, Sense> {
        match self.tray.medium() {
            Medium::Ready(medium) => Ok(medium),
            Medium::Changed => Err(Sense::MEDIUM_CHANGED),
            Medium::Empty => Err(Sense::NO_MEDIUM),
            Medium::Open => Err(Sense::TRAY_OPEN),
        }
    }

    /// Fixed format sense data of the last command; a change of medium that nobody was told is reported here too.
    fn sense_data(&self, last: Sense) -> Vec<u8> {
        let sense = if last == Sense::NONE && self.tray.take_change() { Sense::MEDIUM_CHANGED } else { last };
        let mut data = vec![0; 18];
        data[0] = 0x70;
        data[2] = sense.0;
        data[7] = 10;
        data[12] = sense.1;
        data[13] = sense.2;
        data
    }

    fn inquiry(&self, cdb: &Cdb) -> Result<Reply, Sense> {
        if cdb.byte(1) & 1 != 0 || cdb.byte(2) != 0 {
            return Err(Sense::BAD_FIELD); // no vital product data
        }
        Ok(Reply::Data(cdb.cut(mmc::inquiry().to_vec(), cdb.u16(3))))
    }

    fn start_stop(&self, cdb: &Cdb) -> Result<Reply, Sense> {
        let flags = cdb.byte(4);
        match (flags & 0xf0, flags & 3) {
            (0, 2) => self.tray.open().map_err(|_| Sense::LOCKED)?,
            (0, 3) => self.tray.close(),
            _ => {} // power conditions and the motor
        }
        Ok(Reply::Nothing)
    }

    fn read(&self, cdb: &Cdb, count: u32) -> Result<Reply, Sense> {
        let medium = self.ready()?;
        let (at, bytes) = check_run(&*medium, cdb.u32(2), count)?;
        Ok(if bytes == 0 { Reply::Nothing } else { Reply::Blocks(medium, at, bytes) })
    }

    /// READ CD (MMC-6, 6.15): user data of data sectors only; there is nothing else on the medium.
    fn read_cd(&self, cdb: &Cdb) -> Result<Reply, Sense> {
        let sector_type = cdb.byte(1) >> 2 & 7;
        match (sector_type, cdb.byte(9) & 0xfe, cdb.byte(10) & 7) {
            (_, 0, 0) => self.ready().map(|_| Reply::Nothing),
            (0 | 2, 0x10, 0) => self.read(cdb, cdb.u32(5) & 0xff_ffff),
            _ => Err(Sense::BAD_FIELD),
        }
    }

    fn seek(&self, cdb: &Cdb) -> Result<Reply, Sense> {
        let medium = self.ready()?;
        check_run(&*medium, cdb.u32(2), 1).map(|_| Reply::Nothing)
    }

    /// READ TOC/PMA/ATIP (MMC-6, 6.25).
    fn toc(&self, cdb: &Cdb) -> Result<Reply, Sense> {
        let blocks = blocks(&*self.ready()?);
        let (msf, first) = (cdb.byte(1) & 2 != 0, cdb.byte(6));
        // Older commands had the format in the control byte.
        let format = if cdb.byte(2) & 0xf != 0 { cdb.byte(2) & 0xf } else { cdb.byte(9) >> 6 };
        let data = match format {
            0 if first <= 1 || first == mmc::LEAD_OUT => mmc::toc(blocks, msf, first),
            1 => mmc::sessions(msf),
            2 if first <= 1 => mmc::raw_toc(blocks),
            _ => return Err(Sense::BAD_FIELD),
        };
        Ok(Reply::Data(cdb.cut(data, cdb.u16(7))))
    }

    fn configuration(&self, cdb: &Cdb) -> Result<Reply, Sense> {
        let blocks = self.tray.peek().map(|medium| blocks(&*medium));
        let data = match cdb.byte(1) & 3 {
            0 => mmc::configuration(blocks, |number, _| number >= cdb.u16(2)),
            1 => mmc::configuration(blocks, |number, current| current && number >= cdb.u16(2)),
            2 => mmc::configuration(blocks, |number, _| number == cdb.u16(2)),
            _ => return Err(Sense::BAD_FIELD),
        };
        Ok(Reply::Data(cdb.cut(data, cdb.u16(7))))
    }

    /// GET EVENT STATUS NOTIFICATION (MMC-6, 6.6): media events, polled.
    fn events(&self, cdb: &Cdb) -> Result<Reply, Sense> {
        const MEDIA: u8 = 4;
        if cdb.byte(1) & 1 == 0 {
            return Err(Sense::BAD_FIELD);
        }
        let data = if cdb.byte(4) & 1 << MEDIA == 0 {
            vec![0, 2, 0x80, 1 << MEDIA]
        } else {
            // An event that does not fit is kept for the next time.
            let event = if cdb.u16(7) > 4 { self.tray.take_event() as u8 } else { 0 };
            let status = u8::from(self.tray.is_open()) | u8::from(self.tray.has_medium()) << 1;
            vec![0, 6, MEDIA, 1 << MEDIA, event, status, 0, 0]
        };
        Ok(Reply::Data(cdb.cut(data, cdb.u16(7))))
    }

    fn track_information(&self, cdb: &Cdb) -> Result<Reply, Sense> {
        let blocks = blocks(&*self.ready()?);
        let known = match cdb.byte(1) & 3 {
            0 => u64::from(cdb.u32(2)) < blocks,
            1 | 2 => cdb.u32(2) == 1,
            _ => false,
        };
        if !known {
            return Err(Sense::BAD_FIELD);
        }
        Ok(Reply::Data(cdb.cut(mmc::track_information(blocks).to_vec(), cdb.u16(7))))
    }

    fn dvd_structure(&self, cdb: &Cdb) -> Result<Reply, Sense> {
        let blocks = blocks(&*self.ready()?);
        if !mmc::is_dvd(blocks) {
            return Err(Sense::INCOMPATIBLE_MEDIUM);
        }
        if cdb.byte(6) != 0 {
            return Err(Sense::BAD_FIELD); // one layer
        }
        let data = mmc::dvd_structure(cdb.byte(7), blocks).ok_or(Sense::BAD_FIELD)?;
        Ok(Reply::Data(cdb.cut(data, cdb.u16(8))))
    }

    fn mode_sense(&self, cdb: &Cdb, header_bytes: usize) -> Result<Reply, Sense> {
        let (control, page) = (cdb.byte(2) >> 6, cdb.byte(2) & 0x3f);
        if control == 3 {
            return Err(Sense::NO_SAVED_PAGES);
        }
        // Nothing can be changed, so the mask of what can be is zero.
        let pages = mmc::mode_pages(page, control == 1, self.tray.is_locked()).ok_or(Sense::BAD_FIELD)?;
        let kind = if self.tray.is_open() {
            0x71
        } else if self.tray.has_medium() {
            0x01
        } else {
            0x70
        };
        let mut data = vec![0; header_bytes];
        data.extend(pages);
        if header_bytes == 4 {
            data[0] = u8::try_from(data.len() - 1).unwrap_or(u8::MAX);
            data[1] = kind;
        } else {
            data[1] = u8::try_from(data.len() - 2).unwrap_or(u8::MAX);
            data[2] = kind;
        }
        let room = if header_bytes == 4 { cdb.byte(4).into() } else { cdb.u16(7) };
        Ok(Reply::Data(cdb.cut(data, room)))
    }
}

/// Moves the reply to the guest.
fn give(reply: Reply, fis: &CommandFis, data: &Transfer<'_>) -> Result<Finish, Fault> {
    let registers = Registers { count: REASON_STATUS, ..ata::good(fis) };
    let (part, wanted) = match reply {
        Reply::Nothing => return Ok(Finish { registers, ..Finish::default() }),
        Reply::Data(bytes) => {
            let part = data.give(&bytes).map_err(|_| Fault::Stop(Stop::BadMemory))?;
            (part, bytes.len() as u64)
        }
        Reply::Blocks(medium, at, bytes) => {
            let part = data.part(bytes);
            medium.read(data.ram, at, &part.spans).map_err(fault)?;
            (part, bytes)
        }
    };
    let frames = if fis.features & PACKET_DMA != 0 {
        Frames::Register
    } else {
        Frames::PioThenRegister { to_host: true, last_block: last_block(part.bytes, fis.lba) }
    };
    Ok(Finish {
        registers,
        moved: part.bytes as u32, // at most TRANSFER_BYTES_MAX
        frames,
        overflow: part.bytes < wanted,
        region_done: part.interrupt,
    })
}

/// The bytes of the last block, when the byte count limit of the LBA registers cuts `bytes` into blocks.
fn last_block(bytes: u64, lba: u64) -> u16 {
    let limit = match lba >> 8 & 0xfffe {
        0 => 0xfffe,
        limit => limit,
    };
    if bytes == 0 { 0 } else { ((bytes - 1) % limit + 1) as u16 }
}

fn fault(error: BlockError) -> Fault {
    if let Some(reason) = error.host_fault() {
        return Fault::Stop(Stop::Host(reason));
    }
    match error {
        BlockError::BadSpan => Fault::Stop(Stop::BadMemory),
        _ => Fault::Sense(Sense::BAD_ADDRESS),
    }
}

fn blocks(medium: &dyn BlockBackend) -> u64 {
    medium.shape().size_bytes / mmc::BLOCK_BYTES
}

/// Where a run of blocks is, in bytes; an error when the medium does not have it, or one command may not move it.
fn check_run(medium: &dyn BlockBackend, first: u32, count: u32) -> Result<(u64, u64), Sense> {
    let (first, count) = (u64::from(first), u64::from(count));
    if first + count > blocks(medium) {
        return Err(Sense::BAD_ADDRESS);
    }
    let bytes = count * mmc::BLOCK_BYTES;
    if bytes > TRANSFER_BYTES_MAX { Err(Sense::BAD_FIELD) } else { Ok((first * mmc::BLOCK_BYTES, bytes)) }
}

/// A packet: a command descriptor block, its numbers big-endian.
struct Cdb([u8; 16]);

impl Cdb {
    fn byte(&self, at: usize) -> u8 {
        self.0[at]
    }
    fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.0[at], self.0[at + 1]])
    }
    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) << 16 | u32::from(self.u16(at + 2))
    }
    /// Cuts data to the allocation length.
    fn cut(&self, mut data: Vec<u8>, allocation: u16) -> Vec<u8> {
        data.truncate(allocation.into());
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_count_limit_cuts_pio_data_into_blocks() {
        for (bytes, limit, last) in
            [(36, 0, 36), (2048, 2048, 2048), (5000, 2048, 904), (0x1_0000, 0xffff, 2), (0, 0, 0)]
        {
            assert_eq!(last_block(bytes, limit << 8), last, "{bytes} in blocks of {limit}");
        }
    }
}
