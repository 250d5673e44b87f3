//! The command line.

use std::path::PathBuf;

use ::device::fabric::FabricUrl;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::bench::Case;

/// Emulated PCI devices over vfio-user whose TLB stays coherent with the page tables it caches.
///
/// Without a command: the demo. An application computes through an emulated SGI GRU while its memory is
/// unmapped, moved, discarded and protected under it, and every result is checked for stale accesses.
#[derive(Debug, Parser)]
#[command(name = "tlbridge", version, args_conflicts_with_subcommands = true)]
#[command(after_help = "\
Exit codes: 0 fine, 1 error, 2 wrong usage, 3 a stale access was found, 4 a device's sanitizer has found something.
RUST_LOG=debug (or info, trace, crate=level) shows what the processes do, on stderr.

Examples:
  tlbridge                                   ten seconds of the demo
  tlbridge demo --seconds 60 --threads 4 --json > run.json
  tlbridge demo --break drain --seconds 2    a device that does not drain: must end with exit code 3
  tlbridge bench invalidate --json bench.json
  tlbridge bench invalidate --guest --quick")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Without a command: the demo's options.
    #[command(flatten)]
    pub demo: DemoArgs,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Device, host daemon and an application that verifies its results while its memory changes.
    Demo(DemoArgs),
    /// Run a device process that serves vfio-user on a socket.
    Device(Box<DeviceArgs>),
    /// Run the host daemon: it drives the device and keeps it coherent with the attached applications.
    Host(HostArgs),
    /// Boot a guest in QEMU with a device, and run a command or a shell in it.
    Vm(Box<VmArgs>),
    /// Measure.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Check any vfio-user server against the specification.
    Conformance(ConformanceArgs),
    /// Print the state of a running host daemon, or of a device that was started with --inspect.
    Inspect(InspectArgs),
    /// The demo's application (started by the demo).
    #[command(hide = true)]
    Application(ApplicationArgs),
    /// The demo's sleeping subscriber (started by the demo and the benchmark).
    #[command(hide = true)]
    Peer(PeerArgs),
    /// The benchmark's measured process (started by the benchmark).
    #[command(hide = true)]
    BenchSubject(SubjectArgs),
    /// The benchmark's floor: echoes messages (started by the benchmark).
    #[command(hide = true)]
    BenchEcho(EchoArgs),
    /// The benchmark's floor of wakes: sleeps until it is told (started by the benchmark).
    #[command(hide = true)]
    BenchWake(WakeArgs),
    /// The benchmark's other programs: wants a processor (started by the benchmark).
    #[command(hide = true)]
    BenchHog(HogArgs),
}

/// Device models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ModelName {
    /// SGI GRU, 10a9:4752.
    Gru,
    /// mlx5 HCA with an InfiniBand port, 15b3:1017 (--function vf: 15b3:1018).
    Mlx5,
}

/// PCI functions of an HCA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum HcaFunction {
    /// Physical function.
    #[default]
    Pf,
    /// Virtual function.
    Vf,
}

/// How the device learns of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Doorbell {
    /// Each access to the BARs is a message: strict, slow.
    Trap,
    /// Control blocks and handles are mapped memory; software rings a doorbell after each start. Nothing polls.
    Bell,
    /// Control blocks and handles are mapped memory; the engines poll while there is work and sleep on a
    /// doorbell when there is none.
    Poll,
}

/// How long some error replies are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ErrorReplyLength {
    /// Full for clients built on the vfio_user crate, as Cloud Hypervisor is (known by their first message);
    /// a header for all others.
    Auto,
    /// A header, as the specification says. libvfio-user's client needs that.
    Header,
    /// As long as a good reply. For other clients that do not look at the error flag first, and would wait for
    /// ever for the rest.
    Full,
}

/// Checks that can be broken in the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceFault {
    /// A fill whose range was purged after the miss is entered all the same.
    KillBit,
    /// A purge completes while accesses through the old translation still run.
    Drain,
    /// A store goes through an entry that does not allow stores.
    Clean,
    /// Entries outlive the unmapping of their memory (which stays alive, so that old contents are seen).
    Unmap,
}

/// Checks that can be broken anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Fault {
    /// Device: a fill whose range was purged after the miss is entered all the same.
    KillBit,
    /// Device: a purge completes while accesses through the old translation still run.
    Drain,
    /// Daemon: a userfaultfd event is read before the translations are purged.
    SafetyNet,
    /// Daemon: a device behind vfio-pci keeps its pages while they are discarded (with --device vfio:ADDRESS).
    HeldPages,
}

impl Fault {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::KillBit => "kill-bit",
            Self::Drain => "drain",
            Self::SafetyNet => "safety-net",
            Self::HeldPages => "held-pages",
        }
    }
}

/// Registration modes of userfaultfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum UffdModeName {
    /// Write-protect mode that never protects: events only.
    Wp,
    /// Missing mode: punched pages fault to the daemon.
    Missing,
}

impl UffdModeName {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Wp => "wp",
            Self::Missing => "missing",
        }
    }
}

impl From<UffdModeName> for protos::bridge::control::UffdMode {
    fn from(name: UffdModeName) -> Self {
        match name {
            UffdModeName::Wp => Self::Wp,
            UffdModeName::Missing => Self::Missing,
        }
    }
}

/// Options of a process that another one supervises.
#[derive(Debug, Clone, Args)]
pub struct Supervised {
    /// Started by another tlbridge: say when ready on stdout, answer questions on stdin, end with it.
    #[arg(long, hide = true)]
    pub supervised: bool,
    /// Directory to remove at the end, if it is empty then.
    #[arg(long, hide = true)]
    pub private_dir: Option<PathBuf>,
}

/// Options of the demo.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  tlbridge demo --seconds 30 --memory-mib 256
  tlbridge demo --doorbell trap              every register access is a message
  tlbridge demo --doorbell bell              nothing polls: each start rings
  tlbridge demo --break kill-bit --seconds 2 the oracles must find it: exit code 3
  tlbridge demo --delay kill-bit --seconds 2 the same delays with the check on: exit code 0

Exit codes: 0 fine, 1 error or wrong result, 2 wrong usage, 3 a stale access was found, 4 none was, but the device's
sanitizer has found something.")]
pub struct DemoArgs {
    /// How long to run.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// Worker threads that compute through the device (as many again change mappings).
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub threads: u32,
    /// Seed of all decisions.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Memory that the application computes in.
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(16..=2048))]
    pub memory_mib: u64,
    /// Use a device that is there, as `tlbridge host --device` names it, instead of starting one.
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["doorbell", "engines"])]
    pub device: Option<PathBuf>,
    /// How the device learns of a store.
    #[arg(long, value_enum, default_value_t = Doorbell::Poll)]
    pub doorbell: Doorbell,
    /// Engine threads of the device.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub engines: u32,
    /// How memory is registered with userfaultfd.
    #[arg(long, value_enum, default_value_t = UffdModeName::Wp)]
    pub uffd_mode: UffdModeName,
    /// Break a check: the run must end with exit code 3.
    #[arg(long = "break", value_enum, value_name = "CHECK", conflicts_with = "delay")]
    pub break_check: Option<Fault>,
    /// The same delays as `--break`, with the check on: nothing may be found.
    #[arg(long, value_enum, value_name = "CHECK")]
    pub delay: Option<Fault>,
    /// The device's sanitizer looks on (docs/sanitizer.md); at level 2 it compares what the device does with what the
    /// host daemon says of the mappings.
    #[arg(long, value_name = "LEVEL", num_args = 0..=1, require_equals = true, default_missing_value = "1", conflicts_with = "device",
          value_parser = clap::value_parser!(u8).range(1..=2))]
    pub sanitize: Option<u8>,
    /// Without the attached process: then no invalidation has to wait for a subscriber that sleeps.
    #[arg(long)]
    pub no_peer: bool,
    /// Print the result as one JSON object on stdout (progress goes to stderr).
    #[arg(long)]
    pub json: bool,
}

/// Options of the device process.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Example:
  tlbridge device --model gru --socket /run/user/1000/gru.sock
  tlbridge device --model gru --socket gru.sock --map-tfh     for tlbridge's own driver only
  tlbridge device --model gru --socket gru.sock --sanitize --inspect inspect.sock

Exit codes: 0 fine, 1 error, 2 wrong usage, 4 the sanitizer has found something.")]
pub struct DeviceArgs {
    /// Which device.
    #[arg(long, value_enum)]
    pub model: ModelName,
    /// Where to listen for a vfio-user client (created with mode 0600).
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// How the device learns of a store.
    #[arg(long, value_enum, default_value_t = Doorbell::Poll)]
    pub doorbell: Doorbell,
    /// Let the client map the TLB fault handles, too (bell and poll). Not for guests: Linux' driver starts them by a
    /// read-modify-write that is only right where they are trapped. tlbridge's own driver saves the messages.
    #[arg(long)]
    pub map_tfh: bool,
    /// Engine threads.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub engines: u32,
    /// How long an engine looks for work before it sleeps (not with bell). Default: 50 on two CPUs, else 200, and less
    /// while others want its CPU.
    #[arg(long, value_name = "MICROSECONDS", value_parser = clap::value_parser!(u64).range(0..=86_400_000_000))]
    pub spin: Option<u64>,
    /// How long to ask for the client's next message again and again before sleeping: saves the wake-up, costs
    /// a CPU meanwhile; 0 = sleep at once.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=10_000_000))]
    pub busy_poll: u64,
    /// How long error replies to register accesses, DMA_UNMAP and GET_IRQ_INFO are.
    #[arg(long, value_enum, value_name = "LENGTH", default_value_t = ErrorReplyLength::Auto)]
    pub error_replies: ErrorReplyLength,
    /// For experiments (GRU only): leave a check out, and open the window in which that shows.
    #[arg(long = "break", value_enum, value_name = "CHECK", conflicts_with = "delay")]
    pub break_check: Option<DeviceFault>,
    /// For experiments (GRU only): open the window of a check, with the check on.
    #[arg(long, value_enum, value_name = "CHECK")]
    pub delay: Option<DeviceFault>,
    /// GRU only: a sanitizer looks on; what breaks a promise is reported on stderr, and in the exit code
    /// (docs/sanitizer.md); level 2 compares it with what a host daemon says of the mappings. TLBRIDGE_SANITIZE=1 or 2
    /// in the environment means the same.
    #[arg(long, value_name = "LEVEL", num_args = 0..=1, require_equals = true, default_missing_value = "1",
          value_parser = clap::value_parser!(u8).range(1..=2))]
    pub sanitize: Option<u8>,
    /// At the end: the sanitizer's findings as one JSON object on stdout (null without one).
    #[arg(long, conflicts_with = "supervised")]
    pub json: bool,
    /// Answer `tlbridge inspect PATH` with the device's state (a socket, created with mode 0600).
    #[arg(long, value_name = "PATH")]
    pub inspect: Option<PathBuf>,
    /// Variants of the GRU.
    #[command(flatten)]
    pub gru: crate::gru_options::GruOptions,
    /// mlx5: which PCI function it is.
    #[arg(long, value_enum, default_value_t = HcaFunction::Pf)]
    pub function: HcaFunction,
    /// mlx5: what the port is connected to: inside (this process only), listen:unix:PATH or listen:tcp:HOST:PORT
    /// (others join), unix:PATH or tcp:HOST:PORT (join that one).
    #[arg(long, value_name = "URL", default_value = "inside")]
    pub fabric: FabricUrl,
    /// mlx5: node GUID, in hexadecimal; on a fabric each one once. Default: from the socket's path.
    #[arg(long, value_name = "HEX", value_parser = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16))]
    pub node_guid: Option<u64>,
    /// mlx5: worker threads.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub workers: u32,
    /// Supervision.
    #[command(flatten)]
    pub supervised: Supervised,
}

/// Options of `vm`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Without --kernel: Debian's stock kernel and, for the GRU, its own sgi-gru driver, compiled without a change. The
first time the lab is made (QEMU, kernel, compiler, from Debian's packages; any user can): below target/lab of a
source tree, else in ~/.cache/tlbridge/lab; TLBRIDGE_LAB names another place, TLBRIDGE_QEMU another QEMU,
TLBRIDGE_ACCEL=kvm|tcg decides what is else found out by booting.

The guest is an initramfs with busybox (--guest rdma: with RDMA programs, too; --guest debian: COMMAND runs in a root
image of Debian). COMMAND's output goes to stdout; a first word with a `/` in it that is a
file here is taken along. Without COMMAND: a shell on this terminal, which Ctrl-A x ends.

Exit codes: COMMAND's own; 123 the device's sanitizer has found something, 124 after --timeout, 125 the guest did
not run it to its end (stderr says why), 130 interrupted.

Examples:
  tlbridge vm --model gru                                     a shell; the driver is loaded
  tlbridge vm --model gru -- ls /proc/sgi_uv/gru
  tlbridge vm --model mlx5 -- ibv_devinfo
  tlbridge vm --model gru --program ./mytest -- mytest --all
  tlbridge vm --model gru --kernel bzImage --module tlbridge_uv.ko --module gru.ko -- dmesg
  tlbridge vm --model gru --gdb                               then gdb: target remote 127.0.0.1:1234")]
pub struct VmArgs {
    /// Which device to start and attach.
    #[arg(long, value_enum, required_unless_present = "device")]
    pub model: Option<VmModel>,
    /// What the guest has beside busybox (default: what the model's programs take).
    #[arg(long, value_enum)]
    pub guest: Option<GuestKind>,
    /// Attach a device that is served already: its vfio-user socket (repeatable).
    #[arg(long, value_name = "SOCKET")]
    pub device: Vec<PathBuf>,
    /// How the device learns of a store (GRU only; default: trap).
    #[arg(long, value_enum, requires = "model")]
    pub doorbell: Option<Doorbell>,
    /// An argument for `tlbridge device` (repeatable), as in --device-arg=--engines=4.
    #[arg(long, value_name = "ARG", requires = "model", allow_hyphen_values = true)]
    pub device_arg: Vec<std::ffi::OsString>,
    /// Guests that run at once, each with a device of its own. COMMAND runs in all of them, with GUEST_INDEX (from 0)
    /// and GUESTS in its environment; its lines have the index before them. --device is dealt out in order.
    /// The ports of their HCAs are on one fabric.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub guests: u32,
    /// Which of Debian's kernels.
    #[arg(long, value_enum, default_value_t = KernelSeries::Stable, conflicts_with = "kernel")]
    pub kernel_series: KernelSeries,
    /// Boot this kernel instead.
    #[arg(long, value_name = "BZIMAGE")]
    pub kernel: Option<PathBuf>,
    /// An initramfs that is unpacked before the guest's own files (which include /init).
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Where that kernel's modules are: what /lib/modules/VERSION is on its system.
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub modules: Option<PathBuf>,
    /// Load a module of the kernel, with what it depends on (repeatable).
    #[arg(long, value_name = "NAME")]
    pub load: Vec<String>,
    /// Load this module after all others (repeatable).
    #[arg(long, value_name = "FILE.ko")]
    pub module: Vec<PathBuf>,
    /// Take a program along, with its libraries, as /bin/NAME (repeatable).
    #[arg(long, value_name = "FILE")]
    pub program: Vec<PathBuf>,
    /// Take a file along, as /root/NAME (repeatable).
    #[arg(long, value_name = "FILE")]
    pub file: Vec<PathBuf>,
    /// Processors.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=255))]
    pub cpus: u32,
    /// Memory: a number with M or G.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = memory_mib)]
    pub memory: u64,
    /// More kernel parameters.
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    pub append: String,
    /// An argument for QEMU (repeatable), as in --qemu-arg=-s.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub qemu_arg: Vec<std::ffi::OsString>,
    /// Let a debugger attach to the guest's kernel: gdb's `target remote 127.0.0.1:PORT` (default: 1234). The
    /// kernel is where its symbols say then (nokaslr).
    #[arg(long, value_name = "PORT", num_args = 0..=1, default_missing_value = "1234",
          value_parser = clap::value_parser!(u16).range(1..))]
    pub gdb: Option<u16>,
    /// Wait before the kernel's first instruction until the debugger says `continue`.
    #[arg(long, requires = "gdb")]
    pub gdb_wait: bool,
    /// The device's sanitizer looks on (GRU only; docs/sanitizer.md). Level 2 is for a host daemon in the guest.
    #[arg(long, value_name = "LEVEL", num_args = 0..=1, require_equals = true, default_missing_value = "1", requires = "model",
          value_parser = clap::value_parser!(u8).range(1..=2))]
    pub sanitize: Option<u8>,
    /// Say at the end, on stderr, what the device has counted.
    #[arg(long, requires = "model")]
    pub device_stats: bool,
    /// Go on after an oops of the guest's kernel.
    #[arg(long)]
    pub survive_oops: bool,
    /// Where the guest's console and QEMU's messages go (default: a file in the lab, removed if all is well).
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Give up after this long in COMMAND (longer on a machine on which a boot takes more than 4 s).
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    pub timeout: Option<u64>,
    /// Give COMMAND this terminal.
    #[arg(long)]
    pub terminal: bool,
    /// What to run.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Devices of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VmModel {
    /// No device: a guest for comparison.
    None,
    /// SGI's Global Reference Unit.
    Gru,
    /// mlx5 HCA with an InfiniBand port.
    Mlx5,
}

impl VmModel {
    /// The model of `tlbridge device`.
    #[must_use]
    pub fn device(self) -> Option<ModelName> {
        match self {
            Self::None => None,
            Self::Gru => Some(ModelName::Gru),
            Self::Mlx5 => Some(ModelName::Mlx5),
        }
    }

    /// The guest that it is of use in.
    #[must_use]
    pub fn guest(self) -> GuestKind {
        match self {
            Self::None | Self::Gru => GuestKind::Small,
            Self::Mlx5 => GuestKind::Rdma,
        }
    }
}

/// Stock kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KernelSeries {
    /// Debian 13's own (6.12).
    Stable,
    /// The newest of its backports (7.3 or later).
    Backports,
}

/// What a guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GuestKind {
    /// Only busybox.
    Small,
    /// The kernel's InfiniBand modules, and the programs of rdma-core and perftest.
    Rdma,
    /// A root image of Debian with those, Python, rdma-core's own tests, fio and strace.
    Debian,
}

/// `512M` or `2G`, in MiB.
fn memory_mib(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.split_at_checked(text.len().saturating_sub(1)) {
        Some((digits, "M" | "m")) => (digits, 1),
        Some((digits, "G" | "g")) => (digits, 1024),
        _ => return Err("a number with M or G".into()),
    };
    let number: u64 = digits.parse().map_err(|e| format!("{digits:?}: {e}"))?;
    match number.checked_mul(unit) {
        Some(mib @ 64..=1_048_576) => Ok(mib),
        _ => Err("between 64M and 1024G".into()),
    }
}

/// Options of the host daemon.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Example:
  tlbridge device --model gru --socket /tmp/d/gru.sock &
  tlbridge host --socket /tmp/d/host.sock --device /tmp/d/gru.sock")]
pub struct HostArgs {
    /// Where to listen for applications (created with mode 0600).
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// The device: its vfio-user socket, or vfio:ADDRESS for a PCI function that is bound to vfio-pci
    /// (vfio:0000:00:05.0).
    #[arg(long, value_name = "DEVICE")]
    pub device: PathBuf,
    /// How memory is registered with userfaultfd.
    #[arg(long, value_enum, default_value_t = UffdModeName::Wp)]
    pub uffd_mode: UffdModeName,
    /// After this long without an answer a process is killed, so that nobody waits for it for ever; 0 = never.
    #[arg(long, value_name = "SECS", default_value_t = 5)]
    pub fence_timeout: u64,
    /// Discard purgeable memory now and then, with invalidations that must not block.
    #[arg(long)]
    pub reclaim: bool,
    /// For experiments: leave a check out, and open the window in which that shows.
    #[arg(long = "break", value_enum, value_name = "CHECK", conflicts_with = "delay")]
    pub break_check: Option<HostFault>,
    /// For experiments: open the window of a check, with the check on.
    #[arg(long, value_enum, value_name = "CHECK")]
    pub delay: Option<HostFault>,
    /// Supervision.
    #[command(flatten)]
    pub supervised: Supervised,
}

/// Checks that can be broken in the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HostFault {
    /// A userfaultfd event is read before the translations are purged.
    SafetyNet,
    /// A device behind vfio-pci keeps its pages while they are discarded.
    HeldPages,
}

/// Benchmarks.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// What an invalidation costs: munmap of 4 KiB to 1 GiB, plain and through the bridge.
    Invalidate(BenchArgs),
    /// What a register access over vfio-user costs, against a raw socket.
    Mmio(MmioArgs),
    /// What it costs to let an RDMA device reach memory: registration, on-demand paging, faults, a registration cache.
    #[cfg(feature = "verbs")]
    Register(Box<crate::bench::register::RegisterArgs>),
    /// What the three ways to notice a store cost (`--doorbell trap|bell|poll`), and an idle device.
    Doorbell(DoorbellArgs),
    /// What the InfiniBand transport and fabric inside a process cost, against memcpy.
    Rdma(RdmaArgs),
}

/// Options that several benchmarks have.
#[derive(Debug, Clone, Args)]
pub struct Measuring {
    /// Write the result as one JSON object to a file (`-` = stdout instead of the table).
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Few blocks: to see that it works, not to publish.
    #[arg(long)]
    pub quick: bool,
    /// Seed of the bootstrap.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

/// Options of `bench rdma`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Transport and fabric alone, without a guest: queue pairs on one thread that is both ends, and on two threads. Bandwidth
against memcpy of the same bytes, small messages against one queue pair, in ABBA blocks: the median of the paired
ratios with its 95% bootstrap interval. Targets are met or not met; the exit code does not depend on them.

Example:
  tlbridge bench rdma --json rdma.json")]
pub struct RdmaArgs {
    /// How much, and where the result goes.
    #[command(flatten)]
    pub measuring: Measuring,
    /// Most payload of one segment, in KiB; without it the transport's default.
    #[arg(long, value_name = "KIB", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub segment: Option<u32>,
}

/// Options of `bench doorbell`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
A device process for each mode and this project's driver on it, without a guest. The poller is compared with an
engine that never stops spinning in ABBA blocks: the median of the paired ratios with its 95% bootstrap interval.
Targets are met or not met; the exit code does not depend on them.

Example:
  tlbridge bench doorbell --json doorbell.json")]
pub struct DoorbellArgs {
    /// How much, and where the result goes.
    #[command(flatten)]
    pub measuring: Measuring,
}

/// Options of `bench mmio`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Both ends run on one CPU, the floor (a process that echoes messages of the same sizes) in turn with the server
in ABBA blocks; a row shows the median of the paired ratios with its 95% bootstrap interval. Targets are met or
not met by the ratio; the exit code does not depend on them.

Example:
  tlbridge bench mmio --json mmio.json")]
pub struct MmioArgs {
    /// How much, and where the result goes.
    #[command(flatten)]
    pub measuring: Measuring,
    /// libvfio-user's sample server (started with a socket path as its argument), to be measured too; else
    /// `libvfio-user-server` is looked for in $PATH.
    #[arg(long, value_name = "PROGRAM")]
    pub libvfio_user: Option<PathBuf>,
}

/// The floor of `bench mmio`.
#[derive(Debug, Clone, Args)]
pub struct EchoArgs {
    /// Where to listen.
    #[arg(long)]
    pub socket: PathBuf,
    /// Supervision.
    #[command(flatten)]
    pub supervised: Supervised,
}

/// The floor of `bench invalidate` for rows that wake somebody.
#[derive(Debug, Clone, Args)]
pub struct WakeArgs {
    /// Where to listen; a FIFO is made beside it.
    #[arg(long)]
    pub socket: PathBuf,
    /// Supervision.
    #[command(flatten)]
    pub supervised: Supervised,
}

/// Options of the busy process of `bench invalidate`.
#[derive(Debug, Clone, Args)]
pub struct HogArgs {
    /// Its processor.
    #[arg(long)]
    pub cpu: usize,
    /// Supervision.
    #[command(flatten)]
    pub supervised: Supervised,
}

/// Options of `bench invalidate`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Floor and subject are measured in turn in ABBA blocks; a row shows the median of the paired ratios with its
95% bootstrap interval. Nothing here is a pass or a fail by time alone: targets are met, not met, or not
applicable on this machine, with the reason.

Example:
  tlbridge bench invalidate --json bench.json")]
pub struct BenchArgs {
    /// Write the result as one JSON object to a file (`-` = stdout instead of the table).
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Few blocks and small ranges: to see that it works, not to publish.
    #[arg(long)]
    pub quick: bool,
    /// Registration mode: both, unless one is named.
    #[arg(long, value_enum)]
    pub uffd_mode: Option<UffdModeName>,
    /// Only this row of the table (can be repeated).
    #[arg(long = "case", value_enum, value_name = "CASE")]
    pub cases: Vec<Case>,
    /// Beside a few rows of the sandbox: the same calls on the kernel's own driver in a guest, in every doorbell mode,
    /// with what the driver says about its flushes. Takes the guest lab (made the first time).
    #[arg(long, conflicts_with = "cases")]
    pub guest: bool,
    /// Seed of the bootstrap.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

/// Options of `conformance`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Each case is one rule of QEMU's docs/interop/vfio-user.rst, with its section. docs/conformance.md describes the
facts. Exit codes: 0 no case failed, 1 a case failed or the server cannot be reached.

Example:
  tlbridge device --model gru --socket /tmp/d/gru.sock &
  tlbridge conformance --socket /tmp/d/gru.sock --facts docs/conformance-gru.json")]
pub struct ConformanceArgs {
    /// The server's socket. Nobody else may be connected.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// What the suite may do to the device and expect of it; without them fewer cases apply.
    #[arg(long, value_name = "FILE.json")]
    pub facts: Option<PathBuf>,
    /// Only cases whose name contains this.
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Options of `inspect`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Example:
  tlbridge inspect /tmp/d/host.sock --json | jq .")]
pub struct InspectArgs {
    /// The host daemon's socket, or the one that a device was given with --inspect.
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// The demo's application.
#[derive(Debug, Clone, Args)]
pub struct ApplicationArgs {
    /// The host daemon's socket.
    #[arg(long)]
    pub socket: PathBuf,
    /// How long to run.
    #[arg(long)]
    pub seconds: u64,
    /// Workers.
    #[arg(long)]
    pub threads: u32,
    /// Seed.
    #[arg(long)]
    pub seed: u64,
    /// Memory.
    #[arg(long)]
    pub memory_mib: u64,
    /// One call in so many is a raw system call.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub raw_every: u32,
    /// Discard by MADV_REMOVE through the agent only.
    #[arg(long)]
    pub announce_removal: bool,
    /// One call in so many is preceded and followed by a probe.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub probe_every: u32,
    /// One call in so many is aimed at a slot in use.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub aim_every: u32,
    /// Supervision.
    #[command(flatten)]
    pub supervised: Supervised,
}

/// The sleeping subscriber.
#[derive(Debug, Clone, Args)]
pub struct PeerArgs {
    /// The host daemon's socket.
    #[arg(long)]
    pub socket: PathBuf,
    /// Whose memory.
    #[arg(long)]
    pub pid: u32,
    /// First address.
    #[arg(long)]
    pub start: u64,
    /// One past the last address.
    #[arg(long)]
    pub end: u64,
    /// Supervision.
    #[command(flatten)]
    pub supervised: Supervised,
}

/// The benchmark's measured process.
#[derive(Debug, Clone, Args)]
pub struct SubjectArgs {
    /// The host daemon's socket.
    #[arg(long)]
    pub socket: PathBuf,
    /// Few blocks.
    #[arg(long)]
    pub quick: bool,
    /// Rows; none = all.
    #[arg(long = "case", value_enum)]
    pub cases: Vec<Case>,
    /// Only ranges up to that length.
    #[arg(long)]
    pub most_bytes: Option<usize>,
    /// Everybody has a fixed processor; this is the device's.
    #[arg(long)]
    pub device_cpu: Option<usize>,
    /// Seed.
    #[arg(long)]
    pub seed: u64,
    /// Supervision.
    #[command(flatten)]
    pub supervised: Supervised,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn test_command_line_when_built_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn test_demo_options_when_no_command_is_given_are_taken() {
        let cli = Cli::parse_from(["tlbridge", "--seconds", "3", "--threads", "4"]);
        assert!(cli.command.is_none());
        assert_eq!(
            (cli.demo.seconds, cli.demo.threads, cli.demo.memory_mib),
            (3, 4, 64)
        );
        let cli = Cli::parse_from(["tlbridge", "demo", "--break", "kill-bit"]);
        let Some(Command::Demo(demo)) = cli.command else {
            panic!("{cli:?}")
        };
        assert_eq!(demo.break_check, Some(Fault::KillBit));
    }

    #[test]
    fn test_memory_when_written_with_a_unit_is_in_mib() {
        assert_eq!(memory_mib("512M"), Ok(512));
        assert_eq!(memory_mib("5G"), Ok(5 * 1024));
        for wrong in [
            "",
            "G",
            "1",
            "1T",
            "-1G",
            "63M",
            "99999999999999999999G",
            "18446744073709551615G",
            "1\u{20ac}",
        ] {
            assert!(memory_mib(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn test_vm_when_without_a_device_is_refused() {
        assert!(Cli::try_parse_from(["tlbridge", "vm", "--", "true"]).is_err());
        let cli = Cli::parse_from([
            "tlbridge",
            "vm",
            "--model",
            "gru",
            "--device-arg=--engines=4",
            "--",
            "ls",
            "-l",
        ]);
        let Some(Command::Vm(vm)) = cli.command else {
            panic!("{cli:?}")
        };
        assert_eq!(vm.command, ["ls", "-l"]);
        assert_eq!(vm.device_arg, ["--engines=4"]);
        assert_eq!(vm.gdb, None);
    }

    #[test]
    fn test_gdb_when_given_has_a_port_or_the_usual_one() {
        let gdb = |rest: &[&str]| {
            let words = [&["tlbridge", "vm", "--model", "gru"], rest].concat();
            Cli::try_parse_from(words).map(|cli| match cli.command {
                Some(Command::Vm(vm)) => vm.gdb,
                other => panic!("{other:?}"),
            })
        };
        assert_eq!(gdb(&["--gdb", "--gdb-wait", "--", "ls"]).unwrap(), Some(1234));
        assert_eq!(gdb(&["--gdb", "4000"]).unwrap(), Some(4000));
        assert!(gdb(&["--gdb", "0"]).is_err());
        assert!(gdb(&["--gdb-wait"]).is_err());
    }

    #[test]
    fn test_break_and_delay_when_given_together_are_refused() {
        let both = ["tlbridge", "demo", "--break", "drain", "--delay", "drain"];
        assert!(Cli::try_parse_from(both).is_err());
        assert!(Cli::try_parse_from(["tlbridge", "demo", "--break", "nothing"]).is_err());
        assert!(Cli::try_parse_from(["tlbridge", "demo", "--seconds", "0"]).is_err());
    }
}
