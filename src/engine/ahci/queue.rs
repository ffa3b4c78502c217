//! Queued commands of the disk (ACS-3, native command queuing) and the logs that tell of their errors.
//!
//! After an error a real disk refuses everything until log 10h was read or it is reset. This one keeps the error for the log and goes on as
//! soon as the port does: there is no queue behind it that could be in disorder.

use super::{
    ata::{Disk, Finish, Frames, Stop, abort, failed, give_block, good},
    fis::{Command, CommandFis, Registers, Transfer, WRITE_QUEUED},
    saved::QueueErrorV1,
};

/// In the device register of a queued command: past the cache.
const FUA: u8 = 1 << 7;
/// In the first byte of log page 10h: the failed command was not a queued one.
const NOT_QUEUED: u8 = 1 << 7;

impl Disk {
    /// READ or WRITE FPDMA QUEUED: the sectors are counted in the features register, and the count register has the tag in bits
    /// 7:3, which with AHCI is the slot.
    pub(super) fn queued(&mut self, command: &Command, data: &Transfer<'_>) -> Result<Finish, Stop> {
        let fis = &command.fis;
        let tag = (fis.count >> 3 & 31) as u8;
        let count = u16::from_le_bytes([fis.features, fis.features_high]);
        let plain = CommandFis { count, device: 0x40, ..*fis };
        let answer = if tag == command.slot {
            self.transfer_queued(fis.command == WRITE_QUEUED, fis.device & FUA != 0, &plain, data)
        } else {
            Err(abort(&plain))
        };
        match answer {
            Ok(finish) => Ok(Finish { frames: Frames::Queued, ..finish }),
            Err(Stop::Error(registers)) => {
                self.remember(Some(tag), &Registers { count: fis.count, device: fis.device, ..registers });
                Err(Stop::Queued(registers))
            }
            Err(stop) => Err(stop),
        }
    }

    /// The answer to a command that is not queued and comes while others are: all are aborted.
    pub(super) fn refuse_between_queued(&mut self, fis: &CommandFis) -> Stop {
        self.remember(None, &failed(fis));
        abort(fis)
    }

    fn remember(&mut self, tag: Option<u8>, registers: &Registers) {
        let Registers { status, error, lba, device, count } = *registers;
        self.queue_error = Some(QueueErrorV1 { tag, status, error, lba, device, count });
    }

    /// READ LOG EXT and READ LOG DMA EXT: the directory and the queue's last error, each of one page. The error is told once.
    pub(super) fn read_log(&mut self, fis: &CommandFis, data: &Transfer<'_>, frames: Frames) -> Result<Finish, Stop> {
        let page = fis.lba >> 8 & 0xff | (fis.lba >> 32 & 0xff) << 8;
        if fis.count != 1 || page != 0 {
            return Err(abort(fis));
        }
        let finish = match fis.lba & 0xff {
            0x00 => give_block(&directory(), good(fis), data)?,
            0x10 => {
                let finish = give_block(&error_log(self.queue_error), good(fis), data)?;
                self.queue_error = None;
                finish
            }
            _ => return Err(abort(fis)),
        };
        Ok(Finish { frames, ..finish })
    }
}

/// Log 00h: version 1, and one page of log 10h.
fn directory() -> [u8; 512] {
    let mut log = [0; 512];
    log[0] = 1;
    log[0x20] = 1;
    log
}

/// Log 10h; its bytes add up to zero.
fn error_log(error: Option<QueueErrorV1>) -> [u8; 512] {
    let mut log = [0; 512];
    log[0] = NOT_QUEUED;
    if let Some(QueueErrorV1 { tag, status, error, lba, device, count }) = error {
        let lba = lba.to_le_bytes();
        let count = count.to_le_bytes();
        log[..14].copy_from_slice(&[
            tag.unwrap_or(NOT_QUEUED),
            0,
            status,
            error,
            lba[0],
            lba[1],
            lba[2],
            device,
            lba[3],
            lba[4],
            lba[5],
            0,
            count[0],
            count[1],
        ]);
    }
    let sum = log.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    log[511] = sum.wrapping_neg();
    log
}
