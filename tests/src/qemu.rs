//! The command line of the QEMU that emulates a lab host.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::host::HostSpec;

/// First bus number behind the host bridge of a NUMA node other than the first, and the distance to the next.
const NODE_BUSES: u32 = 32;

/// The host kernel's words. Whatever dies ends QEMU at once. And a machine that is busy elsewhere may stop this host at
/// any moment: its kernel would take that for a broken timer at boot ("8254 timer not connected to IO-APIC"), and go on
/// with one that stands still, or take its clock for a bad one later.
const WORDS: &str = "console=ttyS0 quiet panic=-1 oops=panic no_timer_check tsc=reliable";

/// Program and arguments for a host as `spec` says, whose agent's port is connected to the socket at `agent`.
///
/// # Errors
/// Where `spec` asks for what cannot be, or the kernel is not there.
pub fn arguments(spec: &HostSpec, initramfs: &Path, agent: &Path, disks: &[(PathBuf, u32)]) -> Result<Vec<String>> {
    ensure!((1..=7).contains(&spec.nodes), "a host has 1 to 7 NUMA nodes, not {}", spec.nodes);
    ensure!(spec.cpus >= spec.nodes, "each of {} NUMA nodes has a processor, and there are {}", spec.nodes, spec.cpus);
    let modules = spec.kernel.folder()?.join("lib/modules");
    let mut words = format!("{WORDS} halyard.modules={} {}", modules.display(), spec.words);
    if spec.iommu {
        words += " intel_iommu=on";
    }
    let mut all = Arguments(vec!["qemu-system-x86_64".into()]);
    // SVM with nested paging is in the emulated processor of AMD's kind; VT-x is not emulated.
    all.add("-accel", "tcg,thread=multi");
    // Without fast string operations: Linux would clear pages with them, and the emulator does them byte by byte.
    all.add("-cpu", "max,-erms,-fsrm");
    all.add("-M", "q35,kernel-irqchip=split");
    all.add("-m", spec.memory_mib);
    all.add("-smp", spec.cpus);
    all.add("-name", "lab,debug-threads=on");
    all.0.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(Into::into));
    all.add("-display", "none");
    all.add("-serial", "stdio");
    all.add("-kernel", spec.kernel.vmlinux()?.display());
    all.add("-initrd", initramfs.display());
    all.add("-append", words);
    all.add("-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap");
    all.add("-device", "virtio-9p-pci,fsdev=root,mount_tag=root");
    all.add("-chardev", format!("socket,id=agent,path={}", agent.display()));
    all.add("-device", "virtio-serial-pci");
    all.add("-device", "virtserialport,chardev=agent,name=org.halyard.agent");
    all.add("-object", "rng-random,id=random,filename=/dev/urandom");
    all.add("-device", "virtio-rng-pci,rng=random");
    if spec.iommu {
        // Without aw-bits the IOMMU has 39 bits, and the BARs of a device lie above them.
        all.add("-device", "intel-iommu,intremap=on,caching-mode=on,aw-bits=48");
    }
    all.add_nodes(spec);
    for (index, (path, node)) in disks.iter().enumerate() {
        ensure!(*node < spec.nodes, "an NVMe disk at NUMA node {node} of {}", spec.nodes);
        let bus = all.add_port(index, *node);
        all.add("-drive", format!("id=nvme{index},if=none,format=raw,file={}", path.display()));
        all.add("-device", format!("nvme,serial=nvme{index},drive=nvme{index},bus={bus}"));
    }
    all.0.extend(spec.options.iter().cloned());
    Ok(all.0)
}

/// Keeps each emulated processor of the QEMU that `guard` runs on one of the processors that this process may use.
///
/// Where their threads move about on a busy machine, a #VMEXIT now and then leaves a flag behind that the emulated processor
/// should have cleared (seen with QEMU 10.0 and 11.1, whose `hflags2` was watched): its own pages are looked up in the guest's
/// nested tables, or it takes an interrupt with its GIF clear. The guest is lost then, or the host's kernel ("TASK stack guard page
/// was hit"). Kept apart they still lost a guest's second processor in one run (2026-11-28), so that hosts have one unless a story
/// needs more. Those are left alone: several run at once, and none of them was lost.
///
/// # Errors
/// Where QEMU's threads cannot be found or kept.
pub fn keep_processors_apart(guard: u32) -> Result<()> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let allowed: Vec<usize> = (0..CpuSet::count()).filter(|index| allowed.is_set(*index).unwrap_or(false)).collect();
    let children =
        fs::read_to_string(format!("/proc/{guard}/task/{guard}/children")).context("the guard's children")?;
    let qemu = children.split_whitespace().next().context("the guard has no child")?;
    for thread in fs::read_dir(format!("/proc/{qemu}/task"))? {
        let thread = thread?;
        // Others may end meanwhile; those of processors are named by debug-threads.
        let name = fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
        let number = name.strip_prefix("CPU ").and_then(|rest| rest.split('/').next()?.parse::<usize>().ok());
        let (Some(number), Some(thread)) = (number, thread.file_name().to_str().and_then(|name| name.parse().ok()))
        else {
            continue;
        };
        let mut own = CpuSet::new();
        own.set(allowed[number % allowed.len()])?;
        sched_setaffinity(Pid::from_raw(thread), &own).with_context(|| format!("QEMU's thread {}", name.trim_end()))?;
    }
    Ok(())
}

struct Arguments(Vec<String>);

impl Arguments {
    fn add(&mut self, name: &str, value: impl ToString) {
        self.0.extend([name.to_owned(), value.to_string()]);
    }

    /// NUMA nodes that share processors and memory evenly, all but the first with a host bridge of their own.
    fn add_nodes(&mut self, spec: &HostSpec) {
        if spec.nodes == 1 {
            return;
        }
        let share = spec.memory_mib / u64::from(spec.nodes);
        for node in 0..spec.nodes {
            let memory = if node == 0 { spec.memory_mib - share * u64::from(spec.nodes - 1) } else { share };
            let (first, next) = (node * spec.cpus / spec.nodes, (node + 1) * spec.cpus / spec.nodes);
            self.add("-object", format!("memory-backend-ram,id=node{node},size={memory}M"));
            self.add("-numa", format!("node,nodeid={node},cpus={first}-{},memdev=node{node}", next - 1));
            if node > 0 {
                let bus = node * NODE_BUSES;
                self.add("-device", format!("pxb-pcie,id=bridge{node},bus=pcie.0,bus_nr={bus},numa_node={node}"));
            }
        }
    }

    /// A root port for a device at a node; returns its bus.
    fn add_port(&mut self, index: usize, node: u32) -> String {
        let bridge = if node == 0 { "pcie.0".to_owned() } else { format!("bridge{node}") };
        self.add("-device", format!("pcie-root-port,id=port{index},bus={bridge},chassis={}", index + 1));
        format!("port{index}")
    }
}
