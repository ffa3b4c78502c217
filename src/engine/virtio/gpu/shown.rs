//! What the screen shows of the card: a copy of what was flushed, and the cursor. The device writes it, the screen reads it line
//! by line; both have the lock for a moment only.

use std::sync::Arc;

use super::{
    Shared,
    protocol::Rect,
    resources::{Resource, SIDE_MAX},
};

/// The cursor's sides, in pixels (virtio 1.2, 5.7.6.10).
pub(super) const CURSOR_SIDE: u32 = 64;
pub(super) const CURSOR_PIXELS: usize = (CURSOR_SIDE * CURSOR_SIDE) as usize;

/// Rows of the picture, one bit each.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Rows([u64; SIDE_MAX as usize / 64]);

impl Rows {
    pub(super) const NONE: Rows = Rows([0; SIDE_MAX as usize / 64]);
    const ALL: Rows = Rows([u64::MAX; SIDE_MAX as usize / 64]);

    pub(crate) fn any(&self) -> bool {
        self.0.iter().any(|word| *word != 0)
    }

    pub(crate) fn has(&self, y: usize) -> bool {
        self.0.get(y / 64).is_some_and(|word| word >> (y % 64) & 1 != 0)
    }

    fn mark(&mut self, rows: std::ops::Range<u32>) {
        for y in rows {
            if let Some(word) = self.0.get_mut(y as usize / 64) {
                *word |= 1 << (y % 64);
            }
        }
    }
}

/// What is behind the lock.
pub(super) struct Shown {
    /// Another one, and the screen draws everything anew.
    serial: u64,
    /// None until the driver shows something: the VGA is shown. Black while it then shows nothing.
    picture: Option<Picture>,
    cursor: Option<Cursor>,
    /// Changed since the screen last looked.
    dirty: Rows,
}

struct Picture {
    width: u32,
    height: u32,
    /// 0x00RRGGBB.
    pixels: Vec<u32>,
}

pub(super) struct Cursor {
    /// Of its upper left corner on the screen. Linux has it left of the screen, or above, where the hot spot is near an edge.
    pub(super) x: i32,
    pub(super) y: i32,
    /// 0xAARRGGBB, row by row, the colours already multiplied by alpha, as Linux and Windows have them.
    pub(super) image: Vec<u32>,
}

impl Shown {
    pub(super) const NOTHING: Shown = Shown { serial: 0, picture: None, cursor: None, dirty: Rows::NONE };

    /// Shows this part of a resource from now on, as it is now.
    pub(super) fn show(&mut self, resource: &Resource, part: Rect) {
        let size = (part.width, part.height);
        if self.size() != Some(size) {
            self.show_black(size);
        }
        self.copy(resource, part, part);
    }

    /// A black picture of this size, in pixels.
    pub(super) fn show_black(&mut self, (width, height): (u32, u32)) {
        self.serial += 1;
        self.picture = Some(Picture { width, height, pixels: vec![0; width as usize * height as usize] });
        self.dirty.mark(0..height);
    }

    /// Of the picture, in pixels.
    pub(super) fn size(&self) -> Option<(u32, u32)> {
        self.picture.as_ref().map(|picture| (picture.width, picture.height))
    }

    /// The driver shows nothing for now: its screen sleeps, or is about to have another mode.
    pub(super) fn blank(&mut self) {
        if let Some(picture) = &mut self.picture {
            picture.pixels.fill(0);
            self.dirty.mark(0..picture.height);
        }
    }

    /// Shows the VGA again.
    pub(super) fn end(&mut self) {
        if self.picture.take().is_some() {
            self.serial += 1;
        }
        self.dirty = Rows::NONE;
    }

    /// Takes a rectangle of the resource over, of which `part` is shown. The rectangle is within the part.
    pub(super) fn copy(&mut self, resource: &Resource, part: Rect, rect: Rect) {
        let Some(picture) = &mut self.picture else { return };
        for y in rect.y..rect.y + rect.height {
            let at = (y - part.y) as usize * picture.width as usize + (rect.x - part.x) as usize;
            let into = picture.pixels.get_mut(at..at + rect.width as usize).unwrap_or_default();
            let (from, _) = resource.row(rect.x, y, rect.width).as_chunks();
            for (pixel, bytes) in into.iter_mut().zip(from) {
                *pixel = resource.format.argb(*bytes) & 0xff_ffff;
            }
        }
        let top = rect.y - part.y;
        self.dirty.mark(top..top + rect.height);
    }

    pub(super) fn cursor(&self) -> Option<&Cursor> {
        self.cursor.as_ref()
    }

    pub(super) fn set_cursor(&mut self, cursor: Option<Cursor>) {
        self.mark_cursor();
        self.cursor = cursor;
        self.mark_cursor();
    }

    pub(super) fn move_cursor(&mut self, x: i32, y: i32) {
        self.mark_cursor();
        if let Some(cursor) = &mut self.cursor {
            (cursor.x, cursor.y) = (x, y);
        }
        self.mark_cursor();
    }

    fn mark_cursor(&mut self) {
        if let Some(cursor) = &self.cursor {
            let end = cursor.y.saturating_add(CURSOR_SIDE as i32).clamp(0, SIDE_MAX as i32);
            self.dirty.mark(cursor.y.clamp(0, end) as u32..end as u32);
        }
    }
}

impl Cursor {
    /// Draws what of it is on line `y`.
    fn draw(&self, y: usize, line: &mut [u32]) {
        let own = i64::try_from(y).unwrap_or(i64::MAX) - i64::from(self.y);
        let row = usize::try_from(own).ok().and_then(|row| self.image.chunks_exact(CURSOR_SIDE as usize).nth(row));
        for (x, over) in (i64::from(self.x)..).zip(row.unwrap_or_default()) {
            if let Some(pixel) = usize::try_from(x).ok().and_then(|x| line.get_mut(x)) {
                *pixel = blend(*over, *pixel);
            }
        }
    }
}

/// A pixel with alpha over one without. Sums stop at white: the driver may not have multiplied.
fn blend(over: u32, under: u32) -> u32 {
    let [alpha, over @ ..] = over.to_be_bytes();
    let [_, under @ ..] = under.to_be_bytes();
    let seen = 255 - u32::from(alpha);
    let [red, green, blue] = std::array::from_fn(|part| {
        let (over, under) = (over.get(part).copied().unwrap_or(0), under.get(part).copied().unwrap_or(0));
        (u32::from(over) + (u32::from(under) * seen + 127) / 255).min(255) as u8
    });
    u32::from_be_bytes([0, red, green, blue])
}

/// One look of the screen at the card.
pub(crate) struct Look {
    shared: Arc<Shared>,
    serial: u64,
    size: (usize, usize),
    dirty: Rows,
}

impl Look {
    /// None while the card shows nothing. `take` forgets what has changed.
    pub(super) fn new(shared: &Arc<Shared>, take: bool) -> Option<Look> {
        let mut shown = shared.shown();
        let picture = shown.picture.as_ref()?;
        let size = (picture.width as usize, picture.height as usize);
        let dirty = if take { std::mem::replace(&mut shown.dirty, Rows::NONE) } else { Rows::ALL };
        Some(Look { shared: Arc::clone(shared), serial: shown.serial, size, dirty })
    }

    /// Of what is shown: with another one everything is drawn anew.
    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }

    pub(crate) fn size(&self) -> (usize, usize) {
        self.size
    }

    pub(crate) fn dirty(&self) -> &Rows {
        &self.dirty
    }

    /// Makes line `y`; `out` is as long as the picture is wide. Black when the card shows something else by now, which the next
    /// look sees.
    pub(crate) fn line(&self, y: usize, out: &mut [u32]) {
        let shown = self.shared.shown();
        let picture = shown.picture.as_ref().filter(|_| shown.serial == self.serial);
        let row = picture.and_then(|picture| picture.pixels.chunks_exact(picture.width as usize).nth(y));
        match row.filter(|row| row.len() == out.len()) {
            Some(row) => out.copy_from_slice(row),
            None => return out.fill(0),
        }
        if let Some(cursor) = &shown.cursor {
            cursor.draw(y, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alpha_is_what_of_the_ground_is_hidden() {
        assert_eq!(blend(0, 0x12_3456), 0x12_3456);
        assert_eq!(blend(0xff12_3456, 0xff_ffff), 0x12_3456);
        assert_eq!(blend(0x8040_2000, 0x00_0000), 0x40_2000);
        assert_eq!(blend(0x8000_0000, 0xff_8000), 0x7f_4000);
        assert_eq!(blend(0x00ff_ffff, 0xff_8001), 0xff_ffff, "not multiplied");
    }

    #[test]
    fn a_cursor_is_cut_at_every_edge() {
        let image = vec![0xff00_0007; CURSOR_PIXELS];
        for (x, y, row, expected) in [
            (0, 0, 0, 0..64),
            (-63, 0, 0, 0..1),
            (-64, 0, 0, 0..0),
            (99, 0, 63, 99..100),
            (100, 0, 0, 0..0),
            (10, -63, 0, 10..74),
            (10, -64, 0, 0..0),
            (10, 5, 4, 0..0),
            (10, 5, 69, 0..0),
            (i32::MIN, i32::MIN, 0, 0..0),
            (i32::MAX, i32::MAX, 8191, 0..0),
            (i32::MAX, 0, 0, 0..0),
        ] {
            let mut line = [0; 100];
            Cursor { x, y, image: image.clone() }.draw(row, &mut line);
            let lit: Vec<usize> = (0..100).filter(|at| line[*at] == 7).collect();
            assert_eq!(lit, expected.collect::<Vec<_>>(), "at {x},{y} on line {row}");
            let mut shown = Shown::NOTHING;
            shown.set_cursor(Some(Cursor { x, y, image: image.clone() }));
            assert_eq!(shown.dirty.has(row), !lit.is_empty() || (y..y.saturating_add(64)).contains(&(row as i32)));
        }
    }
}
