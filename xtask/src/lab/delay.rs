//! A wire that takes its time: a TAP device on each host, and threads that carry frames from one
//! to the other a set time later. Works where the kernel has no netem.

use std::collections::VecDeque;
use std::ffi::c_int;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// Bytes that may be under way in one direction; what comes beyond is lost, as at a router.
const UNDER_WAY: usize = 64 << 20;

/// A frame of the largest segment that the kernel hands over in one piece, and its headers.
const FRAME: usize = 64 * 1024 + 256;

/// Carries frames between two devices from [`open`], each `delay` later, as long as this process
/// lives.
///
/// # Errors
/// No more threads or descriptors.
pub fn connect(one: File, other: File, delay: Duration) -> Result<()> {
    let (from_one, from_other) = (one.try_clone()?, other.try_clone()?);
    carry(from_one, other, delay)?;
    carry(from_other, one, delay)
}

/// Makes a TAP device on the calling thread's host. Frames carry the kernel's notes on checksums
/// and segmentation (`struct virtio_net_hdr`) with them, so that large segments cross in one
/// piece, as they do between two veth.
///
/// # Errors
/// No /dev/net/tun, or the kernel refuses.
pub fn open(name: &str) -> Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun");
    let file = file.context("no delay line: /dev/net/tun")?;
    // SAFETY: zeroes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte less, so that the name ends with a zero.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes the ifreq that it is given, which lives here.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    checked(made).context("TUNSETIFF")?;
    let offloads = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    // SAFETY: TUNSETOFFLOAD takes a number, no pointer.
    let set = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) };
    checked(set).context("TUNSETOFFLOAD")?;
    Ok(file)
}

fn checked(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A frame, and when it arrives.
type Due = (Instant, Box<[u8]>);

fn carry(from: File, to: File, delay: Duration) -> Result<()> {
    let (sender, receiver) = channel();
    let under_way = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&under_way);
    std::thread::Builder::new()
        .name("delay-in".to_owned())
        .spawn(move || take_in(from, delay, &sender, &counted))?;
    std::thread::Builder::new()
        .name("delay-out".to_owned())
        .spawn(move || hand_out(to, &receiver, &under_way))?;
    Ok(())
}

fn take_in(mut from: File, delay: Duration, sender: &Sender<Due>, under_way: &AtomicUsize) {
    let mut frame = vec![0; FRAME];
    // Reading fails while the device is down, at first and at the end.
    loop {
        let Ok(length) = from.read(&mut frame) else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        if under_way.fetch_add(length, Ordering::Relaxed) > UNDER_WAY {
            under_way.fetch_sub(length, Ordering::Relaxed);
            continue;
        }
        if sender.send((Instant::now() + delay, frame[..length].into())).is_err() {
            return;
        }
    }
}

fn hand_out(mut to: File, receiver: &Receiver<Due>, under_way: &AtomicUsize) {
    let mut waiting: VecDeque<Due> = VecDeque::new();
    loop {
        loop {
            match receiver.try_recv() {
                Ok(frame) => waiting.push_back(frame),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        let Some((due, frame)) = waiting.pop_front() else {
            match receiver.recv() {
                Ok(frame) => waiting.push_back(frame),
                Err(_) => return,
            }
            continue;
        };
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        // A device that is down loses frames, as a wire does.
        let _ = to.write(&frame);
        under_way.fetch_sub(frame.len(), Ordering::Relaxed);
    }
}
