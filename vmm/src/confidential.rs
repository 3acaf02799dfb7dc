//! What a confidential guest's machine has beside a plain one: memory that devices reach only where the guest shares it, its
//! launch, and the calls that the guest makes to the monitor.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};
use std::{fmt, io};

use api::{Confidential, Identity, Tdx, VmConfig};
use arch::tdx::{LaunchPlan, measure};
use devices::seam::Interrupts;
use hal::{
    Conversion, CpuidEntry, GpaRange, GuestCall, GuestCallStatus, SharedRanges, SnpSpec, TdxSpec, Visibility, Vm,
    VmKind,
};
use nix::sys::mman::{MmapAdvise, madvise};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::firmware::Image;
use crate::machine::Parts;
use crate::memory::Ram;
use crate::pluggable::PluggableMemory;
use crate::quotes::{self, QuoteCounters, Quotes, SharedMemory};
use crate::reach::{Pieces, Reach};
use crate::seams::VmSeam;
use crate::{Failure, kinds};

/// The most ranges of memory that a guest may share apart from each other: each is a mapping of the monitor's own.
const MOST_RANGES: usize = 8192;
const PAGE: u64 = 4096;
/// What guests share at once where they share much: a large page.
const CONVERTED: u64 = 2 << 20;

/// The kind of VM that a configuration asks for. `cpuid`: the leaves of its boot processor.
pub fn kind(confidential: Option<&Confidential>, cpuid: impl FnOnce() -> Vec<CpuidEntry>) -> VmKind {
    match confidential {
        None => VmKind::Standard,
        Some(Confidential::Tdx(tdx)) => VmKind::Tdx(trust_domain(tdx, cpuid())),
        Some(Confidential::Snp {}) => VmKind::Snp(SnpSpec::default()),
        Some(Confidential::SoftwareProtected {}) => VmKind::SoftwareProtected,
    }
}

/// What devices reach of a VM's memory when its guest begins: all of it, or nothing where the guest is to share it first.
pub fn reach(vm: &dyn Vm, memory: &Ram, pluggable: Option<&PluggableMemory>) -> Reach {
    let map = match vm.kind().begins() {
        Visibility::Private => GuestMemoryMmap::new(),
        Visibility::Shared => memory.map.clone(),
    };
    let pieces = match pluggable {
        _ if vm.kind().private_memory => Pieces { from: 0, len: CONVERTED },
        Some(memory) => Pieces { from: memory.range().start, len: memory.block() },
        None => Pieces::WHOLE,
    };
    Reach::new(map, pieces)
}

/// How memory of a VM is to be made: what a confidential guest shares is mapped once more, for devices, and so it is a file.
pub fn memory(config: &VmConfig) -> api::Memory {
    let private = kinds::name(config.kind()).traits().private_memory;
    api::Memory { shared: config.memory.shared || private, ..config.memory.clone() }
}

fn trust_domain(tdx: &Tdx, cpuid: Vec<CpuidEntry>) -> TdxSpec {
    let bytes = |identity: Option<Identity>| identity.map(Identity::bytes);
    TdxSpec {
        attributes: if tdx.sept_ve_disable { TdxSpec::SEPT_VE_DISABLE } else { 0 },
        config_id: bytes(tdx.config_id),
        owner: bytes(tdx.owner),
        owner_config: bytes(tdx.owner_config),
        cpuid,
    }
}

/// What a guest whose beginning is measured starts with.
pub struct Measured {
    /// The firmware's file.
    pub firmware: Image,
    /// The guest's RAM without it, in ascending order.
    pub ram: Vec<GpaRange>,
}

impl Measured {
    /// What is added to the guest, in its order.
    ///
    /// # Errors
    /// What is wrong with the firmware, or with the RAM for it.
    pub fn plan(&self) -> Result<LaunchPlan<'_>, arch::tdx::PlanError> {
        LaunchPlan::from_firmware(&self.firmware, &self.ram)
    }

    /// Launches the VM, whose vCPUs and memory are there.
    ///
    /// # Errors
    /// [`Failure::Host`] where the hypervisor refuses a step.
    pub fn launch(&self, vm: &dyn Vm) -> Result<(), Failure> {
        let Some(launch) = vm.launch() else {
            return Err(Failure::Host("this kind of VM is not launched with measured firmware".into()));
        };
        let plan = self.host_plan()?;
        launch.begin(plan.hand_off)?;
        for region in &plan.regions {
            launch.add(region.memory, &region.contents, region.measured)?;
        }
        launch.finish()?;
        for change in launch.changes() {
            tracing::info!("{change}");
        }
        Ok(())
    }

    /// What the MRTD of the launched VM is, in hexadecimal digits. It takes as long as a launch does, so it is for when the guest
    /// runs.
    ///
    /// # Errors
    /// None, where it could be launched.
    pub fn mrtd(&self) -> Result<String, Failure> {
        let mrtd = Identity::new(measure::mrtd(&self.host_plan()?)).to_string();
        tracing::info!("the trust domain is launched: its MRTD is {mrtd}");
        Ok(mrtd)
    }

    fn host_plan(&self) -> Result<LaunchPlan<'_>, Failure> {
        self.plan().map_err(|error| Failure::Host(error.to_string()))
    }
}

/// Which memory of a VM is shared.
struct OfVm(Arc<dyn Vm>);

impl SharedMemory for OfVm {
    fn is_shared(&self, range: GpaRange) -> bool {
        self.0.memory().is_shared(range)
    }
}

/// The shared memory of a confidential guest, and who answers its calls.
pub struct Guest {
    vm: Arc<dyn Vm>,
    ram: Vec<Arc<GuestRegionMmap>>,
    /// What devices reach.
    reach: Reach,
    shared: Mutex<Shared>,
    quotes: Option<Quotes>,
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest").finish_non_exhaustive()
    }
}

/// What is shared, and how devices see it.
#[derive(Default, Clone)]
struct Shared {
    ranges: SharedRanges,
    /// A mapping for each range, by its start.
    regions: BTreeMap<u64, Arc<GuestRegionMmap>>,
}

/// Why memory cannot be as the guest wants it.
enum Refused {
    /// It shares too many ranges.
    TooMany,
    /// The host has no mapping left, now.
    NoMapping(String),
}

impl Shared {
    /// The same with a range in another state. Ranges that stay as they are keep their mappings.
    fn with(&self, range: GpaRange, to: Visibility, ram: &[Arc<GuestRegionMmap>]) -> Result<Self, Refused> {
        let mut ranges = self.ranges.clone();
        for part in ram.iter().filter_map(|region| range_of(region).common(range)) {
            match to {
                Visibility::Shared => ranges.insert(part),
                Visibility::Private => ranges.remove(part),
            }
        }
        // Regions that touch are one range, and still two mappings.
        let parts = ranges
            .ranges()
            .into_iter()
            .flat_map(|range| ram.iter().filter_map(move |region| Some((region, range_of(region).common(range)?))));
        let mut regions = BTreeMap::new();
        for (region, part) in parts {
            let known = self.regions.get(&part.start).filter(|known| known.len() == part.len);
            let mapped = known.map_or_else(|| map_again(region, part), |known| Ok(known.clone()));
            regions.insert(part.start, mapped.map_err(Refused::NoMapping)?);
            if regions.len() > MOST_RANGES {
                return Err(Refused::TooMany);
            }
        }
        Ok(Self { ranges, regions })
    }
}

fn range_of(region: &GuestRegionMmap) -> GpaRange {
    GpaRange { start: region.start_addr().0, len: region.len() }
}

/// Maps a part of guest memory's file once more.
fn map_again(region: &GuestRegionMmap, part: GpaRange) -> Result<Arc<GuestRegionMmap>, String> {
    let file = region.file_offset().ok_or("memory without a file cannot be shared in parts")?;
    let offset = file.start() + (part.start - region.start_addr().0);
    let len = usize::try_from(part.len).map_err(|error| error.to_string())?;
    let mapping = MmapRegion::from_file(FileOffset::from_arc(file.arc().clone(), offset), len);
    let mapping = mapping.map_err(|error| error.to_string())?;
    keep_from_cores(&mapping).map_err(|error| error.to_string())?;
    GuestRegionMmap::new(mapping, GuestAddress(part.start)).map(Arc::new).ok_or_else(|| "beyond all addresses".into())
}

/// Keeps a mapping out of core files, also of those that were asked for.
#[expect(unsafe_code, reason = "madvise takes a raw address")]
fn keep_from_cores(mapping: &MmapRegion) -> io::Result<()> {
    let Some(start) = NonNull::new(mapping.as_ptr().cast()) else { return Ok(()) };
    // SAFETY: the range is the whole of a mapping that is alive, and MADV_DONTDUMP does not change its contents.
    unsafe { madvise(start, mapping.size(), MmapAdvise::MADV_DONTDUMP) }.map_err(io::Error::from)
}

impl Guest {
    /// A guest whose RAM, a file mapped shared, is as its VM's kind begins, as `reach` is.
    ///
    /// # Errors
    /// The host does not keep the memory out of core files.
    pub fn new(
        vm: Arc<dyn Vm>,
        ram: Vec<Arc<GuestRegionMmap>>,
        reach: Reach,
        quotes: Option<Quotes>,
    ) -> io::Result<Self> {
        ram.iter().try_for_each(|region| keep_from_cores(region))?;
        let mut shared = Shared::default();
        if vm.kind().begins() == Visibility::Shared {
            for region in &ram {
                shared.ranges.insert(range_of(region));
                shared.regions.insert(region.start_addr().0, region.clone());
            }
        }
        Ok(Self { vm, ram, reach, shared: Mutex::new(shared), quotes })
    }

    /// The guest of a machine, where it is a confidential one.
    ///
    /// # Errors
    /// [`Failure::Host`] where there is no thread or interrupt for its quotes, or its memory cannot be kept out of core files.
    pub fn of_machine(parts: &Parts, seam: &VmSeam, memory: &Ram, reach: &Reach) -> Result<Option<Arc<Self>>, Failure> {
        let vm = &seam.0;
        if !vm.kind().private_memory {
            return Ok(None);
        }
        let quotes = match &parts.config.confidential {
            Some(Confidential::Tdx(tdx)) => Some(Quotes::new(quotes::Parts {
                memory: memory.map.clone(),
                shared: Arc::new(OfVm(vm.clone())),
                interrupt: Arc::from(seam.create()?),
                service: tdx.quote_service.clone(),
                counters: Arc::default(),
            })?),
            _ => None,
        };
        let guest = Self::new(vm.clone(), memory.regions.clone(), reach.clone(), quotes);
        let guest = guest.map_err(|error| Failure::Host(format!("guest memory and core files: madvise: {error}")))?;
        Ok(Some(Arc::new(guest)))
    }

    /// Makes memory private or shared, as the guest wants it. A device that is at work on what becomes private finds an
    /// error with its next access.
    pub fn convert(&self, range: GpaRange, to: Visibility) -> Conversion {
        if !range.start.is_multiple_of(PAGE) || !range.len.is_multiple_of(PAGE) {
            return Conversion::Invalid;
        }
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let next = match shared.with(range, to, &self.ram) {
            Ok(next) => next,
            Err(Refused::TooMany) => {
                tracing::warn!("the guest shares more than {MOST_RANGES} ranges of its memory");
                return Conversion::Invalid;
            }
            Err(Refused::NoMapping(problem)) => {
                tracing::warn!("memory that the guest shares cannot be mapped: {problem}");
                return Conversion::Retry;
            }
        };
        // Devices let go of what becomes private before it does, and reach what becomes shared once it is.
        let done = match to {
            Visibility::Private => {
                self.show(&next).and_then(|()| self.convert_now(range, to).inspect_err(|_| drop(self.show(&shared))))
            }
            Visibility::Shared => {
                let shown = self.convert_now(range, to).and_then(|()| self.show(&next));
                shown.inspect_err(|_| self.take_back(&shared, &next))
            }
        };
        if let Err(error) = done {
            tracing::warn!("memory is not {to:?} as the guest wants it: {error}");
            return Conversion::Invalid;
        }
        *shared = next;
        Conversion::Done
    }

    /// Makes private again what was to be shared, and leaves what had been.
    fn take_back(&self, before: &Shared, next: &Shared) {
        let mut new = next.ranges.clone();
        before.ranges.ranges().into_iter().for_each(|range| new.remove(range));
        for range in new.ranges() {
            if let Err(error) = self.convert_now(range, Visibility::Private) {
                tracing::error!("{range:?} stays shared, and no device reaches it: {error}");
            }
        }
    }

    fn convert_now(&self, range: GpaRange, to: Visibility) -> io::Result<()> {
        self.vm.memory().convert(range, to).map_err(io::Error::other)
    }

    /// Has devices reach what is shared.
    fn show(&self, shared: &Shared) -> io::Result<()> {
        let regions: Vec<_> = shared.regions.values().cloned().collect();
        let map = match regions.is_empty() {
            true => GuestMemoryMmap::new(),
            // They come in order and do not overlap.
            false => GuestMemoryMmap::from_arc_regions(regions).map_err(io::Error::other)?,
        };
        self.reach.replace(map)
    }

    /// What is counted of its quotes, where it may have some.
    pub fn quote_counters(&self) -> Option<Arc<QuoteCounters>> {
        self.quotes.as_ref().map(Quotes::counters)
    }

    /// Answers a call of the guest's.
    pub fn call(&self, call: GuestCall) -> GuestCallStatus {
        let Some(quotes) = &self.quotes else { return GuestCallStatus::Unsupported };
        quotes.call(call)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use devices::seam::DmaMap;
    use hal::fake::Fake;
    use hal::{HostCaps, Hypervisor, Slot, TdxSpec, VmKind, VmSpec};
    use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryBackend};

    use super::*;
    use crate::memory;

    const MIB: u64 = 1 << 20;

    struct Bench {
        guest: Guest,
        vm: Arc<dyn Vm>,
        reach: Reach,
        ram: memory::Ram,
    }

    fn bench() -> Bench {
        bench_of(VmKind::Tdx(TdxSpec::default()))
    }

    /// Two regions that touch, of 1 MiB each, and one apart from them.
    fn bench_of(kind: VmKind) -> Bench {
        let caps = HostCaps { kinds: vec![kind.name()], ..Fake::new().caps().clone() };
        let spec = VmSpec { kind, max_vcpus: 1, ..VmSpec::default() };
        let vm: Arc<dyn Vm> = Arc::from(Fake::with_caps(caps).create(&spec).unwrap());
        let ranges = [0, MIB, 4 * MIB].map(|start| GpaRange { start, len: MIB });
        let config = api::Memory { shared: true, ..api::Memory::default() };
        let ram = memory::create(&ranges, &config).unwrap();
        for region in &ram.regions {
            vm.memory().map(Slot::new(region.clone())).unwrap();
        }
        let reach = reach(&*vm, &ram, None);
        let guest = Guest::new(vm.clone(), ram.regions.clone(), reach.clone(), None).unwrap();
        Bench { guest, vm, reach, ram }
    }

    impl Bench {
        fn convert(&self, start: u64, len: u64, to: Visibility) -> Conversion {
            self.guest.convert(GpaRange { start, len }, to)
        }

        /// Whether devices reach a byte.
        fn reach(&self, address: u64) -> bool {
            self.reach.map().memory().read_obj::<u8>(GuestAddress(address)).is_ok()
        }
    }

    #[test]
    fn devices_reach_what_is_shared_and_nothing_else() {
        let bench = bench();
        assert!(!bench.reach(0) && !bench.reach(4 * MIB));
        assert_eq!(bench.convert(2 * PAGE, 4 * PAGE, Visibility::Shared), Conversion::Done);
        let reached: Vec<u64> = (0..8).filter(|page| bench.reach(page * PAGE)).collect();
        assert_eq!(reached, [2, 3, 4, 5]);
        // It is the guest's own memory, seen once more.
        bench.reach.map().memory().write_obj(0x1234_u16, GuestAddress(3 * PAGE)).unwrap();
        assert_eq!(bench.ram.map.read_obj::<u16>(GuestAddress(3 * PAGE)).unwrap(), 0x1234);
        assert_eq!(bench.convert(4 * PAGE, PAGE, Visibility::Private), Conversion::Done);
        assert!(bench.reach(5 * PAGE) && bench.reach(3 * PAGE) && !bench.reach(4 * PAGE));
        let shared = [(2 * PAGE, 2 * PAGE), (5 * PAGE, PAGE)].map(|(start, len)| GpaRange { start, len });
        assert_eq!(bench.vm.memory().shared(), shared);
    }

    /// Functions of the host's, which are told in time: what they reach is shared while they do.
    struct Functions {
        vm: Arc<dyn Vm>,
        reached: Mutex<Vec<u64>>,
        room: usize,
    }

    impl DmaMap for Functions {
        fn map(&self, _: &GuestRegionMmap, part: &Range<u64>) -> io::Result<()> {
            let mut reached = self.reached.lock().unwrap();
            assert!(self.vm.memory().is_shared(GpaRange { start: part.start, len: part.end - part.start }));
            reached.push(part.start);
            if reached.len() > self.room { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
        }

        fn unmap(&self, part: &Range<u64>) -> io::Result<()> {
            assert!(self.vm.memory().is_shared(GpaRange { start: part.start, len: part.end - part.start }));
            self.reached.lock().unwrap().retain(|start| *start != part.start);
            Ok(())
        }
    }

    #[test]
    fn functions_of_the_hosts_reach_what_is_shared_and_only_while_it_is() {
        let bench = bench();
        let functions = Arc::new(Functions { vm: bench.vm.clone(), reached: Mutex::default(), room: 6 });
        let dma: Arc<dyn DmaMap> = functions.clone();
        bench.convert(0, PAGE, Visibility::Shared);
        bench.reach.lead(&dma).unwrap();
        assert_eq!(bench.convert(2 * PAGE, 2 * PAGE, Visibility::Shared), Conversion::Done);
        assert_eq!(bench.convert(PAGE, 2 * PAGE, Visibility::Private), Conversion::Done);
        assert_eq!(*functions.reached.lock().unwrap(), [0, 3 * PAGE]);
        // What cannot be reached by all devices is not shared; what has been is as it was.
        bench.reach.map().memory().write_obj(0x1234_u16, GuestAddress(3 * PAGE)).unwrap();
        assert_eq!(bench.convert(3 * PAGE, 8 * PAGE, Visibility::Shared), Conversion::Invalid);
        assert_eq!(bench.ram.map.read_obj::<u16>(GuestAddress(3 * PAGE)).unwrap(), 0x1234);
        assert_eq!(bench.convert(8 * PAGE, 5 * PAGE, Visibility::Shared), Conversion::Invalid);
        let shared = [(0, PAGE), (3 * PAGE, PAGE)].map(|(start, len)| GpaRange { start, len });
        assert_eq!(bench.vm.memory().shared(), shared);
        assert!(bench.reach(3 * PAGE) && !bench.reach(8 * PAGE));
        bench.reach.leave();
        assert_eq!(bench.convert(8 * PAGE, 5 * PAGE, Visibility::Shared), Conversion::Done);
    }

    #[test]
    fn no_memory_of_it_goes_into_a_core_file() {
        let bench = bench();
        bench.convert(0, 8 * PAGE, Visibility::Shared);
        // Some memory of the monitor's own. What it reads the list into may come to be where the list was read already.
        let own = vec![0_u8; 4096];
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let is_dumped = |address: usize| {
            let mut inside = false;
            for line in smaps.lines() {
                let range = line.split(' ').next().and_then(|range| range.split_once('-'));
                let ends = range.and_then(|(start, end)| {
                    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
                });
                inside = ends.map_or(inside, |(start, end)| (start..end).contains(&address));
                if let (true, Some(flags)) = (inside, line.strip_prefix("VmFlags:")) {
                    return !flags.split(' ').any(|flag| flag == "dd");
                }
            }
            panic!("nothing is mapped at {address:#x}");
        };
        assert!(is_dumped(own.as_ptr().addr()));
        let shared = bench.reach.map().memory().get_host_address(GuestAddress(0)).unwrap();
        assert!(!is_dumped(shared.addr()));
        assert!(bench.ram.regions.iter().all(|region| !is_dumped(region.as_ptr().addr())));
    }

    #[test]
    fn memory_that_no_launch_fills_begins_shared() {
        let bench = bench_of(VmKind::SoftwareProtected);
        assert!([0, MIB, 4 * MIB].iter().all(|start| bench.reach(*start)));
        assert_eq!(bench.convert(MIB, PAGE, Visibility::Private), Conversion::Done);
        assert!(bench.reach(MIB - 1) && !bench.reach(MIB) && bench.reach(MIB + PAGE) && bench.reach(4 * MIB));
        let shared = [(0, MIB), (MIB + PAGE, MIB - PAGE), (4 * MIB, MIB)].map(|(start, len)| GpaRange { start, len });
        assert_eq!(bench.vm.memory().shared(), shared);
        bench.reach.map().memory().write_obj(0x1234_u16, GuestAddress(MIB + PAGE)).unwrap();
        assert_eq!(bench.ram.map.read_obj::<u16>(GuestAddress(MIB + PAGE)).unwrap(), 0x1234);
        assert_eq!(bench.convert(MIB, PAGE, Visibility::Shared), Conversion::Done);
        assert!(bench.reach(MIB));
    }

    #[test]
    fn a_range_over_two_regions_is_shared_in_both_and_holes_are_nobodys() {
        let bench = bench();
        assert_eq!(bench.convert(MIB - PAGE, 4 * MIB, Visibility::Shared), Conversion::Done);
        let over_both =
            bench.reach.map().memory().get_slices(GuestAddress(MIB - PAGE), 2 * 4096).all(|slice| slice.is_ok());
        assert!(over_both && bench.reach(4 * MIB) && !bench.reach(3 * MIB));
        assert_eq!(bench.convert(1 << 40, PAGE, Visibility::Shared), Conversion::Done, "a device's registers");
        assert_eq!(bench.convert(1 << 40, PAGE, Visibility::Private), Conversion::Invalid);
        assert_eq!(bench.convert(PAGE / 2, PAGE, Visibility::Shared), Conversion::Invalid);
        assert!(!bench.reach(PAGE), "what was refused is as it was");
    }

    #[test]
    fn a_guest_cannot_have_the_monitor_map_without_end() {
        let mut bench = bench();
        let len = (2 * MOST_RANGES as u64 + 8) * PAGE;
        bench.ram =
            memory::create(&[GpaRange { start: 0, len }], &api::Memory { shared: true, ..Default::default() }).unwrap();
        let guest = Guest::new(bench.vm.clone(), bench.ram.regions.clone(), bench.reach.clone(), None).unwrap();
        let mut shared = Shared::default();
        for page in 0..MOST_RANGES as u64 {
            shared.ranges.insert(GpaRange { start: 2 * page * PAGE, len: PAGE });
        }
        let full = shared.with(GpaRange { start: 0, len: PAGE }, Visibility::Shared, &guest.ram);
        assert!(full.is_ok_and(|full| full.regions.len() == MOST_RANGES));
        let one_more = GpaRange { start: len - PAGE, len: PAGE };
        assert!(matches!(shared.with(one_more, Visibility::Shared, &guest.ram), Err(Refused::TooMany)));
        let fewer = shared.with(GpaRange { start: 0, len: 8 * PAGE }, Visibility::Private, &guest.ram);
        assert!(fewer.is_ok_and(|fewer| fewer.regions.len() == MOST_RANGES - 4));
    }
}
