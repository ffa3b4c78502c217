//! A server of its own for each test: the built binary in a folder of its own, as root or as an ordinary user. Whatever a test
//! does, all of its processes are gone when it ends.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use serde_json::Value;

/// How long anything that must happen may take here: such a machine may be busy, and emulates its guests.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// "nobody", who owns nothing.
const NOBODY: u32 = 65_534;

/// Who runs the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Root,
    Ordinary,
}

/// What the server finds at `/dev/kvm`; anything but the usual needs root, for a mount namespace of its own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kvm {
    Usual,
    Denied,
    Absent,
}

pub struct World {
    folder: tempfile::TempDir,
    who: Who,
    kvm: Kvm,
    program: PathBuf,
    env: Vec<(&'static str, OsString)>,
    listen: String,
    hostd: Option<Child>,
}

/// What a command printed.
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

/// A process that cannot be mistaken for a later one with its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    started: u64,
}

/// Puts the process into a mount namespace with another `/dev/kvm`, and makes it an ordinary user where that is wanted.
const AS_SOMEBODY: &str = r#"
set -e
kvm=$1 user=$2 folder=$3; shift 3
mkdir -p "$folder"
mount -t tmpfs -o mode=755 tmpfs "$folder"
case $kvm in
open | denied)
    mode=666; [ $kvm = open ] || mode=600
    mknod -m $mode "$folder/kvm" c 10 232
    mount --bind "$folder/kvm" /dev/kvm ;;
absent)
    for name in null zero full random urandom tty; do
        touch "$folder/$name"
        mount --bind "/dev/$name" "$folder/$name"
    done
    mount --rbind "$folder" /dev ;;
esac
[ $user = root ] || exec setpriv --reuid=$user --regid=$user --clear-groups "$@"
exec setpriv --bounding-set=-net_admin "$@"
"#;

impl World {
    /// A running server as whoever runs the tests. Nothing, and the reason printed, where that is impossible.
    pub fn new() -> Option<World> {
        World::of(if geteuid().is_root() { Who::Root } else { Who::Ordinary })
    }

    /// As `new`, as root or as an ordinary user.
    pub fn of(who: Who) -> Option<World> {
        let mut world = World::without_server(who, Kvm::Usual)?;
        world.start();
        Some(world)
    }

    /// Everything but the server.
    pub fn without_server(who: Who, kvm: Kvm) -> Option<World> {
        let usable = File::options().read(true).write(true).open("/dev/kvm");
        let root = geteuid().is_root();
        let why = match usable {
            Err(error) => Some(format!("/dev/kvm cannot be used ({error})")),
            Ok(_) if !root && (who == Who::Root || kvm != Kvm::Usual) => Some("this needs root".to_owned()),
            Ok(_) => None,
        };
        if let Some(why) = why {
            println!("skipped: {why}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["state", "files"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let program = env!("CARGO_BIN_EXE_innkeeper").into();
        let listen = "127.0.0.1:0".to_owned();
        let mut world = World { folder, who, kvm, program, env: Vec::new(), listen, hostd: None };
        if root && who == Who::Ordinary {
            for name in ["", "state", "files"] {
                std::os::unix::fs::chown(world.folder.path().join(name), Some(NOBODY), Some(NOBODY)).unwrap();
            }
            // The build may be in a folder that is closed to others.
            world.copy_program();
        }
        let tried = world.output("doctor --json");
        if !tried.out.starts_with('[') {
            println!("skipped: no such place for a server can be made here ({})", tried.err.trim());
            return None;
        }
        Some(world)
    }

    /// The program becomes a copy of its own, which can be replaced.
    pub fn copy_program(&mut self) {
        let copy = self.folder.path().join("innkeeper");
        fs::copy(env!("CARGO_BIN_EXE_innkeeper"), &copy).unwrap();
        self.program = copy;
    }

    /// As an upgrade does: another file takes the name of the program.
    pub fn replace_program(&self) {
        let new = self.folder.path().join("innkeeper.new");
        fs::copy(env!("CARGO_BIN_EXE_innkeeper"), &new).unwrap();
        fs::rename(new, &self.program).unwrap();
    }

    /// For the server that is started next.
    pub fn with_env(&mut self, name: &'static str, value: impl Into<OsString>) {
        self.env.push((name, value.into()));
    }

    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub fn run_dir(&self) -> PathBuf {
        self.state().join("run")
    }

    /// A file that the server may read, as one of the host.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join("files").join(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        path
    }

    /// The program in the place and with the rights of this world.
    fn command(&self) -> Command {
        let user = if geteuid().is_root() && self.who == Who::Ordinary { Some(NOBODY) } else { None };
        let kvm = match self.kvm {
            Kvm::Usual if user.is_some() => "open",
            Kvm::Usual => "",
            Kvm::Denied => "denied",
            Kvm::Absent => "absent",
        };
        let mut command;
        if kvm.is_empty() && self.who == Who::Root {
            command = Command::new("setpriv");
            command.arg("--bounding-set=-net_admin").arg(&self.program);
        } else if kvm.is_empty() {
            command = Command::new(&self.program);
        } else {
            let user = user.map_or("root".to_owned(), |user| user.to_string());
            command = Command::new("unshare");
            command.args(["--mount", "sh", "-c", AS_SOMEBODY, "sh", kvm, &user]);
            command.arg(self.folder.path().join("dev")).arg(&self.program);
        }
        command.envs(self.env.iter().map(|(name, value)| (name, value))).stdin(Stdio::null());
        command
    }

    /// Servers that are started from now on have the port of this one.
    pub fn keep_port(&mut self) {
        self.listen = self.holder().1.to_string();
    }

    /// Starts the server and waits until it answers.
    pub fn start(&mut self) {
        let log = File::options().create(true).append(true).open(self.folder.path().join("serve.log")).unwrap();
        let mut command = self.command();
        command.args(["serve", "--listen", &self.listen, "--state"]).arg(self.state());
        self.hostd = Some(command.stdout(Stdio::null()).stderr(log).spawn().unwrap());
        self.wait("the server answers", |world| {
            let ended = world.hostd.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "the server has ended: {}", world.serve_log());
            // Its own web role, not that of a server before it.
            world.web().is_some() && world.output("guest ls").code == 0
        });
    }

    /// Waits until `true`, at most `PATIENCE`.
    pub fn wait(&mut self, what: &str, mut condition: impl FnMut(&mut World) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "waited in vain: {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    // ---- commands ----

    /// Runs a command on this state, however it ends.
    pub fn output(&self, line: &str) -> Ran {
        self.output_of(&line.split_whitespace().collect::<Vec<_>>())
    }

    pub fn output_of(&self, words: &[&str]) -> Ran {
        self.output_with(words, b"")
    }

    pub fn output_with(&self, words: &[&str], input: &[u8]) -> Ran {
        let mut command = self.command();
        command.args(words).arg("--state").arg(self.state());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let _ = child.stdin.take().unwrap().write_all(input);
        let output = child.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ran { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }

    /// A command that must succeed; what it printed.
    pub fn well(&self, line: &str) -> String {
        let ran = self.output(line);
        assert_eq!(ran.code, 0, "{line}: {}{}", ran.out, ran.err);
        ran.out
    }

    /// Makes and starts a built-in test guest.
    pub fn test_guest(&self, name: &str, cmdline: &str) {
        let mut words =
            vec!["guest", "create", name, "--test-guest", "--memory", "16M", "--network", "none", "--start"];
        words.extend(["--cmdline", cmdline]);
        let ran = self.output_of(&words);
        assert_eq!(ran.code, 0, "{}", ran.err);
        assert_eq!(self.started(name), "running", "{}", self.show(name));
    }

    /// Makes and starts a guest that boots the small kernel.
    pub fn kernel_guest(&self, name: &str, cmdline: &str) {
        let kernel = self.file("kernel", &super::kernel::elf());
        let kernel = kernel.to_str().unwrap();
        let mut words = vec!["guest", "create", name, "--kernel", kernel, "--memory", "16M", "--network", "none"];
        words.extend(["--start", "--cmdline", cmdline]);
        let ran = self.output_of(&words);
        assert_eq!(ran.code, 0, "{}", ran.err);
        self.started(name);
    }

    /// What became of a start: it may still be under way on a busy machine.
    pub fn started(&self, name: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let shown = self.show(name);
            if shown["state"] != "starting" {
                return shown["state"].as_str().unwrap().to_owned();
            }
            assert!(Instant::now() < deadline, "{name} is starting for ever: {shown}");
        }
    }

    pub fn show(&self, name: &str) -> Value {
        serde_json::from_str(&self.well(&format!("guest show {name} --json"))).unwrap()
    }

    pub fn states(&self) -> Vec<(String, String)> {
        let list: Vec<Value> = serde_json::from_str(&self.well("guest ls --json")).unwrap();
        let text = |guest: &Value, field: &str| guest[field].as_str().unwrap().to_owned();
        list.iter().map(|guest| (text(guest, "name"), text(guest, "state"))).collect()
    }

    /// Waits until the guest has this state; what is then shown of it.
    pub fn wait_for_state(&mut self, name: &str, state: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let shown = self.show(name);
            if shown["state"] == state {
                // Again, because what was read may be from the moment in between.
                return self.show(name);
            }
            assert!(Instant::now() < deadline, "{name} does not become {state}: {shown}");
        }
    }

    /// The answer to a GET on the command line's socket.
    pub fn get(&self, path: &str) -> Value {
        self.ask("GET", path)
    }

    /// The answer to a POST without a body.
    pub fn post(&self, path: &str) -> Value {
        self.ask("POST", path)
    }

    fn ask(&self, method: &str, path: &str) -> Value {
        let mut stream = UnixStream::connect(self.run_dir().join("api.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        // Either plain or in chunks: the JSON is between the outermost brackets.
        let (from, to) = (body.find(['{', '[']).unwrap(), body.rfind(['}', ']']).unwrap());
        serde_json::from_str(&body[from..=to]).unwrap_or_else(|error| panic!("{error}: {answer}"))
    }

    /// One of a running guest's sockets, without a server in between.
    pub fn socket(&self, name: &str, socket: &str) -> PathBuf {
        self.run_dir().join("guests").join(self.show(name)["id"].as_str().unwrap()).join(socket)
    }

    pub fn serve_log(&self) -> String {
        fs::read_to_string(self.folder.path().join("serve.log")).unwrap_or_default()
    }

    // ---- processes ----

    pub fn hostd(&self) -> Process {
        Process::of(self.hostd.as_ref().unwrap().id().try_into().unwrap()).unwrap()
    }

    /// What the lock file says: who serves, and where.
    pub fn holder(&self) -> (i32, std::net::SocketAddr) {
        let text = fs::read_to_string(self.state().join("serve.lock")).unwrap();
        let (pid, address) = text.trim().split_once(' ').unwrap();
        (pid.parse().unwrap(), address.parse().unwrap())
    }

    /// The web role, when it runs.
    pub fn web(&self) -> Option<Process> {
        let hostd = self.hostd().pid;
        Process::all().find(|process| process.parent() == Some(hostd) && process.arguments().contains("\0web\0"))
    }

    pub fn engine(&self, name: &str) -> Process {
        let file = fs::read_to_string(self.socket(name, "pid")).unwrap();
        let file: Value = serde_json::from_str(&file).unwrap();
        Process::of(i32::try_from(file["pid"].as_i64().unwrap()).unwrap()).unwrap()
    }

    /// All engines of this world that its files know.
    fn engines(&self) -> Vec<Process> {
        let folders = fs::read_dir(self.run_dir().join("guests")).into_iter().flatten().flatten();
        let known = |folder: &Path| -> Option<Process> {
            let file: Value = serde_json::from_slice(&fs::read(folder.join("pid")).ok()?).ok()?;
            let pid = i32::try_from(file["pid"].as_i64()?).ok()?;
            let process = Process { pid, started: file["started"].as_u64()? };
            process.is_alive().then_some(process)
        };
        folders.filter_map(|folder| known(&folder.path())).collect()
    }

    /// Without a word, as the kernel does when memory is short.
    pub fn kill_hostd(&mut self) {
        let mut hostd = self.hostd.take().unwrap();
        hostd.kill().unwrap();
        hostd.wait().unwrap();
    }

    /// Asks the server to end; how long it took, and whether it ended well.
    pub fn end_server(&mut self) -> (Duration, bool) {
        let begun = Instant::now();
        self.hostd().signal(Signal::SIGTERM);
        let status = self.hostd.take().unwrap().wait().unwrap();
        (begun.elapsed(), status.success())
    }

    /// All processes end at once, and what was in memory is gone, as when the host loses power.
    pub fn lose_power(&mut self) {
        let (engines, web) = (self.engines(), self.web());
        self.kill_hostd();
        for process in engines.iter().chain(&web) {
            process.signal(Signal::SIGKILL);
        }
        self.wait("everything has ended", |_| !engines.iter().chain(&web).any(Process::is_alive));
        fs::remove_dir_all(self.run_dir()).unwrap();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the server's log:\n{}", self.serve_log());
        }
        let web = self.hostd.as_ref().and_then(|_| self.web());
        if let Some(mut hostd) = self.hostd.take() {
            let _ = hostd.kill();
            let _ = hostd.wait();
        }
        for process in self.engines().iter().chain(&web) {
            let group = process.group();
            process.signal(Signal::SIGKILL);
            // Without a server nobody takes the group away.
            let deadline = Instant::now() + Duration::from_secs(5);
            while process.is_alive() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
            let _ = group.map(fs::remove_dir);
        }
    }
}

impl Process {
    /// A process that is there and not just a zombie.
    pub fn of(pid: i32) -> Option<Process> {
        let (state, fields) = Process { pid, started: 0 }.stat()?;
        (state != "Z").then_some(Process { pid, started: fields.get(18)?.parse().ok()? })
    }

    fn all() -> impl Iterator<Item = Process> {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        entries.filter_map(|entry| Process::of(entry.file_name().to_str()?.parse().ok()?))
    }

    /// State and the fields after it.
    fn stat(&self) -> Option<(String, Vec<String>)> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace().map(str::to_owned);
        Some((fields.next()?, fields.collect()))
    }

    pub fn is_alive(&self) -> bool {
        Process::of(self.pid) == Some(*self)
    }

    fn parent(&self) -> Option<i32> {
        self.stat()?.1.first()?.parse().ok()
    }

    fn arguments(&self) -> String {
        String::from_utf8_lossy(&fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default()).into_owned()
    }

    /// The file that it runs, as the kernel names it.
    pub fn program(&self) -> String {
        fs::read_link(format!("/proc/{}/exe", self.pid)).unwrap().display().to_string()
    }

    pub fn user(&self) -> u32 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Its control group, when that is one of a guest.
    fn group(&self) -> Option<PathBuf> {
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", self.pid)).ok()?;
        let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let name = path.rsplit('/').next()?;
        name.starts_with("guest-").then(|| Path::new("/sys/fs/cgroup").join(path))
    }

    pub fn resident_bytes(&self) -> u64 {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid)).unwrap();
        let line = smaps.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        1024 * line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        if self.is_alive() {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}
