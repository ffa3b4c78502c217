//! What a driver should not do.

use super::{
    super::resources::{ALL_ENTRIES_MAX, PIXEL_BYTES_MAX, RESOURCES_MAX, Resource, SCREEN_BYTES_MAX},
    *,
};
use crate::engine::{memory::RamSpan, virtio::testing::NEEDS_RESET};

#[test]
fn what_is_not_there_is_refused_by_name() {
    let mut rig = rig();
    rig.resource(1, XRGB, 16, 16);
    for id in [0, 2, u32::MAX] {
        assert_eq!(rig.say(command::RESOURCE_UNREF, &[id]), NO_RESOURCE);
        assert_eq!(rig.say(command::RESOURCE_DETACH_BACKING, &[id]), NO_RESOURCE);
        assert_eq!(rig.attach(id, &[]), NO_RESOURCE);
        assert_eq!(rig.transfer(id, [0, 0, 1, 1], 0), NO_RESOURCE);
        assert_eq!(rig.flush(id, [0, 0, 1, 1]), NO_RESOURCE);
        if id != 0 {
            assert_eq!(rig.show(id, [0, 0, 1, 1]), NO_RESOURCE);
        }
    }
    assert_eq!(rig.create(0, XRGB, 1, 1), NO_RESOURCE);
    assert_eq!(rig.create(1, XRGB, 1, 1), NO_RESOURCE, "it is taken");
    for scanout in [1, 15, 16, u32::MAX] {
        assert_eq!(rig.say(command::SET_SCANOUT, &[0, 0, 16, 16, scanout, 1]), NO_SCANOUT);
        assert_eq!(rig.say(command::SET_SCANOUT, &[0, 0, 0, 0, scanout, 0]), NO_SCANOUT);
        assert_eq!(rig.say(command::GET_EDID, &[scanout, 0]), NO_SCANOUT);
    }
    for command in [0, 0x0108, 0x0109, 0x010b, 0x010c, 0x0200, 0x0207, command::UPDATE_CURSOR, 0x1100, u32::MAX] {
        assert_eq!(rig.say(command, &[1; 8]), UNSPECIFIED, "{command:#x}");
    }
    assert_eq!(rig.say(command::RESOURCE_DETACH_BACKING, &[1]), DONE);
    assert_eq!(rig.say(command::RESOURCE_DETACH_BACKING, &[1]), UNSPECIFIED);
    assert_eq!(rig.transfer(1, [0, 0, 1, 1], 0), UNSPECIFIED);
    assert_eq!(rig.size(), None);
    rig.check_it_serves();
}

#[test]
fn rectangles_outside_are_refused_and_overflow_nothing() {
    let mut rig = rig();
    rig.resource(1, XRGB, 16, 16);
    assert_eq!(rig.show(1, [0, 0, 16, 16]), DONE);
    let max = u32::MAX;
    for rect in [
        [0, 0, 0, 0],
        [0, 0, 0, 16],
        [0, 0, 16, 0],
        [0, 0, 17, 16],
        [0, 0, 16, 17],
        [16, 0, 1, 1],
        [0, 16, 1, 1],
        [1, 1, 16, 16],
        [max, 0, 1, 1],
        [0, max, 1, 1],
        [1, 0, max, 1],
        [0, 1, 1, max],
        [max, max, max, max],
        [0x8000_0000, 0x8000_0000, 0x8000_0000, 0x8000_0000],
    ] {
        assert_eq!(rig.transfer(1, rect, 0), BAD_PARAMETER, "{rect:?}");
        assert_eq!(rig.flush(1, rect), BAD_PARAMETER, "{rect:?}");
        assert_eq!(rig.show(1, rect), BAD_PARAMETER, "{rect:?}");
    }
    assert_eq!(rig.size(), Some((16, 16)), "what was shown stays");
    for offset in [1, 4 * 256, 1 << 31, 1 << 32, u64::MAX, u64::MAX - 1023, u64::MAX - 1024, i64::MAX as u64] {
        assert_eq!(rig.transfer(1, [0, 0, 16, 16], offset), BAD_PARAMETER, "{offset:#x}");
    }
    assert_eq!(rig.transfer(1, [15, 15, 1, 1], 4 * 255), DONE);
    assert_eq!(rig.transfer(1, [15, 15, 1, 1], 4 * 255 + 1), BAD_PARAMETER);
    for (width, height) in [(0, 1), (1, 0), (0, 0), (8193, 1), (1, 8193), (max, max), (0x1_0000, 0x1_0000)] {
        assert_eq!(rig.create(2, XRGB, width, height), BAD_PARAMETER, "{width}x{height}");
    }
    rig.check_it_serves();
}

#[test]
fn a_backing_is_in_ram_and_is_as_long_as_it_says() {
    let mut rig = rig();
    assert_eq!(rig.create(1, XRGB, 16, 16), DONE);
    for outside in [
        (0xa_0000, 16),
        (0x9_fff8, 16),
        ((8 << 20) - 8, 16),
        (8 << 20, 1),
        (u64::MAX, 1),
        (u64::MAX - 7, 16),
        (0, u32::MAX),
        (1 << 40, 4096),
    ] {
        assert_eq!(rig.attach(1, &[(PIXELS, 1024), outside]), BAD_PARAMETER, "{outside:x?}");
    }
    // The list is shorter than its number says.
    for (entries, expected) in
        [(1, BAD_PARAMETER), (16384, BAD_PARAMETER), (16385, OUT_OF_MEMORY), (u32::MAX, OUT_OF_MEMORY)]
    {
        assert_eq!(rig.say(command::RESOURCE_ATTACH_BACKING, &[1, entries]), expected, "{entries}");
        assert_eq!(rig.say(command::RESOURCE_ATTACH_BACKING, &[1, entries, 0, 0, 16]), expected, "{entries}");
    }
    assert_eq!(rig.attach(1, &[]), DONE);
    assert_eq!(rig.transfer(1, [0, 0, 1, 1], 0), BAD_PARAMETER, "nothing is behind it");
    assert_eq!(rig.attach(1, &[(PIXELS, 1024)]), UNSPECIFIED, "it has one");
    assert_eq!(rig.say(command::RESOURCE_DETACH_BACKING, &[1]), DONE);
    // One page again and again, and pieces without bytes, wherever they are.
    assert_eq!(rig.attach(1, &[(0xa_0000, 0), (PIXELS, 512), (u64::MAX, 0), (PIXELS, 512)]), DONE);
    rig.driver.fill(PIXELS, &[7; 512]);
    assert_eq!(rig.transfer(1, [0, 0, 16, 16], 0), DONE);
    assert_eq!(rig.show(1, [0, 0, 16, 16]), DONE);
    assert_eq!((rig.pixel(0, 0), rig.pixel(15, 15)), (0x07_0707, 0x07_0707));
    rig.check_it_serves();
}

#[test]
fn a_long_list_is_taken_in_pieces() {
    let mut rig = rig();
    assert_eq!(rig.create(1, XRGB, 64, 64), DONE);
    // 4096 entries of four bytes, the last ones first.
    let parts: Vec<(u64, u32)> = (0..4096).rev().map(|at| (PIXELS + 4 * at, 4)).collect();
    let mut bytes = request(command::RESOURCE_ATTACH_BACKING, &[1, 4096]);
    for (at, length) in parts {
        bytes.extend(at.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend([0; 4]);
    }
    let at = PIXELS + 0x10_0000;
    rig.driver.fill(at, &bytes);
    let (first, rest) = (5000, bytes.len() as u32 - 5000);
    let pieces = [readable(at, first), readable(at + u64::from(first), rest), writable(ANSWER, 24)];
    assert_eq!(rig.driver.run(0, &pieces).bytes, 24);
    assert_eq!(number(&rig.driver.bytes(ANSWER, 4), 0), DONE);
    rig.draw(64, 64, |x, y| x << 8 | y);
    assert_eq!(rig.transfer(1, [0, 0, 64, 64], 0), DONE);
    assert_eq!(rig.show(1, [0, 0, 64, 64]), DONE);
    assert_eq!((rig.pixel(0, 0), rig.pixel(60, 1)), (0x3f3f, 0x033e));
}

#[test]
fn the_hosts_memory_has_an_end() {
    let mut rig = rig();
    assert_eq!(rig.create(1, XRGB, 8192, 8192), OUT_OF_MEMORY);
    // As wide as can be, and then line by line until nothing fits.
    let rows = (PIXEL_BYTES_MAX / (4 * 8192)) as u32;
    assert_eq!(rig.create(1, XRGB, 8192, rows + 1), OUT_OF_MEMORY);
    assert_eq!(rig.create(1, XRGB, 8192, rows - 1), DONE);
    assert_eq!(rig.create(2, XRGB, 8192, 2), OUT_OF_MEMORY);
    assert_eq!(rig.create(2, XRGB, 8192, 1), DONE);
    let rest = (PIXEL_BYTES_MAX / 4 % 8192) as u32;
    assert_eq!(rig.create(3, XRGB, rest + 1, 1), OUT_OF_MEMORY);
    // What may be is not all shown at once, and what is shown stays.
    assert_eq!(rig.show(2, [0, 0, 8192, 1]), DONE);
    assert_eq!(rig.show(1, [0, 0, 8192, 1013]), OUT_OF_MEMORY);
    assert_eq!(rig.size(), Some((8192, 1)));
    assert_eq!(rig.show(1, [0, 0, 8192, 1012]), DONE);
    assert_eq!(rig.size(), Some((8192, 1012)));
    assert_eq!(rig.say(command::RESOURCE_UNREF, &[1]), DONE);
    let mut made = 1;
    for id in 3..3000 {
        match rig.create(id, XRGB, 1, 1) {
            DONE => made += 1,
            refused => assert_eq!(refused, OUT_OF_MEMORY),
        }
    }
    assert_eq!(made, 1024);
    rig.check_it_serves();
}

#[test]
fn a_card_costs_the_host_no_more_than_it_says() {
    let screens = 2 * SCREEN_BYTES_MAX;
    let spans = (ALL_ENTRIES_MAX * (size_of::<RamSpan>() + size_of::<u64>())) as u64;
    let lists = spans + (RESOURCES_MAX * 2 * size_of::<Resource>()) as u64;
    let all = PIXEL_BYTES_MAX + screens + lists;
    assert!((HOST_BYTES_MAX - (1 << 20)..=HOST_BYTES_MAX).contains(&all), "{all}");
}

#[test]
fn what_is_shown_ends_with_its_resource_and_with_a_reset() {
    let mut rig = rig();
    rig.resource(1, XRGB, 16, 16);
    assert_eq!(rig.show(1, [0, 0, 16, 16]), DONE);
    let look = rig.twin.display().look().unwrap();
    assert_eq!(rig.say(command::RESOURCE_UNREF, &[1]), DONE);
    assert_eq!(rig.size(), Some((16, 16)), "black, and not the VGA of long ago");
    assert_eq!(rig.flush(1, [0, 0, 16, 16]), NO_RESOURCE);
    let mut line = [7; 16];
    look.line(0, &mut line);
    assert_eq!(line, [0; 16]);
    // Another of its name is not shown for that.
    rig.resource(1, XRGB, 32, 32);
    assert_eq!(rig.flush(1, [0, 0, 32, 32]), DONE);
    assert_eq!(rig.size(), Some((16, 16)));
    assert_eq!(rig.show(1, [0, 0, 32, 32]), DONE);
    line.fill(7);
    look.line(15, &mut line);
    assert_eq!(line, [0; 16], "a look that is late sees black");
    rig.driver.registers.reset();
    assert_eq!(rig.size(), None);
    rig.check_it_serves();
    assert_eq!(rig.create(2, XRGB, 8192, 6000), DONE, "a reset gave everything back");
}

#[test]
fn a_reset_in_the_middle_of_long_work_returns() {
    let mut rig = rig();
    for _ in 0..20 {
        rig.driver.start(VERSION_1 | EDID);
        assert_eq!(rig.create(1, XRGB, 1024, 1024), DONE);
        let page = vec![(PIXELS, 1 << 20); 4];
        assert_eq!(rig.attach(1, &page), DONE);
        assert_eq!(rig.show(1, [0, 0, 1024, 1024]), DONE);
        let bytes = request(command::TRANSFER_TO_HOST_2D, &[0, 0, 1024, 1024, 0, 0, 1, 0]);
        rig.driver.fill(REQUEST, &bytes);
        for _ in 0..8 {
            rig.driver.add(0, &[readable(REQUEST, bytes.len() as u32), writable(ANSWER, 24)]);
        }
        rig.driver.registers.kick(0);
        rig.driver.registers.reset();
        assert_eq!(rig.size(), None);
    }
    rig.check_it_serves();
}

#[test]
fn short_requests_are_refused_and_short_room_is_filled_so_far() {
    let mut rig = rig();
    rig.resource(1, XRGB, 16, 16);
    let whole = request(command::TRANSFER_TO_HOST_2D, &[0, 0, 16, 16, 0, 0, 1]);
    for length in 0..whole.len() {
        let answer = rig.ask_bytes(&whole[..length]);
        let expected = if length < 24 { UNSPECIFIED } else { BAD_PARAMETER };
        assert_eq!(number(&answer, 0), expected, "{length} bytes");
    }
    assert_eq!(number(&rig.ask_bytes(&whole), 0), DONE, "padding is not looked at");
    for (command, fields) in [
        (command::RESOURCE_CREATE_2D, &[1, 2, 3][..]),
        (command::RESOURCE_UNREF, &[]),
        (command::SET_SCANOUT, &[0, 0, 1, 1, 0]),
        (command::RESOURCE_FLUSH, &[0, 0, 1, 1]),
        (command::RESOURCE_ATTACH_BACKING, &[1]),
        (command::RESOURCE_DETACH_BACKING, &[]),
        (command::GET_EDID, &[]),
    ] {
        assert_eq!(rig.say(command, fields), BAD_PARAMETER, "{command:#x}");
    }
    let bytes = request(command::GET_DISPLAY_INFO, &[]);
    for room in [0, 1, 23, 24, 407, 408, 409] {
        rig.driver.fill(REQUEST, &bytes);
        rig.driver.fill(ANSWER, &[0xee; 512]);
        let mut pieces = vec![readable(REQUEST, 24)];
        pieces.extend((room > 0).then(|| writable(ANSWER, room)));
        let used = rig.driver.run(0, &pieces).bytes;
        assert_eq!(used, room.min(408));
        assert!(rig.driver.bytes(ANSWER, 512)[used as usize..].iter().all(|byte| *byte == 0xee));
    }
    // Nothing to read at all, and a cursor with a name that is not one.
    assert_eq!(rig.driver.run(0, &[writable(ANSWER, 100)]).bytes, 24);
    assert_eq!(rig.driver.run(1, &[writable(ANSWER, 100)]).bytes, 24);
    rig.cursor(command::GET_DISPLAY_INFO, 0, 0, 0);
    assert_eq!(rig.driver.registers.status() & NEEDS_RESET, 0);
    rig.check_it_serves();
}

#[test]
fn a_cursor_of_another_size_or_place_harms_nobody() {
    let mut rig = rig();
    rig.resource(1, XRGB, 63, 64);
    rig.resource(2, ARGB, 64, 64);
    rig.draw(64, 64, |_, _| 0xffff_ffff);
    assert_eq!(rig.transfer(2, [0, 0, 64, 64], 0), DONE);
    rig.cursor(command::UPDATE_CURSOR, 0, 0, 2);
    assert_eq!(rig.size(), None, "a cursor alone shows nothing");
    assert_eq!(rig.show(1, [0, 0, 63, 64]), DONE);
    assert_eq!(rig.pixel(0, 0), 0xff_ffff);
    for id in [1, 3, u32::MAX] {
        rig.cursor(command::UPDATE_CURSOR, 0, 0, id);
    }
    for x in [i32::MIN, -64, -1, 0, 62, 63, i32::MAX - 63, i32::MAX] {
        for y in [i32::MIN, -64, -1, 0, 63, 64, 8191, i32::MAX] {
            rig.cursor(command::MOVE_CURSOR, x, y, 2);
            rig.changed();
            (0..64).for_each(|y| drop(rig.line(y)));
        }
    }
    let bytes = request(command::UPDATE_CURSOR, &[1, 0, 0, 0, 2, 0, 0, 0]);
    rig.driver.fill(REQUEST, &bytes);
    let pieces = [readable(REQUEST, bytes.len() as u32), writable(ANSWER, 24)];
    assert_eq!(rig.driver.run(1, &pieces).bytes, 24);
    assert_eq!(number(&rig.driver.bytes(ANSWER, 4), 0), NO_SCANOUT);
    rig.check_it_serves();
    assert_eq!(rig.pixel(15, 15), 0x10_0f0f, "a reset takes the cursor away");
}
