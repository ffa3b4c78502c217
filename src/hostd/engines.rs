//! Engines: started, found again after a restart, watched to their end.
//!
//! ```text
//! RUN/guests/ID/  control.sock serial.sock vnc.sock (vsock.sock)   bound here, listened on by the engine
//!                 pid                                 who it is, so that a later hostd finds it
//!                 end.json                            what the engine wrote about its end
//! ```
//!
//! An engine outlives us: it is in a session of its own, its output goes to files, and nothing here is needed for it to run.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    process::Child,
};

use rustix::{
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};

use super::{cgroup, files::StateFiles, spawn};
use crate::{
    engine::virtio::net::PAIRS_MAX,
    error::{Error, ErrorKind, Result},
    host::{firmware::Firmware, net::Networks, passt, tap, tpm},
    spec::{Boot, BootFrom, FirstBoot, GuestSpec, NetworkModel, NetworkSpec},
    state_files::Owner,
    types::{Id, monotonic_us},
    wire::{Attachment, EndKind, EngineEnd, EngineStart, Handed, Launch, LiveEngine},
};

/// What an engine says of its end, and much more.
const END_BYTES_MAX: u64 = 16 << 10;
/// Engines under root each get a user of their own from this block, far from people's and containers' ids.
const ENGINE_IDS: std::ops::Range<u32> = 1_900_000_000..1_900_065_536;

/// The engines of one instance.
pub struct Engines {
    run: PathBuf,
    files: StateFiles,
    networks: Networks,
    /// Who may connect to engines' sockets; `None` without privilege.
    web_user: Option<Owner>,
    live: BTreeMap<Id, Engine>,
    /// Each ends with its engine, or before it; ours to reap.
    swtpms: Vec<Child>,
}

struct Engine {
    pidfd: OwnedFd,
    pid: u32,
    run_as: Option<u32>,
    /// Ours to reap; engines found again belong to init.
    child: Option<Child>,
}

/// What the file `pid` says.
#[derive(Serialize, Deserialize)]
struct PidFile {
    pid: u32,
    /// Field 22 of /proc/PID/stat: a pid that came again has another.
    started: u64,
    boot_id: String,
    run_as: Option<u32>,
}

impl Engines {
    /// Finds engines that run already. Returns also those that ended while nobody watched.
    pub fn adopt(
        run: &Path,
        files: StateFiles,
        networks: Networks,
        web_user: Option<Owner>,
    ) -> io::Result<(Engines, Vec<(Id, EngineEnd)>)> {
        let guests = run.join("guests");
        fs::create_dir_all(&guests)?;
        let mut engines =
            Engines { run: run.to_owned(), files, networks, web_user, live: BTreeMap::new(), swtpms: vec![] };
        let mut gone = Vec::new();
        for entry in fs::read_dir(guests)? {
            let Ok(id) = entry?.file_name().to_string_lossy().parse::<Id>() else { continue };
            match engines.find(&id) {
                // The host was started again since: that engine did not end, its host did.
                None if engines.is_of_an_earlier_boot(&id) => engines.clear(&id),
                Some(engine) => {
                    tracing::info!(guest = %id, pid = engine.pid, "found a running engine");
                    engines.live.insert(id, engine);
                }
                None => {
                    let end = engines.end_of(&id);
                    engines.clear(&id);
                    gone.push((id, end));
                }
            }
        }
        Ok((engines, gone))
    }

    pub fn list(&self) -> Vec<LiveEngine> {
        self.live.iter().map(|(guest, engine)| LiveEngine { guest: guest.clone(), pid: engine.pid }).collect()
    }

    /// Errors: `Conflict` without an engine of this guest.
    pub fn must_live(&self, guest: &Id) -> Result<()> {
        self.live.get(guest).map(drop).ok_or_else(|| Error::conflict("The guest does not run."))
    }

    /// Descriptors that become readable when an engine ends, with its guest.
    pub fn watches(&self) -> impl Iterator<Item = (&Id, BorrowedFd<'_>)> {
        self.live.iter().map(|(guest, engine)| (guest, engine.pidfd.as_fd()))
    }

    /// An engine's watch fired: reaps it and says how it ended.
    pub fn ended(&mut self, guest: &Id) -> EngineEnd {
        if let Some(Engine { child: Some(mut child), .. }) = self.live.remove(guest) {
            let _ = child.wait();
        }
        let end = self.end_of(guest);
        self.clear(guest);
        cgroup::release(guest);
        end
    }

    /// A child has ended: takes those away that are not engines, which have their watches.
    pub fn reap(&mut self) {
        self.swtpms.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }

    /// Kills at once; the watch fires.
    pub fn kill(&self, guest: &Id) {
        if let Some(engine) = self.live.get(guest) {
            let _ = pidfd_send_signal(&engine.pidfd, Signal::KILL);
        }
    }

    /// Starts an engine. Nothing is left behind on failure.
    ///
    /// Errors: `Conflict` while one of this guest lives or a disk is in use; what is missing otherwise, with the remedy.
    pub fn start(&mut self, launch: &Launch) -> Result<()> {
        let guest = &launch.spec.id;
        launch.spec.check().map_err(|bad| Error::invalid(bad.field, bad.message))?;
        if self.live.contains_key(guest) {
            return Err(Error::conflict("The guest's engine still runs."));
        }
        if launch.disks.len() != launch.spec.disks.len() {
            return Err(Error::invalid("disk", "Each disk needs its file."));
        }
        let result = self.try_start(launch);
        if result.is_err() {
            self.clear(guest);
        }
        result
    }

    fn try_start(&mut self, launch: &Launch) -> Result<()> {
        let guest = &launch.spec.id;
        let mut hands = Hands::default();
        hands.give(Handed::Kvm, open_kvm()?);
        for (index, (place, disk)) in launch.disks.iter().zip(&launch.spec.disks).enumerate() {
            hands.give(Handed::Disk(index), self.files.open_disk(place, disk.read_only)?.into());
        }
        for (handed, place) in
            [(Handed::Cd, &launch.cd), (Handed::Kernel, &launch.kernel), (Handed::Initrd, &launch.initrd)]
        {
            if let Some(place) = place {
                hands.give(handed, self.files.open_to_read(place)?.into());
            }
        }
        match launch.spec.boot {
            Boot::Bios => hands.give(Handed::Firmware, Firmware::Bios.open()?),
            Boot::Uefi { secure_boot } => {
                hands.give(Handed::Firmware, Firmware::Uefi.open()?);
                hands.give(Handed::Variables, self.files.open_variables(guest, secure_boot)?.into());
            }
            Boot::Kernel { .. } | Boot::Test { .. } => {}
        }
        if matches!(launch.spec.boot, Boot::Bios | Boot::Uefi { .. }) {
            hands.give(Handed::VgaRom, Firmware::VgaRom.open()?);
        }
        if let Some((rom, first)) = network_rom(&launch.spec) {
            match rom.open() {
                Ok(rom) => hands.give(Handed::NetworkRom, rom),
                Err(error) if first => return Err(error),
                // What comes before it may well be there.
                Err(_) => {}
            }
        }
        if launch.resume {
            hands.give(Handed::Saved, self.files.open_saved(guest)?.into());
        } else {
            self.files.remove_saved(guest)?;
        }
        let run_as = self.free_id();
        if let Some(attachment) = &launch.attachment {
            for queue in self.connect(&launch.spec, attachment, run_as)? {
                hands.give(Handed::Network, queue);
            }
        }
        if launch.spec.switches.tpm {
            let folder = self.files.open_tpm(guest, run_as)?;
            let tpm = tpm::start(folder, run_as, self.files.open_log(guest)?)?;
            self.swtpms.push(tpm.child);
            hands.give(Handed::Tpm, tpm.control);
            hands.give(Handed::Tpm, tpm.commands);
        }
        hands.give(Handed::Log, self.files.open_log(guest)?.into());
        hands.give(Handed::Scrollback, self.files.open_scrollback(guest)?.into());
        let unavailable = |error: io::Error| {
            Error::new(ErrorKind::Unavailable, format!("Cannot start the engine: {error}.")).because(error)
        };
        self.run_files(guest, launch.spec.switches.vsock, &mut hands).map_err(unavailable)?;
        let output = self.files.open_log(guest)?;
        let start = EngineStart { spec: launch.spec.clone(), handed: hands.names, run_as, asked_us: monotonic_us() };
        let child = spawn::engine(&start, hands.fds, output).map_err(unavailable)?;
        if let Err(error) = cgroup::enclose(guest, child.id()) {
            tracing::debug!(%guest, %error, "the engine has no control group of its own");
        }
        let engine = self.watch(guest, child, run_as).map_err(unavailable)?;
        tracing::info!(%guest, pid = engine.pid, "started an engine");
        self.live.insert(guest.clone(), engine);
        Ok(())
    }

    /// The host's end of the guest's network card: a tap's queues, with the kernel's virtio-net for each where there is that, or one socket.
    fn connect(&self, spec: &GuestSpec, attachment: &Attachment, run_as: Option<u32>) -> Result<Vec<OwnedFd>> {
        if *attachment == Attachment::User {
            return passt::start(run_as).map(|socket| vec![socket]);
        }
        let tap = tap::open(&tap::name_of(&spec.id), queues_of(spec))?;
        match attachment {
            Attachment::Nat => self.networks.attach_nat(&tap.name)?,
            Attachment::Bridge(bridge) => self.networks.attach_bridge(bridge, &tap.name)?,
            Attachment::User => {}
        }
        let mut links = tap.queues;
        if spec.network.as_ref().is_some_and(|network| network.model == NetworkModel::Virtio) {
            links.extend(tap::open_vhost(links.len()));
        }
        Ok(links)
    }

    /// The same for a guest that runs, and has no network card now.
    ///
    /// Errors: `Conflict` without its engine, or when that still has one; else as at a start.
    pub fn connect_more(&self, spec: &GuestSpec, attachment: &Attachment) -> Result<Vec<OwnedFd>> {
        spec.check().map_err(|bad| Error::invalid(bad.field, bad.message))?;
        self.must_live(&spec.id)?;
        let run_as = self.live.get(&spec.id).and_then(|engine| engine.run_as);
        self.connect(spec, attachment, run_as)
    }

    /// Sockets and the end file, in a folder of the guest's own.
    fn run_files(&self, guest: &Id, vsock: bool, hands: &mut Hands) -> io::Result<()> {
        let folder = self.folder(guest);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        let always = [
            (Handed::ControlSocket, "control.sock"),
            (Handed::SerialSocket, "serial.sock"),
            (Handed::VncSocket, "vnc.sock"),
        ];
        for (handed, name) in always.into_iter().chain(vsock.then_some((Handed::VsockSocket, "vsock.sock"))) {
            let path = folder.join(name);
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(&path)?)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            let owner = self.web_user;
            std::os::unix::fs::chown(&path, owner.map(|owner| owner.user), owner.map(|owner| owner.group))?;
            hands.give(handed, socket);
        }
        let end = fs::File::options().create(true).truncate(true).write(true).open(folder.join("end.json"))?;
        hands.give(Handed::End, end.into());
        Ok(())
    }

    /// Remembers a started engine, also for a later hostd.
    fn watch(&self, guest: &Id, mut child: Child, run_as: Option<u32>) -> io::Result<Engine> {
        let pid = child.id();
        let remembered = (|| {
            let pidfd = open_pidfd(pid)?;
            // Gone already: it said why.
            let started = started(pid).ok_or_else(|| io::Error::other(self.end_of(guest).reason))?;
            let file = PidFile { pid, started, boot_id: boot_id(), run_as };
            fs::write(self.folder(guest).join("pid"), serde_json::to_vec(&file)?)?;
            Ok(pidfd)
        })();
        match remembered {
            Ok(pidfd) => Ok(Engine { pidfd, pid, run_as, child: Some(child) }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// The engine of a guest from an earlier life of ours, if that very process still runs.
    fn find(&self, guest: &Id) -> Option<Engine> {
        let text = fs::read(self.folder(guest).join("pid")).ok()?;
        let file: PidFile = serde_json::from_slice(&text).ok()?;
        if file.boot_id != boot_id() {
            return None;
        }
        // The descriptor first: it stays with the process that is then checked.
        let pidfd = open_pidfd(file.pid).ok()?;
        (started(file.pid) == Some(file.started)).then_some(Engine {
            pidfd,
            pid: file.pid,
            run_as: file.run_as,
            child: None,
        })
    }

    fn is_of_an_earlier_boot(&self, guest: &Id) -> bool {
        let text = fs::read(self.folder(guest).join("pid")).unwrap_or_default();
        serde_json::from_slice::<PidFile>(&text).is_ok_and(|file| file.boot_id != boot_id())
    }

    fn end_of(&self, guest: &Id) -> EngineEnd {
        // The engine wrote it, and whoever took it over may have written anything.
        let mut text = Vec::new();
        let read = File::open(self.folder(guest).join("end.json"))
            .and_then(|file| file.take(END_BYTES_MAX).read_to_end(&mut text));
        let end = read.ok().and_then(|_| serde_json::from_slice::<EngineEnd>(&text).ok());
        end.unwrap_or_else(|| EngineEnd {
            how: EndKind::Killed,
            reason: "the engine ended without a word: it was killed from outside, or the host ran out of memory".into(),
        })
    }

    fn clear(&self, guest: &Id) {
        let _ = fs::remove_dir_all(self.folder(guest));
    }

    fn folder(&self, guest: &Id) -> PathBuf {
        self.run.join("guests").join(guest.as_str())
    }

    /// An id that no live engine has; `None` without privilege.
    fn free_id(&self) -> Option<u32> {
        self.web_user?;
        let taken: Vec<u32> = self.live.values().filter_map(|engine| engine.run_as).collect();
        ENGINE_IDS.into_iter().find(|id| !taken.contains(id))
    }
}

/// What a BIOS boots from the guest's network card with, when it is to do that; and whether that comes first.
fn network_rom(spec: &GuestSpec) -> Option<(Firmware, bool)> {
    let card = spec.network.as_ref().filter(|_| spec.boot == Boot::Bios)?;
    let once = spec.first_boot == Some(FirstBoot::From(BootFrom::Network));
    let place = spec.boot_order.iter().position(|from| *from == BootFrom::Network);
    let rom = match card.model {
        NetworkModel::Virtio => Firmware::VirtioNetworkRom,
        NetworkModel::E1000 => Firmware::E1000Rom,
    };
    (once || place.is_some()).then_some((rom, once || place == Some(0)))
}

/// Queues of a guest's tap: a virtio card has a pair for each vCPU, as far as that helps; others have one.
fn queues_of(spec: &GuestSpec) -> usize {
    match &spec.network {
        Some(NetworkSpec { model: NetworkModel::Virtio, .. }) => PAIRS_MAX.min(spec.cpus as usize),
        _ => 1,
    }
}

/// Descriptors in the order of their numbers.
#[derive(Default)]
struct Hands {
    names: Vec<Handed>,
    fds: Vec<OwnedFd>,
}

impl Hands {
    fn give(&mut self, name: Handed, fd: OwnedFd) {
        self.names.push(name);
        self.fds.push(fd);
    }
}

fn open_kvm() -> Result<OwnedFd> {
    match fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(file) => Ok(file.into()),
        Err(error) => {
            let remedy = match error.kind() {
                io::ErrorKind::NotFound => {
                    "Turn on virtualization in the firmware setup, or load the module kvm-intel or kvm-amd."
                }
                io::ErrorKind::PermissionDenied => {
                    "Add the user who runs Innkeeper to the group kvm, and log in again."
                }
                _ => "See innkeeper doctor.",
            };
            Err(Error::new(ErrorKind::Unavailable, format!("Cannot open /dev/kvm ({error}). {remedy}")).because(error))
        }
    }
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// When a process started, in ticks since boot; `None` when it is not there, or only a zombie.
pub(super) fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command in parentheses may hold anything; the fields after it are plain.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if state == "Z" { None } else { fields.nth(18)?.parse().ok() }
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_and_not_by_its_number() {
        let me = std::process::id();
        assert!(started(me).is_some_and(|ticks| ticks > 0));
        assert_eq!(started(u32::MAX), None);
        let folder = tempfile::tempdir().unwrap();
        let guest = Id::random();
        let path = folder.path().join("guests").join(guest.as_str());
        let file = |started| PidFile { pid: me, started, boot_id: boot_id(), run_as: None };
        let adopt = || {
            let files = StateFiles::new(folder.path());
            Engines::adopt(folder.path(), files, Networks::new(folder.path(), folder.path()), None).unwrap()
        };
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("pid"), serde_json::to_vec(&file(started(me).unwrap())).unwrap()).unwrap();
        let (engines, gone) = adopt();
        assert_eq!(engines.list(), [LiveEngine { guest: guest.clone(), pid: me }]);
        assert!(gone.is_empty());
        fs::write(path.join("pid"), serde_json::to_vec(&file(1)).unwrap()).unwrap();
        fs::write(path.join("end.json"), r#"{"how":"off","reason":"the guest switched itself off"}"#).unwrap();
        let (engines, gone) = adopt();
        assert!(engines.list().is_empty(), "another process has that number");
        assert_eq!(gone.first().map(|(id, end)| (id, end.how)), Some((&guest, EndKind::Off)));
        assert!(!path.exists(), "told once");
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("pid"), serde_json::to_vec(&PidFile { boot_id: "other".into(), ..file(1) }).unwrap())
            .unwrap();
        let (engines, gone) = adopt();
        assert!(engines.list().is_empty() && gone.is_empty(), "the host was started again: nothing to tell");
    }
}
