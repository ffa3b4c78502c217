//! The forms that make and change guests: from fields as typed to what the service takes, with every mistake at its field.

use std::num::NonZeroU64;

use super::{
    State,
    form::Form,
    guest_words::from_words,
    view::{self, Choice, FieldErrors, GuestChoices, GuestFields},
};
use crate::{
    api::{Boot, ChangeGuest, CreateGuest, Firmware, NewDisk},
    error::{Error, Result},
    guests::{Guest, host_memory},
    spec::{BootFrom, CpuModel, DISKS_MAX, NetworkModel, RateLimit, Watchdog},
    store::{
        guests::{BootKind, NetworkMode},
        images::{self, ImageKind, ImageRow},
    },
    switches::SwitchWishes,
    types::{BadValue, parse_size, shorten, show_size},
    wire::{HostAnswer, HostRequest, NetworkStatus},
};

/// Disks, CD and network.
const BOOT_DEVICES_MAX: usize = DISKS_MAX + 2;
/// The name that the page gives the built-in guest; the next one gets a number.
const TEST_GUEST_NAME: &str = "test-guest";

/// The create form as typed.
pub fn fields_of(form: &Form) -> GuestFields {
    let text = |name: &str| form.get(name).trim().to_owned();
    GuestFields {
        name: text("name"),
        cpus: text("cpus"),
        sockets: text("sockets"),
        threads: text("threads"),
        memory: text("memory"),
        boot: text("boot"),
        disk_size: text("disk_size"),
        disk_image: text("disk_image"),
        disk_bus: text("disk_bus"),
        cdrom: text("cdrom"),
        kernel: text("kernel"),
        initrd: text("initrd"),
        cmdline: form.get("cmdline").to_owned(),
        firmware: text("firmware"),
        boot_order: (0..BOOT_DEVICES_MAX).map(|at| text(&format!("boot_order_{at}"))).collect(),
        network: text("network"),
        network_model: text("network_model"),
        watchdog: text("watchdog"),
        cpu_model: text("cpu_model"),
        memory_now: String::new(),
        switches: view::switch_fields(|switch| text(switch.key)),
        start: form.ticked("start"),
    }
}

/// The form of the network card as typed, on the page of a guest.
pub fn network_fields_of(form: &Form, guest: &Guest) -> GuestFields {
    let text = |name: &str| form.get(name).trim().to_owned();
    GuestFields { network: text("network"), network_model: text("network_model"), ..fields_of_guest(guest) }
}

/// The form that adds a disk as typed, on the page of a guest.
pub fn disk_fields_of(form: &Form, guest: &Guest) -> GuestFields {
    let text = |name: &str| form.get(name).trim().to_owned();
    GuestFields {
        disk_size: text("add_disk_size"),
        disk_image: text("add_disk_image"),
        disk_bus: text("disk_bus"),
        ..fields_of_guest(guest)
    }
}

/// The hardware form of a guest as it is.
pub fn fields_of_guest(guest: &Guest) -> GuestFields {
    let row = &guest.row;
    let id =
        |image: &Option<crate::guests::ImageName>| image.as_ref().map(|image| image.id.to_string()).unwrap_or_default();
    GuestFields {
        name: row.name.to_string(),
        cpus: row.cpus.to_string(),
        sockets: row.sockets.to_string(),
        threads: row.threads.to_string(),
        memory: typed_size(row.memory_bytes),
        boot: match row.boot {
            BootKind::Bios | BootKind::Uefi | BootKind::UefiSecure => "disk",
            BootKind::Kernel => "kernel",
            BootKind::Test => "test",
        }
        .to_owned(),
        disk_size: String::new(),
        disk_image: String::new(),
        disk_bus: guest.disks.first().map_or("virtio", |disk| disk.bus.as_str()).to_owned(),
        cdrom: id(&guest.cd),
        kernel: id(&guest.kernel),
        initrd: id(&guest.initrd),
        cmdline: row.cmdline.clone(),
        firmware: match row.boot {
            BootKind::Uefi => Firmware::Uefi.as_str(),
            BootKind::UefiSecure => Firmware::UefiSecure.as_str(),
            BootKind::Bios => Firmware::Bios.as_str(),
            // The select shows what is usual.
            BootKind::Kernel | BootKind::Test => "",
        }
        .to_owned(),
        boot_order: guest.boot_order().iter().map(ToString::to_string).collect(),
        network: row.network.to_string(),
        network_model: row.network_model.as_str().to_owned(),
        watchdog: row.watchdog.as_str().to_owned(),
        cpu_model: row.cpu_model.as_str().to_owned(),
        memory_now: typed_size(guest.status.memory_now(row.memory_bytes).unwrap_or(row.memory_bytes)),
        switches: view::switch_fields(|switch| view::on_or_off((switch.get)(&row.switches)).to_owned()),
        start: false,
    }
}

/// How much a disk may be asked for in a second; what is left empty is not limited.
pub fn limit_of(form: &Form) -> Result<RateLimit> {
    let rate = |field: &'static str, parse: fn(&str) -> Result<u64, BadValue>| {
        let text = form.get(field).trim();
        if text.is_empty() {
            return Ok(None);
        }
        let rate = parse(text).map_err(|bad| Error::invalid(field, bad.to_string()))?;
        let zero = || Error::invalid(field, "A limit is not 0. Leave it empty for none.");
        NonZeroU64::new(rate).map(Some).ok_or_else(zero)
    };
    let operations = |text: &str| {
        text.parse().map_err(|_| BadValue(format!("\"{}\" is not a number of operations.", shorten(text))))
    };
    Ok(RateLimit {
        bytes_per_s: rate("bytes_per_s", parse_size)?,
        operations_per_s: rate("operations_per_s", operations)?,
    })
}

/// A size as one would type it: the largest unit that leaves a whole number.
pub fn typed_size(bytes: u64) -> String {
    for (unit, shift) in [("T", 40), ("G", 30), ("M", 20), ("K", 10)] {
        if bytes >= 1 << shift && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// What the create form asks for, or every mistake in it.
pub fn create_guest(fields: &GuestFields) -> Result<CreateGuest, FieldErrors> {
    let mut errors = FieldErrors::default();
    let wanted = CreateGuest {
        name: checked_name(fields, &mut errors),
        cpus: cpus(fields, &mut errors),
        sockets: count_of(&fields.sockets, "sockets", &mut errors),
        threads: count_of(&fields.threads, "threads", &mut errors),
        memory_bytes: memory(fields, &mut errors),
        boot: boot(fields, &mut errors),
        boot_order: Vec::new(),
        disks: match fields.boot.as_str() {
            "test" => Vec::new(),
            _ => new_disk(fields, ("disk_size", "disk_image"), &mut errors),
        },
        cdrom: Some(fields.cdrom.clone()).filter(|image| !image.is_empty() && fields.boot != "test"),
        network: network(fields, &mut errors),
        network_model: network_model(fields, &mut errors),
        watchdog: watchdog(fields, &mut errors),
        cpu_model: cpu_model(fields, &mut errors),
        switches: switches(fields, &mut errors),
        start: fields.start,
    };
    if errors.is_empty() { Ok(wanted) } else { Err(errors) }
}

/// What the hardware form asks for, or every mistake in it.
pub fn change_guest(fields: &GuestFields) -> Result<ChangeGuest, FieldErrors> {
    let mut errors = FieldErrors::default();
    let wanted = ChangeGuest {
        name: Some(checked_name(fields, &mut errors)),
        cpus: cpus(fields, &mut errors),
        sockets: count_of(&fields.sockets, "sockets", &mut errors),
        threads: count_of(&fields.threads, "threads", &mut errors),
        memory_bytes: memory(fields, &mut errors),
        boot: boot(fields, &mut errors),
        boot_order: boot_order(fields),
        cdrom: None,
        network: None,
        network_model: None,
        watchdog: watchdog(fields, &mut errors),
        cpu_model: cpu_model(fields, &mut errors),
        switches: switches(fields, &mut errors),
        add_disks: Vec::new(),
        remove_disks: Vec::new(),
    };
    if errors.is_empty() { Ok(wanted) } else { Err(errors) }
}

/// Another network or card for a guest.
pub fn change_network(fields: &GuestFields) -> Result<ChangeGuest, FieldErrors> {
    let mut errors = FieldErrors::default();
    let wanted = ChangeGuest {
        network: network(fields, &mut errors),
        network_model: network_model(fields, &mut errors),
        ..ChangeGuest::default()
    };
    if errors.is_empty() { Ok(wanted) } else { Err(errors) }
}

/// One more disk for a guest.
pub fn add_disk(fields: &GuestFields) -> Result<ChangeGuest, FieldErrors> {
    let mut errors = FieldErrors::default();
    let add_disks = new_disk(fields, ("add_disk_size", "add_disk_image"), &mut errors);
    if add_disks.is_empty() && errors.is_empty() {
        errors.add("add_disk_size", "A disk needs a size or an image.");
    }
    if errors.is_empty() { Ok(ChangeGuest { add_disks, ..ChangeGuest::default() }) } else { Err(errors) }
}

/// The service's one error, at the field of the form it is about. `adding` is the hardware form.
pub fn field_errors(error: &Error, adding: bool) -> FieldErrors {
    let mut errors = FieldErrors::default();
    let field = match (error.field().unwrap_or(""), adding) {
        ("disk" | "disk_size", false) => "disk_size",
        ("disk" | "disk_size", true) => "add_disk_size",
        ("disk_image", true) => "add_disk_image",
        ("machine", _) => "",
        (field, _) => field,
    };
    errors.add(field, error.to_string());
    errors
}

fn checked_name(fields: &GuestFields, errors: &mut FieldErrors) -> String {
    if let Err(bad) = fields.name.parse::<crate::types::Name>() {
        errors.add("name", bad.to_string());
    }
    fields.name.clone()
}

fn cpus(fields: &GuestFields, errors: &mut FieldErrors) -> Option<u32> {
    match fields.cpus.parse() {
        Ok(cpus) => Some(cpus),
        Err(_) => {
            errors.add("cpus", format!("A guest has 1 to {} vCPUs.", crate::spec::CPUS_MAX));
            None
        }
    }
}

/// Sockets or threads; an empty field leaves them as they are.
fn count_of(text: &str, field: &'static str, errors: &mut FieldErrors) -> Option<u32> {
    if text.is_empty() {
        return None;
    }
    text.parse().map_err(|_| errors.add(field, "A whole number, such as 1.")).ok()
}

fn memory(fields: &GuestFields, errors: &mut FieldErrors) -> Option<u64> {
    parse_size(&fields.memory).map_err(|bad| errors.add("memory", bad.to_string())).ok()
}

fn boot(fields: &GuestFields, errors: &mut FieldErrors) -> Option<Boot> {
    let cmdline = fields.cmdline.trim().to_owned();
    match (fields.boot.as_str(), fields.firmware.as_str()) {
        ("disk", "") => Some(Boot::Disk { firmware: None }),
        ("disk", word) => {
            let firmware = Firmware::ALL.into_iter().find(|firmware| firmware.as_str() == word);
            if firmware.is_none() {
                errors.add("firmware", "The firmware is BIOS, UEFI, or UEFI with Secure Boot.");
            }
            Some(Boot::Disk { firmware })
        }
        ("kernel", _) => {
            let initrd = Some(fields.initrd.clone()).filter(|image| !image.is_empty());
            Some(Boot::Kernel { kernel: fields.kernel.clone(), initrd, cmdline })
        }
        ("test", _) => Some(Boot::Test { cmdline }),
        _ => {
            errors.add("boot", "Choose what the guest starts from.");
            None
        }
    }
}

/// The devices that were chosen, without what was left empty; nothing when the form had no such fields.
fn boot_order(fields: &GuestFields) -> Option<Vec<String>> {
    let chosen: Vec<String> = fields.boot_order.iter().filter(|word| !word.is_empty()).cloned().collect();
    Some(chosen).filter(|chosen| !chosen.is_empty() && fields.boot == "disk")
}

/// What a guest can boot from, for the selects of its boot order.
pub fn boot_devices(guest: &Guest) -> Vec<Choice> {
    let mut devices = guest.boot_order();
    if guest.row.network != NetworkMode::None && !devices.is_empty() && !devices.contains(&BootFrom::Network) {
        devices.push(BootFrom::Network);
    }
    let named = |from: &BootFrom| choice(&from.to_string(), &from_words(guest, from));
    devices.iter().map(named).collect()
}

fn network(fields: &GuestFields, errors: &mut FieldErrors) -> Option<String> {
    if fields.network.is_empty() {
        return None;
    }
    if let Err(bad) = fields.network.parse::<NetworkMode>() {
        errors.add("network", bad.to_string());
    }
    Some(fields.network.clone())
}

fn network_model(fields: &GuestFields, errors: &mut FieldErrors) -> Option<NetworkModel> {
    match fields.network_model.as_str() {
        "" => None,
        model => model.parse().map_err(|bad: BadValue| errors.add("network_model", bad.to_string())).ok(),
    }
}

fn watchdog(fields: &GuestFields, errors: &mut FieldErrors) -> Option<Watchdog> {
    match fields.watchdog.as_str() {
        "" => None,
        word => word.parse().map_err(|bad: BadValue| errors.add("watchdog", bad.to_string())).ok(),
    }
}

fn cpu_model(fields: &GuestFields, errors: &mut FieldErrors) -> Option<CpuModel> {
    match fields.cpu_model.as_str() {
        "" => None,
        word => word.parse().map_err(|bad: BadValue| errors.add("cpu_model", bad.to_string())).ok(),
    }
}

fn switches(fields: &GuestFields, errors: &mut FieldErrors) -> SwitchWishes {
    let mut wishes = SwitchWishes::default();
    for field in &fields.switches {
        match field.value.as_str() {
            "" => {}
            "on" => (field.switch.wish)(&mut wishes, Some(true)),
            "off" => (field.switch.wish)(&mut wishes, Some(false)),
            _ => errors.add(field.switch.key, "This is on or off."),
        }
    }
    wishes
}

fn new_disk(fields: &GuestFields, names: (&str, &str), errors: &mut FieldErrors) -> Vec<NewDisk> {
    if fields.disk_size.is_empty() && fields.disk_image.is_empty() {
        return Vec::new();
    }
    let size_bytes = match fields.disk_size.as_str() {
        "" => None,
        size => parse_size(size).map_err(|bad| errors.add(names.0, bad.to_string())).ok(),
    };
    let bus = match fields.disk_bus.as_str() {
        "" => None,
        bus => bus.parse().map_err(|bad: BadValue| errors.add("disk_bus", bad.to_string())).ok(),
    };
    let image = Some(fields.disk_image.clone()).filter(|image| !image.is_empty());
    vec![NewDisk { size_bytes, image, bus, limit: RateLimit::default() }]
}

/// Gives a further Test guest from the page a name of its own.
pub async fn number_test_guest(state: &State, fields: &mut GuestFields) -> Result<()> {
    if fields.boot != "test" || fields.name != TEST_GUEST_NAME {
        return Ok(());
    }
    let taken: Vec<String> = state.guests.list().await?.iter().map(|guest| guest.row.name.to_string()).collect();
    let numbered = (2..).map(|number| format!("{TEST_GUEST_NAME}-{number}"));
    let free = std::iter::once(TEST_GUEST_NAME.to_owned()).chain(numbered).find(|name| !taken.contains(name));
    fields.name = free.unwrap_or_default();
    Ok(())
}

/// What the selects offer on this host now.
pub async fn choices(state: &State) -> Result<GuestChoices> {
    let images: Vec<ImageRow> =
        state.store.reading(images::list).await?.into_iter().filter(|image| image.ready).collect();
    let of = |kinds: &[ImageKind]| {
        let mut fitting: Vec<&ImageRow> = images.iter().filter(|image| kinds.contains(&image.kind)).collect();
        fitting.sort_by_key(|image| kinds.iter().position(|kind| *kind == image.kind));
        fitting
            .into_iter()
            .map(|image| Choice {
                value: image.id.to_string(),
                label: format!("{} ({})", image.name, show_size(image.size_bytes)),
            })
            .collect::<Vec<_>>()
    };
    let network = match state.host.call(HostRequest::NetworkStatus).await {
        Ok((HostAnswer::NetworkStatus(status), _)) => status,
        Ok(_) | Err(_) => NetworkStatus::default(),
    };
    Ok(GuestChoices {
        cds: of(&[ImageKind::Iso]),
        disks: of(&[ImageKind::Disk, ImageKind::Other]),
        boot_files: of(&[ImageKind::Kernel, ImageKind::Initrd, ImageKind::Other]),
        networks: network_choices(&network),
        firmwares: firmware_choices(state).await,
        cpu_models: CpuModel::ALL.map(|model| choice(model.as_str(), model.words())).to_vec(),
        watchdogs: Watchdog::ALL.map(|watchdog| choice(watchdog.as_str(), watchdog.words())).to_vec(),
        host_words: host_words(),
    })
}

/// The usual one first.
async fn firmware_choices(state: &State) -> Vec<Choice> {
    let uefi = matches!(
        state.host.call(HostRequest::FirmwareStatus).await,
        Ok((HostAnswer::FirmwareStatus { uefi: true }, _))
    );
    let mut choices = Firmware::ALL.map(|firmware| choice(firmware.as_str(), firmware.words())).to_vec();
    if !uefi {
        choices.rotate_right(1);
        for without in choices.iter_mut().skip(1) {
            without.label.push_str(" (its package, ovmf, is not installed)");
        }
    }
    choices
}

/// The firmware that the form offers first.
pub fn usual_firmware(choices: &GuestChoices) -> String {
    choices.firmwares.first().map(|choice| choice.value.clone()).unwrap_or_default()
}

/// The network that the form offers first.
pub fn usual_network(choices: &GuestChoices) -> String {
    choices.networks.first().map(|choice| choice.value.clone()).unwrap_or_default()
}

fn choice(value: &str, label: &str) -> Choice {
    Choice { value: value.to_owned(), label: label.to_owned() }
}

fn network_choices(status: &NetworkStatus) -> Vec<Choice> {
    let mut choices = Vec::new();
    if status.privileged {
        choices.push(choice("nat", "NAT: reaches out, and is reached from this host"));
        for bridge in &status.bridges {
            choices.push(choice(
                &format!("bridge:{bridge}"),
                &format!("Bridge {bridge}: a machine of its own on that network"),
            ));
        }
    }
    choices.push(choice("user", "User: reaches out, without privilege"));
    choices.push(choice("none", "None"));
    choices
}

fn host_words() -> String {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let cpus = super::view::count(cpus, "CPU", "CPUs");
    match host_memory() {
        Some((total, free)) => {
            format!("This host has {cpus} and {} of memory, {} of it free.", show_size(total), show_size(free))
        }
        None => format!("This host has {cpus}."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::DiskBus;

    fn fields(change: impl FnOnce(&mut GuestFields)) -> GuestFields {
        let mut fields = GuestFields { name: "web01".into(), ..GuestFields::default() };
        change(&mut fields);
        fields
    }

    #[test]
    fn the_form_as_offered_makes_a_guest() {
        let wanted = create_guest(&fields(|_| {})).unwrap();
        assert_eq!((wanted.cpus, wanted.memory_bytes, wanted.start), (Some(2), Some(2 << 30), true));
        assert_eq!(wanted.disks.len(), 1);
        assert_eq!(wanted.disks[0].size_bytes, Some(16 << 30));
    }

    #[test]
    fn every_mistake_is_at_its_field() {
        let wrong = fields(|fields| {
            fields.name = "../etc".into();
            fields.cpus = "-1".into();
            (fields.sockets, fields.threads) = ("two".into(), "-1".into());
            fields.memory = "lots".into();
            fields.disk_size = "0x10".into();
            fields.disk_bus = "scsi".into();
            fields.network = "bridge:".into();
            fields.firmware = "coreboot".into();
            fields.network_model = "ne2000".into();
            fields.watchdog = "cat".into();
            fields.cpu_model = "z80".into();
            fields.switches = view::switch_fields(|switch| if switch.key == "usb" { "off" } else { "maybe" }.into());
        });
        let errors = create_guest(&wrong).unwrap_err();
        for field in [
            "name",
            "cpus",
            "sockets",
            "threads",
            "memory",
            "disk_size",
            "disk_bus",
            "network",
            "network_model",
            "watchdog",
            "firmware",
        ] {
            assert!(errors.of(field).is_some(), "{field}");
        }
    }

    #[test]
    fn the_test_guest_takes_no_disk_from_hidden_fields() {
        let wanted = create_guest(&fields(|fields| fields.boot = "test".into())).unwrap();
        assert!(wanted.disks.is_empty());
        assert_eq!(wanted.boot, Some(Boot::Test { cmdline: String::new() }));
    }

    #[test]
    fn a_guest_that_starts_a_kernel_gets_its_disk() {
        let wanted = create_guest(&fields(|fields| {
            (fields.boot, fields.kernel) = ("kernel".into(), "vmlinuz".into());
            (fields.disk_size, fields.disk_bus) = ("3G".into(), "ahci".into());
        }))
        .unwrap();
        assert_eq!(
            wanted.disks,
            [NewDisk { size_bytes: Some(3 << 30), bus: Some(DiskBus::Ahci), ..NewDisk::default() }]
        );
    }

    #[test]
    fn sizes_are_typed_short() {
        assert_eq!(typed_size(2 << 30), "2G");
        assert_eq!(typed_size(1536 << 20), "1536M");
        assert_eq!(typed_size(513), "513");
        assert_eq!(parse_size(&typed_size(1536 << 20)), Ok(1536 << 20));
    }
}
