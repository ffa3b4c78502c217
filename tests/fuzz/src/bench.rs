//! Bytes as actions upon a device, as a guest, its viewers and its host can do them.

use serde_json::{Value, json};

use crate::{
    coverage::uncounted,
    drivers::Driving,
    engine::{
        bus::{BusView, Effect, Width},
        input::KeyCode,
        layout::VGA_WINDOW,
        memory::Gpa,
        pci::{DevFn, assign::assign},
        saved::State,
        suspend::States,
        turns,
        virtio::console::PortPeer,
    },
    input::Input,
    machine::{DATA, Machine, RAM_BYTES, RINGS},
    targets::{Device, Extra},
};

/// So that one input ends soon.
const ACTIONS_MAX: usize = 128;
/// Pictures are slow.
const PICTURES_MAX: usize = 2;
const RESTORES_MAX: usize = 2;
/// Every pixel is drawn, and few are packed.
const PICTURE_WIDTH: Option<usize> = Some(64);

/// The machine and its driver.
pub(crate) struct Bench {
    pub(crate) machine: Machine,
    pub(crate) pio: BusView,
    pub(crate) mmio: BusView,
    name: &'static str,
    pub(crate) device: Device,
    regions: Vec<Region>,
    driving: Driving,
    pictures: usize,
    restores: usize,
}

/// Registers that the target has.
#[derive(Clone)]
enum Region {
    Ports {
        at: u64,
        bytes: u64,
    },
    Memory {
        at: u64,
        bytes: u64,
    },
    /// Behind the BAR that this register of configuration space is.
    Bar {
        register: u8,
        bytes: u64,
    },
}

/// Does what the bytes say.
pub(crate) fn run(name: &'static str, device: &Device, bytes: &[u8]) {
    let mut bench = Bench::new(name, device);
    let mut input = Input(bytes);
    for _ in 0..ACTIONS_MAX {
        if input.is_empty() {
            break;
        }
        bench.act(&mut input);
    }
    turns::take_all();
    if bench.device.memory == Some(VGA_WINDOW) || bench.device.extra == Extra::Gpu {
        bench.machine.devices.screen.png(PICTURE_WIDTH).expect("a picture");
    }
    bench.machine.devices.reset();
    turns::take_all();
}

impl Bench {
    fn new(name: &'static str, device: &Device) -> Bench {
        let machine = uncounted(|| Machine::new(device));
        let (pio, mmio) = (machine.devices.pio.view(), machine.devices.mmio.view());
        let (regions, driving) = (Vec::new(), Driving::default());
        let mut bench =
            Bench { machine, pio, mmio, name, device: device.clone(), regions, driving, pictures: 0, restores: 0 };
        uncounted(|| bench.find_regions());
        bench
    }

    fn find_regions(&mut self) {
        let ports =
            self.device.ports.iter().map(|ports| Region::Ports { at: ports.start, bytes: ports.end - ports.start });
        self.regions = ports.collect();
        if let Some(at) = self.device.memory.clone() {
            self.regions.push(Region::Memory { at: at.start, bytes: at.end - at.start });
        }
        if self.device.function.is_none() {
            return;
        }
        for register in (0x10..0x28).step_by(4) {
            let before = self.config(register, Width::B4);
            self.set_config(register, Width::B4, 0xffff_ffff);
            let probe = self.config(register, Width::B4);
            self.set_config(register, Width::B4, before);
            let mask = if probe & 1 != 0 { !3 } else { !15 };
            if probe != 0 && before & mask != 0 {
                self.regions.push(Region::Bar { register, bytes: (!(probe & mask) & 0xffff_ffff) + 1 });
            }
        }
    }

    /// The target's own name in a saved state.
    fn state_name(&self) -> String {
        match self.device.function {
            Some((slot, function)) => format!("pci-{slot:02x}.{function}"),
            None => self.name.to_owned(),
        }
    }

    /// The target's PCI function.
    fn function(&self) -> DevFn {
        let (slot, function) = self.device.function.unwrap_or_default();
        DevFn::new(slot, function)
    }
    pub(crate) fn config(&self, at: u8, width: Width) -> u64 {
        self.machine.devices.pci.lock().expect("nobody panicked").read(self.function(), at, width)
    }
    pub(crate) fn set_config(&self, at: u8, width: Width, value: u64) {
        self.machine.devices.pci.lock().expect("nobody panicked").write(self.function(), at, width, value);
    }

    /// Where a BAR is now.
    pub(crate) fn bar(&self, index: u8) -> u64 {
        self.config(0x10 + 4 * index, Width::B4) & !15
    }
    pub(crate) fn write(&mut self, at: u64, width: Width, value: u64) {
        self.mmio.write(at, width, value);
    }
    pub(crate) fn fill(&self, at: u64, bytes: &[u8]) {
        // A place outside RAM keeps nothing.
        let _ = self.machine.ram.write(Gpa(at), bytes);
    }
    pub(crate) fn fill_u32(&self, at: u64, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.fill(at, &bytes);
    }

    fn act(&mut self, input: &mut Input<'_>) {
        match input.u8() & 15 {
            0..=2 => self.access(input, true),
            3 => self.access(input, false),
            4 => {
                let (at, width) = (input.u8(), width(input.u8()));
                let value = input.number(width.bytes());
                self.config_access(at, width, Some(value));
            }
            5 => {
                let (at, width) = (input.u8(), width(input.u8()));
                self.config_access(at, width, None);
            }
            6 => {
                let at = input.place();
                self.fill(at, input.string());
            }
            7 => {
                // Anywhere in RAM, where rings are, or outside.
                let at = match input.u8() & 3 {
                    0 => u64::from(input.u16()) * 16 % RAM_BYTES,
                    1 => RINGS + u64::from(input.u16()),
                    2 => DATA + u64::from(input.u16()),
                    _ => input.u64(),
                };
                let width = width(input.u8());
                self.fill(at, &input.number(width.bytes()).to_le_bytes()[..width.bytes()]);
            }
            8 => {
                let mut driving = std::mem::take(&mut self.driving);
                driving.start(self, input);
                self.driving = driving;
            }
            9 | 10 => {
                let mut driving = std::mem::take(&mut self.driving);
                driving.request(self, input);
                self.driving = driving;
            }
            11 => {
                let step = u64::from(input.u8()) << (input.u8() & 31);
                turns::set_now_ns(turns::now_ns().saturating_add(step.saturating_mul(1000)));
                turns::take_all();
            }
            12 => turns::take_all(),
            13 if input.u8() & 7 == 0 => self.reset(),
            13 => self.sleep(input),
            _ => self.host(input),
        }
    }

    fn access(&mut self, input: &mut Input<'_>, write: bool) {
        let (which, form, low) = (input.u8(), input.u8(), input.u16());
        if self.regions.is_empty() {
            return;
        }
        let region = self.regions[usize::from(which) % self.regions.len()].clone();
        let width = width(form);
        let offset = u64::from(low) | u64::from(form >> 3) << 16;
        let (memory, at, bytes) = match region {
            Region::Ports { at, bytes } => (false, at, bytes),
            Region::Memory { at, bytes } => (true, at, bytes),
            Region::Bar { register, bytes } => match self.config(register, Width::B4) {
                bar if bar & 1 != 0 => (false, bar & !3, bytes),
                bar => (true, bar & !15, bytes),
            },
        };
        let mut offset = offset % bytes;
        if form & 4 == 0 {
            offset -= offset % width.bytes() as u64;
        }
        let bus = if memory { &mut self.mmio } else { &mut self.pio };
        if write {
            if bus.write(at + offset, width, input.number(width.bytes())) != Effect::None {
                self.reset();
            }
        } else {
            bus.read(at + offset, width);
        }
    }

    /// Of the target's function, and of any when it is the whole bus.
    fn config_access(&mut self, at: u8, width: Width, value: Option<u64>) {
        // Configuration space is reached through four ports.
        if usize::from(at & 3) + width.bytes() > 4 {
            return;
        }
        match value {
            Some(value) => self.set_config(at, width, value),
            None => drop(self.config(at, width)),
        }
    }

    fn reset(&mut self) {
        self.machine.devices.hold();
        self.machine.devices.reset();
        self.machine.devices.release();
        uncounted(|| assign(&mut self.machine.devices.pci.lock().expect("nobody panicked")));
        self.driving = Driving::default();
    }

    /// Saves the machine and goes on with another one, perhaps after somebody has changed what was saved.
    fn sleep(&mut self, input: &mut Input<'_>) {
        let changes = input.u8() & 3;
        self.restores += 1;
        if self.restores > RESTORES_MAX {
            return;
        }
        self.machine.devices.hold();
        let mut states = self.machine.devices.save();
        for _ in 0..changes {
            let own = self.state_name();
            spoil(&mut states, &own, input);
        }
        let now = turns::now_ns();
        let mut next = uncounted(|| Machine::with_ram(&self.device, self.machine.ram.clone()));
        turns::set_now_ns(now);
        next.devices.hold();
        let mut take = |name: &str| {
            let at = states.iter().position(|(own, _)| own == name).expect("the same devices");
            Ok(states.swap_remove(at).1)
        };
        if next.devices.restore(&mut take).is_err() {
            // A machine that cannot go on ends; another begins.
            next = uncounted(|| Machine::new(&self.device));
            self.driving = Driving::default();
        }
        next.devices.release();
        self.machine = next;
        (self.pio, self.mmio) = (self.machine.devices.pio.view(), self.machine.devices.mmio.view());
        turns::take_all();
    }

    /// What comes from the host: viewers, networks, orders.
    fn host(&mut self, input: &mut Input<'_>) {
        let devices = &self.machine.devices;
        match input.u8() % 12 {
            0 => {
                let (key, down) = (KeyCode(input.u16()), input.u8() & 1 != 0);
                devices.i8042.key(key.0, down);
                if let Some(keyboard) = &devices.keyboard {
                    keyboard.key(key, down);
                }
                if let Some(usb) = &self.machine.usb_input {
                    usb.key(key, down);
                }
            }
            1 => {
                let (x, y, buttons, wheel) = (input.u16(), input.u16(), input.u8(), input.u8() as i8);
                devices.tablet.pointer(x, y, buttons, wheel);
                devices.screen.wish_size(x.into(), y.into());
                devices.i8042.mouse(x as i16 as i32, y as i16 as i32, wheel.into(), buttons);
                if let Some(usb) = &self.machine.usb_input {
                    usb.pointer(x, y, buttons, wheel);
                }
            }
            2 => drop(devices.uart.lock().expect("nobody panicked").type_bytes(input.string())),
            3 => {
                let (length, lead) = (input.u16(), input.string());
                let mut frame = lead.to_vec();
                frame.resize(usize::from(length & 0x3fff).max(lead.len()), 0x5a);
                if let Some(tap) = &self.machine.far.tap {
                    let _ = tap.send(&frame);
                }
                if let Some(mut passt) = self.machine.far.passt.as_ref() {
                    let _ = std::io::Write::write(&mut passt, &(frame.len() as u32).to_be_bytes());
                    let _ = std::io::Write::write(&mut passt, &frame);
                }
            }
            4 => self.drain_network(),
            5 => devices.tray.eject(),
            6 => {
                let bytes = u64::from(input.u16()) * 512;
                if let Ok(medium) = crate::engine::disk::RawFile::new(crate::machine::file(bytes), true) {
                    devices.tray.insert(medium);
                }
            }
            7 => {
                devices.balloon.set_target(input.u32().into());
                devices.balloon.ask_statistics();
                devices.balloon.status();
            }
            8 => {
                let mut agent = devices.agent.clone();
                match input.u8() & 3 {
                    0 => agent.opened(true),
                    1 => drop(agent.shut_down()),
                    2 => drop(agent.set_clock(input.u64() as i64)),
                    _ => drop(agent.news()),
                }
            }
            9 => self.machine.knock(input.string()),
            10 => self.machine.hang_up(input.u8()),
            _ => {
                devices.pm.press_power_button();
                devices.pm.raise_gpe(input.u8() & 7);
                if self.device.memory == Some(VGA_WINDOW) && self.pictures < PICTURES_MAX {
                    self.pictures += 1;
                    devices.screen.png(PICTURE_WIDTH).expect("a picture");
                }
            }
        }
    }

    /// The far end takes what came.
    fn drain_network(&self) {
        let mut bytes = vec![0; 1 << 16];
        if let Some(tap) = &self.machine.far.tap {
            while tap.recv(&mut bytes).is_ok() {}
        }
        if let Some(mut passt) = self.machine.far.passt.as_ref() {
            while std::io::Read::read(&mut passt, &mut bytes).is_ok_and(|count| count > 0) {}
        }
    }
}

fn width(form: u8) -> Width {
    [Width::B4, Width::B1, Width::B2, Width::B8][usize::from(form & 3)]
}

/// Changes one field of one state, more often of the target's own.
fn spoil(states: &mut States, own: &str, input: &mut Input<'_>) {
    let which = usize::from(input.u8());
    let own = states.iter().position(|(name, _)| name == own).filter(|_| which >= 0x40);
    let which = own.unwrap_or(which % states.len());
    let State { bytes, .. } = &mut states[which].1;
    let Ok(mut whole) = serde_json::from_slice(bytes) else {
        // The scrollback is plain bytes.
        return *bytes = input.string().to_vec();
    };
    spoil_inside(&mut whole, input);
    *bytes = serde_json::to_vec(&whole).expect("JSON");
}

/// Goes down to a field, by a byte for each level.
fn spoil_inside(value: &mut Value, input: &mut Input<'_>) {
    let step = usize::from(input.u8());
    match value {
        Value::Object(map) if !map.is_empty() => {
            let step = step % map.len();
            return spoil_inside(map.values_mut().nth(step).expect("so many are there"), input);
        }
        Value::Array(list) if !list.is_empty() && step != 255 => {
            let step = step % list.len();
            return spoil_inside(&mut list[step], input);
        }
        _ => {}
    }
    let number = input.u64();
    *value = match (input.u8() & 7, &*value) {
        (0, Value::String(text)) => json!(text.chars().rev().collect::<String>()),
        (1, Value::String(text)) => json!(text.repeat(1 + (number & 3) as usize)),
        (2, Value::String(text)) => json!(text.chars().take(number as usize & 0xff).collect::<String>()),
        (3, Value::String(text)) => json!(format!("{number:016x}{}", text.get(16..).unwrap_or_default())),
        (4, Value::Array(list)) => json!([list.clone(), list.clone()].concat()),
        (5, Value::Array(_)) => json!([]),
        (6, _) => Value::Null,
        (7, Value::Bool(value)) => json!(!value),
        (0..3, Value::Number(_)) => json!(number & 0xff),
        (3, Value::Number(_)) => json!(number & 0xffff),
        (4, Value::Number(_)) => json!(number & 0xffff_ffff),
        _ => json!(number),
    };
}
