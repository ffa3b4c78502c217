//! The PCI slots that can be filled and emptied while the guest runs, and the event that tells of it (ACPI 6.5, 6.3 and 5.6.6).
//!
//! ```text
//! Scope (\_SB.PCI0)   { PCIU, PCID, PCEJ: the registers of pci/hotplug.rs;
//!                       Device (SL09) { _ADR; _SUN; _EJ0 () { PCEJ = 1 << 9 } } …
//!                       DVNT (slots, what) { If (slots & 1 << 9) { Notify (SL09, what) } … } }
//! Method (\_GPE._E01) { DVNT (PCIU, 1); DVNT (PCID, 3) }
//! ```

use acpi_tables::{
    Aml,
    aml::{
        And, Arg, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Method, MethodCall,
        Name, Notify, OpRegion, OpRegionSpace, Path, Scope, Store, ZERO,
    },
};

use crate::engine::layout;

const ROOT: &str = "\\_SB_.PCI0";
const REGION: &str = "PCHP";
const EJECT: &str = "PCEJ";
const REGISTER_BITS: usize = 32;
/// What a slot is notified of (5.6.6, table 5.160): look whether something is there, and let it go.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// Appends the slots behind the PCI root, which is there already.
pub(super) fn add(aml: &mut Vec<u8>) {
    let slots: Vec<u8> = (0..32).filter(|slot| layout::slot::PLUGGABLE & 1 << slot != 0).collect();
    registers(aml);
    for slot in &slots {
        device(*slot, aml);
    }
    notifier(&slots, aml);
    event(aml);
}

fn registers(aml: &mut Vec<u8>) {
    let ports = layout::PCI_HOTPLUG;
    let (start, bytes) = (ports.start as u16, (ports.end - ports.start) as u8);
    let region = OpRegion::new(REGION.into(), OpRegionSpace::SystemIO, &start, &bytes);
    let register = |name: &[u8; 4]| FieldEntry::Named(*name, REGISTER_BITS);
    let fields = Field::new(
        REGION.into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![register(b"PCIU"), register(b"PCID"), register(b"PCEJ")],
    );
    Scope::new(ROOT.into(), vec![&region, &fields]).to_aml_bytes(aml);
}

/// That it can be ejected is what makes a slot one of hot plug; it has no `_STA`, so that systems look whether a function answers.
fn device(slot: u8, aml: &mut Vec<u8>) {
    let (address, mask, register) = (u32::from(slot) << 16, 1u32 << slot, Path::new(EJECT));
    let eject = Store::new(&register, &mask);
    Scope::new(
        ROOT.into(),
        vec![&Device::new(
            name(slot).as_str().into(),
            vec![
                &Name::new("_ADR".into(), &address),
                &Name::new("_SUN".into(), &slot),
                &Method::new("_EJ0".into(), 1, false, vec![&eject]),
            ],
        )],
    )
    .to_aml_bytes(aml);
}

/// `DVNT (slots, what)`: notifies each of these slots.
fn notifier(slots: &[u8], aml: &mut Vec<u8>) {
    let masks: Vec<u32> = slots.iter().map(|slot| 1 << slot).collect();
    let devices: Vec<Path> = slots.iter().map(|slot| name(*slot).as_str().into()).collect();
    let tests: Vec<And<'_>> = masks.iter().map(|mask| And::new(&ZERO, &Arg(0), mask)).collect();
    let notifications: Vec<Notify<'_>> = devices.iter().map(|device| Notify::new(device, &Arg(1))).collect();
    let steps: Vec<If<'_>> =
        tests.iter().zip(&notifications).map(|(test, notify)| If::new(test, vec![notify as &dyn Aml])).collect();
    let method = Method::new("DVNT".into(), 2, false, steps.iter().map(|step| step as &dyn Aml).collect());
    Scope::new(ROOT.into(), vec![&method]).to_aml_bytes(aml);
}

fn event(aml: &mut Vec<u8>) {
    let inside = |name: &str| Path::new(&format!("{ROOT}.{name}"));
    let (up, down) = (inside("PCIU"), inside("PCID"));
    let filled = MethodCall::new(inside("DVNT"), vec![&up, &DEVICE_CHECK]);
    let asked_for = MethodCall::new(inside("DVNT"), vec![&down, &EJECT_REQUEST]);
    let name = format!("_E{:02X}", layout::GPE_HOTPLUG);
    let handler = Method::new(name.as_str().into(), 0, false, vec![&filled, &asked_for]);
    Scope::new("\\_GPE".into(), vec![&handler]).to_aml_bytes(aml);
}

fn name(slot: u8) -> String {
    format!("SL{slot:02}")
}

#[cfg(test)]
mod tests {
    use std::{fmt::Write, fs, path::PathBuf};

    use super::*;

    #[test]
    fn the_slots_are_what_they_were() {
        let mut aml = Vec::new();
        add(&mut aml);
        let mut text = String::new();
        for line in aml.chunks(16) {
            let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
            let shown: String =
                line.iter().map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { '.' }).collect();
            writeln!(text, "{:<48}{shown}", hex.join(" ")).unwrap();
        }
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/acpi-plug-slots.txt");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&path, &text).unwrap();
        }
        let golden = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            text == golden,
            "tests/golden/acpi-plug-slots.txt is a promise to guests that exist. Now it is:\n{text}"
        );
    }
}
