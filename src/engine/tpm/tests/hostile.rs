//! Emulators that lie, fall silent or end, and guests that write anything anywhere.

use super::*;

/// The guest goes on with a TPM that says that it has failed.
fn has_failed(rig: &mut Rig, why: &str) {
    rig.wait();
    assert_eq!(rig.get(register::CTRL_STS) & 1, 1, "{why}");
    assert!(rig.said().contains("engine: the guest's TPM has failed: "), "{why}: {}", rig.said());
    rig.start(&COMMAND);
    rig.wait();
    assert_eq!(rig.get(register::CTRL_STS) & 1, 1);
    let hold = rig.tpm.hold();
    hold.hold();
    hold.settle().unwrap();
    let state = rig.tpm.save();
    rig.tpm.reset();
    hold.release();
    rig.start(&COMMAND);
    rig.wait();
    assert_eq!(rig.get(register::CTRL_STS) & 1, 1, "its channels are out of step for ever");

    let mut fresh = super::rig();
    fresh.tpm.restore(&state).unwrap();
    fresh.tpm.hold().release();
    fresh.start(&COMMAND);
    fresh.wait();
    assert_eq!((fresh.get(register::CTRL_STS) & 1, fresh.count(2)), (1, 0), "what it knew is lost");
    fresh.tpm.reset();
    fresh.start(&COMMAND);
    let mut data = fresh.go();
    take(&mut data);
    data.write_all(&DONE).unwrap();
    fresh.wait();
    assert_eq!((fresh.get(register::CTRL_STS) & 1, fresh.response(10)), (0, DONE.to_vec()));
}

#[test]
fn an_emulator_that_does_not_begin_well_is_a_tpm_that_has_failed() {
    for command in [0x01, 0x11, 0x0e, 0x02] {
        for manner in [Manner::Ends(command), Manner::Ones(command)] {
            if manner == Manner::Ones(1) {
                continue; // it can do everything
            }
            let mut rig = rig_with(manner);
            rig.start(&COMMAND);
            rig.tpm.hold().release();
            has_failed(&mut rig, &format!("{manner:?}"));
        }
    }
    let mut rig = rig_with(Manner::Silent(2));
    rig.start(&COMMAND);
    rig.tpm.hold().release();
    has_failed(&mut rig, "silence");
}

#[test]
fn a_wrong_response_is_a_tpm_that_has_failed() {
    for size in [0u32, 9, 3969, 0x8000_0000, u32::MAX] {
        let mut rig = rig();
        let mut data = rig.go();
        rig.start(&COMMAND);
        take(&mut data);
        let mut response = DONE;
        response[2..6].copy_from_slice(&size.to_be_bytes());
        data.write_all(&response).unwrap();
        has_failed(&mut rig, &format!("{size} bytes"));
    }
}

#[test]
fn silence_an_end_in_the_middle_and_unasked_words_are_a_tpm_that_has_failed() {
    for bytes in [0, 4, 10] {
        for ends in [false, true] {
            let mut rig = rig();
            let mut data = rig.go();
            rig.start(&COMMAND);
            take(&mut data);
            data.write_all(&[0x80, 1, 0, 0, 0, 20, 0, 0, 0, 0][..bytes]).unwrap();
            let kept = if ends { None } else { Some(data) };
            has_failed(&mut rig, &format!("after {bytes} bytes, end {ends}"));
            drop(kept);
        }
    }
    let mut rig = rig();
    let mut data = rig.go();
    data.write_all(&DONE).unwrap();
    rig.start(&COMMAND);
    has_failed(&mut rig, "a word before it was asked");
}

#[test]
fn a_state_without_end_is_not_taken() {
    for manner in [Manner::Ones(0x0c), Manner::Ends(0x0c)] {
        let mut rig = rig_with(manner);
        let _data = rig.go();
        let hold = rig.tpm.hold();
        hold.hold();
        hold.settle().unwrap();
        assert!(String::from_utf8(rig.tpm.save().bytes).unwrap().contains("\"emulator\":null"));
        assert!(rig.said().contains("has failed"));
    }
    let mut rig = rig();
    rig.blobs.lock().unwrap()[0].bytes = vec![1; emulator::BLOB_BYTES_MAX + 1];
    let _data = rig.go();
    rig.tpm.hold().hold();
    assert!(String::from_utf8(rig.tpm.save().bytes).unwrap().contains("\"emulator\":null"));
}

#[test]
fn no_register_and_no_value_makes_it_panic() {
    let mut rig = rig();
    let mut data = rig.go();
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while data.read(&mut bytes).is_ok_and(|got| got > 0) && data.write_all(&DONE).is_ok() {}
    });
    let widths = [Width::B1, Width::B2, Width::B4, Width::B8];
    for round in 0..100_000u64 {
        let value = round.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let area = if value & 1 == 0 { 0x90 } else { 0x1000 };
        let at = Access::new((value >> 8) % area, widths[(value >> 2 & 3) as usize]);
        match value >> 60 {
            0..=7 => _ = rig.tpm.write(at, [1, 2, u64::MAX, value][(value >> 4 & 3) as usize]),
            8..=14 => _ = rig.tpm.read(at),
            _ if round % 64 == 0 => rig.tpm.reset(),
            _ => {}
        }
    }
    assert_eq!(rig.tpm.read(Access::new(0xfff, Width::B8)).unwrap() >> 8, u64::MAX >> 8, "beyond the page");
}
