//! The four planes of VGA modes, as the last look saw them.

use super::{DirtyPages, PAGE_BYTES, window::PLANE_BYTES};
use crate::engine::memory::HostRegion;

/// A copy of the planes, four bytes for an address, and what of it differs from the look before. Kept from look to look, so that
/// only written pages are read again, and a text screen is drawn only where its cells have changed.
pub(crate) struct Planes {
    bytes: Vec<u8>,
    /// A bit for each block of the copy that differs.
    changed: [u64; Planes::BYTES / BLOCK_BYTES / 64],
    /// A byte of plane 2 differs: in text modes, perhaps the shape of a character.
    shapes_changed: bool,
}

/// Sixteen addresses.
const BLOCK_BYTES: usize = 64;

impl Planes {
    pub(super) const BYTES: usize = 4 * PLANE_BYTES;

    /// All of it counts as changed.
    pub(super) fn new(vram: &HostRegion) -> Planes {
        let mut bytes = vec![0; Planes::BYTES];
        vram.read(0, &mut bytes);
        Planes { bytes, changed: [u64::MAX; _], shapes_changed: true }
    }

    /// Looks again. `dirty` are the pages that were written since the last look.
    pub(super) fn update(&mut self, vram: &HostRegion, dirty: &DirtyPages) {
        (self.changed, self.shapes_changed) = ([0; _], false);
        let mut page = [0; PAGE_BYTES];
        for (number, old) in self.bytes.chunks_exact_mut(PAGE_BYTES).enumerate() {
            let at = number * PAGE_BYTES;
            if !dirty.touches(at, PAGE_BYTES) {
                continue;
            }
            vram.read(at, &mut page);
            let blocks = old.chunks_exact_mut(BLOCK_BYTES).zip(page.chunks_exact(BLOCK_BYTES));
            for (block, (old, new)) in (at / BLOCK_BYTES..).zip(blocks) {
                if *old == *new {
                    continue;
                }
                self.shapes_changed |= old.iter().zip(new).skip(2).step_by(4).any(|(old, new)| old != new);
                old.copy_from_slice(new);
                if let Some(word) = self.changed.get_mut(block / 64) {
                    *word |= 1 << (block % 64);
                }
            }
        }
    }

    /// What the planes hold at an address.
    pub(super) fn get(&self, address: usize) -> [u8; 4] {
        let at = 4 * (address % PLANE_BYTES);
        self.bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default()
    }

    /// Whether something near an address differs from the look before.
    pub(super) fn changed(&self, address: usize) -> bool {
        let block = 4 * (address % PLANE_BYTES) / BLOCK_BYTES;
        self.changed.get(block / 64).is_some_and(|word| word >> (block % 64) & 1 != 0)
    }

    pub(super) fn shapes_changed(&self) -> bool {
        self.shapes_changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_look_reads_what_was_written_and_says_where() {
        let vram = HostRegion::new(super::super::VRAM_BYTES).unwrap();
        vram.set(0x3000, 7);
        let mut planes = Planes::new(&vram);
        assert!(planes.changed(0) && planes.changed(0xffff) && planes.shapes_changed());
        assert_eq!(planes.get(0xc00), [7, 0, 0, 0]);
        planes.update(&vram, &DirtyPages::NONE);
        assert!(!(0..0x1_0000).any(|address| planes.changed(address)) && !planes.shapes_changed());

        for at in [0x3001, 0x5000, 0x3_ffff] {
            vram.set(at, 9);
        }
        let mut dirty = DirtyPages::NONE;
        dirty.mark(0x3001, 1);
        dirty.mark(0x3_ffff, 1);
        planes.update(&vram, &dirty);
        let changed: Vec<usize> = (0..0x1_0000).filter(|address| planes.changed(*address)).collect();
        let block = |first| (first..first + 16).collect::<Vec<usize>>();
        assert_eq!(changed, [block(0xc00), block(0xfff0)].concat());
        assert_eq!(planes.get(0xc00), [7, 9, 0, 0]);
        assert_eq!(planes.get(0x1400), [0; 4], "nobody said that it was written");
        assert!(!planes.shapes_changed(), "planes 1 and 3");

        vram.set(0x3006, 1);
        planes.update(&vram, &dirty);
        assert!(planes.shapes_changed() && planes.changed(0xc01) && !planes.changed(0xfff0));
    }
}
