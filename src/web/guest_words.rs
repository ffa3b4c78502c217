//! What pages say of a guest: from the service's facts to words, buttons and lines.

use super::{
    State,
    guard::Caller,
    guest_forms as forms,
    view::{self, GuestTab},
};
use crate::{
    api::Firmware,
    guests::{
        Guest,
        lifecycle::{Event, State as GuestState},
    },
    spec::{BootFrom, CpuModel, DiskBus, NetworkModel, Watchdog},
    store::{
        guests::{BootKind, GuestRow},
        users::Role,
    },
    types::{now_ms, show_size},
};

pub fn state_of(state: GuestState) -> view::State {
    match state {
        GuestState::Stopped => view::State::Stopped,
        GuestState::Suspended => view::State::Suspended,
        GuestState::Starting => view::State::Starting,
        GuestState::Running => view::State::Running,
        GuestState::Paused => view::State::Paused,
        GuestState::Stopping => view::State::Stopping,
        GuestState::Failed => view::State::Failed,
    }
}

fn actions_of(guest: &Guest, caller: &Caller) -> view::Actions {
    if caller.role < Role::Operator {
        return view::Actions::default();
    }
    let state = guest.status.state;
    let whole = guest.task.is_none();
    let rests = !state.is_live() && whole && state != GuestState::Suspended;
    view::Actions {
        start: state.allows(Event::Start) && whole,
        shutdown: state.allows(Event::Shutdown),
        power_off: state.is_live() && state.allows(Event::Kill),
        reset: state.allows(Event::Reset),
        pause: state.allows(Event::Pause),
        suspend: state.allows(Event::Suspend),
        discard: state == GuestState::Suspended,
        resume: state.allows(Event::Resume),
        edit: rests,
        plug: whole && guest.status.client.is_some() && guest.status.plugged.is_some(),
        memory: state.is_live() && guest.status.client.is_some(),
        cd: whole && (rests || guest.status.client.is_some()),
        delete: rests,
        console_input: true,
    }
}

fn reason_of(guest: &Guest) -> Option<String> {
    let preparing = guest.task.as_ref().map(|_| "Its disks are being prepared.".to_owned());
    guest.status.words().or(preparing)
}

fn since_of(guest: &Guest) -> Option<view::Moment> {
    let lives = guest.status.started_ms.filter(|_| guest.status.state == GuestState::Running);
    lives.or(guest.status.since_ms).map(|at_ms| view::Moment::new(at_ms, now_ms()))
}

/// One guest in a list, as this caller sees it.
pub fn line(guest: &Guest, caller: &Caller) -> view::GuestLine {
    view::GuestLine {
        id: guest.row.id.to_string(),
        name: guest.row.name.to_string(),
        note: guest.row.note.clone(),
        state: state_of(guest.status.state),
        reason: reason_of(guest),
        since: since_of(guest),
        address: guest.status.addresses.first().cloned(),
        cpus: guest.row.cpus,
        memory: view::Bytes(guest.row.memory_bytes),
        cpu: None,
        actions: actions_of(guest, caller),
        starts: starts_of(guest, caller),
    }
}

/// Other ways to start it, this once: from a device, or into the firmware.
fn starts_of(guest: &Guest, caller: &Caller) -> Vec<view::Choice> {
    if !actions_of(guest, caller).start {
        return Vec::new();
    }
    let order = guest.boot_order();
    let Some(usual) = order.first() else { return Vec::new() };
    let has = |from: &BootFrom| *from != BootFrom::Cd || guest.cd.is_some();
    let device = |from: &BootFrom| view::Choice {
        value: from.to_string(),
        label: format!("Start from {}", from_words(guest, from)),
    };
    let mut starts: Vec<_> = order.iter().filter(|from| *from != usual && has(from)).map(device).collect();
    let menu = if guest.row.boot.is_uefi() { "Start into the firmware" } else { "Start with the boot menu" };
    starts.push(view::Choice { value: "setup".to_owned(), label: menu.to_owned() });
    starts
}

/// "disk 1", "CD", "network".
pub fn from_words(guest: &Guest, from: &BootFrom) -> String {
    match from {
        BootFrom::Cd => "CD".to_owned(),
        BootFrom::Network => "network".to_owned(),
        BootFrom::Disk(id) => {
            let place = guest.disks.iter().position(|disk| disk.id == *id).map_or(0, |index| index + 1);
            format!("disk {place}")
        }
    }
}

pub fn head(guest: &Guest, caller: &Caller, tab: GuestTab) -> view::GuestHead {
    view::GuestHead {
        id: guest.row.id.to_string(),
        name: guest.row.name.to_string(),
        tab,
        state: state_of(guest.status.state),
        reason: reason_of(guest),
        since: since_of(guest),
        address: guest.status.addresses.first().cloned(),
        resizes: guest.row.switches.gpu && actions_of(guest, caller).console_input,
        actions: actions_of(guest, caller),
        starts: starts_of(guest, caller),
    }
}

pub fn disk_lines(state: &State, guest: &Guest) -> Vec<view::DiskLine> {
    let line = |(number, disk): (usize, &crate::store::guests::DiskRow)| view::DiskLine {
        id: disk.id.to_string(),
        label: format!("disk {}", number + 1),
        size: view::Bytes(disk.size_bytes),
        used: state.guests.disk_used_bytes(&disk.id).map(view::Bytes),
        bus: disk.bus.as_str().to_owned(),
        note: match (disk.ready, disk.leaving) {
            (false, _) => "being copied".to_owned(),
            (true, true) => "to go when the guest lets it".to_owned(),
            (true, false) => disk.limit.words().unwrap_or_default(),
        },
        removable: guest.status.has_plugged(&disk.id) && !disk.leaving,
        limit: (disk.bus == DiskBus::Virtio).then(|| {
            let bytes = disk.limit.bytes_per_s.map(|rate| forms::typed_size(rate.get()));
            [bytes, disk.limit.operations_per_s.map(|rate| rate.to_string())].map(Option::unwrap_or_default)
        }),
    };
    guest.disks.iter().enumerate().map(line).collect()
}

fn boot_words(guest: &Guest) -> String {
    match guest.row.boot {
        BootKind::Bios => Firmware::Bios.words().to_owned(),
        BootKind::Uefi => Firmware::Uefi.words().to_owned(),
        BootKind::UefiSecure => Firmware::UefiSecure.words().to_owned(),
        BootKind::Test => "Test guest".to_owned(),
        BootKind::Kernel => {
            format!("kernel {}", guest.kernel.as_ref().map_or("", |image| image.name.as_str()))
        }
    }
}

/// "2 vCPUs, 4 GiB, BIOS, one disk of 32 GiB, network nat."
pub fn words(guest: &Guest) -> String {
    let disks = match guest.disks.as_slice() {
        [] => "no disk".to_owned(),
        [one] => format!("one disk of {}", show_size(one.size_bytes)),
        many => format!("{} disks of {}", many.len(), show_size(many.iter().map(|disk| disk.size_bytes).sum())),
    };
    let cpus = view::count(usize::try_from(guest.row.cpus).unwrap_or(0), "vCPU", "vCPUs");
    let (memory, boot, network) = (show_size(guest.row.memory_bytes), boot_words(guest), &guest.row.network);
    format!("{cpus}, {memory}, {boot}, {disks}, network {network}.")
}

pub fn facts(guest: &Guest) -> Vec<view::Fact> {
    let fact = |label, value: String, copy| view::Fact { label, value, copy };
    let row = &guest.row;
    let mut facts = vec![
        fact("vCPUs", cpu_words(row), false),
        fact("Memory", show_size(row.memory_bytes), false),
        fact("Starts from", boot_words(guest), false),
    ];
    let order: Vec<_> = guest.boot_order().iter().map(|from| from_words(guest, from)).collect();
    if order.len() > 1 {
        facts.push(fact("Boot order", order.join(", "), false));
    }
    facts.extend(guest.initrd.as_ref().map(|image| fact("Initrd", image.name.clone(), false)));
    if !row.cmdline.is_empty() {
        facts.push(fact("Command line", row.cmdline.clone(), true));
    }
    let card = match row.network_model {
        NetworkModel::Virtio => "",
        NetworkModel::E1000 => ", on an Intel e1000",
    };
    facts.push(fact("Network", format!("{}{card}", row.network), false));
    if let Some(now) = guest.status.memory_now(row.memory_bytes) {
        facts.push(fact("Memory now", format!("{} of {}", show_size(now), show_size(row.memory_bytes)), false));
    }
    if row.cpu_model != CpuModel::Host {
        facts.push(fact("Processor", row.cpu_model.words().to_owned(), false));
    }
    facts.extend(row.switches.on().map(|switch| fact(switch.label, switch.on.to_owned(), false)));
    if row.watchdog != Watchdog::None {
        facts.push(fact("Watchdog", row.watchdog.words().to_owned(), false));
    }
    facts.push(fact("Hardware address", row.mac.to_string(), true));
    facts.extend(guest.status.addresses.iter().map(|address| fact("Address", address.clone(), true)));
    if guest.status.state == GuestState::Running {
        facts.extend(agent_facts(guest));
    }
    facts.push(fact("Machine", row.machine.clone(), false));
    facts.push(fact("Id", row.id.to_string(), true));
    if let Some(engine) = &guest.status.engine {
        facts.push(fact("Engine", format!("{} (process {})", engine.version, engine.pid), false));
    }
    facts
}

/// "8", or "8: 2 sockets of 2 cores with 2 threads".
fn cpu_words(row: &GuestRow) -> String {
    if (row.sockets, row.threads) == (1, 1) {
        return row.cpus.to_string();
    }
    let part = |number: u32, one, many| view::count(usize::try_from(number).unwrap_or(0), one, many);
    let cores = row.cpus / row.sockets.saturating_mul(row.threads).max(1);
    let (sockets, cores) = (part(row.sockets, "socket", "sockets"), part(cores, "core", "cores"));
    format!("{}: {sockets} of {cores} with {}", row.cpus, part(row.threads, "thread", "threads"))
}

/// What the guest's agent says of it, or that there is none.
fn agent_facts(guest: &Guest) -> Vec<view::Fact> {
    let fact = |label, value: &str, copy| view::Fact { label, value: value.to_owned(), copy };
    let Some(agent) = &guest.status.agent else { return vec![fact("Guest agent", "not seen", false)] };
    [
        fact("System", &agent.system, false),
        fact("Host name", &agent.host_name, true),
        fact("Guest agent", &agent.version, false),
    ]
    .into_iter()
    .filter(|fact| !fact.value.is_empty())
    .collect()
}

/// Whose disks are read off the file system; a page is worth a few `stat`s.
pub fn cd_words(guest: &Guest) -> Option<String> {
    let name = guest.cd.as_ref().map(|image| image.name.clone());
    match guest.status.cd_present {
        Some(false) => name.map(|name| format!("{name} (ejected by the guest)")),
        Some(true) | None => name,
    }
}
