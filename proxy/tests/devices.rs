//! Devices, routes, word of their changes, and attaching to devices, in network namespaces of
//! their own. Needs root and the commands `ip`, `tc`, `ethtool` and `mount`.
//!
//! A namespace belongs to one thread and goes with it, so nothing can be left behind.

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use aya::programs::tc::{NlOptions, TcAttachOptions};
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use aya::sys::{Stats, enable_stats};
use aya::{Ebpf, EbpfLoader};
use proxy::packet::attach::{AttachError, Attachments, Method, remove_all};
use proxy::packet::devices::{self, Device, Layer, Unfit};
use proxy::packet::netlink::{Netlink, Watch};
use proxy::packet::routes::{self, Hop};
use proxy_common::names;
use proxy_tests::facts::has_tcx;
use proxy_tests::wait::patient;
use rustix::thread::{UnshareFlags, unshare_unsafe};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/steward-ebpf"));

/// Both ways of attaching; kernels from 6.6 on have both.
const METHODS: [Method; 2] = [Method::Best, Method::Clsact];

/// No device.
const NONE: [u32; 0] = [];

/// Longer than anything takes here; only a failure waits so long.
fn bound() -> Duration {
    patient(Duration::from_secs(10))
}

/// Runs a test in a network and a mount namespace of its own.
fn isolated(test: impl FnOnce() + Send + 'static) {
    assert!(rustix::process::geteuid().is_root(), "this suite needs root: it makes namespaces");
    let worker = thread::spawn(|| {
        // SAFETY: the flags concern this thread alone: its network, its mounts, and (implied) its
        // working directory. No descriptors are unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }.expect("namespaces");
        run("mount --make-rprivate /");
        run("ip link set lo up");
        test();
    });
    if let Err(panic) = worker.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a command (words separated by spaces) in the thread's namespaces; what it prints.
#[track_caller]
fn run(command: &str) -> String {
    match attempt(command) {
        Ok(output) => output,
        Err(error) => panic!("{command}: {error}"),
    }
}

fn attempt(command: &str) -> Result<String, String> {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap_or_default()).args(words).output();
    let output = output.map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// For what a kernel may be built without: says so and goes on.
fn optional(command: &str) -> bool {
    let outcome = attempt(command);
    if let Err(error) = &outcome {
        eprintln!("not tested, this kernel lacks it: {command}: {}", error.trim());
    }
    outcome.is_ok()
}

fn netlink() -> Netlink {
    Netlink::open().expect("rtnetlink")
}

#[track_caller]
fn look_up(name: &str) -> (Device, Option<Unfit>) {
    let mut all = devices::list(&mut netlink()).expect("devices").into_iter();
    all.find(|(device, _)| device.name == name).unwrap_or_else(|| panic!("no device {name}"))
}

#[track_caller]
fn device(name: &str) -> Device {
    look_up(name).0
}

#[track_caller]
fn unfit(name: &str) -> Option<Unfit> {
    look_up(name).1
}

/// Two ends of a wire, up and without IPv6: nothing passes but what a test sends.
fn wire() {
    run("ip link add v0 type veth peer name v1");
    for end in ["v0", "v1"] {
        // Where IPv6 is built in.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{end}/disable_ipv6"), "1");
        run(&format!("ip link set {end} up"));
    }
    run("ip addr add 10.0.0.1/24 dev v0");
    run("ip neigh add 10.0.0.2 lladdr 02:00:00:00:00:02 dev v0 nud permanent");
}

#[test]
fn devices_are_told_apart() {
    isolated(|| {
        assert_eq!(unfit("lo"), Some(Unfit::Loopback));
        wire();
        run("ip link set v0 mtu 1400");
        let (wired, reason) = look_up("v0");
        assert_eq!((wired.layer, wired.mtu, reason), (Layer::Ethernet, 1400, None));
        run("ip link set v0 down");
        assert_eq!(unfit("v0"), Some(Unfit::Down));
        run("ip link set v0 up");
        run("ethtool -K v0 rx-gro-list on");
        assert_eq!(unfit("v0"), Some(Unfit::FragmentList));
        run("ethtool -K v0 rx-gro-list off");
        assert_eq!(unfit("v0"), None);
        for kind in ["dummy", "vlan link v1 id 5", "vxlan id 4 dstport 4789 remote 10.0.0.9"] {
            let (kind, rest) = kind.split_once(' ').unwrap_or((kind, ""));
            let link = rest.strip_prefix("link v1").map_or("", |_| "link v1");
            let rest = rest.trim_start_matches("link v1");
            if optional(&format!("ip link add x {link} type {kind} {rest} ")) {
                run("ip link set x up");
                let (device, reason) = look_up("x");
                assert_eq!((device.layer, reason), (Layer::Ethernet, None), "{kind}");
                run("ip link del x");
            }
        }
        for create in ["ip tuntap add x mode tun", "ip link add x type wireguard"] {
            if optional(create) {
                run("ip link set x up");
                let (device, reason) = look_up("x");
                assert_eq!((device.layer, reason), (Layer::Bare, None), "{create}");
                run("ip link del x");
            }
        }
        if optional("ip link add x type gre remote 10.0.0.9") {
            run("ip link set x up");
            assert_eq!(unfit("x"), Some(Unfit::UnknownKind));
            run("ip link del x");
        }
    });
}

#[test]
fn a_port_is_left_to_its_bridge() {
    isolated(|| {
        wire();
        run("ip link add b0 type bridge");
        run("ip link set b0 up");
        run("ip link set v1 master b0");
        assert_eq!(unfit("v1"), Some(Unfit::Enslaved));
        assert_eq!(look_up("b0"), (device("b0"), None));
        assert_eq!(device("b0").layer, Layer::Ethernet);
        run("ip link set v1 nomaster");
        assert_eq!(unfit("v1"), None);
    });
}

fn towards(destination: &str, source: &str) -> io::Result<Hop> {
    let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
    routes::towards(&mut netlink(), ip(destination), ip(source))
}

#[track_caller]
fn hop(destination: &str, source: &str) -> Hop {
    towards(destination, source).unwrap_or_else(|error| panic!("{destination}: {error}"))
}

#[test]
fn routes_are_those_of_the_kernel() {
    isolated(|| {
        wire();
        let (v0, v1) = (device("v0").index, device("v1").index);
        let over = |ifindex, mtu| Hop { ifindex, mtu, is_local: false };
        assert_eq!(hop("10.0.0.2", "10.0.0.1"), over(v0, 1500));
        assert!(hop("10.0.0.1", "10.0.0.1").is_local);
        assert!(hop("::ffff:127.0.0.1", "127.0.0.1").is_local);
        // Nothing leads there yet.
        for source in ["10.0.0.1", "203.0.113.1", "0.0.0.0"] {
            let nowhere = towards("192.0.2.7", source).expect_err("no route");
            assert_eq!(nowhere.kind(), io::ErrorKind::NetworkUnreachable, "{nowhere}");
        }
        run("ip route add 192.0.2.0/24 via 10.0.0.2");
        assert_eq!(hop("192.0.2.7", "10.0.0.1"), over(v0, 1500));
        // Neither an address of another host nor none keeps from an answer.
        assert_eq!(hop("192.0.2.7", "203.0.113.1"), over(v0, 1500));
        assert_eq!(hop("192.0.2.7", "0.0.0.0"), over(v0, 1500));
        run("ip route change 192.0.2.0/24 via 10.0.0.2 mtu 1300");
        assert_eq!(hop("192.0.2.7", "10.0.0.1"), over(v0, 1300));
        // A route cannot raise the device's limit.
        run("ip link set v0 mtu 1280");
        assert_eq!(hop("192.0.2.7", "10.0.0.1"), over(v0, 1280));
        run("ip route change 192.0.2.0/24 dev v1");
        assert_eq!(hop("192.0.2.7", "10.0.0.1"), over(v1, 1500));
        for kind in ["unreachable", "blackhole", "prohibit"] {
            run(&format!("ip route replace {kind} 192.0.2.0/24"));
            let error = towards("192.0.2.7", "10.0.0.1").expect_err(kind);
            assert_eq!(error.kind(), io::ErrorKind::HostUnreachable, "{error}");
        }
        let several = towards("10.0.0.255", "10.0.0.1").expect_err("a broadcast address");
        assert_eq!(several.kind(), io::ErrorKind::HostUnreachable, "{several}");
    });
}

#[test]
fn rules_by_source_count() {
    isolated(|| {
        wire();
        run("ip addr add 10.0.0.3/32 dev v0");
        run("ip route add default dev v0");
        run("ip route add default dev v1 table 7");
        run("ip rule add from 10.0.0.3 table 7");
        assert_eq!(hop("192.0.2.7", "10.0.0.1").ifindex, device("v0").index);
        assert_eq!(hop("192.0.2.7", "10.0.0.3").ifindex, device("v1").index);
        run("ip route replace unreachable default table 7");
        let refused = towards("192.0.2.7", "10.0.0.3").expect_err("none for this source");
        assert_eq!(refused.kind(), io::ErrorKind::HostUnreachable, "{refused}");
    });
}

#[test]
fn routes_of_ipv6() {
    isolated(|| {
        run("ip link add v0 type veth peer name v1");
        run("ip link set v0 up");
        run("ip link set v1 up");
        run("ip -6 addr add fd00::1/64 dev v0 nodad");
        let v0 = device("v0").index;
        let plain = Hop { ifindex: v0, mtu: 1500, is_local: false };
        assert_eq!(hop("fd00::2", "fd00::1"), plain);
        // A new address takes effect a moment later (`addrconf_dad_work`), also with nodad.
        let begun = Instant::now();
        while !hop("fd00::1", "fd00::1").is_local {
            assert!(begun.elapsed() < bound(), "it is our own");
            thread::sleep(Duration::from_millis(1));
        }
        assert!(hop("::1", "::1").is_local);
        let nowhere = towards("2001:db8::7", "fd00::1").expect_err("no route");
        assert_eq!(nowhere.kind(), io::ErrorKind::NetworkUnreachable, "{nowhere}");
        run("ip -6 route add 2001:db8::/32 via fd00::2 mtu 1300");
        assert_eq!(hop("2001:db8::7", "fd00::1"), Hop { mtu: 1300, ..plain });
        assert_eq!(hop("2001:db8::7", "::"), Hop { mtu: 1300, ..plain });
        assert_eq!(hop("2001:db8::7", "2001:db8::9"), Hop { mtu: 1300, ..plain });
        run("ip -6 route replace unreachable 2001:db8::/32");
        let error = towards("2001:db8::7", "fd00::1").expect_err("unreachable");
        assert_eq!(error.kind(), io::ErrorKind::HostUnreachable, "{error}");
    });
}

#[test]
fn ipsec_policies_for_leaving_or_passing_packets_are_seen() {
    isolated(|| {
        let is_any = || routes::has_ipsec_policies().expect("an answer");
        assert!(!is_any());
        let policy = "src 10.0.0.0/24 dst 10.1.0.0/24";
        if !optional(&format!("ip xfrm policy add {policy} dir in")) {
            return;
        }
        assert!(!is_any(), "what arrives is nobody else's concern");
        for direction in ["out", "fwd"] {
            run(&format!("ip xfrm policy add {policy} dir {direction}"));
            assert!(is_any(), "{direction}");
            run(&format!("ip xfrm policy delete {policy} dir {direction}"));
            assert!(!is_any(), "{direction}");
        }
    });
}

#[test]
fn a_watch_wakes_on_changes_and_on_nothing_else() {
    isolated(|| {
        wire();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let mut watch = Watch::open().expect("a subscription");
            let mut attachments = Attachments::new(Method::Clsact);
            let mut ours = programs();
            attachments.attach(&mut ours, &device("v1")).expect("attached");
            quiet(&mut watch).await;
            send(3);
            // Questions are no changes.
            devices::list(&mut netlink()).expect("devices");
            attachments.attach(&mut ours, &device("v1")).expect("attached before");
            assert_eq!(attachments.missing(), NONE);
            hop("10.0.0.2", "10.0.0.1");
            assert!(!is_told(&mut watch, Duration::from_millis(300)).await, "nothing changed");
            for change in [
                "ip route add 192.0.2.0/24 via 10.0.0.2",
                "ip route del 192.0.2.0/24",
                "ip -6 route add 2001:db8::/32 dev lo",
                "ip rule add from 10.0.0.3 table 7",
                "ip -6 rule add from fd00::3 table 7",
                "ip addr add 10.0.0.3/32 dev v0",
                "ip -6 addr add fd00::3/128 dev lo nodad",
                "ip link set v0 mtu 1400",
                "ip link add v2 type veth peer name v3",
                "tc qdisc add dev v0 clsact",
                "tc qdisc del dev v1 clsact",
            ] {
                quiet(&mut watch).await;
                run(change);
                assert!(is_told(&mut watch, bound()).await, "{change}");
            }
        });
    });
}

#[test]
fn a_watch_tells_of_a_burst_that_was_lost() {
    isolated(|| {
        wire();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let mut watch = Watch::open().expect("a subscription");
            quiet(&mut watch).await;
            // More than the socket's buffer holds, while nobody reads.
            let routes: String = (0..8192)
                .map(|n| format!("route add 198.18.{}.{}/32 dev v0\n", n / 256, n % 256))
                .collect();
            let dir = tempfile::tempdir().expect("a folder");
            let batch = dir.path().join("routes");
            std::fs::write(&batch, routes).expect("a file");
            run(&format!("ip -batch {}", batch.display()));
            assert!(is_told(&mut watch, bound()).await);
            quiet(&mut watch).await;
            run("ip route del 198.18.0.1/32 dev v0");
            assert!(is_told(&mut watch, bound()).await, "it goes on after a loss");
        });
    });
}

#[test]
fn a_watch_that_is_cancelled_loses_nothing() {
    isolated(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let mut watch = Watch::open().expect("a subscription");
            quiet(&mut watch).await;
            run("ip route add 192.0.2.0/24 dev lo");
            // Each is cancelled while it waits for silence.
            let mut is_told = false;
            for _ in 0..20 {
                is_told |= self::is_told(&mut watch, Duration::from_millis(1)).await;
            }
            assert!(is_told || self::is_told(&mut watch, bound()).await);
        });
    });
}

async fn is_told(watch: &mut Watch, within: Duration) -> bool {
    match tokio::time::timeout(within, watch.changed()).await {
        Ok(outcome) => outcome.map(|()| true).expect("a working watch"),
        Err(_) => false,
    }
}

/// Waits until earlier changes have all been told.
async fn quiet(watch: &mut Watch) {
    let begun = Instant::now();
    while is_told(watch, Duration::from_millis(200)).await {
        assert!(begun.elapsed() < bound(), "this namespace never comes to rest");
    }
}

/// Sends packets that leave by v0 and so arrive at v1.
fn send(packets: usize) {
    let socket = UdpSocket::bind("10.0.0.1:0").expect("a socket");
    for _ in 0..packets {
        socket.send_to(b"unrelated", "10.0.0.2:9").expect("sent");
    }
}

/// The two programs, loaded.
fn programs() -> Ebpf {
    let mut ebpf = EbpfLoader::new()
        .override_global(aya_log::LEVEL, &0u8, true)
        .load(OBJECT)
        .expect("the object");
    for name in [names::GATE_INGRESS, names::GATE_EGRESS] {
        classifier(&mut ebpf, name).load().expect("the verifier's leave");
    }
    ebpf
}

fn classifier<'e>(ebpf: &'e mut Ebpf, name: &str) -> &'e mut SchedClassifier {
    ebpf.program_mut(name).expect("in the object").try_into().expect("a classifier")
}

fn runs(ebpf: &mut Ebpf, name: &str) -> u64 {
    classifier(ebpf, name).info().expect("information").run_count()
}

/// How often the ingress and the egress program ran.
fn counts(ebpf: &mut Ebpf) -> (u64, u64) {
    (runs(ebpf, names::GATE_INGRESS), runs(ebpf, names::GATE_EGRESS))
}

/// Sends packets and waits until both programs of each set have run once for each.
fn all_see(sets: &mut [&mut Ebpf]) {
    const PACKETS: u64 = 5;
    // Counting is off unless somebody asks.
    let _counting: OwnedFd = enable_stats(Stats::RunTime).expect("statistics");
    let wanted: Vec<(u64, u64)> = sets
        .iter_mut()
        .map(|set| counts(set))
        .map(|(ingress, egress)| (ingress + PACKETS, egress + PACKETS))
        .collect();
    send(PACKETS as usize);
    let deadline = Instant::now() + bound();
    loop {
        let seen: Vec<(u64, u64)> = sets.iter_mut().map(|set| counts(set)).collect();
        if seen == wanted {
            return;
        }
        assert!(Instant::now() < deadline, "runs: {seen:?}, wanted: {wanted:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// What everybody has attached to a device: qdiscs, filters, and TCX programs by number.
fn attached(name: &str) -> (String, Vec<u32>) {
    let shown: String = ["qdisc show", "filter show ingress", "filter show egress"]
        .map(|what| {
            let (object, rest) = what.split_once(' ').expect("two words");
            let (verb, hook) = rest.split_once(' ').unwrap_or((rest, ""));
            run(&format!("tc {object} {verb} dev {name} {hook}"))
        })
        .concat();
    let ids = [TcAttachType::Ingress, TcAttachType::Egress].map(|hook| {
        let programs = SchedClassifier::query_tcx(name, hook).map(|(_, programs)| programs);
        programs.unwrap_or_default().iter().map(|program| program.id()).collect::<Vec<_>>()
    });
    (shown, ids.concat())
}

/// Attaches somebody else's programs to both ends of the wire.
fn foreign(options: impl Fn() -> TcAttachOptions) -> Ebpf {
    let mut ebpf = programs();
    for (name, device, hook) in [
        (names::GATE_INGRESS, "v1", TcAttachType::Ingress),
        (names::GATE_EGRESS, "v0", TcAttachType::Egress),
    ] {
        let program = classifier(&mut ebpf, name);
        program.attach_with_options(device, hook, options()).expect("attached");
    }
    ebpf
}

fn by_filter(priority: u16) -> TcAttachOptions {
    TcAttachOptions::Netlink(NlOptions { priority, ..NlOptions::default() })
}

fn clsact() {
    run("tc qdisc add dev v0 clsact");
    run("tc qdisc add dev v1 clsact");
}

fn ends() -> [Device; 2] {
    [device("v0"), device("v1")]
}

#[track_caller]
fn attach_to_both(attachments: &mut Attachments, ebpf: &mut Ebpf) {
    for device in ends() {
        if let Err(error) = attachments.attach(ebpf, &device) {
            panic!("{}: {error}", device.name);
        }
    }
    assert_eq!(attachments.missing(), NONE);
}

#[test]
fn attached_programs_see_every_packet_and_go_without_a_trace() {
    for method in METHODS {
        isolated(move || {
            wire();
            let before = ["v0", "v1"].map(attached);
            let mut ours = programs();
            let mut attachments = Attachments::new(method);
            attach_to_both(&mut attachments, &mut ours);
            // Again changes nothing.
            let once = ["v0", "v1"].map(attached);
            attach_to_both(&mut attachments, &mut ours);
            assert_eq!(["v0", "v1"].map(attached), once);
            all_see(&mut [&mut ours]);
            for device in ends() {
                attachments.detach(device.index).expect("detached");
            }
            assert_eq!(["v0", "v1"].map(attached), before, "{method:?}");
            attach_to_both(&mut attachments, &mut ours);
            remove_all(None).expect("removed");
            drop(attachments);
            assert_eq!(["v0", "v1"].map(attached), before, "{method:?}");
        });
    }
}

#[test]
fn a_device_is_known_by_its_number() {
    for method in METHODS {
        isolated(move || {
            wire();
            let renamed = device("v1");
            run("ip link set v1 down");
            run("ip link set v1 name other");
            run("ip link set other up");
            let mut ours = programs();
            let mut attachments = Attachments::new(method);
            attachments.attach(&mut ours, &renamed).expect("attached");
            attachments.attach(&mut ours, &device("v0")).expect("attached");
            all_see(&mut [&mut ours]);
            run("ip link del v0");
            assert_eq!(attachments.missing(), device_indices(&attachments));
            for index in device_indices(&attachments) {
                attachments.detach(index).expect("nothing left to detach");
            }
            let gone = attachments.attach(&mut ours, &renamed);
            assert!(matches!(gone, Err(AttachError::Gone)), "{gone:?}");
        });
    }
}

fn device_indices(attachments: &Attachments) -> Vec<u32> {
    attachments.indices().collect()
}

#[test]
fn a_filter_behind_ours_still_sees_unrelated_traffic() {
    for method in METHODS {
        // With 2 taken, ours must take the only priority in front of it.
        for priority in [2, 10] {
            isolated(move || {
                wire();
                clsact();
                let mut theirs = foreign(|| by_filter(priority));
                let before = ["v0", "v1"].map(attached);
                let mut ours = programs();
                let mut attachments = Attachments::new(method);
                attach_to_both(&mut attachments, &mut ours);
                all_see(&mut [&mut ours, &mut theirs]);
                for device in ends() {
                    attachments.detach(device.index).expect("detached");
                }
                assert_eq!(["v0", "v1"].map(attached), before, "{method:?}");
                all_see(&mut [&mut theirs]);
            });
        }
    }
}

#[test]
fn behind_a_filter_there_is_no_place_for_ours() {
    isolated(|| {
        wire();
        clsact();
        let mut theirs = foreign(|| by_filter(1));
        let before = ["v0", "v1"].map(attached);
        let mut ours = programs();
        let mut attachments = Attachments::new(Method::Clsact);
        for device in ends() {
            let outcome = attachments.attach(&mut ours, &device);
            assert!(matches!(outcome, Err(AttachError::Shared)), "{outcome:?}");
        }
        assert_eq!(["v0", "v1"].map(attached), before);
        all_see(&mut [&mut theirs]);
        // TCX comes before all filters, so there is a place for it.
        let mut attachments = Attachments::new(Method::Best);
        if attachments.attach(&mut ours, &device("v0")).is_ok() {
            attach_to_both(&mut attachments, &mut ours);
            all_see(&mut [&mut ours, &mut theirs]);
        }
    });
}

#[test]
fn behind_a_tcx_program_there_is_no_place_for_a_filter() {
    isolated(|| {
        if !has_tcx() {
            return;
        }
        wire();
        let mut theirs = foreign(|| TcAttachOptions::TcxOrder(LinkOrder::default()));
        let before = ["v0", "v1"].map(attached);
        let mut ours = programs();
        let mut attachments = Attachments::new(Method::Clsact);
        let outcome = attachments.attach(&mut ours, &device("v1"));
        assert!(matches!(outcome, Err(AttachError::Shared)), "{outcome:?}");
        assert_eq!(["v0", "v1"].map(attached), before);
        // By TCX ours goes in front.
        let mut attachments = Attachments::new(Method::Best);
        attach_to_both(&mut attachments, &mut ours);
        all_see(&mut [&mut ours, &mut theirs]);
    });
}

#[test]
fn an_ingress_qdisc_is_left_alone() {
    isolated(|| {
        wire();
        run("tc qdisc add dev v1 ingress");
        let before = attached("v1");
        let mut ours = programs();
        let outcome = Attachments::new(Method::Clsact).attach(&mut ours, &device("v1"));
        assert!(matches!(outcome, Err(AttachError::Shared)), "{outcome:?}");
        assert_eq!(attached("v1"), before);
        assert_eq!(remove_all(None).expect("removed"), 0);
        assert_eq!(attached("v1"), before);
    });
}

#[test]
fn a_qdisc_of_somebody_else_stays() {
    isolated(|| {
        wire();
        clsact();
        let before = ["v0", "v1"].map(attached);
        let mut ours = programs();
        let mut attachments = Attachments::new(Method::Clsact);
        attach_to_both(&mut attachments, &mut ours);
        for device in ends() {
            attachments.detach(device.index).expect("detached");
        }
        assert_eq!(["v0", "v1"].map(attached), before);
    });
}

#[test]
fn a_program_that_came_in_front_is_found() {
    for method in METHODS {
        if method == Method::Best && !has_tcx() {
            continue;
        }
        isolated(move || {
            wire();
            let (v0, v1) = (device("v0").index, device("v1").index);
            // veth numbers its second end first.
            assert!(v1 < v0);
            let mut ours = programs();
            let mut attachments = Attachments::new(method);
            attach_to_both(&mut attachments, &mut ours);
            let mut theirs = match method {
                Method::Best => foreign(|| TcAttachOptions::TcxOrder(LinkOrder::first())),
                Method::Clsact => foreign(|| by_filter(1)),
            };
            assert_eq!(attachments.missing(), [v1, v0]);
            all_see(&mut [&mut theirs, &mut ours]);
            // Attaching anew goes in front again where that can be.
            let outcome = attachments.attach(&mut ours, &device("v1"));
            match method {
                Method::Best => outcome.expect("attached"),
                Method::Clsact => {
                    assert!(matches!(outcome, Err(AttachError::Shared)), "{outcome:?}");
                }
            }
            assert_eq!(attachments.missing(), [v0]);
        });
    }
}

#[test]
fn a_qdisc_that_was_taken_away_is_found() {
    isolated(|| {
        wire();
        let mut ours = programs();
        let mut attachments = Attachments::new(Method::Clsact);
        attach_to_both(&mut attachments, &mut ours);
        run("tc qdisc del dev v1 clsact");
        assert_eq!(attachments.missing(), [device("v1").index]);
        attach_to_both(&mut attachments, &mut ours);
        all_see(&mut [&mut ours]);
        run("tc filter del dev v0 egress");
        assert_eq!(attachments.missing(), [device("v0").index]);
        attach_to_both(&mut attachments, &mut ours);
        all_see(&mut [&mut ours]);
    });
}

/// A bpffs of this thread's own.
fn bpffs() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    run(&format!("mount -t bpf bpf {}", dir.path().display()));
    dir
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    // The kernel puts two files of its own there.
    names.retain(|name| !name.ends_with(".debug"));
    names.sort();
    names
}

#[test]
fn a_new_process_takes_over_from_a_dead_one() {
    for method in METHODS {
        isolated(move || {
            wire();
            let dir = bpffs();
            std::fs::create_dir(dir.path().join("other")).expect("somebody else's");
            let before = ["v0", "v1"].map(attached);
            {
                let mut dead = programs();
                let mut attachments = Attachments::new(method);
                attachments.attach(&mut dead, &device("v0")).expect("attached");
                attachments.pin(dir.path()).expect("pinned");
                // Later ones are pinned as well.
                attach_to_both(&mut attachments, &mut dead);
            }
            let left = ["v0", "v1"].map(attached);
            assert_ne!(left[0], before[0], "{method:?}: it outlives its process");
            assert_ne!(left[1], before[1], "{method:?}: it outlives its process");
            let mut ours = programs();
            let mut attachments = Attachments::new(method);
            let adopted = attachments.adopt_and_replace(&mut ours, &ends(), Some(dir.path()));
            let adopted = adopted.expect("adopted");
            assert!(adopted.failed.is_empty(), "{:?}", adopted.failed);
            assert_eq!(adopted.removed, 4, "{method:?}: both hooks of both ends");
            assert_eq!(attachments.missing(), NONE);
            all_see(&mut [&mut ours]);
            let pins = files(dir.path());
            match method {
                Method::Best if has_tcx() => assert_eq!(pins.len(), 5, "{pins:?}"),
                Method::Best | Method::Clsact => assert_eq!(pins, ["other"]),
            }
            // A third finds only the second's.
            drop(attachments);
            let mut third = programs();
            let mut attachments = Attachments::new(method);
            let adopted = attachments.adopt_and_replace(&mut third, &ends(), Some(dir.path()));
            assert_eq!(adopted.expect("adopted").removed, 4, "{method:?}");
            all_see(&mut [&mut third]);
            for device in ends() {
                attachments.detach(device.index).expect("detached");
            }
            assert_eq!(["v0", "v1"].map(attached), before, "{method:?}");
            assert_eq!(files(dir.path()), ["other"]);
        });
    }
}

/// From here on this thread (and what it starts) has a kernel without TCX: the system calls that
/// need it answer EINVAL, as those of 5.10 do.
fn without_tcx() {
    const LINK_CREATE: u32 = 28;
    const PROG_QUERY: u32 = 16;
    let op = |code: u32, yes, no, k| libc::sock_filter { code: code as u16, jt: yes, jf: no, k };
    let load = |offset: usize| op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset as u32);
    let is = |value, yes, no| op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, yes, no, value);
    let end = |verdict| op(libc::BPF_RET | libc::BPF_K, 0, 0, verdict);
    // The lower half of the first argument, on a little-endian machine.
    let command = std::mem::offset_of!(libc::seccomp_data, args);
    let mut filter = [
        load(std::mem::offset_of!(libc::seccomp_data, nr)),
        is(libc::SYS_bpf as u32, 0, 3),
        load(command),
        is(LINK_CREATE, 2, 0),
        is(PROG_QUERY, 1, 0),
        end(libc::SECCOMP_RET_ALLOW),
        end(libc::SECCOMP_RET_ERRNO | libc::EINVAL as u32),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which outlives the call.
    let outcome = unsafe { libc::prctl(libc::PR_SET_SECCOMP, 2, &raw const program) };
    assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
}

#[test]
fn a_kernel_without_tcx_gets_filters() {
    isolated(|| {
        without_tcx();
        wire();
        let before = ["v0", "v1"].map(attached);
        let mut ours = programs();
        let mut attachments = Attachments::new(Method::Best);
        attach_to_both(&mut attachments, &mut ours);
        let filters = attached("v1").0;
        assert!(filters.contains("steward-tcp-proxy/packet_ingress"), "{filters}");
        all_see(&mut [&mut ours]);
        let dir = tempfile::tempdir().expect("a folder");
        attachments.pin(dir.path()).expect("nothing to pin");
        run("tc qdisc del dev v1 clsact");
        assert_eq!(attachments.missing(), [device("v1").index]);
        drop(attachments);
        assert_eq!(remove_all(Some(dir.path())).expect("removed"), 2);
        assert_eq!(["v0", "v1"].map(attached), before);
    });
}

#[test]
fn without_pins_nothing_of_tcx_outlives_its_owner() {
    isolated(|| {
        wire();
        let before = ["v0", "v1"].map(attached);
        let mut ours = programs();
        let mut attachments = Attachments::new(Method::Best);
        attach_to_both(&mut attachments, &mut ours);
        if !has_tcx() {
            return;
        }
        assert!(!attached("v0").1.is_empty(), "attached by TCX");
        drop(attachments);
        assert_eq!(["v0", "v1"].map(attached), before);
    });
}

#[test]
fn cleaning_up_removes_ours_and_nothing_else() {
    isolated(|| {
        wire();
        let dir = bpffs();
        let before = ["v0", "v1"].map(attached);
        // One process died with pins and filters, another still lives.
        for method in METHODS {
            let mut dead = programs();
            let mut attachments = Attachments::new(method);
            attachments.pin(dir.path()).expect("pins from now on");
            let end = if method == Method::Best { "v0" } else { "v1" };
            attachments.attach(&mut dead, &device(end)).expect("attached");
        }
        let mut alive = programs();
        let mut attachments = Attachments::new(Method::Best);
        attachments.pin(dir.path()).expect("pins from now on");
        attachments.attach(&mut alive, &device("v1")).expect("attached");
        assert_eq!(remove_all(Some(dir.path())).expect("removed"), 6);
        assert_eq!(["v0", "v1"].map(attached), before);
        assert_eq!(files(dir.path()), [""; 0]);
        assert_eq!(attachments.missing(), [device("v1").index]);
        assert_eq!(remove_all(Some(dir.path())).expect("nothing to do"), 0);
        assert_eq!(remove_all(Some(Path::new("/no/such/folder"))).expect("nothing to do"), 0);
        // Beside somebody else's filter the qdisc stays.
        clsact();
        let mut theirs = foreign(|| by_filter(10));
        let before = ["v0", "v1"].map(attached);
        let mut attachments = Attachments::new(Method::Clsact);
        attach_to_both(&mut attachments, &mut alive);
        assert_eq!(remove_all(None).expect("removed"), 4);
        all_see(&mut [&mut theirs]);
        // (v0 has theirs at egress alone, v1 at ingress alone.)
        assert_eq!(["v0", "v1"].map(attached), before);
    });
}
