//! How large segments may be, as we tell either end in its handshake.
//!
//! After the switch the two ends have one conversation, so neither may have been told that the
//! other takes more than it does, or than its way carries; and TCP tells it only once, when nobody
//! knows yet whether there will be a switch. Where both sides are alike nothing changes.
//!
//! - The server is told by the SYN of our socket: what the client takes, where that is less.
//! - The client is told by its listener's SYN-ACK, before it is known which server will be its own:
//!   the least that any server takes. What that is follows from the device towards a server and
//!   from what servers said in earlier handshakes.
//!
//! Connections that stay in userspace have the smaller segments as well; beside what else they
//! cost that is not worth a distinction.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use super::routes::Hop;
use super::tcp;

/// Less than this nobody is told: what every host takes without being asked (RFC 9293, section
/// 3.7.1). An end that says less of itself is not switched.
const LEAST: u32 = 536;
/// More than this the kernel does not let us say (MAX_TCP_WINDOW).
const MOST: u32 = 32767;
/// In every segment of a connection that can be switched: the option of timestamps.
const TIMESTAMPS: u32 = 12;

/// What is known of servers, and what the listeners say because of it.
#[derive(Debug, Default)]
pub struct Segments {
    listeners: Vec<OwnedFd>,
    /// What they were told last; 0 for nothing.
    told: u32,
    servers: HashMap<SocketAddr, Server>,
    /// Of all devices over which clients may come: without a bound, nobody says more.
    largest_mtu: u32,
}

#[derive(Debug, Default)]
struct Server {
    hop: Option<Hop>,
    /// The least that it said of itself since its way last changed: with several hosts behind one
    /// address, all of them must do.
    announced: Option<u16>,
}

impl Server {
    fn takes(&self, address: SocketAddr) -> Option<u32> {
        let way = self.hop.map(|hop| room(address.ip(), hop.mtu));
        let said = self.announced.map(u32::from);
        way.into_iter().chain(said).min()
    }
}

impl Segments {
    /// The listeners are told from here on, until [`Self::let_go`].
    pub fn tell(&mut self, listeners: Vec<OwnedFd>) {
        self.listeners = listeners;
        self.told = 0;
        self.update();
    }

    /// Lets the listeners be closed.
    pub fn let_go(&mut self) {
        self.listeners.clear();
    }

    /// The way to a server, new or changed.
    pub fn note_way(&mut self, server: SocketAddr, hop: Option<Hop>) {
        let known = self.servers.entry(server).or_default();
        if known.hop != hop {
            *known = Server { hop, announced: None };
        }
        self.update();
    }

    /// What a server says of itself.
    pub fn note_announced(&mut self, server: SocketAddr, segment: u16) {
        let known = self.servers.entry(server).or_default();
        if known.announced.is_none_or(|least| segment < least) {
            known.announced = Some(segment);
            self.update();
        }
    }

    /// The largest of all devices' limits.
    pub fn note_largest_mtu(&mut self, mtu: u32) {
        self.largest_mtu = mtu;
        self.update();
    }

    /// All servers so far.
    pub fn servers(&self) -> Vec<SocketAddr> {
        self.servers.keys().copied().collect()
    }

    /// What our SYN must say to the server for a client that takes `client`; `None` if it says no
    /// more than that anyway.
    pub fn bound(&self, server: SocketAddr, client: u16) -> Option<u32> {
        let hop = self.servers.get(&server).and_then(|known| known.hop);
        let client = u32::from(client);
        let is_less = hop.is_none_or(|hop| client < room(server.ip(), hop.mtu));
        (is_less && client <= MOST).then_some(client.max(LEAST))
    }

    fn update(&mut self) {
        let wanted = self.wanted();
        if wanted == self.told || self.listeners.is_empty() {
            return;
        }
        let mut told = self.listeners.iter().map(|fd| tcp::bound_segments(fd, wanted));
        if told.all(|told| told.is_ok()) {
            self.told = wanted;
        }
    }

    /// What clients must be told; 0 if they are told no more than that anyway. A listener has
    /// one value for both families, whose headers differ: so it matters whether one is needed.
    fn wanted(&self) -> u32 {
        let needed = self.servers.iter().filter_map(|(address, server)| {
            let takes = server.takes(*address)?;
            (takes < room(address.ip(), self.largest_mtu)).then_some(takes)
        });
        needed.min().map_or(0, |least| least.clamp(LEAST, MOST))
    }
}

/// What the client of an accepted socket takes, and its way carries. (The kernel tells the bytes
/// that fit beside the options; a client without timestamps is not switched anyway.)
pub fn of_client(socket: impl std::os::fd::AsFd) -> Option<u16> {
    let segment = tcp::segment(socket).ok()? + TIMESTAMPS;
    u16::try_from(segment).ok()
}

/// Whether the kernel begins with small segments and tries larger ones (tcp_mtu_probing): then a
/// new socket does not tell what its peer takes.
pub fn is_probing() -> bool {
    let setting = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_mtu_probing");
    setting.is_ok_and(|setting| setting.trim() == "2")
}

/// What fits into a packet beside the headers.
fn room(ip: IpAddr, mtu: u32) -> u32 {
    mtu.saturating_sub(if ip.to_canonical().is_ipv4() { 40 } else { 60 })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const V4: &str = "10.0.0.1:443";
    const V6: &str = "[fd00::1]:443";

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    fn hop(mtu: u32) -> Option<Hop> {
        Some(Hop { ifindex: 2, mtu, is_local: false })
    }

    fn segments(largest_mtu: u32) -> Segments {
        Segments { largest_mtu, ..Segments::default() }
    }

    #[test]
    fn where_all_ways_are_alike_nobody_is_told_anything() {
        let mut segments = segments(1500);
        segments.note_way(address(V4), hop(1500));
        segments.note_way(address(V6), hop(1500));
        segments.note_announced(address(V4), 1460);
        segments.note_announced(address(V6), 1440);
        assert_eq!(segments.wanted(), 0);
        assert_eq!(segments.bound(address(V4), 1460), None);
        assert_eq!(segments.bound(address(V6), 1440), None);
    }

    #[test]
    fn clients_are_told_the_least_that_a_server_takes() {
        let mut segments = segments(1500);
        segments.note_way(address(V4), hop(1400));
        assert_eq!(segments.wanted(), 1360);
        segments.note_way(address(V6), hop(1400));
        assert_eq!(segments.wanted(), 1340);
        segments.note_announced(address(V6), 1300);
        segments.note_announced(address(V6), 1320);
        assert_eq!(segments.wanted(), 1300);
        // Its way has changed; perhaps so has what was on it.
        segments.note_way(address(V6), hop(1500));
        assert_eq!(segments.wanted(), 1360);
        segments.note_announced(address(V4), 100);
        assert_eq!(segments.wanted(), LEAST);
    }

    #[test]
    fn large_devices_of_clients_count() {
        let mut segments = segments(9000);
        segments.note_way(address(V4), hop(1500));
        assert_eq!(segments.wanted(), 1460);
        segments.note_largest_mtu(1500);
        assert_eq!(segments.wanted(), 0);
    }

    #[test]
    fn the_server_is_told_what_a_client_takes_if_that_is_less() {
        let mut segments = segments(1500);
        segments.note_way(address(V4), hop(1500));
        assert_eq!(segments.bound(address(V4), 1410), Some(1410));
        assert_eq!(segments.bound(address(V4), 8960), None);
        assert_eq!(segments.bound(address(V4), 88), Some(LEAST));
        assert_eq!(segments.bound(address(V6), 1440), Some(1440), "its way is not known");
        assert_eq!(segments.bound(address(V6), 65483), None, "more than can be said");
    }

    #[test]
    fn the_listener_is_told_and_let_go() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let mut segments = segments(1500);
        segments.note_way(address(V4), hop(1400));
        segments.tell(vec![listener.try_clone().expect("clones").into()]);
        assert_eq!(tcp::segment(&listener).ok(), Some(1360));
        segments.note_way(address(V4), hop(1300));
        assert_eq!(tcp::segment(&listener).ok(), Some(1260));
        let port = listener.local_addr().expect("bound").port();
        segments.let_go();
        drop(listener);
        TcpListener::bind(("127.0.0.1", port)).expect("nobody holds it");
    }
}
