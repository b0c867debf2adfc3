//! What the switch asks of a TCP socket beyond what every relay does.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::socket::{ask, set_option};

/// Bytes that can be read.
pub fn unread(fd: impl AsFd) -> io::Result<u32> {
    ask(fd.as_fd(), libc::FIONREAD)
}

/// Bytes that the peer has not acknowledged, unsent ones included; FIN counts as one.
pub fn unacknowledged(fd: impl AsFd) -> io::Result<u32> {
    ask(fd.as_fd(), libc::TIOCOUTQ)
}

/// The socket's own timestamp clock: what it would send as TSval now. (Kernels from 6.7 on clear
/// the lowest bit of the answer.)
pub fn timestamp(fd: impl AsFd) -> io::Result<u32> {
    get(fd.as_fd(), libc::TCP_TIMESTAMP)
}

/// The clock that timestamps and kernel programs go by, in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Bytes of data that fit into a segment to the peer, beside the options of every segment; of a
/// listener what [`bound_segments`] said.
pub fn segment(fd: impl AsFd) -> io::Result<u32> {
    get(fd.as_fd(), libc::TCP_MAXSEG)
}

/// Has the handshake of this socket, or those of this listener, ask for segments of at most so many
/// bytes (beside the fixed headers) in either direction. 0: as many as the device takes.
pub fn bound_segments(fd: impl AsFd, bytes: u32) -> io::Result<()> {
    set_option(fd.as_fd(), libc::IPPROTO_TCP, libc::TCP_MAXSEG, &bytes)
}

/// Has the kernel drop whatever arrives, but for bare acknowledgements. Dropped segments are not
/// acknowledged, so their sender sends them again.
pub fn fence(fd: impl AsFd) -> io::Result<()> {
    let op = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    // The filter sees the segment from the TCP header on.
    let mut filter = [
        // FIN, SYN, RST: drop.
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 13),
        op(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 7, 0, 7),
        // X = length of the header.
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 12),
        op(libc::BPF_ALU | libc::BPF_RSH | libc::BPF_K, 0, 0, 2),
        op(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, 0x3c),
        op(libc::BPF_MISC | libc::BPF_TAX, 0, 0, 0),
        // Anything behind it: drop.
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_LEN, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JGT | libc::BPF_X, 1, 0, 0),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    attach(fd.as_fd(), &mut filter)
}

/// Has the kernel drop whatever arrives.
pub fn drop_all(fd: impl AsFd) -> io::Result<()> {
    let code = (libc::BPF_RET | libc::BPF_K) as u16;
    attach(fd.as_fd(), &mut [libc::sock_filter { code, jt: 0, jf: 0, k: 0 }])
}

fn attach(fd: BorrowedFd<'_>, filter: &mut [libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(filter.len()).unwrap_or(u16::MAX);
    let program = libc::sock_fprog { len, filter: filter.as_mut_ptr() };
    set_option(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

/// Freezes the socket: closing it from here on sends nothing at all. Needs CAP_NET_ADMIN.
pub fn freeze(fd: impl AsFd) -> io::Result<()> {
    set_option(fd.as_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, &1i32)
}

/// Ends a frozen socket without a word and at once: closing its descriptor alone may come later,
/// while a child of this process that has not called exec yet still has it.
pub fn vanish(fd: impl AsFd) -> io::Result<()> {
    Ok(rustix::net::connect_unspec(fd)?)
}

/// Undoes [`freeze`], without a probe of the window.
pub fn thaw(fd: impl AsFd) {
    const TCP_REPAIR_OFF_NO_WP: i32 = -1;
    let _ = set_option(fd.as_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, &TCP_REPAIR_OFF_NO_WP);
    // Leaving the frozen state clears it; a listener on this port would be blocked.
    let _ = set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, &1i32);
}

/// Of a frozen socket: the next sequence number that it expects, and the next that it would write.
pub fn sequence_numbers(fd: impl AsFd) -> io::Result<(u32, u32)> {
    const TCP_RECV_QUEUE: i32 = 1;
    const TCP_SEND_QUEUE: i32 = 2;
    let of = |queue: i32| {
        set_option(fd.as_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR_QUEUE, &queue)?;
        get(fd.as_fd(), libc::TCP_QUEUE_SEQ)
    };
    Ok((of(TCP_RECV_QUEUE)?, of(TCP_SEND_QUEUE)?))
}

fn get(fd: BorrowedFd<'_>, option: i32) -> io::Result<u32> {
    let mut value = 0u32;
    let mut length = size_of::<u32>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which `value` has.
    let status = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if status == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}
