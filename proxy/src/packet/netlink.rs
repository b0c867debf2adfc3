//! A small netlink client: questions to the kernel about devices, routes and filters, and word of
//! their changes.
//!
//! Answers are read attribute by attribute, and only the few that are asked for: a newer kernel
//! may add or widen others as it likes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSG_OVERRUN,
    NetlinkBuffer, NlasIterator,
};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send,
    socket_with,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

/// The kernel fills no more than 32 KiB at once (`netlink_dump`); single answers are smaller.
const BUFFER: usize = 64 * 1024;

/// A dump during which things changed is begun again; so often, then what it gave has to do.
const DUMPS: usize = 8;

/// Length of nlmsghdr, in bytes.
const HEADER: usize = 16;

/// An error that names what failed. Its kind is the original's, its number is in the text.
pub(super) fn context(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// The body of a request: the fixed header of its kind, then attributes.
#[derive(Debug, Clone, Default)]
pub(super) struct Body(Vec<u8>);

impl Body {
    /// A body that begins with this header; its length is a multiple of four.
    pub(super) fn new(header: &[u8]) -> Self {
        Self(header.to_vec())
    }

    /// Adds an attribute.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        // The lengths of our own few attributes are far below 64 KiB.
        let length = (4 + value.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Adds an attribute that is a number.
    pub(super) fn with_u32(self, kind: u16, value: u32) -> Self {
        self.with(kind, &value.to_ne_bytes())
    }

    /// Adds an attribute that is a text.
    pub(super) fn with_text(self, kind: u16, text: &str) -> Self {
        self.with(kind, &[text.as_bytes(), &[0]].concat())
    }

    /// Adds an attribute that consists of attributes.
    pub(super) fn with_nest(self, kind: u16, nested: Self) -> Self {
        self.with(kind, &nested.0)
    }
}

/// One message of an answer.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub(super) kind: u16,
    body: Vec<u8>,
}

impl Answer {
    /// The fixed header of `length` bytes.
    pub(super) fn header(&self, length: usize) -> io::Result<&[u8]> {
        self.body.get(..length).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The attributes behind a fixed header of `length` bytes.
    pub(super) fn attributes(&self, length: usize) -> Attributes<'_> {
        Attributes(self.body.get(length.next_multiple_of(4)..).unwrap_or_default())
    }
}

/// A row of attributes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// Those in a value that consists of attributes.
    pub(super) fn of(value: &'a [u8]) -> Self {
        Self(value)
    }

    /// All of them: kind (without flag bits) and value. What cannot be read ends the row.
    pub(super) fn iter(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let attribute = NlasIterator::new(rest).next()?.ok()?;
            let (kind, length) = (attribute.kind(), usize::from(attribute.length()));
            let value = rest.get(4..length)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            Some((kind, value))
        })
    }

    /// The value of the first attribute of this kind.
    pub(super) fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.iter().find_map(|(found, value)| (found == kind).then_some(value))
    }

    /// The attributes inside the first attribute of this kind; none if there is no such.
    pub(super) fn nest(self, kind: u16) -> Self {
        Self(self.get(kind).unwrap_or_default())
    }

    /// A number of four bytes.
    pub(super) fn u32(self, kind: u16) -> Option<u32> {
        self.get(kind).and_then(|value| value.try_into().ok()).map(u32::from_ne_bytes)
    }

    /// A text, without its final zero.
    pub(super) fn text(self, kind: u16) -> Option<String> {
        let value = self.get(kind)?;
        let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
        Some(String::from_utf8_lossy(&value[..end]).into_owned())
    }
}

/// A connection to the kernel, in the network namespace in which the calling thread was when it
/// was opened (whatever thread uses it afterwards).
///
/// Calls take microseconds and never wait for anything but the kernel's own lock.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens NETLINK_ROUTE: devices, addresses, routes, filters.
    ///
    /// # Errors
    /// The kernel or a sandbox has no such sockets.
    pub fn open() -> io::Result<Self> {
        Self::open_protocol(None).map_err(context("rtnetlink socket"))
    }

    /// Opens any protocol; None is NETLINK_ROUTE, which has the number 0.
    pub(super) fn open_protocol(protocol: Option<Protocol>) -> io::Result<Self> {
        let socket =
            socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// One question or order; everything that is said before its acknowledgement.
    ///
    /// # Errors
    /// With the kernel's own number.
    pub(super) fn request(
        &mut self,
        kind: u16,
        flags: u16,
        body: &Body,
    ) -> io::Result<Vec<Answer>> {
        self.send(kind, flags | NLM_F_ACK, body)?;
        self.receive().map(|(answers, _)| answers)
    }

    /// A list, taken again if it changed meanwhile.
    ///
    /// # Errors
    /// With the kernel's own number.
    pub(super) fn dump(&mut self, kind: u16, body: &Body) -> io::Result<Vec<Answer>> {
        let mut list = Vec::new();
        for _ in 0..DUMPS {
            self.send(kind, NLM_F_DUMP, body)?;
            let (answers, is_whole) = self.receive()?;
            list = answers;
            if is_whole {
                break;
            }
        }
        Ok(list)
    }

    fn send(&mut self, kind: u16, flags: u16, body: &Body) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = Vec::with_capacity(HEADER + body.0.len());
        let length = (HEADER + body.0.len()) as u32;
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((flags | NLM_F_REQUEST).to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        // Our own port: the kernel knows it.
        message.extend([0; 4]);
        message.extend(&body.0);
        send(&self.socket, &message, SendFlags::empty())?;
        Ok(())
    }

    /// Reads up to the end of the answer. False: the list changed while it was read.
    fn receive(&mut self) -> io::Result<(Vec<Answer>, bool)> {
        let mut answers = Vec::new();
        let mut is_whole = true;
        loop {
            let (_, length) = match recv(&self.socket, &mut self.buffer[..], RecvFlags::TRUNC) {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            let mut rest = self.buffer.get(..length).ok_or_else(too_long)?;
            while !rest.is_empty() {
                let message = NetlinkBuffer::new_checked(rest).map_err(|_| malformed())?;
                let (kind, length) = (message.message_type(), message.length() as usize);
                let body = rest.get(HEADER..length).ok_or_else(malformed)?;
                let is_ours = message.sequence_number() == self.sequence;
                is_whole &= !is_ours || message.flags() & NLM_F_DUMP_INTR == 0;
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                match kind {
                    // What is left of an earlier question that failed half-way.
                    _ if !is_ours => {}
                    NLMSG_ERROR | NLMSG_DONE => {
                        return verdict(body).map(|()| (answers, is_whole));
                    }
                    NLMSG_OVERRUN => return Err(Errno::NOBUFS.into()),
                    _ => answers.push(Answer { kind, body: body.to_vec() }),
                }
            }
        }
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The end of an answer carries 0 or a negative error number; old kernels end some lists without.
fn verdict(body: &[u8]) -> io::Result<()> {
    match body.first_chunk().map(|number| i32::from_ne_bytes(*number)) {
        Some(number) if number < 0 => Err(io::Error::from_raw_os_error(number.wrapping_neg())),
        _ => Ok(()),
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a netlink message that cannot be read")
}

fn too_long() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a netlink message that is too long")
}

/// No news for so long ends a burst.
const SILENCE: Duration = Duration::from_millis(5);

/// A burst that does not end is told of after so long.
const BURST: Duration = Duration::from_millis(100);

/// ERROR: a loss is told by ENOBUFS alone if the queue is empty.
const INTEREST: Interest = Interest::READABLE.add(Interest::ERROR);

/// Tells when devices, their filters, addresses, routes, next hops or rules of either family have
/// changed. Costs nothing while nothing changes.
///
/// It does not say what changed: changes come in bursts, and reading the present state is simpler
/// than following them. Open it before that state is read, so that no change falls in between.
#[derive(Debug)]
pub struct Watch {
    socket: AsyncFd<OwnedFd>,
    /// Something changed that was not told yet.
    is_due: bool,
}

impl Watch {
    /// Subscribes, in the network namespace of the calling thread, which must be in a runtime of
    /// tokio. Changes from now on count.
    ///
    /// # Errors
    /// The kernel or a sandbox has no such sockets, or tokio cannot wait for one.
    pub fn open() -> io::Result<Self> {
        Self::subscribe().map_err(context("rtnetlink subscription"))
    }

    fn subscribe() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        // Port 0: the kernel picks one.
        bind(&socket, &SocketAddrNetlink::new(0, groups()))?;
        // SAFETY: an `OwnedFd` is open, always names the same descriptor, and the `AsyncFd` owns it
        // for as long as it lives.
        let socket = unsafe { AsyncFd::register_with_interest(socket, INTEREST) }?;
        Ok(Self { socket, is_due: false })
    }

    /// Waits for a change, and then until there was none for 5 ms (at most 100 ms). May be
    /// cancelled: the next call tells of what this one has seen.
    ///
    /// # Errors
    /// The socket is no use any more.
    pub async fn changed(&mut self) -> io::Result<()> {
        if !self.is_due {
            self.some().await?;
            self.is_due = true;
        }
        let latest = Instant::now() + BURST;
        while Instant::now() < latest {
            let silence = (Instant::now() + SILENCE).min(latest);
            match timeout_at(silence, self.some()).await {
                Ok(more) => more?,
                Err(_) => break,
            }
        }
        self.is_due = false;
        Ok(())
    }

    /// Waits for something to read and reads all of it.
    async fn some(&self) -> io::Result<()> {
        loop {
            let mut ready = self.socket.ready(INTEREST).await?;
            let mut is_news = false;
            loop {
                // What does not fit is cut off, which is as well.
                match recv(self.socket.get_ref(), &mut [0u8; 4][..], RecvFlags::empty()) {
                    // ENOBUFS: changes got lost, so anything may have changed.
                    Ok(_) | Err(Errno::NOBUFS) => is_news = true,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => break,
                    Err(error) => return Err(io::Error::from(error)),
                }
            }
            ready.clear_ready();
            if is_news {
                return Ok(());
            }
        }
    }
}

/// The multicast groups of interest as a bit mask, in which group 1 is bit 0.
fn groups() -> u32 {
    [
        libc::RTNLGRP_LINK,
        libc::RTNLGRP_TC,
        libc::RTNLGRP_IPV4_IFADDR,
        libc::RTNLGRP_IPV4_ROUTE,
        libc::RTNLGRP_IPV4_RULE,
        libc::RTNLGRP_IPV6_IFADDR,
        libc::RTNLGRP_IPV6_ROUTE,
        libc::RTNLGRP_IPV6_RULE,
        // Routes may name a next hop by number, and change with it without word of their own.
        libc::RTNLGRP_NEXTHOP,
    ]
    .iter()
    .fold(0, |mask, group| mask | 1 << (group - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(body: &Body) -> Attributes<'_> {
        Attributes(&body.0)
    }

    #[test]
    fn attributes_come_back_as_they_went_in() {
        let nested = Body::default().with_text(1, "veth").with_u32(2, 7);
        let body = Body::default().with(3, &[9]).with_nest(18 | 1 << 15, nested).with_u32(4, 1500);
        let found = attributes(&body);
        assert_eq!(found.get(3), Some(&[9][..]));
        assert_eq!(found.u32(4), Some(1500));
        // The flag for nested attributes is not part of the kind.
        assert_eq!(found.nest(18).text(1).as_deref(), Some("veth"));
        assert_eq!(found.nest(18).u32(2), Some(7));
        assert_eq!(found.nest(5).iter().count(), 0);
    }

    #[test]
    fn attributes_that_lie_about_their_length_end_the_row() {
        for length in [0u16, 1, 3, 9, u16::MAX] {
            let mut bytes = Body::default().with_u32(1, 5).0;
            bytes.extend(length.to_ne_bytes());
            bytes.extend([2, 0, 0, 0, 0, 0]);
            let kinds: Vec<u16> = Attributes(&bytes).iter().map(|(kind, _)| kind).collect();
            assert_eq!(kinds, [1], "{length}");
        }
        assert_eq!(Attributes(&[4, 0]).iter().count(), 0);
    }

    #[test]
    fn the_end_of_an_answer_is_its_verdict() {
        assert!(verdict(&0i32.to_ne_bytes()).is_ok());
        assert!(verdict(&[]).is_ok());
        let refused = verdict(&(-libc::EPERM).to_ne_bytes()).expect_err("refused");
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
    }

    #[test]
    fn a_refusal_carries_the_kernels_number() {
        let mut netlink = Netlink::open().expect("a socket");
        // No kernel knows this kind of message.
        let refused = netlink.request(0x3ff0, 0, &Body::new(&[0; 16])).expect_err("refused");
        assert_eq!(refused.raw_os_error(), Some(libc::EOPNOTSUPP));
    }
}
