//! Small drawings through registers and window, as boot loaders and old systems make them, compared dot by dot.

use super::{modes::*, *};

const A0000: u64 = 0xa_0000;
const B8000: u64 = 0xb_8000;

/// What a test has drawn, to compare with: palette indexes.
struct Paper {
    width: usize,
    dots: Vec<u8>,
}

impl Paper {
    fn new(width: usize, height: usize) -> Paper {
        Paper { width, dots: vec![0; width * height] }
    }
    fn set(&mut self, x: usize, y: usize, index: u8) {
        self.dots[y * self.width + x] = index;
    }
    fn get(&self, x: usize, y: usize) -> u8 {
        self.dots[y * self.width + x]
    }
}

/// A dot of a planar mode by write mode 2: latches, a mask for its bit, its colour.
fn plot(card: &Card, stride: usize, x: usize, y: usize, index: u8) {
    let at = A0000 + (y * stride + x / 8) as u64;
    card.graphics(8, 0x80 >> (x % 8));
    card.peek(at);
    card.poke(at, index);
}

#[test]
fn mode_12h_is_drawn_on_with_every_write_mode() {
    let card = Card::new(&MODE_12);
    let mut paper = Paper::new(640, 480);
    // A slanted line, dot by dot.
    card.graphics(5, 2);
    for step in 0..300 {
        plot(&card, 80, 100 + step, 20 + step / 2, 6);
        paper.set(100 + step, 20 + step / 2, 6);
    }
    // The same line again by exclusive or, a part of it: gone.
    card.graphics(3, 0x18);
    for step in 100..200 {
        plot(&card, 80, 100 + step, 20 + step / 2, 6);
        paper.set(100 + step, 20 + step / 2, 0);
    }
    card.graphics(3, 0);
    // A filled box, write mode 0 with set/reset: colour 9, whatever the byte is.
    card.graphics(5, 0);
    card.graphics(0, 9);
    card.graphics(1, 0xf);
    card.graphics(8, 0xff);
    for y in 200..240 {
        for byte in 10..20 {
            card.poke(A0000 + y * 80 + byte, 0x55);
            (0..8).for_each(|dot| paper.set(byte as usize * 8 + dot, y as usize, 9));
        }
    }
    // A letter over it by write mode 3: its shape is the mask for set/reset, the box stays around it.
    card.graphics(5, 3);
    card.graphics(0, 12);
    for (row, shape) in [0x18u8, 0x24, 0x42, 0x7e, 0x42, 0x42].into_iter().enumerate() {
        let y = 210 + row;
        card.peek(A0000 + y as u64 * 80 + 12);
        card.poke(A0000 + y as u64 * 80 + 12, shape);
        (0..8).filter(|dot| shape >> (7 - dot) & 1 != 0).for_each(|dot| paper.set(96 + dot, y, 12));
    }
    // The box's upper part moved by write mode 1, four planes at a time.
    card.graphics(5, 1);
    for y in 0..15u64 {
        for byte in 10..20 {
            card.peek(A0000 + (200 + y) * 80 + byte);
            card.poke(A0000 + (300 + y) * 80 + byte + 30, 0);
            for dot in 0..8 {
                let index = paper.get(byte as usize * 8 + dot, 200 + y as usize);
                paper.set((byte as usize + 30) * 8 + dot, 300 + y as usize, index);
            }
        }
    }
    // One plane by the map mask, and a byte that the card turns by three.
    card.graphics(5, 0);
    card.graphics(1, 0);
    card.graphics(3, 3);
    card.sequencer(2, 4);
    card.poke(A0000 + 479 * 80 + 79, 0b1000_0110);
    for (dot, bit) in [1, 1, 0, 1, 0, 0, 0, 0].into_iter().enumerate() {
        paper.set(632 + dot, 479, 4 * bit);
    }
    card.shows((640, 480), |x, y| color(paper.get(x, y)));
    // Colour compare finds the letter's dots among those of the box.
    card.graphics(5, 8);
    card.graphics(2, 12);
    card.graphics(7, 0xf);
    assert_eq!(card.peek(A0000 + 213 * 80 + 12), 0x7e);
    card.graphics(7, 8);
    assert_eq!(card.peek(A0000 + 213 * 80 + 12), 0xff, "plane 3 is all that counts, and both have it");
}

#[test]
fn the_planar_modes_have_their_sizes_and_their_dots() {
    for (mode, size, stride, wide, tall) in [
        (MODE_0D, (640, 400), 40, 2, 2),
        (MODE_0E, (640, 400), 80, 1, 2),
        (MODE_10, (640, 350), 80, 1, 1),
        (MODE_12, (640, 480), 80, 1, 1),
    ] {
        let card = Card::new(&mode);
        let mut paper = Paper::new(size.0 / wide, size.1 / tall);
        card.graphics(5, 2);
        for (x, y, index) in [(0, 0, 15), (7, 1, 1), (8, 2, 2), (size.0 / wide - 1, size.1 / tall - 1, 4), (33, 70, 8)]
        {
            plot(&card, stride, x, y, index);
            paper.set(x, y, index);
        }
        card.shows(size, |x, y| color(paper.get(x / wide, y / tall)));
    }
}

#[test]
fn the_attribute_palette_the_plane_enable_and_the_color_select_choose_among_256_colors() {
    let card = Card::new(&MODE_12);
    card.graphics(5, 2);
    for index in 0..16 {
        plot(&card, 80, usize::from(index), 0, index);
    }
    let first = |card: &Card, wanted: &dyn Fn(u8) -> u8| {
        card.shows((640, 480), |x, y| color(wanted(if y == 0 && x < 16 { x as u8 } else { 0 })));
    };
    first(&card, &|index| index);
    (0..16).for_each(|index| card.attribute(index, 0x3f - index));
    first(&card, &|index| 0x3f - index);
    card.attribute(0x14, 0x0d);
    first(&card, &|index| 0xff - index); // bits 7 and 6
    card.attribute(0x10, 0x81);
    first(&card, &|index| 0xdf - index); // bits 7 to 4
    card.attribute(0x12, 0x05);
    first(&card, &|index| 0xdf - (index & 5));
    card.out(0x3c6, 0x0f);
    first(&card, &|index| 0x0f - (index & 5));
}

#[test]
fn mode_13h_shows_256_colors_of_six_or_eight_bits() {
    let card = Card::new(&MODE_13);
    let at = |x: usize, y: usize| (y * 320 + x) as u64;
    for index in 0..=255u8 {
        let (x, y) = (usize::from(index) % 20 + 300, usize::from(index) / 20 + 187);
        card.poke(A0000 + at(x, y), index);
        assert_eq!(card.peek(A0000 + at(x, y)), index);
    }
    let index = |x: usize, y: usize| {
        let (x, y) = (x / 2, y / 2);
        let number = if x >= 300 && y >= 187 { (y - 187) * 20 + x - 300 } else { 0 };
        u8::try_from(number).unwrap_or(0)
    };
    card.shows((640, 400), |x, y| color(index(x, y)));
    // The mask of the DAC.
    card.out(0x3c6, 0x0f);
    card.shows((640, 400), |x, y| color(index(x, y) & 0x0f));
    card.out(0x3c6, 0xff);
    // Eight bits, switched by the display interface.
    card.dispi(4, 0x20);
    card.out(0x3c8, 255);
    [0xfe, 0x81, 0x03].into_iter().for_each(|part| card.out(0x3c9, part));
    let mut line = vec![0; 640];
    card.scan(Blink::LIT).line(2 * (187 + 255 / 20), &mut line);
    assert_eq!(line[2 * (300 + 255 % 20)], 0xfe_8103);
    // Words and doublewords are bytes in a row.
    card.access(A0000, Width::B4, 0x0403_0201);
    card.access(A0000 + 4, Width::B8, 0x0c0b_0a09_0807_0605);
    assert_eq!((0..12).map(|at| card.peek(A0000 + at)).collect::<Vec<_>>(), (1..=12).collect::<Vec<u8>>());
}

#[test]
fn mode_x_flips_pages_and_pans_over_a_wider_picture() {
    let card = Card::new(&MODE_X);
    // 336 pixels wide, and a second page behind the first.
    card.crtc(0x13, 42);
    let page = 84 * 240;
    let wanted = |page: usize, x: usize, y: usize| (page * 100 + x * 7 + y * 3) as u8;
    for number in 0..2 {
        for plane in 0..4 {
            card.sequencer(2, 1 << plane);
            for y in 0..240 {
                for byte in 0..84 {
                    card.poke(A0000 + (number * page + y * 84 + byte) as u64, wanted(number, 4 * byte + plane, y));
                }
            }
        }
    }
    card.shows((640, 480), |x, y| color(wanted(0, x / 2, y / 2)));
    card.graphics(4, 3);
    assert_eq!(card.peek(A0000 + 1), wanted(0, 7, 0), "read map select");
    // The second page, one pixel on, then five: four by the address, one by the panning.
    card.crtc(0x0c, (page >> 8) as u8);
    card.crtc(0x0d, page as u8);
    card.attribute(0x13, 2);
    card.shows((640, 480), |x, y| color(wanted(1, x / 2 + 1, y / 2)));
    card.crtc(0x0d, page as u8 + 1);
    card.shows((640, 480), |x, y| color(wanted(1, x / 2 + 5, y / 2)));
    // "Byte panning" does the same as the address.
    card.crtc(0x0d, page as u8);
    card.crtc(8, 0x20);
    card.shows((640, 480), |x, y| color(wanted(1, x / 2 + 5, y / 2)));
}

#[test]
fn memory_filled_through_the_latches_is_a_fast_copy_in_mode_x() {
    let card = Card::new(&MODE_X);
    for plane in 0..4u8 {
        card.sequencer(2, 1 << plane);
        card.poke(A0000 + 0xfff0, 0x11 * (plane + 1));
    }
    card.sequencer(2, 0xf);
    card.graphics(5, 0x41);
    card.peek(A0000 + 0xfff0);
    for byte in 0..80 {
        card.poke(A0000 + 5 * 80 + byte, 0);
    }
    card.shows((640, 480), |x, y| color(if y / 2 == 5 { 0x11 * ((x / 2 % 4) as u8 + 1) } else { 0 }));
}

#[test]
fn a_split_screen_keeps_its_lower_part_where_it_is() {
    let card = Card::new(&MODE_12);
    let wanted = |at: usize| (at % 251) as u8;
    card.sequencer(2, 1);
    for at in 0..0x1_0000 {
        card.poke(A0000 + at as u64, wanted(at));
    }
    let dot = |at: usize, x: usize| wanted((at + x / 8) & 0xffff) >> (7 - x % 8) & 1;
    let line_compare = |line: u16| {
        card.crtc(0x18, line as u8);
        card.crtc(7, 0x2e | if line & 0x100 != 0 { 0x10 } else { 0 });
        card.crtc(9, if line & 0x200 != 0 { 0x40 } else { 0 });
    };
    card.crtc(0x0c, 0xa0);
    line_compare(299);
    card.shows((640, 480), |x, y| color(if y < 300 { dot(0xa000 + 80 * y, x) } else { dot(80 * (y - 300), x) }));
    // Panning moves both parts, or only the upper one.
    card.attribute(0x13, 3);
    card.crtc(8, 0x40);
    let upper = |x: usize, y: usize| dot(0xa002 + 80 * y, x + 3);
    card.shows((640, 480), |x, y| color(if y < 300 { upper(x, y) } else { dot(80 * (y - 300) + 2, x + 3) }));
    card.attribute(0x10, 0x21);
    card.shows((640, 480), |x, y| color(if y < 300 { upper(x, y) } else { dot(80 * (y - 300), x) }));
    // Past its end the memory begins again.
    card.crtc(0x0c, 0xff);
    line_compare(0x3ff);
    card.shows((640, 480), |x, y| color(dot(0xff02 + 80 * y, x + 3)));
}

#[test]
fn cga_graphics_take_rows_from_two_halves_of_their_memory() {
    let card = Card::new(&MODE_04);
    let byte = |x: usize, y: usize| (x * 5 + y * 11) as u8;
    for y in 0..200 {
        for x in 0..80 {
            card.poke(B8000 + (y % 2 * 0x2000 + y / 2 * 80 + x) as u64, byte(x, y));
        }
    }
    // What a font left in plane 2 is not enabled.
    lock(&card.vga).vram.set(2, 0xff);
    let pixel = |x: usize, y: usize| byte(x / 4, y) >> (6 - 2 * (x % 4)) & 3;
    card.shows((640, 400), |x, y| color(pixel(x / 2, y / 2)));
    assert_eq!(card.peek(B8000 + 0x2000 + 81), byte(1, 3));

    card.set(&MODE_06);
    for y in 0..200 {
        for x in 0..80 {
            card.poke(B8000 + (y % 2 * 0x2000 + y / 2 * 80 + x) as u64, byte(x, y));
        }
    }
    card.shows((640, 400), |x, y| color(byte(x / 8, y / 2) >> (7 - x % 8) & 1));
}

/// Puts a font of 256 shapes, each of its rows made by `shape`, at a map of plane 2.
fn load_font(card: &Card, map: u64, shape: impl Fn(u8, usize) -> u8) {
    for (port, index, value) in [(0x3c4, 2, 4), (0x3c4, 4, 6), (0x3ce, 5, 0), (0x3ce, 6, 4), (0x3ce, 4, 2)] {
        card.index(port, index, value);
    }
    for character in 0..=255u8 {
        for row in 0..32 {
            card.poke(A0000 + map * 0x2000 + u64::from(character) * 32 + row, shape(character, row as usize));
        }
    }
    for (port, index, value) in [(0x3c4, 2, 3), (0x3c4, 4, 2), (0x3ce, 5, 0x10), (0x3ce, 6, 0xe), (0x3ce, 4, 0)] {
        card.index(port, index, value);
    }
}

/// Fills text memory and hides the cursor.
fn fill_text(card: &Card, cell: impl Fn(usize) -> (u8, u8)) {
    for at in 0..0x4000 {
        let (character, attribute) = cell(at);
        card.access(B8000 + 2 * at as u64, Width::B2, u64::from(attribute) << 8 | u64::from(character));
    }
    card.crtc(0xa, 0x20);
}

fn shape(character: u8, row: usize) -> u8 {
    character.wrapping_mul(29) ^ (row as u8).wrapping_mul(0x35)
}

/// Which of the two colours a dot of nine has.
fn nine_dots(font: impl Fn(u8, usize) -> u8, character: u8, row: usize, dot: usize) -> bool {
    let bits = font(character, row);
    if dot < 8 { bits >> (7 - dot) & 1 != 0 } else { (0xc0..0xe0).contains(&character) && bits & 1 != 0 }
}

#[test]
fn text_has_512_characters_in_two_fonts_and_nine_dots() {
    let card = Card::new(&MODE_03);
    let second = |character: u8, row: usize| !shape(character, row);
    load_font(&card, 0, shape);
    load_font(&card, 3, second);
    let cell = |at: usize| ((at * 3) as u8, (at * 7) as u8);
    fill_text(&card, cell);
    card.sequencer(3, 0b10_0100); // for attribute bit 3 the font at 24 KiB
    card.attribute(0x12, 0x07);
    let wanted = |x: usize, y: usize| {
        let (character, attribute) = cell(y / 16 * 80 + x / 9);
        let font: &dyn Fn(u8, usize) -> u8 = if attribute & 8 != 0 { &second } else { &shape };
        let ink = nine_dots(font, character, y % 16, x % 9);
        color(if ink { attribute & 7 } else { attribute >> 4 & 7 })
    };
    card.shows((720, 400), wanted);
    // Without blinking, bit 7 is brightness, which the plane enable takes away again.
    card.attribute(0x10, 0x04);
    card.shows((720, 400), wanted);
    // Eight dots: the ninth is gone.
    card.sequencer(1, 1);
    card.shows((640, 400), |x, y| wanted(x / 8 * 9 + x % 8, y));
}

#[test]
fn text_scrolls_smoothly_and_has_eight_lines_a_row() {
    let card = Card::new(&MODE_03);
    load_font(&card, 0, shape);
    let cell = |at: usize| ((at * 3) as u8, (at % 7) as u8 + 1);
    fill_text(&card, cell);
    let dot = |rows: usize, x: usize, y: usize| {
        let (character, attribute) = cell(y / rows * 80 + x / 9);
        color(if nine_dots(shape, character, y % rows, x % 9) { attribute } else { 0 })
    };
    // Five lines up, three dots and one character to the left.
    card.crtc(8, 0x20 | 5);
    card.attribute(0x13, 2);
    card.shows((720, 400), |x, y| dot(16, x + 12, y + 5));
    // 50 rows.
    card.crtc(8, 0);
    card.attribute(0x13, 8);
    card.crtc(9, 0x47);
    card.shows((720, 400), |x, y| dot(8, x, y));
    // 28 rows of 14 lines, as programs set them for 400 lines.
    card.crtc(9, 0x4d);
    card.shows((720, 400), |x, y| dot(14, x, y));
    // 200 lines, each twice.
    card.crtc(9, 0xc7);
    card.shows((720, 400), |x, y| dot(8, x, y / 2));
}

#[test]
fn forty_columns_are_twice_as_wide() {
    let card = Card::new(&Mode { sequencer: [0x08, 0x03, 0x00, 0x02], ..MODE_03 });
    card.crtc(0x11, 0);
    card.crtc(1, 0x27);
    card.crtc(0x13, 0x14);
    load_font(&card, 0, shape);
    let cell = |at: usize| (at as u8, 0x1e);
    fill_text(&card, cell);
    card.shows((720, 400), |x, y| {
        let (character, _) = cell(y / 16 * 40 + x / 18);
        color(if nine_dots(shape, character, y % 16, x % 18 / 2) { 14 } else { 1 })
    });
}

#[test]
fn cursor_and_characters_blink_underlines_do_not() {
    let card = Card::new(&MODE_03);
    load_font(&card, 0, |character, _| if character == 1 { 0xf0 } else { 0 });
    fill_text(&card, |at| (u8::from(at < 3), [0x97, 0x17, 0x01][at.min(2)]));
    card.crtc(0xa, 0x0d);
    card.crtc(0xb, 0x2e); // up to row 14, one character to the right
    card.crtc(0xe, 0);
    card.crtc(0xf, 0x0f);
    let moment = |ms: u64| Blink::at(std::time::Duration::from_millis(ms));
    for (lit, cursor, characters) in
        [(moment(0), true, true), (moment(300), false, true), (moment(500), true, false), (moment(800), false, false)]
    {
        card.shows_when(lit, (720, 400), |x, y| {
            let (cell, dot) = (y / 16 * 80 + x / 9, x % 9);
            let under_cursor = cursor && cell == 16 && (13..=14).contains(&(y % 16));
            color(match cell {
                0 if dot < 4 && characters => 7,
                0 | 1 if cell == 0 || dot >= 4 => 1,
                1 => 7,
                2 if dot < 4 => 1,
                16 if under_cursor => 1,
                _ => 0,
            })
        });
    }
    // A cursor whose end is before its start is none.
    card.crtc(0xb, 0x0c);
    card.shows_when(moment(0), (720, 400), |x, y| {
        color(match x / 9 {
            _ if y >= 16 => 0,
            0 | 1 if x % 9 < 4 => 7,
            0 | 1 => 1,
            2 if x % 9 < 4 => 1,
            _ => 0,
        })
    });
    // A monochrome card underlines what is blue elsewhere.
    card.attribute(0x10, 0x0e);
    card.crtc(0x14, 0x0c);
    let mut line = vec![0; 720];
    card.scan(Blink::LIT).line(12, &mut line);
    assert!(line[18..].iter().all(|dot| *dot == color(1)));
    card.scan(Blink::LIT).line(11, &mut line);
    assert_eq!((line[21], line[22]), (color(1), color(0)));
}

#[test]
fn odd_and_even_bytes_reach_their_planes_in_each_window() {
    let card = Card::new(&MODE_03);
    let planes = |address: usize| {
        let mut bytes = [0; 4];
        lock(&card.vga).vram.read(4 * address, &mut bytes);
        bytes
    };
    card.sequencer(2, 0xf);
    card.access(B8000 + 0x10, Width::B2, 0x2211);
    assert_eq!((planes(0x10), planes(0x11)), ([0x11, 0x22, 0x11, 0x22], [0; 4]));
    // A window of 128 KiB: its upper half is at odd addresses.
    card.graphics(6, 0x02);
    card.access(A0000 + 0x1_0010, Width::B2, 0x4433);
    assert_eq!(planes(0x11), [0x33, 0x44, 0x33, 0x44]);
    assert_eq!((card.peek(A0000 + 0x11), card.peek(A0000 + 0x1_0011)), (0x22, 0x44));
    card.graphics(4, 2);
    assert_eq!(card.peek(A0000 + 0x10), 0x11, "read map select chooses planes 2 and 3");
    // The window for monochrome text, and nothing beside it.
    card.graphics(6, 0x0a);
    card.access(0xb_0010, Width::B1, 0x55);
    assert_eq!(planes(0x10)[0], 0x55);
    assert_eq!((card.peek(A0000 + 0x10), card.peek(B8000 + 0x10)), (0xff, 0xff));
    card.poke(B8000 + 0x10, 0x66);
    assert_eq!(planes(0x10)[0], 0x55);
}

#[test]
fn every_depth_of_the_display_interface_is_drawn_through_banks() {
    let (width, height) = (800, 600);
    for (bits, bytes) in [(8, 1), (15, 2), (16, 2), (24, 3), (32, 4)] {
        let card = Card::new(&MODE_13);
        for (index, value) in [(1, width), (2, height), (3, bits), (4, 0x01)] {
            card.dispi(index, value);
        }
        let put = |x: u64, y: u64, pixel: u32| {
            for (index, byte) in pixel.to_le_bytes().into_iter().take(bytes).enumerate() {
                let at = (y * u64::from(width) + x) * bytes as u64 + index as u64;
                card.dispi(5, (at >> 16) as u16);
                card.poke(A0000 + (at & 0xffff), byte);
            }
        };
        let (first, last) = (0x1234_5678u32, 0x0088_99aa);
        put(0, 0, first);
        put(799, 599, last);
        let five = |value: u32| value << 3 & 0xf8 | value >> 2 & 7;
        let six = |value: u32| value << 2 & 0xfc | value >> 4 & 3;
        let shown = |pixel: u32| match bits {
            8 => color(pixel as u8),
            15 => five(pixel >> 10) << 16 | five(pixel >> 5) << 8 | five(pixel),
            16 => five(pixel >> 11) << 16 | six(pixel >> 5) << 8 | five(pixel),
            _ => pixel & 0xff_ffff,
        };
        card.shows((800, 600), |x, y| {
            shown(match (x, y) {
                (0, 0) => first,
                (799, 599) => last,
                _ => 0,
            })
        });
    }
}

#[test]
fn sixteen_colors_of_the_display_interface_are_drawn_in_planes() {
    let card = Card::new(&MODE_12);
    for (index, value) in [(1, 800), (2, 600), (3, 4), (4, 0x01), (6, 1600)] {
        card.dispi(index, value);
    }
    // 200 bytes a line in each plane: the last lines are in the second bank.
    let put = |x: u64, y: u64, index: u8| {
        let at = y * 200 + x / 8;
        card.dispi(5, (at >> 16) as u16);
        plot(&card, 0, (at as usize & 0xffff) * 8 + (x % 8) as usize, 0, index);
    };
    card.graphics(5, 2);
    put(0, 0, 15);
    put(799, 599, 5);
    put(801, 350, 10);
    card.shows((800, 600), |x, y| {
        color(match (x, y) {
            (0, 0) => 15,
            (799, 599) => 5,
            _ => 0,
        })
    });
    card.dispi(8, 8);
    card.dispi(9, 100);
    card.shows((800, 600), |x, y| {
        color(match (x, y) {
            (791, 499) => 5,
            (793, 250) => 10,
            _ => 0,
        })
    });
}

#[test]
fn a_linear_screen_goes_on_at_the_start_of_video_memory() {
    let card = Card::new(&MODE_13);
    for (index, value) in [(1, 1024), (2, 768), (3, 32), (4, 0x41), (9, 4000)] {
        card.dispi(index, value);
    }
    // 4096 lines of 4 KiB fill video memory.
    let vram = lock(&card.vga).vram();
    vram.write(4095 * 4096, &[1, 0, 0, 0]);
    vram.write(0, &[2, 0, 0, 0]);
    card.shows((1024, 768), |x, y| match (x, y) {
        (0, 95) => 1,
        (0, 96) => 2,
        _ => 0,
    });
}

#[test]
fn a_screen_that_is_off_is_black_and_keeps_its_size() {
    let card = Card::new(&MODE_12);
    card.graphics(5, 2);
    plot(&card, 80, 0, 0, 15);
    card.sequencer(1, 0x21);
    card.shows((640, 480), |_, _| 0);
    card.sequencer(1, 0x01);
    card.shows((640, 480), |x, y| color(if (x, y) == (0, 0) { 15 } else { 0 }));
    card.input(0x3da);
    card.out(0x3c0, 0);
    assert_eq!(card.scan(Blink::LIT).size(), (640, 400), "blank, with no size known before");
    let vga = lock(&card.vga);
    let blank = ScanOut::new(&vga.registers(), vga.vram(), Some((640, 480)), Blink::LIT);
    assert_eq!(blank.size(), (640, 480));
}
