//! Local ports that nobody else gets, on hosts of their own. Needs root and the `ip` command.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;

use proxy::packet::ports::{PortPool, release_reservation};
use proxy_tests::netns::Host;

const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

fn host() -> Host {
    let host = Host::new("node");
    host.sysctl("ipv4.ip_local_port_range", "32768 60999");
    host
}

fn reserved(host: &Host) -> String {
    host.read(RESERVED).trim().to_owned()
}

fn reserve(host: &Host, note: Option<&Path>) -> PortPool {
    let note = note.map(Path::to_owned);
    host.run(move || PortPool::reserve(note.as_deref())).expect("reads the settings")
}

fn release(host: &Host, note: Option<&Path>) {
    let note = note.map(Path::to_owned);
    host.run(move || release_reservation(note.as_deref())).expect("writes the setting");
}

/// How many of 2,000 ports that the kernel chose for connections are in the upper half.
fn chosen_in_the_upper_half(host: &Host) -> usize {
    host.run(|| {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("binds");
        let to = listener.local_addr().expect("bound");
        let choose = |_: &usize| {
            let stream = TcpStream::connect(to).expect("connects");
            listener.accept().expect("accepts");
            stream.local_addr().expect("connected").port() >= 46884
        };
        (0..2000).filter(choose).count()
    })
}

#[test]
fn the_kernel_chooses_no_port_of_the_pool() {
    let host = host();
    assert!(chosen_in_the_upper_half(&host) > 100, "or this test shows nothing");
    let pool = reserve(&host, None);
    assert!(pool.has_reserved());
    assert_eq!(pool.left(), 65535 - 46884 + 1);
    assert_eq!(chosen_in_the_upper_half(&host), 0);
    let port = pool.take().expect("free");
    let number = port.number();
    assert!(number >= 46884);
    host.run(move || TcpListener::bind((Ipv4Addr::LOCALHOST, number))).expect("by its number");
    release(&host, None);
    assert_eq!(reserved(&host), "");
    assert!(chosen_in_the_upper_half(&host) > 100);
}

#[test]
fn a_crash_leaves_nothing_that_is_reserved_twice_or_forever() {
    let folder = tempfile::tempdir().expect("a folder");
    let note = folder.path().join("run/ports");
    for note in [None, Some(note.as_path())] {
        let host = host();
        host.sysctl("ipv4.ip_local_reserved_ports", "8080,50000-50009,61000");
        if note.is_none() {
            // Without a note, others' ports within our half cannot be told from ours.
            host.sysctl("ipv4.ip_local_reserved_ports", "8080,61000");
        }
        let start = reserved(&host);
        let first = reserve(&host, note);
        let between = reserved(&host);
        assert_eq!(between, "8080,46884-61000");
        let second = reserve(&host, note);
        assert_eq!(second.left(), first.left());
        assert_eq!(reserved(&host), between);
        for foreign in [61000, if note.is_some() { 50000 } else { 61000 }] {
            assert!(!second.claim(foreign), "somebody else's");
        }
        release(&host, note);
        assert_eq!(reserved(&host), start);
        release(&host, note);
        assert_eq!(reserved(&host), start);
    }
}

#[test]
fn a_long_list_of_others_is_kept_whole() {
    let host = host();
    let odd: Vec<String> = (1..46000).step_by(2).map(|port| port.to_string()).collect();
    let odd = odd.join(",");
    assert!(odd.len() > 100_000, "many pages");
    host.sysctl("ipv4.ip_local_reserved_ports", &odd);
    let folder = tempfile::tempdir().expect("a folder");
    let note = folder.path().join("ports");
    let pool = reserve(&host, Some(&note));
    assert!(pool.has_reserved());
    // The last ones that a reader in pieces would lose, and the first one.
    let now = host.run(|| {
        let mut buffer = vec![0; 1 << 18];
        let mut file = std::fs::File::open(RESERVED).expect("the setting");
        let length = std::io::Read::read(&mut file, &mut buffer).expect("reads");
        String::from_utf8_lossy(&buffer[..length]).trim().to_owned()
    });
    assert_eq!(now, format!("{odd},46884-60999"));
}

#[test]
fn where_the_setting_cannot_be_written_the_ports_above_remain() {
    let host = host();
    let folder = tempfile::tempdir().expect("a folder");
    let note = folder.path().join("ports");
    let path = note.clone();
    let pool = host.run(move || {
        // A mount namespace of this thread's own, in which the settings are read-only, as in most
        // containers.
        let flags = rustix::thread::UnshareFlags::NEWNS | rustix::thread::UnshareFlags::FS;
        // SAFETY: what is unshared is this thread's view of mounts and its working folder; no
        // memory and no descriptors.
        unsafe { rustix::thread::unshare_unsafe(flags) }.expect("root");
        let mount = |args: &[&str]| {
            let done = std::process::Command::new("mount").args(args).status();
            assert!(done.expect("the mount command").success(), "{args:?}");
        };
        mount(&["--make-rprivate", "/"]);
        mount(&["--bind", "/proc/sys", "/proc/sys"]);
        mount(&["-o", "remount,bind,ro", "/proc/sys"]);
        PortPool::reserve(Some(&path)).expect("reads the settings")
    });
    assert!(!pool.has_reserved());
    assert_eq!(pool.left(), 65535 - 60999);
    assert_eq!(reserved(&host), "");
    assert!(!note.exists(), "a note about nothing");
}
