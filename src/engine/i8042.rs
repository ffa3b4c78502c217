//! i8042 keyboard controller, ports 0x60 and 0x64, with a keyboard and a mouse (IBM PS/2 Technical Reference).
//!
//! One byte at a time is in the output buffer. It is filled from the controller's own answers first, then from the keyboard,
//! then from the mouse, and the pin of its source is high while it waits.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    bus::{Access, BusDevice, BusFault, Effect, SharedDevice, Width},
    irq::IrqLine,
    ps2::{Keyboard, Mouse, to_set_1},
    saved::{BadState, SaveState, State},
};

/// The controller. Cloning gives another handle on the same one.
#[derive(Clone)]
pub struct I8042(Arc<Mutex<Controller>>);

impl I8042 {
    /// `keyboard` and `mouse` are the pins of IRQ 1 and IRQ 12.
    pub fn new(keyboard: IrqLine, mouse: IrqLine) -> I8042 {
        I8042(Arc::new(Mutex::new(Controller::new(keyboard, mouse))))
    }

    /// Port 0x60.
    pub fn data_port(&self) -> SharedDevice {
        Arc::new(Mutex::new(DataPort(self.clone())))
    }

    /// Port 0x64.
    pub fn command_port(&self) -> SharedDevice {
        Arc::new(Mutex::new(CommandPort(self.clone())))
    }

    /// A key by its set 1 code (extended keys are 0xE0xx), from a viewer. Called by any thread; never blocks on the guest.
    pub fn key(&self, xt_code: u16, down: bool) {
        let mut controller = self.lock();
        controller.keyboard.key(xt_code, down);
        controller.refill();
    }

    /// Movement in screen directions (right, down, wheel towards the user), and the buttons held: bit 0 left, 1 right,
    /// 2 middle, 3 and 4 the side buttons.
    pub fn mouse(&self, right: i32, down: i32, wheel: i32, buttons: u8) {
        let mut controller = self.lock();
        controller.mouse.moved(right, down, wheel, buttons);
        controller.refill();
    }

    /// Keyboard lights: bit 0 scroll lock, bit 1 number lock, bit 2 capitals lock.
    pub fn leds(&self) -> u8 {
        self.lock().keyboard.leds()
    }

    /// How many key and mouse events were dropped because the guest did not fetch them.
    pub fn dropped(&self) -> u64 {
        let controller = self.lock();
        controller.keyboard.dropped() + controller.mouse.dropped()
    }

    /// Back to the state after power on.
    pub fn reset(&self) {
        let mut controller = self.lock();
        let fresh = Controller::new(controller.keyboard_irq.clone(), controller.mouse_irq.clone());
        *controller = fresh;
        controller.sync_irq();
    }

    fn lock(&self) -> MutexGuard<'_, Controller> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Status register, port 0x64.
mod status {
    pub(super) const OUTPUT_FULL: u8 = 1 << 0;
    pub(super) const SYSTEM: u8 = 1 << 2;
    pub(super) const COMMAND: u8 = 1 << 3;
    pub(super) const UNLOCKED: u8 = 1 << 4;
    pub(super) const FROM_MOUSE: u8 = 1 << 5;
}

/// Command byte, read by 0x20 and written by 0x60.
mod mode {
    pub(super) const KEYBOARD_IRQ: u8 = 1 << 0;
    pub(super) const MOUSE_IRQ: u8 = 1 << 1;
    pub(super) const SYSTEM: u8 = 1 << 2;
    pub(super) const KEYBOARD_OFF: u8 = 1 << 4;
    pub(super) const MOUSE_OFF: u8 = 1 << 5;
    pub(super) const TRANSLATE: u8 = 1 << 6;
    /// The bits that exist.
    pub(super) const KEPT: u8 = 0x77;
}

/// Output port, read by 0xD0 and written by 0xD1.
mod output {
    pub(super) const NOT_RESET: u8 = 1 << 0;
    pub(super) const A20: u8 = 1 << 1;
    pub(super) const KEYBOARD_FULL: u8 = 1 << 4;
    pub(super) const MOUSE_FULL: u8 = 1 << 5;
}

/// Answers that may wait; each command leaves at most one, and a guest that never reads loses the oldest.
const ANSWERS_MAX: usize = 16;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Controller,
    Keyboard,
    Mouse,
}

impl Source {
    fn is_mouse(self) -> bool {
        match self {
            Source::Mouse => true,
            Source::Controller | Source::Keyboard => false,
        }
    }
}

struct Controller {
    keyboard: Keyboard,
    mouse: Mouse,
    mode: u8,
    a20: bool,
    last_was_command: bool,
    /// A controller command that wants its argument from port 0x60.
    pending: Option<u8>,
    /// The controller's own bytes, with the buffer they pretend to come from.
    answers: VecDeque<(u8, Source)>,
    output: Option<(u8, Source)>,
    /// What port 0x60 shows when nothing is waiting.
    last: u8,
    /// The keyboard sent F0: the next code is a release.
    release: bool,
    keyboard_irq: IrqLine,
    mouse_irq: IrqLine,
}

impl Controller {
    fn new(keyboard_irq: IrqLine, mouse_irq: IrqLine) -> Controller {
        Controller {
            keyboard: Keyboard::new(),
            mouse: Mouse::new(),
            // Translating, as firmware leaves it: a direct boot has no firmware.
            mode: mode::KEYBOARD_IRQ | mode::MOUSE_IRQ | mode::TRANSLATE,
            a20: true,
            last_was_command: false,
            pending: None,
            answers: VecDeque::new(),
            output: None,
            last: 0,
            release: false,
            keyboard_irq,
            mouse_irq,
        }
    }

    /// Fills the output buffer if it is free, then sets the pins.
    fn refill(&mut self) {
        if self.output.is_none() {
            self.output = self.next_output();
        }
        self.sync_irq();
    }

    fn next_output(&mut self) -> Option<(u8, Source)> {
        if let Some(answer) = self.answers.pop_front() {
            return Some(answer);
        }
        if self.mode & mode::KEYBOARD_OFF == 0
            && let Some(byte) = self.next_key_byte()
        {
            return Some((byte, Source::Keyboard));
        }
        if self.mode & mode::MOUSE_OFF == 0 {
            return self.mouse.next_byte().map(|byte| (byte, Source::Mouse));
        }
        None
    }

    /// The keyboard's next byte, translated when the guest wants set 1: F0 xx becomes one byte with its highest bit set.
    fn next_key_byte(&mut self) -> Option<u8> {
        loop {
            let byte = self.keyboard.next_byte()?;
            if self.mode & mode::TRANSLATE == 0 {
                return Some(byte);
            }
            if byte == 0xf0 {
                self.release = true;
                continue;
            }
            let released = std::mem::take(&mut self.release);
            return Some(to_set_1(byte) | if released { 0x80 } else { 0 });
        }
    }

    fn sync_irq(&self) {
        let (mut keyboard, mut mouse) = (false, false);
        match self.output {
            Some((_, source)) if source.is_mouse() => mouse = self.mode & mode::MOUSE_IRQ != 0,
            Some(_) => keyboard = self.mode & (mode::KEYBOARD_IRQ | mode::KEYBOARD_OFF) == mode::KEYBOARD_IRQ,
            None => {}
        }
        self.keyboard_irq.set(keyboard);
        self.mouse_irq.set(mouse);
    }

    fn read_data(&mut self) -> u8 {
        if let Some((byte, _)) = self.output.take() {
            self.last = byte;
            // The pins drop before the next byte raises one, so that edge-triggered interrupts count each byte.
            self.sync_irq();
            self.refill();
        }
        self.last
    }

    fn read_status(&self) -> u8 {
        let full = match self.output {
            Some((_, source)) if source.is_mouse() => status::OUTPUT_FULL | status::FROM_MOUSE,
            Some(_) => status::OUTPUT_FULL,
            None => 0,
        };
        let system = if self.mode & mode::SYSTEM != 0 { status::SYSTEM } else { 0 };
        let command = if self.last_was_command { status::COMMAND } else { 0 };
        status::UNLOCKED | full | system | command
    }

    fn answer(&mut self, byte: u8, source: Source) {
        if self.answers.len() >= ANSWERS_MAX {
            self.answers.pop_front();
        }
        self.answers.push_back((byte, source));
    }

    fn command(&mut self, command: u8) -> Effect {
        self.last_was_command = true;
        self.pending = None;
        match command {
            0x20 => self.answer(self.mode, Source::Controller),
            0x21..=0x3f => self.answer(0, Source::Controller), // controller RAM, which is not there
            0x60..=0x7f | 0xd1..=0xd4 => self.pending = Some(command),
            0xa7 => self.mode |= mode::MOUSE_OFF,
            0xa8 => self.mode &= !mode::MOUSE_OFF,
            0xa9 | 0xab => self.answer(0, Source::Controller), // the interfaces are good
            0xaa => {
                self.mode |= mode::SYSTEM;
                self.answer(0x55, Source::Controller);
            }
            0xad => self.mode |= mode::KEYBOARD_OFF,
            0xae => self.mode &= !mode::KEYBOARD_OFF,
            0xc0 => self.answer(0x80, Source::Controller), // input port: not locked
            0xd0 => self.answer(self.output_port(), Source::Controller),
            0xdd => self.a20 = false,
            0xdf => self.a20 = true,
            0xe0 => self.answer(0, Source::Controller), // test inputs
            // Pulses the output lines whose bits are zero; line 0 is the reset line.
            0xf0..=0xff if command & output::NOT_RESET == 0 => return Effect::Reset,
            _ => {}
        }
        self.refill();
        Effect::None
    }

    fn write_data(&mut self, byte: u8) -> Effect {
        self.last_was_command = false;
        match self.pending.take() {
            None => {
                // A byte for the keyboard opens its interface again.
                self.mode &= !mode::KEYBOARD_OFF;
                self.keyboard.command(byte);
            }
            Some(0x60) => self.mode = byte & mode::KEPT,
            Some(0xd1) => {
                self.a20 = byte & output::A20 != 0;
                if byte & output::NOT_RESET == 0 {
                    return Effect::Reset;
                }
            }
            Some(0xd2) => self.answer(byte, Source::Keyboard),
            Some(0xd3) => self.answer(byte, Source::Mouse),
            Some(0xd4) => {
                self.mode &= !mode::MOUSE_OFF;
                self.mouse.command(byte);
            }
            Some(_) => {}
        }
        self.refill();
        Effect::None
    }

    fn output_port(&self) -> u8 {
        let full = match self.output {
            Some((_, source)) if source.is_mouse() => output::MOUSE_FULL,
            Some(_) => output::KEYBOARD_FULL,
            None => 0,
        };
        output::NOT_RESET | if self.a20 { output::A20 } else { 0 } | full
    }
}

struct DataPort(I8042);

impl BusDevice for DataPort {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        one_byte(at)?;
        Ok(u64::from(self.0.lock().read_data()))
    }
    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        one_byte(at)?;
        Ok(self.0.lock().write_data(value as u8))
    }
}

struct CommandPort(I8042);

impl BusDevice for CommandPort {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        one_byte(at)?;
        Ok(u64::from(self.0.lock().read_status()))
    }
    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        one_byte(at)?;
        Ok(self.0.lock().command(value as u8))
    }
}

fn one_byte(at: Access) -> Result<(), BusFault> {
    if at.width == Width::B1 { Ok(()) } else { Err(BusFault::BadWidth) }
}

mod saved {
    use serde::{Deserialize, Serialize};

    use crate::engine::ps2::saved::{KeyboardV1, MouseV1};

    pub(super) const KIND: &str = "i8042";

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) keyboard: KeyboardV1,
        pub(super) mouse: MouseV1,
        pub(super) mode: u8,
        pub(super) a20: bool,
        pub(super) last_was_command: bool,
        pub(super) pending: Option<u8>,
        pub(super) answers: Vec<(u8, Source)>,
        pub(super) output: Option<(u8, Source)>,
        pub(super) last: u8,
        pub(super) release: bool,
    }

    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub(super) enum Source {
        Controller,
        Keyboard,
        Mouse,
    }

    impl From<super::Source> for Source {
        fn from(source: super::Source) -> Source {
            match source {
                super::Source::Controller => Source::Controller,
                super::Source::Keyboard => Source::Keyboard,
                super::Source::Mouse => Source::Mouse,
            }
        }
    }

    impl From<Source> for super::Source {
        fn from(source: Source) -> super::Source {
            match source {
                Source::Controller => super::Source::Controller,
                Source::Keyboard => super::Source::Keyboard,
                Source::Mouse => super::Source::Mouse,
            }
        }
    }
}

impl SaveState for I8042 {
    fn save(&self) -> State {
        let controller = self.lock();
        let Controller {
            keyboard,
            mouse,
            mode,
            a20,
            last_was_command,
            pending,
            answers,
            output,
            last,
            release,
            keyboard_irq: _,
            mouse_irq: _,
        } = &*controller;
        let fields = saved::V1 {
            keyboard: keyboard.save(),
            mouse: mouse.save(),
            mode: *mode,
            a20: *a20,
            last_was_command: *last_was_command,
            pending: *pending,
            answers: answers.iter().map(|(byte, source)| (*byte, (*source).into())).collect(),
            output: output.map(|(byte, source)| (byte, source.into())),
            last: *last,
            release: *release,
        };
        State::new(saved::KIND, 1, &fields)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let fields: saved::V1 = state.fields(saved::KIND, 1)?;
        let few = fields.answers.len() <= ANSWERS_MAX;
        BadState::unless(few, saved::KIND, "the controller has more answers than it keeps")?;
        let keyboard = Keyboard::restored(fields.keyboard).map_err(|why| BadState::new(saved::KIND, why))?;
        let mouse = Mouse::restored(fields.mouse).map_err(|why| BadState::new(saved::KIND, why))?;
        let mut controller = self.lock();
        controller.keyboard = keyboard;
        controller.mouse = mouse;
        controller.mode = fields.mode & mode::KEPT;
        controller.a20 = fields.a20;
        controller.last_was_command = fields.last_was_command;
        controller.pending = fields.pending;
        controller.answers = fields.answers.into_iter().map(|(byte, source)| (byte, source.into())).collect();
        controller.output = fields.output.map(|(byte, source)| (byte, source.into()));
        controller.last = fields.last;
        controller.release = fields.release;
        controller.sync_irq();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{
        irq::tests::recorder,
        saved::testing::{matches_golden, spoil},
    };

    type Levels = Arc<Mutex<Vec<bool>>>;

    struct Rig {
        controller: I8042,
        data: SharedDevice,
        command: SharedDevice,
        keyboard_irq: Levels,
        mouse_irq: Levels,
    }

    fn rig() -> Rig {
        let ((keyboard, keyboard_irq), (mouse, mouse_irq)) = (recorder(), recorder());
        let controller = I8042::new(keyboard, mouse);
        Rig { data: controller.data_port(), command: controller.command_port(), controller, keyboard_irq, mouse_irq }
    }

    const BYTE: Access = Access { offset: 0, width: Width::B1 };

    impl Rig {
        fn status(&self) -> u8 {
            self.command.lock().unwrap().read(BYTE).unwrap() as u8
        }
        fn command(&self, byte: u8) -> Effect {
            self.command.lock().unwrap().write(BYTE, u64::from(byte)).unwrap()
        }
        fn put(&self, byte: u8) -> Effect {
            self.data.lock().unwrap().write(BYTE, u64::from(byte)).unwrap()
        }
        fn get(&self) -> u8 {
            self.data.lock().unwrap().read(BYTE).unwrap() as u8
        }
        /// Polls as memtest86+ does: everything that is there.
        fn drain(&self) -> Vec<u8> {
            std::iter::from_fn(|| (self.status() & 1 != 0).then(|| self.get())).collect()
        }
        fn edges(levels: &Levels) -> usize {
            let levels = levels.lock().unwrap();
            levels.windows(2).filter(|pair| !pair[0] && pair[1]).count() + usize::from(levels.first() == Some(&true))
        }
    }

    #[test]
    fn seabios_brings_the_controller_and_the_keyboard_up() {
        let rig = rig();
        rig.command(0xad);
        rig.command(0xa7);
        rig.drain();
        rig.command(0xaa);
        assert_eq!(rig.drain(), [0x55]);
        rig.command(0xab);
        assert_eq!(rig.drain(), [0x00]);
        rig.put(0xff);
        assert_eq!(rig.drain(), [0xfa, 0xaa]);
        rig.put(0xf5);
        assert_eq!(rig.drain(), [0xfa]);
        rig.command(0x60);
        rig.put(0x20);
        rig.put(0xf0);
        assert_eq!(rig.drain(), [0xfa]);
        rig.put(0x02);
        assert_eq!(rig.drain(), [0xfa]);
        rig.command(0x60);
        rig.put(0x61);
        rig.put(0xf4);
        assert_eq!(rig.drain(), [0xfa]);
        rig.controller.key(0x1e, true);
        rig.controller.key(0x1e, false);
        assert_eq!(rig.drain(), [0x1e, 0x9e], "translated to set 1");
        assert_eq!(rig.status() & status::SYSTEM, 0, "the last command byte cleared it");
    }

    #[test]
    fn linux_tests_the_mouse_port_and_its_interrupt() {
        let rig = rig();
        rig.command(0x20);
        let before = rig.get();
        rig.command(0xd3);
        rig.put(0xa5);
        assert_eq!(rig.status() & 0x21, 0x21);
        assert_eq!(Rig::edges(&rig.mouse_irq), 1);
        assert_eq!(rig.get(), 0xa5);
        rig.command(0xa7);
        rig.command(0x20);
        assert_eq!(rig.get(), before | 0x20);
        rig.command(0xa8);
        rig.command(0xa9);
        assert_eq!(rig.drain(), [0]);
        rig.command(0xd4);
        rig.put(0xf2);
        assert_eq!(rig.status() & 0x21, 0x21);
        assert_eq!(rig.drain(), [0xfa, 0x00]);
    }

    #[test]
    fn each_byte_makes_an_edge_on_its_own_pin() {
        let rig = rig();
        rig.controller.key(0xe04b, true);
        assert_eq!(Rig::edges(&rig.keyboard_irq), 1);
        assert_eq!(rig.get(), 0xe0);
        assert_eq!(Rig::edges(&rig.keyboard_irq), 2);
        assert_eq!(rig.get(), 0x4b);
        assert_eq!(rig.keyboard_irq.lock().unwrap().last(), Some(&false));
        rig.command(0xd4);
        rig.put(0xf4);
        rig.drain();
        rig.controller.mouse(1, 0, 0, 0);
        assert_eq!(rig.drain(), [0x08, 1, 0]);
        assert_eq!(Rig::edges(&rig.mouse_irq), 4, "one for the acknowledge, three for the packet");
        assert_eq!(Rig::edges(&rig.keyboard_irq), 2);
    }

    #[test]
    fn a_closed_interface_keeps_its_bytes_back() {
        let rig = rig();
        rig.command(0xad);
        rig.controller.key(0x1e, true);
        assert_eq!(rig.status() & 1, 0);
        rig.command(0xae);
        assert_eq!(rig.drain(), [0x1e]);
        rig.command(0x60);
        rig.put(mode::TRANSLATE);
        rig.controller.key(0x1e, true);
        assert_eq!(rig.keyboard_irq.lock().unwrap().last(), Some(&false), "interrupts are off");
        assert_eq!(rig.drain(), [0x1e]);
    }

    #[test]
    fn identification_is_translated_as_by_a_real_controller() {
        let rig = rig();
        rig.put(0xf2);
        assert_eq!(rig.drain(), [0xfa, 0xab, 0x41]);
        rig.command(0x60);
        rig.put(0x03);
        rig.put(0xf2);
        assert_eq!(rig.drain(), [0xfa, 0xab, 0x83]);
    }

    #[test]
    fn three_ways_to_reset_and_the_output_port() {
        let rig = rig();
        rig.command(0xd0);
        assert_eq!(rig.get() & 3, 3);
        assert_eq!(rig.command(0xdd), Effect::None);
        rig.command(0xd0);
        assert_eq!(rig.get() & 3, 1);
        assert_eq!(rig.command(0xfe), Effect::Reset);
        assert_eq!(rig.command(0xf0), Effect::Reset);
        assert_eq!(rig.command(0xff), Effect::None);
        rig.command(0xd1);
        assert_eq!(rig.put(0x02), Effect::Reset);
        rig.command(0xd1);
        assert_eq!(rig.put(0x03), Effect::None);
    }

    #[test]
    fn a_hostile_guest_fills_nothing_and_breaks_nothing() {
        let rig = rig();
        for byte in (0..=0xff).cycle().take(4096) {
            rig.command(byte);
            rig.put(byte.wrapping_mul(7));
            rig.controller.key(u16::from(byte), byte & 1 == 0);
            rig.controller.mouse(i32::from(byte), 0, 0, byte);
        }
        rig.command(0xae);
        assert!(rig.drain().len() < 1024);
        assert_eq!(rig.data.lock().unwrap().read(Access::new(0, Width::B4)), Err(BusFault::BadWidth));
        rig.controller.reset();
        assert!(rig.drain().is_empty());
        assert_eq!(rig.status(), status::UNLOCKED);
    }

    /// A byte in the output buffer, half a key behind it, a mouse with a wheel in the middle of a packet, and two commands that
    /// wait for their arguments.
    fn busy() -> Rig {
        let rig = rig();
        for byte in [0xf3, 200, 0xf3, 100, 0xf3, 80, 0xf4] {
            rig.command(0xd4);
            rig.put(byte);
            rig.drain();
        }
        rig.controller.mouse(5, -3, 1, 1);
        rig.get();
        rig.controller.key(0xe04b, true);
        rig.controller.key(0x1e, false);
        rig.command(0xd3);
        rig.put(0x77);
        rig.get();
        rig.put(0xed);
        rig.command(0xdd);
        rig.command(0x60);
        rig
    }

    #[test]
    fn a_restored_controller_gives_the_bytes_that_waited_and_takes_the_arguments() {
        let first = busy();
        let state = matches_golden(&first.controller.save());
        let mut second = rig();
        second.controller.restore(&state).unwrap();
        assert_eq!(second.mouse_irq.lock().unwrap().last(), first.mouse_irq.lock().unwrap().last());
        for rig in [&first, &second] {
            assert_eq!(rig.status() & status::COMMAND, status::COMMAND);
            rig.put(0x43);
        }
        let bytes = first.drain();
        assert!(bytes.len() >= 7, "{bytes:x?}");
        assert_eq!(second.drain(), bytes);
        for rig in [&first, &second] {
            rig.put(0x05);
            assert_eq!(rig.drain(), [0xfa]);
            assert_eq!(rig.controller.leds(), 5, "the argument of a command of before");
            rig.command(0x20);
            assert_eq!(rig.get(), 0x43);
            rig.command(0xd0);
            assert_eq!(rig.get() & output::A20, 0);
            rig.controller.mouse(1, 0, 0, 0);
            assert_eq!(rig.drain(), [0x08, 1, 0, 0], "the wheel's packet");
        }
    }

    #[test]
    fn no_saved_state_makes_it_panic() {
        spoil(&busy().controller.save(), |bad| {
            let mut rig = rig();
            let _ = rig.controller.restore(bad);
            rig.controller.mouse(i32::MAX, i32::MIN, 1, 3);
            rig.controller.key(0x1e, true);
            rig.put(0x01);
            rig.command(0xd4);
            rig.put(0xe9);
            rig.command(0x20);
            assert!(rig.drain().len() < 4096);
            rig.put(0xff);
            rig.drain();
        });
    }
}
