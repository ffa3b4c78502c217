//! The controller's registers (NVM Express 1.4, section 3.1), as the driver writes them.

use super::{
    super::{memory::Gpa, saved::BadState},
    saved::{RegistersV1, check},
};

/// Entries of a queue, at most. CAP.MQES says one less.
pub(super) const ENTRIES_MAX: u32 = 1024;
/// `log2` of a submission and of a completion entry's bytes, which are all that this controller takes.
const IOSQES: u32 = 6;
const IOCQES: u32 = 4;

const CAP: u64 = 0x00;
const VS: u64 = 0x08;
pub(super) const INTMS: u64 = 0x0c;
pub(super) const INTMC: u64 = 0x10;
const CC: u64 = 0x14;
pub(super) const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
pub(super) const DOORBELLS: u64 = 0x1000;

/// Time-out, in units of 500 ms: a reset waits for the command that runs, so the host's slowest answer counts.
const CAP_TIMEOUT: u64 = 120;
/// MQES, contiguous queues only (CQR), time-out, the NVM command set; doorbell stride, MPSMIN and MPSMAX are 0.
const CAP_VALUE: u64 = (ENTRIES_MAX as u64 - 1) | 1 << 16 | CAP_TIMEOUT << 24 | 1 << 37;
/// 1.4.
pub(super) const VERSION: u32 = 0x0001_0400;

const CC_ENABLE: u32 = 1 << 0;
/// CSS, MPS and AMS: only 0 is supported of each.
const CC_ONLY_ZERO: u32 = 0x3ff0;
const CC_SHUTDOWN: u32 = 3 << 14;
/// The bits that are not reserved.
const CC_WRITABLE: u32 = 0x00ff_fff1;
const AQA_WRITABLE: u32 = 0x0fff_0fff;
/// The bits of an admin queue's address that are zero.
const ADDRESS_RESERVED: u64 = 0xfff;

/// What a register write asks of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    Nothing,
    Enable,
    Disable,
    ShutDown,
}

/// Where the admin queues are; not yet checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AdminQueues {
    pub(super) submission: Gpa,
    pub(super) submission_entries: u32,
    pub(super) completion: Gpa,
    pub(super) completion_entries: u32,
    /// CC asks for nothing that the controller has not.
    pub(super) configuration_fits: bool,
}

/// All zero after power on.
#[derive(Default)]
pub(super) struct Registers {
    cc: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    /// CSTS.RDY.
    ready: bool,
}

impl Registers {
    pub(super) fn ready(&self) -> bool {
        self.ready
    }
    pub(super) fn set_ready(&mut self, ready: bool) {
        self.ready = ready;
    }

    pub(super) fn entry_sizes_fit(&self) -> bool {
        self.cc >> 16 & 0xff == IOCQES << 4 | IOSQES
    }

    pub(super) fn admin_queues(&self) -> AdminQueues {
        AdminQueues {
            submission: Gpa(self.asq),
            submission_entries: (self.aqa & 0xfff) + 1,
            completion: Gpa(self.acq),
            completion_entries: (self.aqa >> 16 & 0xfff) + 1,
            configuration_fits: self.cc & CC_ONLY_ZERO == 0,
        }
    }

    pub(super) fn save(&self) -> RegistersV1 {
        let Registers { cc, aqa, asq, acq, ready } = *self;
        RegistersV1 { cc, aqa, asq, acq, ready }
    }

    pub(super) fn restore(&mut self, saved: RegistersV1) -> Result<(), BadState> {
        let RegistersV1 { cc, aqa, asq, acq, ready } = saved;
        let reserved = cc & !CC_WRITABLE != 0 || aqa & !AQA_WRITABLE != 0 || (asq | acq) & ADDRESS_RESERVED != 0;
        check(!reserved, "a reserved bit")?;
        check(!ready || cc & CC_ENABLE != 0, "a controller that is ready and not enabled")?;
        *self = Registers { cc, aqa, asq, acq, ready };
        Ok(())
    }

    /// Registers that are not there, and doorbells, read as zero.
    pub(super) fn read(&self, offset: u64) -> u32 {
        let half = |value: u64, start: u64| (value >> (8 * (offset - start))) as u32;
        match offset {
            0x00 | 0x04 => half(CAP_VALUE, CAP),
            VS => VERSION,
            CC => self.cc,
            AQA => self.aqa,
            0x28 | 0x2c => half(self.asq, ASQ),
            0x30 | 0x34 => half(self.acq, ACQ),
            _ => 0,
        }
    }

    /// What is read-only, or not there, stays as it is. The admin queues' registers are kept over a controller reset, and
    /// changing them while the controller works has no effect before the next one.
    pub(super) fn write(&mut self, offset: u64, value: u32) -> Wish {
        let wide = u64::from(value);
        match offset {
            CC => return self.configure(value & CC_WRITABLE),
            AQA => self.aqa = value & AQA_WRITABLE,
            0x28 => self.asq = self.asq & !0xffff_ffff | wide & !ADDRESS_RESERVED,
            0x2c => self.asq = self.asq & 0xffff_ffff | wide << 32,
            0x30 => self.acq = self.acq & !0xffff_ffff | wide & !ADDRESS_RESERVED,
            0x34 => self.acq = self.acq & 0xffff_ffff | wide << 32,
            _ => {}
        }
        Wish::Nothing
    }

    fn configure(&mut self, cc: u32) -> Wish {
        let before = std::mem::replace(&mut self.cc, cc);
        match (before & CC_ENABLE != 0, cc & CC_ENABLE != 0) {
            (true, false) => Wish::Disable,
            (false, true) => Wish::Enable,
            _ if cc & CC_SHUTDOWN != 0 && before & CC_SHUTDOWN == 0 => Wish::ShutDown,
            _ => Wish::Nothing,
        }
    }
}
