//! Devices lose the programs, or go away for a while: nobody is reset, and bytes go on.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use proxy_tests::facts::has_tcx;
use proxy_tests::row::{Family, Row};
use proxy_tests::wait::until;

use crate::ground::{Ground, Switched, Traffic, both_families};

both_families!(
    programs_taken_off,
    filters_taken_off,
    a_device_that_flaps,
    a_route_that_goes_and_comes,
    a_path_to_another_device,
);

/// Runs `disturb` while bytes flow, and lets them flow on until `is_healed`.
fn under_traffic(
    connection: &Switched,
    traffic: &mut Traffic,
    disturb: impl FnOnce() + Send,
    is_healed: impl Fn() -> bool + Sync,
) {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let disturbing = threads.spawn(|| {
            disturb();
            until("it heals", &is_healed);
            is_over.store(true, Relaxed);
        });
        while !is_over.load(Relaxed) && !disturbing.is_finished() {
            traffic.pass(connection, 200_000);
        }
        disturbing.join().expect("the disturbance");
    });
    traffic.pass(connection, 3_000_000);
}

#[track_caller]
fn unharmed(ground: &Ground, connection: Switched, traffic: &Traffic) {
    assert_eq!(ground.proxy.metric("connections_ended_total", &[]), 0.0);
    connection.close();
    let ended = ground.proxy.ended();
    let (reason, bytes) = (ended.reason.as_str(), traffic.bytes());
    assert_eq!((reason, ended.bytes_up, ended.bytes_down), ("client_closed", bytes, bytes));
}

/// The kernel tells nobody of it: what strays is the only sign.
fn programs_taken_off(family: Family) {
    let has_tcx = has_tcx();
    let ground = Ground::new(family);
    let (connection, mut traffic) = (ground.switched(), Traffic::new());
    let taken = || match links::detach_all(ground.proxy.process()) {
        0 => assert!(!has_tcx, "TCX is there, and our programs are not on it"),
        count => assert!(count >= 4, "{count} programs were attached"),
    };
    under_traffic(&connection, &mut traffic, taken, || {
        !has_tcx || ground.odd_segments("guarded") > 0.0 && has_attached_again(&ground)
    });
    unharmed(&ground, connection, &traffic);
}

/// Filters, as kernels before 6.6 have them, with their qdisc, as some network plugins do.
fn filters_taken_off(family: Family) {
    let ground = Ground::with(Row::new(), family, &[("packet-attach", "clsact")]);
    let (connection, mut traffic) = (ground.switched(), Traffic::new());
    let taken = || {
        for wire in [ground.row.before, ground.row.behind] {
            ground.node().output("tc", &["qdisc", "del", "dev", &wire.device(), "clsact"]);
        }
    };
    under_traffic(&connection, &mut traffic, taken, || has_attached_again(&ground));
    unharmed(&ground, connection, &traffic);
}

fn has_attached_again(ground: &Ground) -> bool {
    ground.proxy.metric("packet_reattachments_total", &[]) >= 2.0
}

fn a_device_that_flaps(family: Family) {
    let ground = Ground::new(family);
    let connection = ground.switched();
    let mut traffic = Traffic::new();
    for (wire, end) in [(ground.row.behind, 1), (ground.row.before, 2)] {
        let flap = || {
            let (node, device) = (ground.node(), wire.device());
            // Otherwise IPv6's address goes with it, and comes back by nobody's doing.
            node.sysctl(&format!("ipv6.conf.{device}.keep_addr_on_down"), "1");
            node.ip(&format!("link set {device} down"));
            node.ip(&format!("link set {device} up"));
            let _ = end;
        };
        under_traffic(&connection, &mut traffic, flap, || true);
    }
    unharmed(&ground, connection, &traffic);
}

fn a_route_that_goes_and_comes(family: Family) {
    let ground = Ground::new(family);
    let connection = ground.switched();
    let mut traffic = Traffic::new();
    let flap = || {
        let (flag, net) = match family {
            Family::V4 => ("", "10.2.0.0/24"),
            Family::V6 => ("-6", "fd00:2::/64"),
        };
        ground.node().ip(&format!("{flag} route del {net} dev wire2"));
        ground.node().ip(&format!("{flag} route add {net} dev wire2"));
    };
    under_traffic(&connection, &mut traffic, flap, || true);
    unharmed(&ground, connection, &traffic);
}

/// A second wire to the server, and from some moment on the way leads over it, in both directions.
fn a_path_to_another_device(family: Family) {
    let ground = Ground::new(family);
    let row = &ground.row;
    let second = row.node.join(&row.server, 4);
    for host in [&row.node, &row.server] {
        for device in ["all", "wire2", "wire4"] {
            host.sysctl(&format!("ipv4.conf.{device}.rp_filter"), "0");
        }
    }
    let connection = ground.switched();
    let mut traffic = Traffic::new();
    let moved = || {
        let (flag, length) = if family == Family::V4 { ("", 32) } else { ("-6", 128) };
        let (near, far) = (family.of(row.behind, 1), family.of(row.behind, 2));
        let (near_hop, far_hop) = (family.of(second, 1), family.of(second, 2));
        row.node.ip(&format!("{flag} route add {far}/{length} via {far_hop} dev wire4 src {near}"));
        row.server
            .ip(&format!("{flag} route add {near}/{length} via {near_hop} dev wire4 src {far}"));
    };
    under_traffic(&connection, &mut traffic, moved, || true);
    // Nothing is left that could pass by the first one.
    row.node.ip("link set wire2 down");
    row.node.ip(&format!(
        "{} addr add {}/{} dev wire4",
        if family == Family::V4 { "" } else { "-6" },
        family.of(row.behind, 1),
        if family == Family::V4 { "32" } else { "128 nodad" },
    )
    .replace("128 nodad dev wire4", "128 dev wire4 nodad"));
    traffic.pass(&connection, 1_000_000);
    unharmed(&ground, connection, &traffic);
}

/// TCX links of a process, taken off as `bpftool link detach` does.
mod links {
    use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

    use proxy_tests::process::Watched;

    /// From the kernel's `include/uapi/linux/bpf.h`.
    const GET_FD_BY_ID: i32 = 30;
    const DETACH: i32 = 34;

    /// Says how many.
    #[track_caller]
    pub fn detach_all(process: Watched) -> usize {
        let folder = format!("/proc/{}/fdinfo", process.id());
        let files = std::fs::read_dir(folder).expect("readable").flatten();
        let mut links: Vec<u32> = Vec::new();
        for file in files {
            let Ok(text) = std::fs::read_to_string(file.path()) else { continue };
            let field =
                |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            if field("link_type:") == Some("tcx") {
                links.push(field("link_id:").and_then(|id| id.parse().ok()).expect("a number"));
            }
        }
        // Only now: from the first one on the process replaces them.
        links.iter().for_each(|&link| detach(link));
        links.len()
    }

    fn detach(link: u32) {
        // It may have been replaced already.
        let Ok(fd) = bpf(GET_FD_BY_ID, link) else { return };
        // SAFETY: the kernel has just made this descriptor for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let _ = bpf(DETACH, fd.as_raw_fd().unsigned_abs());
    }

    /// Both commands' attributes begin with the one number that they need.
    fn bpf(command: i32, number: u32) -> std::io::Result<i32> {
        let mut attributes = [0u32; 32];
        attributes[0] = number;
        // SAFETY: the pointer and the size describe the attributes, which the kernel only reads.
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(&attributes))
        };
        if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result as i32) }
    }
}
