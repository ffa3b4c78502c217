//! The register file (317453, section 13): offsets, bits, which of them are stored, and what a reset leaves.
//!
//! Every register is one atomic number, so that the worker reads what a vCPU wrote without a lock. Registers whose access
//! does something are in `mod.rs`; what is not named here reads as zero and ignores writes.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{
    super::{memory::Gpa, saved::BadState},
    saved::{RegistersV1, check},
};

pub(super) const CTRL: u32 = 0x0000;
/// CTRL once more (13.4.1).
pub(super) const CTRL_DUP: u32 = 0x0004;
pub(super) const STATUS: u32 = 0x0008;
pub(super) const EECD: u32 = 0x0010;
pub(super) const EERD: u32 = 0x0014;
pub(super) const CTRL_EXT: u32 = 0x0018;
pub(super) const MDIC: u32 = 0x0020;
const FCAL: u32 = 0x0028;
const FCAH: u32 = 0x002c;
const FCT: u32 = 0x0030;
pub(super) const VET: u32 = 0x0038;
pub(super) const ICR: u32 = 0x00c0;
const ITR: u32 = 0x00c4;
pub(super) const ICS: u32 = 0x00c8;
pub(super) const IMS: u32 = 0x00d0;
pub(super) const IMC: u32 = 0x00d8;
pub(super) const RCTL: u32 = 0x0100;
const FCTTV: u32 = 0x0170;
const TXCW: u32 = 0x0178;
pub(super) const TCTL: u32 = 0x0400;
const TIPG: u32 = 0x0410;
const AIT: u32 = 0x0458;
const LEDCTL: u32 = 0x0e00;
const PBA: u32 = 0x1000;
const FCRTL: u32 = 0x2160;
const FCRTH: u32 = 0x2168;
pub(super) const RDT: u32 = RX_RING + TAIL;
const RDTR: u32 = 0x2820;
const RXDCTL: u32 = 0x2828;
const RADV: u32 = 0x282c;
const RSRPD: u32 = 0x2c00;
pub(super) const TDT: u32 = TX_RING + TAIL;
const TIDV: u32 = 0x3820;
const TXDCTL: u32 = 0x3828;
const TADV: u32 = 0x382c;
const TSPMT: u32 = 0x3830;
pub(super) const RXCSUM: u32 = 0x5000;
pub(super) const MTA: u32 = 0x5200;
pub(super) const RAL: u32 = 0x5400;
pub(super) const VFTA: u32 = 0x5600;
const WUC: u32 = 0x5800;
const WUFC: u32 = 0x5808;
const MANC: u32 = 0x5820;
const IPAV: u32 = 0x5838;
const IP4AT: u32 = 0x5840;
const IP6AT: u32 = 0x5880;

/// Where the registers of a descriptor ring begin: RDBAL and TDBAL.
pub(super) const RX_RING: u32 = 0x2800;
pub(super) const TX_RING: u32 = 0x3800;
// Inside a ring's registers.
const BASE_LOW: u32 = 0x00;
const BASE_HIGH: u32 = 0x04;
const LENGTH: u32 = 0x08;
const HEAD: u32 = 0x10;
const TAIL: u32 = 0x18;

// CTRL (13.4.1).
const CTRL_FD: u32 = 1 << 0;
pub(super) const CTRL_SLU: u32 = 1 << 6;
const CTRL_SPEED_1000: u32 = 2 << 8;
pub(super) const CTRL_RST: u32 = 1 << 26;
pub(super) const CTRL_VME: u32 = 1 << 30;
pub(super) const CTRL_PHY_RST: u32 = 1 << 31;
/// CTRL_EXT: the EEPROM is read anew.
pub(super) const CTRL_EXT_EE_RST: u32 = 1 << 13;

// STATUS (13.4.2): what of it never changes, and the link.
pub(super) const STATUS_FD: u32 = 1 << 0;
pub(super) const STATUS_LU: u32 = 1 << 1;
/// Speed and auto-detected speed are 1000 Mb/s.
pub(super) const STATUS_SPEED_1000: u32 = 2 << 6 | 2 << 8;

// RCTL (13.4.22).
pub(super) const RCTL_EN: u32 = 1 << 1;
pub(super) const RCTL_UPE: u32 = 1 << 3;
pub(super) const RCTL_MPE: u32 = 1 << 4;
pub(super) const RCTL_LPE: u32 = 1 << 5;
pub(super) const RCTL_BAM: u32 = 1 << 15;
pub(super) const RCTL_VFE: u32 = 1 << 18;
pub(super) const RCTL_BSEX: u32 = 1 << 25;
pub(super) const RCTL_SECRC: u32 = 1 << 26;
const RCTL_STORED: u32 = 0x06df_b3fe;

// TCTL (13.4.33).
pub(super) const TCTL_EN: u32 = 1 << 1;
pub(super) const TCTL_PSP: u32 = 1 << 3;
const TCTL_STORED: u32 = 0x03ff_fffa;

// RXCSUM (13.4.32).
pub(super) const RXCSUM_IPOFL: u32 = 1 << 8;
pub(super) const RXCSUM_TUOFL: u32 = 1 << 9;

/// RAH: the entry is valid.
pub(super) const RAH_AV: u32 = 1 << 31;
const RAH_STORED: u32 = 0x8003_ffff;
/// How many exact addresses the receive filter has.
pub(super) const ADDRESSES: u32 = 16;

/// Where the statistics are.
const STATISTICS_AT: u32 = 0x4000;
const STATISTICS_END: u32 = 0x4100;

/// Statistics (13.7): 32-bit numbers that stay at their top and are zero after they were read.
pub(super) mod counter {
    /// By size: up to 64 bytes with the frame check sequence, 127, 255, 511, 1023, and more.
    pub(in super::super) const PRC: [u32; 6] = [0x405c, 0x4060, 0x4064, 0x4068, 0x406c, 0x4070];
    pub(in super::super) const GPRC: u32 = 0x4074;
    pub(in super::super) const BPRC: u32 = 0x4078;
    pub(in super::super) const MPRC: u32 = 0x407c;
    pub(in super::super) const GPTC: u32 = 0x4080;
    pub(in super::super) const RNBC: u32 = 0x40a0;
    pub(in super::super) const ROC: u32 = 0x40ac;
    pub(in super::super) const TPR: u32 = 0x40d0;
    pub(in super::super) const TPT: u32 = 0x40d4;
    pub(in super::super) const PTC: [u32; 6] = [0x40d8, 0x40dc, 0x40e0, 0x40e4, 0x40e8, 0x40ec];
    pub(in super::super) const MPTC: u32 = 0x40f0;
    pub(in super::super) const BPTC: u32 = 0x40f4;
    pub(in super::super) const TSCTC: u32 = 0x40f8;
    pub(in super::super) const TSCTFC: u32 = 0x40fc;
}

/// Octets, whose upper half is at the next register; reading that makes both zero.
#[derive(Debug, Clone, Copy)]
pub(super) enum Octets {
    GoodReceived,
    GoodSent,
    Received,
    Sent,
}

/// GORCL, GOTCL, TORL and TOTL, in the order of `Octets`.
const OCTETS_AT: [u32; 4] = [0x4088, 0x4090, 0x40c0, 0x40c8];

/// What the registers are after power on and after CTRL.RST (13.4 and onwards, "initial value"); all others are zero. PBA is
/// 48 KiB for what is received and 16 KiB for what is sent.
const RESET: [(u32, u32); 7] = [
    (CTRL, CTRL_FD | CTRL_SPEED_1000),
    (VET, 0x8100),
    (TIPG, 0x0060_2008),
    (LEDCTL, 0x0706_8302),
    (PBA, 0x0010_0030),
    (RXDCTL, 0x0101_0000),
    (TSPMT, 0x0100_0400),
];

/// The bits that a register keeps of what is written.
fn stored(at: u32) -> u32 {
    match at {
        CTRL => !CTRL_RST,
        CTRL_EXT => !CTRL_EXT_EE_RST,
        RCTL => RCTL_STORED,
        TCTL => TCTL_STORED,
        FCAH | FCT | VET | ITR | FCTTV | AIT | PBA | RDTR | RADV | TIDV | TADV => 0xffff,
        FCRTH => 0xfff8,
        FCRTL => 0x8000_fff8,
        TXCW => 0xc000_ffff,
        TIPG => 0x3fff_ffff,
        RSRPD => 0xfff,
        RXCSUM => 0x3ff,
        FCAL | LEDCTL | RXDCTL | TXDCTL | TSPMT | WUC | WUFC | MANC | IPAV => u32::MAX,
        RX_RING..=RDT | TX_RING..=TDT => match at & 0xff {
            BASE_LOW => !0xf,
            BASE_HIGH => u32::MAX,
            LENGTH => 0x000f_ff80,
            HEAD | TAIL => 0xffff,
            _ => 0,
        },
        RAL..0x5480 => {
            if at & 4 == 0 {
                u32::MAX
            } else {
                RAH_STORED
            }
        }
        MTA..0x5400 | VFTA..0x5800 | IP6AT..0x5890 => u32::MAX,
        IP4AT..0x5860 if at & 4 == 0 => u32::MAX,
        _ => 0,
    }
}

/// The bits that can be set in a register; none where there is no register.
fn possible(at: u32) -> u32 {
    let initial = RESET.iter().find(|(reset, _)| *reset == at).map_or(0, |(_, value)| *value);
    match at {
        _ if !at.is_multiple_of(4) => 0,
        STATISTICS_AT..STATISTICS_END => u32::MAX,
        _ => stored(at) | initial,
    }
}

/// No register that is stored is behind this.
const STORED_BYTES: u32 = 0x5900;

/// The registers that both sides know.
pub(super) struct Registers {
    words: Box<[AtomicU32]>,
    octets: [AtomicU64; 4],
}

impl Registers {
    pub(super) fn new() -> Registers {
        let words = (0..STORED_BYTES / 4).map(|_| AtomicU32::new(0)).collect();
        Registers { words, octets: [const { AtomicU64::new(0) }; 4] }
    }

    /// What the guest reads at `at`, a multiple of 4. Statistics are zero afterwards.
    pub(super) fn read(&self, at: u32) -> u32 {
        for (octets, low) in self.octets.iter().zip(OCTETS_AT) {
            if at == low {
                return octets.load(Ordering::Acquire) as u32;
            }
            if at == low + 4 {
                return (octets.swap(0, Ordering::AcqRel) >> 32) as u32;
            }
        }
        match at {
            STATISTICS_AT..STATISTICS_END => self.word(at).map_or(0, |word| word.swap(0, Ordering::AcqRel)),
            _ => self.get(at),
        }
    }

    /// Keeps what `stored` says of a guest's write.
    pub(super) fn write(&self, at: u32, value: u32) {
        let mask = stored(at);
        if mask != 0 {
            self.set(at, value & mask);
        }
    }

    pub(super) fn get(&self, at: u32) -> u32 {
        self.word(at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Sets a register whatever its writable bits are.
    pub(super) fn set(&self, at: u32, value: u32) {
        if let Some(word) = self.word(at) {
            word.store(value, Ordering::Release);
        }
    }

    /// Counts one event.
    pub(super) fn count(&self, at: u32) {
        if let Some(word) = self.word(at) {
            let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |before| before.checked_add(1));
        }
    }

    pub(super) fn count_octets(&self, which: Octets, bytes: u64) {
        if let Some(octets) = self.octets.get(which as usize) {
            let _ = octets.fetch_update(Ordering::AcqRel, Ordering::Acquire, |before| before.checked_add(bytes));
        }
    }

    /// The state after power on or CTRL.RST, with the first exact address of the EEPROM (`ral`, `rah`).
    pub(super) fn reset(&self, [ral, rah]: [u32; 2]) {
        for word in &self.words {
            word.store(0, Ordering::Release);
        }
        for octets in &self.octets {
            octets.store(0, Ordering::Release);
        }
        for (at, value) in RESET {
            self.set(at, value);
        }
        self.set(RAL, ral);
        self.set(RAL + 4, rah);
    }

    pub(super) fn save(&self) -> RegistersV1 {
        let Registers { words, octets } = self;
        let words = (0..).step_by(4).zip(words).map(|(at, word)| (at, word.load(Ordering::Acquire)));
        RegistersV1 {
            words: words.filter(|(_, value)| *value != 0).collect(),
            octets: octets.each_ref().map(|octets| octets.load(Ordering::Acquire)),
        }
    }

    /// Whatever a driver can write is as harmless as when it writes it.
    pub(super) fn restore(&self, saved: RegistersV1) -> Result<(), BadState> {
        let RegistersV1 { words, octets } = saved;
        check(words.iter().all(|(at, value)| value & !possible(*at) == 0), "a register that cannot be so")?;
        for word in &self.words {
            word.store(0, Ordering::Release);
        }
        for (at, value) in words {
            self.set(at, value);
        }
        for (place, octets) in self.octets.iter().zip(octets) {
            place.store(octets, Ordering::Release);
        }
        Ok(())
    }

    fn word(&self, at: u32) -> Option<&AtomicU32> {
        self.words.get(at as usize / 4)
    }
}

pub(super) const DESCRIPTOR_BYTES: u64 = 16;

/// A descriptor ring as its registers describe it at one moment (3.2.6, 3.4): from `head` up to, without, `tail` the
/// descriptors are the card's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ring {
    base: u64,
    /// How many descriptors it has; more than `head` and `tail`.
    pub(super) count: u32,
    pub(super) head: u32,
    pub(super) tail: u32,
}

impl Ring {
    /// `None` when a pointer is outside the ring, or the ring is empty: nothing can be done with it.
    pub(super) fn of(registers: &Registers, at: u32) -> Option<Ring> {
        let base = u64::from(registers.get(at + BASE_HIGH)) << 32 | u64::from(registers.get(at + BASE_LOW));
        let count = registers.get(at + LENGTH) / DESCRIPTOR_BYTES as u32;
        let (head, tail) = (registers.get(at + HEAD), registers.get(at + TAIL));
        (head < count && tail < count).then_some(Ring { base, count, head, tail })
    }

    /// How many descriptors the card has.
    pub(super) fn len(&self) -> u32 {
        (self.tail + self.count - self.head) % self.count
    }

    /// Where descriptor `index` is; anything when the ring reaches behind the end of the address space, and RAM is not there.
    pub(super) fn descriptor(&self, index: u32) -> Gpa {
        Gpa(self.base.wrapping_add(u64::from(index) * DESCRIPTOR_BYTES))
    }

    pub(super) fn next(&self, index: u32) -> u32 {
        if index + 1 < self.count { index + 1 } else { 0 }
    }
}

pub(super) fn set_head(registers: &Registers, ring: u32, head: u32) {
    registers.set(ring + HEAD, head);
}

/// The register that counts frames of this length, of six by size.
pub(super) fn by_size(counters: [u32; 6], bytes: usize) -> u32 {
    let [to_64, to_127, to_255, to_511, to_1023, more] = counters;
    match bytes {
        0..=64 => to_64,
        65..=127 => to_127,
        128..=255 => to_255,
        256..=511 => to_511,
        512..=1023 => to_1023,
        _ => more,
    }
}
