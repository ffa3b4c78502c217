//! What a guest can do to the card with any access at all: no panic, no screen without bounds, no line that takes for ever, and no
//! change that the damage does not tell.

use std::time::{Duration, Instant};

use super::{modes::*, *};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
    fn width(&mut self) -> Width {
        [Width::B1, Width::B2, Width::B4, Width::B8][self.below(4) as usize]
    }
}

/// What drawing may take, with a debug build on a busy machine.
const PATIENCE: Duration = Duration::from_secs(5);
/// The largest screens have four million dots: some lines of them do.
const SOME: usize = 7;

/// Draws every `step`th line and checks the bounds of the screen.
fn draw(scan: &mut ScanOut, step: usize) -> Vec<Vec<u32>> {
    let (width, height) = scan.size();
    assert!((1..=2560).contains(&width) && (1..=1600).contains(&height), "{width} by {height}");
    let mut lines = vec![vec![0; width]; height];
    for (y, line) in lines.iter_mut().enumerate().step_by(step) {
        scan.line(y, line);
        scan.blinks(y);
    }
    lines
}

#[test]
fn any_value_in_any_register_of_any_mode_draws_in_bounds_and_in_time() {
    for mode in &MODES {
        let card = Card::new(mode);
        // Each register with all ones and all zeroes, one after the other, so that combinations arise.
        for value in [0xff, 0x00, 0xff, 0x5a] {
            for (port, count) in [(0x3c4, 8u8), (0x3ce, 16), (0x3d4, 32)] {
                for index in 0..count {
                    card.index(port, index, value);
                }
                let start = Instant::now();
                draw(&mut card.scan(Blink::LIT), SOME);
                assert!(start.elapsed() < PATIENCE);
            }
            (0..=0x1f).for_each(|index| card.attribute(index, value));
            draw(&mut card.scan(Blink::at(Duration::from_secs(1))), SOME);
        }
    }
}

#[test]
fn bursts_of_random_accesses_draw_in_bounds_and_in_time() {
    for seed in 1..=40u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let card = Card::new(&MODES[random.below(MODES.len() as u64) as usize]);
        let mut function = pci_function(&card.vga);
        let doors: Vec<_> = ports(&card.vga).into_iter().chain([window(&card.vga)]).collect();
        let start = Instant::now();
        for _ in 0..400 {
            let width = random.width();
            match random.below(8) {
                0 => {
                    let at = Access::new(random.below(0x1000), width);
                    let _ = function.bar_write(2, at, random.next());
                    let _ = function.bar_read(2, at);
                }
                1 => {
                    let at = Access::new(random.below(VRAM_BYTES as u64), width);
                    let _ = function.bar_write(0, at, random.next());
                    let _ = function.bar_read(0, at);
                }
                2 => card.index(
                    [0x3c4, 0x3ce, 0x3d4][random.below(3) as usize],
                    random.below(26) as u8,
                    random.next() as u8,
                ),
                3 => card.attribute(random.below(0x20) as u8, random.next() as u8),
                // Clearing a new mode is the guest's own time, but not this test's.
                4 if random.below(8) == 0 => card.dispi(random.below(12) as u16, random.next() as u16 | 0x80),
                _ => {
                    let (range, device) = &doors[random.below(4) as usize];
                    let at = Access::new(random.below(range.end - range.start), width);
                    let _ = device.lock().unwrap().write(at, random.next());
                    let _ = device.lock().unwrap().read(at);
                }
            }
        }
        card.attribute(0, 0);
        draw(&mut card.scan(Blink::LIT), SOME);
        assert!(start.elapsed() < PATIENCE, "seed {seed}: {:?}", start.elapsed());
    }
}

#[test]
fn every_line_that_a_write_changes_is_dirty() {
    for seed in 1..=60u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let card = Card::new(&MODES[seed as usize % MODES.len()]);
        // Start, offset, split and row bits anywhere; the size stays, for the sake of time.
        for index in [8, 9, 0xc, 0xd, 0x13, 0x14, 0x17, 0x18] {
            if random.below(2) == 0 {
                card.crtc(index, random.next() as u8);
            }
        }
        if seed % 6 == 0 {
            // Lines of some depth that go past the end of video memory.
            let bits = [4, 8, 15, 16, 24, 32][random.below(6) as usize];
            for (index, value) in [(1, 160), (2, 100), (3, bits), (4, 0xc1), (6, 0x2000), (9, 0xfff0), (5, 0xf0)] {
                card.dispi(index, value);
            }
        }
        lock(&card.vga).take_for_screen();
        let mut scan = card.scan(Blink::LIT);
        let before = draw(&mut scan, 1);
        let mut function = pci_function(&card.vga);
        for _ in 0..4 {
            if seed % 6 == 0 {
                let at = [0, VRAM_BYTES as u64 - 0x4000][random.below(2) as usize] + random.below(0x4000 - 8);
                function.bar_write(0, Access::new(at, random.width()), random.next()).unwrap();
            } else {
                card.access(0xa_0000 + random.below(0x2_0000 - 8), random.width(), random.next());
            }
        }
        let dirty = lock(&card.vga).take_for_screen().1;
        let mut scan = match scan.into_planes() {
            Some(planes) => {
                let vga = lock(&card.vga);
                ScanOut::following(planes, &dirty, &vga.registers(), vga.vram(), None, Blink::LIT)
            }
            None => card.scan(Blink::LIT),
        };
        let after = draw(&mut scan, 1);
        assert!(after == draw(&mut card.scan(Blink::LIT), 1), "seed {seed}: what was kept is what is there");
        for (y, (before, after)) in before.iter().zip(&after).enumerate() {
            assert!(before == after || scan.is_dirty(y, &dirty), "seed {seed}, line {y}");
        }
    }
}

#[test]
fn accesses_at_the_ends_of_the_window_and_past_them_do_no_harm() {
    for mode in &MODES {
        let card = Card::new(mode);
        for map in 0..4 {
            card.graphics(6, mode.graphics[6] & !0xc | map << 2);
            for edge in [0xa_0000, 0xa_fff9, 0xa_ffff, 0xb_0000, 0xb_7fff, 0xb_8000, 0xb_fff9, 0xb_ffff] {
                for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
                    card.access(edge, width, u64::MAX);
                    card.peek(edge);
                }
            }
        }
    }
}
