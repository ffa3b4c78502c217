//! ACPI tables: what the machine is, for operating systems (ACPI 6.5).
//!
//! They are built once, unlinked: firmware links them by the table loader's script, and `place` does it without firmware.

mod plug_slots;
mod tpm;

use std::ops::Range;

use acpi_tables::{
    Aml, AmlSink,
    aml::{
        Add, AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Index, Local, Method, Name, Notify, Package,
        PackageBuilder, Path, ResourceTemplate, Return, Scope, Store, ZERO,
    },
    facs::FACS,
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace as Space, GAS},
    sdt::Sdt,
};

use super::{
    bus::from_le,
    cmos::CENTURY_REGISTER,
    facts::MachineFacts,
    generation, layout,
    memory::{Gpa, GuestRam, OutsideRam},
    pm::{PM_BYTES, SLEEP_TYPE_SOFT_OFF},
    table_loader::{Command, Placed, encode, link},
};

pub const TABLES_FILE: &str = "etc/acpi/tables";
pub const RSDP_FILE: &str = "etc/acpi/rsdp";
pub const LOADER_FILE: &str = "etc/table-loader";

/// Where a direct boot has its tables; kernels look for the RSDP from here to 1 MiB.
const PLACE: u64 = layout::BIOS_AREA.start;
/// What `place` may fill; SMBIOS is behind it.
const PLACE_BYTES_MAX: usize = 0x1_0000;
/// The end of it is for the VM generation id.
const GENERATION_PLACE: u64 = PLACE + (PLACE_BYTES_MAX - generation::FILE_BYTES) as u64;

const OEM: [u8; 6] = *b"INNKPR";
const OEM_TABLE: [u8; 8] = *b"PC-1    ";
const OEM_REVISION: u32 = 1;

/// Where a direct boot has what is found by an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    pub rsdp: Gpa,
    /// Of the VM generation id, whose 16 bytes are not written yet.
    pub generation: Gpa,
}

/// The tables with the script that links them.
pub struct AcpiTables {
    tables: Vec<u8>,
    rsdp: Vec<u8>,
    script: Vec<Command>,
    /// With a file for what firmware measures.
    tpm: bool,
}

impl AcpiTables {
    /// The size of every part depends on the number of vCPUs and on whether there is a TPM only.
    pub fn build(facts: &MachineFacts) -> AcpiTables {
        let mut blob = Blob::new();
        let facs = blob.append(&FACS::new());
        let (definitions, generation_at) = dsdt(facts);
        let dsdt = blob.append_table(&definitions);
        let fadt = blob.append_table(&fadt(facts, facs, dsdt));
        blob.point(fadt + 36, 4);
        blob.point(fadt + 40, 4);
        blob.point(fadt + 140, 8);
        blob.script.push(Command::AddPointer {
            file: TABLES_FILE,
            at: dsdt + generation_at,
            bytes: 4,
            to: generation::GUID_FILE,
        });
        let mut tables = vec![fadt, blob.append_table(&madt(facts)), blob.append_table(&waet())];
        if facts.tpm {
            tables.push(tpm::append_table(&mut blob));
        }
        let rsdt = blob.append_index(*b"RSDT", &tables, 4);
        let xsdt = blob.append_index(*b"XSDT", &tables, 8);
        blob.sum_tables();
        blob.finish(rsdt, xsdt, facts.tpm)
    }

    /// The files for fw_cfg.
    pub fn files(&self) -> Vec<(&'static str, Vec<u8>)> {
        let mut files = vec![
            (TABLES_FILE, self.tables.clone()),
            (RSDP_FILE, self.rsdp.clone()),
            (LOADER_FILE, encode(&self.script)),
        ];
        if self.tpm {
            files.push((tpm::LOG_FILE, vec![0; tpm::LOG_BYTES]));
        }
        files
    }

    /// Links the tables and writes them below 1 MiB.
    ///
    /// Errors: the guest has no RAM there.
    pub fn place(&self, ram: &GuestRam) -> Result<Placement, OutsideRam> {
        let mut files = [
            Placed { file: RSDP_FILE, address: PLACE, bytes: self.rsdp.clone() },
            Placed { file: TABLES_FILE, address: PLACE + 64, bytes: self.tables.clone() },
            Placed { file: generation::GUID_FILE, address: GENERATION_PLACE, bytes: vec![0; generation::FILE_BYTES] },
            // What the script writes here is for the machine, not for the guest.
            Placed { file: generation::ADDRESS_FILE, address: 0, bytes: vec![0; 8] },
        ];
        // Nobody measures anything in a direct boot: the TPM's table says that there is no log.
        let script: Vec<Command> = self.script.iter().filter(|command| !tpm::is_about_log(command)).copied().collect();
        link(&script, &mut files);
        let [in_ram @ .., told] = &files;
        let end = PLACE + 64 + self.tables.len() as u64;
        assert!(end <= GENERATION_PLACE, "the tables up to {end:#x} leave their place");
        for file in in_ram {
            ram.write(Gpa(file.address), &file.bytes)?;
        }
        Ok(Placement { rsdp: Gpa(PLACE), generation: Gpa(from_le(&told.bytes)) })
    }
}

/// The tables in one piece. Pointers hold offsets in this piece until they are linked; checksums are zero until then.
struct Blob {
    bytes: Vec<u8>,
    script: Vec<Command>,
    /// Offset and length of each table with a checksum.
    tables: Vec<(u32, u32)>,
}

impl Blob {
    fn new() -> Blob {
        let script = vec![
            Command::Allocate { file: RSDP_FILE, align: 16, fseg: true },
            Command::Allocate { file: TABLES_FILE, align: 64, fseg: false },
            Command::Allocate { file: generation::GUID_FILE, align: generation::FILE_BYTES as u32, fseg: false },
        ];
        Blob { bytes: Vec::new(), script, tables: Vec::new() }
    }

    /// Appends at the next multiple of 16 and gives the offset. The FACS needs 64 and comes first.
    fn append(&mut self, table: &dyn Aml) -> u32 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let at = small(self.bytes.len());
        table.to_aml_bytes(&mut self.bytes);
        at
    }

    /// Appends a table with the common header and clears its checksum for the script.
    fn append_table(&mut self, table: &dyn Aml) -> u32 {
        let at = self.append(table);
        let checksum = at as usize + 9;
        self.bytes[checksum] = 0;
        self.tables.push((at, small(self.bytes.len()) - at));
        at
    }

    /// Appends an RSDT or XSDT with pointers of `bytes` bytes to `tables`.
    fn append_index(&mut self, signature: [u8; 4], tables: &[u32], bytes: u8) -> u32 {
        let mut index = Sdt::new(signature, 36, 1, OEM, OEM_TABLE, OEM_REVISION);
        for table in tables {
            let pointer = u64::from(*table).to_le_bytes();
            index.append_slice(&pointer[..usize::from(bytes)]);
        }
        let at = self.append_table(&index);
        for entry in 0..small(tables.len()) {
            self.point(at + 36 + entry * u32::from(bytes), bytes);
        }
        at
    }

    fn point(&mut self, at: u32, bytes: u8) {
        self.script.push(Command::AddPointer { file: TABLES_FILE, at, bytes, to: TABLES_FILE });
    }

    fn sum_tables(&mut self) {
        for (at, len) in &self.tables {
            self.script.push(Command::AddChecksum { file: TABLES_FILE, at: at + 9, start: *at, len: *len });
        }
    }

    /// Adds the RSDP (ACPI 6.5, 5.2.5.3).
    fn finish(mut self, rsdt: u32, xsdt: u32, tpm: bool) -> AcpiTables {
        let mut rsdp = Vec::with_capacity(36);
        rsdp.extend(b"RSD PTR ");
        rsdp.push(0);
        rsdp.extend(OEM);
        rsdp.push(2);
        rsdp.extend(rsdt.to_le_bytes());
        rsdp.extend(36u32.to_le_bytes());
        rsdp.extend(u64::from(xsdt).to_le_bytes());
        rsdp.extend([0; 4]);
        self.script.extend([
            Command::AddPointer { file: RSDP_FILE, at: 16, bytes: 4, to: TABLES_FILE },
            Command::AddPointer { file: RSDP_FILE, at: 24, bytes: 8, to: TABLES_FILE },
            Command::AddChecksum { file: RSDP_FILE, at: 8, start: 0, len: 20 },
            Command::AddChecksum { file: RSDP_FILE, at: 32, start: 0, len: 36 },
            Command::WritePointer {
                file: generation::ADDRESS_FILE,
                to: generation::GUID_FILE,
                offset: u32::from(generation::GUID_AT),
            },
        ]);
        AcpiTables { tables: self.bytes, rsdp, script: self.script, tpm }
    }
}

/// Offsets in the tables, which are a few KiB.
fn small(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("the tables are small")
}

/// Fixed ACPI description (5.2.9). Without an SMI command port the machine is always in ACPI mode.
fn fadt(facts: &MachineFacts, facs: u32, dsdt: u32) -> acpi_tables::fadt::FADT {
    let io = |port: u32, bits: u8, access| GAS::new(Space::SystemIo, bits, 0, access, u64::from(port));
    let pm_base = u32::from(facts.pm_base);
    let gpe0 = layout::GPE0.start as u32;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton) // there is none
        .flag(Flags::FixRtc) // the RTC does not wake by fixed hardware
        .flag(Flags::ResetRegSup)
        .flag(Flags::UsePlatformClock);
    fadt.firmware_ctrl = facs.into();
    fadt.dsdt = dsdt.into();
    fadt.x_dsdt = u64::from(dsdt).into();
    fadt.sci_int = (layout::IRQ_SCI as u16).into();
    fadt.pm1a_evt_blk = pm_base.into();
    fadt.pm1a_cnt_blk = (pm_base + 4).into();
    fadt.pm_tmr_blk = (pm_base + 8).into();
    fadt.gpe0_blk = gpe0.into();
    fadt.pm1_evt_len = 4;
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_len = 4;
    fadt.gpe0_blk_len = 4;
    fadt.p_lvl2_lat = 0xfff.into(); // no C2
    fadt.p_lvl3_lat = 0xfff.into(); // no C3
    fadt.century = CENTURY_REGISTER;
    fadt.iapc_boot_arch = 0x3.into(); // legacy devices, and an i8042 among them
    fadt.reset_reg = io(layout::RESET_CONTROL as u32, 8, AccessSize::ByteAccess);
    fadt.reset_value = 0x06;
    fadt.x_pm1a_evt_blk = io(pm_base, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = io(pm_base + 4, 16, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = io(pm_base + 8, 32, AccessSize::DwordAccess);
    fadt.x_gpe0_blk = io(gpe0, 32, AccessSize::ByteAccess);
    fadt.finalize()
}

/// Interrupt controllers (5.2.12).
fn madt(facts: &MachineFacts) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", 44, 3, OEM, OEM_TABLE, OEM_REVISION);
    madt.write_u32(36, layout::LOCAL_APIC as u32);
    madt.write_u32(40, 1); // PCs have two 8259s as well
    for cpu in 0..facts.cpus.min(255) {
        madt.append_slice(&[0, 8, cpu as u8, facts.topology.apic_id(cpu) as u8, 1, 0, 0, 0]);
    }
    let [a, b, c, d] = (layout::IOAPIC as u32).to_le_bytes();
    madt.append_slice(&[1, 12, 0, 0, a, b, c, d, 0, 0, 0, 0]);
    madt.append_slice(&source_override(0, 2, 0)); // the PIT is on pin 2
    let mut level = vec![layout::IRQ_SCI as u8];
    level.extend(layout::PIRQ_GSI);
    level.dedup();
    for irq in level {
        madt.append_slice(&source_override(irq, u32::from(irq), 0b1101)); // level, active high
    }
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]); // NMI of every processor: LINT1
    madt
}

fn source_override(irq: u8, gsi: u32, flags: u8) -> [u8; 10] {
    let [a, b, c, d] = gsi.to_le_bytes();
    [2, 10, 0, irq, a, b, c, d, flags, 0]
}

/// What Windows need not work round: the PM timer reads right the first time (Windows ACPI Emulated Devices Table).
fn waet() -> Sdt {
    let mut waet = Sdt::new(*b"WAET", 40, 1, OEM, OEM_TABLE, OEM_REVISION);
    waet.write_u32(36, 1 << 1);
    waet
}

/// The one definition block: soft off, processors, the PCI root, the ISA devices and the VM generation id. Also gives the offset
/// of the 32-bit number that becomes the address of the generation's page.
fn dsdt(facts: &MachineFacts) -> (Sdt, u32) {
    let mut aml = Vec::new();
    let off = SLEEP_TYPE_SOFT_OFF as u8;
    Name::new("\\_S5_".into(), &Package::new(vec![&off, &off, &0u8, &0u8])).to_aml_bytes(&mut aml);
    for cpu in 0..facts.cpus {
        let name = format!("C{cpu:03X}");
        let hid = Name::new("_HID".into(), &"ACPI0007");
        let uid = Name::new("_UID".into(), &cpu);
        let device = Device::new(name.as_str().into(), vec![&hid, &uid]);
        Scope::new("\\_SB_".into(), vec![&device]).to_aml_bytes(&mut aml);
    }
    pci_root(facts, &mut aml);
    plug_slots::add(&mut aml);
    isa_devices(facts, &mut aml);
    if facts.tpm {
        tpm::add_device(&mut aml);
    }
    let pointer_at = generation_device(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&aml);
    (dsdt, 36 + pointer_at)
}

/// The device that says where the VM generation id is, and the event by which it is another (Microsoft, "Virtual Machine
/// Generation ID"). Gives the offset in `aml` of the number that becomes the page's address.
fn generation_device(aml: &mut Vec<u8>) -> u32 {
    const PAGE: &str = "\\VGIA";
    const DEVICE: &str = "\\_SB_.VGEN";
    let (page, device) = (Path::new(PAGE), Path::new(DEVICE));
    Name::new(PAGE.into(), &Pointer).to_aml_bytes(aml);
    let pointer_at = small(aml.len()) - 4;
    let (answer, empty) = (Local(0), Package::new(vec![&ZERO, &ZERO]));
    let low = Index::new(&ZERO, &answer, &ZERO);
    // {low, high} of the id's address. The page's own address is what is linked, for the reason that `GUID_AT` has.
    let (begin, add) = (Store::new(&answer, &empty), Add::new(&low, &page, &generation::GUID_AT));
    let answered = Return::new(&answer);
    let address: Vec<&dyn Aml> = vec![&begin, &add, &answered];
    Device::new(
        DEVICE.into(),
        vec![
            &Name::new("_HID".into(), &"INKP0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Method::new("ADDR".into(), 0, false, address),
        ],
    )
    .to_aml_bytes(aml);
    let event = format!("_E{:02X}", layout::GPE_GENERATION);
    let notify = Notify::new(&device, &0x80u8);
    let handler = Method::new(event.as_str().into(), 0, false, vec![&notify]);
    Scope::new("\\_GPE".into(), vec![&handler]).to_aml_bytes(aml);
    pointer_at
}

/// A 32-bit number that is zero until it is linked.
struct Pointer;

impl Aml for Pointer {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x0c);
        sink.dword(0);
    }
}

fn pci_root(facts: &MachineFacts, aml: &mut Vec<u8>) {
    use AddressSpaceCacheable::{Cacheable, NotCacheable};
    let low = facts.pci_memory_32();
    let high = &facts.pci_memory_64;
    let vga = layout::VGA_WINDOW;
    let config = layout::PCI_CONFIG.start as u16;
    Device::new(
        "\\_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::<u16>::new_bus_number(0, 0xff),
                    &io(config, 8),
                    &AddressSpace::<u16>::new_io(0, config - 1, None),
                    &AddressSpace::<u16>::new_io(config + 8, 0xffff, None),
                    &AddressSpace::<u32>::new_memory(Cacheable, true, vga.start as u32, vga.end as u32 - 1, None),
                    &AddressSpace::<u32>::new_memory(NotCacheable, true, low.start as u32, (low.end - 1) as u32, None),
                    &AddressSpace::<u64>::new_memory(NotCacheable, true, high.start, high.end - 1, None),
                ]),
            ),
            &Name::new("_PRT".into(), &interrupt_routing()),
        ],
    )
    .to_aml_bytes(aml);
}

/// All four pins of every slot, hard-wired: {slot address, pin, 0, GSI} (6.2.13).
fn interrupt_routing() -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for slot in 1..32u8 {
        for pin in 0..4u8 {
            let address = u32::from(slot) << 16 | 0xffff;
            let gsi = layout::PIRQ_GSI[layout::pirq(slot, pin + 1)];
            table.add_element(&Package::new(vec![&address, &pin, &0u8, &gsi]));
        }
    }
    table
}

/// Where the ISA devices are; a scope may be opened again and again.
const ISA: &str = "\\_SB_.PCI0.ISA_";

fn isa_devices(facts: &MachineFacts, aml: &mut Vec<u8>) {
    let bridge = u32::from(layout::slot::PIIX) << 16;
    Device::new(ISA.into(), vec![&Name::new("_ADR".into(), &bridge)]).to_aml_bytes(aml);
    let pnp = EISAName::new;
    let port = |range: Range<u64>| io(range.start as u16, (range.end - range.start) as u8);
    let irq = |number: u32| IrqNoFlags(1 << number);
    isa_device(aml, "COM1", &pnp("PNP0501"), vec![&port(layout::COM1), &irq(layout::IRQ_COM1)]);
    let [data, command] = [port(layout::I8042), port(layout::I8042_COMMAND)];
    isa_device(aml, "KBD_", &pnp("PNP0303"), vec![&data, &command, &irq(layout::IRQ_KEYBOARD)]);
    isa_device(aml, "MOU_", &pnp("PNP0F13"), vec![&irq(layout::IRQ_MOUSE)]);
    isa_device(aml, "RTC_", &pnp("PNP0B00"), vec![&port(layout::CMOS), &irq(layout::IRQ_RTC)]);
    isa_device(aml, "PIC_", &pnp("PNP0000"), vec![&io(0x20, 2), &io(0xa0, 2), &io(0x4d0, 2), &irq(2)]);
    isa_device(aml, "TMR_", &pnp("PNP0100"), vec![&io(0x40, 4), &irq(0)]);
    isa_device(aml, "SPKR", &pnp("PNP0800"), vec![&io(0x61, 1)]);
    isa_device(aml, "FWCF", &"QEMU0002", vec![&port(layout::FW_CFG)]);
    isa_device(aml, "PEVT", &"QEMU0001", vec![&port(layout::PANIC)]);
    // Ports that no PCI device may be given.
    let [gpe, a20, log] = [port(layout::GPE0), port(layout::PORT_92), port(layout::DEBUG_CONSOLE)];
    let plug = port(layout::PCI_HOTPLUG);
    isa_device(aml, "SYSR", &pnp("PNP0C02"), vec![&io(facts.pm_base, PM_BYTES as u8), &gpe, &a20, &log, &plug]);
}

fn isa_device(aml: &mut Vec<u8>, name: &str, hid: &dyn Aml, resources: Vec<&dyn Aml>) {
    Scope::new(
        ISA.into(),
        vec![&Device::new(
            name.into(),
            vec![
                &Name::new("_HID".into(), hid),
                &Name::new("_UID".into(), &1u8),
                &Name::new("_STA".into(), &0x0fu8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            ],
        )],
    )
    .to_aml_bytes(aml);
}

fn io(port: u16, count: u8) -> IO {
    IO::new(port, port, 1, count)
}

/// IRQ descriptor: edge-triggered, not shared (6.4.2.1).
struct IrqNoFlags(u16);

impl Aml for IrqNoFlags {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x22);
        sink.word(self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, process};

    use super::*;
    use crate::engine::{facts::tests::sample, table_loader::sum};

    fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
        bytes[at..at + len].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// Follows the pointers as an operating system does: signature and bytes of every table.
    fn walk(ram: &GuestRam, rsdp: Gpa) -> Vec<(String, Vec<u8>)> {
        let mut root = [0; 36];
        ram.read(rsdp, &mut root).unwrap();
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!([sum(&root[..20]), sum(&root)], [0, 0]);
        let table = |at: u64| {
            let len = ram.get_u32(Gpa(at + 4)).unwrap();
            let mut bytes = vec![0; len as usize];
            ram.read(Gpa(at), &mut bytes).unwrap();
            (String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes)
        };
        let rsdt = table(number(&root, 16, 4));
        let xsdt = table(number(&root, 24, 8));
        let old: Vec<u64> = rsdt.1[36..].chunks(4).map(|entry| number(entry, 0, 4)).collect();
        let new: Vec<u64> = xsdt.1[36..].chunks(8).map(|entry| number(entry, 0, 8)).collect();
        assert_eq!(old, new, "RSDT and XSDT name the same tables");
        let mut tables = vec![rsdt, xsdt];
        for at in new {
            let found = table(at);
            if found.0 == "FACP" {
                assert_eq!(number(&found.1, 40, 4), number(&found.1, 140, 8));
                assert!(number(&found.1, 36, 4).is_multiple_of(64));
                tables.push(table(number(&found.1, 40, 4)));
                tables.push(table(number(&found.1, 36, 4)));
            }
            tables.push(found);
        }
        tables
    }

    fn placed(facts: &MachineFacts) -> Vec<(String, Vec<u8>)> {
        let ram = GuestRam::new(facts.memory_bytes.min(16 << 20)).unwrap();
        let placement = AcpiTables::build(facts).place(&ram).unwrap();
        walk(&ram, placement.rsdp)
    }

    #[test]
    fn every_table_is_reached_and_sums_to_zero() {
        for cpus in [1, 64] {
            let tables = placed(&MachineFacts { cpus, ..sample() });
            let names: BTreeSet<&str> = tables.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(names, ["APIC", "DSDT", "FACP", "FACS", "RSDT", "WAET", "XSDT"].into());
            for (name, bytes) in &tables {
                assert!(name == "FACS" || sum(bytes) == 0, "{name}");
            }
        }
    }

    #[test]
    fn the_fadt_names_the_ports_that_the_firmware_chose() {
        let facts = MachineFacts { pm_base: 0xb000, ..sample() };
        let tables = placed(&facts);
        let (_, fadt) = tables.iter().find(|(name, _)| name == "FACP").unwrap();
        assert_eq!([number(fadt, 56, 4), number(fadt, 64, 4), number(fadt, 76, 4)], [0xb000, 0xb004, 0xb008]);
        assert_eq!([number(fadt, 152, 8), number(fadt, 176, 8), number(fadt, 212, 8)], [0xb000, 0xb004, 0xb008]);
        assert_eq!(number(fadt, 48, 4), 0, "no SMI command port");
        assert_eq!([number(fadt, 46, 2), number(fadt, 80, 4), number(fadt, 108, 1)], [9, 0xafe0, 0x32]);
        assert_eq!([number(fadt, 120, 8), number(fadt, 128, 1)], [0xcf9, 6]);
    }

    #[test]
    fn the_generation_device_has_the_address_of_the_id() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let placement = AcpiTables::build(&sample()).place(&ram).unwrap();
        assert_eq!(placement.generation, Gpa(0xe_f028));
        let tables = walk(&ram, placement.rsdp);
        let (_, dsdt) = tables.iter().find(|(name, _)| name == "DSDT").unwrap();
        let at = dsdt.windows(6).position(|bytes| bytes == b"\x08\\VGIA").unwrap() + 6;
        assert_eq!((dsdt[at], number(dsdt, at + 1, 4)), (0x0c, 0xe_f000));
    }

    #[test]
    fn moving_the_pm_block_changes_no_size() {
        let at = |pm_base| AcpiTables::build(&MachineFacts { pm_base, ..sample() }).files();
        for (a, b) in at(0x600).iter().zip(at(0xb000)) {
            assert_eq!((a.0, a.1.len()), (b.0, b.1.len()));
        }
        assert_ne!(at(0x600)[0].1, at(0xb000)[0].1);
    }

    #[test]
    fn a_guest_without_ram_below_1_mib_is_an_error() {
        let ram = GuestRam::new(0x8_0000).unwrap();
        assert!(AcpiTables::build(&sample()).place(&ram).is_err());
    }

    /// Runs ACPICA's compiler in `dir` and gives what it printed.
    fn iasl(dir: &std::path::Path, arguments: &[&str]) -> String {
        let output = process::Command::new("iasl").current_dir(dir).args(arguments).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(output.status.success(), "{text}");
        text
    }

    #[test]
    fn acpica_reads_every_table_without_complaint() {
        if process::Command::new("iasl").arg("-v").output().is_err() {
            println!("skipped: iasl (package acpica-tools) is not installed");
            return;
        }
        for (cpus, tpm) in [(1, false), (64, false), (2, true)] {
            let dir = tempfile::tempdir().unwrap();
            for (name, bytes) in placed(&MachineFacts { cpus, tpm, ..sample() }) {
                fs::write(dir.path().join(format!("{name}.aml")), bytes).unwrap();
                let text = iasl(dir.path(), &["-d", &format!("{name}.aml")]);
                let complaint = text.lines().find(|line| {
                    let line = line.to_lowercase();
                    line.contains("warning") || line.contains("error") || line.contains("invalid")
                });
                assert_eq!(complaint, None, "{text}");
            }
            let text = iasl(dir.path(), &["-ve", "-p", "again", "DSDT.dsl"]);
            assert!(text.contains("Compilation successful. 0 Errors, 0 Warnings"), "{text}");
            // ACPICA's interpreter is in the same package.
            let evaluate = ["-b", "evaluate \\_SB.VGEN.ADDR", "DSDT.aml"];
            let output = process::Command::new("acpiexec").current_dir(dir.path()).args(evaluate).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).to_uppercase();
            assert!(text.contains("00000000000EF028"), "{text}");
            // The registers of hot plug read as zero there: nobody is told of anything, and every name is found.
            for (what, answer) in
                [("\\_GPE._E01", "NO OBJECT WAS RETURNED"), ("\\_SB.PCI0.SL09._SUN", "0000000000000009")]
            {
                let evaluate = ["-b", &format!("evaluate {what}"), "DSDT.aml"];
                let output = process::Command::new("acpiexec").current_dir(dir.path()).args(evaluate).output().unwrap();
                let text = String::from_utf8_lossy(&output.stdout).to_uppercase();
                assert!(text.contains(answer) && !text.contains("AE_"), "{what}: {text}");
            }
        }
    }
}
