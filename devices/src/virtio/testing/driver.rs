//! A driver of a virtio PCI function, on a machine of one device.

use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{DriverQueue, FakeDoorbells, FakeInterrupts, Used, guest_memory, wait};
use crate::bus::Bus;
use crate::pci::{Address, PciSegment, PlatformFunction, Windows};
use crate::virtio::VirtioDevice;
use crate::virtio::transport::VirtioPci;

/// How long a test waits for a device.
pub const TIMEOUT: Duration = Duration::from_secs(10);

const ECAM: u64 = 0xe000_0000;
const MEMORY_LEN: usize = 16 << 20;
/// Where buffers and rings go from.
const FIRST_FREE: u64 = 0x1_0000;

/// Status bits.
const ACKNOWLEDGE_DRIVER: u8 = 3;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
/// Set by the device when it cannot go on.
const NEEDS_RESET: u8 = 64;
/// VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1 << 32;

/// A machine with one virtio device, driven through its registers.
pub struct PciDriver {
    /// Guest memory, 16 MiB from 0.
    pub memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// The memory-mapped bus: ECAM and BARs.
    pub mmio: Arc<Bus>,
    /// The root bus.
    pub segment: Arc<PciSegment>,
    /// The device's interrupts. The message of MSI-X vector n carries n as its data.
    pub interrupts: FakeInterrupts,
    /// The device's doorbells.
    pub doorbells: FakeDoorbells,
    /// The device behind its registers.
    pub device: Arc<VirtioPci>,
    /// Its place on the bus.
    pub address: Address,
    /// Addresses of the structures: common, notification, ISR, device configuration, MSI-X table.
    pub common: u64,
    /// Address of queue 0's notification register.
    pub notify: u64,
    notify_multiplier: u64,
    /// Address of the ISR status.
    pub isr: u64,
    /// Address of the device configuration, 0 where there is none.
    pub config: u64,
    /// Address of the MSI-X table.
    pub msix_table: u64,
    free: u64,
}

impl PciDriver {
    /// Builds a machine around `device`, finds its structures, and enables memory accesses and MSI-X.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with_memory(device, guest_memory(MEMORY_LEN))
    }

    /// The same, with guest memory that the test made (at least 1 MiB from 0).
    pub fn with_memory(device: Box<dyn VirtioDevice>, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> Self {
        let mmio = Arc::new(Bus::new());
        let windows = Windows { low: 0xc000_0000..0xe000_0000, high: 0x10_0000_0000..0x20_0000_0000 };
        let segment = Arc::new(PciSegment::new(Arc::clone(&mmio), windows));
        mmio.insert(ECAM, segment.ecam_len(), Arc::clone(&segment) as _).expect("ECAM on the bus");
        segment.add(Arc::new(PlatformFunction::host_bridge())).expect("a host bridge");
        let (interrupts, doorbells) = (FakeInterrupts::new(), FakeDoorbells::new());
        let function =
            VirtioPci::new("test", device, memory.clone(), Arc::new(interrupts.clone()), Arc::new(doorbells.clone()));
        let device = Arc::new(function.expect("a PCI function"));
        let address = segment.add(Arc::clone(&device) as _).expect("a place on the bus");
        let mut driver = Self {
            memory,
            mmio,
            segment,
            interrupts,
            doorbells,
            device,
            address,
            common: 0,
            notify: 0,
            notify_multiplier: 0,
            isr: 0,
            config: 0,
            msix_table: 0,
            free: FIRST_FREE,
        };
        driver.config_write(0x04, &[0x06, 0x00]);
        driver.find_structures();
        driver
    }

    /// Looks for the device's structures again, as after it was moved.
    pub fn find_structures(&mut self) {
        let mut at = u16::from(self.config_byte(0x34));
        while at != 0 {
            let body = u64::from(self.config_dword(at + 8));
            match self.config_byte(at) {
                0x09 => {
                    let base = self.bar(self.config_byte(at + 4)) + body;
                    match self.config_byte(at + 3) {
                        1 => self.common = base,
                        2 => {
                            self.notify = base;
                            self.notify_multiplier = u64::from(self.config_dword(at + 16));
                        }
                        3 => self.isr = base,
                        4 => self.config = base,
                        _ => {}
                    }
                }
                0x11 => {
                    let table = self.config_dword(at + 4);
                    self.msix_table = self.bar(u8::try_from(table & 7).expect("a BAR")) + u64::from(table & !7);
                    self.config_write(at + 2, &[0x00, 0x80]);
                }
                _ => {}
            }
            at = u16::from(self.config_byte(at + 1));
        }
    }

    /// The address of a 64-bit BAR.
    pub fn bar(&self, index: u8) -> u64 {
        let at = 0x10 + 4 * u16::from(index);
        u64::from(self.config_dword(at + 4)) << 32 | u64::from(self.config_dword(at) & !0xf)
    }

    fn ecam(&self, register: u16) -> u64 {
        ECAM + (u64::from(self.address.device) << 15) + (u64::from(self.address.function) << 12) + u64::from(register)
    }

    /// Reads configuration space.
    pub fn config_read(&self, register: u16, data: &mut [u8]) {
        self.mmio.read(self.ecam(register), data);
    }

    /// Writes configuration space.
    pub fn config_write(&self, register: u16, data: &[u8]) {
        self.mmio.write(self.ecam(register), data);
    }

    /// Reads 32 bits of configuration space.
    pub fn config_dword(&self, register: u16) -> u32 {
        let mut data = [0; 4];
        self.config_read(register, &mut data);
        u32::from_le_bytes(data)
    }

    fn config_byte(&self, register: u16) -> u8 {
        let mut data = [0];
        self.config_read(register, &mut data);
        data[0]
    }

    /// Reads a register of `N` bytes, little-endian.
    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut data = [0; N];
        assert!(self.mmio.read(at, &mut data), "nothing answers at {at:#x}");
        data
    }

    /// Writes a register.
    pub fn write(&self, at: u64, data: &[u8]) {
        assert!(self.mmio.write(at, data), "nothing answers at {at:#x}");
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        let [status] = self.read(self.common + 0x14);
        status
    }

    /// Writes the device status.
    pub fn set_status(&self, status: u8) {
        self.write(self.common + 0x14, &[status]);
    }

    /// True where the device has found that it needs a reset.
    pub fn needs_reset(&self) -> bool {
        self.status() & NEEDS_RESET != 0
    }

    /// Resets the device.
    pub fn reset(&self) {
        self.set_status(0);
        assert_eq!(self.status(), 0, "a reset is done when its write returns");
    }

    /// The features that the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.write(self.common, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.read(self.common + 0x04)))
        };
        half(0) | half(1) << 32
    }

    /// Goes to FEATURES_OK with those of `wanted` that are offered, and VERSION_1. Returns what was agreed on.
    pub fn negotiate(&self, wanted: u64) -> u64 {
        self.reset();
        self.set_status(1);
        self.set_status(ACKNOWLEDGE_DRIVER);
        let features = self.offered() & (wanted | VERSION_1);
        assert!(self.offer_back(features), "the device refuses its own features");
        features
    }

    /// Writes features and FEATURES_OK. False where the device does not take them.
    pub fn offer_back(&self, features: u64) -> bool {
        let bytes = features.to_le_bytes();
        for (select, half) in [(0_u32, &bytes[..4]), (1, &bytes[4..])] {
            self.write(self.common + 0x08, &select.to_le_bytes());
            self.write(self.common + 0x0c, half);
        }
        self.set_status(ACKNOWLEDGE_DRIVER | FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    /// Lets the queues run.
    pub fn driver_ok(&self) {
        self.set_status(ACKNOWLEDGE_DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Reserves guest memory for a buffer or ring, a multiple of 16.
    pub fn alloc(&mut self, len: u64) -> u64 {
        let at = self.free;
        self.free = (at + len).next_multiple_of(16);
        assert!(self.free <= u64::try_from(MEMORY_LEN).expect("16 MiB"), "the test needs more memory");
        at
    }

    /// Reserves a buffer and fills it.
    pub fn alloc_bytes(&mut self, data: &[u8]) -> u64 {
        let at = self.alloc(u64::try_from(data.len()).expect("a length"));
        self.memory.memory().write_slice(data, GuestAddress(at)).expect("a buffer in memory");
        at
    }

    /// Reads guest memory.
    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.memory().read_slice(&mut data, GuestAddress(at)).expect("a buffer in memory");
        data
    }

    /// The selected queue's largest size.
    pub fn queue_size(&self, index: u16) -> u16 {
        self.write(self.common + 0x16, &index.to_le_bytes());
        u16::from_le_bytes(self.read(self.common + 0x18))
    }

    /// Sets a queue up with the MSI-X vector `index + 1`, and enables it.
    pub fn setup_queue(&mut self, index: u16, size: u16) -> DriverQueue {
        let base = self.alloc(DriverQueue::bytes(size));
        let queue = DriverQueue::new(&self.memory, base, size);
        self.enable_queue(index, &queue);
        queue
    }

    /// Gives a queue's addresses and its vector to the device, and enables it.
    pub fn enable_queue(&self, index: u16, queue: &DriverQueue) {
        let vector = index + 1;
        self.set_vector(vector, true);
        self.write(self.common + 0x16, &index.to_le_bytes());
        self.write(self.common + 0x18, &queue.size.to_le_bytes());
        self.write(self.common + 0x1a, &vector.to_le_bytes());
        for (register, address) in [(0x20, queue.descriptors), (0x28, queue.available), (0x30, queue.used_ring)] {
            let bytes = address.to_le_bytes();
            self.write(self.common + register, &bytes[..4]);
            self.write(self.common + register + 4, &bytes[4..]);
        }
        self.write(self.common + 0x1c, &1_u16.to_le_bytes());
    }

    /// Writes a vector's table entry; its message carries the vector's number.
    pub fn set_vector(&self, vector: u16, unmasked: bool) {
        let entry = self.msix_table + 16 * u64::from(vector);
        self.write(entry, &0xfee0_0000_u64.to_le_bytes());
        self.write(entry + 8, &u32::from(vector).to_le_bytes());
        self.write(entry + 12, &u32::from(!unmasked).to_le_bytes());
    }

    /// Has configuration changes interrupt by vector 0.
    pub fn setup_config_vector(&self) {
        self.set_vector(0, true);
        self.write(self.common + 0x10, &0_u16.to_le_bytes());
    }

    /// The event of an MSI-X vector's interrupt, once it was unmasked.
    pub fn vector_event(&self, vector: u16) -> Option<EventFd> {
        self.interrupts.event(u32::from(vector))
    }

    /// Waits for an interrupt by `vector`. False after [`TIMEOUT`].
    pub fn wait_vector(&self, vector: u16) -> bool {
        self.vector_event(vector).is_some_and(|event| wait(&event, TIMEOUT))
    }

    /// Tells the device of available chains, by its doorbell where it has one.
    pub fn kick(&self, index: u16) {
        let at = self.notify + u64::from(index) * self.notify_multiplier;
        if !self.doorbells.write(at) {
            self.write(at, &index.to_le_bytes());
        }
    }

    /// Waits until the device returns a chain of queue `index`. Panics after [`TIMEOUT`].
    pub fn wait_used(&self, index: u16, queue: &mut DriverQueue) -> Used {
        loop {
            if let Some(used) = queue.used() {
                return used;
            }
            if !queue.ask_for_interrupt() {
                assert!(self.wait_vector(index + 1), "queue {index} returned nothing");
            }
        }
    }

    /// Waits until the device needs a reset, which it tells by the configuration's vector. Panics after [`TIMEOUT`].
    pub fn wait_needs_reset(&self) {
        while !self.needs_reset() {
            assert!(self.wait_vector(0), "the device did not notice");
        }
    }
}

impl Drop for PciDriver {
    fn drop(&mut self) {
        // The bus holds the PCI segment, and the segment the bus: the device would live on, with its threads.
        self.mmio.remove(ECAM).expect("ECAM on the bus");
    }
}
