//! COM1: a 16550A serial port (PC16550D data sheet). What the guest prints goes to the console hub at once; what viewers type
//! waits in a bounded queue.

use std::{collections::VecDeque, sync::Arc};

use super::{
    bus::{Access, BusDevice, BusFault, Effect},
    irq::IrqLine,
    saved::{BadState, SaveState, State},
};

/// The receive FIFO of the chip.
const RX_FIFO_BYTES: usize = 16;
/// What viewers typed and the guest has not yet read. More is dropped.
pub const INPUT_BYTES_MAX: usize = 4096;

const IER_RX: u8 = 1;
const IER_TX: u8 = 2;
const IER_LINE: u8 = 4;
const IER_MODEM: u8 = 8;
const IIR_NONE: u8 = 1;
const IIR_MODEM: u8 = 0;
const IIR_TX: u8 = 2;
const IIR_RX: u8 = 4;
const IIR_LINE: u8 = 6;
const IIR_TIMEOUT: u8 = 12;
const IIR_FIFOS: u8 = 0xc0;
const LCR_DLAB: u8 = 0x80;
const LCR_BREAK: u8 = 0x40;
const MCR_LOOP: u8 = 0x10;
const MCR_OUT2: u8 = 0x08;
const LSR_RX: u8 = 1;
const LSR_OVERRUN: u8 = 2;
const LSR_TX_EMPTY: u8 = 0x60;
const MSR_CONNECTED: u8 = 0xb0;
const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RX: u8 = 2;

/// Takes what the guest prints. Called by vCPU threads; returns at once.
pub trait SerialSink: Send + Sync {
    fn guest_wrote(&self, byte: u8);
}

pub struct Uart {
    // wiring
    irq: IrqLine,
    sink: Arc<dyn SerialSink>,
    // what viewers typed
    waiting: VecDeque<u8>,
    dropped: u64,
    // the chip
    fifo: VecDeque<u8>,
    ier: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: u16,
    fifo_enabled: bool,
    trigger: usize,
    overrun: bool,
    modem_delta: u8,
    /// A write to THR, or enabling its interrupt, raises it; reading IIR lowers it.
    tx_interrupt: bool,
}

impl Uart {
    pub fn new(irq: IrqLine, sink: Arc<dyn SerialSink>) -> Uart {
        Uart {
            irq,
            sink,
            waiting: VecDeque::new(),
            dropped: 0,
            fifo: VecDeque::with_capacity(RX_FIFO_BYTES),
            ier: 0,
            lcr: 3,
            mcr: MCR_OUT2,
            scratch: 0,
            divisor: 12,
            fifo_enabled: false,
            trigger: 1,
            overrun: false,
            modem_delta: 0,
            tx_interrupt: false,
        }
    }

    /// Bytes that a viewer typed. Returns how many were dropped because the guest does not read.
    pub fn type_bytes(&mut self, bytes: &[u8]) -> usize {
        let room = INPUT_BYTES_MAX - self.waiting.len();
        let (kept, dropped) = bytes.split_at(room.min(bytes.len()));
        self.waiting.extend(kept);
        self.dropped += dropped.len() as u64;
        self.refill();
        self.sync_irq();
        dropped.len()
    }

    pub fn reset(&mut self) {
        let fresh = Uart::new(self.irq.clone(), Arc::clone(&self.sink));
        *self = fresh;
        self.sync_irq();
    }

    /// Moves waiting bytes into the FIFO, which never overruns: the queue behind it is ours.
    fn refill(&mut self) {
        let capacity = if self.fifo_enabled { RX_FIFO_BYTES } else { 1 };
        while self.fifo.len() < capacity && self.mcr & MCR_LOOP == 0 {
            let Some(byte) = self.waiting.pop_front() else { break };
            self.fifo.push_back(byte);
        }
    }

    /// The most urgent pending interrupt, as IIR shows it.
    fn pending(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.overrun {
            IIR_LINE
        } else if self.ier & IER_RX != 0 && self.fifo.len() >= self.trigger {
            IIR_RX
        } else if self.ier & IER_RX != 0 && !self.fifo.is_empty() {
            // Fewer than the trigger level: the chip waits four characters' time, here none.
            IIR_TIMEOUT
        } else if self.ier & IER_TX != 0 && self.tx_interrupt {
            IIR_TX
        } else if self.ier & IER_MODEM != 0 && self.modem_delta != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    /// OUT2 gates the line on a PC.
    fn sync_irq(&self) {
        let open = self.mcr & MCR_OUT2 != 0 && self.mcr & MCR_LOOP == 0;
        self.irq.set(open && self.pending() != IIR_NONE);
    }

    fn transmit(&mut self, byte: u8) {
        if self.mcr & MCR_LOOP != 0 {
            let capacity = if self.fifo_enabled { RX_FIFO_BYTES } else { 1 };
            if self.fifo.len() < capacity {
                self.fifo.push_back(byte);
            } else {
                self.overrun = true;
            }
        } else if self.lcr & LCR_BREAK == 0 {
            self.sink.guest_wrote(byte);
        }
        self.tx_interrupt = true;
    }

    fn modem_status(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CONNECTED | self.modem_delta;
        }
        // Loopback: RTS to CTS, DTR to DSR, OUT1 to RI, OUT2 to DCD.
        let m = self.mcr;
        (m & 2) << 3 | (m & 1) << 5 | (m & 4) << 4 | (m & 8) << 4
    }

    fn set_fifo_control(&mut self, value: u8) {
        self.fifo_enabled = value & FCR_ENABLE != 0;
        self.trigger = match (self.fifo_enabled, value >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        };
        if value & FCR_CLEAR_RX != 0 {
            self.fifo.clear();
        }
    }
}

impl BusDevice for Uart {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        let dlab = self.lcr & LCR_DLAB != 0;
        let value = match at.offset {
            0 if dlab => self.divisor as u8,
            0 => {
                let byte = self.fifo.pop_front().unwrap_or(0);
                self.refill();
                byte
            }
            1 if dlab => (self.divisor >> 8) as u8,
            1 => self.ier,
            2 => {
                let pending = self.pending();
                if pending == IIR_TX {
                    self.tx_interrupt = false;
                }
                pending | if self.fifo_enabled { IIR_FIFOS } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let rx = if self.fifo.is_empty() { 0 } else { LSR_RX };
                let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
                LSR_TX_EMPTY | rx | overrun
            }
            6 => {
                let status = self.modem_status();
                self.modem_delta = 0;
                status
            }
            7 => self.scratch,
            _ => return Err(BusFault::NoRegister),
        };
        self.sync_irq();
        Ok(u64::from(value))
    }

    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        let value = value as u8;
        let dlab = self.lcr & LCR_DLAB != 0;
        match at.offset {
            0 if dlab => self.divisor = self.divisor & 0xff00 | u16::from(value),
            0 => self.transmit(value),
            1 if dlab => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            1 => {
                // The holding register is always empty, so enabling its interrupt raises it (data sheet, "IER").
                if value & IER_TX != 0 && self.ier & IER_TX == 0 {
                    self.tx_interrupt = true;
                }
                self.ier = value & 15;
            }
            2 => self.set_fifo_control(value),
            3 => self.lcr = value,
            4 => {
                self.mcr = value & 0x1f;
                self.refill();
            }
            5 | 6 => {}
            7 => self.scratch = value,
            _ => return Err(BusFault::NoRegister),
        }
        self.sync_irq();
        Ok(Effect::None)
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    use crate::engine::saved::hex;

    pub(super) const KIND: &str = "uart";

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        #[serde(with = "hex")]
        pub(super) waiting: Vec<u8>,
        #[serde(with = "hex")]
        pub(super) fifo: Vec<u8>,
        pub(super) ier: u8,
        pub(super) lcr: u8,
        pub(super) mcr: u8,
        pub(super) scratch: u8,
        pub(super) divisor: u16,
        pub(super) fifo_enabled: bool,
        pub(super) trigger: u8,
        pub(super) overrun: bool,
        pub(super) modem_delta: u8,
        pub(super) tx_interrupt: bool,
    }
}

impl SaveState for Uart {
    fn save(&self) -> State {
        let Uart {
            irq: _,
            sink: _,
            waiting,
            dropped: _, // a count for people, of this run
            fifo,
            ier,
            lcr,
            mcr,
            scratch,
            divisor,
            fifo_enabled,
            trigger,
            overrun,
            modem_delta,
            tx_interrupt,
        } = self;
        let fields = saved::V1 {
            waiting: waiting.iter().copied().collect(),
            fifo: fifo.iter().copied().collect(),
            ier: *ier,
            lcr: *lcr,
            mcr: *mcr,
            scratch: *scratch,
            divisor: *divisor,
            fifo_enabled: *fifo_enabled,
            trigger: *trigger as u8, // 1, 4, 8 or 14
            overrun: *overrun,
            modem_delta: *modem_delta,
            tx_interrupt: *tx_interrupt,
        };
        State::new(saved::KIND, 1, &fields)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let fields: saved::V1 = state.fields(saved::KIND, 1)?;
        let good = |good: bool, what: &str| BadState::unless(good, saved::KIND, what);
        good(fields.waiting.len() <= INPUT_BYTES_MAX, "more was typed than is kept")?;
        good(fields.fifo.len() <= RX_FIFO_BYTES, "the receive FIFO has more than it holds")?;
        good(matches!(fields.trigger, 1 | 4 | 8 | 14), "the FIFO has no such trigger level")?;
        self.waiting = fields.waiting.into();
        self.fifo = fields.fifo.into();
        self.ier = fields.ier & 15;
        self.lcr = fields.lcr;
        self.mcr = fields.mcr & 0x1f;
        self.scratch = fields.scratch;
        self.divisor = fields.divisor;
        self.fifo_enabled = fields.fifo_enabled;
        self.trigger = usize::from(fields.trigger);
        self.overrun = fields.overrun;
        self.modem_delta = fields.modem_delta & 15;
        self.tx_interrupt = fields.tx_interrupt;
        self.sync_irq();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::engine::{bus::Width, irq::tests::recorder, saved};

    #[derive(Default)]
    struct Printed(Mutex<Vec<u8>>);
    impl SerialSink for Printed {
        fn guest_wrote(&self, byte: u8) {
            self.0.lock().unwrap().push(byte);
        }
    }

    fn port() -> (Uart, Arc<Printed>, Arc<Mutex<Vec<bool>>>) {
        let (irq, levels) = recorder();
        let printed = Arc::new(Printed::default());
        (Uart::new(irq, Arc::clone(&printed) as Arc<dyn SerialSink>), printed, levels)
    }
    fn out(uart: &mut Uart, register: u64, value: u8) {
        uart.write(Access::new(register, Width::B1), u64::from(value)).unwrap();
    }
    fn inb(uart: &mut Uart, register: u64) -> u8 {
        uart.read(Access::new(register, Width::B1)).unwrap() as u8
    }
    fn high(levels: &Mutex<Vec<bool>>) -> bool {
        *levels.lock().unwrap().last().unwrap()
    }

    #[test]
    fn transmitting_prints_and_interrupts() {
        let (mut uart, printed, levels) = port();
        out(&mut uart, 1, IER_TX);
        assert!(high(&levels), "enabling raises it");
        assert_eq!(inb(&mut uart, 2), IIR_TX);
        assert!(!high(&levels), "reading IIR lowers it");
        out(&mut uart, 0, b'x');
        assert!(high(&levels));
        assert_eq!(*printed.0.lock().unwrap(), b"x");
        out(&mut uart, 4, 0);
        assert!(!high(&levels), "OUT2 gates the line");
    }

    #[test]
    fn typed_bytes_arrive_in_order_through_the_fifo() {
        let (mut uart, _, levels) = port();
        out(&mut uart, 2, 0x81);
        out(&mut uart, 1, IER_RX);
        let text: Vec<u8> = (0..100).collect();
        assert_eq!(uart.type_bytes(&text), 0);
        assert!(high(&levels));
        assert_eq!(inb(&mut uart, 2) & 15, IIR_RX);
        let mut seen = Vec::new();
        while inb(&mut uart, 5) & LSR_RX != 0 {
            seen.push(inb(&mut uart, 0));
        }
        assert_eq!(seen, text);
        assert!(!high(&levels));
    }

    #[test]
    fn input_that_nobody_reads_is_bounded() {
        let (mut uart, _, _) = port();
        assert_eq!(uart.type_bytes(&vec![0; INPUT_BYTES_MAX + 10]), 10);
        assert_eq!(uart.type_bytes(b"more"), 3, "one byte went into the chip meanwhile");
    }

    #[test]
    fn loopback_returns_what_is_sent_and_overruns() {
        let (mut uart, printed, _) = port();
        out(&mut uart, 4, MCR_LOOP | 0x0a);
        assert_eq!(inb(&mut uart, 6), 0x90, "RTS and OUT2");
        out(&mut uart, 0, b'a');
        out(&mut uart, 0, b'b');
        assert_eq!(inb(&mut uart, 5), LSR_TX_EMPTY | LSR_RX | LSR_OVERRUN);
        assert_eq!(inb(&mut uart, 0), b'a');
        assert!(printed.0.lock().unwrap().is_empty());
    }

    #[test]
    fn divisor_scratch_and_unknown_registers() {
        let (mut uart, _, _) = port();
        out(&mut uart, 3, LCR_DLAB | 3);
        out(&mut uart, 0, 1);
        out(&mut uart, 1, 0);
        assert_eq!((inb(&mut uart, 0), inb(&mut uart, 1)), (1, 0));
        out(&mut uart, 3, 3);
        out(&mut uart, 7, 0xa5);
        assert_eq!(inb(&mut uart, 7), 0xa5);
        assert_eq!(uart.read(Access::new(8, Width::B1)), Err(BusFault::NoRegister));
        uart.reset();
        assert_eq!(inb(&mut uart, 7), 0);
    }

    /// In loopback for a moment, with an overrun; then with input that waits behind a full FIFO.
    fn busy() -> Uart {
        let (mut uart, ..) = port();
        out(&mut uart, 4, MCR_LOOP | MCR_OUT2);
        out(&mut uart, 0, b'L');
        out(&mut uart, 0, b'M');
        out(&mut uart, 4, MCR_OUT2 | 3);
        out(&mut uart, 3, LCR_DLAB | 3);
        out(&mut uart, 0, 6);
        out(&mut uart, 7, 0x5a);
        out(&mut uart, 2, 0x81);
        out(&mut uart, 3, 3);
        out(&mut uart, 1, IER_RX | IER_TX | IER_LINE);
        uart.type_bytes(b"0123456789abcdefghij");
        uart
    }

    #[test]
    fn a_restored_port_goes_on_with_what_was_typed_and_its_interrupts() {
        let state = saved::testing::matches_golden(&busy().save());
        let (mut uart, printed, levels) = port();
        uart.restore(&state).unwrap();
        assert!(high(&levels));
        assert_eq!(inb(&mut uart, 2), IIR_LINE | IIR_FIFOS);
        assert_eq!(inb(&mut uart, 5), LSR_TX_EMPTY | LSR_RX | LSR_OVERRUN);
        let mut text = Vec::new();
        while inb(&mut uart, 5) & LSR_RX != 0 {
            text.push(inb(&mut uart, 0));
        }
        assert_eq!(text, b"L0123456789abcdefghij");
        assert_eq!(inb(&mut uart, 2), IIR_TX | IIR_FIFOS);
        assert!(!high(&levels));
        assert_eq!(inb(&mut uart, 7), 0x5a);
        out(&mut uart, 3, LCR_DLAB | 3);
        assert_eq!(inb(&mut uart, 0), 6);
        assert!(printed.0.lock().unwrap().is_empty(), "nothing is printed twice");
    }

    #[test]
    fn no_saved_state_makes_it_panic() {
        saved::testing::spoil(&busy().save(), |bad| {
            let (mut uart, ..) = port();
            let _ = uart.restore(bad);
            uart.type_bytes(&[7; 100]);
            for register in 0..8 {
                inb(&mut uart, register);
                out(&mut uart, register, 0xff);
                inb(&mut uart, register);
            }
        });
    }
}
