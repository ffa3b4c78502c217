//! The engine process: takes what it was handed, becomes nobody in particular, runs the guest, says how it ended.

mod plugs;
mod screen_input;

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Seek, Write},
    iter,
    os::{fd::OwnedFd, unix::net::UnixListener},
    sync::{
        Arc,
        mpsc::{Receiver, Sender},
    },
    time::{Duration, Instant},
};

use command_fds::inherited::take_fd_ownership;
use nix::sys::signal::{SigSet, Signal};

use self::screen_input::ScreenInput;
use super::{
    agent::FreezeSink,
    console,
    control::{self, Announcer, Answer, Order},
    devices::Listeners,
    disk::RawFile,
    log::GuestLog,
    machine::{Machine, MachineFiles},
    pvpanic::Panic,
    rfb,
    suspend_watch::{GivenUp, SuspendWatch},
    tpm::EmulatorSockets,
    vcpu::VcpuEvent,
};
use crate::{
    spec::{GuestSpec, Watchdog},
    types::now_ms,
    wire::{EndKind, EngineAction, EngineEnd, EngineMessage, EngineStart, Handed, Hello, Observed, PROTOCOL},
};

/// Descriptor of the start message; what it lists follows.
pub const START_FD: i32 = 3;
const START_BYTES_MAX: u64 = 1 << 20;
/// So many triple faults in a row, each so soon after the start before it, are a guest that cannot boot. Soon is long: firmware
/// takes seconds to get to what crashes where KVM is emulated.
const CRASHES_MAX: u32 = 3;
const CRASH_SOON: Duration = Duration::from_secs(60);
/// How long viewers of the serial console get to read what the guest said last.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// Everything handed over, sorted.
struct Hands {
    machine: MachineFiles,
    log: GuestLog,
    end: File,
    scrollback: Option<File>,
    control: UnixListener,
    serial: UnixListener,
    vnc: UnixListener,
}

/// Runs the engine role to its end. The exit code says only whether the end was in order; the reason is in the end file.
pub fn run() -> i32 {
    let (start, hands) = match take_hands() {
        Ok(taken) => taken,
        Err(error) => {
            eprintln!("innkeeper engine: {error}");
            return 2;
        }
    };
    let (log, mut end_file) = (hands.log.clone(), hands.end.try_clone());
    let end = match guest(&start, hands) {
        Ok(end) => end,
        Err(error) => EngineEnd { how: EndKind::Failed, reason: format!("the engine could not start: {error}") },
    };
    log.say(&format!("engine: ends: {}", end.reason));
    if let Ok(file) = &mut end_file {
        let bytes = serde_json::to_vec(&end).expect("plain data");
        let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(&bytes));
    }
    i32::from(end.how != EndKind::Off)
}

/// Takes ownership of the inherited descriptors and gives up privileges.
fn take_hands() -> io::Result<(EngineStart, Hands)> {
    let take = |number: i32| {
        take_fd_ownership(number).map_err(|error| io::Error::other(format!("descriptor {number}: {error}")))
    };
    let mut json = Vec::new();
    let mut message = File::from(take(START_FD)?);
    message.rewind()?;
    message.take(START_BYTES_MAX).read_to_end(&mut json)?;
    let start: EngineStart = serde_json::from_slice(&json)?;
    start.spec.check().map_err(|bad| io::Error::other(format!("{}: {}", bad.field, bad.message)))?;
    let mut fds: Vec<(Handed, OwnedFd)> = Vec::new();
    for (index, handed) in start.handed.iter().enumerate() {
        fds.push((handed.clone(), take(START_FD + 1 + index as i32)?));
    }
    confine(start.run_as)?;
    let mut find = |wanted: &Handed| {
        let at = fds.iter().position(|(handed, _)| handed == wanted)?;
        Some(fds.swap_remove(at).1)
    };
    let missing = |what: &str| io::Error::other(format!("nobody handed over the {what}"));
    let mut disks = Vec::new();
    for index in 0..start.spec.disks.len() {
        disks.push(File::from(find(&Handed::Disk(index)).ok_or_else(|| missing("disk"))?));
    }
    let hands = Hands {
        machine: MachineFiles {
            kvm: find(&Handed::Kvm).ok_or_else(|| missing("KVM device"))?,
            firmware: find(&Handed::Firmware).map(File::from),
            variables: find(&Handed::Variables).map(File::from),
            vga_rom: find(&Handed::VgaRom).map(File::from),
            network_rom: find(&Handed::NetworkRom).map(File::from),
            kernel: find(&Handed::Kernel).map(File::from),
            initrd: find(&Handed::Initrd).map(File::from),
            cd: find(&Handed::Cd).map(File::from),
            // Several are the queues of one tap.
            network: iter::from_fn(|| find(&Handed::Network)).collect(),
            vsock: find(&Handed::VsockSocket).map(listen).transpose()?,
            tpm: sockets_of_tpm(find(&Handed::Tpm), find(&Handed::Tpm)),
            saved: find(&Handed::Saved).map(File::from),
            disks,
        },
        log: GuestLog::new(File::from(find(&Handed::Log).ok_or_else(|| missing("log"))?)),
        scrollback: find(&Handed::Scrollback).map(File::from),
        end: File::from(find(&Handed::End).ok_or_else(|| missing("end file"))?),
        control: listen(find(&Handed::ControlSocket).ok_or_else(|| missing("control socket"))?)?,
        serial: listen(find(&Handed::SerialSocket).ok_or_else(|| missing("serial socket"))?)?,
        vnc: listen(find(&Handed::VncSocket).ok_or_else(|| missing("screen socket"))?)?,
    };
    Ok((start, hands))
}

/// The control channel comes first.
fn sockets_of_tpm(control: Option<OwnedFd>, commands: Option<OwnedFd>) -> Option<EmulatorSockets> {
    Some(EmulatorSockets { control: control?.into(), commands: commands?.into() })
}

/// What was handed over with an order that is about one file.
fn one_file(mut files: Vec<OwnedFd>) -> Option<File> {
    files.pop().map(File::from)
}

/// Replies with what the guest's agent says to a freeze or a thaw.
fn frozen(answer: Answer, done: impl FnOnce(u64) + Send + 'static) -> FreezeSink {
    Box::new(move |result| match result {
        Ok(count) => {
            done(count);
            answer.with(count.to_string().into_bytes());
        }
        Err(why) => answer.refused(why),
    })
}

/// The socket was bound by somebody else; listening makes its peer credentials ours.
fn listen(socket: OwnedFd) -> io::Result<UnixListener> {
    const BACKLOG: i32 = 16;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

/// A session of its own, no privileges, no core files, nothing to gain by exec. Called while single-threaded.
fn confine(run_as: Option<u32>) -> io::Result<()> {
    // Refused when we lead a session already, as under a debugger.
    let _ = rustix::process::setsid();
    if let Some(id) = run_as {
        let (uid, gid) = (nix::unistd::Uid::from_raw(id), nix::unistd::Gid::from_raw(id));
        nix::unistd::setgroups(&[])?;
        nix::unistd::setresgid(gid, gid, gid)?;
        nix::unistd::setresuid(uid, uid, uid)?;
    }
    rustix::thread::set_no_new_privs(true)?;
    let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(rustix::process::Resource::Core, none)?;
    Ok(())
}

/// Makes the machine and follows orders until the guest is off.
fn guest(start: &EngineStart, hands: Hands) -> io::Result<EngineEnd> {
    let spec = &start.spec;
    let (orders, inbox) = control::orders();
    on_terminate(orders.clone())?;
    let (faults, addresses, panics, vcpus) = (orders.clone(), orders.clone(), orders.clone(), orders.clone());
    let (agents, watchdogs) = (orders.clone(), orders.clone());
    let listeners = Listeners {
        host_fault: Arc::new(move |reason| drop(faults.send(Order::HostFault(reason)))),
        addresses: Arc::new(move |list| drop(addresses.send(Order::Addresses(list)))),
        panic: Arc::new(move |said| drop(panics.send(Order::Panic(said)))),
        agent: Arc::new(move || drop(agents.send(Order::AgentNews))),
        watchdog: Arc::new(move || drop(watchdogs.send(Order::Watchdog))),
    };
    let sink = Arc::new(move |event| drop(vcpus.send(Order::Vcpu(event))));
    hands.log.say(&format!(
        "engine: innkeeper {} starts \"{}\" ({} vCPUs, {} MiB)",
        env!("CARGO_PKG_VERSION"),
        spec.name,
        spec.cpus,
        spec.memory_bytes >> 20
    ));
    let cd_present = hands.machine.cd.is_some();
    let mut machine = Machine::new(spec, hands.machine, &listeners, sink, &hands.log)?;
    let present = spec.with_slots();
    let announcer = Announcer::new(Hello {
        protocol: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").into(),
        guest: spec.id.clone(),
        pid: std::process::id(),
        observed: Observed::Running,
        started_ms: now_ms(),
        cd_present,
        addresses: Vec::new(),
        crashed: false,
        agent: None,
        balloon_bytes: machine.devices.balloon.status().target_bytes,
        plugged: Some(plugs::plugged(&present, |slot| machine.devices.is_asked_for(slot))),
    });
    serve_consoles(&machine, hands.serial, hands.vnc, spec)?;
    if machine.begin()? {
        hands.log.say("engine: the guest goes on where it was suspended");
    }
    machine.resume();
    control::serve(hands.control, orders, announcer.clone())?;
    let (log, scrollback) = (hands.log, hands.scrollback);
    let asked_us = start.asked_us;
    let mut keeper = Keeper {
        machine,
        announcer,
        log,
        paused: false,
        begun: Instant::now(),
        crashes: 0,
        on_watchdog: spec.watchdog,
        asked_us,
        spec: present,
        later: VecDeque::new(),
    };
    let end = keeper.follow(&inbox);
    keeper.machine.devices.close();
    if let Some(mut file) = scrollback {
        // What the guest said last is what people want to read when it is off.
        let _ = file.write_all(&keeper.machine.devices.hub.contents());
    }
    keeper.machine.devices.hub.wait_read(LAST_WORDS);
    Ok(end)
}

/// SIGTERM presses the power button. Blocked before any thread exists, waited for in one.
fn on_terminate(orders: Sender<Order>) -> io::Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.thread_block()?;
    std::thread::Builder::new().name("signals".into()).stack_size(64 << 10).spawn(move || {
        while set.wait().is_ok() {
            if orders.send(Order::Terminate).is_err() {
                break;
            }
        }
    })?;
    Ok(())
}

fn serve_consoles(machine: &Machine, serial: UnixListener, vnc: UnixListener, spec: &GuestSpec) -> io::Result<()> {
    let uart = Arc::clone(&machine.devices.uart);
    let typed = move |bytes: &[u8]| {
        uart.lock().unwrap_or_else(std::sync::PoisonError::into_inner).type_bytes(bytes);
    };
    console::serve(serial, Arc::clone(&machine.devices.hub), Arc::new(typed))?;
    let input = Arc::new(ScreenInput::new(&machine.devices));
    rfb::serve(vnc, Arc::clone(&machine.devices.screen), input, spec.name.as_str())
}

/// The machine's thread.
struct Keeper {
    machine: Machine,
    announcer: Announcer,
    log: GuestLog,
    paused: bool,
    /// Power on, or the last reset.
    begun: Instant,
    /// Triple faults in a row, each soon after the reset before it.
    crashes: u32,
    on_watchdog: Watchdog,
    /// When somebody wished for this process, on the monotonic clock.
    asked_us: u64,
    /// With what came and without what went since the start; the slot of each disk is named.
    spec: GuestSpec,
    /// What came while the guest was being suspended.
    later: VecDeque<Order>,
}

impl Keeper {
    fn follow(&mut self, inbox: &Receiver<Order>) -> EngineEnd {
        let off = |reason: &str| EngineEnd { how: EndKind::Off, reason: reason.into() };
        while let Some(order) = self.later.pop_front().or_else(|| inbox.recv().ok()) {
            let end = match order {
                Order::Request { action: EngineAction::Suspend, files, answer } => self.suspend(files, answer, inbox),
                Order::Request { action: EngineAction::PowerOff, answer, .. } => {
                    self.machine.pause();
                    answer.done();
                    // The reply is on its way before the process goes.
                    std::thread::sleep(Duration::from_millis(20));
                    Some(off("powered off"))
                }
                Order::Request { action, files, answer } => self.request(action, files, answer),
                Order::Vcpu(VcpuEvent::PowerOff) => {
                    self.machine.pause();
                    Some(off("the guest switched itself off"))
                }
                Order::Vcpu(VcpuEvent::Eject) => {
                    self.let_go();
                    None
                }
                Order::Vcpu(VcpuEvent::Reset) => self.wished_reset(),
                Order::Vcpu(VcpuEvent::TripleFault) => self.triple_fault(),
                Order::Vcpu(VcpuEvent::Failed { reason, detail }) => {
                    self.machine.pause();
                    self.log.say(&format!("engine: {reason}\n{detail}"));
                    Some(EngineEnd { how: EndKind::Failed, reason })
                }
                Order::HostFault(reason) => {
                    self.log.say(&format!("engine: paused: {reason}"));
                    self.pause(Some(reason));
                    None
                }
                Order::Addresses(list) => {
                    let message = EngineMessage::Addresses(list.clone());
                    self.announcer.say(|hello| hello.addresses = list, &message);
                    None
                }
                Order::Panic(said) => {
                    self.log.say(match said {
                        Panic::Halted => "engine: the guest's kernel has crashed",
                        Panic::DumpFollows => "engine: the guest's kernel has crashed; another one writes a dump of it",
                    });
                    self.announcer.say(|hello| hello.crashed = true, &EngineMessage::Crashed);
                    None
                }
                Order::Watchdog => self.watchdog(),
                Order::AgentNews => {
                    let facts = self.machine.devices.agent.news();
                    let message = EngineMessage::Agent(facts.clone());
                    self.announcer.say(|hello| hello.agent = facts, &message);
                    None
                }
                Order::Terminate => {
                    self.ask_to_shut_down();
                    None
                }
            };
            if let Some(end) = end {
                return end;
            }
        }
        off("nobody gives orders any more")
    }

    fn request(&mut self, action: EngineAction, files: Vec<OwnedFd>, answer: Answer) -> Option<EngineEnd> {
        match action {
            EngineAction::Pause => {
                self.pause(None);
                answer.done();
            }
            EngineAction::Resume => {
                self.resume();
                answer.done();
            }
            EngineAction::Reset => {
                let end = self.wished_reset();
                answer.done();
                return end;
            }
            EngineAction::PressPowerButton => {
                if self.paused {
                    answer.refused("The guest is paused and cannot hear the power button.");
                } else {
                    self.ask_to_shut_down();
                    answer.done();
                }
            }
            EngineAction::Suspend => answer.refused("The guest is being suspended already."),
            EngineAction::ChangeCd => match self.change_cd(one_file(files)) {
                Ok(()) => answer.done(),
                Err(error) => answer.refused(format!("The medium cannot be used: {error}")),
            },
            EngineAction::AttachDisk(disk) => answer.result(self.attach_disk(disk, one_file(files))),
            EngineAction::AttachNetwork(network) => answer.result(self.attach_network(network, files)),
            EngineAction::Detach(device) => answer.result(self.detach(&device)),
            EngineAction::Screenshot { max_width } => {
                match self.machine.devices.screen.png(max_width.map(|width| width as usize)) {
                    Ok(png) => answer.with(png),
                    Err(error) => answer.refused(format!("No picture could be made: {error}")),
                }
            }
            EngineAction::Balloon { bytes } => {
                self.machine.devices.balloon.set_target(bytes);
                answer.done();
                self.announcer.say(|hello| hello.balloon_bytes = bytes, &EngineMessage::Balloon { bytes });
            }
            EngineAction::Freeze { .. } | EngineAction::Thaw if self.paused => {
                answer.refused("The guest is paused: nothing in it answers.");
            }
            EngineAction::Freeze { longest_s } => {
                let longest = Duration::from_secs(longest_s.into());
                let log = self.log.clone();
                self.machine.devices.agent.freeze(
                    longest,
                    frozen(answer, move |count| {
                        log.say(&format!(
                            "engine: {count} file systems of the guest are frozen, for at most {longest_s} s"
                        ));
                    }),
                );
            }
            EngineAction::Thaw => {
                let log = self.log.clone();
                self.machine.devices.agent.thaw(frozen(answer, move |_| log.say("engine: thawed")));
            }
            EngineAction::LimitDisk { disk, limit } => {
                if self.machine.devices.limit_disk(&disk, limit) {
                    answer.done();
                } else {
                    answer.refused("The guest has no such disk on virtio.");
                }
            }
            EngineAction::Statistics => {
                // Asked for the next time; what came last is told now.
                let balloon = self.machine.devices.balloon.status();
                self.machine.devices.balloon.ask_statistics();
                let first_run_us = self.machine.first_run_us();
                let statistics = serde_json::json!({
                    "exits": self.machine.exits(),
                    // From the wish for this process to the guest's first instruction.
                    "first_instruction_us": first_run_us.map(|at| at.saturating_sub(self.asked_us)),
                    "balloon": { "target_bytes": balloon.target_bytes, "actual_bytes": balloon.actual_bytes, "guest": balloon.statistics },
                    "bus_misses": self.machine.devices.pio.misses() + self.machine.devices.mmio.misses(),
                });
                answer.with(statistics.to_string().into_bytes());
            }
            EngineAction::PowerOff => {}
        }
        None
    }

    /// Writes the guest to `file` and ends; when that cannot be done, or is given up, the guest does what it did before.
    fn suspend(&mut self, files: Vec<OwnedFd>, answer: Answer, inbox: &Receiver<Order>) -> Option<EngineEnd> {
        let Some(file) = one_file(files) else {
            answer.refused("No file was handed over to suspend the guest to.");
            return None;
        };
        if self.machine.devices.agent.is_frozen() {
            answer.refused("The guest's file systems are frozen. Thaw them first.");
            return None;
        }
        self.machine.pause();
        self.later.extend(inbox.try_iter());
        // What a vCPU asked for before it was parked comes first, or it would be lost.
        if self.later.iter().any(|order| matches!(order, Order::Vcpu(_))) {
            self.later.push_back(Order::Request { action: EngineAction::Suspend, files: vec![file.into()], answer });
            return None;
        }
        let was_paused = std::mem::replace(&mut self.paused, true);
        let before = self.announcer.hello().observed;
        let mut watch = SuspendWatch {
            inbox,
            announcer: &self.announcer,
            screen: &self.machine.devices.screen,
            total: self.spec.memory_bytes,
            given_up: None,
            later: std::mem::take(&mut self.later),
            told: None,
        };
        // Seen before the reply is.
        let _ = watch.progress(0);
        answer.done();
        let begun = Instant::now();
        let written = self.machine.suspend(&self.spec, &file, &mut |looked| watch.progress(looked));
        let (given_up, later) = (watch.given_up, watch.later);
        self.later = later;
        let failure = match (written, given_up) {
            (Ok(written), _) => {
                let (file, memory) = (written.file_bytes >> 10, written.memory_bytes >> 10);
                let millis = begun.elapsed().as_millis();
                self.log.say(&format!("engine: suspended: {file} KiB, {memory} KiB of them memory, in {millis} ms"));
                return Some(EngineEnd { how: EndKind::Suspended, reason: "the guest was suspended".into() });
            }
            (Err(_), Some(GivenUp::PowerOff)) => {
                return Some(EngineEnd { how: EndKind::Off, reason: "powered off".into() });
            }
            (Err(_), Some(GivenUp::Resume)) => None,
            (Err(error), None) => Some(error.to_string()),
        };
        // Half a state takes no room.
        let _ = file.set_len(0);
        if let Some(reason) = &failure {
            self.log.say(&format!("engine: the guest could not be suspended: {reason}"));
        }
        if was_paused && failure.is_some() {
            let message = EngineMessage::State(before.clone());
            self.announcer.say(|hello| hello.observed = before, &message);
        } else {
            self.resume();
        }
        if let Some(reason) = failure {
            self.announcer.say(|_| {}, &EngineMessage::SuspendFailed(reason));
        }
        None
    }

    fn pause(&mut self, reason: Option<String>) {
        // A second reason while paused already says no more than the first.
        if self.paused && reason.is_some() {
            return;
        }
        self.machine.pause();
        self.paused = true;
        let observed = Observed::Paused { reason };
        let message = EngineMessage::State(observed.clone());
        self.announcer.say(|hello| hello.observed = observed, &message);
    }

    /// By its agent, which every system obeys; by the power button where there is none.
    fn ask_to_shut_down(&self) {
        if !self.machine.devices.agent.shut_down() {
            self.machine.devices.pm.press_power_button();
        }
    }

    fn resume(&mut self) {
        if self.paused {
            self.paused = false;
            // Its clock stood still.
            self.machine.devices.agent.set_clock(now_ms().saturating_mul(1_000_000));
            self.announcer.say(|hello| hello.observed = Observed::Running, &EngineMessage::State(Observed::Running));
        }
        self.machine.resume();
    }

    /// A reset also ends a pause: what the guest waited for is gone.
    fn reset(&mut self) -> Option<EngineEnd> {
        self.take_out_asked_for();
        if let Err(error) = self.machine.reset() {
            return Some(EngineEnd { how: EndKind::Failed, reason: format!("the guest could not be reset: {error}") });
        }
        self.begun = Instant::now();
        self.log.say("engine: reset");
        self.announcer.say(|hello| hello.crashed = false, &EngineMessage::Reset);
        self.resume();
        None
    }

    /// A reset that guest or people wished for: what crashed before is forgotten.
    fn wished_reset(&mut self) -> Option<EngineEnd> {
        self.crashes = 0;
        self.reset()
    }

    /// The guest hangs, or whoever feeds its watchdog does.
    fn watchdog(&mut self) -> Option<EngineEnd> {
        let reason = "the guest did not feed its watchdog";
        self.log.say(&format!("engine: {reason}"));
        match self.on_watchdog {
            Watchdog::None => None,
            Watchdog::Reset => self.wished_reset(),
            Watchdog::Pause => {
                self.pause(Some(reason.into()));
                None
            }
            Watchdog::PowerOff => {
                self.machine.pause();
                Some(EngineEnd { how: EndKind::Failed, reason: format!("{reason} and was powered off") })
            }
        }
    }

    /// A PC resets on a triple fault. A guest that never gets further has failed.
    fn triple_fault(&mut self) -> Option<EngineEnd> {
        self.log.say("engine: triple fault");
        self.crashes = if self.begun.elapsed() < CRASH_SOON { self.crashes + 1 } else { 1 };
        if self.crashes >= CRASHES_MAX {
            self.machine.pause();
            let reason = format!("the guest crashed {CRASHES_MAX} times in a row soon after its start (triple faults)");
            return Some(EngineEnd { how: EndKind::Failed, reason });
        }
        self.reset()
    }

    fn change_cd(&mut self, file: Option<File>) -> io::Result<()> {
        let present = file.is_some();
        match file {
            Some(file) => self.machine.devices.tray.insert(RawFile::new(file, true)?),
            None => self.machine.devices.tray.eject(),
        }
        self.announcer.say(|hello| hello.cd_present = present, &EngineMessage::CdChanged { present });
        Ok(())
    }
}
