//! Identity, EEPROM, PHY, registers, interrupts and statistics, as drivers find them.

use super::*;

fn io(offset: u64) -> Access {
    Access::new(offset, Width::B4)
}

#[test]
fn it_is_an_82540em() {
    let driver = Driver::cold();
    let id = driver.card.identity();
    assert_eq!((id.vendor, id.device, id.class, id.revision, id.interrupt_pin), (0x8086, 0x100e, 0x02_0000, 3, 1));
    let [memory, ports] = driver.card.bars() else { panic!("two BARs") };
    assert_eq!((memory.index, memory.size_bytes, memory.kind), (0, 128 << 10, BarKind::Registers));
    assert_eq!((ports.index, ports.size_bytes, ports.kind), (1, 64, BarKind::Io));
}

/// As iPXE reads a word.
fn eerd(driver: &mut Driver, word: u32) -> u16 {
    driver.write(EERD, word << 8 | 1);
    let value = driver.read(EERD);
    assert_eq!((value & 0x10, value & 2), (0x10, 0), "done, in the way of this card");
    (value >> 16) as u16
}

/// One clock of the Microwire bus, as Linux makes it. Gives the bit that the chip shows while the clock is high.
fn clock(driver: &mut Driver, data_in: u32) -> bool {
    driver.write(EECD, 0x42 | data_in << 2);
    driver.write(EECD, 0x43 | data_in << 2);
    let bit = driver.read(EECD) & 8 != 0;
    driver.write(EECD, 0x42 | data_in << 2);
    bit
}

/// Clocks a command of nine bits in and a word out. Gives what shows at the end of the command, and the word.
fn microwire(driver: &mut Driver, command: u32) -> (bool, u16) {
    driver.write(EECD, 0x40);
    assert_eq!(driver.read(EECD) & 0x3c0, 0x1c0, "granted, present, 64 words");
    driver.write(EECD, 0x42);
    // Before the start bit, zeros mean nothing.
    clock(driver, 0);
    let shown = (0..9).rev().fold(false, |_, bit| clock(driver, command >> bit & 1));
    let word = (0..16).fold(0, |word, _| word << 1 | u16::from(clock(driver, 0)));
    driver.write(EECD, 0x40);
    driver.write(EECD, 0);
    assert_eq!(driver.read(EECD) & 0x80, 0);
    (shown, word)
}

#[test]
fn the_eeprom_has_address_and_checksum_by_both_ways() {
    let mut driver = Driver::cold();
    let words: Vec<u16> = (0..64).map(|word| eerd(&mut driver, word)).collect();
    assert_eq!(words[..3], [0x5452, 0x0100, 0x0302]);
    assert_eq!(words.iter().fold(0u16, |sum, word| sum.wrapping_add(*word)), 0xbaba);
    assert_eq!((words[0x0b], words[0x0c], words[0x0d], words[0x0e]), (0x1100, 0x1af4, 0x100e, 0x8086));
    for (number, word) in words.iter().enumerate() {
        assert_eq!(microwire(&mut driver, 0x180 | number as u32), (false, *word), "word {number}");
    }
    assert_eq!([eerd(&mut driver, 64), eerd(&mut driver, 255)], [0, 0]);
    driver.write(EERD, 0x300);
    assert_eq!(driver.read(EERD), 0x300, "nothing is read without START");
}

#[test]
fn the_eeprom_is_write_protected() {
    let mut driver = Driver::cold();
    let before = eerd(&mut driver, 1);
    microwire(&mut driver, 0x130); // enable writes
    for command in [0x141, 0x1c1, 0x110, 0x120] {
        microwire(&mut driver, command);
    }
    driver.write(EECD, 0x42);
    assert_ne!(driver.read(EECD) & 8, 0, "ready: a driver does not wait for a write");
    assert_eq!(eerd(&mut driver, 1), before);
    assert_eq!(microwire(&mut driver, 0x181), (false, before));
}

#[test]
fn the_first_receive_address_is_the_eeproms() {
    let mut driver = Driver::cold();
    for _ in 0..2 {
        assert_eq!((driver.read(RAL), driver.read(RAL + 4)), (0x0100_5452, 0x8000_0302));
        driver.write(RAL, 0);
        driver.write(RAL + 4, 0xffff_ffff);
        assert_eq!((driver.read(RAL), driver.read(RAL + 4)), (0, 0x8003_ffff));
        driver.write(CTRL, CTRL_RST);
    }
    driver.write(RAL, 0);
    driver.write(0x18, 1 << 13); // CTRL_EXT.EE_RST
    assert_eq!((driver.read(RAL), driver.read(0x18)), (0x0100_5452, 0));
}

fn phy_read(driver: &mut Driver, register: u32) -> u16 {
    driver.write(MDIC, 2 << 26 | 1 << 21 | register << 16);
    let value = driver.read(MDIC);
    assert_eq!(value >> 16, 0x1820 | register, "ready, no error");
    value as u16
}

fn phy_write(driver: &mut Driver, register: u32, value: u16) {
    driver.write(MDIC, 1 << 26 | 1 << 21 | register << 16 | u32::from(value));
    assert_eq!(driver.read(MDIC) >> 28 & 5, 1);
}

#[test]
fn the_phy_has_a_gigabit_link() {
    let mut driver = Driver::cold();
    assert_eq!([phy_read(&mut driver, 2), phy_read(&mut driver, 3) & 0xfff0], [0x0141, 0x0c20]);
    assert_eq!(phy_read(&mut driver, 1) & 0x24, 0x24, "link up, negotiation complete");
    assert_eq!(phy_read(&mut driver, 17) & 0xec00, 0xac00, "1000 Mb/s, full duplex, resolved, link");
    assert_eq!(phy_read(&mut driver, 10) & 0x3800, 0x3800, "the partner can 1000 Mb/s");
    assert_eq!(phy_read(&mut driver, 5) & 0x0c00, 0, "no pause frames");
    assert_eq!(driver.read(STATUS), 0x283, "full duplex, link up, 1000 Mb/s");
    for phy in [0, 2, 31] {
        driver.write(MDIC, 2 << 26 | phy << 21 | 2 << 16);
        assert_eq!(driver.read(MDIC) >> 28 & 5, 5, "no PHY there: error");
    }
    for operation in [0, 3] {
        driver.write(MDIC, operation << 26 | 1 << 21);
        assert_eq!(driver.read(MDIC) >> 28 & 5, 5);
    }
    for register in 0..32 {
        phy_write(&mut driver, register, 0x7fff);
    }
    assert_eq!([phy_read(&mut driver, 2), phy_read(&mut driver, 10)], [0x0141, 0x7c00], "read-only");
    assert_eq!(
        (driver.read(STATUS) & 2, phy_read(&mut driver, 1) & 0x24, phy_read(&mut driver, 17) & 0x400),
        (0, 0, 0)
    );
    phy_write(&mut driver, 0, 0x8000);
    assert_eq!((phy_read(&mut driver, 0), phy_read(&mut driver, 4)), (0x1140, 0x0de1), "after its reset");
}

#[test]
fn a_driver_is_told_when_the_link_may_have_changed() {
    let mut driver = Driver::cold();
    assert_eq!(driver.read(ICR), 0);
    type Change = fn(&mut Driver);
    let changes: [Change; 5] = [
        |driver| driver.write(CTRL, CTRL_SLU),
        |driver| phy_write(driver, 0, 0x1340),
        |driver| phy_write(driver, 0, 0x1940),
        |driver| phy_write(driver, 0, 0x9140),
        |driver| driver.write(CTRL, 1 << 31),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        change(&mut driver);
        assert_eq!(driver.read(ICR), LSC, "change {number}");
    }
    assert_eq!(phy_read(&mut driver, 0), 0x1140);
    phy_write(&mut driver, 0, 0x1140);
    driver.write(CTRL, 1 << 31);
    assert_eq!(driver.read(ICR), 0, "nothing changed");
    driver.write(MDIC, 1 << 29 | 2 << 26 | 1 << 21);
    assert_eq!(driver.read(ICR), 1 << 9, "the end of an access, when asked for");
}

#[test]
fn ports_reach_every_register() {
    let mut driver = Driver::cold();
    driver.card.bar_write(1, io(0), STATUS.into()).unwrap();
    assert_eq!(driver.card.bar_read(1, io(0)), Ok(STATUS.into()));
    assert_eq!(driver.card.bar_read(1, io(4)), Ok(0x283));
    driver.card.bar_write(1, io(0), MTA.into()).unwrap();
    driver.card.bar_write(1, io(4), 0x1234_5678).unwrap();
    assert_eq!(driver.read(MTA), 0x1234_5678);
    for outside in [0x2_0000, 0xffff_ffff] {
        driver.card.bar_write(1, io(0), outside).unwrap();
        assert_eq!(driver.card.bar_read(1, io(4)), Err(BusFault::NoRegister));
        assert_eq!(driver.card.bar_write(1, io(4), 0), Err(BusFault::NoRegister));
    }
    assert_eq!(driver.card.bar_read(1, io(8)), Err(BusFault::NoRegister));
    for (bar, at, width) in
        [(0, 0, Width::B1), (0, 0, Width::B8), (0, 2, Width::B4), (1, 4, Width::B2), (0, 1, Width::B2)]
    {
        assert_eq!(driver.card.bar_read(bar, Access::new(at, width)), Err(BusFault::BadWidth));
        assert_eq!(driver.card.bar_write(bar, Access::new(at, width), 0), Err(BusFault::BadWidth));
    }
    assert_eq!(driver.card.bar_read(0, io(0x2_0000)), Err(BusFault::NoRegister));
}

#[test]
fn registers_keep_the_bits_that_they_have() {
    let mut driver = Driver::cold();
    let bits = [
        (0x28, u32::MAX),
        (0x2c, 0xffff),
        (0x30, 0xffff),
        (0x38, 0xffff),
        (0x170, 0xffff),
        (0x410, 0x3fff_ffff),
        (0x2160, 0x8000_fff8),
        (0x2168, 0xfff8),
        (RDBAL, 0xffff_fff0),
        (RDBAH, u32::MAX),
        (RDLEN, 0x000f_ff80),
        (RDH, 0xffff),
        (RDT, 0xffff),
        (0x2820, 0xffff),
        (TDBAL, 0xffff_fff0),
        (TDBAH, u32::MAX),
        (TDLEN, 0x000f_ff80),
        (0x3820, 0xffff),
        (RAL + 0x78, u32::MAX),
        (RAL + 0x7c, 0x8003_ffff),
        (MTA + 0x1fc, u32::MAX),
        (VFTA + 0x1fc, u32::MAX),
        (TCTL, 0x03ff_fffa),
        (RCTL, 0x06df_b3fe),
        // Read-only, or not there.
        (0x1004, 0),
        (0x280c, 0),
        (0x281c, 0),
        (0x4004, 0),
        (0x5480, 0),
        (0x5900, 0),
        (0x1_fffc, 0),
    ];
    for (at, mask) in bits {
        for pattern in [0xa5a5_a5a5, 0x5a5a_5a5a, 0, u32::MAX] {
            driver.write(at, pattern);
            assert_eq!(driver.read(at), pattern & mask, "{at:#x} of {pattern:#x}");
        }
    }
    driver.write(STATUS, 0);
    assert_eq!(driver.read(STATUS), 0x283);
    driver.write(0x0004, 0x40);
    assert_eq!((driver.read(CTRL), driver.read(4)), (0x40, 0x40), "CTRL is there twice");
    driver.write(CTRL, CTRL_RST);
    assert_eq!((driver.read(RCTL), driver.read(TCTL), driver.read(MTA + 0x1fc)), (0, 0, 0));
    assert_eq!((driver.read(0x1000), driver.read(0x38)), (0x0010_0030, 0x8100));
}

#[test]
fn the_line_is_high_while_an_unmasked_cause_is_set() {
    let mut driver = Driver::cold();
    driver.write(ICS, TXDW | RXT0);
    assert!(!driver.is_high(), "masked");
    driver.write(IMS, RXT0);
    assert!(driver.is_high());
    assert_eq!((driver.read(IMS), driver.read(IMC)), (RXT0, 0));
    driver.write(IMC, RXT0);
    assert!(!driver.is_high());
    driver.write(IMS, RXT0);
    assert!(driver.is_high());
    assert_eq!(driver.read(ICR), TXDW | RXT0);
    assert!(!driver.is_high(), "lowered by the read");
    assert_eq!(driver.read(ICR), 0);
    driver.write(ICS, u32::MAX);
    driver.write(ICR, RXT0);
    assert!(!driver.is_high(), "cleared by a write");
    assert_eq!(driver.read(ICR), 0x1_ffff & !RXT0);
    driver.write(ICS, RXT0);
    driver.card.reset();
    assert!(!driver.is_high());
    assert_eq!((driver.read(IMS), driver.read(ICR)), (0, 0));
}

#[test]
fn statistics_count_both_ways_and_are_zero_after_they_were_read() {
    let mut driver = Driver::new();
    driver.offer(4);
    for (to, bytes) in [(MAC.0, 60), (BROADCAST, 124), (MAC.0, 1514)] {
        driver.arrive(&frame(to, bytes));
        driver.received();
        driver.send_frame(&frame(to, bytes));
    }
    driver.send_frame(&frame(MULTICAST, 252));
    let octets = (64 + 128 + 1518) as u32;
    let expected = [
        (0x4074, 3),            // GPRC
        (0x4078, 1),            // BPRC
        (0x407c, 0),            // MPRC
        (0x405c, 1),            // PRC64
        (0x4064, 1),            // PRC255
        (0x4070, 1),            // PRC1522
        (0x4088, octets),       // GORCL
        (0x408c, 0),            // GORCH
        (0x40c0, octets),       // TORL
        (0x40c4, 0),            // TORH
        (0x40d0, 3),            // TPR
        (0x4080, 4),            // GPTC
        (0x4090, octets + 256), // GOTCL
        (0x4094, 0),            // GOTCH
        (0x40c8, octets + 256), // TOTL
        (0x40cc, 0),            // TOTH
        (0x40d4, 4),            // TPT
        (0x40d8, 1),            // PTC64
        (0x40e0, 1),            // PTC255
        (0x40e4, 1),            // PTC511
        (0x40ec, 1),            // PTC1522
        (0x40f0, 1),            // MPTC
        (0x40f4, 1),            // BPTC
    ];
    for (at, count) in expected {
        assert_eq!(driver.read(at), count, "{at:#x}");
    }
    for (at, _) in expected {
        assert_eq!(driver.read(at), 0, "{at:#x} once more");
    }
}
