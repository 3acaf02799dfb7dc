//! The host with TDX that is played, and the rules that Linux has for callers.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{c_int, c_ulong, c_void};
use std::slice;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use sha2::{Digest, Sha384};

use super::abi::{self, Capabilities, Command, CpuidEntry, CpuidHeader, InitMemRegion, InitVm, Region};
use super::exits;
use super::log::{self, hex, line};
use super::msi;

/// The width of guest physical addresses of trust domains on this host.
const GUEST_ADDRESS_BITS: u32 = 48;

/// What becomes of a call.
pub enum Answer {
    /// The real KVM answers it.
    Real,
    /// It is answered with this.
    Value(c_int),
    /// It fails with this error number, as it may, and nobody need know.
    Quiet(c_int),
}

/// What is known of the trust domains of this process.
struct State {
    vms: BTreeMap<c_int, Td>,
    /// Each vCPU's VM and number.
    vcpus: BTreeMap<c_int, (c_int, usize)>,
}

#[derive(Default)]
struct Td {
    /// The leaves of INIT_VM, once it was called.
    cpuid: Option<Vec<CpuidEntry>>,
    slots: BTreeMap<u32, Region>,
    /// What is private: the end of each range, by its start.
    private: BTreeMap<u64, u64>,
    /// There is an interrupt chip.
    chip: bool,
    /// vCPUs whose CPUID has x2APIC.
    x2apic: BTreeSet<usize>,
    initialized: BTreeSet<usize>,
    finalized: bool,
    /// What is left of a region that was only half added, and is to be asked for next.
    left: Option<InitMemRegion>,
    /// There was one.
    halved: bool,
    /// The measurement of what was added, as long as somebody wants to know.
    mrtd: Sha384,
}

impl Td {
    /// Notes that addresses are private, or are not.
    fn set_private(&mut self, start: u64, end: u64, private: bool) {
        while let Some((from, to)) = self.private.range(..end).next_back().map(|(from, to)| (*from, *to))
            && to > start
        {
            self.private.remove(&from);
            self.private
                .extend([(from, to.min(start)), (from.max(end), to)].into_iter().filter(|(from, to)| from < to));
        }
        if private {
            self.private.insert(start, end);
        }
    }
}

static STATE: Mutex<State> = Mutex::new(State { vms: BTreeMap::new(), vcpus: BTreeMap::new() });

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The real call.
///
/// # Safety
/// `arg` is what `request` wants.
pub unsafe fn real(fd: c_int, request: c_ulong, arg: *mut c_void) -> c_int {
    // SAFETY: the caller's promise.
    let value = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, arg) };
    c_int::try_from(value).unwrap_or(-1)
}

/// Answers a call, or leaves it to the real KVM.
///
/// # Errors
/// The error number that the caller gets.
///
/// # Safety
/// `arg` is what `request` wants.
pub unsafe fn answer(fd: c_int, request: c_ulong, arg: *mut c_void) -> Result<Answer, c_int> {
    let number = arg.addr();
    match request {
        abi::CREATE_VM if number == abi::VM_TDX => {
            line("CREATE_VM type=5");
            // SAFETY: its argument is a number.
            let vm = unsafe { real(fd, request, std::ptr::without_provenance_mut(abi::VM_DEFAULT)) };
            if vm >= 0 {
                let mut state = state();
                state.vms.insert(vm, Td::default());
                // A descriptor that was closed has its number from before.
                state.vcpus.remove(&vm);
            }
            return Ok(Answer::Value(vm));
        }
        abi::CHECK_EXTENSION => return Ok(extension(number as c_ulong)),
        abi::GET_SUPPORTED_CPUID => {
            supported();
            // SAFETY: the caller's promise.
            return Ok(Answer::Value(unsafe { supported_cpuid(fd, arg.cast()) }));
        }
        _ => {}
    }
    let mut state = state();
    if let Some(td) = state.vms.get_mut(&fd) {
        // SAFETY: the caller's promise.
        return match unsafe { of_vm(td, fd, request, arg) }? {
            Some(answer) => Ok(answer),
            None if request == abi::CREATE_VCPU => {
                line(&format!("CREATE_VCPU id={number}"));
                if td.cpuid.is_none() || td.finalized {
                    return Err(libc::EIO);
                }
                if !td.chip {
                    return Err(libc::EINVAL);
                }
                // SAFETY: the caller's promise.
                let vcpu = unsafe { real(fd, request, arg) };
                if vcpu >= 0 {
                    state.vcpus.insert(vcpu, (fd, number));
                    state.vms.remove(&vcpu);
                }
                Ok(Answer::Value(vcpu))
            }
            None => Ok(Answer::Real),
        };
    }
    let Some((vm, id)) = state.vcpus.get(&fd).copied() else { return Ok(Answer::Real) };
    let Some(td) = state.vms.get_mut(&vm) else { return Ok(Answer::Real) };
    if request == abi::RUN {
        if !td.finalized {
            return Err(libc::EINVAL);
        }
        drop(state);
        // SAFETY: the descriptor is a vCPU's.
        return Ok(unsafe { exits::run(fd, id) });
    }
    // SAFETY: the caller's promise.
    unsafe { of_vcpu(td, id, request, arg) }
}

/// Where a trust domain's memory lies that it shares: that of the vCPU whose descriptor this is. `None` where a part of it is
/// private, or no memory.
pub fn shared(vcpu: c_int, start: u64, len: u64) -> Option<*mut u8> {
    let state = state();
    let td = state.vms.get(&state.vcpus.get(&vcpu)?.0)?;
    let end = start.checked_add(len)?;
    let slot = td.slots.values().find(|slot| slot.start <= start && end <= slot.start + slot.len)?;
    let private = td.private.range(..end).next_back().is_some_and(|(_, to)| *to > start);
    (!private).then(|| pointer(slot.host + (start - slot.start)))
}

fn extension(cap: c_ulong) -> Answer {
    match cap {
        abi::CAP_VM_TYPES => Answer::Value(1 << abi::VM_DEFAULT | 1 << abi::VM_TDX),
        abi::CAP_MEMORY_ATTRIBUTES => Answer::Value(8),
        abi::CAP_GUEST_MEMFD | abi::CAP_USER_MEMORY2 => Answer::Value(1),
        _ => Answer::Real,
    }
}

/// Calls on a trust domain itself. `None` where it is not one of them.
unsafe fn of_vm(td: &mut Td, fd: c_int, request: c_ulong, arg: *mut c_void) -> Result<Option<Answer>, c_int> {
    let done = Ok(Some(Answer::Value(0)));
    match request {
        // SAFETY (of all): the caller's promise that `arg` points to what the request wants.
        abi::MEMORY_ENCRYPT_OP => unsafe { vm_command(td, &mut *arg.cast()) }.map(|()| Some(Answer::Value(0))),
        abi::CREATE_GUEST_MEMFD => {
            let wanted = unsafe { &*arg.cast::<abi::GuestMemfd>() };
            line(&format!("CREATE_GUEST_MEMFD size={:#x} flags={:#x}", wanted.size, wanted.flags));
            let file = unsafe { libc::memfd_create(c"guest_memfd".as_ptr(), libc::MFD_CLOEXEC) };
            let size = i64::try_from(wanted.size).map_err(|_| libc::EINVAL)?;
            unsafe { libc::ftruncate(file, size) };
            Ok(Some(Answer::Value(file)))
        }
        abi::SET_USER_MEMORY_REGION2 => {
            let mut region = unsafe { *arg.cast::<Region>() };
            let Region { slot, flags, start, len, .. } = region;
            line(&format!("SET_USER_MEMORY_REGION2 slot={slot} flags={flags:#x} start={start:#x} len={len:#x}"));
            let refused = abi::MEM_READONLY | if flags & abi::MEM_GUEST_MEMFD != 0 { abi::MEM_LOG_DIRTY } else { 0 };
            if flags & refused != 0 || len > 0 && td.slots.get(&slot).is_some_and(|old| old.len > 0) {
                return Err(libc::EINVAL);
            }
            td.slots.insert(slot, region);
            region.flags &= !abi::MEM_GUEST_MEMFD;
            let value = unsafe { real(fd, abi::SET_USER_MEMORY_REGION, (&raw mut region).cast()) };
            Ok(Some(Answer::Value(value)))
        }
        abi::SET_MEMORY_ATTRIBUTES => {
            let abi::Attributes { start, len, attributes, .. } = unsafe { &*arg.cast() };
            line(&format!("SET_MEMORY_ATTRIBUTES start={start:#x} len={len:#x} attributes={attributes:#x}"));
            td.set_private(*start, start + len, attributes & abi::PRIVATE != 0);
            done
        }
        abi::ENABLE_CAP => {
            let abi::EnableCap { cap, args, .. } = unsafe { &*arg.cast() };
            line(&format!("ENABLE_CAP cap={cap} args={:#x},{:#x}", args[0], args[1]));
            td.chip |= *cap == abi::CAP_SPLIT_IRQCHIP;
            Ok(if *cap == abi::CAP_EXIT_HYPERCALL { Some(Answer::Value(0)) } else { None })
        }
        abi::SIGNAL_MSI => {
            msi::signal(unsafe { &*arg.cast() });
            Ok(Some(Answer::Value(1)))
        }
        abi::IRQFD => {
            msi::attach(unsafe { &*arg.cast() });
            done
        }
        abi::SET_GSI_ROUTING => {
            unsafe { msi::route(arg.cast()) };
            Ok(None)
        }
        abi::SET_TSC_KHZ => {
            line(&format!("SET_TSC_KHZ khz={}", arg.addr()));
            done
        }
        _ => Ok(None),
    }
}

/// KVM_MEMORY_ENCRYPT_OP of a VM.
unsafe fn vm_command(td: &mut Td, command: &mut Command) -> Result<(), c_int> {
    if command.hw_error != 0 || command.flags != 0 {
        return Err(libc::EINVAL);
    }
    match command.id {
        // SAFETY (of all): the caller's promise that the data is what the command wants.
        0 => unsafe { capabilities(command.data) },
        1 => {
            if td.cpuid.is_some() {
                return Err(libc::EINVAL);
            }
            td.cpuid = Some(unsafe { init_vm(command.data) }?);
            Ok(())
        }
        4 => {
            line("FINALIZE_VM");
            if td.finalized || td.initialized.is_empty() {
                return Err(libc::EINVAL);
            }
            td.finalized = true;
            log::time("FINALIZE_VM");
            line(&format!("  mrtd {}", hex(&std::mem::take(&mut td.mrtd).finalize())));
            Ok(())
        }
        _ => Err(libc::EINVAL),
    }
}

/// Calls on a vCPU.
unsafe fn of_vcpu(td: &mut Td, id: usize, request: c_ulong, arg: *mut c_void) -> Result<Answer, c_int> {
    match request {
        _ if abi::REGISTERS.contains(&(request & 0xff)) => {
            line(&format!("a call for registers, {:#x}", request & 0xff));
            return Err(libc::EINVAL);
        }
        abi::SET_CPUID2 => {
            // SAFETY: the caller's promise.
            let entries = unsafe { entries(arg.cast()) };
            line(&format!("SET_CPUID2 vcpu={id} entries={}", entries.len()));
            if entries.iter().any(|leaf| leaf.function == 1 && leaf.ecx & abi::X2APIC != 0) {
                td.x2apic.insert(id);
            }
        }
        abi::SET_MSRS => {
            // SAFETY: the caller's promise; the number of registers comes first, each has 16 bytes.
            let count = unsafe { *arg.cast::<u32>() };
            let first = unsafe { arg.byte_add(8).cast::<[u64; 2]>() };
            let indices: Vec<String> = (0..usize::try_from(count).unwrap_or(0))
                .map(|at| format!("{:#x}", unsafe { (*first.add(at))[0] } & 0xffff_ffff))
                .collect();
            line(&format!("SET_MSRS vcpu={id} {}", indices.join(",")));
        }
        // SAFETY: the caller's promise.
        abi::MEMORY_ENCRYPT_OP => {
            unsafe { vcpu_command(td, id, &mut *arg.cast()) }?;
            return Ok(Answer::Value(0));
        }
        _ => {}
    }
    Ok(Answer::Real)
}

/// KVM_MEMORY_ENCRYPT_OP of a vCPU.
unsafe fn vcpu_command(td: &mut Td, id: usize, command: &mut Command) -> Result<(), c_int> {
    if td.finalized || command.hw_error != 0 {
        return Err(libc::EINVAL);
    }
    match command.id {
        2 => {
            line(&format!("INIT_VCPU vcpu={id} rcx={:#x}", command.data));
            if td.x2apic.contains(&id) && td.initialized.insert(id) { Ok(()) } else { Err(libc::EINVAL) }
        }
        // SAFETY (of both): the caller's promise.
        3 => unsafe { init_mem_region(td, id, command) },
        5 => unsafe { get_cpuid(td, id, command.data) },
        _ => Err(libc::EINVAL),
    }
}

/// KVM_TDX_CAPABILITIES: what the host's own KVM supports is what can be configured.
unsafe fn capabilities(data: u64) -> Result<(), c_int> {
    let leaves = configurable_leaves();
    // SAFETY (of all): the caller's promise.
    let caps = unsafe { &mut *pointer::<Capabilities>(data) };
    let room = caps.cpuid.count;
    line(&format!("TDX_CAPABILITIES room={room}"));
    if usize::try_from(room).map_or(true, |room| room < leaves.len()) {
        return Err(libc::E2BIG);
    }
    (caps.attributes, caps.xfam, caps.vmcalls) = (abi::SEPT_VE_DISABLE, abi::XFAM, [0, 1 << 1, 0, 0]);
    unsafe { give(&raw mut caps.cpuid, &leaves) };
    Ok(())
}

/// The leaves that can be configured: those of the processor, since KVM's own are nothing to the TDX module.
fn configurable_leaves() -> Vec<CpuidEntry> {
    supported().into_iter().filter(|leaf| leaf.function >> 16 != 0x4000).map(configurable).collect()
}

/// A leaf as one whose bits can all be configured, without a word of whether it has subleaves. That of address sizes has the
/// width of guest addresses in it.
fn configurable(leaf: CpuidEntry) -> CpuidEntry {
    let eax = if leaf.function == 0x8000_0008 { leaf.eax | 0xff << 16 } else { leaf.eax };
    CpuidEntry { eax, flags: 0, ..leaf }
}

/// KVM_TDX_INIT_VM. The leaves that it sets.
unsafe fn init_vm(data: u64) -> Result<Vec<CpuidEntry>, c_int> {
    // SAFETY (of all): the caller's promise.
    let wanted = unsafe { &*pointer::<InitVm>(data) };
    let leaves = unsafe { entries(&raw const wanted.cpuid) };
    line(&format!(
        "INIT_VM attributes={:#x} xfam={:#x} mrconfigid={} mrowner={} mrownerconfig={} entries={}",
        wanted.attributes,
        wanted.xfam,
        hex(&wanted.mrconfigid),
        hex(&wanted.mrowner),
        hex(&wanted.mrownerconfig),
        leaves.len()
    ));
    for leaf in leaves {
        let CpuidEntry { function, index, flags, eax, ebx, ecx, edx, .. } = leaf;
        line(&format!("  cpuid {function:#x}.{index} flags={flags} {eax:08x} {ebx:08x} {ecx:08x} {edx:08x}"));
    }
    // As Linux looks for each leaf that can be configured: an entry without the flag stands for all subleaves. There must be
    // as many entries as are found so, and the TDX module refuses bits that cannot be configured.
    let mut copied = 0;
    for mask in configurable_leaves() {
        let of_mask =
            |leaf: &&CpuidEntry| leaf.function == mask.function && (leaf.flags & 1 == 0 || leaf.index == mask.index);
        let Some(leaf) = leaves.iter().find(of_mask) else { continue };
        copied += 1;
        if leaf.eax & !mask.eax | leaf.ebx & !mask.ebx | leaf.ecx & !mask.ecx | leaf.edx & !mask.edx != 0 {
            return Err(libc::EINVAL);
        }
    }
    if copied != leaves.len() {
        return Err(libc::EINVAL);
    }
    let width = leaves.iter().find(|leaf| leaf.function == 0x8000_0008).map(|leaf| leaf.eax >> 16 & 0xff);
    let reserved = wanted.reserved.iter().any(|word| *word != 0);
    if !matches!(width, Some(48 | 52)) || wanted.attributes & !abi::SEPT_VE_DISABLE != 0 || reserved {
        return Err(libc::EINVAL);
    }
    Ok(leaves.to_vec())
}

/// KVM_TDX_INIT_MEM_REGION. The first one is only half done, and to be asked for again as it comes back.
unsafe fn init_mem_region(td: &mut Td, id: usize, command: &mut Command) -> Result<(), c_int> {
    // SAFETY (of all): the caller's promise; the source is as long as it says.
    let region = unsafe { &mut *pointer::<InitMemRegion>(command.data) };
    let InitMemRegion { source, start, pages } = *region;
    if let Some(left) = td.left.take() {
        line("  the rest of it");
        if *region != left {
            return Err(libc::EINVAL);
        }
        *region = left.after(left.pages);
        return Ok(());
    }
    if source == 0 || !source.is_multiple_of(4096) || !start.is_multiple_of(4096) || pages == 0 {
        return Err(libc::EINVAL);
    }
    let end = pages.checked_mul(4096).and_then(|len| start.checked_add(len)).ok_or(libc::EINVAL)?;
    let private =
        |slot: &Region| slot.flags & abi::MEM_GUEST_MEMFD != 0 && slot.start <= start && end <= slot.start + slot.len;
    let private =
        td.slots.values().any(private) && td.private.range(..=start).next_back().is_some_and(|(_, to)| end <= *to);
    if !td.initialized.contains(&id) || !private {
        return Err(libc::EINVAL);
    }
    unsafe { note(&mut td.mrtd, id, command.flags, *region) };
    let half = pages / 2;
    if half > 0 && !std::mem::replace(&mut td.halved, true) {
        *region = region.after(half);
        td.left = Some(*region);
        return Err(libc::EAGAIN);
    }
    *region = region.after(pages);
    Ok(())
}

/// Writes down pages that are added, with the digest of what they hold; a short list in full.
unsafe fn note(mrtd: &mut Sha384, id: usize, flags: u32, region: InitMemRegion) {
    if !log::is_kept() {
        return;
    }
    let InitMemRegion { source, start, pages } = region;
    let len = usize::try_from(pages << 12).unwrap_or(0);
    // SAFETY: the caller's promise.
    let contents = unsafe { slice::from_raw_parts(pointer::<u8>(source), len) };
    let digest = hex(&Sha384::digest(contents));
    let measured = flags & abi::MEASURE != 0;
    line(&format!("INIT_MEM_REGION vcpu={id} start={start:#x} pages={pages} measured={measured} sha384={digest}"));
    measure(mrtd, start, contents, measured);
    // Hand-off blocks: the first is of type 1 and 56 bytes long.
    if contents.starts_with(&[1, 0, 56, 0]) {
        let used = contents.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1).next_multiple_of(8);
        line(&format!("  hob {}", hex(&contents[..used])));
    }
}

/// What the TDX module makes of pages that are added: of each page where it lies, and then of 256 bytes after the other.
fn measure(mrtd: &mut Sha384, start: u64, contents: &[u8], measured: bool) {
    let place = |name: &str, address: u64| {
        let mut place = [0; 128];
        place[..name.len()].copy_from_slice(name.as_bytes());
        place[16..24].copy_from_slice(&address.to_le_bytes());
        place
    };
    for (page, address) in contents.chunks(4096).zip((start..).step_by(4096)) {
        mrtd.update(place("MEM.PAGE.ADD", address));
        for (chunk, address) in page.chunks(256).zip((address..).step_by(256)).filter(|_| measured) {
            mrtd.update(place("MR.EXTEND", address));
            mrtd.update(chunk);
        }
    }
}

/// KVM_TDX_GET_CPUID: what INIT_VM set.
unsafe fn get_cpuid(td: &Td, id: usize, data: u64) -> Result<(), c_int> {
    let leaves = td.cpuid.as_deref().unwrap_or_default();
    // SAFETY (of all): the caller's promise.
    let header = unsafe { &mut *pointer::<CpuidHeader>(data) };
    let room = header.count;
    line(&format!("GET_CPUID vcpu={id} room={room}"));
    if usize::try_from(room).map_or(true, |room| room < leaves.len()) {
        header.count = u32::try_from(leaves.len()).unwrap_or(u32::MAX);
        return Err(libc::E2BIG);
    }
    unsafe { give(header, leaves) };
    Ok(())
}

/// What the host supports, as a host with TDX has it: it tells the width of guest physical addresses.
unsafe fn supported_cpuid(fd: c_int, header: *mut CpuidHeader) -> c_int {
    // SAFETY (of all): the caller's promise, and after success there are as many entries as the header says.
    let value = unsafe { real(fd, abi::GET_SUPPORTED_CPUID, header.cast()) };
    if value == 0 {
        let leaves =
            unsafe { slice::from_raw_parts_mut(header.add(1).cast(), usize::try_from((*header).count).unwrap_or(0)) };
        leaves.iter_mut().for_each(|leaf| *leaf = with_width(*leaf));
    }
    value
}

/// A leaf of address sizes with the width of guest physical addresses in bits 23 to 16 of EAX; any other as it is.
fn with_width(leaf: CpuidEntry) -> CpuidEntry {
    let eax = if leaf.function == 0x8000_0008 { leaf.eax & !(0xff << 16) | GUEST_ADDRESS_BITS << 16 } else { leaf.eax };
    CpuidEntry { eax, ..leaf }
}

/// What the host's own KVM supports. It is asked once, since a monitor in its sandbox may open nothing any more.
fn supported() -> Vec<CpuidEntry> {
    static ANSWER: OnceLock<Vec<CpuidEntry>> = OnceLock::new();
    ANSWER.get_or_init(ask_supported).clone()
}

fn ask_supported() -> Vec<CpuidEntry> {
    const ROOM: usize = 256;
    let mut buffer = vec![CpuidEntry::default(); ROOM + 1];
    // The header takes the end of the first entry, so that the entries behind it are aligned.
    let header =
        buffer.as_mut_ptr().wrapping_byte_add(size_of::<CpuidEntry>() - size_of::<CpuidHeader>()).cast::<CpuidHeader>();
    // SAFETY (of all): the header lies within the buffer, and the room behind it is as large as it says.
    unsafe {
        let kvm = libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        *header = CpuidHeader { count: 256, padding: 0 };
        supported_cpuid(kvm, header);
        libc::close(kvm);
        entries(header).to_vec()
    }
}

/// The entries behind a header.
unsafe fn entries<'a>(header: *const CpuidHeader) -> &'a [CpuidEntry] {
    // SAFETY (of all): the caller's promise.
    unsafe { slice::from_raw_parts(header.add(1).cast(), usize::try_from((*header).count).unwrap_or(0)) }
}

/// Writes entries behind a header.
unsafe fn give(header: *mut CpuidHeader, leaves: &[CpuidEntry]) {
    // SAFETY (of all): the caller has looked that there is room.
    unsafe {
        (*header).count = u32::try_from(leaves.len()).unwrap_or(0);
        std::ptr::copy_nonoverlapping(leaves.as_ptr(), header.add(1).cast(), leaves.len());
    }
}

fn pointer<T>(address: u64) -> *mut T {
    std::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap_or(0))
}
