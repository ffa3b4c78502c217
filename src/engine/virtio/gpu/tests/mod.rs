//! The card as a driver uses it, and what the screen then shows.

mod driving;
mod hostile;
mod restored;

use super::{protocol::command, *};
use crate::engine::{
    bus::Width,
    virtio::testing::{BUFFERS, Driver, EVENT_IDX, Region, VERSION_1, eventually, readable, writable},
};

const EDID: Features = 1 << F_EDID;

/// Where a request and its answer are.
const REQUEST: u64 = BUFFERS;
const ANSWER: u64 = BUFFERS + 0x1000;
const ANSWER_BYTES: u32 = 0x1000;
/// What the driver draws into.
const PIXELS: u64 = BUFFERS + 0x10_0000;

const DONE: u32 = 0x1100;
const UNSPECIFIED: u32 = 0x1200;
const OUT_OF_MEMORY: u32 = 0x1201;
const NO_SCANOUT: u32 = 0x1202;
const NO_RESOURCE: u32 = 0x1203;
const BAD_PARAMETER: u32 = 0x1205;

/// B8G8R8X8: a little-endian 0x00RRGGBB.
const XRGB: u32 = 2;
/// B8G8R8A8.
const ARGB: u32 = 1;

struct Rig {
    driver: Driver,
    /// Another handle on the device.
    twin: Gpu,
}

fn twin(gpu: &Gpu) -> Gpu {
    Gpu { worker: gpu.worker.clone(), shared: Arc::clone(&gpu.shared) }
}

fn plug() -> Rig {
    let gpu = Gpu::new().unwrap();
    let twin = twin(&gpu);
    Rig { driver: Driver::plug(gpu), twin }
}

fn rig() -> Rig {
    let mut rig = plug();
    rig.driver.start(VERSION_1 | EDID);
    rig
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn request(command: u32, fields: &[u32]) -> Vec<u8> {
    let header = [command, 0, 0, 0, 0, 0];
    header.iter().chain(fields).flat_map(|field| field.to_le_bytes()).collect()
}

impl Rig {
    /// Sends a request over the control queue and gives the answer.
    fn ask(&mut self, command: u32, fields: &[u32]) -> Vec<u8> {
        self.ask_bytes(&request(command, fields))
    }

    fn ask_bytes(&mut self, request: &[u8]) -> Vec<u8> {
        self.driver.fill(REQUEST, request);
        let pieces = [readable(REQUEST, request.len() as u32), writable(ANSWER, ANSWER_BYTES)];
        let used = self.driver.run(0, &pieces);
        self.driver.bytes(ANSWER, used.bytes as usize)
    }

    /// The same, for requests that are only done or refused.
    fn say(&mut self, command: u32, fields: &[u32]) -> u32 {
        let answer = self.ask(command, fields);
        assert_eq!(answer.len(), 24);
        assert_eq!(answer[4..], [0; 20]);
        number(&answer, 0)
    }

    /// Sends a request over the cursor queue, without room for an answer.
    fn cursor(&mut self, command: u32, x: i32, y: i32, resource: u32) {
        let bytes = request(command, &[0, x as u32, y as u32, 0, resource, 0, 0, 0]);
        self.driver.fill(REQUEST, &bytes);
        assert_eq!(self.driver.run(1, &[readable(REQUEST, bytes.len() as u32)]).bytes, 0);
    }

    fn create(&mut self, id: u32, format: u32, width: u32, height: u32) -> u32 {
        self.say(command::RESOURCE_CREATE_2D, &[id, format, width, height])
    }

    /// Stretches of memory behind a resource.
    fn attach(&mut self, id: u32, parts: &[(u64, u32)]) -> u32 {
        let mut fields = vec![id, parts.len() as u32];
        for (at, bytes) in parts {
            fields.extend([*at as u32, (*at >> 32) as u32, *bytes, 0]);
        }
        self.say(command::RESOURCE_ATTACH_BACKING, &fields)
    }

    /// A resource with the memory at `PIXELS`.
    fn resource(&mut self, id: u32, format: u32, width: u32, height: u32) {
        assert_eq!(self.create(id, format, width, height), DONE);
        assert_eq!(self.attach(id, &[(PIXELS, 4 * width * height)]), DONE);
    }

    fn transfer(&mut self, id: u32, [x, y, width, height]: [u32; 4], offset: u64) -> u32 {
        let [low, high] = [offset as u32, (offset >> 32) as u32];
        self.say(command::TRANSFER_TO_HOST_2D, &[x, y, width, height, low, high, id, 0])
    }

    fn show(&mut self, id: u32, [x, y, width, height]: [u32; 4]) -> u32 {
        self.say(command::SET_SCANOUT, &[x, y, width, height, 0, id])
    }

    fn flush(&mut self, id: u32, [x, y, width, height]: [u32; 4]) -> u32 {
        self.say(command::RESOURCE_FLUSH, &[x, y, width, height, id, 0])
    }

    /// Draws: each pixel as `color` says by column and row.
    fn draw(&mut self, width: u32, height: u32, color: impl Fn(u32, u32) -> u32) {
        let pixels = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
        let bytes: Vec<u8> = pixels.flat_map(|(x, y)| color(x, y).to_le_bytes()).collect();
        self.driver.fill(PIXELS, &bytes);
    }

    fn size(&self) -> Option<(usize, usize)> {
        self.twin.display().look().map(|look| look.size())
    }

    /// A line as the screen shows it.
    fn line(&self, y: usize) -> Vec<u32> {
        let look = self.twin.display().look().expect("the card shows something");
        let mut line = vec![0xdead; look.size().0];
        look.line(y, &mut line);
        line
    }

    fn pixel(&self, x: usize, y: usize) -> u32 {
        self.line(y)[x]
    }

    /// Rows that have changed since the last call.
    fn changed(&self) -> Vec<usize> {
        let look = self.twin.display().take_for_screen().expect("the card shows something");
        (0..look.size().1).filter(|y| look.dirty().has(*y)).collect()
    }

    /// Whatever was done before: a driver that starts anew gets its picture.
    fn check_it_serves(&mut self) {
        self.driver.start(VERSION_1 | EDID);
        assert_eq!(self.size(), None);
        self.resource(1, XRGB, 16, 16);
        self.draw(16, 16, |x, y| 0x10_0000 | x << 8 | y);
        assert_eq!(self.transfer(1, [0, 0, 16, 16], 0), DONE);
        assert_eq!(self.show(1, [0, 0, 16, 16]), DONE);
        assert_eq!((self.size(), self.pixel(3, 5)), (Some((16, 16)), 0x10_0305));
    }

    fn register(&mut self, at: u64) -> u64 {
        self.driver.registers.read(Region::Device, at, Width::B4)
    }
}
