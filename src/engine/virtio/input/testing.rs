//! What a driver of a virtio-input device does.

use crate::engine::{
    bus::Width,
    virtio::testing::{BUFFERS, Driver, Region, writable},
};

/// What the configuration says to this selection.
pub(super) fn asked(driver: &mut Driver, select: u8, part: u8) -> Vec<u8> {
    driver.registers.write(Region::Device, 0, Width::B1, select.into());
    driver.registers.write(Region::Device, 1, Width::B1, part.into());
    let bytes = driver.registers.read(Region::Device, 2, Width::B1);
    (0..bytes).map(|at| driver.registers.read(Region::Device, 8 + at, Width::B1) as u8).collect()
}

/// Queues `count` buffers of eight bytes.
pub(super) fn offer(driver: &mut Driver, count: u64) {
    for _ in 0..count {
        let at = BUFFERS + 8 * u64::from(driver.next_head(0));
        driver.add(0, &[writable(at, 8)]);
    }
    driver.registers.kick(0);
}

/// The next event: type, code and value.
pub(super) fn event(driver: &mut Driver) -> (u16, u16, i32) {
    let used = driver.wait_used(0);
    assert_eq!(used.bytes, 8);
    let bytes = driver.bytes(BUFFERS + 8 * u64::from(used.head), 8);
    let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    (half(0), half(2), i32::from(half(4)) | i32::from(half(6) as i16) << 16)
}
