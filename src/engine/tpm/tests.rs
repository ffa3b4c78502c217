//! The TPM as a driver sees it, in front of a made-up emulator and of the real one.

mod hostile;
mod real;

use std::{
    fs::File,
    io::{Read, Seek, Write},
    thread,
    time::Duration,
};

use super::*;
use crate::engine::{
    bus::Width,
    saved::{
        SaveState,
        testing::{matches_golden, spoil},
    },
    virtio::testing::eventually,
};

pub(super) const DEADLINE: Duration = Duration::from_secs(20);
pub(super) const COMMAND: [u8; 12] = [0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0];
pub(super) const DONE: [u8; 10] = [0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0];

/// How the made-up emulator answers on its control channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Manner {
    Good,
    /// Says nothing to this command.
    Silent(u32),
    /// Ends at this command.
    Ends(u32),
    /// Answers this one with all ones.
    Ones(u32),
}

pub(super) struct Rig {
    pub(super) tpm: Tpm,
    log: File,
    /// What the emulator was asked for: command and first number.
    pub(super) asked: Arc<Mutex<Vec<(u32, u32)>>>,
    /// What it was given as blobs, by type.
    pub(super) blobs: Arc<Mutex<Blobs>>,
    /// The emulator's end of the data channel, until it is taken.
    data: Option<UnixStream>,
}

pub(super) fn rig_with(manner: Manner) -> Rig {
    let (near, far) = UnixStream::pair().unwrap();
    let log = tempfile::tempfile().unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let blobs = Arc::new(Mutex::new(Blobs::default()));
    {
        let mut blobs = blobs.lock().unwrap();
        blobs[0].bytes = b"permanent".to_vec();
        blobs[1] = emulator::Blob { encrypted: true, bytes: b"volatile".to_vec() };
    }
    let (commands, data) = UnixStream::pair().unwrap();
    let (seen, store) = (Arc::clone(&asked), Arc::clone(&blobs));
    thread::spawn(move || _ = answer(far, manner, &seen, &store));
    let tpm = Tpm::new(EmulatorSockets { control: near, commands }, GuestLog::new(log.try_clone().unwrap())).unwrap();
    Rig { tpm, log, asked, blobs, data: Some(data) }
}

pub(super) fn rig() -> Rig {
    rig_with(Manner::Good)
}

/// Gives `None` at the end of the channel.
fn answer(mut control: UnixStream, manner: Manner, asked: &Mutex<Vec<(u32, u32)>>, blobs: &Mutex<Blobs>) -> Option<()> {
    loop {
        let mut number = || {
            let mut bytes = [0; 4];
            control.read_exact(&mut bytes).ok()?;
            Some(u32::from_be_bytes(bytes))
        };
        let command = number()?;
        let wanted = match command {
            0x02 | 0x11 => 1,
            0x0c | 0x0d => 3,
            _ => 0,
        };
        let numbers: Vec<u32> = (0..wanted).map_while(|_| number()).collect();
        let first = numbers.first().copied().unwrap_or_default();
        let mut reply = vec![0; 4];
        match command {
            0x01 => reply = 0xffffu64.to_be_bytes().to_vec(),
            0x11 => reply = [0, first, 0, first].iter().flat_map(|number| number.to_be_bytes()).collect(),
            0x0c => {
                let blob = blobs.lock().unwrap()[numbers[1] as usize - 1].clone();
                // In pieces of at most five bytes.
                let rest: Vec<u8> = blob.bytes.iter().skip(numbers[2] as usize).take(5).copied().collect();
                let result = if blob.bytes.is_empty() { 0x800 } else { 0 };
                let flags = if blob.encrypted { 2 } else { 0 };
                reply = [result, flags, blob.bytes.len() as u32, rest.len() as u32]
                    .iter()
                    .flat_map(|number| number.to_be_bytes())
                    .chain(rest)
                    .collect();
            }
            0x0d => {
                let mut bytes = vec![0; numbers[2] as usize];
                control.read_exact(&mut bytes).ok()?;
                blobs.lock().unwrap()[numbers[1] as usize - 1] = emulator::Blob { encrypted: first & 2 != 0, bytes };
            }
            _ => {}
        }
        asked.lock().unwrap().push((command, first));
        match manner {
            Manner::Ends(at) if at == command => return None,
            Manner::Silent(at) if at == command => continue,
            Manner::Ones(at) if at == command => reply.fill(0xff),
            _ => {}
        }
        control.write_all(&reply).ok()?;
    }
}

impl Rig {
    pub(super) fn get(&mut self, offset: u64) -> u32 {
        self.tpm.read(Access::new(offset, Width::B4)).unwrap() as u32
    }
    pub(super) fn put(&mut self, offset: u64, value: u32) {
        assert_eq!(self.tpm.write(Access::new(offset, Width::B4), value.into()), Ok(Effect::None));
    }
    /// The machine goes on; gives the emulator's end of the data channel.
    pub(super) fn go(&mut self) -> UnixStream {
        self.tpm.hold().release();
        let data = self.data.take().unwrap();
        data.set_read_timeout(Some(DEADLINE)).unwrap();
        data
    }
    /// As SeaBIOS: out of idle.
    pub(super) fn start(&mut self, command: &[u8]) {
        self.put(register::LOC_CTRL, 1);
        for (offset, byte) in command.iter().enumerate() {
            self.tpm.write(Access::new(register::DATA + offset as u64, Width::B1), (*byte).into()).unwrap();
        }
        self.put(register::CTRL_START, 1);
    }
    pub(super) fn wait(&mut self) {
        let tpm = &self.tpm;
        eventually("the end of a command", || !tpm.shared.lock().started);
    }
    pub(super) fn response(&mut self, bytes: u64) -> Vec<u8> {
        (0..bytes).map(|at| self.tpm.read(Access::new(register::DATA + at, Width::B1)).unwrap() as u8).collect()
    }
    pub(super) fn said(&self) -> String {
        let (mut text, mut log) = (String::new(), self.log.try_clone().unwrap());
        log.rewind().unwrap();
        log.read_to_string(&mut text).unwrap();
        text
    }
    pub(super) fn count(&self, command: u32) -> usize {
        self.asked.lock().unwrap().iter().filter(|(other, _)| *other == command).count()
    }
}

/// Takes a command as the emulator.
pub(super) fn take(data: &mut UnixStream) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    let got = data.read(&mut bytes).unwrap();
    bytes.truncate(got);
    bytes
}

#[test]
fn the_registers_say_what_it_is() {
    let mut rig = rig();
    assert_eq!([0x00, 0x0c, 0x44, 0x4c].map(|at| rig.get(at)), [0x81, 0, 2, 0]);
    assert_eq!(
        [0x58, 0x5c, 0x60, 0x64, 0x68, 0x6c].map(|at| rig.get(at)),
        [3968, 0xfed4_0080, 0, 3968, 0xfed4_0080, 0]
    );
    let id = rig.tpm.read(Access::new(0x30, Width::B8)).unwrap();
    assert_eq!((id & 0xf, id >> 4 & 0xf, id >> 8 & 1, id >> 14 & 1, id >> 32 & 0xffff), (1, 1, 0, 1, 0x1014));
    rig.put(register::LOC_CTRL, 1);
    assert_eq!([0x00, 0x0c].map(|at| rig.get(at)), [0x83, 1]);
    rig.put(register::CTRL_REQ, 1);
    assert_eq!([0x40, 0x44].map(|at| rig.get(at)), [0, 0]);
    rig.put(register::CTRL_REQ, 2);
    assert_eq!(rig.get(register::CTRL_STS), 2);
    rig.put(register::LOC_CTRL, 2);
    rig.put(register::CTRL_START, 1);
    assert_eq!([0x00, 0x0c, 0x4c].map(|at| rig.get(at)), [0x81, 0, 0], "nobody has the locality");
}

#[test]
fn a_command_runs_on_the_worker_and_its_response_is_in_the_buffer() {
    let mut rig = rig();
    rig.start(&COMMAND);
    assert_eq!(rig.get(register::CTRL_START), 1, "the machine does not run yet");
    let mut data = rig.go();
    assert_eq!(take(&mut data), COMMAND);
    rig.put(register::DATA, 0x5555_5555);
    rig.put(register::CTRL_START, 1);
    assert_eq!(rig.get(register::CTRL_START), 1);
    // In two pieces.
    data.write_all(&DONE[..4]).unwrap();
    thread::sleep(Duration::from_millis(20));
    data.write_all(&DONE[4..]).unwrap();
    rig.wait();
    assert_eq!(rig.response(10), DONE);
    assert_eq!(rig.get(register::CTRL_STS), 0);
    assert_eq!(rig.asked.lock().unwrap()[..], [(1, 0), (0x11, 3968), (0x0e, 0), (2, 0)]);
    for wrong in [0u32, 9, 3969, u32::MAX] {
        let mut command = COMMAND;
        command[2..6].copy_from_slice(&wrong.to_be_bytes());
        rig.start(&command);
        rig.wait();
        assert_eq!(rig.response(10), [0x80, 1, 0, 0, 0, 10, 0, 0, 1, 0x42]);
    }
    rig.start(&COMMAND);
    assert_eq!(take(&mut data), COMMAND, "nothing of those reached the emulator");
}

#[test]
fn a_command_can_be_cancelled_and_a_pause_leaves_it_running() {
    let mut rig = rig();
    let mut data = rig.go();
    rig.start(&COMMAND);
    take(&mut data);
    let hold = rig.tpm.hold();
    hold.hold();
    rig.put(register::CTRL_CANCEL, 1);
    data.write_all(&DONE).unwrap();
    assert_eq!([register::CTRL_CANCEL, register::CTRL_START].map(|at| rig.get(at)), [1, 1]);
    hold.release();
    rig.wait();
    rig.start(&COMMAND);
    take(&mut data);
    rig.put(register::CTRL_CANCEL, 1);
    let before = rig.count(9);
    eventually("the cancellation", || rig.count(9) > 0);
    assert!(before <= 2);
    data.write_all(&DONE).unwrap();
    rig.wait();
    rig.put(register::CTRL_CANCEL, 0);
    assert_eq!([register::CTRL_CANCEL, register::CTRL_STS].map(|at| rig.get(at)), [0, 0]);
}

#[test]
fn a_reset_in_a_command_waits_for_nobody_and_its_response_is_nobodys() {
    let mut rig = rig();
    let mut data = rig.go();
    rig.start(&COMMAND);
    take(&mut data);
    let hold = rig.tpm.hold();
    for _ in 0..2 {
        hold.hold();
        rig.tpm.reset();
        hold.release();
    }
    assert_eq!([register::LOC_STATE, register::CTRL_START, register::CTRL_STS].map(|at| rig.get(at)), [0x81, 0, 2]);
    let mut next = COMMAND;
    next[11] = 7;
    rig.start(&next);
    eventually("the cancellation", || rig.count(9) == 1);
    data.write_all(&[0x80, 1, 0, 0, 0, 12, 0, 0, 0, 0, 0xaa, 0xaa]).unwrap();
    assert_eq!(take(&mut data), next);
    assert_eq!((rig.count(2), rig.response(12)), (2, next.to_vec()), "reset before the next command");
    assert_eq!(rig.asked.lock().unwrap().iter().filter(|asked| **asked == (2, 0)).count(), 2);
    data.write_all(&DONE).unwrap();
    rig.wait();
    assert_eq!(rig.response(12)[..10], DONE);
}

#[test]
fn a_restored_tpm_goes_on_where_the_first_stopped() {
    let mut rig = super::tests::rig();
    let mut data = rig.go();
    rig.start(&COMMAND);
    take(&mut data);
    rig.put(register::CTRL_CANCEL, 1);
    let hold = rig.tpm.hold();
    hold.hold();
    assert!(hold.settle().unwrap_err().to_string().contains("takes long"));
    data.write_all(&DONE).unwrap();
    hold.settle().unwrap();
    let state = matches_golden(&rig.tpm.save());

    let mut again = super::tests::rig();
    *again.blobs.lock().unwrap() = Blobs::default();
    again.tpm.hold().hold();
    again.tpm.restore(&state).unwrap();
    assert_eq!(*again.blobs.lock().unwrap(), *rig.blobs.lock().unwrap());
    assert_eq!(again.asked.lock().unwrap().last(), Some(&(2, 1)), "what it went on from is forgotten");
    let fields = |state: &crate::engine::saved::State| state.fields::<serde_json::Value>("tpm", 1).unwrap();
    assert!(fields(&again.tpm.save()) == fields(&state), "nothing was lost");
    let mut data = again.go();
    assert_eq!(again.response(10), DONE);
    assert_eq!([0x00, 0x44, 0x48, 0x4c].map(|at| again.get(at)), [0x83, 0, 1, 0]);
    again.put(register::CTRL_START, 1);
    take(&mut data);
    data.write_all(&DONE).unwrap();
    again.wait();
    assert_eq!(again.count(2), 1, "no other power cycle");
}

#[test]
fn no_saved_state_makes_it_panic() {
    let mut first = rig();
    let _data = first.go();
    first.tpm.hold().hold();
    let mut refused = 0;
    spoil(&first.tpm.save(), |bad| {
        let mut rig = super::tests::rig();
        refused += usize::from(rig.tpm.restore(bad).is_err());
        rig.tpm.hold().release();
        rig.start(&COMMAND);
        rig.tpm.reset();
    });
    assert!(refused > 20, "{refused}");
}
