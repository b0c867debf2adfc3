//! Puts other bytes into a packet and corrects its checksums.
//!
//! By a difference and not anew: where a device is still to make the checksum, what is there is no
//! sum of the packet. The kernel knows which it is, and its helpers go by that.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_csum_diff, bpf_l4_csum_replace, bpf_skb_store_bytes};

/// Ethernet's header. Devices without one are not fit for switched connections.
pub const LINK: u32 = 14;

#[inline(always)]
pub fn store<const N: usize>(
    skb: *mut __sk_buff,
    offset: u32,
    bytes: &[u8; N],
    flags: u64,
) -> bool {
    // SAFETY: the pointer and the size describe `bytes`; the kernel checks the offset.
    let status =
        unsafe { bpf_skb_store_bytes(skb, offset, bytes.as_ptr().cast(), N as u32, flags) };
    status == 0
}

#[inline(always)]
pub fn store_words<const N: usize>(skb: *mut __sk_buff, offset: u32, words: &[u32; N]) -> bool {
    // SAFETY: as in store.
    let status =
        unsafe { bpf_skb_store_bytes(skb, offset, words.as_ptr().cast(), N as u32 * 4, 0) };
    status == 0
}

#[inline(always)]
pub fn difference<const N: usize>(old: &[u8; N], new: &[u8; N]) -> i64 {
    // SAFETY: pointers and sizes describe the arrays, which the helper only reads.
    unsafe {
        bpf_csum_diff(
            old.as_ptr().cast_mut().cast(),
            N as u32,
            new.as_ptr().cast_mut().cast(),
            N as u32,
            0,
        )
    }
}

/// Corrects the TCP checksum by a difference.
#[inline(always)]
pub fn adjust(skb: *mut __sk_buff, tcp: u32, difference: i64, flags: u64) -> u8 {
    // SAFETY: no preconditions; the kernel checks the offset.
    let status = unsafe { bpf_l4_csum_replace(skb, LINK + tcp + 16, 0, difference as u64, flags) };
    u8::from(status != 0)
}

#[inline(always)]
pub fn fold(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    let twice = (once & 0xffff) + (once >> 16);
    !(twice as u16)
}

/// A sum of words in 32 bits, as the kernel has it.
#[inline(always)]
pub fn fold32(sum: u64) -> u32 {
    let once = (sum & 0xffff_ffff) + (sum >> 32);
    ((once & 0xffff_ffff) + (once >> 32)) as u32
}
