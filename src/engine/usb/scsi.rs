//! SCSI commands of a disk with one logical unit (SPC-3, SBC-3): what a command asks for, and the data that describes the disk.

use crate::engine::disk::{DiskShape, SECTOR_BYTES};

/// Sense key, additional sense code and its qualifier (SPC-3, 4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Sense(pub(super) u8, pub(super) u8, pub(super) u8);

impl Sense {
    pub(super) const NONE: Sense = Sense(0, 0, 0);
    pub(super) const WRITE_ERROR: Sense = Sense(3, 0x0c, 0);
    pub(super) const BAD_COMMAND: Sense = Sense(5, 0x20, 0);
    pub(super) const OUT_OF_RANGE: Sense = Sense(5, 0x21, 0);
    pub(super) const BAD_FIELD: Sense = Sense(5, 0x24, 0);
    pub(super) const NO_SUCH_UNIT: Sense = Sense(5, 0x25, 0);
    pub(super) const NO_SAVED_PAGES: Sense = Sense(5, 0x39, 0);
    pub(super) const WRITE_PROTECTED: Sense = Sense(7, 0x27, 0);
}

/// What a command asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    /// Already cut to the allocation length.
    Data(Vec<u8>),
    Read {
        at: u64,
        bytes: u64,
    },
    Write {
        at: u64,
        bytes: u64,
        /// The data is durable before the command ends.
        durable: bool,
    },
    /// All written data is durable before the command ends.
    Flush,
}

/// The disk, as its commands see it.
pub(super) struct Unit<'a> {
    pub(super) shape: DiskShape,
    pub(super) serial: &'a str,
    /// Of the command before.
    pub(super) sense: Sense,
}

/// A command descriptor block. Bytes past its end read as zero.
pub(super) struct Cdb<'a>(pub(super) &'a [u8]);

const FORCE_UNIT_ACCESS: u8 = 1 << 3;
/// VERIFY: compare with data that the host sends, which this disk does not.
const BYTE_CHECK: u8 = 3 << 1;

impl Cdb<'_> {
    fn byte(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }
    fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.byte(at), self.byte(at + 1)])
    }
    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) << 16 | u32::from(self.u16(at + 2))
    }
    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }
    /// First block and count of READ and WRITE with 6, 10, 12 and 16 bytes.
    fn blocks(&self) -> (u64, u64) {
        match self.byte(0) >> 5 {
            0 => {
                let count = u64::from(self.byte(4));
                (u64::from(self.u32(0) & 0x1f_ffff), if count == 0 { 256 } else { count })
            }
            1 => (self.u32(2).into(), self.u16(7).into()),
            4 => (self.u64(2), self.u32(10).into()),
            _ => (self.u32(2).into(), self.u32(6).into()),
        }
    }
}

impl Unit<'_> {
    pub(super) fn execute(&self, cdb: &Cdb<'_>) -> Result<Answer, Sense> {
        match cdb.byte(0) {
            // TEST UNIT READY, START STOP UNIT, PREVENT ALLOW MEDIUM REMOVAL, SEND DIAGNOSTIC: always ready, never moved.
            0x00 | 0x1b | 0x1e | 0x1d => Ok(Answer::Done),
            0x03 => Ok(data(self.sense_data(), cdb.byte(4).into())),
            0x12 => self.inquiry(cdb),
            0x1a => self.mode_sense(cdb, false),
            0x5a => self.mode_sense(cdb, true),
            0x23 => Ok(data(self.format_capacities(), cdb.u16(7).into())),
            0x25 => Ok(Answer::Data(self.capacity_10())),
            0x9e if cdb.byte(1) & 0x1f == 0x10 => Ok(data(self.capacity_16(), cdb.u32(10))),
            0xa0 if cdb.byte(2) > 2 => Err(Sense::BAD_FIELD),
            0xa0 => Ok(data(vec![0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], cdb.u32(6))),
            0x08 | 0x28 | 0xa8 | 0x88 => self.extent(cdb).map(|(at, bytes)| Answer::Read { at, bytes }),
            0x0a | 0x2a | 0xaa | 0x8a => self.write(cdb),
            0x2f | 0xaf | 0x8f if cdb.byte(1) & BYTE_CHECK != 0 => Err(Sense::BAD_FIELD),
            0x2f | 0xaf | 0x8f => self.extent(cdb).map(|_| Answer::Done),
            0x35 | 0x91 => Ok(Answer::Flush),
            _ => Err(Sense::BAD_COMMAND),
        }
    }

    fn extent(&self, cdb: &Cdb<'_>) -> Result<(u64, u64), Sense> {
        let (start, count) = cdb.blocks();
        match start.checked_add(count) {
            Some(end) if end <= self.shape.size_bytes / SECTOR_BYTES => {
                Ok((start * SECTOR_BYTES, count * SECTOR_BYTES))
            }
            _ => Err(Sense::OUT_OF_RANGE),
        }
    }

    fn write(&self, cdb: &Cdb<'_>) -> Result<Answer, Sense> {
        if self.shape.read_only {
            return Err(Sense::WRITE_PROTECTED);
        }
        let (at, bytes) = self.extent(cdb)?;
        let durable = cdb.byte(0) != 0x0a && cdb.byte(1) & FORCE_UNIT_ACCESS != 0;
        Ok(Answer::Write { at, bytes, durable })
    }

    /// Fixed format (SPC-3, 4.5.3).
    fn sense_data(&self) -> Vec<u8> {
        let Sense(key, code, qualifier) = self.sense;
        let mut data = vec![0; 18];
        (data[0], data[2], data[7], data[12], data[13]) = (0x70, key, 10, code, qualifier);
        data
    }

    /// SPC-3, 6.4 and 7.6.
    fn inquiry(&self, cdb: &Cdb<'_>) -> Result<Answer, Sense> {
        let page = cdb.byte(2);
        let reply = match (cdb.byte(1) & 1, page) {
            (0, 0) => {
                let mut data = vec![0, 0, 5, 2, 31, 0, 0, 0];
                data.extend(b"Innkeepr");
                data.extend(b"USB Disk        ");
                data.extend(b"1   ");
                data
            }
            (1, 0x00) => vital_product_data(page, &[0x00, 0x80, 0x83, 0xb1]),
            (1, 0x80) => vital_product_data(page, self.serial.as_bytes()),
            (1, 0x83) => {
                // A T10 identifier: the vendor, then what the vendor likes (SPC-3, 7.6.3.4).
                let serial = self.serial.as_bytes().iter().take(64);
                let name: Vec<u8> = b"Innkeepr".iter().chain(serial).copied().collect();
                let mut designator = vec![2, 1, 0, name.len() as u8];
                designator.extend(name);
                vital_product_data(page, &designator)
            }
            // Nothing turns (SBC-3, 6.5.3).
            (1, 0xb1) => vital_product_data(page, &[[0, 1].as_slice(), &[0; 58]].concat()),
            _ => return Err(Sense::BAD_FIELD),
        };
        Ok(data(reply, cdb.u16(3).into()))
    }

    /// SPC-3, 6.9 and 6.10: the caching page, which says that there is a write cache.
    fn mode_sense(&self, cdb: &Cdb<'_>, ten: bool) -> Result<Answer, Sense> {
        if cdb.byte(2) >> 6 == 3 {
            return Err(Sense::NO_SAVED_PAGES);
        }
        let changeable = cdb.byte(2) >> 6 == 1;
        let mut pages = Vec::new();
        match cdb.byte(2) & 0x3f {
            0x08 | 0x3f => {
                pages.extend([0x08, 18, if changeable { 0 } else { 1 << 2 }]);
                pages.extend([0; 17]);
            }
            0x00 => {}
            _ => return Err(Sense::BAD_FIELD),
        }
        // The device-specific parameter: write protection, and that FUA means something (SBC-3, 6.4.1).
        let parameter = 0x10 | if self.shape.read_only { 0x80 } else { 0 };
        let mut reply = if ten { vec![0, 0, 0, parameter, 0, 0, 0, 0] } else { vec![0, 0, parameter, 0] };
        reply.extend(pages);
        if ten {
            let [high, low] = (reply.len() as u16 - 2).to_be_bytes();
            (reply[0], reply[1]) = (high, low);
            Ok(data(reply, cdb.u16(7).into()))
        } else {
            reply[0] = reply.len() as u8 - 1;
            Ok(data(reply, cdb.byte(4).into()))
        }
    }

    /// SBC-3, 5.15: the last block and its size; all ones when the disk is too large for 32 bits.
    fn capacity_10(&self) -> Vec<u8> {
        let last = u32::try_from(self.last_block()).unwrap_or(u32::MAX);
        [last.to_be_bytes(), (SECTOR_BYTES as u32).to_be_bytes()].concat()
    }

    fn capacity_16(&self) -> Vec<u8> {
        let mut data = self.last_block().to_be_bytes().to_vec();
        data.extend((SECTOR_BYTES as u32).to_be_bytes());
        data.resize(32, 0);
        data
    }

    /// UFI 1.0, 4.10, which Windows asks for.
    fn format_capacities(&self) -> Vec<u8> {
        let blocks = u32::try_from(self.shape.size_bytes / SECTOR_BYTES).unwrap_or(u32::MAX);
        let [_, high, middle, low] = (SECTOR_BYTES as u32).to_be_bytes();
        let mut data = vec![0, 0, 0, 8];
        data.extend(blocks.to_be_bytes());
        data.extend([2, high, middle, low]); // formatted
        data
    }

    fn last_block(&self) -> u64 {
        (self.shape.size_bytes / SECTOR_BYTES).saturating_sub(1)
    }
}

fn data(mut bytes: Vec<u8>, allocated: u32) -> Answer {
    bytes.truncate(allocated as usize);
    Answer::Data(bytes)
}

fn vital_product_data(page: u8, of_page: &[u8]) -> Vec<u8> {
    let of_page = of_page.get(..of_page.len().min(250)).unwrap_or_default();
    let mut data = vec![0, page, 0, of_page.len() as u8];
    data.extend(of_page);
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(read_only: bool, blocks: u64) -> Unit<'static> {
        let shape = DiskShape { size_bytes: blocks * SECTOR_BYTES, read_only };
        Unit { shape, serial: "disk-1", sense: Sense::BAD_FIELD }
    }
    fn bytes(unit: &Unit<'_>, cdb: &[u8]) -> Vec<u8> {
        match unit.execute(&Cdb(cdb)) {
            Ok(Answer::Data(data)) => data,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_disk_describes_itself_within_the_allocation_length() {
        let unit = unit(true, 1000);
        let inquiry = bytes(&unit, &[0x12, 0, 0, 0, 36, 0]);
        assert_eq!((inquiry.len(), &inquiry[8..16]), (36, &b"Innkeepr"[..]));
        assert_eq!(bytes(&unit, &[0x12, 0, 0, 0, 5, 0]).len(), 5);
        assert_eq!(bytes(&unit, &[0x12, 1, 0x80, 0, 255, 0]), *b"\0\x80\0\x06disk-1");
        assert_eq!(bytes(&unit, &[0x12, 1, 0xb1, 0, 255, 0]).len(), 64);
        assert_eq!(bytes(&unit, &[0x12, 1, 0x83, 0, 255, 0])[4..8], [2, 1, 0, 14]);
        assert_eq!(unit.execute(&Cdb(&[0x12, 1, 0x81, 0, 255])), Err(Sense::BAD_FIELD));
        assert_eq!(bytes(&unit, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]), [0, 0, 3, 0xe7, 0, 0, 2, 0]);
        assert_eq!(bytes(&unit, &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12])[4..], [0, 0, 3, 0xe7, 0, 0, 2, 0]);
        assert_eq!(bytes(&unit, &[0x1a, 0, 0x3f, 0, 255])[..7], [23, 0, 0x90, 0, 8, 18, 4]);
        assert_eq!(bytes(&unit, &[0x5a, 0, 8, 0, 0, 0, 0, 0, 255])[..11], [0, 26, 0, 0x90, 0, 0, 0, 0, 8, 18, 4]);
        assert_eq!(unit.execute(&Cdb(&[0x1a, 0, 0xff, 0, 255])), Err(Sense::NO_SAVED_PAGES));
        let sense = bytes(&unit, &[0x03, 0, 0, 0, 18]);
        assert_eq!((sense[0], sense[2], sense[12], sense[13]), (0x70, 5, 0x24, 0));
        assert_eq!(bytes(&unit, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16]).len(), 16);
        assert_eq!(bytes(&unit, &[0x23, 0, 0, 0, 0, 0, 0, 0, 255])[..8], [0, 0, 0, 8, 0, 0, 3, 0xe8]);
    }

    #[test]
    fn reads_and_writes_are_checked_against_the_disk() {
        let unit = unit(false, 1000);
        let read = |cdb: &[u8]| unit.execute(&Cdb(cdb));
        assert_eq!(read(&[0x28, 0, 0, 0, 3, 0xe7, 0, 0, 1]), Ok(Answer::Read { at: 999 * 512, bytes: 512 }));
        assert_eq!(read(&[0x28, 0, 0, 0, 3, 0xe7, 0, 0, 2]), Err(Sense::OUT_OF_RANGE));
        assert_eq!(read(&[0x08, 0xe0, 0, 4, 0]), Ok(Answer::Read { at: 4 * 512, bytes: 256 * 512 }));
        let mut long = [0xff; 16];
        long[0] = 0x88;
        assert_eq!(read(&long), Err(Sense::OUT_OF_RANGE));
        assert_eq!(read(&[0x2a, 8, 0, 0, 0, 1, 0, 0, 2]), Ok(Answer::Write { at: 512, bytes: 1024, durable: true }));
        assert_eq!(
            read(&[0xaa, 0, 0, 0, 0, 1, 0, 0, 0, 2]),
            Ok(Answer::Write { at: 512, bytes: 1024, durable: false })
        );
        assert_eq!(read(&[0x2f, 0, 0, 0, 0, 1, 0, 0, 2]), Ok(Answer::Done));
        assert_eq!(read(&[0x2f, 2, 0, 0, 0, 1, 0, 0, 2]), Err(Sense::BAD_FIELD));
        assert_eq!(read(&[]), Ok(Answer::Done));
        assert_eq!(read(&[0xff]), Err(Sense::BAD_COMMAND));
        let protected = self::unit(true, 1000);
        assert_eq!(protected.execute(&Cdb(&[0x2a, 0, 0, 0, 0, 1, 0, 0, 2])), Err(Sense::WRITE_PROTECTED));
        let huge = self::unit(false, 1 << 33);
        assert_eq!(bytes(&huge, &[0x25])[..4], [0xff; 4]);
        assert_eq!(
            bytes(&huge, &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32])[..8],
            ((1u64 << 33) - 1).to_be_bytes()
        );
        assert_eq!(self::unit(false, 0).execute(&Cdb(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1])), Err(Sense::OUT_OF_RANGE));
    }
}
