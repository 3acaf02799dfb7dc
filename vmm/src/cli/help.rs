//! What the help pages say beside the flags.

/// `halyard --help`, after the flags.
pub const TOP: &str = "\
Examples:
  halyard run --kernel /boot/vmlinuz --initramfs /boot/initrd.img
  halyard probe
  halyard serve --api-socket vm.sock
  halyard ctl --socket vm.sock show

`halyard run --help` has more, and the exit codes.";

/// `halyard run` in the list of commands.
pub const RUN_TITLE: &str = "Start a virtual machine and stay until it ends";

/// `halyard run --help`, at its top.
pub const RUN_ABOUT: &str = "\
Start a virtual machine and stay until it ends.

The guest's serial port is this terminal, unless --serial or --console say otherwise: the guest's log appears, and \
keys go to the guest. Ctrl-a x ends the machine at once; Ctrl-a Ctrl-a sends a Ctrl-a. The terminal is restored \
however the run ends. SIGTERM and SIGINT press the guest's power button and give it lifecycle.shutdown_timeout seconds; \
a second one, or SIGHUP, ends the machine at once.";

/// `halyard run -h`, after the flags.
pub const RUN_SHORT: &str = "\
Ctrl-a x ends the machine. `halyard run --help` explains each flag, with examples and exit codes.";

/// `halyard run --help`, after the flags.
pub const RUN: &str = "\
Examples:
  See a kernel boot; Ctrl-a x ends it:
    halyard run --kernel vmlinuz --initramfs initrd.img

  Two processors, 2 GiB, a disk and a network card:
    halyard run --kernel vmlinuz --cmdline 'console=hvc0 root=/dev/vda rw' \\
        --cpus 2 --memory 2G --disk path=root.img --net tap=tap0 --console stdio

  In the background, the console on a socket and the log in a file:
    halyard run --kernel vmlinuz --disk root.img --console socket=vm.sock --serial file=vm.log &

  From a file, with more memory than it says:
    halyard run --config vm.yaml --memory 4G

Exit codes:
    0  the guest powered off
    1  the host failed: no hypervisor, no memory, an I/O error of the monitor
    2  bad input: a flag, the configuration, or a file that it names
    3  the guest reset, and --on-reset exit was given
    4  the guest's kernel panicked
    5  the guest crashed: a triple fault, or an instruction that cannot be carried out
    6  user space was not reached within --boot-timeout; what holds the guest up is told
    7  a request at the API socket destroyed the machine
    8  the sandbox ended the monitor: a thread made a system call that it never should
   64  and up to 95: the guest wrote to the debug-exit port; its five low bits are added
  130  ended from the terminal by Ctrl-a x
  128  and more: ended by a signal, whose number is added

Every problem of the input is reported at once, before anything is changed on the host.";

/// `halyard serve` in the list of commands.
pub const SERVE_TITLE: &str = "Serve the HTTP API on a Unix socket, for one virtual machine";

/// `halyard serve --help`, at its top.
pub const SERVE_ABOUT: &str = "\
Serve the HTTP API on a Unix socket, for one virtual machine.

Without a configuration there is no machine until a client creates one (PUT /api/v1/vm). The process outlives the \
machine, whose outcome clients can read. SIGTERM and SIGINT press the power button of a machine that runs, and the \
process ends with it, or after lifecycle.shutdown_timeout seconds; a second one, or SIGHUP, ends both at once. Started by \
systemd with a socket (LISTEN_FDS), it serves that one; it tells systemd when it is ready, what it does, and that it is \
alive (NOTIFY_SOCKET, WATCHDOG_USEC).";

/// `halyard serve --help`, after the flags.
pub const SERVE: &str = "\
Examples:
  halyard serve --api-socket vm.sock
  halyard serve --api-socket vm.sock,mode=0660,gid=36 --config vm.yaml --boot
  curl --unix-socket vm.sock http://localhost/api/v1/vm

Exit codes: 0 after a signal, 1 where the host failed, 2 for bad input, 128 and more where a signal had to end the \
machine by force: its number is added.";

/// `halyard ctl` in the list of commands.
pub const CTL_TITLE: &str = "Ask something of a running monitor, at its API socket";

/// `halyard ctl --help`, at its top.
pub const CTL_ABOUT: &str = "\
Ask something of a running monitor, at its API socket.

The socket is the one that was given to `halyard serve` or `halyard run` as --api-socket. Paths in a configuration are \
the monitor's: a relative one begins where the monitor was started.";

/// `halyard ctl --help`, after the flags.
pub const CTL: &str = "\
Examples:
  export HALYARD_SOCKET=vm.sock
  halyard ctl create vm.yaml && halyard ctl boot
  halyard ctl console serial
  halyard ctl devices add --disk path=data.img,id=data
  halyard ctl shutdown --deadline 30s --force --wait
  halyard ctl show --output json | jq -r .phase
  halyard ctl events --follow

Exit codes:
    0  it is done
    1  the monitor or its host failed, or this end did
    2  bad input: every problem is listed, with its field or flag
    3  no connection: nobody listens at the socket, no answer came in time, or it broke
    4  refused: the VM's phase or another change is in the way, or it cannot be done
    5  what was named is not there: a device, console, job, or the VM
    6  the job that was waited for failed or was cancelled
  128  and more: ended by a signal, whose number is added";

/// `halyard validate` in the list of commands.
pub const VALIDATE_TITLE: &str =
    "Look for every problem of a configuration without starting it, and print it with all defaults filled in";

/// `halyard validate --help`, at its top.
pub const VALIDATE_ABOUT: &str = "\
Look for every problem of a configuration without starting it, and print it with all defaults filled in.

It takes the flags of `halyard run`, so that it also writes the configuration file that stands for them. Files that \
the configuration names are not opened, and what this host can do is not asked: see `halyard probe`.";

/// `halyard validate --help`, after the flags.
pub const VALIDATE: &str = "\
Examples:
  halyard validate --config vm.yaml
  halyard validate --kernel vmlinuz --disk root.img --memory 2G > vm.json

Exit codes: 0 where there is no problem, 2 where there are some.";

/// `halyard probe` in the list of commands.
pub const PROBE_TITLE: &str = "Say what this host can do for virtual machines, and why not";

/// `halyard measure` in the list of commands.
pub const MEASURE_TITLE: &str = "Foretell the measurements of an Intel TDX trust domain";

/// `halyard measure --help`, before the flags.
pub const MEASURE_ABOUT: &str = "\
Foretell the measurements of an Intel TDX trust domain. MRTD is the SHA-384 over the pages that are added before it \
runs, in the order in which KVM has them measured (Linux 6.16 and later). With a kernel, RTMR0 to 2 are foretold, too, as \
OVMF and Linux extend them until the kernel runs on its own: RTMR0 with memory, ACPI tables and the firmware's variables, \
RTMR1 with the kernel, RTMR2 with its command line and initramfs. It needs no TDX, and no privileges.";

/// `halyard measure --help`, after the flags.
pub const MEASURE: &str = "\
Exit codes: 0, 9 where an event log is not what was foretold, and 2 where a file, a flag or the configuration cannot be used.";

/// `halyard verify` in the list of commands.
pub const VERIFY_TITLE: &str = "Check a quote of an Intel TDX trust domain";

/// `halyard verify --help`, before the flags.
pub const VERIFY_ABOUT: &str = "\
Check a quote of an Intel TDX trust domain: whether its fields are those that are wanted, and whether its signature is that of a \
platform of Intel's. It prints each field, and what it differs from. Nothing is fetched: collateral comes from a file.";

/// `halyard verify --help`, after the flags.
pub const VERIFY: &str = "\
Example:
  halyard verify quote.bin --collateral collateral.json --config vm.yaml --report-data 00112233

Exit codes: 0 where everything is as it is to be, 9 where something is not, 2 where a file cannot be used, 1 where the
program halyard-verify is not beside this one.";

/// `halyard schema` in the list of commands.
pub const SCHEMA_TITLE: &str = "Print the JSON schema of the configuration file";

/// `halyard complete`, which is for shells.
pub const COMPLETE_TITLE: &str = "Complete a command line";

/// `halyard man`, which is for `make install`.
pub const MAN_TITLE: &str = "Write the manual's pages";

/// `halyard probe --help`, after the flags.
pub const PROBE: &str = "Exit codes: 0 where virtual machines can run here, 1 where not.";

/// `halyard schema --help`, after the flags.
pub const SCHEMA: &str = "\
The schema is JSON Schema 2020-12. Editors use it where the file begins with
  # yaml-language-server: $schema=vm.schema.json";
