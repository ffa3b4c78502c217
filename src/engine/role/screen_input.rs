//! Which of the guest's devices get what viewers of the screen do.

use crate::engine::{
    devices::Devices,
    i8042::I8042,
    input::{InputSink, KeyCode},
    virtio::input::{KeyboardInput, TabletInput},
    xhci::UsbInput,
};

/// Keys go to the PS/2 keyboard and the pointer to the virtio tablet, unless the guest has taken others into use: the virtio keyboard
/// before the USB one, which firmware may have left as it was.
pub(super) struct ScreenInput {
    ps2: I8042,
    tablet: TabletInput,
    virtio: Option<KeyboardInput>,
    usb: Option<UsbInput>,
}

impl ScreenInput {
    pub(super) fn new(devices: &Devices) -> ScreenInput {
        ScreenInput {
            ps2: devices.i8042.clone(),
            tablet: devices.tablet.clone(),
            virtio: devices.keyboard.clone(),
            usb: devices.usb_input.clone(),
        }
    }
}

impl InputSink for ScreenInput {
    fn key(&self, code: KeyCode, down: bool) {
        let virtio = self.virtio.as_ref().filter(|keyboard| keyboard.has_driver());
        let usb = self.usb.as_ref().filter(|usb| usb.has_keyboard());
        match (virtio, usb) {
            (Some(keyboard), _) => keyboard.key(code, down),
            (None, Some(usb)) => usb.key(code, down),
            (None, None) => self.ps2.key(code.0, down),
        }
    }
    fn pointer(&self, x: u16, y: u16, buttons: u8, wheel: i8) {
        match self.usb.as_ref().filter(|usb| usb.has_tablet()) {
            Some(usb) => usb.pointer(x, y, buttons, wheel),
            None => self.tablet.pointer(x, y, buttons, wheel),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{
        irq::IrqLine,
        virtio::{
            input::{Keyboard, Tablet},
            testing::{BUFFERS, Driver, VERSION_1, eventually, writable},
        },
    };

    #[test]
    fn keys_go_to_the_virtio_keyboard_while_it_has_a_driver() {
        let keyboard = Keyboard::new().unwrap();
        let ps2 = I8042::new(IrqLine::unconnected(), IrqLine::unconnected());
        let input = ScreenInput {
            ps2: ps2.clone(),
            tablet: Tablet::new().unwrap().input(),
            virtio: Some(keyboard.input()),
            usb: None,
        };
        let presses = |input: &ScreenInput, times: usize| {
            // More than the PS/2 keyboard takes when nobody reads, which is how it is seen that it gets them.
            let before = ps2.dropped();
            (0..times).for_each(|_| input.key(KeyCode(0x1e), true));
            ps2.dropped() - before
        };
        let mut driver = Driver::plug(keyboard);
        assert!(presses(&input, 200) > 0);
        driver.start(VERSION_1);
        eventually("a driver", || input.virtio.as_ref().unwrap().has_driver());
        driver.submit(0, &[writable(BUFFERS, 8)]);
        assert_eq!(presses(&input, 200), 0);
        assert_eq!(driver.wait_used(0).bytes, 8);
        assert_eq!(driver.bytes(BUFFERS, 8), [1, 0, 30, 0, 1, 0, 0, 0]);
        driver.registers.reset();
        assert!(presses(&input, 200) > 0, "back to the one that every guest has");
    }
}
