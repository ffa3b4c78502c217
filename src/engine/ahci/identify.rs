//! The 512 bytes of IDENTIFY DEVICE and IDENTIFY PACKET DEVICE (ATA8-ACS, 7.16 and 7.17).
//!
//! What is said here must be what `ata.rs` and `atapi.rs` do; the words of commands that do not exist are zero.

/// Sectors per block of READ MULTIPLE, at most.
pub(super) const MULTIPLE_MAX: u8 = 16;
/// The geometry that commands with cylinders use until INITIALIZE DEVICE PARAMETERS.
pub(super) const HEADS: u16 = 16;
pub(super) const SECTORS_PER_TRACK: u16 = 63;
/// The mode after power on: Ultra DMA 5.
pub(super) const DEFAULT_MODE: u8 = 0x45;

const FIRMWARE: &str = "1.0";
/// The most sectors that 28 bits can address.
const LBA28_MAX: u64 = 0x0fff_ffff;

/// What of an ATA disk can be seen in its IDENTIFY data.
pub(super) struct DiskIdentity<'a> {
    pub(super) serial: &'a str,
    pub(super) sectors: u64,
    pub(super) multiple: u8,
    pub(super) mode: u8,
    pub(super) write_cache: bool,
    pub(super) look_ahead: bool,
}

/// IDENTIFY DEVICE.
pub(super) fn disk(disk: &DiskIdentity<'_>) -> [u8; 512] {
    let mut words = Words::new(0x0040, disk.serial, "Innkeeper disk");
    let cylinders = u16::try_from(disk.sectors / u64::from(HEADS * SECTORS_PER_TRACK)).unwrap_or(u16::MAX).min(16383);
    let chs = u32::from(cylinders) * u32::from(HEADS) * u32::from(SECTORS_PER_TRACK);
    for (word, value) in [(1, cylinders), (3, HEADS), (6, SECTORS_PER_TRACK)] {
        words.set(word, value);
    }
    words.set(47, 0x8000 | u16::from(MULTIPLE_MAX));
    words.set(48, 0x4000);
    words.set(49, 0x2f00); // DMA, LBA, IORDY, standard standby timer
    words.set(53, 0x0007);
    for (word, value) in [(54, cylinders), (55, HEADS), (56, SECTORS_PER_TRACK)] {
        words.set(word, value);
    }
    words.set_wide(57, u64::from(chs), 2);
    words.set(59, if disk.multiple > 0 { 0x100 | u16::from(disk.multiple) } else { 0 });
    words.set_wide(60, disk.sectors.min(LBA28_MAX), 2);
    words.modes(disk.mode);
    let caching = u16::from(disk.look_ahead) << 6 | u16::from(disk.write_cache) << 5;
    words.set(75, 31); // 32 queued commands
    words.set(76, 0x010e); // native command queuing
    words.set(82, 0x4068); // NOP, look-ahead, write cache, power management
    words.set(83, 0x7400); // both FLUSH CACHEs, 48 bits
    words.set(84, 0x4060); // WRITE DMA FUA EXT, logs
    words.set(85, 0x4008 | caching);
    words.set(86, 0xb400); // words 119 and 120 are valid
    words.set(87, 0x4060);
    words.set_wide(100, disk.sectors, 4);
    words.set(106, 0x4000); // one logical sector per physical one
    words.set(119, 0x4008); // READ LOG DMA EXT
    words.set(120, 0x4008);
    words.set(217, 1); // does not rotate
    words.finish()
}

/// IDENTIFY PACKET DEVICE.
pub(super) fn cd(serial: &str, mode: u8) -> [u8; 512] {
    let mut words = Words::new(0x85c0, serial, "Innkeeper CD"); // removable CD-ROM, 12-byte packets
    words.set(49, 0x0f00);
    words.set(50, 0x4000);
    words.set(53, 0x0006);
    words.modes(mode);
    for (supported, word) in [(0x4218, 82), (0x4000, 83), (0x4000, 84)] {
        words.set(word, supported); // DEVICE RESET, PACKET, power management
        words.set(word + 3, supported);
    }
    words.finish()
}

struct Words([u8; 512]);

impl Words {
    fn new(configuration: u16, serial: &str, model: &str) -> Words {
        let mut words = Words([0; 512]);
        words.set(0, configuration);
        words.text(10, 10, serial);
        words.text(23, 4, FIRMWARE);
        words.text(27, 20, model);
        words.set(76, 0x000e); // the three speeds of Serial ATA; no queueing
        words.set(77, 0x0006);
        words.set(80, 0x01f0); // ATA/ATAPI-4 to ATA8-ACS
        words.set(222, 0x103f); // Serial ATA
        words
    }

    /// Words 63 to 68 and 88: what modes there are and which one is selected.
    fn modes(&mut self, mode: u8) {
        let selected = 0x100u16 << (mode & 7);
        self.set(63, 0x0007 | if mode & 0xf8 == 0x20 { selected } else { 0 });
        self.set(64, 0x0003);
        for word in 65..=68 {
            self.set(word, 120);
        }
        self.set(88, 0x003f | if mode & 0xf8 == 0x40 { selected } else { 0 });
    }

    fn set(&mut self, word: usize, value: u16) {
        self.0[word * 2..word * 2 + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn set_wide(&mut self, word: usize, value: u64, words: usize) {
        self.0[word * 2..(word + words) * 2].copy_from_slice(&value.to_le_bytes()[..words * 2]);
    }

    /// ATA strings have the first character in the high byte, and are padded with spaces.
    fn text(&mut self, word: usize, words: usize, text: &str) {
        let mut bytes: Vec<u8> = text.bytes().filter(|byte| (0x20..0x7f).contains(byte)).take(words * 2).collect();
        bytes.resize(words * 2, b' ');
        for pair in bytes.chunks_exact_mut(2) {
            pair.swap(0, 1);
        }
        self.0[word * 2..(word + words) * 2].copy_from_slice(&bytes);
    }

    /// Adds the integrity word.
    fn finish(mut self) -> [u8; 512] {
        self.0[510] = 0xa5;
        let sum = self.0[..511].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        self.0[511] = sum.wrapping_neg();
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(data: &[u8; 512], word: usize) -> u16 {
        u16::from_le_bytes([data[word * 2], data[word * 2 + 1]])
    }

    #[test]
    fn a_large_disk_tells_its_size_in_each_way_that_can_hold_it() {
        let identity = DiskIdentity {
            serial: "disk-é1",
            sectors: 0x1_2345_6789,
            multiple: 8,
            mode: DEFAULT_MODE,
            write_cache: true,
            look_ahead: false,
        };
        let data = disk(&identity);
        assert_eq!((word(&data, 1), word(&data, 60), word(&data, 61)), (16383, 0xffff, 0x0fff));
        assert_eq!((word(&data, 100), word(&data, 101), word(&data, 102), word(&data, 103)), (0x6789, 0x2345, 1, 0));
        assert_eq!((word(&data, 59), word(&data, 88), word(&data, 63)), (0x0108, 0x203f, 0x0007));
        assert_eq!(word(&data, 85), 0x4028, "write cache on, look-ahead off");
        assert_eq!(&data[20..28], b"idks1-  ", "swapped, without what is not ASCII");
        assert_eq!(data.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    }

    #[test]
    fn a_cd_says_that_it_is_a_removable_packet_device() {
        let data = cd("QM00005", 0x22);
        assert_eq!(word(&data, 0), 0x85c0);
        assert_eq!((word(&data, 63), word(&data, 88)), (0x0407, 0x003f));
        assert_eq!(&data[54..66], b"nIkneeep rDC");
        assert_eq!(word(&data, 82), word(&data, 85));
    }
}
