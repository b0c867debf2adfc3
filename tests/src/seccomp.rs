//! System calls that a program is refused, as a container's seccomp profile would.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};

/// A system call, perhaps only with certain arguments.
#[derive(Debug, Clone)]
pub struct Call {
    number: u32,
    arguments: Vec<(u8, u32)>,
}

impl Call {
    /// The call with this number (`libc::SYS_…`).
    ///
    /// # Panics
    /// No call has such a number.
    #[must_use]
    pub fn new(number: libc::c_long) -> Self {
        Self { number: u32::try_from(number).expect("a system call"), arguments: Vec::new() }
    }

    /// Only where argument `index`, counted from 0, is `value` in its lower 32 bits.
    #[must_use]
    pub fn with(mut self, index: u8, value: u32) -> Self {
        self.arguments.push((index, value));
        self
    }

    /// Has `command` run under a filter that answers this call with EPERM.
    pub fn refuse_to(self, command: &mut Command) {
        let filter = self.filter();
        // SAFETY: between fork and exec only prctl is called; the kernel copies the filter, which
        // lives in the closure.
        unsafe {
            command.pre_exec(move || {
                let (len, filter) = (filter.len() as u16, filter.as_ptr().cast_mut());
                let program = libc::sock_fprog { len, filter };
                let mode = libc::SECCOMP_MODE_FILTER;
                match libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
    }

    /// Each condition is a load and a comparison that, if it fails, goes to the last instruction.
    fn filter(&self) -> Vec<libc::sock_filter> {
        // struct seccomp_data: the number, the architecture, the instruction's address, arguments
        // of 64 bits, which have their lower half first on little-endian machines.
        let number = [(0, self.number)].into_iter();
        let arguments =
            self.arguments.iter().map(|(index, value)| (16 + 8 * u32::from(*index), *value));
        let conditions: Vec<(u32, u32)> = number.chain(arguments).collect();
        let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
        let mut filter = Vec::new();
        for (done, (offset, value)) in conditions.iter().enumerate() {
            let left = (conditions.len() - done - 1) as u8;
            filter.push(step(BPF_LD | BPF_W | BPF_ABS, 0, 0, *offset));
            filter.push(step(BPF_JMP | BPF_JEQ | BPF_K, 0, left * 2 + 1, *value));
        }
        let refused = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
        filter.push(step(BPF_RET | BPF_K, 0, 0, refused));
        filter.push(step(BPF_RET | BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW));
        filter
    }
}
