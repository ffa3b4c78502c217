//! The driver's resources: pictures in the host's memory, each with the guest's memory behind it from which it is filled.

use std::collections::BTreeMap;

use super::{
    protocol::{Format, Rect, Refused},
    shown::CURSOR_PIXELS,
};
use crate::engine::memory::{Gpa, GuestRam, RamSpan};

pub(super) const PIXEL_BYTES: u64 = 4;
/// The longest side, in pixels.
pub(super) const SIDE_MAX: u32 = 8192;
/// The largest screen: 3840 by 2160 pixels, or as many in another shape.
pub(super) const SCREEN_PIXELS_MAX: u64 = 3840 * 2160;
pub(super) const SCREEN_BYTES_MAX: u64 = SCREEN_PIXELS_MAX * PIXEL_BYTES;
/// Pictures of the whole screen that a guest with one screen has at once: one of its text console, two of the login, and three of
/// the desktop that takes over from it, between which a compositor flips. Small modes leave room for more.
const SCREENS: u64 = 6;
/// Images of cursors: a theme has some dozens, and compositors keep few of them.
const CURSORS: u64 = 32;
/// Pixels of all resources together, in bytes: 190 MiB. Beyond that a driver is told ERR_OUT_OF_MEMORY (virtio 1.2, 5.7.6.8).
pub(super) const PIXEL_BYTES_MAX: u64 = SCREENS * SCREEN_BYTES_MAX + CURSORS * (CURSOR_PIXELS as u64 * PIXEL_BYTES);
pub(super) const RESOURCES_MAX: usize = 1024;
/// Entries of one backing: as many as pages of the largest screen, and more than that.
pub(super) const BACKING_ENTRIES_MAX: usize = 16384;
/// Entries of all backings: more than pages of `PIXEL_BYTES_MAX`. With where each begins they take 1.5 MiB.
pub(super) const ALL_ENTRIES_MAX: usize = 65536;

/// A picture as the driver filled it.
pub(super) struct Resource {
    pub(super) format: Format,
    pub(super) width: u32,
    pub(super) height: u32,
    /// In `format`, row by row, without gaps.
    pub(super) pixels: Vec<u8>,
    pub(super) backing: Option<Backing>,
}

/// Stretches of the guest's memory that count as one.
pub(super) struct Backing {
    pub(super) spans: Vec<RamSpan>,
    /// Where each begins within the whole.
    starts: Vec<u64>,
    bytes: u64,
}

/// All resources by their ids, within the limits of all together.
#[derive(Default)]
pub(super) struct Resources {
    by_id: BTreeMap<u32, Resource>,
    pixel_bytes: u64,
    entries: usize,
}

impl Resource {
    /// A black one. Errors: it has no pixels, or too many on a side.
    fn new(format: Format, width: u32, height: u32) -> Result<Resource, Refused> {
        let fits = |side: u32| (1..=SIDE_MAX).contains(&side);
        if !fits(width) || !fits(height) {
            return Err(Refused::Parameter);
        }
        Ok(Resource { format, width, height, pixels: Vec::new(), backing: None })
    }

    pub(super) fn bytes(&self) -> u64 {
        u64::from(self.width) * u64::from(self.height) * PIXEL_BYTES
    }

    pub(super) fn contains(&self, rect: Rect) -> bool {
        rect.is_within(self.width, self.height)
    }

    /// Whether a part of it can be shown.
    pub(super) fn check_shows(&self, part: Rect) -> Result<(), Refused> {
        if !self.contains(part) {
            return Err(Refused::Parameter);
        }
        let pixels = u64::from(part.width) * u64::from(part.height);
        if pixels > SCREEN_PIXELS_MAX { Err(Refused::OutOfMemory) } else { Ok(()) }
    }

    /// The bytes of a part of a row.
    pub(super) fn row(&self, x: u32, y: u32, width: u32) -> &[u8] {
        let at = self.place(x, y);
        self.pixels.get(at..at + to_usize(u64::from(width) * PIXEL_BYTES)).unwrap_or_default()
    }

    fn place(&self, x: u32, y: u32) -> usize {
        to_usize((u64::from(y) * u64::from(self.width) + u64::from(x)) * PIXEL_BYTES)
    }

    /// Fills a rectangle from the backing. Its first row begins at `offset` there; the next ones follow at the distance of this
    /// picture's rows (virtio 1.2, 5.7.6.8).
    pub(super) fn transfer(&mut self, ram: &GuestRam, rect: Rect, offset: u64) -> Result<(), Refused> {
        if !self.contains(rect) {
            return Err(Refused::Parameter);
        }
        let backing = self.backing.as_ref().ok_or(Refused::Unspecified)?;
        let stride = u64::from(self.width) * PIXEL_BYTES;
        let row_bytes = u64::from(rect.width) * PIXEL_BYTES;
        let end = offset.checked_add(stride * u64::from(rect.height - 1) + row_bytes);
        if end.is_none_or(|end| end > backing.bytes) {
            return Err(Refused::Parameter);
        }
        // Whole rows lie one behind the other on both sides.
        let (pieces, piece_bytes) =
            if rect.width == self.width { (1, stride * u64::from(rect.height)) } else { (rect.height, row_bytes) };
        for piece in 0..pieces {
            let at = self.place(rect.x, rect.y + piece);
            let into = self.pixels.get_mut(at..at + to_usize(piece_bytes)).unwrap_or_default();
            backing.read(ram, offset + u64::from(piece) * stride, into)?;
        }
        Ok(())
    }
}

impl Backing {
    /// The caller has checked that the spans are RAM.
    pub(super) fn new(spans: Vec<RamSpan>) -> Backing {
        let mut bytes = 0;
        let mut starts = Vec::with_capacity(spans.len());
        for span in &spans {
            starts.push(bytes);
            bytes += u64::from(span.bytes);
        }
        Backing { spans, starts, bytes }
    }

    /// Copies out from `offset`. The caller has checked that so much is there.
    fn read(&self, ram: &GuestRam, mut offset: u64, mut into: &mut [u8]) -> Result<(), Refused> {
        let first = self.starts.partition_point(|start| *start <= offset).saturating_sub(1);
        for (span, start) in self.spans.iter().zip(&self.starts).skip(first) {
            if into.is_empty() {
                break;
            }
            let skipped = offset - start;
            let here = u64::from(span.bytes).saturating_sub(skipped).min(into.len() as u64);
            if here == 0 {
                continue;
            }
            let (part, rest) = std::mem::take(&mut into).split_at_mut(to_usize(here));
            ram.read(Gpa(span.at.0.wrapping_add(skipped)), part).map_err(|_| Refused::Parameter)?;
            (into, offset) = (rest, offset + here);
        }
        Ok(())
    }
}

/// What the limits allow fits.
fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

impl Resources {
    pub(super) fn get(&self, id: u32) -> Result<&Resource, Refused> {
        self.by_id.get(&id).ok_or(Refused::Resource)
    }

    pub(super) fn get_mut(&mut self, id: u32) -> Result<&mut Resource, Refused> {
        self.by_id.get_mut(&id).ok_or(Refused::Resource)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Resource)> {
        self.by_id.iter().map(|(id, resource)| (*id, resource))
    }

    /// Makes a black resource. No memory is taken for it before its limits are checked.
    pub(super) fn create(&mut self, id: u32, format: u32, width: u32, height: u32) -> Result<&mut Resource, Refused> {
        if id == 0 || self.by_id.contains_key(&id) {
            return Err(Refused::Resource);
        }
        let format = Format::from_number(format).ok_or(Refused::Parameter)?;
        let mut made = Resource::new(format, width, height)?;
        let all = self.pixel_bytes + made.bytes();
        if self.by_id.len() >= RESOURCES_MAX || all > PIXEL_BYTES_MAX {
            return Err(Refused::OutOfMemory);
        }
        made.pixels = vec![0; to_usize(made.bytes())];
        self.pixel_bytes = all;
        Ok(self.by_id.entry(id).or_insert(made))
    }

    pub(super) fn remove(&mut self, id: u32) -> Result<(), Refused> {
        let gone = self.by_id.remove(&id).ok_or(Refused::Resource)?;
        self.pixel_bytes -= gone.bytes();
        self.entries -= gone.backing.map_or(0, |backing| backing.spans.len());
        Ok(())
    }

    /// Whether a resource can get a backing of so many entries.
    pub(super) fn check_attach(&self, id: u32, entries: u32) -> Result<usize, Refused> {
        if self.get(id)?.backing.is_some() {
            return Err(Refused::Unspecified);
        }
        let entries = entries as usize;
        if entries > BACKING_ENTRIES_MAX || self.entries + entries > ALL_ENTRIES_MAX {
            return Err(Refused::OutOfMemory);
        }
        Ok(entries)
    }

    /// `check_attach` was asked.
    pub(super) fn attach(&mut self, id: u32, mut spans: Vec<RamSpan>) -> Result<(), Refused> {
        // Entries without bytes were left out: room for them would not be counted.
        spans.shrink_to_fit();
        let count = spans.len();
        self.get_mut(id)?.backing = Some(Backing::new(spans));
        self.entries += count;
        Ok(())
    }

    pub(super) fn detach(&mut self, id: u32) -> Result<(), Refused> {
        let backing = self.get_mut(id)?.backing.take().ok_or(Refused::Unspecified)?;
        self.entries -= backing.spans.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backing(parts: &[(u64, u32)]) -> Backing {
        Backing::new(parts.iter().map(|(at, bytes)| RamSpan { at: Gpa(*at), bytes: *bytes }).collect())
    }

    #[test]
    fn a_backing_is_read_across_its_pieces_and_empty_ones() {
        let ram = GuestRam::new(1 << 20).unwrap();
        ram.write(Gpa(0x1000), b"abcd").unwrap();
        ram.write(Gpa(0x3000), b"efgh").unwrap();
        let backing = backing(&[(0x5000, 0), (0x1000, 4), (0x6000, 0), (0x6000, 0), (0x3000, 4), (0x7000, 0)]);
        assert_eq!(backing.bytes, 8);
        for (offset, expected) in [(0, &b"abcdefgh"[..]), (3, b"de"), (4, b"efgh"), (7, b"h"), (8, b""), (0, b"")] {
            let mut seen = vec![0; expected.len()];
            backing.read(&ram, offset, &mut seen).unwrap();
            assert_eq!(seen, expected, "from {offset}");
        }
    }

    #[test]
    fn memory_and_entries_are_counted_until_they_are_given_back() {
        let mut all = Resources::default();
        for id in 1..=SCREENS as u32 {
            all.create(id, 1, 3840, 2160).unwrap();
        }
        assert_eq!(all.create(99, 1, 3840, 2160).err(), Some(Refused::OutOfMemory));
        for id in 0..CURSORS as u32 {
            all.create(100 + id, 1, 64, 64).unwrap();
        }
        assert_eq!(all.create(99, 1, 1, 1).err(), Some(Refused::OutOfMemory));
        assert_eq!(all.pixel_bytes, PIXEL_BYTES_MAX);
        let ids: Vec<u32> = all.iter().map(|(id, _)| id).collect();
        ids.into_iter().for_each(|id| all.remove(id).unwrap());
        assert_eq!(all.remove(1), Err(Refused::Resource));
        assert_eq!(all.create(1, 1, SIDE_MAX, SIDE_MAX).err(), Some(Refused::OutOfMemory), "in one piece");
        for id in 1..=RESOURCES_MAX as u32 {
            all.create(id, 1, 1, 1).unwrap();
        }
        assert_eq!(all.create(5000, 1, 1, 1).err(), Some(Refused::OutOfMemory));
        let spans = |count: usize| vec![RamSpan { at: Gpa(0), bytes: 1 }; count];
        for id in 1..=4 {
            assert_eq!(all.check_attach(id, 16384), Ok(16384));
            all.attach(id, spans(16384)).unwrap();
        }
        assert_eq!(all.check_attach(5, 1), Err(Refused::OutOfMemory));
        assert_eq!(all.check_attach(5, 0), Ok(0));
        all.detach(1).unwrap();
        all.remove(2).unwrap();
        assert_eq!(all.check_attach(5, 16384), Ok(16384));
        assert_eq!(all.check_attach(5, 16385), Err(Refused::OutOfMemory));
        assert_eq!(all.check_attach(5, u32::MAX), Err(Refused::OutOfMemory));
        for id in 1..=RESOURCES_MAX as u32 {
            let _ = all.remove(id);
        }
        assert_eq!((all.pixel_bytes, all.entries), (0, 0));
    }

    #[test]
    fn entries_without_bytes_take_no_memory() {
        let mut all = Resources::default();
        all.create(1, 1, 1, 1).unwrap();
        let mut spans = Vec::with_capacity(BACKING_ENTRIES_MAX);
        spans.push(RamSpan { at: Gpa(0), bytes: 4 });
        all.attach(1, spans).unwrap();
        assert!(all.get(1).unwrap().backing.as_ref().unwrap().spans.capacity() < 16);
    }

    #[test]
    fn only_so_much_is_shown_as_the_largest_screen_has() {
        let mut all = Resources::default();
        let made = all.create(1, 1, 8192, 2160).unwrap();
        let part = |width, height| Rect { x: 0, y: 0, width, height };
        for (width, height, expected) in [
            (3840, 2160, Ok(())),
            (8192, 1012, Ok(())),
            (3841, 2160, Err(Refused::OutOfMemory)),
            (8192, 1013, Err(Refused::OutOfMemory)),
            (8193, 1, Err(Refused::Parameter)),
            (0, 1, Err(Refused::Parameter)),
        ] {
            assert_eq!(made.check_shows(part(width, height)), expected, "{width}x{height}");
        }
    }
}
