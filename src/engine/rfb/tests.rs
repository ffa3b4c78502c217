//! A viewer of our own against the server, over a socket pair.

use std::{
    io::{BufReader, ErrorKind, Read, Write},
    time::Instant,
};

use flate2::{Decompress, FlushDecompress};

use super::*;
use crate::engine::{
    input::KeyCode,
    screen::{Rect, tests::Bench},
    vga::Vga,
    virtio::{VirtioDevice, gpu::Gpu},
};

/// SetDesktopSize: 768×512, one screen.
const WISH: [u8; 24] = [251, 0, 3, 0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 2, 0, 0, 0, 0, 0];

#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl InputSink for Notes {
    fn key(&self, code: KeyCode, down: bool) {
        lock(&self.0).push(format!("{}{:x}", if down { '+' } else { '-' }, code.0));
    }
    fn pointer(&self, x: u16, y: u16, buttons: u8, wheel: i8) {
        lock(&self.0).push(format!("{x},{y} {buttons} {wheel}"));
    }
}

fn server(bench: &Bench) -> (Arc<RfbServer>, Arc<Notes>) {
    let notes = Arc::new(Notes::default());
    (RfbServer::new(Arc::clone(&bench.screen), Arc::clone(&notes) as Arc<dyn InputSink>, "a guest"), notes)
}

fn connect(server: &Arc<RfbServer>) -> UnixStream {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    server.serve(far).unwrap();
    near
}

/// Waits until `done`, for five seconds at most.
fn until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(5), "waited too long: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A viewer with its own copy of the picture.
struct Client {
    stream: UnixStream,
    from: BufReader<UnixStream>,
    size: (usize, usize),
    pixels: Vec<u32>,
    bytes_read: usize,
    zlib: Decompress,
    zrle: Decompress,
}

/// What an update consisted of.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Pixels(Rect),
    Note(i32, u16, u16),
}

impl Client {
    fn new(server: &Arc<RfbServer>) -> Client {
        let mut stream = connect(server);
        let mut client = Client {
            from: BufReader::new(stream.try_clone().unwrap()),
            stream: stream.try_clone().unwrap(),
            size: (0, 0),
            pixels: Vec::new(),
            bytes_read: 0,
            zlib: Decompress::new(true),
            zrle: Decompress::new(true),
        };
        assert_eq!(client.read(12), b"RFB 003.008\n");
        stream.write_all(b"RFB 003.008\n").unwrap();
        assert_eq!(client.read(2), [1, 1]);
        stream.write_all(&[1]).unwrap();
        assert_eq!(client.read(4), [0; 4]);
        stream.write_all(&[0]).unwrap();
        let size = (client.short(), client.short());
        client.resize(size);
        assert_eq!(client.read(16), pixel::PixelFormat::NATIVE.to_bytes());
        let length = client.long() as usize;
        assert_eq!(client.read(length), b"a guest");
        client
    }

    fn read(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.from.read_exact(&mut bytes).unwrap();
        self.bytes_read += count;
        bytes
    }
    fn short(&mut self) -> usize {
        let bytes = self.read(2);
        usize::from(u16::from_be_bytes([bytes[0], bytes[1]]))
    }
    fn long(&mut self) -> u32 {
        u32::from_be_bytes(self.read(4).try_into().unwrap())
    }
    fn resize(&mut self, size: (usize, usize)) {
        self.size = size;
        self.pixels = vec![0xdead; size.0 * size.1];
    }

    fn encodings(&mut self, numbers: &[i32]) {
        let mut bytes = vec![2, 0, 0, numbers.len() as u8];
        numbers.iter().for_each(|number| bytes.extend(number.to_be_bytes()));
        self.stream.write_all(&bytes).unwrap();
    }
    fn ask(&mut self, incremental: bool) {
        let mut bytes = vec![3, incremental.into(), 0, 0, 0, 0];
        bytes.extend((self.size.0 as u16).to_be_bytes());
        bytes.extend((self.size.1 as u16).to_be_bytes());
        self.stream.write_all(&bytes).unwrap();
    }

    /// Takes one FramebufferUpdate in.
    fn update(&mut self) -> Vec<Seen> {
        assert_eq!(self.read(2), [0, 0]);
        let count = self.short();
        (0..count).map(|_| self.rectangle()).collect()
    }

    fn rectangle(&mut self) -> Seen {
        let [x, y, width, height] = [0; 4].map(|_| self.short());
        let encoding = self.long() as i32;
        let bytes = match encoding {
            0 => self.read(4 * width * height),
            6 => self.inflate(true),
            16 => self.inflate(false),
            -308 => {
                assert_eq!(self.read(4), [1, 0, 0, 0]);
                self.read(16);
                if (x, y) == (0, 0) && (width, height) != self.size {
                    self.resize((width, height));
                }
                return Seen::Note(encoding, x as u16, y as u16);
            }
            -223 => {
                self.resize((width, height));
                return Seen::Note(encoding, 0, 0);
            }
            -307 => {
                let length = self.long() as usize;
                self.read(length);
                return Seen::Note(encoding, 0, 0);
            }
            _ => return Seen::Note(encoding, x as u16, y as u16),
        };
        let pixels = if encoding == 16 {
            unpack_zrle(&bytes, width, height)
        } else {
            bytes.chunks(4).map(|pixel| u32::from_le_bytes(pixel.try_into().unwrap())).collect()
        };
        assert_eq!(pixels.len(), width * height);
        for (row, line) in pixels.chunks(width).enumerate() {
            let at = (y + row) * self.size.0 + x;
            self.pixels[at..at + width].copy_from_slice(line);
        }
        Seen::Pixels(Rect { x, y, width, height })
    }

    fn inflate(&mut self, zlib: bool) -> Vec<u8> {
        let length = self.long() as usize;
        let packed = self.read(length);
        let stream = if zlib { &mut self.zlib } else { &mut self.zrle };
        let mut out = Vec::with_capacity(1 << 20);
        stream.decompress_vec(&packed, &mut out, FlushDecompress::Sync).unwrap();
        out
    }
}

/// RFC 6143, 7.7.6, for pixels of three bytes.
fn unpack_zrle(bytes: &[u8], width: usize, height: usize) -> Vec<u32> {
    let mut bytes = bytes.iter().copied();
    let mut next = || usize::from(bytes.next().unwrap());
    let mut out = vec![0; width * height];
    for top in (0..height).step_by(64) {
        for left in (0..width).step_by(64) {
            let (tile_width, tile_height) = (64.min(width - left), 64.min(height - top));
            let color = |next: &mut dyn FnMut() -> usize| (next() | next() << 8 | next() << 16) as u32;
            let length = |next: &mut dyn FnMut() -> usize| {
                let mut length = 1;
                loop {
                    let part = next();
                    length += part;
                    if part != 255 {
                        return length;
                    }
                }
            };
            let kind = next();
            let mut tile = Vec::new();
            let palette: Vec<u32> = (0..if kind == 1 { 1 } else { kind & 127 }).map(|_| color(&mut next)).collect();
            while tile.len() < tile_width * tile_height {
                match kind {
                    0 => tile.push(color(&mut next)),
                    1 => tile.push(palette[0]),
                    2..=16 => {
                        let bits = [1, 1, 2, 2, 4][palette.len().min(5) - 1];
                        let mut row = Vec::new();
                        while row.len() < tile_width {
                            let byte = next();
                            row.extend(
                                (0..8 / bits).map(|at| palette[byte >> (8 - bits * (at + 1)) & ((1 << bits) - 1)]),
                            );
                        }
                        tile.extend(&row[..tile_width]);
                    }
                    128 => {
                        let color = color(&mut next);
                        let length = length(&mut next);
                        tile.resize(tile.len() + length, color);
                    }
                    _ => {
                        let index = next();
                        let length = if index & 128 != 0 { length(&mut next) } else { 1 };
                        tile.resize(tile.len() + length, palette[index & 127]);
                    }
                }
            }
            assert_eq!(tile.len(), tile_width * tile_height);
            for (row, line) in tile.chunks(tile_width).enumerate() {
                let at = (top + row) * width + left;
                out[at..at + tile_width].copy_from_slice(line);
            }
        }
    }
    assert_eq!(bytes.next(), None, "nothing is left over");
    out
}

/// Fills the screen so that every kind of ZRLE tile appears.
fn paint(bench: &Bench, width: usize, height: usize) -> Vec<u32> {
    let mut noise = 12345u32;
    let mut all = Vec::new();
    for y in 0..height {
        for x in 0..width {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let color = match (x / 64 + y / 64 * width.div_ceil(64)) % 7 {
                0 => 0x10_2030,
                1 => {
                    if (x ^ y) & 1 == 0 {
                        0xff_ffff
                    } else {
                        0
                    }
                }
                2 => noise >> 8,
                3 => ((noise >> 28) * 0x11_1111) & 0xff_ffff,
                4 => (x / 16 + y * 4) as u32 * 0x01_0305,
                5 => (y % 50 * 2 + x % 64 / 40) as u32,
                _ => {
                    if y % 64 > 20 {
                        5
                    } else {
                        (x / 30) as u32
                    }
                }
            } & 0xff_ffff;
            bench.pixel(width, x, y, color);
            all.push(color);
        }
    }
    all
}

#[test]
fn every_encoding_shows_the_picture_and_then_only_what_changed() {
    for encoding in [0, 6, 16] {
        let bench = Bench::linear(450, 200);
        let mut expected = paint(&bench, 450, 200);
        let (server, _) = server(&bench);
        let mut client = Client::new(&server);
        assert_eq!(client.size, (450, 200));
        client.encodings(&[encoding]);
        client.ask(false);
        client.update();
        assert!(client.pixels == expected, "encoding {encoding}");
        for round in 0..3 {
            let before = client.bytes_read;
            client.ask(true);
            bench.pixel(450, 100 + round, 70, 0x77_7777);
            expected[70 * 450 + 100 + round] = 0x77_7777;
            let seen = client.update();
            assert_eq!(seen, [Seen::Pixels(Rect { x: 64, y: 64, width: 64, height: 16 })]);
            assert!(client.bytes_read - before <= 4 + 12 + 4 + 64 * 16 * 4, "encoding {encoding}");
            assert!(client.pixels == expected, "encoding {encoding}");
        }
        client.ask(false);
        client.update();
        assert!(client.pixels == expected, "a second viewer-wide update, encoding {encoding}");
    }
}

#[test]
fn a_small_part_can_be_asked_for_and_outside_is_cut() {
    let bench = Bench::linear(640, 480);
    let (server, _) = server(&bench);
    let mut client = Client::new(&server);
    client.ask(false);
    client.update();
    client.stream.write_all(&[3, 0, 2, 0, 1, 0, 0xff, 0xff, 0, 4]).unwrap();
    assert_eq!(client.update(), [Seen::Pixels(Rect { x: 512, y: 256, width: 128, height: 4 })]);
}

#[test]
fn other_pixel_formats_are_served_and_a_colour_map_is_not() {
    let bench = Bench::linear(64, 16);
    bench.pixel(64, 0, 0, 0xff_8000);
    let (server, _) = server(&bench);
    let mut client = Client::new(&server);
    client.stream.write_all(&[0, 0, 0, 0, 16, 16, 1, 1, 0, 31, 0, 63, 0, 31, 11, 5, 0, 0, 0, 0]).unwrap();
    client.ask(false);
    client.read(16);
    assert_eq!(client.read(64 * 16 * 2)[..4], [0xfc, 0x00, 0, 0]);
    client.stream.write_all(&[0, 0, 0, 0, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    until("a colour map ends the viewer", || server.viewers() == 0);
}

#[test]
fn a_mode_change_is_told_as_each_viewer_understands_it() {
    let bench = Bench::linear(640, 480);
    let (server, _) = server(&bench);
    let [mut modern, mut old, mut ancient] = [0; 3].map(|_| Client::new(&server));
    modern.encodings(&[16, -308, -223, -258]);
    old.encodings(&[-223]);
    modern.ask(false);
    let first = modern.update();
    assert_eq!(first[..2], [Seen::Note(-258, 0, 0), Seen::Note(-308, 0, 0)]);
    for client in [&mut old, &mut ancient] {
        client.ask(false);
        client.update();
    }
    modern.stream.write_all(&WISH).unwrap();
    modern.ask(true);
    assert_eq!(modern.update(), [Seen::Note(-308, 1, 1)], "a viewer may not choose the size");
    for client in [&mut modern, &mut old, &mut ancient] {
        client.ask(true);
    }
    bench.set_mode(320, 200);
    assert_eq!(modern.update(), [Seen::Note(-308, 0, 0)]);
    assert_eq!(old.update(), [Seen::Note(-223, 0, 0)]);
    ancient.update();
    assert_eq!(ancient.pixels[100], 0);
    for client in [&mut modern, &mut old] {
        assert_eq!(client.size, (320, 200));
        client.ask(true);
        let strip = |y: usize, height: usize| Seen::Pixels(Rect { x: 0, y, width: 320, height });
        assert_eq!(client.update(), [strip(0, 192), strip(192, 8)]);
    }
    // A wish is answered also when the guest changes its size before that.
    modern.stream.write_all(&WISH).unwrap();
    bench.set_mode(96, 64);
    std::thread::sleep(Duration::from_millis(300));
    modern.ask(true);
    assert_eq!(modern.update(), [Seen::Note(-308, 1, 1), Seen::Note(-308, 0, 0)]);
    assert_eq!(modern.size, (96, 64));
}

#[test]
fn a_viewer_may_wish_for_a_size_where_a_card_can_follow() {
    let gpu = Gpu::new().unwrap();
    let vga = Vga::new().unwrap();
    let screen = Screen::with_gpu(vga, Some(gpu.display()), Box::new(|| ()), Box::new(Vec::new));
    let server = RfbServer::new(screen, Arc::<Notes>::default(), "a guest");
    let mut client = Client::new(&server);
    client.encodings(&[0, -308]);
    client.ask(false);
    client.update();
    client.stream.write_all(&WISH).unwrap();
    client.ask(true);
    assert_eq!(client.update(), [Seen::Note(-308, 1, 4)], "passed on");
    let mut events = [0; 4];
    gpu.read_config(0, &mut events);
    assert_eq!(events, [1, 0, 0, 0], "the driver is told");
}

#[test]
fn continuous_updates_stop_when_nobody_confirms_them() {
    let bench = Bench::linear(64, 64);
    let (server, _) = server(&bench);
    let mut client = Client::new(&server);
    client.encodings(&[0, -312, -313]);
    assert_eq!(client.read(9), [248, 0, 0, 0, 0x80, 0, 0, 0, 0]);
    assert_eq!(client.read(1), [150]);
    client.stream.write_all(&[248, 0, 0, 0, 0x80, 0, 0, 1, 2, 7, 8]).unwrap();
    assert_eq!(client.read(11), [248, 0, 0, 0, 0, 0, 0, 1, 2, 7, 8]);
    client.stream.write_all(&[150, 1, 0, 0, 0, 0, 0, 64, 0, 64]).unwrap();
    let fence = [248, 0, 0, 0, 0x80, 0, 0, 1, 1, 1];
    for color in 1..=3 {
        client.update();
        assert_eq!(client.read(10), fence);
        bench.pixel(64, 0, 0, color);
    }
    client.stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert_eq!(client.from.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    client.stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    client.stream.write_all(&[248, 0, 0, 0, 0, 0, 0, 1, 1, 1]).unwrap();
    client.update();
    assert_eq!(client.pixels[0], 3);
}

#[test]
fn keys_and_pointer_reach_the_guest_and_are_let_go() {
    let bench = Bench::linear(640, 480);
    let (server, notes) = server(&bench);
    let mut client = Client::new(&server);
    client.stream.write_all(&[255, 0, 0, 1, 0, 0, 0, 65, 0, 0, 0, 0x9d]).unwrap();
    client.stream.write_all(&[4, 1, 0, 0, 0, 0, 0, b'a']).unwrap();
    client.stream.write_all(&[5, 1, 2, 127, 1, 223]).unwrap();
    until("three inputs", || lock(&notes.0).len() == 3);
    drop(client);
    until("the viewer has left", || server.viewers() == 0);
    assert_eq!(lock(&notes.0).join(" "), "+e01d +1e 32767,32767 1 0 -1e -e01d 32767,32767 0 0");
}

#[test]
fn old_versions_are_spoken() {
    let bench = Bench::linear(64, 64);
    let (server, _) = server(&bench);
    for (version, security, reply) in
        [("RFB 003.003\n", &[0u8, 0, 0, 1][..], &[][..]), ("RFB 003.007\n", &[1, 1], &[1])]
    {
        let mut stream = connect(&server);
        let mut hello = vec![0; 12 + security.len()];
        stream.write_all(version.as_bytes()).unwrap();
        stream.read_exact(&mut hello).unwrap();
        assert_eq!(&hello[12..], security);
        stream.write_all(reply).unwrap();
        stream.write_all(&[1]).unwrap();
        let mut init = [0; 4];
        stream.read_exact(&mut init).unwrap();
        assert_eq!(init, [0, 64, 0, 64], "{version}");
    }
}

#[test]
fn viewers_come_in_through_a_socket() {
    let bench = Bench::linear(64, 64);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vnc.sock");
    let listener = UnixListener::bind(&path).unwrap();
    serve(listener, Arc::clone(&bench.screen), Arc::new(Notes::default()), "a guest").unwrap();
    let mut hello = [0; 12];
    UnixStream::connect(path).unwrap().read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"RFB 003.008\n");
}

#[test]
fn one_viewer_too_many_hears_why() {
    let bench = Bench::linear(64, 64);
    let (server, _) = server(&bench);
    let viewers: Vec<_> = (0..VIEWERS_MAX).map(|_| Client::new(&server)).collect();
    let mut stream = connect(&server);
    stream.write_all(b"RFB 003.008\n").unwrap();
    let mut said = Vec::new();
    stream.read_to_end(&mut said).unwrap();
    assert_eq!(said[12], 0);
    assert!(String::from_utf8_lossy(&said[17..]).starts_with("Too many viewers"));
    assert_eq!(server.viewers(), VIEWERS_MAX);
    drop(viewers);
    until("all have left", || server.viewers() == 0);
    Client::new(&server);
}

#[test]
fn a_viewer_that_does_not_read_is_closed_and_holds_nobody_up() {
    let bench = Bench::linear(1024, 768);
    let notes = Arc::new(Notes::default());
    let timeout = Duration::from_millis(300);
    let server = Arc::new(RfbServer::with_timeout(Arc::clone(&bench.screen), notes, "a guest", timeout));
    let mut slow = Client::new(&server);
    let mut other = Client::new(&server);
    slow.ask(false);
    for round in 0..10 {
        bench.pixel(1024, 5, 5, round + 1);
        while other.pixels[5 * 1024 + 5] != round + 1 {
            other.ask(round > 0);
            other.update();
        }
    }
    until("the slow one is closed", || server.viewers() == 1);
    drop(slow);
}

#[test]
fn no_bytes_break_the_server() {
    let bench = Bench::linear(128, 64);
    let (server, _) = server(&bench);
    let mut seed = 99u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let kinds = [0, 2, 3, 3, 3, 4, 5, 6, 150, 248, 251, 255];
    for round in 0..120 {
        let mut stream = connect(&server);
        let mut bytes = Vec::new();
        if round % 4 > 0 {
            bytes.extend(b"RFB 003.008\n\x01\x01");
        }
        for _ in 0..200 {
            if round % 4 > 1 {
                bytes.push(kinds[random() as usize % kinds.len()]);
                let length = random() % 24;
                let small = random() % 2 == 0;
                bytes.extend((0..length).map(|_| if small { random() as u8 & 3 } else { random() as u8 }));
            } else {
                bytes.extend(random().to_le_bytes());
            }
        }
        // The server may close before it has read all.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = [0; 4096];
        while matches!(stream.read(&mut answer), Ok(count) if count > 0) {}
    }
    until("all have left", || server.viewers() == 0);
    let mut client = Client::new(&server);
    client.ask(false);
    client.update();
}

#[test]
fn the_end_of_the_guest_closes_every_viewer() {
    let bench = Bench::linear(64, 64);
    let (server, _) = server(&bench);
    let mut client = Client::new(&server);
    client.encodings(&[0, -307]);
    client.ask(false);
    client.update();
    server.set_name("another name");
    client.ask(true);
    assert_eq!(client.update(), [Seen::Note(-307, 0, 0)]);
    client.ask(true);
    server.close_all();
    assert_eq!(client.from.read(&mut [0]).unwrap(), 0);
    until("all have left", || server.viewers() == 0);
    let mut late = connect(&server);
    assert_eq!(late.read(&mut [0]).unwrap(), 0);
}
