//! Against `swtpm` itself.

use std::{
    os::fd::{AsFd, AsRawFd},
    path::Path,
    process::{Child, Command},
};

use super::*;
use crate::wire;

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn made(folder: &Path) -> Option<(Rig, Process)> {
    let (near, far) = UnixStream::pair().unwrap();
    rustix::io::fcntl_setfd(&far, rustix::io::FdFlags::empty()).unwrap();
    let child = Command::new("/usr/bin/swtpm")
        .args(["socket", "--tpm2", "--terminate"])
        .arg("--tpmstate")
        .arg(format!("dir={},mode=0600", folder.display()))
        .arg("--ctrl")
        .arg(format!("type=unixio,clientfd={}", far.as_raw_fd()))
        .spawn();
    let child = Process(child.ok()?);
    drop(far);
    let (commands, theirs) = UnixStream::pair().unwrap();
    // CMD_SET_DATAFD, as hostd does it.
    wire::send_bytes(&near, &0x10u32.to_be_bytes(), &[theirs.as_fd()]).unwrap();
    (&near).read_exact(&mut [0; 4]).unwrap();
    let log = tempfile::tempfile().unwrap();
    let tpm = Tpm::new(EmulatorSockets { control: near, commands }, GuestLog::new(log.try_clone().unwrap())).unwrap();
    Some((Rig { tpm, log, asked: Arc::default(), blobs: Arc::default(), data: None }, child))
}

fn run(rig: &mut Rig, command: &[u8]) -> Vec<u8> {
    rig.start(command);
    rig.wait();
    assert_eq!(rig.get(register::CTRL_STS), 0, "{}", rig.said());
    let bytes = u32::from_be_bytes(rig.response(6)[2..].try_into().unwrap());
    let response = rig.response(bytes.into());
    assert_eq!(response[6..10], [0; 4], "{command:02x?}");
    response
}

/// PCR 16 in SHA-256.
fn pcr(rig: &mut Rig) -> Vec<u8> {
    let read = [&[0x80, 1, 0, 0, 0, 20, 0, 0, 1, 0x7e][..], &[0, 0, 0, 1, 0, 0x0b, 3, 0, 0, 1]].concat();
    let response = run(rig, &read);
    response[response.len() - 32..].to_vec()
}

#[test]
fn swtpm_starts_up_gives_random_bytes_and_goes_on_in_another_process() {
    if !Path::new("/usr/bin/swtpm").exists() {
        println!("skipped: swtpm is not installed");
        return;
    }
    let random = [0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 16];
    let folder = tempfile::tempdir().unwrap();
    let (mut rig, first) = made(folder.path()).expect("swtpm runs");
    rig.tpm.hold().release();
    run(&mut rig, &COMMAND);
    let (a, b) = (run(&mut rig, &random), run(&mut rig, &random));
    assert!(a.len() == 28 && a != b);
    let mut extend = vec![0x80, 2, 0, 0, 0, 65, 0, 0, 1, 0x82, 0, 0, 0, 16, 0, 0, 0, 9];
    extend.extend([0x40, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0x0b]);
    extend.extend([0xaa; 32]);
    run(&mut rig, &extend);
    let extended = pcr(&mut rig);
    assert_ne!(extended, [0; 32]);
    let hold = rig.tpm.hold();
    hold.hold();
    hold.settle().unwrap();
    let state = rig.tpm.save();
    drop((rig, first));

    let (mut rig, _second) = made(folder.path()).expect("swtpm runs");
    rig.tpm.hold().hold();
    rig.tpm.restore(&state).unwrap();
    rig.tpm.hold().release();
    assert_eq!(pcr(&mut rig), extended, "it went on without another startup");
    let hold = rig.tpm.hold();
    hold.hold();
    rig.tpm.reset();
    hold.release();
    run(&mut rig, &COMMAND);
    assert_eq!(pcr(&mut rig), [0; 32], "a reset clears it");
}
