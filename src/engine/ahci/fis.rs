//! What driver and HBA lay into guest memory: command header, command table and the frames (AHCI 1.3.1, section 4.2;
//! Serial ATA, "Frame Information Structures").
//!
//! Everything is copied out of guest memory once and parsed from the copy.

use super::super::memory::{Gpa, GuestRam, OutsideRam, RamSpan};

/// The size of one command header in the command list.
pub(super) const HEADER_BYTES: u64 = 32;
/// The size of a FIS that the device sends to the host's registers.
pub(super) const REGISTER_FIS_BYTES: usize = 20;
/// Where the HBA stores a PIO Setup FIS in the received FIS area.
pub(super) const PIO_SETUP_AT: u64 = 0x20;
/// Where the HBA stores a D2H Register FIS in the received FIS area.
pub(super) const D2H_AT: u64 = 0x40;

/// The most one command moves: 65536 sectors, what a 48-bit command can name. Packet commands are held to it too.
pub(super) const TRANSFER_BYTES_MAX: u64 = 65536 * 512;

/// Where the HBA stores a Set Device Bits FIS in the received FIS area.
pub(super) const SDB_AT: u64 = 0x58;

pub(super) const READ_QUEUED: u8 = 0x60;
pub(super) const WRITE_QUEUED: u8 = 0x61;

const SET_DEVICE_BITS: u8 = 0xa1;
const HOST_TO_DEVICE: u8 = 0x27;
const DEVICE_TO_HOST: u8 = 0x34;
const PIO_SETUP: u8 = 0x5f;
const INTERRUPT: u8 = 1 << 6;
const TO_HOST: u8 = 1 << 5;

/// A command header (AHCI 1.3.1, 4.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CommandHeader {
    /// CFL, the length of the command FIS in dwords.
    pub(super) fis_dwords: u8,
    /// A: the command table holds a packet.
    pub(super) packet: bool,
    pub(super) prdt_len: u16,
    pub(super) table: Gpa,
}

impl CommandHeader {
    pub(super) fn parse(bytes: &[u8; 32]) -> CommandHeader {
        let dword = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let flags = dword(0);
        CommandHeader {
            fis_dwords: (flags & 0x1f) as u8,
            packet: flags & 1 << 5 != 0,
            prdt_len: (flags >> 16) as u16,
            table: Gpa(u64::from(dword(12)) << 32 | u64::from(dword(8) & !0x7f)),
        }
    }
}

/// A Register FIS, host to device: one ATA command, or a write to Device Control. A device ignores the number of the port
/// multiplier's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct CommandFis {
    /// C: a command, else Device Control.
    pub(super) is_command: bool,
    pub(super) command: u8,
    pub(super) features: u8,
    /// The upper half of the features register; queued commands count with it.
    pub(super) features_high: u8,
    /// All six LBA registers; 28-bit commands keep bits 27:24 in `device`.
    pub(super) lba: u64,
    pub(super) device: u8,
    pub(super) count: u16,
    pub(super) control: u8,
}

impl CommandFis {
    /// `None` when this is no Register FIS of the host.
    pub(super) fn parse(bytes: &[u8; 64]) -> Option<CommandFis> {
        (bytes[0] == HOST_TO_DEVICE).then(|| CommandFis {
            is_command: bytes[1] & 0x80 != 0,
            command: bytes[2],
            features: bytes[3],
            features_high: bytes[11],
            lba: u64::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[8], bytes[9], bytes[10], 0, 0]),
            device: bytes[7],
            count: u16::from_le_bytes([bytes[12], bytes[13]]),
            control: bytes[15],
        })
    }
}

/// One slot's command, copied out of guest memory.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) slot: u8,
    /// PxSACT when the command was taken, without its own bit.
    pub(super) outstanding: u32,
    pub(super) header_at: Gpa,
    pub(super) header: CommandHeader,
    pub(super) fis: CommandFis,
    /// The packet of ATAPI commands; 12 bytes count.
    pub(super) packet: [u8; 16],
    pub(super) regions: Vec<Region>,
}

/// One entry of the PRDT (AHCI 1.3.1, 4.2.3.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) span: RamSpan,
    /// I: report when this region is done.
    pub(super) interrupt: bool,
}

/// Why a slot's command could not be copied.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum FetchError {
    /// The list or the table is not in RAM.
    OutsideRam,
    /// The command FIS is none.
    BadFis,
}

impl From<OutsideRam> for FetchError {
    fn from(_: OutsideRam) -> FetchError {
        FetchError::OutsideRam
    }
}

impl Command {
    /// READ or WRITE FPDMA QUEUED.
    pub(super) fn is_queued(&self) -> bool {
        self.fis.is_command && !self.header.packet && matches!(self.fis.command, READ_QUEUED | WRITE_QUEUED)
    }

    /// Copies the command of `slot` out of the command list at `list`.
    pub(super) fn fetch(ram: &GuestRam, list: Gpa, slot: u8, outstanding: u32) -> Result<Command, FetchError> {
        let header_at = beyond(list, u64::from(slot) * HEADER_BYTES)?;
        let mut bytes = [0; 32];
        ram.read(header_at, &mut bytes)?;
        let header = CommandHeader::parse(&bytes);
        let mut table = [0; 0x80];
        ram.read(header.table, &mut table)?;
        let mut fis = [0; 64];
        // Bytes past the frame's stated length are not part of it.
        let stated = usize::from(header.fis_dwords) * 4;
        for (to, from) in fis.iter_mut().zip(&table).take(stated) {
            *to = *from;
        }
        let mut packet = [0; 16];
        for (to, from) in packet.iter_mut().zip(table.iter().skip(0x40)) {
            *to = *from;
        }
        let fis = CommandFis::parse(&fis).ok_or(FetchError::BadFis)?;
        let regions = fetch_regions(ram, beyond(header.table, 0x80)?, header.prdt_len)?;
        Ok(Command { slot, outstanding, header_at, header, fis, packet, regions })
    }
}

/// The whole PRDT: 1 MiB at most, since its length is a 16-bit number.
fn fetch_regions(ram: &GuestRam, at: Gpa, len: u16) -> Result<Vec<Region>, FetchError> {
    let mut bytes = vec![0; usize::from(len) * 16];
    ram.read(at, &mut bytes)?;
    let (entries, _) = bytes.as_chunks::<16>();
    Ok(entries.iter().map(parse_region).collect())
}

fn parse_region(entry: &[u8; 16]) -> Region {
    let [address @ .., _, _, _, _, _, _, _, _] = *entry;
    let [.., a, b, c, d] = *entry;
    let flags = u32::from_le_bytes([a, b, c, d]);
    Region {
        span: RamSpan { at: Gpa(u64::from_le_bytes(address)), bytes: (flags & 0x3f_ffff) + 1 },
        interrupt: flags & 1 << 31 != 0,
    }
}

fn beyond(at: Gpa, bytes: u64) -> Result<Gpa, FetchError> {
    at.0.checked_add(bytes).map(Gpa).ok_or(FetchError::OutsideRam)
}

/// The data of one command: the guest memory that its PRDT names.
pub(super) struct Transfer<'a> {
    pub(super) ram: &'a GuestRam,
    pub(super) regions: &'a [Region],
}

/// The first part of a transfer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) spans: Vec<RamSpan>,
    /// The sum of the spans: less than was wanted when the PRDT is too short.
    pub(super) bytes: u64,
    /// A region that asks for an interrupt was used up.
    pub(super) interrupt: bool,
}

impl Transfer<'_> {
    /// The spans of the first `wanted` bytes.
    pub(super) fn part(&self, wanted: u64) -> Part {
        let mut part = Part::default();
        for region in self.regions {
            let left = wanted - part.bytes;
            if left == 0 {
                break;
            }
            let bytes = u32::try_from(left).unwrap_or(u32::MAX).min(region.span.bytes);
            part.spans.push(RamSpan { at: region.span.at, bytes });
            part.bytes += u64::from(bytes);
            part.interrupt |= region.interrupt && bytes == region.span.bytes;
        }
        part
    }

    /// Copies `data` to the guest, as much as fits.
    pub(super) fn give(&self, data: &[u8]) -> Result<Part, OutsideRam> {
        let part = self.part(data.len() as u64);
        let mut rest = data;
        for span in &part.spans {
            let (now, later) = rest.split_at_checked(span.bytes as usize).unwrap_or((rest, &[]));
            self.ram.write(span.at, now)?;
            rest = later;
        }
        Ok(part)
    }
}

/// The ATA registers that a device answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Registers {
    pub(super) status: u8,
    pub(super) error: u8,
    pub(super) lba: u64,
    pub(super) device: u8,
    pub(super) count: u16,
}

impl Registers {
    /// As Register FIS, device to host.
    pub(super) fn d2h(&self, interrupt: bool) -> [u8; REGISTER_FIS_BYTES] {
        self.frame(DEVICE_TO_HOST, if interrupt { INTERRUPT } else { 0 })
    }

    /// As Set Device Bits FIS: the end of the queued commands in `tags`. BSY and DRQ are not part of it.
    pub(super) fn set_device_bits(&self, tags: u32) -> [u8; 8] {
        let [a, b, c, d] = tags.to_le_bytes();
        [SET_DEVICE_BITS, INTERRUPT, self.status & 0x77, self.error, a, b, c, d]
    }

    /// As PIO Setup FIS for the last block, of `bytes`. The registers hold the status after that block.
    pub(super) fn pio_setup(&self, to_host: bool, bytes: u16) -> [u8; REGISTER_FIS_BYTES] {
        const DRDY_DRQ: u8 = 0x58;
        let mut frame = self.frame(PIO_SETUP, if to_host { INTERRUPT | TO_HOST } else { 0 });
        frame[2] = DRDY_DRQ;
        frame[15] = self.status;
        [frame[16], frame[17]] = bytes.to_le_bytes();
        frame
    }

    fn frame(&self, kind: u8, flags: u8) -> [u8; REGISTER_FIS_BYTES] {
        let lba = self.lba.to_le_bytes();
        let count = self.count.to_le_bytes();
        let mut frame = [0; REGISTER_FIS_BYTES];
        frame[..14].copy_from_slice(&[
            kind,
            flags,
            self.status,
            self.error,
            lba[0],
            lba[1],
            lba[2],
            self.device,
            lba[3],
            lba[4],
            lba[5],
            0,
            count[0],
            count[1],
        ]);
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(at: u64, bytes: u32, interrupt: bool) -> Region {
        Region { span: RamSpan { at: Gpa(at), bytes }, interrupt }
    }

    #[test]
    fn a_header_is_read_as_the_specification_draws_it() {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&0x0003_0465u32.to_le_bytes());
        bytes[8..12].copy_from_slice(&0x1234_56ffu32.to_le_bytes());
        bytes[12..16].copy_from_slice(&1u32.to_le_bytes());
        let header = CommandHeader::parse(&bytes);
        assert_eq!((header.fis_dwords, header.packet, header.prdt_len), (5, true, 3));
        assert_eq!(header.table, Gpa(0x1_1234_5680), "the table is aligned to 128 bytes");
    }

    #[test]
    fn a_part_stops_at_what_was_wanted_or_at_the_end_of_the_prdt() {
        let ram = GuestRam::new(2 << 20).unwrap();
        let regions = [region(0x1000, 512, true), region(0x3000, 1024, true)];
        let transfer = Transfer { ram: &ram, regions: &regions };
        let part = transfer.part(1000);
        assert_eq!(part.spans[1], RamSpan { at: Gpa(0x3000), bytes: 488 });
        assert_eq!((part.bytes, part.interrupt), (1000, true));
        assert_eq!(transfer.part(1 << 40).bytes, 1536);
        assert_eq!(transfer.part(0), Part::default());
        assert!(!transfer.part(511).interrupt, "the region is not used up");
    }

    #[test]
    fn data_is_scattered_over_the_regions() {
        let ram = GuestRam::new(2 << 20).unwrap();
        let regions = [region(0x1000, 2, false), region(0x3000, 64, false)];
        let part = Transfer { ram: &ram, regions: &regions }.give(b"abcde").unwrap();
        assert_eq!(part.bytes, 5);
        assert_eq!(ram.get_u16(Gpa(0x1000)), Ok(u16::from_le_bytes(*b"ab")));
        assert_eq!(ram.get_u32(Gpa(0x3000)), Ok(u32::from_le_bytes(*b"cde\0")));
        let outside = [region(0xa_0000, 2, false)];
        assert!(Transfer { ram: &ram, regions: &outside }.give(b"abc").is_err());
    }

    #[test]
    fn a_list_at_the_end_of_the_address_space_is_outside() {
        let ram = GuestRam::new(2 << 20).unwrap();
        assert_eq!(Command::fetch(&ram, Gpa(u64::MAX - 31), 1, 0).unwrap_err(), FetchError::OutsideRam);
        assert_eq!(Command::fetch(&ram, Gpa(0x1000), 0, 0).unwrap_err(), FetchError::BadFis);
    }
}
