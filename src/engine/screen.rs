//! The screen as viewers see it: a picture that is drawn only while somebody looks, and which parts of it changed when.
//!
//! ```text
//! KVM's dirty log ──┐
//! window writes ────┼─▶ refresh ─▶ picture, tiles with the generation of their last change ◀─ each viewer, with a cursor
//! card's flushes ───┘
//! ```
//! Viewers share no queue: each remembers the generation it has seen. There is no thread either: whichever waiting viewer comes
//! first refreshes for all. Without a viewer, or while none wants anything, nothing runs, and without one there is no picture.
//! A cursor and characters that blink are drawn anew, and nothing else, by a look that comes after their time. They stand still, lit,
//! some time after somebody came or typed: a screen that nobody uses costs nothing.

mod source;

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use self::source::{Content, Sources};
use super::{
    vga::{Blink, Planes, SharedVga},
    virtio::gpu::GpuDisplay,
};

/// Carries out writes to the VGA window that are still on their way from the guest. Called with no device locked.
pub type Settle = Box<dyn Fn() + Send + Sync>;

/// Which pages of video memory were written since the last call, by KVM's account: one bit for 4 KiB, first page first.
/// Empty while video memory is not mapped.
pub type DirtySource = Box<dyn Fn() -> Vec<u64> + Send + Sync>;

/// A part of the picture, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rect {
    pub x: usize,
    pub y: usize,
    pub width: usize,
    pub height: usize,
}

/// The screen of one guest.
pub struct Screen {
    sources: Sources,
    settle: Settle,
    state: Mutex<State>,
    changed: Condvar,
    /// Since then, what blinks has blinked.
    since: Instant,
}

struct State {
    picture: Option<Picture>,
    /// What the picture was made of.
    shown: Option<Content>,
    /// What was read for it, where that helps the next look.
    kept: Option<Planes>,
    /// What was lit in the picture, if anything in it blinks.
    lit: Option<Blink>,
    /// Nothing blinks after that.
    blinks_until: Instant,
    /// Of the picture now or before.
    size: Option<(usize, usize)>,
    /// Rises with each refresh that changed a pixel.
    generation: u64,
    /// Rises with each change of size.
    size_generation: u64,
    viewers: usize,
    refreshed_at: Option<Instant>,
    interval: Duration,
    redraw: bool,
    closed: bool,
}

/// Pixels are 0x00RRGGBB.
struct Picture {
    width: usize,
    height: usize,
    pixels: Vec<u32>,
    /// The generation of the last change, row by row.
    tiles: Vec<u64>,
    tile_columns: usize,
}

/// How much changes at least, as far as viewers can tell.
const TILE_WIDTH: usize = 64;
const TILE_HEIGHT: usize = 16;

/// Between two looks at a screen that changes, and at one that has been at rest for some time.
const INTERVAL: Duration = Duration::from_millis(33);
const INTERVAL_AT_REST: Duration = Duration::from_millis(250);
/// How long something blinks after somebody came or typed, as in terminals.
const BLINKS: Duration = Duration::from_secs(10);

/// What a viewer wants of the wait it is in.
pub enum Next<T> {
    Done(T),
    /// Look for changes and ask again.
    Refresh,
    /// Ask again when another viewer saw a change, or after a [`Screen::wake`].
    Sleep,
}

/// The screen at one moment.
pub struct View<'a> {
    pub generation: u64,
    pub size_generation: u64,
    /// The guest has ended.
    pub closed: bool,
    /// [`Next::Refresh`] would look at once: better done before anything is sent.
    pub due: bool,
    picture: Option<&'a Picture>,
}

impl View<'_> {
    pub fn size(&self) -> (usize, usize) {
        self.picture.map_or((0, 0), |picture| (picture.width, picture.height))
    }

    /// What changed after `generation`; 0 gives all that was ever drawn. The parts do not overlap.
    pub fn changed_since(&self, generation: u64) -> Vec<Rect> {
        self.picture.map(|picture| picture.changed_since(generation)).unwrap_or_default()
    }
}

/// One who looks at the screen. The picture lives as long as anybody does.
pub struct Viewer(Arc<Screen>);

impl Viewer {
    /// Asks `poll` what to do until it is done. `poll` is called with the screen locked, so it must not block.
    pub fn wait<T>(&self, mut poll: impl FnMut(&View<'_>) -> Next<T>) -> T {
        let mut state = self.0.lock();
        loop {
            match poll(&state.view()) {
                Next::Done(value) => return value,
                Next::Sleep => state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Next::Refresh => {
                    let rest = state.until_refresh();
                    if rest.is_zero() {
                        self.0.refresh(&mut state);
                    } else {
                        let waited = self.0.changed.wait_timeout(state, rest);
                        state = waited.unwrap_or_else(PoisonError::into_inner).0;
                    }
                }
            }
        }
    }

    /// The size of the picture, and which size generation that is. Draws the first picture.
    pub fn size(&self) -> (usize, usize, u64) {
        let mut state = self.0.lock();
        if state.picture.is_none() {
            self.0.refresh(&mut state);
        }
        let (width, height) = state.view().size();
        (width, height, state.size_generation)
    }

    /// Fills `out` with the pixels of `rect`, row by row; parts outside the picture are black.
    pub fn copy(&self, rect: Rect, out: &mut Vec<u32>) {
        out.clear();
        let state = self.0.lock();
        for y in rect.y..rect.y + rect.height {
            let row = state.picture.as_ref().and_then(|picture| picture.row(y)).unwrap_or_default();
            let row = row.get(rect.x..).unwrap_or_default();
            let row = row.get(..rect.width).unwrap_or(row);
            out.extend_from_slice(row);
            out.resize(out.len() + rect.width - row.len(), 0);
        }
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.viewers -= 1;
        if state.viewers == 0 {
            state.picture = None;
            state.shown = None;
            state.kept = None;
            state.lit = None;
        }
    }
}

impl Screen {
    /// The screen of a machine with a VGA only.
    pub fn new(vga: SharedVga, settle: Settle, dirty: DirtySource) -> Arc<Screen> {
        Screen::with_gpu(vga, None, settle, dirty)
    }

    /// The screen of a machine that may have a graphics card: it shows that while its driver does.
    pub fn with_gpu(vga: SharedVga, gpu: Option<GpuDisplay>, settle: Settle, dirty: DirtySource) -> Arc<Screen> {
        let vram = vga.lock().unwrap_or_else(PoisonError::into_inner).vram();
        let state = State {
            picture: None,
            shown: None,
            kept: None,
            lit: None,
            blinks_until: Instant::now(),
            size: None,
            generation: 0,
            size_generation: 0,
            viewers: 0,
            refreshed_at: None,
            interval: INTERVAL,
            redraw: false,
            closed: false,
        };
        let sources = Sources { vga, vram, dirty, gpu };
        Arc::new(Screen { sources, settle, state: Mutex::new(state), changed: Condvar::new(), since: Instant::now() })
    }

    pub fn attach(self: &Arc<Screen>) -> Viewer {
        let mut state = self.lock();
        state.viewers += 1;
        state.blinks_until = Instant::now() + BLINKS;
        Viewer(Arc::clone(self))
    }

    /// Has every waiting viewer asked again: a viewer's wish changed.
    pub fn wake(&self) {
        // Taking the lock keeps the call from falling between a viewer's answer and its sleep.
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Looks often for some time: somebody typed.
    pub fn hurry(&self) {
        let mut state = self.lock();
        state.blinks_until = Instant::now() + BLINKS;
        if state.interval > INTERVAL {
            state.interval = INTERVAL;
            self.changed.notify_all();
        }
    }

    /// Draws everything at the next look: writes to video memory may have been missed, as when its BAR moved.
    pub fn redraw(&self) {
        self.lock().redraw = true;
    }

    /// Asks the guest for a screen of this size, in pixels. False when nothing in the machine can take such a wish; otherwise the
    /// guest may follow it later, and viewers see another size then.
    pub fn wish_size(&self, width: u32, height: u32) -> bool {
        self.sources.gpu.as_ref().map(|gpu| gpu.wish(width, height)).is_some()
    }

    /// The guest has ended; waiting viewers are asked again and see it.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// The screen as a PNG, made smaller to `width_max` when it is wider. Needs no viewer and keeps nothing. What blinks is lit.
    ///
    /// Errors: the picture could not be encoded.
    pub fn png(&self, width_max: Option<usize>) -> io::Result<Vec<u8>> {
        let before = self.lock().size;
        (self.settle)();
        let mut source = self.sources.open(self.sources.whole(), before, Blink::LIT, None);
        let (width, height) = source.size();
        let small_width = width_max.unwrap_or(width).clamp(1, width.max(1));
        let small_height = (height * small_width / width.max(1)).max(1);
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, small_width as u32, small_height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_compression(png::Compression::Fast);
        let mut writer = encoder.write_header()?;
        let mut rows = writer.stream_writer()?;
        let mut line = vec![0; width];
        let mut shrink = Shrink::new(width, small_width);
        for small_y in 0..small_height {
            for y in small_y * height / small_height..(small_y + 1) * height / small_height {
                source.line(y, &mut line);
                shrink.add(&line);
            }
            io::Write::write_all(&mut rows, shrink.take())?;
        }
        rows.finish()?;
        writer.finish()?;
        Ok(file)
    }

    /// Brings the picture up to date.
    fn refresh(&self, state: &mut State) {
        let now = Instant::now();
        state.refreshed_at = Some(now);
        (self.settle)();
        // Dirty bits are taken before memory is read: what is written meanwhile is drawn twice, not lost.
        let glance = self.sources.take();
        let (content, written) = (glance.content(), glance.any());
        let same = state.shown.as_ref() == Some(&content) && !state.redraw && state.picture.is_some();
        let lit = if now < state.blinks_until { Blink::at(now - self.since) } else { Blink::LIT };
        let blinked = state.lit.is_some_and(|before| before != lit);
        if same && !written && !blinked {
            state.rest();
            return;
        }
        let kept = state.kept.take().filter(|_| !state.redraw);
        let mut source = self.sources.open(glance, state.size, lit, kept);
        let (width, height) = source.size();
        let next = state.generation + 1;
        let mut changed = false;
        if state.picture.as_ref().is_none_or(|picture| (picture.width, picture.height) != (width, height)) {
            state.picture = Some(Picture::new(width, height, next));
            state.size = Some((width, height));
            state.size_generation += 1;
            changed = true;
        }
        let Some(picture) = &mut state.picture else { return };
        let mut line = vec![0; width];
        let (all, mut blinks) = (changed || !same, false);
        for y in 0..height {
            let line_blinks = source.blinks(y);
            blinks |= line_blinks;
            if all || source.is_dirty(y) || blinked && line_blinks {
                source.line(y, &mut line);
                changed |= picture.take_line(y, &line, next);
            }
        }
        let by_the_guest = !same || written;
        state.kept = source.keep();
        state.shown = Some(content);
        state.lit = blinks.then_some(lit);
        state.redraw = false;
        if changed {
            state.generation = next;
            self.changed.notify_all();
        }
        if changed && by_the_guest {
            state.interval = INTERVAL;
        } else {
            state.rest();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn view(&self) -> View<'_> {
        View {
            generation: self.generation,
            size_generation: self.size_generation,
            closed: self.closed,
            due: self.until_refresh().is_zero(),
            picture: self.picture.as_ref(),
        }
    }

    /// Looks less often: the guest changed nothing.
    fn rest(&mut self) {
        self.interval = (self.interval * 3 / 2).min(INTERVAL_AT_REST);
    }

    fn until_refresh(&self) -> Duration {
        match self.refreshed_at {
            Some(at) if self.picture.is_some() => self.interval.saturating_sub(at.elapsed()),
            _ => Duration::ZERO,
        }
    }
}

impl Picture {
    fn new(width: usize, height: usize, generation: u64) -> Picture {
        let tile_columns = width.div_ceil(TILE_WIDTH);
        Picture {
            width,
            height,
            pixels: vec![0; width * height],
            tiles: vec![generation; tile_columns * height.div_ceil(TILE_HEIGHT)],
            tile_columns,
        }
    }

    fn row(&self, y: usize) -> Option<&[u32]> {
        self.pixels.chunks_exact(self.width).nth(y)
    }

    /// Replaces line `y` where it differs. Returns whether it did.
    fn take_line(&mut self, y: usize, line: &[u32], generation: u64) -> bool {
        let Some(row) = self.pixels.chunks_exact_mut(self.width).nth(y) else { return false };
        let Some(tiles) = self.tiles.chunks_exact_mut(self.tile_columns).nth(y / TILE_HEIGHT) else { return false };
        let mut changed = false;
        for ((old, new), tile) in row.chunks_mut(TILE_WIDTH).zip(line.chunks(TILE_WIDTH)).zip(tiles) {
            if old != new {
                old.copy_from_slice(new);
                *tile = generation;
                changed = true;
            }
        }
        changed
    }

    fn changed_since(&self, generation: u64) -> Vec<Rect> {
        let mut done: Vec<Rect> = Vec::new();
        let mut above: Vec<Rect> = Vec::new();
        for (row, tiles) in self.tiles.chunks_exact(self.tile_columns.max(1)).enumerate() {
            let y = row * TILE_HEIGHT;
            let height = TILE_HEIGHT.min(self.height - y);
            let mut here = Vec::new();
            let mut column = 0;
            for run in tiles.chunk_by(|a, b| (*a > generation) == (*b > generation)) {
                if run.first().is_some_and(|tile| *tile > generation) {
                    let x = column * TILE_WIDTH;
                    let width = (run.len() * TILE_WIDTH).min(self.width - x);
                    here.push(Rect { x, y, width, height });
                }
                column += run.len();
            }
            // A run under one of the same width makes it higher.
            for rect in &mut here {
                if let Some(upper) = above.iter().position(|upper| (upper.x, upper.width) == (rect.x, rect.width)) {
                    let upper = above.swap_remove(upper);
                    *rect = Rect { y: upper.y, height: upper.height + rect.height, ..*rect };
                }
            }
            done.append(&mut above);
            above = here;
        }
        done.append(&mut above);
        done
    }
}

/// Makes lines smaller: each pixel is the mean of those that fall on it.
struct Shrink {
    width: usize,
    /// Red, green, blue and how many, for each pixel of the small line.
    sums: Vec<[u32; 4]>,
    out: Vec<u8>,
}

impl Shrink {
    fn new(width: usize, small_width: usize) -> Shrink {
        Shrink { width: width.max(1), sums: vec![[0; 4]; small_width], out: Vec::new() }
    }

    fn add(&mut self, line: &[u32]) {
        let small_width = self.sums.len();
        for (x, pixel) in line.iter().enumerate() {
            if let Some(sum) = self.sums.get_mut(x * small_width / self.width) {
                let [_, red, green, blue] = pixel.to_be_bytes();
                for (sum, part) in sum.iter_mut().zip([red, green, blue, 1]) {
                    *sum += u32::from(part);
                }
            }
        }
    }

    fn take(&mut self) -> &[u8] {
        self.out.clear();
        for [red, green, blue, count] in &mut self.sums {
            let count = std::mem::take(count).max(1);
            self.out.extend([red, green, blue].map(|sum| (std::mem::take(sum) / count) as u8));
        }
        &self.out
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::engine::{
        bus::{Access, Width},
        pci::PciFunction,
        vga::{self, Vga},
    };

    /// A screen, its video memory as the guest maps it, and how often KVM's log was asked.
    pub(crate) struct Bench {
        pub(crate) vga: SharedVga,
        pub(crate) screen: Arc<Screen>,
        log: Arc<Mutex<Vec<u64>>>,
        looks: Arc<AtomicUsize>,
        /// Writes that are held back: where in the window, and the byte.
        held: Arc<Mutex<Vec<(u64, u8)>>>,
    }

    impl Bench {
        fn new() -> Bench {
            let vga = Vga::new().unwrap();
            let log = Arc::new(Mutex::new(vec![0; 64]));
            let looks = Arc::new(AtomicUsize::new(0));
            let (taken, counted) = (Arc::clone(&log), Arc::clone(&looks));
            let source = move || {
                counted.fetch_add(1, Ordering::Relaxed);
                std::mem::replace(&mut *taken.lock().unwrap(), vec![0; 64])
            };
            let held = Arc::new(Mutex::new(Vec::new()));
            let (settled, window) = (Arc::clone(&held), vga::window(&vga).1);
            let settle = move || {
                for (at, byte) in settled.lock().unwrap().drain(..) {
                    window.lock().unwrap().write(Access::new(at, Width::B1), u64::from(byte)).unwrap();
                }
            };
            let screen = Screen::new(Arc::clone(&vga), Box::new(settle), Box::new(source));
            Bench { vga, screen, log, looks, held }
        }

        pub(crate) fn linear(width: u16, height: u16) -> Bench {
            let bench = Bench::new();
            bench.set_mode(width, height);
            bench
        }

        pub(crate) fn set_mode(&self, width: u16, height: u16) {
            let mut function = vga::pci_function(&self.vga);
            for (index, value) in [(4, 0), (1, width), (2, height), (3, 32), (4, 0x41)] {
                function.bar_write(2, Access::new(0x500 + 2 * index, Width::B2), value.into()).unwrap();
            }
            function.bar_write(2, Access::new(0x400, Width::B1), 0x20).unwrap();
        }

        /// Writes a pixel through BAR0, as KVM would see it.
        pub(crate) fn pixel(&self, stride: usize, x: usize, y: usize, color: u32) {
            let at = 4 * (y * stride + x);
            self.vga.lock().unwrap().vram().write(at, &color.to_le_bytes());
            self.log.lock().unwrap()[at / 4096 / 64] |= 1 << (at / 4096 % 64);
        }
    }

    /// Refreshes once and gives the generation.
    fn look(viewer: &Viewer) -> u64 {
        let mut state = viewer.0.lock();
        viewer.0.refresh(&mut state);
        state.generation
    }

    fn changed(viewer: &Viewer, since: u64) -> Vec<Rect> {
        viewer.wait(|view| Next::Done(view.changed_since(since)))
    }

    #[test]
    fn a_written_pixel_changes_its_tile_only() {
        let bench = Bench::linear(1024, 768);
        let viewer = bench.screen.attach();
        let first = look(&viewer);
        assert_eq!(changed(&viewer, 0), [Rect { x: 0, y: 0, width: 1024, height: 768 }]);
        bench.pixel(1024, 700, 100, 0xff_8040);
        let second = look(&viewer);
        assert_eq!(changed(&viewer, first), [Rect { x: 640, y: 96, width: 64, height: 16 }]);
        assert_eq!(changed(&viewer, second), []);
        let mut pixels = Vec::new();
        viewer.copy(Rect { x: 699, y: 100, width: 3, height: 1 }, &mut pixels);
        assert_eq!(pixels, [0, 0xff_8040, 0]);
    }

    #[test]
    fn writes_that_are_held_back_are_seen_by_a_look_and_by_a_picture() {
        let bench = Bench::linear(640, 480);
        let viewer = bench.screen.attach();
        let corner = [Rect { x: 0, y: 0, width: 64, height: 16 }];
        let first = look(&viewer);
        bench.held.lock().unwrap().push((1, 0x40));
        let second = look(&viewer);
        assert_eq!(changed(&viewer, first), corner);
        assert_eq!(changed(&viewer, second), []);
        bench.held.lock().unwrap().push((2, 0x40));
        bench.screen.png(None).unwrap();
        assert_eq!(*bench.held.lock().unwrap(), []);
        look(&viewer);
        assert_eq!(changed(&viewer, second), corner, "the picture left the damage to the viewer");
    }

    #[test]
    fn a_cursor_blinks_before_whoever_looks_and_stands_still_in_a_picture() {
        let bench = Bench::new();
        bench.vga.lock().unwrap().start_in_text_mode();
        let viewer = bench.screen.attach();
        let start = Instant::now();
        let still = bench.screen.png(None).unwrap();
        let mut seen = look(&viewer);
        for _ in 0..3 {
            let before = seen;
            while seen == before {
                assert!(start.elapsed() < Duration::from_secs(20));
                std::thread::sleep(Duration::from_millis(10));
                seen = look(&viewer);
            }
            assert_eq!(changed(&viewer, before), [Rect { x: 0, y: 0, width: 64, height: 16 }]);
            assert_eq!(bench.screen.png(None).unwrap(), still);
        }
        while bench.screen.lock().interval < INTERVAL_AT_REST {
            assert!(start.elapsed() < Duration::from_secs(20), "blinks count as something that the guest did");
            std::thread::sleep(Duration::from_millis(10));
            look(&viewer);
        }
        let write = |register: u64| {
            let mut function = vga::pci_function(&bench.vga);
            function.bar_write(2, Access::new(0x414, Width::B2), register).unwrap();
        };
        write(0x200a);
        look(&viewer);
        assert_eq!(bench.screen.lock().lit, None, "nothing blinks without a cursor");
    }

    #[test]
    fn what_blinks_stands_still_when_nobody_has_typed_for_some_time() {
        let bench = Bench::new();
        bench.vga.lock().unwrap().start_in_text_mode();
        let viewer = bench.screen.attach();
        assert!(bench.screen.lock().blinks_until > Instant::now() + BLINKS / 2);
        bench.screen.lock().blinks_until = Instant::now();
        let first = look(&viewer);
        let start = Instant::now();
        // The cursor would change three times.
        while start.elapsed() < Duration::from_millis(750) {
            assert_eq!(look(&viewer), first);
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(bench.screen.lock().lit, Some(Blink::LIT));
        bench.screen.hurry();
        while look(&viewer) == first {
            assert!(start.elapsed() < Duration::from_secs(20), "somebody has typed");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn whatever_changes_the_picture_reaches_viewers() {
        let bench = Bench::new();
        bench.vga.lock().unwrap().start_in_text_mode();
        let mut function = vga::pci_function(&bench.vga);
        let window = vga::window(&bench.vga).1;
        let viewer = bench.screen.attach();
        function.bar_write(2, Access::new(0x414, Width::B2), 0x200a).unwrap();
        for (what, at, width, value) in [
            ("text", 0x1_8000, Width::B2, 0x1741),
            ("start address", 0x414, Width::B2, 0x010d),
            ("its way back", 0x414, Width::B2, 0x000d),
            ("line compare", 0x414, Width::B2, 0x0818),
            ("its high bits", 0x414, Width::B2, 0x0007),
            ("its highest bit", 0x414, Width::B2, 0x0f09),
            ("the DAC's index", 0x408, Width::B1, 1),
            ("the DAC", 0x409, Width::B1, 0x3f),
            ("the attribute index", 0x400, Width::B1, 0),
            ("its data", 0x400, Width::B1, 0),
            ("screen on", 0x400, Width::B1, 0x20),
            ("screen off", 0x404, Width::B2, 0x2001),
        ] {
            let before = look(&viewer);
            if at >= 0x1_0000 {
                window.lock().unwrap().write(Access::new(at, width), value).unwrap();
            } else {
                function.bar_write(2, Access::new(at, width), value).unwrap();
            }
            let changes = !matches!(what, "the DAC's index" | "its data" | "its high bits" | "line compare");
            assert_eq!(look(&viewer) > before, changes, "{what}");
        }
    }

    #[test]
    fn a_page_written_with_the_same_content_changes_nothing() {
        let bench = Bench::linear(800, 600);
        let viewer = bench.screen.attach();
        let first = look(&viewer);
        bench.pixel(800, 5, 5, 0);
        assert_eq!(look(&viewer), first);
    }

    #[test]
    fn neighbours_become_one_rectangle_and_edges_are_cut() {
        let bench = Bench::linear(800, 600);
        let viewer = bench.screen.attach();
        let first = look(&viewer);
        for (x, y) in [(730, 599), (799, 599), (730, 580), (799, 580), (730, 570), (799, 570), (3, 3)] {
            bench.pixel(800, x, y, 1);
        }
        look(&viewer);
        assert_eq!(
            changed(&viewer, first),
            [Rect { x: 0, y: 0, width: 64, height: 16 }, Rect { x: 704, y: 560, width: 96, height: 40 }]
        );
    }

    #[test]
    fn a_mode_change_is_a_new_size_and_a_whole_picture() {
        let bench = Bench::linear(800, 600);
        let viewer = bench.screen.attach();
        let (_, _, size) = viewer.size();
        let first = viewer.wait(|view| Next::Done(view.generation));
        bench.set_mode(640, 480);
        look(&viewer);
        assert_eq!(viewer.size(), (640, 480, size + 1));
        assert_eq!(changed(&viewer, first), [Rect { x: 0, y: 0, width: 640, height: 480 }]);
    }

    #[test]
    fn without_a_viewer_there_is_no_picture_and_without_a_wish_no_look() {
        let bench = Bench::linear(640, 480);
        assert!(bench.screen.lock().picture.is_none());
        let viewer = bench.screen.attach();
        viewer.size();
        let looks = bench.looks.load(Ordering::Relaxed);
        let sleeper = bench.screen.attach();
        let sleeping =
            std::thread::spawn(move || sleeper.wait(|view| if view.closed { Next::Done(()) } else { Next::Sleep }));
        bench.pixel(640, 0, 0, 7);
        std::thread::sleep(Duration::from_millis(150));
        assert_eq!(bench.looks.load(Ordering::Relaxed), looks);
        bench.screen.close();
        sleeping.join().unwrap();
        drop(viewer);
        assert!(bench.screen.lock().picture.is_none());
    }

    #[test]
    fn several_waiting_viewers_cost_one_look_and_a_screen_at_rest_few() {
        let bench = Bench::linear(640, 480);
        let viewers: Vec<_> = (0..4).map(|_| bench.screen.attach()).collect();
        viewers[0].size();
        let start = Instant::now();
        let waiting: Vec<_> = viewers
            .into_iter()
            .map(|viewer| {
                std::thread::spawn(move || viewer.wait(|view| if view.closed { Next::Done(()) } else { Next::Refresh }))
            })
            .collect();
        std::thread::sleep(Duration::from_millis(500));
        let looks = bench.looks.load(Ordering::Relaxed);
        let most = start.elapsed().as_millis() as usize / 33 + 2;
        assert!((2..=most).contains(&looks), "{looks} looks");
        assert!(bench.screen.lock().interval > INTERVAL);
        bench.screen.close();
        waiting.into_iter().for_each(|viewer| viewer.join().unwrap());
    }

    #[test]
    fn a_picture_of_the_screen_can_be_had_in_any_width() {
        let bench = Bench::linear(640, 480);
        for y in 0..240 {
            for x in 0..640 {
                bench.pixel(640, x, y, 0x20_4060);
            }
        }
        for (width, expected) in [(None, (640, 480)), (Some(160), (160, 120)), (Some(9000), (640, 480))] {
            let file = bench.screen.png(width).unwrap();
            let mut reader = png::Decoder::new(io::Cursor::new(file)).read_info().unwrap();
            let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
            let info = reader.next_frame(&mut pixels).unwrap();
            assert_eq!((info.width, info.height), expected);
            assert_eq!(pixels[..3], [0x20, 0x40, 0x60]);
            assert_eq!(pixels[pixels.len() - 3..], [0, 0, 0]);
        }
        assert_eq!(bench.looks.load(Ordering::Relaxed), 0);
    }
}
