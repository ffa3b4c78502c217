//! The NAT network for real, in network namespaces of our own: made, mended, used by a guest that asks for an address, removed without trace.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should say where it stopped")]

use std::{
    fs,
    net::UdpSocket,
    os::fd::AsFd,
    path::Path,
    process::Command,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use innkeeper::{
    host::{
        net::{BRIDGE, Networks},
        passt, tap,
    },
    state_files::HOST_FOLDER,
};
use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{setsockopt, sockopt},
};

/// Runs `test` in a new network namespace, in which only a loopback interface is up; or says why it cannot.
fn in_a_network_of_our_own(test: impl FnOnce() + Send + 'static) {
    let missing = ["ip", "nft", "dnsmasq"].into_iter().find(|tool| !has_tool(tool));
    if let Some(tool) = missing {
        return println!("skipped: \"{tool}\" is missing");
    }
    // A thread of its own: a namespace belongs to the thread that made it and to the children it spawns.
    let ran = thread::spawn(move || {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            return println!("skipped: no network namespace without root ({error})");
        }
        ip("link set lo up");
        test();
    });
    ran.join().unwrap();
}

fn has_tool(name: &str) -> bool {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|place| Path::new(place).join(name).exists())
}

fn printed(program: &str, arguments: &str) -> String {
    let path = "/usr/sbin:/usr/bin:/sbin:/bin";
    let output = Command::new(program).args(arguments.split_whitespace()).env("PATH", path).output().unwrap();
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn ip(arguments: &str) -> String {
    printed("ip", arguments)
}

/// What must be after removal as it was before: interfaces, addresses, routes, rules, forwarding.
fn traces() -> String {
    let mut all = [ip("-o address"), ip("route show table all"), printed("nft", "list ruleset")].join("--\n");
    for name in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv6/conf/default/accept_ra"] {
        all += &format!("{name} {}", fs::read_to_string(format!("/proc/sys/{name}")).unwrap_or_default());
    }
    all
}

fn wait_for<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

struct Folders {
    state: tempfile::TempDir,
    run: tempfile::TempDir,
}

impl Folders {
    fn new() -> Folders {
        Folders { state: tempfile::tempdir().unwrap(), run: tempfile::tempdir().unwrap() }
    }
    fn networks(&self) -> Networks {
        Networks::new(self.state.path(), self.run.path())
    }
    fn dnsmasq(&self) -> u32 {
        fs::read_to_string(self.run.path().join("dnsmasq.pid")).unwrap().trim().parse().unwrap()
    }
    fn files(&self) -> usize {
        let count = |folder: &Path| fs::read_dir(folder).map_or(0, Iterator::count);
        count(&self.state.path().join(HOST_FOLDER)) + count(self.run.path())
    }
}

#[test]
fn the_nat_network_is_made_once_mended_and_removed_without_trace() {
    in_a_network_of_our_own(|| {
        let folders = Folders::new();
        let networks = folders.networks();
        let before = traces();
        let nat = networks.ensure_nat().unwrap();
        assert_eq!((nat.bridge.as_str(), nat.ipv4.as_str()), (BRIDGE, "10.77.0.1/24"));
        let made = traces();
        assert!(
            made.contains("10.77.0.1/24") && made.contains("masquerade") && made.contains("ip_forward 1"),
            "{made}"
        );
        let dnsmasq = folders.dnsmasq();

        // Again, and by another process of the same state: nothing changes.
        assert_eq!(networks.ensure_nat().unwrap(), nat);
        assert_eq!(folders.networks().ensure_nat().unwrap(), nat);
        assert_eq!((traces(), folders.dnsmasq()), (made.clone(), dnsmasq));

        // Mended: somebody flushes all rules and kills dnsmasq.
        printed("nft", "flush ruleset");
        printed("kill", &format!("-9 {dnsmasq}"));
        wait_for("the end of dnsmasq", || (!networks.status().problems.is_empty()).then_some(()));
        assert!(networks.status().problems[0].contains("dnsmasq has ended"));
        networks.ensure_nat().unwrap();
        assert_eq!(traces(), made);
        assert_eq!(networks.status().problems, Vec::<String>::new());
        assert_eq!(networks.status().nat, Some(nat));

        networks.remove().unwrap();
        networks.remove().unwrap();
        assert_eq!(traces(), before);
        assert_eq!(folders.files(), 0);
    });
}

#[test]
fn two_instances_live_side_by_side_and_take_different_subnets() {
    in_a_network_of_our_own(|| {
        let (first, second) = (Folders::new(), Folders::new());
        let before = traces();
        let one = first.networks().ensure_nat().unwrap();
        let two = second.networks().ensure_nat().unwrap();
        assert_eq!((two.bridge.as_str(), two.ipv4.as_str()), ("innkeeper1", "10.77.1.1/24"));
        second.networks().remove().unwrap();
        // The first one still forwards.
        let left = traces();
        assert!(
            left.contains("ip_forward 1") && left.contains("table inet innkeeper ") && !left.contains("innkeeper1"),
            "{left}"
        );
        assert_eq!(first.networks().status().nat, Some(one));
        first.networks().remove().unwrap();
        assert_eq!(traces(), before);
    });
}

#[test]
fn a_network_for_guests_leaves_the_certificate_as_it_is() {
    in_a_network_of_our_own(|| {
        let names = innkeeper::web::tls::host_names;
        for (name, address) in
            [("eth7", "192.168.7.7/24"), ("innkeeper7", "10.77.7.1/24"), ("ik-abcd2345", "10.77.8.1/24")]
        {
            ip(&format!("link add name {name} type bridge"));
            ip(&format!("address add {address} dev {name}"));
        }
        assert!(names().contains(&"192.168.7.7".to_owned()), "{:?}", names());
        assert!(!names().iter().any(|name| name.starts_with("10.77.")), "{:?}", names());
    });
}

#[test]
fn a_subnet_that_the_host_uses_is_not_taken() {
    in_a_network_of_our_own(|| {
        ip("link add lan type bridge");
        ip("address add 10.77.0.9/23 dev lan");
        ip("link set lan up");
        let folders = Folders::new();
        assert_eq!(folders.networks().ensure_nat().unwrap().ipv4, "10.77.2.1/24");
        assert_eq!(folders.networks().status().bridges, ["lan"]);
        folders.networks().remove().unwrap();
    });
}

#[test]
fn taps_join_the_network_and_keep_it_from_being_removed() {
    in_a_network_of_our_own(|| {
        if !Path::new("/dev/net/tun").exists() {
            return println!("skipped: no /dev/net/tun");
        }
        ip("link add lan mtu 9000 type bridge");
        let folders = Folders::new();
        let networks = folders.networks();
        let first = tap::open("ik-first", 1).unwrap();
        networks.attach_nat(&first.name).unwrap();
        assert!(ip("-o link show ik-first").contains("master innkeeper0"));
        assert!(tap::open("ik-first", 1).unwrap_err().to_string().contains("in use"));
        let second = tap::open("ik-second", 2).unwrap();
        networks.attach_bridge("lan", &second.name).unwrap();
        let shown = ip("-o link show ik-second");
        assert!(shown.contains("mtu 9000") && shown.contains("master lan"), "{shown}");
        for wrong in ["ik-first", "none", "-x", "lo"] {
            assert!(networks.attach_bridge(wrong, "ik-second").is_err(), "{wrong}");
        }
        let refused = networks.remove().unwrap_err().to_string();
        assert!(refused.contains("ik-first"), "{refused}");
        drop(first);
        // The kernel removes a tap with its last descriptor.
        wait_for("the tap to go", || (!ip("-o link").contains("ik-first")).then_some(()));
        networks.remove().unwrap();
    });
}

#[test]
fn a_guest_gets_an_address() {
    in_a_network_of_our_own(|| {
        let folders = Folders::new();
        let networks = folders.networks();
        networks.ensure_nat().unwrap();
        ip("link add guest0 type veth peer name eth0");
        let (send_thread, thread_id) = mpsc::channel();
        let (send_go, go) = mpsc::channel();
        let guest = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            send_thread.send(nix::unistd::gettid()).unwrap();
            go.recv().unwrap();
            ip("link set eth0 up");
            ask_for_an_address()
        });
        ip(&format!("link set eth0 netns {}", thread_id.recv().unwrap()));
        networks.attach_bridge(BRIDGE, "guest0").unwrap();
        send_go.send(()).unwrap();
        let [a, b, c, d] = guest.join().unwrap();
        assert!([a, b, c] == [10, 77, 0] && (10..=250).contains(&d), "offered {a}.{b}.{c}.{d}");
        // It may be gone already: its other end died with the guest's namespace.
        let _ = Command::new("/sbin/ip").args(["link", "delete", "guest0"]).output();
        networks.remove().unwrap();
    });
}

/// Sends DHCPDISCOVER on `eth0` until an offer comes back; the address offered (RFC 2131, 2 and 3.1).
fn ask_for_an_address() -> [u8; 4] {
    let mut discover = vec![0; 240];
    discover[..4].copy_from_slice(&[1, 1, 6, 0]);
    discover[4..8].copy_from_slice(b"inn!");
    discover[10] = 0x80; // Answer by broadcast: we have no address.
    discover[28..34].copy_from_slice(&[0x52, 0x54, 0, 1, 2, 3]);
    discover[236..].copy_from_slice(&[99, 130, 83, 99]);
    discover.extend([53, 1, 1, 255]);
    let socket = UdpSocket::bind("0.0.0.0:68").unwrap();
    socket.set_broadcast(true).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    setsockopt(&socket.as_fd(), sockopt::BindToDevice, &"eth0".into()).unwrap();
    wait_for("an offer", || {
        // A port that has just come up may lose the first packets.
        let _ = socket.send_to(&discover, "255.255.255.255:67");
        let mut offer = [0; 1500];
        let (length, _) = socket.recv_from(&mut offer).ok()?;
        (length > 240 && offer[0] == 2 && offer[4..8] == *b"inn!").then(|| offer[16..20].try_into().unwrap())
    })
}

#[test]
fn passt_ends_with_its_engine_and_says_when_there_is_no_route() {
    if !has_tool("passt") {
        return println!("skipped: \"passt\" is missing");
    }
    if passt::has_default_route() {
        let engine_end = passt::start(None).unwrap();
        drop(engine_end);
    } else {
        println!("skipped in part: no default route");
    }
    in_a_network_of_our_own(|| {
        let refused = passt::start(None).unwrap_err().to_string();
        assert!(refused.contains("default route"), "{refused}");
    });
}
