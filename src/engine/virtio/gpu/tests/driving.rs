//! What a driver does.

use super::*;
use crate::engine::{
    screen::{Next, Screen, Viewer},
    vga::Vga,
};

#[test]
fn it_is_a_display_controller_that_is_no_vga() {
    let mut rig = rig();
    assert_eq!(rig.driver.config(0, Width::B4), 0x1050_1af4);
    assert_eq!(rig.driver.config(8, Width::B4) >> 8, 0x03_8000);
    assert_eq!([0, 4, 8, 12].map(|at| rig.register(at)), [0, 0, 1, 0]);
    let info = rig.ask(command::GET_DISPLAY_INFO, &[]);
    assert_eq!((info.len(), number(&info, 0)), (408, 0x1101));
    let mode: Vec<u32> = (0..6).map(|field| number(&info, 24 + 4 * field)).collect();
    assert_eq!(mode, [0, 0, 1024, 768, 1, 0]);
    assert!(info[48..].iter().all(|byte| *byte == 0), "no other scanout");
    let edid = rig.ask(command::GET_EDID, &[0, 0]);
    assert_eq!((edid.len(), number(&edid, 0), number(&edid, 24)), (1056, 0x1104, 128));
    assert_eq!(edid[32..40], [0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
}

#[test]
fn what_is_flushed_is_seen_and_what_is_only_transferred_is_not() {
    let mut rig = rig();
    assert_eq!(rig.create(5, XRGB, 128, 96), DONE);
    let bytes = 4 * 128 * 96;
    let half = bytes / 2 + 100;
    assert_eq!(rig.attach(5, &[(PIXELS, half), (PIXELS + u64::from(half), bytes - half)]), DONE);
    assert_eq!(rig.size(), None, "the VGA is shown");
    assert_eq!(rig.show(5, [0, 0, 128, 96]), DONE);
    assert_eq!((rig.size(), rig.pixel(0, 0)), (Some((128, 96)), 0), "a new resource is black");
    assert_eq!(rig.changed().len(), 96);
    rig.draw(128, 96, |x, y| 0xff00_0000 | x << 16 | y);
    assert_eq!(rig.transfer(5, [0, 0, 128, 96], 0), DONE);
    assert_eq!((rig.pixel(7, 50), rig.changed()), (0, vec![]));
    assert_eq!(rig.flush(5, [0, 0, 128, 96]), DONE);
    for (x, y) in [(0, 0), (7, 50), (127, 47), (127, 48), (127, 95)] {
        assert_eq!(rig.pixel(x, y), (x << 16 | y) as u32, "at {x},{y}");
    }
    assert_eq!(rig.changed().len(), 96);
    assert_eq!(rig.changed(), [0; 0], "nothing since");
}

#[test]
fn two_rectangles_are_taken_over_by_themselves() {
    let mut rig = rig();
    rig.resource(1, XRGB, 64, 64);
    assert_eq!(rig.show(1, [0, 0, 64, 64]), DONE);
    rig.changed();
    rig.draw(64, 64, |x, y| x << 8 | y | 0xf0_0000);
    let at = |x: u64, y: u64| 4 * (64 * y + x);
    assert_eq!(rig.transfer(1, [8, 4, 16, 2], at(8, 4)), DONE);
    assert_eq!(rig.transfer(1, [40, 60, 24, 4], at(40, 60)), DONE);
    assert_eq!(rig.flush(1, [8, 4, 16, 2]), DONE);
    assert_eq!(rig.changed(), [4, 5]);
    assert_eq!((rig.pixel(40, 60), rig.pixel(8, 4)), (0, 0xf0_0804));
    assert_eq!(rig.flush(1, [40, 60, 24, 4]), DONE);
    assert_eq!(rig.changed(), [60, 61, 62, 63]);
    for (x, y, seen) in [(7, 4, false), (8, 4, true), (23, 5, true), (24, 5, false), (8, 6, false), (63, 63, true)] {
        let expected = if seen { 0xf0_0000 | (x << 8 | y) as u32 } else { 0 };
        assert_eq!(rig.pixel(x, y), expected, "at {x},{y}");
    }
    // The same bytes elsewhere: the offset is where they are, not where they go.
    assert_eq!(rig.transfer(1, [0, 0, 1, 1], at(8, 4)), DONE);
    assert_eq!(rig.flush(1, [0, 0, 64, 64]), DONE);
    assert_eq!(rig.pixel(0, 0), 0xf0_0804);
}

#[test]
fn a_part_of_a_resource_can_be_shown_and_another_resource_of_its_size() {
    let mut rig = rig();
    rig.resource(1, XRGB, 64, 64);
    rig.draw(64, 64, |x, y| x << 8 | y);
    assert_eq!(rig.transfer(1, [0, 0, 64, 64], 0), DONE);
    assert_eq!(rig.show(1, [10, 20, 30, 40]), DONE);
    assert_eq!((rig.size(), rig.pixel(0, 0), rig.pixel(29, 39)), (Some((30, 40)), 0x0a14, 0x273b));
    rig.changed();
    assert_eq!(rig.flush(1, [0, 0, 64, 22]), DONE);
    assert_eq!(rig.changed(), [0, 1], "what of it is on the screen");
    assert_eq!(rig.flush(1, [0, 0, 10, 64]), DONE);
    assert_eq!(rig.changed(), [0; 0]);
    let before = rig.twin.display().look().unwrap();
    rig.resource(2, XRGB, 30, 40);
    assert_eq!(rig.flush(2, [0, 0, 30, 40]), DONE);
    assert_eq!(rig.changed(), [0; 0], "it is not shown");
    assert_eq!(rig.show(2, [0, 0, 30, 40]), DONE);
    assert_eq!((rig.pixel(0, 0), rig.changed().len()), (0, 40));
    assert_eq!(rig.twin.display().look().unwrap().serial(), before.serial(), "a flip is no new picture");
}

#[test]
fn each_format_has_its_order_of_bytes() {
    let mut rig = rig();
    for (id, (format, expected)) in [
        (1, 0x33_2211),
        (2, 0x33_2211),
        (3, 0x22_3344),
        (4, 0x22_3344),
        (67, 0x11_2233),
        (68, 0x44_3322),
        (121, 0x44_3322),
        (134, 0x11_2233),
    ]
    .into_iter()
    .enumerate()
    {
        let id = id as u32 + 1;
        rig.resource(id, format, 1, 1);
        rig.driver.fill(PIXELS, &[0x11, 0x22, 0x33, 0x44]);
        assert_eq!(rig.transfer(id, [0, 0, 1, 1], 0), DONE);
        assert_eq!(rig.show(id, [0, 0, 1, 1]), DONE);
        assert_eq!(rig.pixel(0, 0), expected, "format {format}");
    }
    for format in [0, 5, 66, 69, 120, 122, 133, 135, u32::MAX] {
        assert_eq!(rig.create(99, format, 1, 1), BAD_PARAMETER, "format {format}");
    }
}

#[test]
fn a_fence_comes_back_with_its_number_whatever_the_answer() {
    let mut rig = rig();
    for (command, kind) in
        [(command::GET_DISPLAY_INFO, 0x1101), (command::RESOURCE_UNREF, NO_RESOURCE), (7, UNSPECIFIED)]
    {
        let mut bytes = request(command, &[9, 0]);
        bytes[4..20].copy_from_slice(&[1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0xa, 0xb, 0xc, 0xd]);
        let answer = rig.ask_bytes(&bytes);
        assert_eq!((number(&answer, 0), &answer[4..20]), (kind, &bytes[4..20]));
        bytes[4] = 2;
        assert_eq!(rig.ask_bytes(&bytes)[4..24], [0; 20], "no fence was asked for");
    }
}

#[test]
fn the_cursor_is_drawn_over_the_picture_and_marks_where_it_was() {
    let mut rig = rig();
    rig.resource(1, XRGB, 200, 200);
    rig.draw(200, 200, |_, _| 0x80_8080);
    assert_eq!(rig.transfer(1, [0, 0, 200, 200], 0), DONE);
    assert_eq!(rig.show(1, [0, 0, 200, 200]), DONE);
    rig.resource(2, ARGB, 64, 64);
    rig.draw(64, 64, |x, _| if x < 32 { 0xff00_00ff } else { 0 });
    assert_eq!(rig.transfer(2, [0, 0, 64, 64], 0), DONE);
    rig.changed();
    rig.cursor(command::UPDATE_CURSOR, 10, 20, 2);
    assert_eq!(rig.changed(), (20..84).collect::<Vec<_>>());
    let seen = [(9, 20), (10, 20), (41, 83), (42, 83), (10, 84)].map(|(x, y)| rig.pixel(x, y));
    assert_eq!(seen, [0x80_8080, 0xff, 0xff, 0x80_8080, 0x80_8080]);
    rig.cursor(command::MOVE_CURSOR, -31, 100, 2);
    assert_eq!(rig.changed(), (20..84).chain(100..164).collect::<Vec<_>>());
    assert_eq!([rig.pixel(0, 100), rig.pixel(1, 100), rig.pixel(10, 20)], [0xff, 0x80_8080, 0x80_8080]);
    assert_eq!(rig.say(command::RESOURCE_UNREF, &[2]), DONE);
    assert_eq!(rig.pixel(0, 100), 0xff, "the image was taken over");
    rig.cursor(command::UPDATE_CURSOR, 0, 0, 0);
    assert_eq!(rig.changed(), (100..164).collect::<Vec<_>>());
    assert_eq!(rig.pixel(0, 100), 0x80_8080);
}

/// Looks until the picture has a size.
fn sees(viewer: &Viewer, size: (usize, usize)) {
    let mut looks = 0;
    viewer.wait(|view| {
        looks += 1;
        assert!(looks < 200, "never {size:?}: {:?}", view.size());
        if view.size() == size { Next::Done(()) } else { Next::Refresh }
    });
}

#[test]
fn the_screen_goes_over_to_the_card_and_back_to_the_vga() {
    let mut rig = rig();
    let vga = Vga::new().unwrap();
    vga.lock().unwrap().start_in_text_mode();
    let display = Some(rig.twin.display());
    let screen = Screen::with_gpu(Arc::clone(&vga), display, Box::new(|| ()), Box::new(Vec::new));
    let viewer = screen.attach();
    let (width, height, _) = viewer.size();
    let of_vga = (width, height);
    assert_ne!(of_vga, (64, 48));
    // Before a reset, which alone goes back to the VGA.
    let ends: [fn(&mut Rig); 3] = [
        |rig| assert_eq!(rig.show(0, [0; 4]), DONE),
        |rig| assert_eq!(rig.say(command::RESOURCE_UNREF, &[1]), DONE),
        |_| (),
    ];
    for end in ends {
        rig.driver.start(VERSION_1 | EDID);
        rig.resource(1, XRGB, 64, 48);
        rig.draw(64, 48, |x, _| x);
        assert_eq!(rig.transfer(1, [0, 0, 64, 48], 0), DONE);
        sees(&viewer, of_vga);
        assert_eq!(rig.show(1, [0, 0, 64, 48]), DONE);
        sees(&viewer, (64, 48));
        let mut pixels = Vec::new();
        let line = crate::engine::screen::Rect { x: 0, y: 47, width: 64, height: 1 };
        viewer.copy(line, &mut pixels);
        assert_eq!(pixels, (0..64).collect::<Vec<u32>>());
        rig.draw(64, 48, |x, _| x + 100);
        assert_eq!((rig.transfer(1, [0, 0, 64, 48], 0), rig.flush(1, [0, 0, 64, 48])), (DONE, DONE));
        let mut looks = 0;
        let generation = viewer.wait(|view| Next::Done(view.generation));
        viewer.wait(|view| {
            looks += 1;
            assert!(looks < 200, "never: another picture");
            if view.generation > generation { Next::Done(()) } else { Next::Refresh }
        });
        viewer.copy(line, &mut pixels);
        assert_eq!(pixels[5], 105);
        assert_eq!(png_width(&screen), 64);
        end(&mut rig);
        assert_eq!(png_width(&screen), 64);
        rig.driver.registers.reset();
        sees(&viewer, of_vga);
    }
    assert_eq!(png_width(&screen), of_vga.0 as u32);
    assert!(screen.wish_size(1000, 700));
    assert_eq!(rig.twin.shared.config().size, (1000, 696));
}

fn png_width(screen: &Screen) -> u32 {
    let file = screen.png(None).unwrap();
    png::Decoder::new(io::Cursor::new(file)).read_info().unwrap().info().width
}

#[test]
fn a_wish_for_a_size_interrupts_and_is_what_the_display_says() {
    let mut rig = rig();
    let display = rig.twin.display();
    display.wish(1920, 1083);
    eventually("an interrupt", || rig.driver.messages(0) == 1);
    assert_eq!(rig.register(0), 1);
    for part in 0..4 {
        rig.driver.registers.write(Region::Device, part, Width::B1, 0);
        rig.driver.registers.write(Region::Device, 8 + part, Width::B1, 0xff);
    }
    rig.driver.registers.write(Region::Device, 4, Width::B4, 2);
    assert_eq!([0, 4, 8, 12].map(|at| rig.register(at)), [1, 0, 1, 0], "only events_clear clears");
    rig.driver.registers.write(Region::Device, 4, Width::B4, 1);
    assert_eq!(rig.register(0), 0);
    let info = rig.ask(command::GET_DISPLAY_INFO, &[]);
    assert_eq!((number(&info, 32), number(&info, 36)), (1920, 1080));
    let edid = &rig.ask(command::GET_EDID, &[0, 0])[32..];
    assert_eq!(u32::from(edid[56]) | u32::from(edid[58] & 0xf0) << 4, 1920);
    display.wish(1924, 1080);
    assert_eq!(rig.register(0), 0, "that is the same");
    // Linux clears the event after it has asked: a wish that came between is not lost.
    display.wish(1280, 800);
    assert_eq!(rig.register(0), 1);
    let before = rig.driver.messages(0);
    rig.driver.registers.write(Region::Device, 4, Width::B4, 1);
    assert_eq!(rig.register(0), 1);
    eventually("another interrupt", || rig.driver.messages(0) > before);
    rig.driver.registers.write(Region::Device, 4, Width::B4, 1);
    assert_eq!(rig.register(0), 0, "told once, to one that does not ask");
    display.wish(1920, 1080);
    rig.driver.registers.write(Region::Device, 4, Width::B4, 1);
    for (wished, expected) in [
        ((0, 0), (320, 200)),
        ((u32::MAX, u32::MAX), (2880, 2880)),
        ((5120, 2880), (3840, 2160)),
        ((4095, 4096), (2872, 2888)),
        ((5120, 1440), (5120, 1440)),
    ] {
        display.wish(wished.0, wished.1);
        let info = rig.ask(command::GET_DISPLAY_INFO, &[]);
        assert_eq!((number(&info, 32), number(&info, 36)), expected);
        let edid = rig.ask(command::GET_EDID, &[0, 0]);
        let bytes = if expected.0.max(expected.1) < 4096 { 128 } else { 0 };
        assert_eq!((edid.len(), number(&edid, 0), number(&edid, 24)), (1056, 0x1104, bytes), "{expected:?}");
    }
    rig.driver.start(VERSION_1 | EVENT_IDX);
    assert_eq!(rig.register(0), 0, "a driver that begins asks anyway");
    let info = rig.ask(command::GET_DISPLAY_INFO, &[]);
    assert_eq!((number(&info, 32), number(&info, 36)), (5120, 1440), "the wish outlives the reset");
    assert_eq!(rig.say(command::GET_EDID, &[0, 0]), UNSPECIFIED, "it was not negotiated");
}

#[test]
fn every_size_that_can_be_wished_for_can_be_shown() {
    let sides = [0, 1, 199, 200, 320, 1012, 1013, 1125, 2160, 2161, 2880, 3840, 3847, 4095, 8191, 8192, u32::MAX];
    for (width, height) in sides.into_iter().flat_map(|width| sides.map(|height| (width, height))) {
        let size = rounded_size((width, height));
        assert_eq!(rounded_size(size), size, "{width}x{height}");
        assert!(u64::from(size.0) * u64::from(size.1) <= SCREEN_PIXELS_MAX, "{width}x{height}");
        assert!(size.0 >= SIZE_MIN.0 && size.1 >= SIZE_MIN.1, "{width}x{height} is {size:?}");
        assert!(size.0 <= width.clamp(SIZE_MIN.0, SIZE_MAX) && size.1 <= height.clamp(SIZE_MIN.1, SIZE_MAX));
    }
}
