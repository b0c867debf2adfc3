//! The verb `cleanup` on a real bpffs, in a mount namespace of its own. Needs root.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output};

use proxy_tests::proxy::binary;
use rustix::process::Signal;

/// Runs a shell script in mount and network namespaces of its own where `$DIR/bpf` is an empty bpffs and `$PROXY` the
/// program; the bpffs goes with the script.
#[track_caller]
fn with_bpffs(script: &str) -> Output {
    assert!(rustix::process::geteuid().is_root(), "this test mounts a bpffs and needs root");
    let folder = tempfile::tempdir().expect("a folder");
    let prelude = "set -e; mkdir $DIR/bpf; mount -t bpf bpf $DIR/bpf; cd $DIR";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--net", "--propagation", "private", "sh", "-c"]);
    command.arg(format!("{prelude}\n{script}"));
    command.env("DIR", folder.path()).env("PROXY", binary());
    // SAFETY: prctl is async-signal-safe and nothing is allocated between fork and exec.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            Ok(())
        });
    }
    command.output().expect("unshare (util-linux)")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn everything_below_the_directory_goes_and_nothing_else() {
    let output = with_bpffs(
        "mkdir -p bpf/ours/maps/deep bpf/other/maps
         ln -s $DIR/bpf/other bpf/ours/link
         $PROXY cleanup --bpffs=$DIR/bpf/ours
         test ! -e bpf/ours && test -d bpf/other/maps
         $PROXY cleanup --bpffs=$DIR/bpf/ours",
    );
    assert!(output.status.success(), "{output:?}");
    let lines: Vec<String> = text(&output.stdout).lines().map(str::to_owned).collect();
    for gone in ["ours/maps/deep", "ours/maps", "ours/link", "ours"] {
        let told = |line: &&String| line.starts_with("removed") && line.ends_with(gone);
        assert_eq!(lines.iter().filter(told).count(), 1, "{gone}: {lines:#?}");
    }
    // The second run finds nothing, which is well.
    assert!(lines.last().is_some_and(|line| line.starts_with("nothing")), "{lines:#?}");
    assert_eq!(lines.len(), 5, "{lines:#?}");
}

/// Pins of a bpffs that is mounted elsewhere, or not in this container, cannot be known of.
#[test]
fn where_no_bpffs_is_it_says_that_pins_were_not_looked_at() {
    let output = with_bpffs("$PROXY cleanup --bpffs=$DIR/none/ours");
    assert!(output.status.success(), "{output:?}");
    let told = text(&output.stdout);
    assert!(told.starts_with("nothing is left") && told.contains("no bpffs"), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
    let output = with_bpffs("$PROXY cleanup --bpffs=$DIR/bpf/ours");
    assert!(!text(&output.stdout).contains("no bpffs"), "{output:?}");
}

#[test]
fn a_bpffs_as_a_whole_is_refused() {
    let output = with_bpffs("mkdir bpf/other; $PROXY cleanup --bpffs=$DIR/bpf");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("root of a bpffs"), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
}

#[test]
fn what_is_no_bpffs_is_refused() {
    let output = with_bpffs(
        "mkdir -p plain/inner
         ln -s $DIR/bpf/ours link; mkdir -p bpf/ours/maps
         if $PROXY cleanup --bpffs=$DIR/plain; then exit 3; fi
         if $PROXY cleanup --bpffs=$DIR/link; then exit 4; fi
         test -d plain/inner && test -d bpf/ours/maps",
    );
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stderr).contains("not on a bpffs"), "{output:?}");
}

/// A directory of a bpffs that is mounted into a pod by itself can be emptied, not removed.
#[test]
fn a_volume_of_its_own_is_emptied() {
    let output = with_bpffs(
        "mkdir -p bpf/ours/maps pod
         mount --bind bpf/ours pod
         $PROXY cleanup --bpffs=$DIR/pod
         test -d pod && test -z \"$(ls -A pod)\"",
    );
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stdout).lines().count(), 1, "{output:?}");
}
