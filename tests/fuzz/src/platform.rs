//! The platform's registers outside PCI, and a guest that reads and writes them as it likes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::bus::Bus;
use devices::ioapic::{IoApic, PINS};
use devices::legacy::{
    AcpiRegisters, DebugExit, I8042, PlatformEvent, PlatformEvents, ProcessorObserver, Processors, PvPanic, Serial,
    SerialPeer,
};
use devices::virtio::testing::FakeInterrupts;

use crate::input::{Step, pattern, width};

const COM1: u64 = 0x3f8;
const DEBUG_EXIT: u64 = 0xf4;
const I8042_PORT: u64 = 0x60;
const PVPANIC: u64 = 0x505;
const ACPI: u64 = 0x620;
const PROCESSORS: u64 = 0x6f8;
/// Processors that may be there, and the offset of the first one's status.
const MOST_PROCESSORS: u8 = 8;
const PROCESSOR_STATUS: u64 = 8;
const IOAPIC: u64 = 0xfec0_0000;

/// Registers of the serial port.
const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const INTERRUPT_IDENTIFICATION: u64 = 2;
const LINE_CONTROL: u64 = 3;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u64 = 5;
const SCRATCH: u64 = 7;
/// Its pin of the I/O APIC.
const COM1_PIN: u8 = 4;

/// Operations, by their number.
pub mod ops {
    /// Writes a port: device, offset, width, value.
    pub const OUT: u8 = 0;
    /// Reads a port.
    pub const IN: u8 = 1;
    /// Writes the I/O APIC: offset in two, width, value.
    pub const APIC_WRITE: u8 = 2;
    /// Reads it.
    pub const APIC_READ: u8 = 3;
    /// Writes one of its registers behind the window: register, -, -, value.
    pub const APIC_REGISTER: u8 = 4;
    /// The host types: -, -, how much, what.
    pub const INPUT: u8 = 5;
    /// A line goes up or down: pin, 1 for up.
    pub const LEVEL: u8 = 6;
    /// A local APIC ends an interrupt: vector.
    pub const END: u8 = 7;
    /// The power button is pressed.
    pub const BUTTON: u8 = 8;
    /// All state is saved and put back.
    pub const SAVE: u8 = 9;
    /// The machine is reset.
    pub const RESET: u8 = 10;
    /// Processors come and go: number, what is asked.
    pub const PROCESSOR: u8 = 11;
    /// How many there are.
    pub const COUNT: u8 = 12;
}

#[derive(Default)]
struct Asked(AtomicU32);

impl PlatformEvents for Asked {
    fn event(&self, _event: PlatformEvent) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl ProcessorObserver for Asked {
    fn answered(&self, number: u8, _insertion: bool, _status: u16) {
        assert!(number < MOST_PROCESSORS, "an answer for processor {number}");
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn ejected(&self, number: u8) {
        assert!((1..MOST_PROCESSORS).contains(&number), "processor {number} is ejected");
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the host typed and the port has not taken.
#[derive(Clone, Default)]
struct Typed(Arc<Mutex<VecDeque<u8>>>);

impl Typed {
    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SerialPeer for Typed {
    fn write(&mut self, _bytes: &[u8]) {}

    fn read(&mut self, into: &mut [u8]) -> usize {
        let mut typed = self.lock();
        let count = typed.len().min(into.len());
        into.iter_mut().zip(typed.drain(..count)).for_each(|(to, byte)| *to = byte);
        count
    }
}

/// The platform.
pub struct Platform {
    ports: Bus,
    mmio: Bus,
    asked: Arc<Asked>,
    writes: u32,
    interrupts: FakeInterrupts,
    ioapic: Arc<IoApic>,
    acpi: Arc<AcpiRegisters>,
    processors: Arc<Processors>,
    serial: Arc<Serial>,
    typed: Typed,
    /// What the guest is to read next, while it has not looped its own output back.
    expected: Option<VecDeque<u8>>,
}

impl Default for Platform {
    fn default() -> Self {
        Self::new()
    }
}

impl Platform {
    /// A platform with all registers there are, the I/O APIC's pins connected.
    pub fn new() -> Self {
        let (ports, mmio) = (Bus::new(), Bus::new());
        let (asked, interrupts, typed) = (Arc::new(Asked::default()), FakeInterrupts::new(), Typed::default());
        let mut ioapic = IoApic::new(24);
        let mut lines = (0..PINS).map(|pin| ioapic.connect(pin, interrupts.line()).expect("a pin"));
        let lines: Vec<_> = lines.by_ref().collect();
        let serial = Arc::new(Serial::new(lines[usize::from(COM1_PIN)].clone(), Box::new(typed.clone())));
        let acpi = Arc::new(AcpiRegisters::new(asked.clone(), lines[9].clone()));
        let processors = Arc::new(Processors::new(MOST_PROCESSORS, 2, asked.clone()));
        let ioapic = Arc::new(ioapic);
        ports.insert(COM1, Serial::LEN, serial.clone()).expect("the serial port");
        ports.insert(DEBUG_EXIT, DebugExit::LEN, Arc::new(DebugExit::new(asked.clone()))).expect("debug exit");
        ports.insert(I8042_PORT, I8042::LEN, Arc::new(I8042::new(asked.clone()))).expect("the keyboard controller");
        ports.insert(PVPANIC, PvPanic::LEN, Arc::new(PvPanic::new(asked.clone()))).expect("the panic device");
        ports.insert(ACPI, AcpiRegisters::LEN, acpi.clone()).expect("power management");
        ports.insert(PROCESSORS, processors.len_of_range(), processors.clone()).expect("the processors");
        mmio.insert(IOAPIC, IoApic::LEN, ioapic.clone()).expect("the I/O APIC");
        let expected = Some(VecDeque::new());
        Self { ports, mmio, asked, writes: 0, interrupts, ioapic, acpi, processors, serial, typed, expected }
    }

    /// Does a step, and looks whether interrupts go where they may.
    pub fn step(&mut self, step: Step) {
        let Step { a, b, c, d, .. } = step;
        let wide = (u64::from(d) | u64::from(!d) << 32).to_le_bytes();
        let port = [COM1, DEBUG_EXIT, I8042_PORT, PVPANIC, ACPI, COM1, PROCESSORS][usize::from(a) % 7] + u64::from(b & 0xf);
        match step.op % ops::COUNT {
            ops::OUT => self.write(port, &wide[..width(c)]),
            ops::IN => self.read(port, width(c)),
            ops::APIC_WRITE => drop(self.mmio.write(IOAPIC + u64::from(step.ab() & 0xfff), &wide[..width(c)])),
            ops::APIC_READ => {
                self.mmio.read(IOAPIC + u64::from(step.ab() & 0xfff), &mut [0; 8][..width(c)]);
            }
            ops::APIC_REGISTER => {
                self.mmio.write(IOAPIC, &[a]);
                self.mmio.write(IOAPIC + 0x10, &d.to_le_bytes());
            }
            ops::INPUT => {
                let text = pattern(d, usize::from(c));
                if let Some(expected) = &mut self.expected {
                    expected.extend(&text);
                }
                self.typed.lock().extend(text);
                self.serial.fill();
            }
            ops::LEVEL => self.ioapic.set_level(a, b & 1 != 0),
            ops::END => self.ioapic.end_of_interrupt(a),
            ops::BUTTON => self.acpi.press_power_button().expect("an event"),
            ops::SAVE => self.save(),
            ops::PROCESSOR => self.plug(a % (MOST_PROCESSORS + 1), b),
            _ => {
                self.ioapic.reset();
                self.acpi.reset();
            }
        }
        for pin in 0..usize::from(PINS) {
            if let Some(message) = self.interrupts.message(pin) {
                assert!((0xfee0_0000..0xfef0_0000).contains(&message.address), "pin {pin}: {message:x?}");
            }
            self.interrupts.take(pin);
        }
        assert!(self.asked.0.load(Ordering::Relaxed) <= self.writes, "more was asked of the machine than written");
    }

    /// Asks the guest something about a processor, and looks whether the first one is still there.
    fn plug(&self, number: u8, what: u8) {
        match what % 4 {
            0 => self.processors.insert(number),
            1 => self.processors.ask_to_eject(number),
            2 => drop(self.processors.take_back(number)),
            _ if number > 0 => self.processors.remove(number),
            _ => {}
        }
        self.acpi.show_processors().expect("an event");
        let mut there = [0];
        self.ports.read(PROCESSORS + PROCESSOR_STATUS, &mut there);
        assert_eq!(there, [0xf], "the first processor is gone");
    }

    fn write(&mut self, port: u64, data: &[u8]) {
        self.writes += 1;
        if port == COM1 + MODEM_CONTROL {
            self.expected = None;
        }
        self.ports.write(port, data);
    }

    fn byte(&self, port: u64) -> u8 {
        let mut data = [0];
        self.ports.read(port, &mut data);
        data[0]
    }

    fn read(&mut self, port: u64, len: usize) {
        let is_input = port == COM1 + DATA
            && len == 1
            && self.byte(COM1 + LINE_CONTROL) & 0x80 == 0
            && self.byte(COM1 + LINE_STATUS) & 1 != 0;
        if !is_input {
            self.ports.read(port, &mut [0; 8][..len]);
            return;
        }
        let got = self.byte(port);
        if let Some(expected) = &mut self.expected {
            assert_eq!(Some(got), expected.pop_front(), "input arrives whole and in order");
        }
    }

    /// Sets the serial port up as a driver does, and sees that interrupts alone bring it all that was typed.
    pub fn finish(mut self) {
        let mut set = |register: u64, value: u8| self.write(COM1 + register, &[value]);
        set(LINE_CONTROL, 3);
        set(MODEM_CONTROL, 0);
        set(INTERRUPT_ENABLE, 0);
        // What was received before is the program's.
        while self.byte(COM1 + LINE_STATUS) & 1 != 0 {
            self.byte(COM1 + DATA);
        }
        self.byte(COM1 + INTERRUPT_IDENTIFICATION);
        self.write(COM1 + INTERRUPT_ENABLE, &[1]);
        let first = pattern(1, usize::from(self.byte(COM1 + SCRATCH)) % 64 + 1);
        let rest = pattern(2, 2000);
        self.typed.lock().extend(&first);
        self.serial.fill();
        self.typed.lock().extend(&rest);
        let mut got = Vec::new();
        while self.interrupts.take(usize::from(COM1_PIN)) > 0 {
            self.handle_interrupt(&mut got);
        }
        assert!(got == [first, rest].concat(), "{} bytes of input came with interrupts", got.len());
    }

    /// What Linux's driver does: it takes 256 bytes at the most before it asks for the reason again.
    fn handle_interrupt(&self, got: &mut Vec<u8>) {
        while self.byte(COM1 + INTERRUPT_IDENTIFICATION) & 1 == 0 {
            for _ in 0..256 {
                if self.byte(COM1 + LINE_STATUS) & 1 == 0 {
                    break;
                }
                got.push(self.byte(COM1 + DATA));
            }
        }
    }

    fn save(&self) {
        let (serial, ioapic) = (self.serial.save(), self.ioapic.save());
        self.serial.restore(&serial).expect("what was saved can be restored");
        self.ioapic.restore(&ioapic);
        assert_eq!(self.ioapic.save(), ioapic, "a restored I/O APIC saves the same");
        // An interrupt that was pending comes again, so the port's own identification may change, and nothing else.
        let mut again = serde_json::to_value(self.serial.save()).expect("a state");
        let mut before = serde_json::to_value(serial).expect("a state");
        for state in [&mut again, &mut before] {
            state.as_object_mut().expect("an object").remove("interrupt_identification");
        }
        assert_eq!(again, before, "a restored serial port saves the same");
    }
}
