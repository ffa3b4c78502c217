//! Which of the guest's devices get what viewers of the screen do.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

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
    /// Keys that are down, and who was told.
    held: Mutex<BTreeMap<KeyCode, Keyboard>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Keyboard {
    Virtio,
    Usb,
    Ps2,
}

impl ScreenInput {
    pub(super) fn new(devices: &Devices) -> ScreenInput {
        ScreenInput {
            ps2: devices.i8042.clone(),
            tablet: devices.tablet.clone(),
            virtio: devices.keyboard.clone(),
            usb: devices.usb_input.clone(),
            held: Mutex::default(),
        }
    }

    /// The keyboard that the guest listens to.
    fn keyboard(&self) -> Keyboard {
        if self.virtio.as_ref().is_some_and(KeyboardInput::has_driver) {
            Keyboard::Virtio
        } else if self.usb.as_ref().is_some_and(UsbInput::has_keyboard) {
            Keyboard::Usb
        } else {
            Keyboard::Ps2
        }
    }

    fn tell(&self, keyboard: Keyboard, code: KeyCode, down: bool) {
        match (keyboard, &self.virtio, &self.usb) {
            (Keyboard::Virtio, Some(virtio), _) => virtio.key(code, down),
            (Keyboard::Usb, _, Some(usb)) => usb.key(code, down),
            _ => self.ps2.key(code.0, down),
        }
    }
}

impl InputSink for ScreenInput {
    fn key(&self, code: KeyCode, down: bool) {
        let now = self.keyboard();
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let before = if down { held.insert(code, now) } else { held.remove(&code) };
        // Who was told that it is down hears that it is up, although the guest listens to another by now.
        if let Some(before) = before.filter(|before| *before != now) {
            self.tell(before, code, false);
            if !down {
                return;
            }
        }
        self.tell(now, code, down);
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
            input::{self, Tablet},
            testing::{BUFFERS, Driver, VERSION_1, eventually, writable},
        },
    };

    #[test]
    fn keys_go_to_the_virtio_keyboard_while_it_has_a_driver() {
        let keyboard = input::Keyboard::new().unwrap();
        let ps2 = I8042::new(IrqLine::unconnected(), IrqLine::unconnected());
        let input = ScreenInput {
            ps2: ps2.clone(),
            tablet: Tablet::new().unwrap().input(),
            virtio: Some(keyboard.input()),
            usb: None,
            held: Mutex::default(),
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

    #[test]
    fn a_key_is_let_go_where_it_was_pressed() {
        let keyboard = input::Keyboard::new().unwrap();
        let ps2 = I8042::new(IrqLine::unconnected(), IrqLine::unconnected());
        let (virtio, held) = (Some(keyboard.input()), Mutex::default());
        let input = ScreenInput { ps2, tablet: Tablet::new().unwrap().input(), virtio, usb: None, held };
        let holders = || input.held.lock().unwrap().values().copied().collect::<Vec<_>>();
        input.key(KeyCode(0x1d), true);
        assert!(holders() == [Keyboard::Ps2]);
        let mut driver = Driver::plug(keyboard);
        driver.start(VERSION_1);
        eventually("a driver", || input.virtio.as_ref().unwrap().has_driver());
        driver.submit(0, &[writable(BUFFERS, 8)]);
        input.key(KeyCode(0x1d), false);
        assert!(holders().is_empty());
        input.key(KeyCode(0x1e), true);
        assert_eq!(driver.wait_used(0).bytes, 8);
        assert_eq!(driver.bytes(BUFFERS, 8), [1, 0, 30, 0, 1, 0, 0, 0], "it hears of its own keys only");
    }
}
