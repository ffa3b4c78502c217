//! A suspended card.

use super::*;
use crate::engine::saved::{
    SaveState, State,
    testing::{matches_golden, spoil},
};

#[test]
fn a_tiny_card_is_saved_as_it_always_was() {
    let mut rig = rig();
    rig.resource(3, XRGB, 2, 1);
    rig.draw(2, 1, |x, _| 0x11_2233 + x);
    assert_eq!(rig.transfer(3, [0, 0, 2, 1], 0), DONE);
    assert_eq!(rig.create(4, ARGB, 64, 64), DONE);
    assert_eq!(rig.show(3, [0, 0, 2, 1]), DONE);
    rig.cursor(command::UPDATE_CURSOR, -1, 2, 4);
    rig.twin.worker.hold();
    rig.twin.display().wish(1920, 1080);
    let saved = matches_golden(&rig.twin.save());

    let mut device = Gpu::new().unwrap();
    device.restore(&saved).unwrap();
    let value = |gpu: &Gpu| serde_json::from_slice::<serde_json::Value>(&gpu.save().bytes).unwrap();
    assert_eq!(value(&device), value(&rig.twin));
}

#[test]
fn a_restored_card_goes_on_where_it_was_saved() {
    let mut first = rig();
    first.resource(1, XRGB, 128, 64);
    first.draw(128, 64, |x, y| (x * 0x01_0203) ^ y);
    assert_eq!(first.transfer(1, [0, 0, 128, 64], 0), DONE);
    assert_eq!(first.show(1, [8, 0, 120, 64]), DONE);
    assert_eq!(first.create(2, ARGB, 64, 64), DONE);
    assert_eq!(first.attach(2, &[(PIXELS + 4, 4096), (PIXELS, 4 * 64 * 64)]), DONE);
    assert_eq!(first.transfer(2, [0, 0, 64, 64], 0), DONE);
    first.cursor(command::UPDATE_CURSOR, 5, -7, 2);
    // Drawn into the guest's memory, and a wish that the driver has not heard of.
    first.draw(128, 64, |x, y| (x * 0x02_0201) ^ y);
    first.twin.worker.hold();
    first.twin.display().wish(640, 480);
    let bytes = request(command::RESOURCE_UNREF, &[2, 0]);
    first.driver.fill(REQUEST, &bytes);
    first.driver.submit(0, &[readable(REQUEST, bytes.len() as u32), writable(ANSWER, 24)]);

    let mut second = plug();
    second.twin.worker.hold();
    second.driver.take_over(&first.driver);
    for y in 0..64 {
        assert_eq!(second.line(y), first.line(y));
    }
    assert_eq!((second.driver.messages(0), second.driver.used(0)), (0, None));
    second.twin.worker.release();
    eventually("the wish", || second.driver.messages(0) == 1);
    assert_eq!(second.register(0), 1);
    let used = second.driver.wait_used(0);
    assert_eq!((used.bytes, number(&second.driver.bytes(ANSWER, 4), 0)), (24, DONE));
    assert_eq!(second.flush(2, [0, 0, 1, 1]), NO_RESOURCE);
    second.cursor(command::UPDATE_CURSOR, 0, 0, 0);
    assert_eq!(second.transfer(1, [0, 0, 128, 64], 0), DONE, "its backing was kept");
    assert_eq!(second.flush(1, [0, 0, 128, 64]), DONE);
    assert_eq!(second.pixel(92, 30), (100 * 0x02_0201) ^ 30);
    let info = second.ask(command::GET_DISPLAY_INFO, &[]);
    assert_eq!((number(&info, 32), number(&info, 36)), (640, 480));
    second.check_it_serves();
}

#[test]
fn a_screen_that_sleeps_is_black_and_stays_so() {
    let mut rig = rig();
    rig.resource(1, XRGB, 16, 16);
    rig.draw(16, 16, |_, _| 0xff_ffff);
    assert_eq!(rig.transfer(1, [0, 0, 16, 16], 0), DONE);
    assert_eq!(rig.show(1, [0, 0, 16, 16]), DONE);
    rig.changed();
    assert_eq!(rig.show(0, [0, 0, 0, 0]), DONE);
    assert_eq!((rig.size(), rig.pixel(3, 3), rig.changed().len()), (Some((16, 16)), 0, 16));
    assert_eq!(rig.flush(1, [0, 0, 16, 16]), DONE);
    assert_eq!(rig.pixel(3, 3), 0, "nothing is shown");
    rig.twin.worker.hold();
    let saved = rig.twin.save();
    let mut second = plug();
    second.twin.restore(&saved).unwrap();
    assert_eq!((second.size(), second.pixel(3, 3)), (Some((16, 16)), 0));
    rig.twin.worker.release();
    assert_eq!(rig.show(1, [0, 0, 16, 16]), DONE);
    assert_eq!(rig.pixel(3, 3), 0xff_ffff);
}

#[test]
fn noise_is_not_kept_beyond_its_room_but_what_is_shown_is() {
    let mut rig = rig();
    let mut noise = vec![0u8; 4 << 20];
    let mut seed = 1u64;
    for word in noise.as_chunks_mut::<8>().0 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        *word = seed.to_le_bytes();
    }
    rig.driver.fill(PIXELS, &noise);
    for id in 1..=6 {
        rig.resource(id, XRGB, 1024, 1024);
        assert_eq!(rig.transfer(id, [0, 0, 1024, 1024], 0), DONE);
    }
    assert_eq!(rig.show(6, [0, 0, 1024, 1024]), DONE);
    rig.twin.worker.hold();
    let saved = rig.twin.save();
    assert!(saved.bytes.len() < 34 << 20, "{} bytes", saved.bytes.len());
    let mut second = plug();
    second.twin.restore(&saved).unwrap();
    assert_eq!(second.line(777), rig.line(777));
    let kept = second.twin.worker.while_out(|render: &mut Render, _| {
        let all = render.resources.iter().map(|(id, resource)| (id, resource.pixels.iter().any(|byte| *byte != 0)));
        all.collect::<Vec<_>>()
    });
    assert_eq!(kept, [(1, true), (2, true), (3, false), (4, false), (5, false), (6, true)]);
}

/// A state in which every list has something.
fn full() -> Rig {
    let mut rig = rig();
    rig.resource(1, XRGB, 16, 16);
    rig.resource(2, ARGB, 64, 64);
    rig.draw(64, 64, |x, y| x << 24 | y);
    assert_eq!(rig.transfer(1, [0, 0, 16, 16], 0), DONE);
    assert_eq!(rig.transfer(2, [0, 0, 64, 64], 0), DONE);
    assert_eq!(rig.show(1, [0, 0, 16, 16]), DONE);
    rig.cursor(command::UPDATE_CURSOR, 3, 3, 2);
    rig.twin.worker.hold();
    rig
}

#[test]
fn spoilt_states_are_refused_or_harmless() {
    let first = full();
    let saved = first.twin.save();
    let mut rig = plug();
    let mut refused = 0;
    spoil(&saved, |bad| {
        rig.driver.start(VERSION_1 | EDID);
        rig.twin.worker.hold();
        refused += usize::from(rig.twin.restore(bad).is_err());
        rig.twin.worker.release();
        rig.ask(command::GET_DISPLAY_INFO, &[]);
        rig.ask(command::GET_EDID, &[0, 0]);
        for id in [0, 1, 2, 255, 256, u32::MAX] {
            rig.transfer(id, [0, 0, 16, 16], 0);
            rig.flush(id, [0, 0, 16, 16]);
        }
        if let Some((_, height)) = rig.size() {
            [0, height - 1].into_iter().for_each(|y| drop(rig.line(y)));
        }
        rig.cursor(command::MOVE_CURSOR, 1, 1, 0);
        rig.say(command::RESOURCE_UNREF, &[1]);
        rig.check_it_serves();
    });
    assert!(refused > 100, "{refused}");
}

#[test]
fn a_state_beyond_the_limits_is_refused() {
    let first = full();
    let saved = first.twin.save();
    let whole: serde_json::Value = serde_json::from_slice(&saved.bytes).unwrap();
    let restore = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut copy = whole.clone();
        change(&mut copy);
        let state = State { bytes: serde_json::to_vec(&copy).unwrap(), ..saved.clone() };
        Gpu::new().unwrap().restore(&state).map_err(|error| error.to_string())
    };
    assert_eq!(restore(&|_| ()), Ok(()));
    type Change = (&'static str, fn(&mut serde_json::Value));
    let changes: [Change; 11] = [
        ("a resource twice", |state| state["resources"][1]["id"] = 1.into()),
        ("more pixels than a resource has", |state| state["resources"][0]["height"] = 15.into()),
        ("fewer", |state| state["resources"][0]["height"] = 17.into()),
        ("more memory than there is", |state| {
            for index in 0..2 {
                state["resources"][index]["width"] = 8192.into();
                state["resources"][index]["height"] = 8192.into();
                state["resources"][index]["pixels"] = "".into();
            }
        }),
        ("half an entry", |state| state["resources"][0]["backing"] = "00".into()),
        ("a backing that is none", |state| state["resources"][0]["backed"] = false.into()),
        ("a scanout of nothing", |state| state["scanout"]["resource"] = 9.into()),
        ("a scanout outside", |state| state["scanout"]["part"] = vec![1, 0, 16, 16].into()),
        ("a larger screen than is shown", |state| {
            state["resources"][0]["width"] = 8192.into();
            state["resources"][0]["height"] = 2160.into();
            state["resources"][0]["pixels"] = "".into();
            state["scanout"]["part"] = vec![0, 0, 8192, 2160].into();
        }),
        ("a larger black picture than is shown", |state| {
            state["scanout"] = serde_json::Value::Null;
            state["black"] = vec![8192, 2160].into();
        }),
        ("a size that is no size", |state| state["size"] = vec![641, 480].into()),
    ];
    for (what, change) in changes {
        assert!(restore(&change).is_err(), "{what}");
    }
}
