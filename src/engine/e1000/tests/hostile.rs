//! Drivers that do what no driver should, and resets, disabling and pauses at the worst moment.

use std::{
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};

use super::*;

/// Descriptors of the ring's first packet, each ready to be sent.
fn fill_ring(driver: &mut Driver) {
    for index in 0..RING_LEN {
        let descriptor = [OUT.to_le_bytes(), (EOP | RS | 60).to_le_bytes()].concat();
        driver.ram.write(Gpa(TX_RING + 16 * index), &descriptor).unwrap();
    }
}

#[test]
fn rings_outside_ram_move_nothing() {
    let mut driver = Driver::new();
    for (low, high) in [(0xa_0000, 0), (RAM_BYTES as u32, 0), (0, 1), (0xffff_fff0, u32::MAX), (0, 0x8000_0000)] {
        driver.start(RCTL_SECRC);
        driver.write(RDBAL, low);
        driver.write(RDBAH, high);
        driver.write(TDBAL, low);
        driver.write(TDBAH, high);
        driver.write(RDT, 5);
        driver.write(TDT, 5);
        driver.arrive(&frame(MAC.0, 60));
        eventually("RNBC", || driver.read(0x40a0) == 1);
        assert_eq!((driver.read(RDH), driver.read(TDH)), (0, 0));
        driver.start(RCTL_BAM | RCTL_SECRC);
        driver.works();
    }
}

#[test]
fn lengths_and_pointers_that_do_not_fit_move_nothing() {
    let mut driver = Driver::new();
    // Length, head, tail.
    for (length, head, tail) in [
        (0, 0, 5),
        (0, 0, 0),
        (128, 8, 3),
        (128, 0, 8),
        (128, 0xffff, 0xffff),
        (0xffff_ffff, 0xffff, 3),
        (0xffff_ffff, 3, 0xffff),
    ] {
        driver.start(RCTL_SECRC);
        fill_ring(&mut driver);
        for (ring, tail_at) in [(RDLEN, RDT), (TDLEN, TDT)] {
            driver.write(ring, length);
            driver.write(ring + 8, head);
            driver.write(tail_at, tail);
        }
        driver.arrive(&frame(MAC.0, 60));
        eventually("RNBC", || driver.read(0x40a0) == 1);
        assert_eq!((driver.read(RDH), driver.read(TDH)), (head, head), "{length:#x}");
        driver.start(RCTL_BAM | RCTL_SECRC);
        driver.works();
    }
}

#[test]
fn a_ring_of_the_greatest_length_ends_with_the_last_of_it() {
    let mut driver = Driver::new();
    driver.write(RCTL, 0);
    for (ring, at) in [(RDBAL, 0x40_0000), (TDBAL, 0x60_0000)] {
        driver.write(ring, at);
        driver.write(ring + 8, u32::MAX);
    }
    driver.write(RDT, 0xfff7);
    driver.write(RCTL, RCTL_EN | RCTL_SECRC);
    // No descriptor has an address.
    driver.arrive(&frame(MAC.0, 60));
    eventually("RNBC", || driver.read(0x40a0) == 1);
    driver.write(TDT, 0xfff7);
    eventually("empty descriptors are done", || driver.read(TDH) == 0xfff7);
    driver.start(RCTL_BAM | RCTL_SECRC);
    driver.works();
}

#[test]
fn buffers_outside_ram_are_neither_read_nor_written() {
    let mut driver = Driver::new();
    for at in [0xa_0000, 0x9_ffff, RAM_BYTES - 1, 1 << 63, u64::MAX - 10, u64::MAX] {
        driver.queue(at, EOP | RS | 60);
        driver.queue(OUT, 60);
        driver.queue(at, DATA | EOP | RS | 0xf_ffff);
        driver.send();
        driver.nothing_sent();
        driver.describe_buffer(at);
        driver.write(RDT, driver.rx_tail as u32);
        driver.arrive(&frame(MAC.0, 60));
        let index = driver.rx_next;
        eventually("the descriptor", || driver.rx_status(index) & DD != 0);
        driver.rx_next = (index + 1) % RING_LEN;
        driver.works();
    }
}

#[test]
fn a_packet_that_is_too_long_or_too_short_is_dropped_whole() {
    let mut driver = Driver::new();
    for bytes in [0, 1, 13] {
        driver.queue(OUT, EOP | RS | bytes);
    }
    driver.send();
    // Never an end: all of it is taken and dropped.
    for _ in 0..100 {
        driver.queue(OUT, DATA | RS | 0xf_ffff);
        driver.queue(OUT, 0xffff);
        driver.queue(OUT, 0xf << 20 | CONTEXT | RS | 0xffff);
        driver.send();
    }
    driver.queue(OUT, EOP | RS | 60);
    driver.send();
    driver.queue(OUT, DATA | EOP | RS | 16_385);
    driver.send();
    driver.nothing_sent();
    driver.works();
}

#[test]
fn offloads_that_make_no_sense_do_no_harm() {
    let mut driver = Driver::new();
    let whole = frame(BROADCAST, 600);
    driver.ram.write(Gpa(OUT), &whole).unwrap();
    let options = DATA | IXSM | TXSM | EOP | RS | 600;
    // Data without any context.
    driver.queue(OUT, options);
    driver.send();
    assert_eq!(driver.sent(), whole);
    driver.queue(OUT, options | TSE);
    driver.send();
    driver.nothing_sent();
    // Contexts without data, over and over.
    for _ in 0..3 {
        for _ in 0..5 {
            driver.queue(u64::MAX, CONTEXT | TSE | RS);
        }
        driver.send();
    }
    // Header and MSS: zero, longer than the packet, longer than a frame.
    for (header, mss) in [(54, 0), (0, 100), (13, 100), (0, 0), (0xff, 0xffff)] {
        driver.queue(0, CONTEXT | TSE | TCP | IPV4 | header << 40 | mss << 48);
        driver.queue(OUT, options | TSE);
        driver.send();
        if header != 0xff {
            driver.nothing_sent();
        }
    }
    assert_eq!(driver.sent().len(), 600, "one segment: the header is 255 bytes, the rest is less than the MSS");
    driver.queue(0, CONTEXT | TSE | 0xffu64 << 40 | 1 << 48);
    driver.queue(OUT, DATA | TSE | EOP | RS | 255);
    driver.send();
    driver.queue(0, CONTEXT | TSE | 54u64 << 40 | 0xffff << 48);
    driver.queue(OUT, DATA | TSE | EOP | RS | 20_000);
    driver.send();
    driver.nothing_sent();
    // Every place of the headers behind the end.
    for low in [u64::MAX, 0x00ff_ffff_00ff_ffff, 0xffff_0000_ffff_0000, 0x0000_ff00_0000_ff00] {
        for kind in [0, TSE, TSE | TCP, TSE | IPV4, TSE | TCP | IPV4] {
            driver.queue(low, CONTEXT | kind | 60u64 << 40 | 200 << 48);
            driver.queue(OUT, options | kind & TSE);
            driver.send();
            let frames = if kind == 0 { 1 } else { 3 };
            for _ in 0..frames {
                driver.sent();
            }
        }
    }
    driver.works();
}

#[test]
fn a_segment_of_one_byte_each_can_be_stopped() {
    let mut driver = Driver::new();
    driver.queue(0, CONTEXT | TSE | TCP | IPV4 | 54u64 << 40 | 1 << 48);
    driver.queue(OUT, DATA | TSE | IXSM | TXSM | EOP | RS | 65_000);
    driver.kick();
    driver.sent();
    assert_ne!(driver.read(TDH), driver.read(TDT), "the socket is full");
    driver.start(RCTL_BAM | RCTL_SECRC);
    driver.works();
}

#[test]
fn nothing_is_sent_or_written_after_a_reset() {
    type Stop = fn(&mut Driver);
    let stops: [Stop; 3] = [
        |driver| driver.write(CTRL, CTRL_RST),
        |driver| driver.card.reset(),
        |driver| {
            driver.write(TCTL, 0);
            driver.write(RCTL, 0);
        },
    ];
    for (number, stop) in stops.into_iter().enumerate() {
        let mut driver = Driver::new();
        // A packet whose end is not there, a frame that the host does not take, and one that has no descriptor.
        driver.queue(0, CONTEXT | TSE | TCP | IPV4 | 54u64 << 40 | 1 << 48);
        let last = driver.queue(OUT, DATA | TSE | EOP | RS | 65_000);
        driver.kick();
        driver.sent();
        driver.arrive(&frame(MAC.0, 60));
        eventually("RNBC", || driver.read(0x40a0) == 1);
        stop(&mut driver);
        driver.drain();
        driver.write(RDT, 3);
        driver.write(TDT, 3);
        driver.nothing_sent();
        assert_eq!((driver.rx_status(0), driver.tx_status(last)), (0, 0), "way {number}");
        assert!(!driver.is_high());
        driver.start(RCTL_BAM | RCTL_SECRC);
        // The half of a packet is gone too.
        driver.works();
    }
}

#[test]
fn half_a_packet_is_gone_after_the_transmitter_was_disabled() {
    let mut driver = Driver::new();
    driver.queue(OUT, 100);
    driver.send();
    driver.write(TCTL, 0);
    driver.write(TCTL, TCTL_EN);
    driver.works();
}

#[test]
fn a_pause_moves_nothing_and_loses_nothing() {
    let mut driver = Driver::new();
    let io = driver.card.io();
    driver.offer(3);
    io.quiesce();
    io.quiesce();
    driver.arrive(&frame(MAC.0, 60));
    driver.ram.write(Gpa(OUT), &frame(BROADCAST, 60)).unwrap();
    driver.queue(OUT, EOP | RS | 60);
    driver.kick();
    thread::sleep(Duration::from_millis(50));
    driver.nothing_sent();
    assert_eq!((driver.read(TDH), driver.rx_status(0)), (0, 0));
    io.resume();
    assert_eq!(driver.sent(), frame(BROADCAST, 60));
    assert_eq!(driver.received().bytes, frame(MAC.0, 60));
    // A reset while it is paused is done when the pause ends.
    io.quiesce();
    driver.card.reset();
    driver.kick();
    io.resume();
    driver.nothing_sent();
    driver.start(RCTL_BAM | RCTL_SECRC);
    driver.works();
}

#[test]
fn a_pause_in_the_middle_of_a_packet_goes_on_with_it() {
    let mut driver = Driver::new();
    let io = driver.card.io();
    driver.queue(0, CONTEXT | TSE | TCP | IPV4 | 54u64 << 40 | 10 << 48);
    driver.queue(OUT, DATA | TSE | EOP | RS | (54 + 20_000));
    driver.kick();
    for _ in 0..1000 {
        assert_eq!(driver.sent().len(), 64);
        io.quiesce();
        io.resume();
    }
    for _ in 1000..2000 {
        assert_eq!(driver.sent().len(), 64);
    }
    eventually("the packet is done", || driver.read(TDH) == driver.read(TDT));
    driver.nothing_sent();
}

#[test]
fn pauses_resets_and_a_driver_at_once_leave_it_working() {
    let mut driver = Driver::new();
    let (io, far) = (driver.card.io(), driver.tap.try_clone().unwrap());
    let over = Arc::new(AtomicBool::new(false));
    far.set_nonblocking(true).unwrap();
    let stop = Arc::clone(&over);
    let traffic = thread::spawn(move || {
        while !stop.load(Ordering::Acquire) {
            let _ = far.send(&[&[0; HEADER_BYTES], &frame(MAC.0, 100)[..]].concat());
            while far.recv(&mut [0; 100]).is_ok() {}
        }
    });
    let stop = Arc::clone(&over);
    let pauses = thread::spawn(move || {
        while !stop.load(Ordering::Acquire) {
            io.quiesce();
            io.resume();
        }
    });
    let (tell, told) = mpsc::channel();
    let rounds = thread::spawn(move || {
        for round in 0..300 {
            driver.start(RCTL_BAM | RCTL_SECRC);
            fill_ring(&mut driver);
            driver.offer(7);
            driver.write(IMS, u32::MAX);
            driver.write(TDT, 7);
            match round % 4 {
                0 => driver.write(CTRL, CTRL_RST),
                1 => driver.card.reset(),
                2 => driver.write(RDLEN, 0),
                _ => driver.write(TCTL, 0),
            }
        }
        tell.send(()).unwrap();
        driver
    });
    let done = told.recv_timeout(DEADLINE);
    over.store(true, Ordering::Release);
    traffic.join().unwrap();
    pauses.join().unwrap();
    assert_eq!(done, Ok(()), "nobody waits for ever");
    let mut driver = rounds.join().unwrap();
    driver.card.reset();
    driver.drain();
    // Frames of before may still be on their way in.
    driver.start(RCTL_UPE | RCTL_MPE | RCTL_SECRC);
    eventually("they are gone", || {
        driver.offer(1);
        driver.received_soon().is_none()
    });
}

impl Driver {
    /// A frame, unless none comes for a while.
    fn received_soon(&mut self) -> Option<Received> {
        let end = std::time::Instant::now() + Duration::from_millis(50);
        while self.rx_status(self.rx_next) & DD == 0 {
            if std::time::Instant::now() > end {
                return None;
            }
            thread::sleep(Duration::from_micros(100));
        }
        Some(self.received())
    }
}

/// xorshift64, so that a failure can be had again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

const INTERESTING: [u32; 28] = [
    CTRL, 4, STATUS, EECD, EERD, 0x18, MDIC, 0x38, ICR, ICS, IMS, IMC, RCTL, TCTL, RDBAL, RDBAH, RDLEN, RDH, RDT,
    TDBAL, TDBAH, TDLEN, TDH, TDT, RXCSUM, MTA, RAL, VFTA,
];

#[test]
fn random_accesses_never_panic_and_never_hang() {
    for seed in 1..9 {
        let mut random = Random(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed));
        let mut driver = Driver::new();
        driver.tap.set_nonblocking(true).unwrap();
        for _ in 0..4000 {
            let at = if random.below(8) == 0 { random.next() as u32 & 0x1_fffc } else { random.pick(&INTERESTING) };
            let value = match random.below(5) {
                0 => random.next() as u32,
                1 => random.below(16) as u32,
                2 => random.pick(&[0, u32::MAX, 1 << 31, TX_RING as u32, RX_RING as u32, 128, 0xf_ff80]),
                3 => RCTL_EN | random.next() as u32 & 0x0700_8000,
                _ => 1 << random.below(32),
            };
            match random.below(12) {
                0..6 => driver.write(at, value),
                6..8 => drop(driver.read(at)),
                8 => {
                    // A descriptor of anything, somewhere in the rings.
                    let ring = random.pick(&[RX_RING, TX_RING]) + 16 * random.below(RING_LEN);
                    let anywhere = random.next();
                    let low = random.pick(&[OUT, 0, RAM_BYTES - 30, anywhere, 0x0032_2122_0021_180e]);
                    let high = random.next() & 0xffff_ffff_ffff_07ff | random.pick(&[0, DATA, CONTEXT]);
                    driver.ram.write(Gpa(ring), &[low.to_le_bytes(), high.to_le_bytes()].concat()).unwrap();
                }
                9 => {
                    drop(driver.tap.send(
                        &[&[0; HEADER_BYTES], &ipv4(6, MAC.0, &vec![7; random.below(3000) as usize])[..]].concat(),
                    ))
                }
                10 => while driver.tap.recv(&mut [0; 100]).is_ok() {},
                _ => {
                    let width = random.pick(&[Width::B1, Width::B2, Width::B4, Width::B8]);
                    let access = Access::new(random.below(0x2_0010), width);
                    let bar = random.below(3) as u8;
                    let _ = driver.card.bar_read(bar, access);
                    let _ = driver.card.bar_write(bar, access, random.next());
                }
            }
        }
        driver.tap.set_nonblocking(false).unwrap();
        // What still waited in the socket must not come first.
        driver.card.reset();
        let (near, tap) = UnixDatagram::pair().unwrap();
        tap.set_read_timeout(Some(DEADLINE)).unwrap();
        driver.tap = tap;
        driver.card = card(near.into(), NetworkBackend::Tap, &driver.ram, &driver.line);
        driver.start(RCTL_BAM | RCTL_SECRC);
        driver.works();
    }
}

#[test]
fn registers_may_change_while_the_worker_runs() {
    let mut driver = Driver::new();
    let far = driver.tap.try_clone().unwrap();
    far.set_nonblocking(true).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&over);
    let traffic = thread::spawn(move || {
        while !stop.load(Ordering::Acquire) {
            let _ = far.send(&[&[0; HEADER_BYTES], &frame(BROADCAST, 1000)[..]].concat());
            while far.recv(&mut [0; 100]).is_ok() {}
        }
    });
    let mut random = Random(77);
    fill_ring(&mut driver);
    for _ in 0..20_000 {
        let ring = random.pick(&[RDBAL, TDBAL]);
        let (at, value) = match random.below(6) {
            0 => (ring, random.pick(&[RX_RING as u32, TX_RING as u32, u32::MAX])),
            1 => (ring + 8, random.pick(&[0, 128, 256, u32::MAX])),
            2 => (ring + 16, random.below(20) as u32),
            3 => {
                (RCTL, random.pick(&[RCTL_EN | RCTL_BAM, RCTL_EN | RCTL_BAM | RCTL_BSEX | 3 << 16, RCTL_EN | 3 << 16]))
            }
            _ => (ring + 24, random.below(8) as u32),
        };
        driver.write(at, value);
    }
    over.store(true, Ordering::Release);
    traffic.join().unwrap();
    driver.start(RCTL_BAM | RCTL_SECRC);
    driver.drain();
    driver.send_frame(&frame(BROADCAST, 60));
    assert_eq!(driver.sent(), frame(BROADCAST, 60));
}
