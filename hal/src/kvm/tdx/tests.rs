//! The steps of a launch beside a script of what Linux does: in their order, out of it, and put off.
#![expect(unsafe_code, reason = "commands point to their data")]

use super::abi::{self, Command, MemRegion};
use super::launch::{self, Calls};
use super::scripted::{Linux, State};
use crate::{CpuidEntry, GpaRange, Result, TdxSpec, VcpuId};

const ZERO: VcpuId = VcpuId(0);
const ONE: VcpuId = VcpuId(1);
const RAM: GpaRange = GpaRange { start: 0x10_0000, len: 0x10_0000 };
const PAGES: GpaRange = GpaRange { start: 0x10_0000, len: 0x3000 };

fn leaf(function: u32, eax: u32, ecx: u32) -> CpuidEntry {
    CpuidEntry { function, index: Some(0), eax, ebx: 0, ecx, edx: 0 }
}

/// A host where this many leaves can be configured.
fn linux(leaves: u32) -> State {
    let mut configurable = vec![leaf(1, 0xf, 1 << 21), leaf(0xd, 0, 0), leaf(0x8000_0008, 0xff_0000, 0)];
    configurable.extend((3..leaves).map(|number| leaf(0x100 + number, u32::MAX, 0)));
    State { configurable, private: vec![RAM], ..Default::default() }
}

fn spec() -> TdxSpec {
    let mut cpuid = vec![leaf(1, 0xff, 1 << 21), leaf(0xd, 0x207, 0), leaf(0x8000_0008, 0x30_3034, 0)];
    cpuid.extend((3..250).map(|number| leaf(0x100 + number, number, 7)));
    TdxSpec { config_id: Some([1; 48]), owner_config: Some([3; 48]), cpuid, ..Default::default() }
}

/// Two vCPUs come, with the CPUID that they were given.
fn create_vcpus(linux: &Linux) {
    linux.0.borrow_mut().vcpus.extend([(ZERO, Vec::new()), (ONE, Vec::new())]);
    for id in [ZERO, ONE] {
        let leaves = launch::given_cpuid(linux, id).unwrap();
        linux.0.borrow_mut().vcpus.insert(id, leaves);
    }
}

/// A trust domain with two vCPUs that have begun.
fn begun(state: State) -> Linux {
    let linux = Linux::with(state);
    let capabilities = launch::capabilities(&linux).unwrap();
    launch::init_vm(&linux, &capabilities, &spec()).unwrap();
    create_vcpus(&linux);
    launch::init_vcpu(&linux, ZERO, 0x80_9000).unwrap();
    launch::init_vcpu(&linux, ONE, 0x80_9000).unwrap();
    linux
}

fn refused<T>(result: Result<T>, why: &str) {
    let error = result.err().unwrap_or_else(|| panic!("not refused: {why}")).to_string();
    assert!(error.contains(why), "{error}");
}

#[test]
fn a_launch_asks_as_often_as_it_must_and_no_oftener() {
    let linux = begun(linux(3));
    launch::add(&linux, ZERO, PAGES, &[7; 4097], true).unwrap();
    launch::add(&linux, ZERO, GpaRange { start: 0x1f_f000, len: 0x1000 }, &[], false).unwrap();
    launch::finalize(&linux).unwrap();
    let state = linux.0.borrow();
    let given = state.initialized.as_ref().unwrap();
    assert_eq!((given.attributes, given.xfam), (1 << 28, 0x207));
    assert_eq!(given.identities, [[1; 48], [0; 48], [3; 48]]);
    assert_eq!(given.cpuid, [leaf(1, 0xf, 1 << 21), leaf(0xd, 0, 0), leaf(0x8000_0008, 0x30_0000, 0)]);
    assert_eq!(state.begun.values().collect::<Vec<_>>(), [&0x80_9000; 2]);
    assert_eq!(
        state.added,
        [(0x10_0000, 7, 7, true), (0x10_1000, 7, 0, true), (0x10_2000, 0, 0, true), (0x1f_f000, 0, 0, false)]
    );
    // CAPABILITIES, INIT_VM, two INIT_VCPU, two regions, FINALIZE, two GET_CPUID.
    assert_eq!(state.counts.values().copied().collect::<Vec<_>>(), [1, 1, 2, 2, 1, 2]);
}

#[test]
fn whole_pages_are_added_from_where_they_lie_and_others_from_a_copy() {
    let linux = begun(linux(3));
    let pages = [9; 5 * 4096];
    let start = pages.as_ptr().addr().next_multiple_of(4096) - pages.as_ptr().addr();
    let whole = &pages[start..start + 0x3000];
    launch::add(&linux, ZERO, PAGES, whole, true).unwrap();
    let next = GpaRange { start: 0x10_3000, ..PAGES };
    launch::add(&linux, ZERO, next, &pages[start + 8..start + 8 + 0x3000], true).unwrap();
    launch::add(&linux, ZERO, GpaRange { start: 0x10_6000, ..PAGES }, &whole[..0x2fff], true).unwrap();
    let state = linux.0.borrow();
    let from = pages.as_ptr().addr() as u64;
    let within = |source: &u64| (from..from + 5 * 4096).contains(source);
    assert_eq!(state.sources[0], whole.as_ptr().addr() as u64);
    assert!(!state.sources[1..].iter().any(within));
    assert_eq!(
        state.added.iter().map(|page| (page.1, page.2)).collect::<Vec<_>>(),
        [[(9, 9); 8].as_slice(), &[(9, 0)]].concat()
    );
}

#[test]
fn subleaves_are_asked_for_one_by_one() {
    let subleaf = |index, eax| CpuidEntry { index: Some(index), ..leaf(7, eax, 0) };
    let mut host = linux(3);
    host.configurable.extend([subleaf(0, 0xff), subleaf(1, 0xf0), subleaf(2, 0xf)]);
    let host = Linux::with(host);
    let capabilities = launch::capabilities(&host).unwrap();
    let mut spec = spec();
    spec.cpuid.extend([CpuidEntry { index: None, ..leaf(7, 1, 0) }, subleaf(1, 0x11)]);
    launch::init_vm(&host, &capabilities, &spec).unwrap();
    let state = host.0.borrow();
    assert_eq!(state.initialized.as_ref().unwrap().cpuid[3..], [subleaf(0, 1), subleaf(1, 0x10)]);
}

#[test]
fn room_for_leaves_grows_until_it_is_enough() {
    for (leaves, asked) in [(128, 1), (129, 2), (250, 2)] {
        let linux = begun(linux(leaves));
        let state = linux.0.borrow();
        assert_eq!(state.counts[&abi::CAPABILITIES], asked, "{leaves} leaves");
        assert_eq!(state.initialized.as_ref().unwrap().cpuid.len(), usize::try_from(leaves).unwrap());
        // KVM tells how many there are of these.
        assert_eq!(state.counts[&abi::GET_CPUID], if leaves > 128 { 4 } else { 2 });
    }
    refused(launch::capabilities(&Linux::with(linux(300))), "KVM_TDX_CAPABILITIES: KVM refuses it");
}

#[test]
fn what_linux_puts_off_is_asked_for_again_as_it_came_back() {
    let linux = begun(State { no_entropy: 9_000, pages_at_once: Some(1), ..linux(3) });
    linux.0.borrow_mut().busy = 100;
    launch::add(&linux, ZERO, PAGES, &[1; 0x3000], true).unwrap();
    linux.0.borrow_mut().busy = 5;
    launch::finalize(&linux).unwrap();
    let state = linux.0.borrow();
    let pages: Vec<u64> = state.added.iter().map(|page| page.0).collect();
    assert_eq!(pages, [0x10_0000, 0x10_1000, 0x10_2000]);
    assert_eq!(state.counts[&abi::INIT_VM], 9_001);
    assert_eq!(state.counts[&abi::INIT_MEM_REGION], 103);
    assert_eq!(state.counts[&abi::FINALIZE_VM], 6);
}

#[test]
fn what_linux_puts_off_for_ever_ends() {
    let host = Linux::with(State { no_entropy: u32::MAX, ..linux(3) });
    let capabilities = launch::capabilities(&host).unwrap();
    refused(launch::init_vm(&host, &capabilities, &spec()), "status");
    let host = begun(linux(3));
    host.0.borrow_mut().busy = u32::MAX;
    refused(launch::add(&host, ZERO, PAGES, &[], false), "KVM_TDX_INIT_MEM_REGION");
    refused(launch::finalize(&host), "KVM_TDX_FINALIZE_VM");
}

#[test]
fn what_the_module_refuses_names_the_operand() {
    let host = Linux::with(State { status: 0xc000_0100_0000_0045, ..linux(3) });
    let capabilities = launch::capabilities(&host).unwrap();
    refused(launch::init_vm(&host, &capabilities, &spec()), "CPUID_CONFIG is wrong, status 0xc000010000000045");
    // What KVM does not know is refused before it is asked.
    let debug = TdxSpec { attributes: 1, ..spec() };
    refused(launch::init_vm(&host, &capabilities, &debug), "leave 0x1 out");
    assert_eq!(host.0.borrow().counts[&abi::INIT_VM], 1);
    assert_eq!(capabilities.calls, [3, 4]);
}

#[test]
fn each_step_out_of_order_is_refused() {
    let host = Linux::with(linux(3));
    let capabilities = launch::capabilities(&host).unwrap();
    let add = |host: &Linux, by, range| launch::add(host, by, range, &[], false);
    refused(launch::finalize(&host), "KVM_TDX_FINALIZE_VM");
    refused(launch::given_cpuid(&host, ZERO), "KVM_TDX_GET_CPUID");
    // A vCPU before the trust domain.
    host.0.borrow_mut().vcpus.insert(ZERO, Vec::new());
    refused(launch::init_vcpu(&host, ZERO, 0), "KVM_TDX_INIT_VCPU");
    refused(launch::init_vm(&host, &capabilities, &spec()), "the VM has a vCPU already");
    host.0.borrow_mut().vcpus.clear();
    launch::init_vm(&host, &capabilities, &spec()).unwrap();
    refused(launch::init_vm(&host, &capabilities, &spec()), "KVM_TDX_INIT_VM");
    // A vCPU that begins before it has its CPUID, twice, or is not there.
    host.0.borrow_mut().vcpus.insert(ZERO, Vec::new());
    refused(launch::init_vcpu(&host, ZERO, 0), "has no x2APIC");
    refused(add(&host, ZERO, PAGES), "KVM_TDX_INIT_MEM_REGION");
    create_vcpus(&host);
    launch::init_vcpu(&host, ZERO, 0).unwrap();
    refused(launch::init_vcpu(&host, ZERO, 0), "begun before");
    refused(launch::init_vcpu(&host, VcpuId(9), 0), "KVM_TDX_INIT_VCPU");
    // Pages through a vCPU that has not begun, that are not private, or are there.
    refused(add(&host, ONE, PAGES), "KVM_TDX_INIT_MEM_REGION");
    refused(add(&host, ZERO, GpaRange { start: 0x1f_f000, len: 0x2000 }), "not private memory");
    refused(launch::add(&host, ZERO, PAGES, &[0; 0x3001], false), "longer");
    add(&host, ZERO, PAGES).unwrap();
    refused(add(&host, ZERO, PAGES), "added already");
    launch::finalize(&host).unwrap();
    refused(launch::finalize(&host), "KVM_TDX_FINALIZE_VM");
    refused(launch::given_cpuid(&host, ZERO), "KVM_TDX_GET_CPUID");
    refused(launch::init_vcpu(&host, ONE, 0), "KVM_TDX_INIT_VCPU");
    refused(add(&host, ZERO, GpaRange { start: 0x10_4000, len: 0x1000 }), "sealed");
}

/// What the steps never send, so that the script is known to refuse it.
#[test]
fn commands_that_are_not_as_linux_wants_them_are_refused() {
    let host = begun(linux(3));
    let code = |result: std::result::Result<(), vmm_sys_util::errno::Error>| result.err().map(|error| error.errno());
    let page = vec![0_u64; 1024];
    let aligned = (page.as_ptr().addr() as u64).next_multiple_of(4096);
    for (flags, hw_error, source, gpa, pages) in [
        (0, 1, aligned, RAM.start, 1),
        (2, 0, aligned, RAM.start, 1),
        (0, 0, 0, RAM.start, 1),
        (0, 0, aligned + 8, RAM.start, 1),
        (0, 0, aligned, RAM.start + 8, 1),
        (0, 0, aligned, RAM.start, 0),
        (0, 0, aligned, RAM.start, u64::MAX),
    ] {
        let mut region = MemRegion { source, gpa, pages };
        let data = (&raw mut region).expose_provenance() as u64;
        let mut command = Command { id: abi::INIT_MEM_REGION, flags, data, hw_error };
        // SAFETY: the command is refused before its source is read.
        assert_eq!(code(unsafe { host.of_vcpu(ZERO, &mut command) }), Some(libc::EINVAL), "{region:x?} {command:x?}");
    }
    for (id, flags, hw_error) in [(abi::FINALIZE_VM, 1, 0), (abi::FINALIZE_VM, 0, 1), (9, 0, 0)] {
        let mut command = Command { id, flags, data: 0, hw_error };
        // SAFETY: the command has no data.
        assert_eq!(code(unsafe { host.of_vm(&mut command) }), Some(libc::EINVAL), "{command:x?}");
    }
    assert!(!host.0.borrow().finalized && host.0.borrow().added.is_empty());
}
