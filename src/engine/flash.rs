//! The flash chip with the variables of UEFI firmware, below the firmware's code: Intel's command set as far as OVMF drives it
//! (Intel 28F005, "basic command set"; OVMF's QemuFlash.c).
//!
//! The guest reads the array through a read-only memory slot, without exits; its writes arrive here. Only while the chip shows
//! its status the slot is away. A byte is programmed as it is, as QEMU does it, where a real chip could only clear bits.

use std::{
    fs::File,
    io::{self, Read, Seek},
    os::unix::fs::FileExt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use super::{
    bus::{Access, BusDevice, BusFault, Effect},
    devices::Board,
    memory::HostRegion,
    saved::{BadState, SaveState, State},
};

/// What one erase command erases.
const BLOCK_BYTES: usize = 4096;
const FLASH_BYTES_MAX: u64 = 4 << 20;
/// A burst of writes is over, and goes to the disk, after this.
const SETTLED: Duration = Duration::from_millis(500);
const STACK_BYTES: usize = 64 << 10;

mod command {
    pub(super) const PROGRAM: u8 = 0x10;
    pub(super) const ERASE: u8 = 0x20;
    pub(super) const PROGRAM_TOO: u8 = 0x40;
    pub(super) const CLEAR_STATUS: u8 = 0x50;
    pub(super) const READ_STATUS: u8 = 0x70;
    pub(super) const ERASE_CONFIRM: u8 = 0xd0;
    pub(super) const READ_ARRAY: u8 = 0xff;
}

mod status {
    pub(super) const READY: u8 = 0x80;
    pub(super) const ERASE_FAILED: u8 = 0x20;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Array,
    Status,
    /// The next write is data.
    Program,
    /// The next write confirms.
    Erase,
}

/// The chip. Its array is what the file has, and the file follows each write.
pub struct Flash {
    array: HostRegion,
    keeper: Keeper,
    board: Arc<dyn Board>,
    mode: Mode,
    status: u8,
    report: Arc<dyn Fn(String) + Send + Sync>,
}

impl Flash {
    /// `file` is the whole array; `report` is told when it cannot be written. Declares the array to the board at `at`.
    ///
    /// Errors: the file cannot be read, or is no flash by its size.
    pub fn new(
        mut file: File,
        at: u64,
        board: Arc<dyn Board>,
        report: Arc<dyn Fn(String) + Send + Sync>,
    ) -> io::Result<Flash> {
        let bytes = file.metadata()?.len();
        if bytes == 0 || bytes > FLASH_BYTES_MAX || !bytes.is_multiple_of(BLOCK_BYTES as u64) {
            return Err(io::Error::other(format!(
                "the file with the firmware's variables has {bytes} bytes: it is damaged"
            )));
        }
        let mut contents = Vec::new();
        file.rewind()?;
        file.by_ref().take(FLASH_BYTES_MAX).read_to_end(&mut contents)?;
        if contents.len() as u64 != bytes {
            return Err(io::Error::other("the file with the firmware's variables changes while it is read"));
        }
        let array = HostRegion::new(contents.len())?;
        array.write(0, &contents);
        board.set_flash(at, &array);
        Ok(Flash { array, keeper: Keeper::new(file)?, board, mode: Mode::Array, status: 0, report })
    }

    pub fn bytes(&self) -> usize {
        self.array.bytes()
    }

    /// As the reset pin: the array is shown again. What it holds stays.
    pub fn reset(&mut self) {
        self.enter(Mode::Array);
        self.status = 0;
    }

    /// What was written is on the disk when this returns, if the disk takes it.
    pub fn close(&mut self) {
        self.keeper.close();
    }

    fn enter(&mut self, mode: Mode) {
        let (before, after) = (self.mode == Mode::Status, mode == Mode::Status);
        self.mode = mode;
        if before != after {
            self.board.show_flash(!after);
        }
    }

    fn program(&mut self, at: usize, data: &[u8]) {
        let fits = self.array.bytes().saturating_sub(at).min(data.len());
        self.store(at, data.get(..fits).unwrap_or_default());
        self.status |= status::READY;
    }

    fn erase(&mut self, at: usize) {
        if at < self.array.bytes() {
            self.store(at / BLOCK_BYTES * BLOCK_BYTES, &[0xff; BLOCK_BYTES]);
        }
        self.status |= status::READY;
    }

    fn store(&mut self, at: usize, data: &[u8]) {
        self.array.write(at, data);
        if let Err(error) = self.keeper.write(&self.array, at, data) {
            (self.report)(format!("the firmware's variables cannot be written: {error}"));
        }
    }
}

impl BusDevice for Flash {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        if self.mode == Mode::Status {
            // Each byte of a wider bus shows the status.
            return Ok(u64::from_le_bytes([self.status; 8]) & at.width.mask());
        }
        // A read that KVM had begun before the slot was back.
        let mut bytes = [0; 8];
        self.array.read(at.offset as usize, bytes.get_mut(..at.width.bytes()).unwrap_or_default());
        Ok(u64::from_le_bytes(bytes))
    }

    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        let offset = at.offset as usize;
        match (self.mode, value as u8) {
            (Mode::Program, _) => {
                self.program(offset, value.to_le_bytes().get(..at.width.bytes()).unwrap_or_default());
                self.enter(Mode::Array);
            }
            (Mode::Erase, command::ERASE_CONFIRM) => {
                self.erase(offset);
                self.enter(Mode::Array);
            }
            (Mode::Erase, _) => {
                self.status |= status::READY | status::ERASE_FAILED;
                self.enter(Mode::Array);
            }
            (_, command::PROGRAM | command::PROGRAM_TOO) => self.enter(Mode::Program),
            (_, command::ERASE) => self.enter(Mode::Erase),
            (_, command::READ_STATUS) => self.enter(Mode::Status),
            (_, command::CLEAR_STATUS) => self.status = 0,
            (_, command::READ_ARRAY) => self.enter(Mode::Array),
            // Commands that no firmware here gives.
            _ => self.enter(Mode::Array),
        }
        Ok(Effect::None)
    }
}

/// The file behind the array. Writes go to it at once, so that the end of this process loses nothing; a thread brings them to
/// the disk once the guest has written no more for a while.
struct Keeper {
    file: Arc<File>,
    /// A write failed: the file is written whole next time.
    behind: bool,
    shared: Arc<(Mutex<Work>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Work {
    /// Counts writes.
    written: u64,
    end: bool,
}

impl Keeper {
    fn new(file: File) -> io::Result<Keeper> {
        let (file, shared) = (Arc::new(file), Arc::new((Mutex::new(Work::default()), Condvar::new())));
        let (theirs, work) = (Arc::clone(&file), Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name("variables".into())
            .stack_size(STACK_BYTES)
            .spawn(move || keep(&theirs, &work))?;
        Ok(Keeper { file, behind: false, shared, thread: Some(thread) })
    }

    fn write(&mut self, array: &HostRegion, at: usize, data: &[u8]) -> io::Result<()> {
        let done = if self.behind { self.write_whole(array) } else { self.file.write_all_at(data, at as u64) };
        self.behind = done.is_err();
        lock(&self.shared.0).written += 1;
        self.shared.1.notify_all();
        done
    }

    fn write_whole(&self, array: &HostRegion) -> io::Result<()> {
        let mut whole = vec![0; array.bytes()];
        array.read(0, &mut whole);
        self.file.write_all_at(&whole, 0)
    }

    fn close(&mut self) {
        lock(&self.shared.0).end = true;
        self.shared.1.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.close();
    }
}

fn lock(work: &Mutex<Work>) -> MutexGuard<'_, Work> {
    work.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread: sleeps until something was written and then nothing more for a while.
fn keep(file: &File, shared: &(Mutex<Work>, Condvar)) {
    let (work, changed) = shared;
    let mut on_disk = 0;
    loop {
        let waiting = lock(work);
        let mut state = changed
            .wait_while(waiting, |state| state.written == on_disk && !state.end)
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            let (seen, end) = (state.written, state.end);
            if end {
                break;
            }
            state = changed
                .wait_timeout_while(state, SETTLED, |state| state.written == seen && !state.end)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            if state.written == seen {
                break;
            }
        }
        let (written, end) = (state.written, state.end);
        drop(state);
        if written != on_disk {
            // Nobody waits for it; a disk that fails says so at the next write.
            let _ = file.sync_data();
            on_disk = written;
        }
        if end {
            return;
        }
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    pub(super) const KIND: &str = "flash";

    /// The array is in its file.
    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) mode: Mode,
        pub(super) status: u8,
    }

    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub(super) enum Mode {
        Array,
        Status,
        Program,
        Erase,
    }
}

impl SaveState for Flash {
    /// What an earlier write did not bring into the file is written now, while this process still has it.
    fn save(&self) -> State {
        let Flash { array, keeper, board: _, mode, status, report } = self;
        if keeper.behind
            && let Err(error) = keeper.write_whole(array)
        {
            report(format!("the firmware's variables cannot be written: {error}"));
        }
        let mode = match mode {
            Mode::Array => saved::Mode::Array,
            Mode::Status => saved::Mode::Status,
            Mode::Program => saved::Mode::Program,
            Mode::Erase => saved::Mode::Erase,
        };
        State::new(saved::KIND, 1, &saved::V1 { mode, status: *status })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { mode, status } = state.fields(saved::KIND, 1)?;
        self.enter(match mode {
            saved::Mode::Array => Mode::Array,
            saved::Mode::Status => Mode::Status,
            saved::Mode::Program => Mode::Program,
            saved::Mode::Erase => Mode::Erase,
        });
        self.status = status & (status::READY | status::ERASE_FAILED);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::engine::{
        bus::Width,
        event::Event,
        irq::{MsiMessage, MsiSink},
        pci::root::Placement,
        saved::testing::{matches_golden, spoil},
    };

    #[derive(Default)]
    struct Shown(Mutex<Vec<bool>>);
    impl Placement for Shown {
        fn place_video_ram(&self, _: Option<u64>) {}
        fn place_doorbell(&self, _: &Event, _: u64, _: bool) {}
    }
    impl MsiSink for Shown {
        fn send(&self, _: MsiMessage) -> io::Result<()> {
            Ok(())
        }
    }
    impl Board for Shown {
        fn set_irq(&self, _: u32, _: bool) {}
        fn set_video_ram(&self, _: &HostRegion) {}
        fn settle_writes(&self) {}
        fn take_dirty_video(&self) -> Vec<u64> {
            Vec::new()
        }
        fn set_flash(&self, _: u64, _: &HostRegion) {}
        fn show_flash(&self, shown: bool) {
            self.0.lock().unwrap().push(shown);
        }
    }

    const AT: u64 = 0xffc0_0000;

    struct Rig {
        flash: Flash,
        shown: Arc<Shown>,
        file: File,
        told: Arc<Mutex<Vec<String>>>,
    }

    fn rig(contents: &[u8]) -> io::Result<Rig> {
        let mut file = tempfile::tempfile()?;
        file.write_all(contents)?;
        on(file)
    }

    fn on(file: File) -> io::Result<Rig> {
        let (shown, told) = (Arc::new(Shown::default()), Arc::new(Mutex::new(Vec::new())));
        let report = Arc::clone(&told);
        let other = file.try_clone()?;
        let report = Arc::new(move |text| report.lock().unwrap().push(text));
        let flash = Flash::new(file, AT, Arc::clone(&shown) as Arc<dyn Board>, report)?;
        Ok(Rig { flash, shown, file: other, told })
    }

    impl Rig {
        fn write(&mut self, at: u64, bytes: &[u8]) {
            for byte in bytes {
                assert_eq!(self.flash.write(Access::new(at, Width::B1), u64::from(*byte)), Ok(Effect::None));
            }
        }
        fn read(&mut self, at: u64) -> u8 {
            self.flash.read(Access::new(at, Width::B1)).unwrap() as u8
        }
        fn in_file(&self, at: u64) -> u8 {
            let mut byte = [0];
            self.file.read_exact_at(&mut byte, at).unwrap();
            byte[0]
        }
    }

    #[test]
    fn the_firmware_finds_a_flash_chip_and_not_ram() {
        let mut rig = rig(&[0xee; 8192]).unwrap();
        // OVMF: clear the status, look, show the status, look, show the array.
        rig.write(0x10, &[0x50]);
        assert_eq!(rig.read(0x10), 0xee);
        rig.write(0x10, &[0x70]);
        assert_eq!(rig.read(0x10), 0);
        assert_eq!(rig.flash.read(Access::new(0x10, Width::B4)), Ok(0));
        rig.write(0x10, &[0xff]);
        assert_eq!(rig.read(0x10), 0xee);
        assert_eq!(*rig.shown.0.lock().unwrap(), [false, true], "the slot is away only meanwhile");
    }

    #[test]
    fn bytes_are_programmed_and_blocks_erased_in_array_and_file() {
        let mut rig = rig(&[0; 8192]).unwrap();
        rig.write(4097, &[0x10, 0xaa]);
        rig.write(4098, &[0x40, 0x55, 0xff]);
        assert_eq!([4096, 4097, 4098].map(|at| rig.read(at)), [0, 0xaa, 0x55]);
        assert_eq!([4096, 4097, 4098].map(|at| rig.in_file(at)), [0, 0xaa, 0x55], "nothing waits in this process");
        rig.write(4200, &[0x20, 0xd0]);
        assert_eq!([0, 4095, 4096, 8191].map(|at| rig.in_file(at)), [0, 0, 0xff, 0xff], "its block alone");
        assert_eq!(rig.read(4097), 0xff);
        rig.write(0, &[0x70]);
        assert_eq!(rig.read(0), status::READY);
        let (file, contents) = (rig.file.try_clone().unwrap(), rig.in_file(8191));
        rig.flash.close();
        drop(rig);
        assert_eq!((on(file).unwrap().read(8191), contents), (0xff, 0xff), "the next start has it");
    }

    #[test]
    fn a_wrong_driver_changes_nothing_it_did_not_address() {
        let mut rig = rig(&[7; 4096]).unwrap();
        // An erase that is not confirmed, unknown commands, data past the end, the widest writes at the very end.
        rig.write(0, &[0x20, 0x10, 0x98, 0xe8, 0x00]);
        assert!((0..4096).all(|at| rig.in_file(at) == 7));
        rig.write(4095, &[0x10]);
        rig.flash.write(Access::new(4095, Width::B8), u64::MAX).unwrap();
        rig.flash.write(Access::new(1 << 40, Width::B1), 0x10).unwrap();
        rig.flash.write(Access::new(1 << 40, Width::B8), 0).unwrap();
        rig.flash.write(Access::new(u64::MAX, Width::B1), 0x20).unwrap();
        rig.flash.write(Access::new(u64::MAX, Width::B1), 0xd0).unwrap();
        assert_eq!((rig.in_file(4094), rig.in_file(4095)), (7, 0xff));
        assert_eq!(rig.file.metadata().unwrap().len(), 4096, "the file keeps its size");
        rig.write(0, &[0x70]);
        rig.flash.reset();
        assert_eq!(rig.read(0), 7);
        assert_eq!(*rig.shown.0.lock().unwrap(), [false, true]);
    }

    #[test]
    fn a_file_of_another_size_is_refused_and_one_that_cannot_be_written_is_told() {
        for bytes in [0, 1, 4095, (FLASH_BYTES_MAX + 4096) as usize] {
            assert!(rig(&vec![0; bytes]).is_err(), "{bytes}");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("variables");
        std::fs::write(&path, [0; 4096]).unwrap();
        let mut rig = on(File::open(&path).unwrap()).unwrap();
        rig.write(0, &[0x10, 0xaa]);
        assert_eq!(rig.read(0), 0xaa, "the guest goes on with what it wrote");
        assert!(rig.told.lock().unwrap()[0].contains("cannot be written"));
    }

    #[test]
    fn a_command_that_was_begun_is_ended_after_a_restore_on_the_same_array() {
        let mut first = rig(&[0; 8192]).unwrap();
        first.write(4097, &[0x10, 0xaa]);
        first.write(4096, &[0x20, 0x00]);
        first.write(4098, &[0x40]);
        let state = matches_golden(&first.flash.save());
        let mut second = on(first.file.try_clone().unwrap()).unwrap();
        second.flash.restore(&state).unwrap();
        assert_eq!(*second.shown.0.lock().unwrap(), [true; 0], "the array is still shown");
        second.write(4098, &[0x55]);
        assert_eq!([4096, 4097, 4098].map(|at| second.read(at)), [0, 0xaa, 0x55]);
        second.write(0, &[0x70]);
        assert_eq!(second.read(0), status::READY | status::ERASE_FAILED);

        let mut third = on(second.file.try_clone().unwrap()).unwrap();
        third.flash.restore(&second.flash.save()).unwrap();
        assert_eq!(*third.shown.0.lock().unwrap(), [false], "the status is shown instead of the array");
        assert_eq!(third.read(0), status::READY | status::ERASE_FAILED);
        spoil(&state, |bad| {
            let mut rig = on(third.file.try_clone().unwrap()).unwrap();
            let _ = rig.flash.restore(bad);
            rig.read(8191);
            rig.write(8191, &[0xd0, 0x70, 0xff]);
        });
    }

    #[test]
    fn what_could_not_be_written_is_written_before_the_guest_sleeps() {
        let mut rig = rig(&[0; 4096]).unwrap();
        let writable = std::mem::replace(&mut rig.flash.keeper.file, Arc::new(File::open("/dev/null").unwrap()));
        rig.write(7, &[0x10, 0xaa]);
        assert_eq!((rig.in_file(7), rig.told.lock().unwrap().len()), (0, 1));
        rig.flash.keeper.file = writable;
        rig.flash.save();
        assert_eq!((rig.in_file(7), rig.told.lock().unwrap().len()), (0xaa, 1));
    }
}
