//! `innkeeper guest …`.

use std::{
    io::{self, IsTerminal, Write},
    num::NonZeroU64,
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    Failure, Outcome, PlaceArgs,
    client::{Client, encode},
    console,
    guest_args::{BusArg, CreateArgs, FirmwareArg, GuestCommand, SetArgs},
    image, say, say_json,
    table::{Align, Table},
    task,
};
use crate::{
    api::{
        Boot, ChangeCd, ChangeGuest, CreateGuest, Firmware, Freeze, Frozen, Guest, NewDisk, SetMemory, StartGuest,
        State,
    },
    spec::{CpuModel, DiskBus, NetworkModel, RateLimit, Watchdog},
    types::{parse_size, show_size},
    wire::BEING_SUSPENDED,
};

const POLL: Duration = Duration::from_millis(100);

pub fn run(client: &Client, place: &PlaceArgs, command: GuestCommand) -> Outcome {
    match command {
        GuestCommand::Ls { json } => list(client, json),
        GuestCommand::Show { name, json } => {
            let guest = fetch(client, &name)?;
            if json { say_json(&guest) } else { say(describe(&guest)) }
        }
        GuestCommand::Create(args) => create(client, place, *args),
        GuestCommand::Set(args) => set(client, place, *args),
        GuestCommand::Start { name, boot } => {
            say_state(&acted(client.send("POST", &path(&name, "/start"), &StartGuest { boot })?.json()?)?)
        }
        GuestCommand::Shutdown { name, wait } => {
            act(client, &name, "shutdown")?;
            wait.map_or(Ok(()), |seconds| wait_stopped(client, &name, seconds))
        }
        GuestCommand::Poweroff { name } => act(client, &name, "poweroff"),
        GuestCommand::Reset { name } => act(client, &name, "reset"),
        GuestCommand::Pause { name } => act(client, &name, "pause"),
        GuestCommand::Resume { name } => act(client, &name, "resume"),
        GuestCommand::Suspend { name } => {
            press(client, &name, "suspend")?;
            wait_suspended(client, &name)
        }
        GuestCommand::Discard { name, yes } => discard(client, &name, yes),
        GuestCommand::Rm { names, yes } => names.iter().try_for_each(|name| remove(client, name, yes)),
        GuestCommand::Cd { name, image, eject: _ } => {
            let image = image.map(|image| image::resolve(client, place, &image)).transpose()?;
            let said = if image.is_some() { "changed" } else { "ejected" };
            client.send("POST", &path(&name, "/cd"), &ChangeCd { image })?;
            say(format!("{name}: CD {said}"))
        }
        GuestCommand::Memory { name, size } => {
            client.send("POST", &path(&name, "/memory"), &SetMemory { memory_bytes: size })?;
            say(format!("{name}: asked to keep {}", show_size(size)))
        }
        GuestCommand::Freeze { name, seconds } => {
            let frozen: Frozen =
                client.send("POST", &path(&name, "/freeze"), &Freeze { seconds: Some(seconds) })?.json()?;
            say(format!("{name}: {} file systems are frozen, for at most {seconds} s", frozen.file_systems))
        }
        GuestCommand::Thaw { name } => {
            let thawed: Frozen = client.send("POST", &path(&name, "/thaw"), &serde_json::json!({}))?.json()?;
            say(format!("{name}: {} file systems go on", thawed.file_systems))
        }
        GuestCommand::LimitDisk { name, disk, bytes, operations } => {
            let zero = || Failure::Usage("a limit is not 0; leave it out for none".into());
            let rate = |rate: Option<u64>| rate.map(|rate| NonZeroU64::new(rate).ok_or_else(zero)).transpose();
            let limit = RateLimit { bytes_per_s: rate(bytes)?, operations_per_s: rate(operations)? };
            client.send("POST", &path(&name, &format!("/disks/{}/limit", encode(&disk))), &limit)?;
            say(format!("{name}: {disk} {}", limit.words().unwrap_or_else(|| "without a limit".into())))
        }
        GuestCommand::ResetFirmware { name } => {
            client.send("POST", &path(&name, "/reset-firmware"), &serde_json::json!({}))?;
            say(format!("{name}: the firmware starts as new"))
        }
        GuestCommand::ResetTpm { name } => {
            client.send("POST", &path(&name, "/reset-tpm"), &serde_json::json!({}))?;
            say(format!("{name}: the TPM starts as new"))
        }
        GuestCommand::Console { name, dump: true } => {
            let bytes = client.get_bytes(&path(&name, "/scrollback"))?;
            Ok(io::stdout().write_all(&bytes)?)
        }
        GuestCommand::Console { name, dump: false } => console::run(client, &name),
        GuestCommand::Screenshot { name, file } => screenshot(client, &name, &file),
        GuestCommand::Log { name } => {
            let bytes = client.get_bytes(&path(&name, "/log"))?;
            Ok(io::stdout().write_all(&bytes)?)
        }
    }
}

/// The API's path of a guest, or of something below it.
pub(super) fn path(name: &str, below: &str) -> String {
    format!("/api/v1/guests/{}{below}", encode(name))
}

fn fetch(client: &Client, name: &str) -> Outcome<Guest> {
    client.get(&path(name, ""))
}

fn list(client: &Client, json: bool) -> Outcome {
    let guests: Vec<Guest> = client.get("/api/v1/guests")?;
    if json {
        return say_json(&guests);
    }
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("STATE", Align::Left),
        ("CPUS", Align::Right),
        ("MEMORY", Align::Right),
        ("DISKS", Align::Right),
        ("ADDRESS", Align::Left),
    ]);
    for guest in guests {
        let disks: u64 = guest.disks.iter().map(|disk| disk.size_bytes).sum();
        table.row(&[
            guest.name.to_string(),
            guest.state.to_string(),
            guest.cpus.to_string(),
            show_size(guest.memory_bytes),
            if disks == 0 { "-".into() } else { show_size(disks) },
            guest.addresses.first().cloned().unwrap_or_else(|| "-".into()),
        ]);
    }
    say(table.print())
}

fn describe(guest: &Guest) -> String {
    let mut lines =
        vec![("name", guest.name.to_string()), ("id", guest.id.to_string()), ("state", guest.state.to_string())];
    if let Some(reason) = &guest.reason {
        lines.push(("reason", reason.clone()));
    }
    lines.push(("cpus", guest.cpus.to_string()));
    if (guest.sockets, guest.threads) != (1, 1) {
        lines.push(("sockets", guest.sockets.to_string()));
        lines.push(("threads", guest.threads.to_string()));
    }
    lines.push(("memory", show_size(guest.memory_bytes)));
    match &guest.boot {
        Boot::Disk { firmware } => lines.push(("boot", firmware.map_or("firmware", Firmware::words).into())),
        Boot::Test { cmdline } => lines.push(("boot", format!("test guest {cmdline}").trim_end().to_owned())),
        Boot::Kernel { kernel, initrd, cmdline } => {
            lines.push(("kernel", kernel.clone()));
            lines.extend(initrd.clone().map(|initrd| ("initrd", initrd)));
            lines.push(("cmdline", cmdline.clone()));
        }
    }
    if guest.boot_order.len() > 1 {
        lines.push(("order", guest.boot_order.join(", ")));
    }
    for disk in &guest.disks {
        let bus = disk.bus.as_str();
        let ready = match (disk.ready, disk.leaving) {
            (false, _) => ", being copied",
            (true, true) => ", to go when the guest lets it",
            (true, false) => "",
        };
        let limit = disk.limit.words().map(|words| format!(", {words}")).unwrap_or_default();
        lines.push(("disk", format!("{}  {} on {bus}{ready}{limit}", disk.id, show_size(disk.size_bytes))));
    }
    lines.push(("cdrom", guest.cdrom.as_ref().map_or_else(|| "empty".into(), |image| image.name.clone())));
    let (network, card) = (&guest.network, guest.network.model.as_str());
    lines.push(("network", format!("{}  {} on {card}", network.mode, network.mac)));
    if guest.cpu_model != CpuModel::Host {
        lines.push(("processor", guest.cpu_model.as_str().into()));
    }
    lines.extend(guest.switches.on().map(|switch| (switch.key, switch.on.to_owned())));
    if let Some(now) = guest.memory_now_bytes {
        lines.push(("memory now", show_size(now)));
    }
    if guest.watchdog != Watchdog::None {
        lines.push(("watchdog", guest.watchdog.as_str().into()));
    }
    lines.extend(guest.addresses.iter().map(|address| ("address", address.clone())));
    if let Some(agent) = &guest.agent {
        lines.push(("system", agent.system.clone()));
        lines.push(("host", agent.host_name.clone()));
        lines.push(("agent", agent.version.clone()));
    }
    lines.extend(guest.warnings.iter().map(|warning| ("warning", warning.clone())));
    lines
        .iter()
        .map(|(label, value)| format!("{label:<8} {value}").trim_end().to_owned())
        .collect::<Vec<_>>()
        .join("\n")
}

/// What a `--disk` means: a size when it reads as one, else an image.
fn new_disk(client: &Client, place: &PlaceArgs, text: &str, bus: BusArg) -> Outcome<NewDisk> {
    let bus = Some(match bus {
        BusArg::Virtio => DiskBus::Virtio,
        BusArg::Nvme => DiskBus::Nvme,
        BusArg::Ahci => DiskBus::Ahci,
        BusArg::Usb => DiskBus::Usb,
    });
    match parse_size(text) {
        Ok(bytes) => Ok(NewDisk { size_bytes: Some(bytes), bus, ..NewDisk::default() }),
        Err(_) => Ok(NewDisk { image: Some(image::resolve(client, place, text)?), bus, ..NewDisk::default() }),
    }
}

fn create(client: &Client, place: &PlaceArgs, args: CreateArgs) -> Outcome {
    let find = |image: Option<&String>| image.map(|image| image::resolve(client, place, image)).transpose();
    let cmdline = args.cmdline.unwrap_or_default();
    let boot = match (find(args.kernel.as_ref())?, args.test_guest) {
        (Some(kernel), _) => Boot::Kernel { kernel, initrd: find(args.initrd.as_ref())?, cmdline },
        (None, true) => Boot::Test { cmdline },
        (None, false) if !cmdline.is_empty() => {
            return Err(Failure::Usage("--cmdline needs --kernel or --test-guest".into()));
        }
        (None, false) => Boot::Disk { firmware: firmware(args.firmware) },
    };
    let disks =
        args.disk.iter().map(|text| new_disk(client, place, text, args.disk_bus)).collect::<Outcome<Vec<_>>>()?;
    let wanted = CreateGuest {
        name: args.name,
        cpus: args.cpus,
        sockets: args.sockets,
        threads: args.threads,
        memory_bytes: args.memory,
        boot: Some(boot),
        boot_order: args.boot_order,
        disks,
        cdrom: find(args.cdrom.as_ref())?,
        network: args.network,
        network_model: args.network_card.map(NetworkModel::from),
        watchdog: args.machine.watchdog,
        cpu_model: args.machine.cpu_model,
        switches: args.machine.switches.0,
        // Asked for below, where its failure is heard.
        start: false,
    };
    let made: Guest = client.send("POST", "/api/v1/guests", &wanted)?.json()?;
    let made = settle(client, made)?;
    if !args.json {
        say(format!("{} created", made.name))?;
    }
    let started = if args.start { press(client, made.id.as_str(), "start").map(Some) } else { Ok(None) };
    if args.json {
        say_json(&fetch(client, made.id.as_str())?)?;
    }
    match started {
        Ok(Some(guest)) if !args.json => say_state(&guest),
        Ok(_) => Ok(()),
        Err(failure) => Err(Failure::failed(format!("{} is created, but does not start: {failure}", made.name))),
    }
}

/// Waits for the disks of a guest that was made or changed, and passes on what the server warns of.
fn settle(client: &Client, mut guest: Guest) -> Outcome<Guest> {
    let warnings = std::mem::take(&mut guest.warnings);
    if let Some(task) = guest.task.take() {
        task::wait(client, task.as_str())?;
        guest = fetch(client, guest.id.as_str())?;
    }
    for warning in &warnings {
        let _ = writeln!(io::stderr(), "innkeeper: {warning}");
    }
    Ok(guest)
}

fn firmware(arg: Option<FirmwareArg>) -> Option<Firmware> {
    arg.map(|arg| match arg {
        FirmwareArg::Bios => Firmware::Bios,
        FirmwareArg::Uefi => Firmware::Uefi,
        FirmwareArg::UefiSecure => Firmware::UefiSecure,
    })
}

fn set(client: &Client, place: &PlaceArgs, args: SetArgs) -> Outcome {
    let now = fetch(client, &args.name)?;
    let find = |image: &str| image::resolve(client, place, image);
    let boot = changed_boot(&args, &now.boot, &find)?;
    let remove_disks = args
        .remove_disk
        .iter()
        .map(|id| id.parse().map_err(|error| Failure::Usage(format!("--remove-disk: {error}"))))
        .collect::<Outcome<Vec<_>>>()?;
    let add_disks =
        args.add_disk.iter().map(|text| new_disk(client, place, text, args.disk_bus)).collect::<Outcome<Vec<_>>>()?;
    let change = ChangeGuest {
        name: args.new_name,
        cpus: args.cpus,
        sockets: args.sockets,
        threads: args.threads,
        memory_bytes: args.memory,
        boot,
        boot_order: args.boot_order,
        cdrom: None,
        network: args.network,
        network_model: args.network_card.map(NetworkModel::from),
        watchdog: args.machine.watchdog,
        cpu_model: args.machine.cpu_model,
        switches: args.machine.switches.0,
        add_disks,
        remove_disks,
    };
    if change == ChangeGuest::default() {
        return Err(Failure::Usage("nothing to change; \"innkeeper guest set --help\" lists what can be set".into()));
    }
    let guest: Guest = client.send("PATCH", &path(now.id.as_str(), ""), &change)?.json()?;
    say(format!("{} changed", settle(client, guest)?.name))
}

/// The boot that results from the options given, or nothing when none is about it.
fn changed_boot(args: &SetArgs, now: &Boot, find: &dyn Fn(&str) -> Outcome<String>) -> Outcome<Option<Boot>> {
    if args.firmware.is_some() {
        return Ok(Some(Boot::Disk { firmware: firmware(args.firmware) }));
    }
    if args.test_guest {
        let kept = if let Boot::Test { cmdline } = now { cmdline.clone() } else { String::new() };
        return Ok(Some(Boot::Test { cmdline: args.cmdline.clone().unwrap_or(kept) }));
    }
    if args.kernel.is_none() && args.initrd.is_none() && args.cmdline.is_none() {
        return Ok(None);
    }
    let (kernel_now, initrd_now, cmdline_now) = match now {
        Boot::Kernel { kernel, initrd, cmdline } => (Some(kernel.clone()), initrd.clone(), cmdline.clone()),
        Boot::Test { .. } if args.kernel.is_none() && args.initrd.is_none() => {
            return Ok(args.cmdline.clone().map(|cmdline| Boot::Test { cmdline }));
        }
        Boot::Test { .. } | Boot::Disk { .. } => (None, None, String::new()),
    };
    let kernel = match &args.kernel {
        Some(kernel) => find(kernel)?,
        None => kernel_now.ok_or_else(|| Failure::Usage("--initrd and --cmdline need a kernel".into()))?,
    };
    let initrd = match args.initrd.as_deref() {
        Some("") => None,
        Some(initrd) => Some(find(initrd)?),
        None => initrd_now,
    };
    Ok(Some(Boot::Kernel { kernel, initrd, cmdline: args.cmdline.clone().unwrap_or(cmdline_now) }))
}

fn act(client: &Client, name: &str, action: &str) -> Outcome {
    say_state(&press(client, name, action)?)
}

/// The guest after an action. Errors: the server's sentence, or why the guest has failed.
fn press(client: &Client, name: &str, action: &str) -> Outcome<Guest> {
    acted(client.request("POST", &path(name, &format!("/{action}")), None)?.good()?.json()?)
}

fn acted(guest: Guest) -> Outcome<Guest> {
    match (&guest.reason, guest.state) {
        (Some(reason), State::Failed) => Err(Failure::failed(format!("{}: {reason}", guest.name))),
        _ => Ok(guest),
    }
}

fn say_state(guest: &Guest) -> Outcome {
    match &guest.reason {
        Some(reason) => say(format!("{}: {} ({reason})", guest.name, guest.state)),
        None => say(format!("{}: {}", guest.name, guest.state)),
    }
}

fn wait_stopped(client: &Client, name: &str, seconds: u64) -> Outcome {
    let deadline = Instant::now() + Duration::from_secs(seconds.min(24 * 3600));
    loop {
        let guest = fetch(client, name)?;
        if !guest.state.is_live() {
            return say(format!("{}: {}", guest.name, guest.state));
        }
        if Instant::now() >= deadline {
            return Err(Failure::failed(format!("{} is still {} after {seconds} s.", guest.name, guest.state)));
        }
        sleep(POLL);
    }
}

/// Waits until the guest is suspended, as long as its engine writes.
fn wait_suspended(client: &Client, name: &str) -> Outcome {
    loop {
        let guest = fetch(client, name)?;
        let writes = guest.reason.as_deref().is_some_and(|reason| reason.starts_with(BEING_SUSPENDED));
        if guest.state == State::Suspended {
            return say(format!("{}: {}", guest.name, guest.state));
        }
        if !guest.state.is_live() || !writes {
            let why = guest.reason.unwrap_or_else(|| "it was given up.".into());
            return Err(Failure::failed(format!("{} is {} and not suspended: {why}", guest.name, guest.state)));
        }
        sleep(POLL);
    }
}

/// Takes a saved state away.
fn discard(client: &Client, name: &str, yes: bool) -> Outcome {
    let guest = fetch(client, name)?;
    if guest.state != State::Suspended {
        return Err(Failure::failed(format!("{} is {}: it has no saved state.", guest.name, guest.state)));
    }
    let text = format!("What {} had in memory goes. Its disks stay as they are.", guest.name);
    say(text)?;
    if !yes && io::stdin().is_terminal() {
        write!(io::stderr(), "Type yes to discard it: ")?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        if answer.trim() != "yes" {
            return Err(Failure::failed("Nothing was discarded."));
        }
    }
    act(client, name, "poweroff")
}

/// Names what goes, asks on a terminal, deletes.
fn remove(client: &Client, name: &str, yes: bool) -> Outcome {
    let guest = fetch(client, name)?;
    if guest.state.is_live() {
        let text = format!("{} is {}. Shut it down or power it off before it is removed.", guest.name, guest.state);
        return Err(Failure::failed(text));
    }
    let disks: Vec<String> =
        guest.disks.iter().map(|disk| format!("{} ({})", disk.id, show_size(disk.size_bytes))).collect();
    let goes = match disks.as_slice() {
        [] => format!("{} has no disks.", guest.name),
        [one] => format!("{} goes, and with it its disk {one}.", guest.name),
        many => format!("{} goes, and with it its disks {}.", guest.name, many.join(", ")),
    };
    say(goes)?;
    if !yes && io::stdin().is_terminal() {
        write!(io::stderr(), "Type the guest's name to delete it: ")?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        if answer.trim() != guest.name.as_str() {
            return Err(Failure::failed("Nothing was deleted."));
        }
    }
    let confirm = json!({ "confirm": guest.name });
    client.send("DELETE", &path(guest.id.as_str(), ""), &confirm)?;
    say(format!("{} removed", guest.name))
}

fn screenshot(client: &Client, name: &str, file: &Path) -> Outcome {
    let bytes = client.get_bytes(&path(name, "/screenshot.png"))?;
    std::fs::write(file, &bytes)
        .map_err(|error| Failure::failed(format!("Cannot write {}: {error}.", file.display())))?;
    say(format!("{} written", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> SetArgs {
        use clap::Parser;
        let words = ["innkeeper", "guest", "set", "web01"].into_iter().chain(line.split_whitespace());
        match super::super::Cli::try_parse_from(words).unwrap().command {
            super::super::Command::Guest(GuestCommand::Set(args)) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_what_was_said_about_booting_changes() {
        let find = |image: &str| Ok(format!("id-{image}"));
        let kernel = Boot::Kernel { kernel: "k".into(), initrd: Some("i".into()), cmdline: "quiet".into() };
        let case = |line: &str, now: &Boot| changed_boot(&args(line), now, &find);
        assert_eq!(case("--cpus 2", &kernel).unwrap(), None);
        let with = |initrd: Option<&str>, kernel: &str, cmdline: &str| {
            Some(Boot::Kernel { kernel: kernel.into(), initrd: initrd.map(Into::into), cmdline: cmdline.into() })
        };
        assert_eq!(case("--cmdline debug", &kernel).unwrap(), with(Some("i"), "k", "debug"));
        assert_eq!(case("--kernel n", &kernel).unwrap(), with(Some("i"), "id-n", "quiet"));
        assert_eq!(case("--initrd=", &kernel).unwrap(), with(None, "k", "quiet"));
        let bios = Boot::Disk { firmware: Some(Firmware::Bios) };
        assert_eq!(case("--firmware uefi", &kernel).unwrap(), Some(Boot::Disk { firmware: Some(Firmware::Uefi) }));
        assert!(case("--cmdline x", &bios).is_err());
        let test = Boot::Test { cmdline: String::new() };
        let flood = Boot::Test { cmdline: "flood".into() };
        assert_eq!(case("--cmdline flood", &test).unwrap(), Some(flood.clone()));
        assert_eq!(case("--test-guest", &kernel).unwrap(), Some(test));
        assert_eq!(case("--test-guest", &flood).unwrap(), Some(flood.clone()));
        assert_eq!(case("--test-guest --cmdline flood", &bios).unwrap(), Some(flood));
    }
}
