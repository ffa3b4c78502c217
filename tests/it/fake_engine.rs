//! An engine without KVM: the sockets of a real one, and a guest that is a byte string. And the supervisor that starts such engines.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, mpsc},
    thread,
    time::Duration,
};

use innkeeper::{
    admin,
    auth::{Auth, csrf_of},
    error::ErrorKind,
    spec::{DiskSpec, GuestSpec},
    store::{Store, users::Role},
    types::{Id, MacAddr},
    web::guard::cookie_name,
    wire::{
        self, EndKind, EngineAction, EngineEnd, EngineMessage, EngineRequest, Hello, HostAnswer, HostMessage,
        HostRefusal, HostRequest, Launch, LiveEngine, Observed, PROTOCOL, Plugged, PluggedDevice,
    },
};

use crate::support::{Client, HostAnswered, PASSWORD, TestApp, usual_host};

/// What every engine of a test does.
#[derive(Clone)]
pub struct Manners {
    pub protocol: u32,
    /// Ignores its power button, and never lets a device go.
    pub stubborn: bool,
    /// Never answers on its control socket.
    pub mute: bool,
    /// So long after its start it answers first.
    pub late: Duration,
    pub starts: Result<(), String>,
    /// Is gone without an answer when it is asked for its screen, so long before its end is known.
    pub shy: Option<Duration>,
}

impl Default for Manners {
    fn default() -> Manners {
        Manners { protocol: PROTOCOL, stubborn: false, mute: false, late: Duration::ZERO, starts: Ok(()), shy: None }
    }
}

/// A PNG as far as anybody here looks.
pub const PICTURE: &[u8] = b"\x89PNG\r\n\x1a\nnot really\n{\"reset\"}\n";

pub struct Engine {
    pub launch: Launch,
    shared: Arc<Shared>,
}

struct Shared {
    guest: Id,
    manners: Manners,
    inner: Mutex<Inner>,
    grew: Condvar,
    ends: mpsc::Sender<(Id, EngineEnd)>,
}

struct Inner {
    observed: Observed,
    /// Everything the guest printed that is kept, and the offset of its first byte.
    printed: Vec<u8>,
    start: u64,
    typed: Vec<u8>,
    /// What was asked, in order.
    asked: Vec<EngineAction>,
    controls: Vec<UnixStream>,
    plugged: Vec<Plugged>,
    over: bool,
}

impl Engine {
    fn start(launch: Launch, run_dir: &Path, manners: Manners, ends: mpsc::Sender<(Id, EngineEnd)>) -> Engine {
        let guest = launch.spec.id.clone();
        let folder = run_dir.join("guests").join(guest.as_str());
        fs::create_dir_all(&folder).unwrap();
        let inner = Inner {
            observed: Observed::Running,
            printed: Vec::new(),
            start: 0,
            typed: Vec::new(),
            asked: Vec::new(),
            controls: Vec::new(),
            plugged: plugged(&launch.spec),
            over: false,
        };
        let shared = Arc::new(Shared { guest, manners, inner: Mutex::new(inner), grew: Condvar::new(), ends });
        listen(&shared, folder.join("control.sock"), control);
        listen(&shared, folder.join("serial.sock"), serial);
        listen(&shared, folder.join("vnc.sock"), vnc);
        Engine { launch, shared }
    }

    /// The guest prints.
    pub fn print(&self, bytes: &[u8]) {
        self.shared.inner.lock().unwrap().printed.extend_from_slice(bytes);
        self.shared.grew.notify_all();
    }

    /// The oldest bytes are no longer kept.
    pub fn forget(&self, count: usize) {
        let mut inner = self.shared.inner.lock().unwrap();
        inner.printed.drain(..count);
        inner.start += count as u64;
    }

    pub fn typed(&self) -> Vec<u8> {
        self.shared.inner.lock().unwrap().typed.clone()
    }

    pub fn asked(&self) -> Vec<EngineAction> {
        self.shared.inner.lock().unwrap().asked.clone()
    }

    /// The engine says something by itself.
    pub fn say(&self, message: &EngineMessage) {
        if let EngineMessage::State(observed) = message {
            self.shared.inner.lock().unwrap().observed = observed.clone();
        }
        self.shared.say(message);
    }

    /// The process ends.
    pub fn end(&self, how: EndKind, reason: &str) {
        self.shared.end(how, reason);
    }
}

impl Shared {
    /// What is plugged in changes, and everybody is told.
    fn replug(&self, change: impl FnOnce(&mut Vec<Plugged>)) {
        let mut inner = self.inner.lock().unwrap();
        change(&mut inner.plugged);
        let news = EngineMessage::Plugged(inner.plugged.clone());
        drop(inner);
        self.say(&news);
    }

    fn say(&self, message: &EngineMessage) {
        let mut line = serde_json::to_vec(message).unwrap();
        line.push(b'\n');
        self.inner.lock().unwrap().controls.retain_mut(|stream| stream.write_all(&line).is_ok());
    }

    fn end(&self, how: EndKind, reason: &str) {
        let mut inner = self.inner.lock().unwrap();
        if std::mem::replace(&mut inner.over, true) {
            return;
        }
        for stream in inner.controls.drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        self.grew.notify_all();
        let _ = self.ends.send((self.guest.clone(), EngineEnd { how, reason: reason.to_owned() }));
    }
}

fn listen(shared: &Arc<Shared>, path: PathBuf, serve: fn(&Shared, UnixStream)) {
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(path).unwrap();
    let shared = Arc::clone(shared);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (shared, stream) = (Arc::clone(&shared), stream.unwrap());
            thread::spawn(move || serve(&shared, stream));
        }
    });
}

/// The disks of a guest that could be taken out.
fn plugged(spec: &GuestSpec) -> Vec<Plugged> {
    let disks = spec.disks.iter().zip(spec.disk_slots());
    let entry = |(disk, slot): (&DiskSpec, Option<u8>)| {
        Some(Plugged { device: PluggedDevice::Disk(disk.id.clone()), slot: slot?, leaving: false })
    };
    let card = spec.network.iter().map(|network| card(network.mac));
    disks.filter_map(entry).chain(card).collect()
}

fn card(mac: MacAddr) -> Plugged {
    Plugged { device: PluggedDevice::Network(mac), slot: 18, leaving: false }
}

fn control(shared: &Shared, stream: UnixStream) {
    thread::sleep(shared.manners.late);
    // Two locks in one expression would wait for each other.
    let present = shared.inner.lock().unwrap().plugged.clone();
    let hello = Hello {
        protocol: shared.manners.protocol,
        version: "9.9".into(),
        guest: shared.guest.clone(),
        pid: 4242,
        observed: shared.inner.lock().unwrap().observed.clone(),
        started_ms: 1_000,
        cd_present: false,
        crashed: false,
        agent: None,
        balloon_bytes: 0,
        plugged: Some(present),
        addresses: vec!["192.0.2.7".into()],
    };
    if shared.manners.mute {
        thread::sleep(Duration::from_secs(3600));
    }
    let mut writer = stream.try_clone().unwrap();
    writer.write_all(format!("{}\n", serde_json::to_string(&EngineMessage::Hello(hello)).unwrap()).as_bytes()).unwrap();
    shared.inner.lock().unwrap().controls.push(writer.try_clone().unwrap());
    let mut buffer = vec![0; 64 << 10];
    let mut line = Vec::new();
    loop {
        let Ok((got, descriptors)) = wire::receive_bytes(stream.as_fd(), &mut buffer) else { return };
        if got == 0 {
            return;
        }
        line.extend_from_slice(&buffer[..got]);
        while let Some(end) = line.iter().position(|byte| *byte == b'\n') {
            let request: EngineRequest = serde_json::from_slice(&line.drain(..=end).collect::<Vec<_>>()).unwrap();
            obey(shared, &mut writer, request, descriptors.len());
        }
    }
}

fn obey(shared: &Shared, writer: &mut UnixStream, request: EngineRequest, descriptors: usize) {
    shared.inner.lock().unwrap().asked.push(request.action.clone());
    if let (EngineAction::Screenshot { .. }, Some(known_after)) = (&request.action, shared.manners.shy) {
        let _ = writer.shutdown(std::net::Shutdown::Both);
        thread::sleep(known_after);
        return shared.end(EndKind::Failed, "the engine fell");
    }
    let mut payload: &[u8] = b"";
    let mut error = None;
    match &request.action {
        EngineAction::Screenshot { .. } => payload = PICTURE,
        EngineAction::Freeze { longest_s: 7 } => error = Some("The guest has no agent that answers.".to_owned()),
        EngineAction::Freeze { .. } | EngineAction::Thaw => payload = b"3",
        EngineAction::Statistics => payload = b"{\"exits\":7}",
        EngineAction::Pause => shared.inner.lock().unwrap().observed = Observed::Paused { reason: None },
        EngineAction::Resume => shared.inner.lock().unwrap().observed = Observed::Running,
        EngineAction::ChangeCd if descriptors > 1 => error = Some("too many descriptors".to_owned()),
        EngineAction::ChangeCd => shared.say(&EngineMessage::CdChanged { present: descriptors == 1 }),
        EngineAction::Suspend => {}
        EngineAction::Balloon { bytes } => shared.say(&EngineMessage::Balloon { bytes: *bytes }),
        EngineAction::Reset => shared.say(&EngineMessage::Reset),
        EngineAction::PressPowerButton | EngineAction::PowerOff | EngineAction::LimitDisk { .. } => {}
        EngineAction::AttachDisk(_) if descriptors != 1 => error = Some("no file was handed over".to_owned()),
        EngineAction::AttachDisk(disk) => {
            shared.replug(|plugged| {
                let slot = disk.slot.unwrap_or(8 + plugged.len() as u8);
                plugged.push(Plugged { device: PluggedDevice::Disk(disk.id.clone()), slot, leaving: false });
            });
        }
        EngineAction::AttachNetwork(_) if descriptors != 2 => {
            error = Some("a tap of two queues was expected".to_owned())
        }
        EngineAction::AttachNetwork(network) => shared.replug(|plugged| plugged.push(card(network.mac))),
        EngineAction::Detach(device) => {
            shared.replug(|plugged| {
                if shared.manners.stubborn {
                    plugged.iter_mut().filter(|one| one.device == *device).for_each(|one| one.leaving = true);
                } else {
                    plugged.retain(|one| one.device != *device);
                }
            });
        }
    }
    let reply = EngineMessage::Reply { id: request.id, error, payload_bytes: payload.len() as u64 };
    let mut bytes = serde_json::to_vec(&reply).unwrap();
    bytes.push(b'\n');
    bytes.extend_from_slice(payload);
    let _ = writer.write_all(&bytes);
    match request.action {
        EngineAction::PowerOff => shared.end(EndKind::Off, "powered off"),
        EngineAction::Suspend => shared.end(EndKind::Suspended, "the guest was suspended"),
        EngineAction::PressPowerButton if !shared.manners.stubborn => shared.end(EndKind::Off, "the guest powered off"),
        _ => {}
    }
}

fn serial(shared: &Shared, stream: UnixStream) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut first = String::new();
    reader.read_line(&mut first).unwrap();
    let from = serde_json::from_str::<serde_json::Value>(&first).unwrap()["from"].as_u64();
    let mut writer = stream;
    let (start, end) = {
        let inner = shared.inner.lock().unwrap();
        (inner.start, inner.start + inner.printed.len() as u64)
    };
    let mut at = from.unwrap_or(start).max(start);
    let skipped = from.map_or(0, |from| start.saturating_sub(from));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = [0; 4096];
            while let Ok(got) = reader.read(&mut buffer) {
                if got == 0 {
                    return;
                }
                shared.inner.lock().unwrap().typed.extend_from_slice(&buffer[..got]);
            }
        });
        let mut frame = |kind: u8, bytes: &[u8]| {
            let head = [&[kind][..], &(bytes.len() as u32).to_le_bytes()].concat();
            writer.write_all(&head).and_then(|()| writer.write_all(bytes)).is_ok()
        };
        frame(1, serde_json::json!({ "offset": at, "skipped": skipped, "end": end }).to_string().as_bytes());
        loop {
            let mut inner = shared.inner.lock().unwrap();
            while at >= inner.start + inner.printed.len() as u64 && !inner.over {
                inner = shared.grew.wait(inner).unwrap();
            }
            if inner.over {
                drop(inner);
                frame(1, b"{\"closed\":\"the guest is off\"}");
                break;
            }
            let skipped = inner.start.saturating_sub(at);
            at = at.max(inner.start);
            let from = (at - inner.start) as usize;
            let chunk: Vec<u8> = inner.printed[from..].iter().take(32 << 10).copied().collect();
            drop(inner);
            if skipped > 0 {
                frame(1, serde_json::json!({ "offset": at, "skipped": skipped }).to_string().as_bytes());
            }
            at += chunk.len() as u64;
            if !frame(0, &chunk) {
                break;
            }
        }
        let _ = writer.shutdown(std::net::Shutdown::Both);
    });
}

/// Greets as RFB does, then sends everything back.
fn vnc(_: &Shared, mut stream: UnixStream) {
    stream.write_all(b"RFB 003.008\n").unwrap();
    let mut buffer = [0; 4096];
    while let Ok(got) = stream.read(&mut buffer) {
        if got == 0 || stream.write_all(&buffer[..got]).is_err() {
            return;
        }
    }
}

/// A server whose supervisor starts such engines. They outlive it, like real ones.
pub struct Lab {
    pub app: TestApp,
    world: World,
}

#[derive(Clone)]
struct World {
    engines: Arc<Mutex<BTreeMap<Id, Arc<Engine>>>>,
    manners: Arc<Mutex<Manners>>,
    ends: mpsc::Sender<(Id, EngineEnd)>,
}

impl World {
    fn host(&self) -> impl Fn(&HostRequest, &Path) -> HostAnswered + Send + 'static {
        let world = self.clone();
        move |request, state| world.answer(request, state)
    }

    fn answer(&self, request: &HostRequest, state: &Path) -> HostAnswered {
        let mut engines = self.engines.lock().unwrap();
        match request {
            HostRequest::StartEngine(launch) => {
                let id = launch.spec.id.clone();
                let refuse =
                    |message: &str| Err(HostRefusal { kind: ErrorKind::Conflict, message: message.to_owned() });
                if engines.contains_key(&id) {
                    return refuse("The engine of this guest still runs.");
                }
                let manners = self.manners.lock().unwrap().clone();
                if let Err(why) = &manners.starts {
                    return refuse(why);
                }
                let engine = Engine::start((**launch).clone(), &state.join("run"), manners, self.ends.clone());
                engines.insert(id, Arc::new(engine));
                Ok((HostAnswer::Done, vec![]))
            }
            HostRequest::KillEngine(id) => {
                if let Some(engine) = engines.get(id) {
                    engine.end(EndKind::Killed, "ended without a word");
                }
                Ok((HostAnswer::Done, vec![]))
            }
            HostRequest::ListEngines => {
                let live = engines.keys().map(|guest| LiveEngine { guest: guest.clone(), pid: 4242 }).collect();
                Ok((HostAnswer::Engines(live), vec![]))
            }
            other => usual_host(other, state),
        }
    }
}

impl Lab {
    pub fn start() -> Lab {
        Lab::with(Manners::default())
    }

    pub fn with(manners: Manners) -> Lab {
        let (ends, ended) = mpsc::channel();
        let world = World { engines: Arc::default(), manners: Arc::new(Mutex::new(manners)), ends };
        let app = TestApp::with_host(world.host());
        world.forward(&app, ended);
        Lab { app, world }
    }

    /// The server ends and another starts; the engines live on.
    pub fn restart(self) -> Lab {
        let Lab { app, mut world } = self;
        let (ends, ended) = mpsc::channel();
        world.ends = ends;
        let app = app.restart_with(world.host());
        world.forward(&app, ended);
        Lab { app, world }
    }

    /// A browser that is logged in as an administrator, without having gone through the pages of the door.
    pub fn administrator(&self) -> Client {
        let mut client = self.app.client();
        let state = self.app.state.path();
        if !admin::has_users(state).unwrap() {
            admin::create_user(state, "ada", Role::Administrator, PASSWORD).unwrap();
        }
        let auth = Auth::new(Arc::new(Store::open(state).unwrap()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let secret = runtime.block_on(auth.log_in("ada", PASSWORD, [127, 0, 0, 1].into())).unwrap();
        client.csrf = csrf_of(&secret);
        client.cookie = Some(format!("{}={secret}", cookie_name(self.app.port)));
        client
    }

    /// How engines that are started from now on behave.
    pub fn manners(&self, change: impl FnOnce(&mut Manners)) {
        change(&mut self.world.manners.lock().unwrap());
    }

    /// The engine of a guest, when it has one.
    pub fn engine(&self, guest: &str) -> Option<Arc<Engine>> {
        self.world.engines.lock().unwrap().values().find(|engine| engine.launch.spec.name.as_str() == guest).cloned()
    }

    /// The host lost power: no engine is left, and nobody saw them end.
    pub fn power_failure(&self) {
        self.world.engines.lock().unwrap().clear();
    }
}

impl World {
    /// What ends is told to the server.
    fn forward(&self, app: &TestApp, ended: mpsc::Receiver<(Id, EngineEnd)>) {
        let (socket, engines) = (app.hostd_socket(), Arc::clone(&self.engines));
        thread::spawn(move || {
            for (guest, end) in ended {
                engines.lock().unwrap().remove(&guest);
                let _ = wire::send(&socket, &HostMessage::EngineGone { guest, end }, &[]);
            }
        });
    }
}
