//! What the CD drive says about itself and its medium (MMC-6, SPC-3): one data track in one session.

/// The block size of every medium.
pub(super) const BLOCK_BYTES: u64 = 2048;
/// The track number of the lead-out.
pub(super) const LEAD_OUT: u8 = 0xaa;

/// 80 minutes of 75 blocks a second; what is larger is a DVD.
const CD_BLOCKS_MAX: u64 = 80 * 60 * 75;
const PROFILE_CD_ROM: u16 = 0x0008;
const PROFILE_DVD_ROM: u16 = 0x0010;
/// A data track that may not be copied, in sub-channel Q form (ADR 1, control 4).
const DATA_TRACK: u8 = 0x14;

/// Whether a medium of that many blocks is a DVD.
pub(super) fn is_dvd(blocks: u64) -> bool {
    blocks > CD_BLOCKS_MAX
}

/// Standard INQUIRY data of an ATAPI device.
pub(super) fn inquiry() -> [u8; 36] {
    let mut data = [0; 36];
    data[..5].copy_from_slice(&[0x05, 0x80, 0x00, 0x21, 31]);
    data[8..].copy_from_slice(b"INNKEEP Innkeeper CD    1.0 ");
    data
}

/// READ CAPACITY: the last block and the block size.
pub(super) fn capacity(blocks: u64) -> [u8; 8] {
    (u64::from(clamp(blocks.saturating_sub(1))) << 32 | BLOCK_BYTES).to_be_bytes()
}

/// READ TOC format 0: the track and the lead-out, from track `first` on.
pub(super) fn toc(blocks: u64, msf: bool, first: u8) -> Vec<u8> {
    let mut data = vec![0, 0, 1, 1];
    if first <= 1 {
        data.extend([0, DATA_TRACK, 1, 0]);
        data.extend(address(0, msf));
    }
    data.extend([0, DATA_TRACK, LEAD_OUT, 0]);
    data.extend(address(blocks, msf));
    with_length(data)
}

/// READ TOC format 1: the first track of the last session.
pub(super) fn sessions(msf: bool) -> Vec<u8> {
    let mut data = vec![0, 0, 1, 1, 0, DATA_TRACK, 1, 0];
    data.extend(address(0, msf));
    with_length(data)
}

/// READ TOC format 2: the lead-in's entries, always with minutes, seconds and frames.
pub(super) fn raw_toc(blocks: u64) -> Vec<u8> {
    let mut data = vec![0, 0, 1, 1];
    let [_, minute, second, frame] = address(blocks, true);
    for (point, place) in [(0xa0, [1, 0, 0]), (0xa1, [1, 0, 0]), (0xa2, [minute, second, frame]), (1, [0, 2, 0])] {
        data.extend([1, DATA_TRACK, 0, point, 0, 0, 0, 0]);
        data.extend(place);
    }
    with_length(data)
}

/// READ DISC INFORMATION: complete, not erasable, one session with one track.
pub(super) fn disc_information() -> [u8; 34] {
    let mut data = [0; 34];
    data[1] = 32;
    data[2..8].copy_from_slice(&[0x0e, 1, 1, 1, 1, 0x20]);
    data[16..24].fill(0xff); // no lead-in and lead-out to write
    data
}

/// READ TRACK INFORMATION of the one track.
pub(super) fn track_information(blocks: u64) -> [u8; 36] {
    let mut data = [0; 36];
    data[1] = 34;
    data[2..4].copy_from_slice(&[1, 1]);
    data[5..7].copy_from_slice(&[0x04, 0x01]); // data, mode 1
    data[24..28].copy_from_slice(&clamp(blocks).to_be_bytes());
    data
}

/// MECHANISM STATUS: no changer.
pub(super) fn mechanism_status(open: bool) -> [u8; 8] {
    [0, u8::from(open) << 4, 0, 0, 0, 1, 0, 0]
}

/// READ DVD STRUCTURE: physical, copyright and manufacturing information of a one-layer DVD-ROM.
pub(super) fn dvd_structure(format: u8, blocks: u64) -> Option<Vec<u8>> {
    const FIRST_SECTOR: u32 = 0x3_0000;
    let mut data = vec![0; 4];
    match format {
        0 => {
            data.extend([0x01, 0x0f, 0x01, 0x00]);
            data.extend(FIRST_SECTOR.to_be_bytes());
            data.extend(clamp(u64::from(FIRST_SECTOR) + blocks - 1).to_be_bytes());
            data.resize(4 + 2048, 0);
        }
        1 => data.resize(4 + 4, 0),
        4 => data.resize(4 + 2048, 0),
        _ => return None,
    }
    Some(with_length(data))
}

/// GET CONFIGURATION (MMC-6, 6.5): the features that `wanted` takes by number and whether they are current.
pub(super) fn configuration(blocks: Option<u64>, wanted: impl Fn(u16, bool) -> bool) -> Vec<u8> {
    let (cd, dvd) = (blocks.is_some_and(|blocks| !is_dvd(blocks)), blocks.is_some_and(is_dvd));
    let [dvd_high, dvd_low] = PROFILE_DVD_ROM.to_be_bytes();
    let [cd_high, cd_low] = PROFILE_CD_ROM.to_be_bytes();
    let persistent = 2u8;
    let features: [(u16, u8, bool, &[u8]); 9] = [
        (0x0000, persistent, true, &[dvd_high, dvd_low, dvd.into(), 0, cd_high, cd_low, cd.into(), 0]),
        (0x0001, 2 << 2 | persistent, true, &[0, 0, 0, 7, 0, 0, 0, 0]), // core; Serial ATAPI
        (0x0002, 1 << 2 | persistent, true, &[0, 0, 0, 0]),             // morphing, polled
        (0x0003, persistent, true, &[0x29, 0, 0, 0]),                   // a tray that locks and ejects
        (0x0010, 0, cd || dvd, &[0, 0, 8, 0, 0, 1, 0, 0]),              // random readable, 2048 bytes
        (0x001e, 2 << 2, cd, &[0, 0, 0, 0]),                            // CD read
        (0x001f, 1 << 2, dvd, &[0, 0, 0, 0]),                           // DVD read
        (0x0100, persistent, true, &[]),                                // power management
        (0x0105, persistent, true, &[]),                                // timeout
    ];
    let profile = match (cd, dvd) {
        (true, _) => PROFILE_CD_ROM,
        (_, true) => PROFILE_DVD_ROM,
        (false, false) => 0,
    };
    let mut data = vec![0; 6];
    data.extend(profile.to_be_bytes());
    for (number, flags, current, body) in features {
        if wanted(number, current) {
            data.extend(number.to_be_bytes());
            data.extend([flags | u8::from(current), body.len() as u8]); // bodies above are short
            data.extend(body);
        }
    }
    let after = clamp(data.len() as u64 - 4).to_be_bytes();
    data[..4].copy_from_slice(&after);
    data
}

/// The mode pages that `page` names, 0x3f for all; `None` when there is no such page. `mask` gives what can be changed.
pub(super) fn mode_pages(page: u8, mask: bool, locked: bool) -> Option<Vec<u8>> {
    const RATE: [u8; 2] = 5632u16.to_be_bytes(); // 32 times 176 kB/s
    let mut capabilities = [0; 20];
    capabilities[..8].copy_from_slice(&[0x2a, 18, 0x0b, 0, 0x70, 0, 0x29 | u8::from(locked) << 1, 0]);
    [capabilities[8], capabilities[9]] = RATE;
    [capabilities[12], capabilities[13]] = 512u16.to_be_bytes(); // buffer, KiB
    [capabilities[14], capabilities[15]] = RATE;
    let pages: [&[u8]; 5] = [
        &[0x01, 10, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0], // error recovery: three tries
        &[0x08, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], // caching
        &[0x1a, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], // power condition: no timers
        &[0x1d, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], // timeout and protect
        &capabilities,
    ];
    let mut data = Vec::new();
    for body in pages.into_iter().filter(|body| page == 0x3f || body.first() == Some(&page)) {
        data.extend(body.iter().enumerate().map(|(at, byte)| if mask && at >= 2 { 0 } else { *byte }));
    }
    (!data.is_empty()).then_some(data)
}

/// A block's address, as number or as minute, second and frame.
fn address(block: u64, msf: bool) -> [u8; 4] {
    if !msf {
        return clamp(block).to_be_bytes();
    }
    let frames = block.saturating_add(150);
    let minute = u8::try_from(frames / (60 * 75)).unwrap_or(u8::MAX);
    [0, minute, (frames / 75 % 60) as u8, (frames % 75) as u8]
}

/// Writes the length of what follows into the first two bytes.
fn with_length(mut data: Vec<u8>) -> Vec<u8> {
    let after = u16::try_from(data.len() - 2).unwrap_or(u16::MAX).to_be_bytes();
    data[..2].copy_from_slice(&after);
    data
}

fn clamp(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_toc_has_a_track_and_a_lead_out() {
        assert_eq!(toc(300, false, 0), [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xaa, 0, 0, 0, 1, 44]);
        assert_eq!(toc(300, true, 1)[8..12], [0, 0, 2, 0]);
        assert_eq!(toc(300, true, 1)[16..], [0, 0, 6, 0]);
        assert_eq!(toc(300, false, LEAD_OUT).len(), 12);
        assert_eq!(sessions(false), [0, 10, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0]);
        let raw = raw_toc(300);
        assert_eq!((raw.len(), raw[1], raw[7], &raw[34..37]), (48, 46, 0xa0, &[0, 6, 0][..]));
    }

    #[test]
    fn the_profile_follows_the_size_of_the_medium() {
        let all = |blocks| configuration(blocks, |_, _| true);
        assert_eq!(all(None)[6..8], [0, 0]);
        assert_eq!(all(Some(1000))[6..8], [0, 8]);
        assert_eq!(all(Some(2_000_000))[6..8], [0, 0x10]);
        let one = configuration(Some(1000), |number, _| number == 0x1e);
        assert_eq!(one, [0, 0, 0, 12, 0, 0, 0, 8, 0, 0x1e, 9, 4, 0, 0, 0, 0]);
        let none = configuration(Some(1000), |number, _| number == 0x40);
        assert_eq!(none, [0, 0, 0, 4, 0, 0, 0, 8]);
    }

    #[test]
    fn mode_pages_come_alone_or_together_and_cannot_be_changed() {
        let page = mode_pages(0x2a, false, true).unwrap();
        assert_eq!((page.len(), page[0], page[1], page[6]), (20, 0x2a, 18, 0x2b));
        assert!(mode_pages(0x2a, true, true).unwrap()[2..].iter().all(|byte| *byte == 0));
        assert_eq!(mode_pages(0x3f, false, false).unwrap().len(), 4 * 12 + 20);
        assert_eq!(mode_pages(0x05, false, false), None);
    }
}
