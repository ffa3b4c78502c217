//! A restored card goes on where the saved one stopped, and draws all of its screen.

use super::*;
use crate::engine::saved::{
    SaveState,
    testing::{matches_golden, spoil},
};

/// Mode 3 with half a colour written to the DAC, half an attribute, and latches that hold something.
fn busy() -> SharedVga {
    let (vga, write) = device();
    set_mode_3(&write);
    write_window(&vga, 0xb_8000, b"A\x1f");
    write(0x3c8, Width::B1, 7);
    write(0x3c9, Width::B1, 0x11);
    write(0x3c9, Width::B1, 0x22);
    read_port(&vga, 0x3da);
    write(0x3c0, Width::B1, 0x23);
    write(0x1ce, Width::B2, 3);
    write(0x1cf, Width::B2, 32);
    lock(&vga).latches = 0x1234_5678;
    vga
}

/// What the machine does: registers by their state, video memory byte by byte.
fn twin(first: &SharedVga, state: &crate::engine::saved::State) -> SharedVga {
    let (second, _) = device();
    pci_function(&second).restore(state).unwrap();
    let mut bytes = vec![0; VRAM_BYTES];
    lock(first).vram.read(0, &mut bytes);
    lock(&second).vram.write(0, &bytes);
    second
}

#[test]
fn a_restored_card_shows_the_same_and_takes_the_other_half() {
    let first = busy();
    let state = matches_golden(&pci_function(&first).save());
    let second = twin(&first, &state);
    let (registers, dirty) = lock(&second).take_for_screen();
    assert!(registers == lock(&first).registers());
    assert!((0..VRAM_BYTES).step_by(PAGE_BYTES).all(|at| dirty.touches(at, 1)), "the whole screen is drawn anew");
    assert!(lines(&first) == lines(&second));
    for vga in [&first, &second] {
        let door = |port: u16, value: u64| {
            let doors = ports(vga);
            let (range, device) = doors.iter().find(|(range, _)| range.contains(&u64::from(port))).unwrap();
            device.lock().unwrap().write(Access::new(u64::from(port) - range.start, Width::B1), value).unwrap();
        };
        door(0x3c9, 0x33);
        door(0x3c0, 0x15);
        let vga = lock(vga);
        assert_eq!(vga.registers.dac[21..24], [0x11, 0x22, 0x33], "the third part of the colour");
        assert_eq!(vga.registers.attribute[3], 0x15, "data, not an index");
        assert_eq!((vga.dispi_index, vga.latches, vga.read_dispi(3)), (3, 0x1234_5678, 32));
    }
    assert!(lines(&first) == lines(&second));
}

#[test]
fn a_linear_mode_is_shown_after_a_restore() {
    let (first, write) = device();
    for (index, value) in [(1, 640), (2, 480), (3, 32), (4, 0x41), (6, 800), (8, 3), (9, 2)] {
        write(0x1ce, Width::B2, index);
        write(0x1cf, Width::B2, value);
    }
    write(0x3c0, Width::B1, 0x20);
    lock(&first).vram.write(4 * (800 * 2 + 3), &[0xff, 0x80, 0x40, 0]);
    let state = lock(&first).save();
    let second = twin(&first, &state);
    let (width, height, seen) = lines(&second);
    assert_eq!((width, height, seen[0][0]), (640, 480, 0x40_80ff));
}

#[test]
fn no_saved_state_makes_it_panic() {
    let state = pci_function(&busy()).save();
    spoil(&state, |bad| {
        let (vga, write) = device();
        let _ = lock(&vga).restore(bad);
        write(0x1ce, Width::B2, 6);
        write(0x1cf, Width::B2, 0xffff);
        for port in 0x3c0..0x3e0 {
            read_port(&vga, port);
            write(port, Width::B1, 0xff);
        }
        write_window(&vga, 0xa_0000, b"abc");
        read_window(&vga, 0xb_ffff);
        let registers = lock(&vga).registers();
        let mut scan = ScanOut::new(&registers, lock(&vga).vram(), None, Blink::LIT);
        let (width, height) = scan.size();
        assert!(width <= 2560 && height <= 1600, "{width} by {height}");
        let mut line = vec![0; width];
        for y in (0..height).step_by(97) {
            scan.line(y, &mut line);
        }
    });
}
