//! Measures what stands between a monitor's start and its guest's first instruction, step by step.
//!
//! `cargo run --release -p hal --example startup [ROUNDS]` prints the median of each step in microseconds. The guest
//! writes one byte to a port; the first exit is the end.

use std::sync::Arc;
use std::time::Instant;

use hal::{
    BootRegisters, Exit, ExitHandler, Kick, Registers, ResetState, Segment, Slot, SystemRegisters, VcpuId, VmSpec,
};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress, MmapRegion};

/// out 0x10,al; hlt
const GUEST: [u8; 3] = [0xe6, 0x10, 0xf4];
const STEPS: [&str; 7] = ["open", "create VM", "map 256 MiB", "create vCPU", "reset", "first exit", "drop"];

/// Ends the run at the guest's first byte.
struct Stop(Kick);

impl ExitHandler for Stop {
    fn pio_read(&self, _: u16, _: &mut [u8]) {}
    fn pio_write(&self, _: u16, _: &[u8]) {
        self.0.kick();
    }
    fn mmio_read(&self, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn end_of_interrupt(&self, _: u8) {}
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let rounds = std::env::args().nth(1).map_or(Ok(21), |text| text.parse::<usize>())?;
    let mut times = vec![Vec::new(); STEPS.len()];
    for _ in 0..rounds {
        for (all, one) in times.iter_mut().zip(round()?) {
            all.push(one);
        }
    }
    let mut total = 0;
    for (step, mut all) in STEPS.iter().zip(times) {
        all.sort_unstable();
        let median = all.get(all.len() / 2).copied().unwrap_or(0);
        total += median;
        println!("{step:<14}{median:>8} µs");
    }
    println!("{:<14}{total:>8} µs", "all");
    Ok(())
}

/// Starts one guest and gives the microseconds of each step.
fn round() -> Result<Vec<u128>, Box<dyn std::error::Error>> {
    let mut times = Vec::new();
    let mut last = Instant::now();
    let mut lap = || {
        let now = Instant::now();
        times.push((now - last).as_micros());
        last = now;
    };
    let hypervisor = hal::open()?;
    lap();
    let vm = hypervisor.create(&VmSpec { max_vcpus: 1, ..Default::default() })?;
    lap();
    let mapping = MmapRegion::new(256 << 20)?;
    let region = Arc::new(GuestRegionMmap::new(mapping, GuestAddress(0)).ok_or("no region")?);
    region.write_slice(&GUEST, MemoryRegionAddress(0x1000))?;
    vm.memory().map(Slot::new(region))?;
    lap();
    let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    lap();
    vcpu.reset(&ResetState { cpuid: hypervisor.caps().cpuid.clone(), msrs: Vec::new(), entry: Some(real_mode()) })?;
    lap();
    let exit = vcpu.run(&Stop(vcpu.kick()))?;
    lap();
    drop((vcpu, vm, hypervisor));
    lap();
    if exit != Exit::Kicked {
        return Err(format!("the guest ended with {exit:?}").into());
    }
    Ok(times)
}

/// Real mode at address 0x1000.
fn real_mode() -> BootRegisters {
    let data = Segment { limit: 0xffff, access: 0x93, ..Default::default() };
    let sregs = SystemRegisters {
        cs: Segment { access: 0x9b, ..data },
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment { access: 0x8b, ..data },
        ldt: Segment { access: 0x82, ..data },
        cr0: 0x10,
        apic_base: 0xfee0_0900,
        ..Default::default()
    };
    BootRegisters { regs: Registers { rip: 0x1000, rflags: 2, ..Default::default() }, sregs }
}
