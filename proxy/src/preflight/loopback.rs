//! A network namespace of our own, its loopback device, and a handshake over it.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Name of the device.
pub(super) const DEVICE: &str = "lo";
/// Its index: always the first of a namespace.
pub(super) const IFINDEX: u32 = 1;

/// A handshake over loopback takes microseconds; this only ends what would otherwise hang.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Moves the calling thread into a new network namespace, which ends with the thread (and with
/// the sockets it made).
pub(super) fn enter() -> io::Result<()> {
    // SAFETY: unlike CLONE_FILES, this flag does not change what file descriptors mean; the
    // thread keeps those it has.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET)? };
    Ok(())
}

/// Brings the device up. As rtnetlink(7) wants it: one RTM_NEWLINK with the flag to change.
pub(super) fn bring_up() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const REQUEST_AND_ACK: u16 = 1 | 4;
    const IFF_UP: u32 = 1;
    let mut message = Vec::with_capacity(32);
    message.extend(32u32.to_ne_bytes()); // nlmsghdr: length
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(REQUEST_AND_ACK.to_ne_bytes());
    message.extend([0; 8]); // sequence number and port: there is one message only
    message.extend([0; 4]); // ifinfomsg: any family, any type
    message.extend(IFINDEX.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes()); // flags
    message.extend(IFF_UP.to_ne_bytes()); // which of them to change
    // No protocol means protocol 0, which is NETLINK_ROUTE.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    send(&socket, &message, SendFlags::empty())?;
    let mut answer = [0; 64];
    let (length, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
    // nlmsgerr: the negative error number, 0 for done, follows the 16 bytes of the header.
    match answer[..length].get(16..20).and_then(|bytes| bytes.try_into().ok()) {
        Some(bytes) => match i32::from_ne_bytes(bytes) {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(-error)),
        },
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// A listener on any port of this address.
pub(super) fn listen(ip: IpAddr) -> io::Result<TcpListener> {
    TcpListener::bind(SocketAddr::new(ip, 0))
}

/// Connects. The handshake is complete when this returns: the kernel accepts by itself.
pub(super) fn connect(server: SocketAddr) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&server, TIMEOUT)
}
