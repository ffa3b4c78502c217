//! Drives the device as a BIOS, a kernel or a driver would, and looks at the lines it draws.

use super::*;

mod hostile;
mod modes;
mod pictures;
mod restored;

fn device() -> (SharedVga, impl Fn(u16, Width, u64)) {
    let vga = Vga::new().unwrap();
    let doors = ports(&vga);
    let write = move |port: u16, width: Width, value: u64| {
        let (range, device) = doors.iter().find(|(range, _)| range.contains(&u64::from(port))).unwrap();
        device.lock().unwrap().write(Access::new(u64::from(port) - range.start, width), value).unwrap();
    };
    (vga, write)
}

fn read_port(vga: &SharedVga, port: u16) -> u8 {
    let doors = ports(vga);
    let (range, device) = doors.iter().find(|(range, _)| range.contains(&u64::from(port))).unwrap();
    device.lock().unwrap().read(Access::new(u64::from(port) - range.start, Width::B1)).unwrap() as u8
}

fn write_window(vga: &SharedVga, address: u64, bytes: &[u8]) {
    let (range, device) = window(vga);
    for (index, byte) in bytes.iter().enumerate() {
        let at = Access::new(address - range.start + index as u64, Width::B1);
        device.lock().unwrap().write(at, u64::from(*byte)).unwrap();
    }
}

fn read_window(vga: &SharedVga, address: u64) -> u8 {
    let (range, device) = window(vga);
    device.lock().unwrap().read(Access::new(address - range.start, Width::B1)).unwrap() as u8
}

fn lines(vga: &SharedVga) -> (usize, usize, Vec<Vec<u32>>) {
    let (registers, vram) = {
        let vga = lock(vga);
        (vga.registers(), vga.vram())
    };
    let mut scan = ScanOut::new(&registers, vram, None, Blink::LIT);
    let (width, height) = scan.size();
    let mut all = vec![vec![0; width]; height];
    for (y, line) in all.iter_mut().enumerate() {
        scan.line(y, line);
    }
    (width, height, all)
}

/// What stands at a character cell of 9 by 16, as rows of dots.
fn cell(lines: &[Vec<u32>], column: usize, row: usize, ink: u32) -> Vec<String> {
    (0..16)
        .map(|y| (0..9).map(|x| if lines[row * 16 + y][column * 9 + x] == ink { '#' } else { '.' }).collect())
        .collect()
}

/// Sets mode 3 the way SeaVGABIOS does: palette, attributes, then index and data in one word.
fn set_mode_3(write: &impl Fn(u16, Width, u64)) {
    write(0x3c2, Width::B1, 0x67);
    write(0x3c6, Width::B1, 0xff);
    for index in 0..64u64 {
        write(0x3c8, Width::B1, index);
        for bit in [2, 1, 0] {
            write(0x3c9, Width::B1, 0x2a * (index >> bit & 1) + 0x15 * (index >> (bit + 3) & 1));
        }
    }
    let attribute = [0, 1, 2, 3, 4, 5, 0x14, 7, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e, 0x3f, 0x0c, 0, 0x0f, 8, 0];
    for (index, value) in attribute.into_iter().enumerate() {
        write(0x3c0, Width::B1, index as u64);
        write(0x3c0, Width::B1, value);
    }
    for word in [0x0300, 0x0001, 0x0302, 0x0003, 0x0204] {
        write(0x3c4, Width::B2, word);
    }
    for word in [0, 1, 2, 3, 4, 0x1005, 0x0e06, 0x0f07, 0xff08] {
        write(0x3ce, Width::B2, word);
    }
    write(0x3d4, Width::B2, 0x0011);
    let crtc = [
        0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0, 0x4f, 0x0d, 0x0e, 0, 0, 0, 0, 0x9c, 0x8e, 0x8f, 0x28, 0x1f,
        0x96, 0xb9, 0xa3, 0xff,
    ];
    for (index, value) in crtc.into_iter().enumerate() {
        write(0x3d4, Width::B2, value << 8 | index as u64);
    }
    write(0x3c0, Width::B1, 0x20);
}

/// Opens plane 2 at 0xa0000 for a font, and closes it again.
fn open_font(write: &impl Fn(u16, Width, u64), open: bool) {
    let (sequencer, graphics) = if open {
        ([0x0100, 0x0402, 0x0704, 0x0300], [0x0204, 0x0005, 0x0406])
    } else {
        ([0x0100, 0x0302, 0x0304, 0x0300], [0x0004, 0x1005, 0x0e06])
    };
    sequencer.into_iter().for_each(|word| write(0x3c4, Width::B2, word));
    graphics.into_iter().for_each(|word| write(0x3ce, Width::B2, word));
}

#[test]
fn a_bios_sets_mode_3_loads_a_font_and_its_text_appears() {
    let (vga, write) = device();
    assert_eq!(lines(&vga).2[100][100], 0, "blank before");
    set_mode_3(&write);
    open_font(&write, true);
    let glyph = [0x18, 0x24, 0x42, 0x42, 0x7e, 0x42, 0x42, 0x81];
    write_window(&vga, 0xa_0000 + 32 * u64::from(b'A'), &glyph);
    open_font(&write, false);
    write_window(&vga, 0xb_8000 + 2 * (80 * 3 + 5), &[b'A', 0x1e]);
    let (width, height, lines) = lines(&vga);
    assert_eq!((width, height), (720, 400));
    assert_eq!(lines[48][5 * 9], 0x00_00aa, "blue behind");
    let seen = cell(&lines, 5, 3, 0xff_ff55);
    let expected =
        ["...##....", "..#..#...", ".#....#..", ".#....#..", ".######..", ".#....#..", ".#....#..", "#......#."];
    assert_eq!(seen[..8], expected);
    assert!(seen[8..].iter().all(|row| row == "........."));
    assert_eq!(read_window(&vga, 0xb_8000 + 2 * (80 * 3 + 5) + 1), 0x1e);
}

#[test]
fn the_text_screen_for_guests_without_a_bios_can_be_read() {
    let vga = Vga::new().unwrap();
    lock(&vga).start_in_text_mode();
    write_window(&vga, 0xb_8000, b"H\x07i\x0a\xcd\x0f");
    let (width, height, lines) = lines(&vga);
    assert_eq!((width / 9, height / usize::from(TEXT_SCREEN.font_height)), (80, 25));
    let h = cell(&lines, 0, 0, 0xaa_aaaa);
    assert_eq!(h[2], "##...##..");
    assert_eq!(h[6], "#######..");
    assert_eq!(cell(&lines, 1, 0, 0x55_ff55)[2], "..##.....");
    assert_eq!(cell(&lines, 2, 0, 0xff_ffff)[6], "#########", "a frame reaches into the ninth column");
    assert_eq!(cell(&lines, 2, 0, 0xff_ffff)[7], ".........");
}

#[test]
fn every_printable_letter_has_a_shape_of_its_own() {
    let glyphs = font::glyphs();
    let letters: Vec<&[u8]> = (0x21..0x7f).map(|at| &glyphs[at * 16..at * 16 + 16]).collect();
    for (index, letter) in letters.iter().enumerate() {
        assert!(letter.iter().any(|row| *row != 0), "{index} is empty");
        assert!(!letters[..index].contains(letter), "{index} is there twice");
    }
}

#[test]
fn the_cursor_fills_its_rows_and_can_be_hidden() {
    let (vga, write) = device();
    set_mode_3(&write);
    write_window(&vga, 0xb_8000 + 2 * 81, b" \x07");
    write(0x3d4, Width::B2, 0x510f);
    let dots = |lines: &[Vec<u32>]| cell(lines, 1, 1, 0xaa_aaaa).iter().filter(|row| row.contains('#')).count();
    assert_eq!(dots(&lines(&vga).2), 2);
    assert_eq!(cell(&lines(&vga).2, 1, 1, 0xaa_aaaa)[13], "#########");
    write(0x3d4, Width::B2, 0x2d0a);
    assert_eq!(dots(&lines(&vga).2), 0);
}

#[test]
fn two_fonts_give_512_characters_and_blink_becomes_brightness() {
    let (vga, write) = device();
    set_mode_3(&write);
    open_font(&write, true);
    write_window(&vga, 0xa_0000 + 32, &[0xf0]);
    write_window(&vga, 0xa_4000 + 32, &[0x0f]);
    open_font(&write, false);
    write(0x3c4, Width::B2, 0x0403); // attribute bit 3 chooses the font at 16 KiB
    write_window(&vga, 0xb_8000, &[1, 0x07, 1, 0x0f]);
    write_window(&vga, 0xb_8000 + 160, &[0, 0xf0]);
    let seen = lines(&vga).2;
    assert_eq!(cell(&seen, 0, 0, 0xaa_aaaa)[0], "####.....");
    assert_eq!(cell(&seen, 1, 0, 0xff_ffff)[0], "....####.");
    assert_eq!(seen[16][0], 0xaa_aaaa, "blinking, shown steadily");
    read_port(&vga, 0x3da);
    for value in [0x10, 0x04, 0x20] {
        write(0x3c0, Width::B1, value);
    }
    assert_eq!(lines(&vga).2[16][0], 0xff_ffff);
}

#[test]
fn start_address_and_line_compare_scroll() {
    let (vga, write) = device();
    set_mode_3(&write);
    write_window(&vga, 0xb_8000, &[b' ', 0x10]);
    write_window(&vga, 0xb_8000 + 160, &[b' ', 0x20]);
    assert_eq!(lines(&vga).2[0][0], 0x00_00aa);
    write(0x3d4, Width::B2, 0x500d);
    assert_eq!(lines(&vga).2[0][0], 0x00_aa00);
    for word in [0x9f18, 0x0f07, 0x0f09] {
        write(0x3d4, Width::B2, word);
    }
    let seen = lines(&vga).2;
    assert_eq!((seen[159][0], seen[160][0]), (0, 0x00_00aa), "line 160 starts again at address 0");
}

#[test]
fn forty_columns_are_drawn_twice_as_wide() {
    let (vga, write) = device();
    set_mode_3(&write);
    write(0x3c4, Width::B2, 0x0901);
    for word in [0x0011, 0x2701, 0x1413] {
        write(0x3d4, Width::B2, word);
    }
    write_window(&vga, 0xb_8000 + 80, &[b' ', 0x10]);
    let (width, _, seen) = lines(&vga);
    assert_eq!(width, 640);
    assert_eq!((seen[16][15], seen[16][16]), (0x00_00aa, 0));
}

#[test]
fn the_write_modes_rotate_combine_mask_and_latch() {
    let (vga, write) = device();
    set_mode_3(&write);
    for word in [0x0f02, 0x0604] {
        write(0x3c4, Width::B2, word);
    }
    for word in [0x0005, 0x0506] {
        write(0x3ce, Width::B2, word);
    }
    let planes = |address: u64| {
        let mut bytes = [0; 4];
        lock(&vga).vram.read(4 * (address - 0xa_0000) as usize, &mut bytes);
        bytes
    };
    write_window(&vga, 0xa_0010, &[0x81]);
    assert_eq!(planes(0xa_0010), [0x81; 4]);
    write(0x3ce, Width::B2, 0x0103); // rotate by one
    write_window(&vga, 0xa_0011, &[0x81]);
    assert_eq!(planes(0xa_0011), [0xc0; 4]);
    write(0x3ce, Width::B2, 0x1803); // xor with the latches
    assert_eq!(read_window(&vga, 0xa_0010), 0x81);
    write_window(&vga, 0xa_0012, &[0xff]);
    assert_eq!(planes(0xa_0012), [0x7e; 4]);
    write(0x3ce, Width::B2, 0x0003);
    write(0x3ce, Width::B2, 0x0a00); // set/reset: planes 1 and 3
    write(0x3ce, Width::B2, 0x0e01); // for planes 1 to 3
    write(0x3ce, Width::B2, 0x0f08); // low half of the bits; the others from the latches
    write_window(&vga, 0xa_0013, &[0xf3]);
    assert_eq!(planes(0xa_0013), [0x83, 0x8f, 0x80, 0x8f]);
    write(0x3ce, Width::B2, 0x0001);
    write(0x3ce, Width::B2, 0x0105); // write mode 1: the latches
    write_window(&vga, 0xa_0014, &[0]);
    assert_eq!(planes(0xa_0014), [0x81; 4]);
    write(0x3ce, Width::B2, 0x0205); // write mode 2: a colour
    write_window(&vga, 0xa_0015, &[0x6]);
    assert_eq!(planes(0xa_0015), [0x80, 0x8f, 0x8f, 0x80]);
    write(0x3ce, Width::B2, 0x0305); // write mode 3: the byte is a mask for set/reset
    write(0x3ce, Width::B2, 0xff08);
    write_window(&vga, 0xa_0016, &[0x30]);
    assert_eq!(planes(0xa_0016), [0x81, 0xb1, 0x81, 0xb1]);
    write(0x3c4, Width::B2, 0x0102); // only plane 0
    write(0x3ce, Width::B2, 0x0005);
    write(0x3ce, Width::B2, 0x0000);
    write_window(&vga, 0xa_0016, &[0]);
    assert_eq!(planes(0xa_0016), [0x00, 0xb1, 0x81, 0xb1]);
    for word in [0x0805, 0x0a02, 0x0f07] {
        write(0x3ce, Width::B2, word); // read mode 1: where is colour 10?
    }
    assert_eq!(read_window(&vga, 0xa_0016), 0x30);
}

#[test]
fn mode_13h_and_mode_12h_are_drawn() {
    let (vga, write) = device();
    set_mode_3(&write);
    for word in [0x0f02, 0x0e04] {
        write(0x3c4, Width::B2, word);
    }
    for word in [0x4005, 0x0506] {
        write(0x3ce, Width::B2, word);
    }
    for word in [0x4109, 0x2813, 0x4014] {
        write(0x3d4, Width::B2, word);
    }
    write_window(&vga, 0xa_0000 + 320 * 7 + 9, &[0x3f]);
    let (width, height, seen) = lines(&vga);
    assert_eq!((width, height), (640, 400));
    assert_eq!((seen[14][17], seen[14][18], seen[15][19], seen[16][18]), (0, 0xff_ffff, 0xff_ffff, 0));

    write(0x3c4, Width::B2, 0x0604);
    for word in [0x0005, 0x0506] {
        write(0x3ce, Width::B2, word);
    }
    for word in [0x0011, 0xdf12, 0x3e07, 0x4009, 0x0014, 0xe317] {
        write(0x3d4, Width::B2, word);
    }
    write(0x3c4, Width::B2, 0x0402);
    write_window(&vga, 0xa_0000 + 80 * 30 + 2, &[0x40]);
    let (width, height, seen) = lines(&vga);
    assert_eq!((width, height), (640, 480));
    assert_eq!((seen[30][16], seen[30][17], seen[31][17]), (0, 0xaa_0000, 0));
}

#[test]
fn the_display_interface_sets_every_depth() {
    for (bits, bytes, color) in [
        (8u16, vec![4], 0xaa_0000),
        (15, vec![0x00, 0x7c], 0xff_0000),
        (16, vec![0xe0, 0x07], 0x00_ff00),
        (24, vec![1, 2, 3], 0x03_0201),
        (32, vec![1, 2, 3, 4], 0x03_0201),
    ] {
        let (vga, write) = device();
        set_mode_3(&write);
        for (index, value) in [(4, 0), (1, 800), (2, 600), (3, bits), (4, 0x41), (6, 1000), (8, 3), (9, 2)] {
            write(0x1ce, Width::B2, index);
            write(0x1cf, Width::B2, value.into());
        }
        lock(&vga).vram.write((2 * 1000 + 3) * bytes.len(), &bytes);
        let (width, height, seen) = lines(&vga);
        assert_eq!((width, height), (800, 600), "{bits} bits");
        assert_eq!((seen[0][0], seen[0][1], seen[1][0]), (color, 0, 0), "{bits} bits");
    }
}

#[test]
fn the_uefi_driver_sets_a_mode_through_bar2() {
    let (vga, _) = device();
    let mut function = pci_function(&vga);
    let mut dispi = |index: u64, value: u64| function.bar_write(2, Access::new(0x500 + 2 * index, Width::B2), value);
    for (index, value) in [(4, 0), (5, 0), (8, 0), (9, 0), (3, 32), (1, 1280), (6, 1280), (2, 800), (7, 800), (4, 0x41)]
    {
        assert_eq!(dispi(index, value), Ok(Effect::None));
    }
    assert_eq!(dispi(2, 1 << 40), Ok(Effect::None));
    assert_eq!(function.bar_write(2, Access::new(0x502, Width::B1), 1), Err(BusFault::BadWidth));
    dispi_is(&mut function, 0, 0xb0c5);
    dispi_is(&mut function, 10, 256);
    function.bar_write(2, Access::new(0x504, Width::B2), 800).unwrap();
    function.bar_write(2, Access::new(0x400, Width::B1), 0x20).unwrap();
    lock(&vga).vram.write(4 * (1280 * 799 + 1279), &[0xff, 0, 0, 0]);
    let (width, height, seen) = lines(&vga);
    assert_eq!((width, height, seen[799][1279]), (1280, 800, 0xff));
    function.reset();
    assert!(!lock(&vga).registers.palette_on);
}

fn dispi_is(function: &mut VgaFunction, index: u64, value: u64) {
    assert_eq!(function.bar_read(2, Access::new(0x500 + 2 * index, Width::B2)), Ok(value), "register {index}");
}

#[test]
fn a_new_mode_clears_its_memory_unless_told_not_to() {
    let (vga, write) = device();
    let set = |enable: u16| {
        for (index, value) in [(4, 0), (1, 640), (2, 480), (3, 32), (4, enable)] {
            write(0x1ce, Width::B2, index);
            write(0x1cf, Width::B2, value.into());
        }
    };
    let at = 4 * 640 * 479;
    lock(&vga).vram.set(at, 9);
    set(0xc1);
    assert_eq!(lock(&vga).vram.get(at), 9);
    lock(&vga).vram.set(4 * 640 * 480, 8);
    set(0x41);
    assert_eq!(lock(&vga).vram.get(at), 0);
    assert_eq!(lock(&vga).vram.get(4 * 640 * 480), 8, "only what the mode shows");
    let dirty = lock(&vga).take_for_screen().1;
    assert!(dirty.touches(at, 1) && !dirty.touches(0, 4096), "untouched pages stay so");
}

#[test]
fn a_linear_mode_is_reached_through_banks_of_the_window() {
    let (vga, write) = device();
    for (index, value) in [(1, 640), (2, 480), (3, 8), (4, 0x01), (5, 3)] {
        write(0x1ce, Width::B2, index);
        write(0x1cf, Width::B2, value);
    }
    write_window(&vga, 0xa_1234, &[0x77]);
    assert_eq!(lock(&vga).vram.get(0x3_1234), 0x77);
    assert_eq!(read_window(&vga, 0xa_1234), 0x77);
    assert!(lock(&vga).take_for_screen().1.touches(0x3_1000, 1));
    write(0x1cf, Width::B2, 0xffff);
    write_window(&vga, 0xa_1234, &[0x77]);
    assert_eq!(read_window(&vga, 0xa_1234), 0, "past the end");
}

#[test]
fn ports_behave_where_programs_look() {
    let (vga, write) = device();
    set_mode_3(&write);
    assert_eq!(read_port(&vga, 0x3b5), 0xff, "monochrome ports are off");
    for bit in [0x01, 0x08] {
        let start = std::time::Instant::now();
        for on in [true, false, true] {
            while (read_port(&vga, 0x3da) & bit != 0) != on {
                assert!(start.elapsed().as_secs() < 2, "bit {bit:#x} of input status 1 comes and goes");
            }
        }
    }
    assert_eq!(read_port(&vga, 0x3cc), 0x67);
    write(0x3d4, Width::B2, 0x8e11);
    write(0x3d4, Width::B2, 0x1200);
    write(0x3d4, Width::B1, 0);
    assert_eq!(read_port(&vga, 0x3d5), 0x5f, "protected");
    write(0x3c7, Width::B1, 63);
    assert_eq!([0; 3].map(|_| read_port(&vga, 0x3c9)), [0x3f; 3]);
    read_port(&vga, 0x3da);
    write(0x3c0, Width::B1, 0x06);
    assert_eq!(read_port(&vga, 0x3c1), 0x14);
    assert_eq!(lines(&vga).2[0][0], 0, "blank while the palette is open");
    write(0x3c2, Width::B1, 0x66);
    assert_eq!(read_port(&vga, 0x3b5), 0x5f);
}

#[test]
fn dirty_pages_know_their_pages_and_no_others() {
    let mut dirty = DirtyPages::NONE;
    dirty.mark(VRAM_BYTES - 1, 100);
    dirty.mark(4095, 2);
    dirty.merge(&[1 << 5]);
    dirty.merge(&[0; 100]);
    assert!(dirty.touches(VRAM_BYTES - 1, 1) && dirty.touches(0, 1) && dirty.touches(4096, 1));
    assert!(dirty.touches(5 * 4096, 4096) && !dirty.touches(2 * 4096, 3 * 4096));
    assert!(!dirty.touches(0, 0));
}
