//! What clients and files say: bytes, not actions.

use std::{
    fs::File,
    io::{Read, Write},
    net::Shutdown,
    os::unix::{fs::FileExt, net::UnixStream},
    sync::{Arc, LazyLock},
    time::Duration,
};

use crate::{
    engine::{
        agent,
        input::{InputSink, KeyCode},
        memory::{GuestRam, HostRegion},
        rfb::RfbServer,
        screen::Screen,
        suspend::{self, Memory, Reader},
        vga::Vga,
        virtio::console::PortPeer,
    },
    input::Input,
    machine::{RAM_BYTES, file, spec},
    targets::{TARGETS, What},
    wire::{EngineMessage, EngineRequest, EngineStart, HostCall, HostMessage},
};

const VIDEO_BYTES: usize = 64 << 10;

fn crc32(parts: &[&[u8]]) -> u32 {
    let mut crc = flate2::Crc::new();
    parts.iter().for_each(|part| crc.update(part));
    crc.sum()
}

/// The file of a suspended guest. Its check sums are made right, so that what they guard is reached.
pub(crate) fn saved_file(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut whole = Vec::new();
    match input.u8() & 3 {
        0 => whole.extend(input.0),
        1 => {
            let count = input.u16();
            let header = input.bytes(count.into());
            whole.extend(b"INNKEEPER SAVED\n");
            for number in [2, header.len() as u32, crc32(&[header])] {
                whole.extend(number.to_le_bytes());
            }
            whole.extend(header);
            whole.extend(input.0);
        }
        _ => {
            let ram = GuestRam::new(1 << 20).expect("the kernel gives memory");
            let video = HostRegion::new(4096).expect("the kernel gives memory");
            let to = file(0);
            let device = TARGETS.iter().find_map(|target| match &target.what {
                What::Device(device) => Some(device),
                What::Bytes(_) => None,
            });
            let spec = spec(device.expect("there are devices"));
            let memory = Memory { ram: &ram, video: &video };
            suspend::write(&to, &spec, &Vec::new(), &memory, &mut |_| std::ops::ControlFlow::Continue(()))
                .expect("memory takes it");
            let end_bytes = 24;
            whole = read(&to);
            whole.truncate(whole.len() - end_bytes);
            while !input.is_empty() {
                let region = match input.u8() & 7 {
                    0..=2 => 0,
                    3..=4 => 1,
                    5..=6 => u32::MAX,
                    _ => input.u32(),
                };
                let count = if input.u8() & 1 == 0 { input.u8().into() } else { input.u32() };
                let (at, stored) = (input.u64(), if input.u8() & 1 == 0 { count } else { input.u16().into() });
                let run = input.bytes(stored as usize & 0xffff);
                let mut head = Vec::new();
                for number in [region, count, at as u32, (at >> 32) as u32, stored] {
                    head.extend(number.to_le_bytes());
                }
                whole.extend(&head);
                whole.extend(crc32(&[&head, run]).to_le_bytes());
                whole.extend(run);
            }
        }
    }
    let from = file(0);
    from.write_all_at(&whole, 0).expect("memory takes it");
    let Ok(mut reader) = Reader::open(from) else { return };
    let _ = reader.spec().check();
    let _ = (reader.take("pci"), reader.left());
    let ram = GuestRam::new(RAM_BYTES).expect("the kernel gives memory");
    let video = HostRegion::new(VIDEO_BYTES).expect("the kernel gives memory");
    if reader.read_memory(&Memory { ram: &ram, video: &video }).is_ok() {
        reader.spend().expect("memory takes it");
    }
}

fn read(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().expect("it is open").len() as usize];
    file.read_exact_at(&mut bytes, 0).expect("so many are there");
    bytes
}

struct Nobody;
impl InputSink for Nobody {
    fn key(&self, _: KeyCode, _: bool) {}
    fn pointer(&self, _: u16, _: u16, _: u8, _: i8) {}
}

/// How long the server may say nothing before the viewer leaves.
const SILENT: Duration = Duration::from_millis(3);

/// What a viewer of the screen says, from the handshake on. The server has its threads here.
pub(crate) fn rfb(bytes: &[u8]) {
    static SERVER: LazyLock<Arc<RfbServer>> = LazyLock::new(|| {
        let vga = Vga::new().expect("the kernel gives memory");
        vga.lock().expect("nobody panicked").start_in_text_mode();
        let screen = Screen::new(vga, Box::new(|| ()), Box::new(Vec::new));
        RfbServer::new(screen, Arc::new(Nobody), "fuzz")
    });
    let (near, mut viewer) = UnixStream::pair().expect("sockets");
    SERVER.serve(near).expect("threads");
    // One that leaves without having said anything is of no use.
    let mut said = b"RFB 003.008\n\x01\x01".to_vec();
    match bytes.first() {
        Some(first) if first & 0x80 != 0 => said.clear(),
        _ => {}
    }
    said.extend(bytes.get(1..).unwrap_or_default());
    let _ = viewer.write_all(&said);
    let _ = viewer.set_read_timeout(Some(SILENT));
    let mut heard = vec![0; 1 << 16];
    while viewer.read(&mut heard).is_ok_and(|count| count > 0) {}
    let _ = viewer.shutdown(Shutdown::Both);
}

/// Messages between the roles.
pub(crate) fn wire(bytes: &[u8]) {
    let Some((kind, json)) = bytes.split_first() else { return };
    match kind & 7 {
        0 => drop(serde_json::from_slice::<EngineRequest>(json)),
        1 => drop(serde_json::from_slice::<EngineMessage>(json)),
        2 => drop(serde_json::from_slice::<HostCall>(json)),
        3 => drop(serde_json::from_slice::<HostMessage>(json)),
        4 => drop(serde_json::from_slice::<crate::engine::console::Attach>(json)),
        _ => {
            let Ok(start) = serde_json::from_slice::<EngineStart>(json) else { return };
            if start.spec.check().is_ok() {
                start.spec.full_boot_order();
            }
        }
    }
}

/// What the guest's agent says.
pub(crate) fn agent(bytes: &[u8]) {
    let (mut agent, output) = agent::make(Arc::new(|| ())).expect("the kernel gives memory");
    agent.opened(true);
    for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
        match piece {
            [b'!', order, ..] => match order & 3 {
                0 => agent.opened(order & 4 != 0),
                1 => drop(agent.shut_down()),
                2 => drop(agent.set_clock(i64::MAX)),
                _ => drop(agent.news()),
            },
            _ => agent.received(piece),
        }
    }
    agent.news();
    drop(output);
}
