//! The messages between web role, `hostd` and engine, and how they travel.
//!
//! ```text
//! web ⇄ hostd    SOCK_SEQPACKET pair; one JSON message a packet, descriptors beside it
//! web ⇄ engine   Unix stream `control.sock`; one JSON message a line, descriptors beside it
//! hostd → engine `EngineStart` as JSON in a file at descriptor 3, its descriptors from 4 on
//! ```
//!
//! Engines outlive a server, and may be older or newer: unknown fields are ignored, a line that is JSON but no message this
//! release knows is skipped, and `Hello.protocol` says what an engine speaks.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    spec::{DiskSpec, GuestSpec, NetworkSpec, RateLimit},
    types::{Id, MacAddr},
};

/// The control protocol of this release. A server speaks this one and the one before.
pub const PROTOCOL: u32 = 1;
/// The longest message, either way.
pub const MESSAGE_BYTES_MAX: usize = 128 << 10;
/// How the file of a suspended guest begins, and how as soon as a machine goes on from it.
pub const SAVED_MAGIC: &[u8; 16] = b"INNKEEPER SAVED\n";
pub const SPENT_MAGIC: &[u8; 16] = b"INNKEEPER SPENT\n";
/// How the reason of a paused guest begins that is being suspended.
pub const BEING_SUSPENDED: &str = "Being suspended";
/// The most descriptors beside one message.
pub const DESCRIPTORS_MAX: usize = 32;

// ---- web ⇄ hostd ----

/// Where a file is. The web role names files; `hostd` builds the path and opens it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// `images/ID.raw` in the state directory.
    Image(Id),
    /// `disks/ID.raw` in the state directory.
    Disk(Id),
    /// A regular file of the host that an administrator registered; absolute.
    Host(PathBuf),
}

/// How a guest's network card is connected on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attachment {
    /// A tap on our own NAT bridge. Needs privilege.
    Nat,
    /// A tap on an existing bridge. Needs privilege.
    Bridge(String),
    /// User-mode networking by `passt`.
    User,
}

/// Everything to start one engine. `files` pairs with what `spec` names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    pub spec: GuestSpec,
    /// One for each of `spec.disks`, in order.
    pub disks: Vec<Place>,
    pub cd: Option<Place>,
    pub kernel: Option<Place>,
    pub initrd: Option<Place>,
    pub attachment: Option<Attachment>,
    /// The guest goes on from its saved state.
    #[serde(default)]
    pub resume: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostRequest {
    /// Answer: `Done`. Refused while an engine of this guest lives or another holds one of its disks.
    StartEngine(Box<Launch>),
    /// Kills at once. Answer: `Done`, also when there is none; `EngineGone` follows.
    KillEngine(Id),
    /// Which engines live. Answer: `Engines`.
    ListEngines,
    /// Opens a file for reading. Answer: `File`, with one descriptor.
    OpenFile(Place),
    /// Opens a disk for a guest whose engine lives, locked as at a start. Answer: `File`, with one descriptor.
    OpenDisk { guest: Id, disk: Id },
    /// Makes the host's end of a network card for a guest whose engine lives and has none. Answer: `Done`, with the descriptors that `AttachNetwork` takes.
    ConnectNetwork { spec: Box<GuestSpec>, attachment: Attachment },
    /// Opens the file that a guest is suspended to, empty, for writing. Answer: `File`, with one descriptor.
    OpenSuspend(Id),
    /// What is known of networks. Answer: `NetworkStatus`.
    NetworkStatus,
    /// Which firmware is there. Answer: `FirmwareStatus`.
    FirmwareStatus,
    /// What this host can do, seen with `hostd`'s rights. Answer: `Findings`.
    Doctor,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostCall {
    pub seq: u64,
    pub request: HostRequest,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostAnswer {
    Done,
    Engines(Vec<LiveEngine>),
    File { size_bytes: u64 },
    NetworkStatus(NetworkStatus),
    FirmwareStatus { uefi: bool },
    Findings(Vec<Finding>),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveEngine {
    pub guest: Id,
    pub pid: u32,
}

/// What `hostd` knows of the networks it made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStatus {
    /// Whether guests can be put on bridges at all.
    pub privileged: bool,
    pub nat: Option<NatNetwork>,
    /// Existing bridges of the host.
    pub bridges: Vec<String>,
    /// What is wrong and its remedy, a sentence each.
    pub problems: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NatNetwork {
    pub bridge: String,
    pub ipv4: String,
    pub ipv6: String,
}

/// One line of `innkeeper doctor`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Stable, for scripts: `kvm`, `virtualization_flags`, `firmware_bios`, …
    pub id: String,
    pub title: String,
    pub verdict: Verdict,
    pub detail: String,
    /// What to do about it; empty when there is nothing.
    pub remedy: String,
    /// Whether guests cannot run at all without it.
    pub essential: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Ok,
    Degraded,
    Missing,
}

/// Why `hostd` did not do something: a sentence for the person, and the field it is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRefusal {
    pub kind: crate::error::ErrorKind,
    pub message: String,
}

/// What `hostd` sends: answers, in any order, and events.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostMessage {
    Answer {
        seq: u64,
        result: Result<HostAnswer, HostRefusal>,
    },
    /// An engine's process has ended; sent once for each.
    EngineGone {
        guest: Id,
        end: EngineEnd,
    },
}

/// How an engine ended, from the file it was handed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineEnd {
    pub how: EndKind,
    /// A sentence for the guest's page.
    pub reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndKind {
    /// The guest powered itself off, or was powered off.
    Off,
    /// The engine gave up: unknown exit, repeated triple faults, broken start.
    Failed,
    /// The process ended without a word: killed from outside.
    Killed,
    /// The guest's state is in the file that the engine was handed.
    Suspended,
}

// ---- hostd → engine ----

/// What a descriptor handed to the engine is; their order is that of the numbers from 4 on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Handed {
    Kvm,
    /// Bounded guest log, read and write.
    Log,
    /// Takes an `EngineEnd` as JSON.
    End,
    /// Takes the serial scrollback when the engine ends in order.
    Scrollback,
    /// Bound, not yet listening: the engine calls listen(2), so that its peer credentials are its own.
    ControlSocket,
    SerialSocket,
    VncSocket,
    /// As the others: where programs of the host reach those of the guest.
    VsockSocket,
    /// SeaBIOS or OVMF.
    Firmware,
    /// The guest's own variables of UEFI firmware, read and write.
    Variables,
    /// The VGA option ROM.
    VgaRom,
    /// The option ROM of the network card.
    NetworkRom,
    /// The n-th of `spec.disks`.
    Disk(usize),
    Cd,
    Kernel,
    Initrd,
    Network,
    /// Two streams to a `swtpm`: its control channel, then the one of TPM commands.
    Tpm,
    /// The saved state to go on from, read and write.
    Saved,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineStart {
    pub spec: GuestSpec,
    pub handed: Vec<Handed>,
    /// User and group to become before anything else; `None` keeps the caller's.
    pub run_as: Option<u32>,
    /// When the process was asked for, on the monotonic clock.
    pub asked_us: u64,
}

// ---- web ⇄ engine ----

/// What an engine is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Observed {
    Running,
    /// `reason` is set when the engine paused by itself: full disk, read error. (What it cannot emulate ends the guest as failed.)
    Paused {
        reason: Option<String>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub protocol: u32,
    pub version: String,
    pub guest: Id,
    pub pid: u32,
    pub observed: Observed,
    /// When the guest was started, milliseconds since 1970.
    pub started_ms: i64,
    pub cd_present: bool,
    #[serde(default)]
    pub addresses: Vec<String>,
    /// The guest's kernel has said that it crashed, and was not reset since.
    #[serde(default)]
    pub crashed: bool,
    /// What the guest's agent says, while there is one.
    #[serde(default)]
    pub agent: Option<AgentFacts>,
    /// What the guest shall give back of its memory.
    #[serde(default)]
    pub balloon_bytes: u64,
    /// What of the guest can be taken out while it runs; `None` of an engine that can neither do that nor put anything in.
    #[serde(default)]
    pub plugged: Option<Vec<Plugged>>,
}

/// A disk or a network card in a slot that can be filled and emptied while the guest runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plugged {
    pub device: PluggedDevice,
    /// Its PCI slot. A guest that goes on from a saved state needs the same again.
    pub slot: u8,
    /// The guest was asked to let it go, and has not yet; a reset takes it out as well.
    #[serde(default)]
    pub leaving: bool,
}

impl Plugged {
    pub fn is_card(&self) -> bool {
        matches!(self.device, PluggedDevice::Network(_))
    }
}

/// Which one it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PluggedDevice {
    Disk(Id),
    Network(MacAddr),
}

/// What qemu-guest-agent in the guest says of it: short, printable, and no more to be believed than the guest. What it did not answer is
/// empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentFacts {
    /// Of the agent.
    pub version: String,
    pub host_name: String,
    /// "Debian GNU/Linux 12 (bookworm)".
    pub system: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineMessage {
    /// First on each connection.
    Hello(Hello),
    /// To the request of the same `id`; `payload_bytes` raw bytes follow the line.
    Reply {
        id: u64,
        error: Option<String>,
        #[serde(default)]
        payload_bytes: u64,
    },
    State(Observed),
    /// The guest's network addresses, as its own packets show them.
    Addresses(Vec<String>),
    CdChanged {
        present: bool,
    },
    /// What the guest's agent says; nothing when it has gone.
    Agent(Option<AgentFacts>),
    /// The guest's kernel says that it has crashed.
    Crashed,
    /// What the guest shall give back of its memory.
    Balloon {
        bytes: u64,
    },
    /// All that can be taken out while the guest runs, after something came, was asked for, or went. What is not in it any more is
    /// gone, and its files are closed.
    Plugged(Vec<Plugged>),
    /// The guest was reset, by itself or by request.
    Reset,
    /// The guest could not be suspended, and does what it did before; a part of a sentence.
    SuspendFailed(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineRequest {
    pub id: u64,
    pub action: EngineAction,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineAction {
    Pause,
    Resume,
    Reset,
    PressPowerButton,
    /// The engine ends by itself, in order.
    PowerOff,
    /// With one descriptor: the guest is paused, written there, and the engine ends. The reply comes when it begins; `State` tells how
    /// far it is, `Resume` gives it up.
    Suspend,
    /// With one descriptor: that medium is put in. Without: ejected.
    ChangeCd,
    /// With one descriptor, locked as those at the start: the guest gets one more disk, on virtio or NVMe, in the slot that it names or
    /// in the first that is free. `Plugged` is sent before the reply.
    AttachDisk(DiskSpec),
    /// With a tap's queues, and an open `/dev/vhost-net` for each or none, or with one socket: the guest, which has no network card, gets one. `Plugged` is sent before the reply.
    AttachNetwork(NetworkSpec),
    /// Asks the guest to let this go. The reply comes when it is asked, also when it was before; `Plugged` tells when it has. One that
    /// does not listen never does: its next reset takes the device out.
    Detach(PluggedDevice),
    /// The reply's payload is a PNG, at most `max_width` wide.
    Screenshot {
        max_width: Option<u32>,
    },
    /// From now on the guest may ask a disk on virtio for so much.
    LimitDisk {
        disk: Id,
        limit: RateLimit,
    },
    /// The guest shall give so much of its memory back.
    Balloon {
        bytes: u64,
    },
    /// The guest's agent has it write its file systems out and hold them still, for at most so long. The reply comes when it has, with
    /// their number as JSON; within seconds, or never from a guest that hangs.
    Freeze {
        longest_s: u32,
    },
    /// The end of that; the same reply.
    Thaw,
    /// The reply's payload is JSON: memory, exits, counters.
    Statistics,
}

// ---- travel ----

/// Sends one JSON packet with descriptors.
///
/// Errors: longer than `MESSAGE_BYTES_MAX`, or what the kernel says; `WouldBlock` on a full non-blocking socket.
pub fn send(socket: impl AsFd, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MESSAGE_BYTES_MAX || descriptors.len() > DESCRIPTORS_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    send_bytes(socket, &bytes, descriptors)
}

/// Sends bytes with descriptors in one call. On a stream the call may take only a part: that is an error here.
pub fn send_bytes(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives one JSON packet with its descriptors; `Ok(None)` at the end of the connection.
///
/// Errors: `InvalidData` for what is not this message or is cut short; the connection is then of no more use.
pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MESSAGE_BYTES_MAX];
    let (length, descriptors) = receive_bytes(socket, &mut bytes)?;
    if length == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(bytes.get(..length).unwrap_or_default())?;
    Ok(Some((message, descriptors)))
}

/// Receives bytes with their descriptors; 0 bytes at the end of the connection.
pub fn receive_bytes(socket: impl AsFd, into: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors.extend(fds);
        }
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((got.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Seek, Write},
        os::unix::net::UnixStream,
    };

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn a_packet_arrives_with_its_descriptor() {
        let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"passed").unwrap();
        file.rewind().unwrap();
        let call = HostCall { seq: 7, request: HostRequest::OpenFile(Place::Host("/a".into())) };
        send(&near, &call, &[file.as_fd()]).unwrap();
        let (got, fds) = receive::<HostCall>(&far).unwrap().unwrap();
        assert_eq!((got.seq, got.request), (7, call.request));
        let mut text = String::new();
        std::fs::File::from(fds.into_iter().next().unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "passed");
        drop(near);
        assert!(receive::<HostCall>(&far).unwrap().is_none());
    }

    #[test]
    fn what_is_not_a_message_is_refused() {
        let (near, far) = UnixStream::pair().unwrap();
        send_bytes(&near, b"{\"seq\":", &[]).unwrap();
        assert!(receive::<HostCall>(&far).is_err());
        assert!(send(&near, &"x".repeat(MESSAGE_BYTES_MAX), &[]).is_err());
    }

    #[test]
    fn orders_of_hot_plug_are_written_as_engines_of_this_release_read_them() {
        let disk: Id = "22222222".parse().unwrap();
        let orders = [
            (r#"{"attach_disk":{"id":"22222222","bus":"virtio","read_only":false}}"#, None),
            (r#"{"attach_disk":{"id":"22222222","bus":"virtio","read_only":false,"slot":9}}"#, Some(9)),
        ];
        for (json, slot) in orders {
            let action: EngineAction = serde_json::from_str(json).unwrap();
            assert!(matches!(&action, EngineAction::AttachDisk(spec) if spec.id == disk && spec.slot == slot));
            assert_eq!(serde_json::to_string(&action).unwrap(), json);
        }
        let json = r#"{"detach":{"network":"52:54:00:01:02:03"}}"#;
        let detach = EngineAction::Detach(PluggedDevice::Network(MacAddr([0x52, 0x54, 0, 1, 2, 3])));
        assert_eq!(serde_json::to_string(&detach).unwrap(), json);
        let news = EngineMessage::Plugged(vec![Plugged { device: PluggedDevice::Disk(disk), slot: 8, leaving: true }]);
        let json = r#"{"plugged":[{"device":{"disk":"22222222"},"slot":8,"leaving":true}]}"#;
        assert_eq!(serde_json::to_string(&news).unwrap(), json);
    }

    #[test]
    fn a_newer_engine_is_understood_as_far_as_it_goes() {
        let later = r#"{"hello":{"protocol":1,"version":"9","guest":"22222222","pid":1,"observed":"running",
            "started_ms":0,"cd_present":false,"something_new":[1]}}"#;
        assert!(matches!(serde_json::from_str(later).unwrap(),
            EngineMessage::Hello(hello) if hello.version == "9" && hello.plugged.is_none()));
    }
}
