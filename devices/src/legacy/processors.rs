//! The processors' hot-plug registers: what is asked of the guest, what it answers, and which processors there are.
//!
//! ```text
//!   0 to 3  reading takes what is asked next: the processor in bits 7:0, the notification in 15:8; or all ones
//!   4 to 7  writing answers: the processor in bits 7:0, the notification in 15:8, the status in 31:16
//!   8 + n   reading tells whether processor n is there (its _STA), writing 1 removes it
//! ```
//!
//! No access depends on one before it, so that processors of the guest need not agree on who does what. The platform's
//! tables make `_STA`, `_EJ0` and `_OST` (ACPI 6.5 §6.3) of them.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::BusDevice;

const NEXT: u64 = 0;
const ANSWER: u64 = 4;
const STATUS: u64 = 8;

/// What [`NEXT`] reads as where nothing is asked.
const NOTHING: u32 = u32::MAX;
/// The notification that a device has come or gone: look at it (ACPI 6.5 §5.6.6).
const DEVICE_CHECK: u8 = 1;
/// The notification that a device is to be let go of.
const EJECT_REQUEST: u8 = 3;
/// `_STA` of a processor that is there: present, enabled, shown and working (ACPI 6.5 §6.3.7).
const PRESENT: u8 = 0xf;
/// What removes a processor.
const EJECT: u8 = 1;

/// Is told what the guest does with its processors. Called on a vCPU's thread, in the middle of its access.
pub trait ProcessorObserver: Send + Sync {
    /// It has answered a question about the processor with this number: `_OST`'s status, 0 where all is well. `insertion`:
    /// it was to take it, else to let go of it.
    fn answered(&self, number: u8, insertion: bool, status: u16);
    /// It has let go of the processor with this number, asked or not.
    fn ejected(&self, number: u8);
}

/// A processor as the registers know it.
#[derive(Debug, Clone, Copy, Default)]
struct Processor {
    present: bool,
    /// What is asked of the guest, until it has read it.
    asked: Option<u8>,
}

/// The registers of a platform's processors. The first one is always there.
pub struct Processors {
    all: Mutex<Vec<Processor>>,
    observer: Arc<dyn ProcessorObserver>,
}

impl fmt::Debug for Processors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Processors").field("all", &self.all).finish_non_exhaustive()
    }
}

impl Processors {
    /// Registers of this many processors, of which the first are there.
    pub fn new(count: u8, present: u8, observer: Arc<dyn ProcessorObserver>) -> Self {
        let all = (0..count).map(|number| Processor { present: number < present, asked: None }).collect();
        Self { all: Mutex::new(all), observer }
    }

    /// Length of their range in bytes.
    pub fn len_of_range(&self) -> u64 {
        STATUS + u64::try_from(self.lock().len()).unwrap_or(0)
    }

    /// A processor comes: it is there, and the guest is to take it. To be followed by
    /// [`super::AcpiRegisters::show_processors`], as are all questions.
    pub fn insert(&self, number: u8) {
        self.change(number, |processor| *processor = Processor { present: true, asked: Some(DEVICE_CHECK) });
    }

    /// Asks the guest to let go of a processor. It is there until the guest does.
    pub fn ask_to_eject(&self, number: u8) {
        self.change(number, |processor| processor.asked = processor.present.then_some(EJECT_REQUEST));
    }

    /// Takes a question back that the guest has not read. False where it has, and may be at work on it.
    pub fn take_back(&self, number: u8) -> bool {
        let mut unread = false;
        self.change(number, |processor| unread = processor.asked.take().is_some());
        unread
    }

    /// A processor is not there any more, whatever the guest thinks.
    pub fn remove(&self, number: u8) {
        self.change(number, |processor| *processor = Processor::default());
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Processor>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, number: u8, change: impl FnOnce(&mut Processor)) {
        if let Some(processor) = self.lock().get_mut(usize::from(number)) {
            change(processor);
        }
    }

    fn next(&self) -> u32 {
        let mut all = self.lock();
        let found =
            (0_u8..).zip(all.iter_mut()).find_map(|(number, processor)| Some((number, processor.asked.take()?)));
        found.map_or(NOTHING, |(number, asked)| u32::from(number) | u32::from(asked) << 8)
    }

    fn answer(&self, value: u32) {
        let [number, to, low, high] = value.to_le_bytes();
        let known = usize::from(number) < self.lock().len();
        let insertion = to == DEVICE_CHECK;
        if known && (insertion || to == EJECT_REQUEST) {
            self.observer.answered(number, insertion, u16::from_le_bytes([low, high]));
        }
    }

    fn eject(&self, number: u8) {
        let mut gone = false;
        // The boot processor stays.
        if number > 0 {
            self.change(number, |processor| gone = std::mem::take(processor).present);
        }
        if gone {
            self.observer.ejected(number);
        }
    }
}

impl BusDevice for Processors {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == NEXT {
            // Of a narrower access the rest is lost, as of any question that a guest forgets.
            data.iter_mut().zip(self.next().to_le_bytes()).for_each(|(to, from)| *to = from);
            return;
        }
        let all = self.lock();
        for (at, byte) in (offset..).zip(data) {
            let number = at.checked_sub(STATUS).and_then(|number| usize::try_from(number).ok());
            if number.and_then(|number| all.get(number)).is_some_and(|processor| processor.present) {
                *byte = PRESENT;
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (ANSWER, [_, _, _, _]) => {
                let value = data.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
                self.answer(value);
            }
            (STATUS.., [EJECT]) => {
                if let Ok(number) = u8::try_from(offset - STATUS) {
                    self.eject(number);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, PartialEq)]
    enum Told {
        Answered(u8, bool, u16),
        Ejected(u8),
    }

    #[derive(Default)]
    struct Observer(Mutex<Vec<Told>>);

    impl ProcessorObserver for Observer {
        fn answered(&self, number: u8, insertion: bool, status: u16) {
            self.0.lock().unwrap().push(Told::Answered(number, insertion, status));
        }

        fn ejected(&self, number: u8) {
            self.0.lock().unwrap().push(Told::Ejected(number));
        }
    }

    fn processors(count: u8, present: u8) -> (Arc<Observer>, Processors) {
        let observer = Arc::<Observer>::default();
        (observer.clone(), Processors::new(count, present, observer))
    }

    fn told(observer: &Observer) -> Vec<Told> {
        std::mem::take(&mut observer.0.lock().unwrap())
    }

    fn next(processors: &Processors) -> u32 {
        let mut data = [0; 4];
        processors.read(NEXT, &mut data);
        u32::from_le_bytes(data)
    }

    fn status(processors: &Processors, number: u64) -> u8 {
        let mut data = [0xff];
        processors.read(STATUS + number, &mut data);
        data[0]
    }

    #[test]
    fn a_processor_comes_and_goes() {
        let (observer, processors) = processors(4, 1);
        assert_eq!([0, 1, 2, 3, 4].map(|number| status(&processors, number)), [0xf, 0, 0, 0, 0]);
        assert_eq!((processors.len_of_range(), next(&processors)), (12, NOTHING));
        processors.insert(3);
        processors.insert(1);
        assert_eq!([next(&processors), next(&processors), next(&processors)], [0x101, 0x103, NOTHING]);
        assert_eq!((status(&processors, 3), status(&processors, 2)), (0xf, 0));
        processors.write(ANSWER, &[3, 1, 0, 0]);
        processors.ask_to_eject(3);
        assert_eq!(next(&processors), 0x303);
        processors.write(ANSWER, &[3, 3, 0x84, 0]);
        processors.write(STATUS + 3, &[1]);
        assert_eq!(status(&processors, 3), 0);
        let expected = [Told::Answered(3, true, 0), Told::Answered(3, false, 0x84), Told::Ejected(3)];
        assert_eq!(told(&observer), expected);
    }

    #[test]
    fn what_was_not_read_is_taken_back() {
        let (_, processors) = processors(4, 2);
        processors.insert(2);
        assert!(processors.take_back(2) && !processors.take_back(2));
        processors.remove(2);
        assert_eq!((next(&processors), status(&processors, 2)), (NOTHING, 0));
        processors.ask_to_eject(1);
        assert_eq!(next(&processors), 0x301);
        assert!(!processors.take_back(1));
        processors.ask_to_eject(3);
        assert_eq!(next(&processors), NOTHING, "nobody lets go of what is not there");
    }

    #[test]
    fn what_a_guest_may_not_do_does_nothing() {
        let (observer, processors) = processors(3, 2);
        for (offset, data) in [
            (STATUS, &[1_u8][..]),
            (STATUS + 2, &[1]),
            (STATUS + 3, &[1]),
            (STATUS + 1, &[2]),
            (STATUS + 1, &[1, 1]),
            (u64::MAX, &[1]),
            (ANSWER, &[1, 1]),
            (ANSWER, &[3, 1, 0, 0]),
            (ANSWER, &[1, 2, 0, 0]),
            (NEXT, &[1, 1, 1, 1]),
        ] {
            processors.write(offset, data);
        }
        assert_eq!(told(&observer), []);
        assert_eq!([0, 1, 2].map(|number| status(&processors, number)), [0xf, 0xf, 0]);
    }

    proptest! {
        #[test]
        fn any_access_leaves_the_first_processor(
            accesses in prop::collection::vec((any::<bool>(), 0..300_u64, prop::collection::vec(any::<u8>(), 1..9)), 0..64)
        ) {
            let (_, processors) = processors(254, 254);
            for (write, offset, mut data) in accesses {
                if write { processors.write(offset, &data) } else { processors.read(offset, &mut data) }
            }
            prop_assert_eq!(status(&processors, 0), 0xf);
        }
    }
}
