//! Interrupts of a vector that is masked and unmasked meanwhile, tried in all orders: the lock-free part as it is
//! (`devices/src/pci/msix/latch.rs`), with the atomics of a scheduler that decides at each access who goes on.
#![expect(clippy::duplicate_mod, reason = "the same code once as it is, and once with a planted bug")]

use std::sync::Arc;
use std::sync::Mutex as PlainMutex;

use shuttle::sync::atomic::{self, Ordering};
use shuttle::thread::{self, JoinHandle};
use shuttle::{check_dfs, check_random};

/// Orders that are tried of stories that have too many.
const ORDERS: usize = 20_000;

/// The story with a flag of this type.
macro_rules! latch_of {
    ($module:ident, $flag:path) => {
        #[path = "../src/pci/msix"]
        mod $module {
            mod sync {
                pub(super) use shuttle::sync::atomic::Ordering::SeqCst;
                pub(super) use $flag as AtomicBool;
            }
            mod latch;

            use std::sync::Arc;

            use shuttle::sync::atomic::{AtomicUsize, Ordering::SeqCst};

            /// A device has so many reasons to interrupt while the driver unmasks its vector so many times, and masks it
            /// between. In the end it is not masked, and the driver has heard of all.
            pub(super) fn story(reasons: usize, unmasked: usize) {
                let latch = Arc::new(latch::Latch::new());
                let (done, heard) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
                let driver = {
                    let (done, heard) = (done.clone(), heard.clone());
                    move || {
                        heard.fetch_max(done.load(SeqCst), SeqCst);
                    }
                };
                let device = {
                    let (latch, done, ring) = (latch.clone(), done.clone(), driver.clone());
                    super::thread::spawn(move || {
                        for _ in 0..reasons {
                            done.fetch_add(1, SeqCst);
                            latch.signal(&ring);
                        }
                    })
                };
                for number in 0..unmasked {
                    if number > 0 {
                        latch.set_open(false, &driver);
                    }
                    latch.set_open(true, &driver);
                }
                device.join().unwrap();
                assert_eq!(heard.load(SeqCst), reasons, "an interrupt is lost");
                assert!(!latch.is_pending(), "an interrupt is kept though nothing is masked");
                latch.set_pending(true);
                latch.set_open(true, || ());
                assert!(!latch.is_pending());
            }
        }
    };
}

latch_of!(real, shuttle::sync::atomic::AtomicBool);
// The planted bug: stores are without an order to the look behind them.
latch_of!(disordered, super::super::Late);

/// A flag whose stores arrive late, but before its next change.
struct Late {
    value: Arc<atomic::AtomicBool>,
    on_its_way: PlainMutex<Option<JoinHandle<()>>>,
}

impl Late {
    fn new(value: bool) -> Self {
        Self { value: Arc::new(atomic::AtomicBool::new(value)), on_its_way: PlainMutex::default() }
    }

    fn arrived(&self) -> &atomic::AtomicBool {
        let on_its_way = self.on_its_way.lock().unwrap().take();
        on_its_way.into_iter().for_each(|store| store.join().unwrap());
        &self.value
    }

    fn store(&self, value: bool, order: Ordering) {
        self.arrived();
        let stored = self.value.clone();
        *self.on_its_way.lock().unwrap() = Some(thread::spawn(move || stored.store(value, order)));
    }

    fn load(&self, order: Ordering) -> bool {
        self.value.load(order)
    }

    fn swap(&self, value: bool, order: Ordering) -> bool {
        self.arrived().swap(value, order)
    }
}

#[test]
fn no_interrupt_is_lost_between_masked_and_unmasked() {
    check_dfs(|| real::story(1, 1), None);
    check_random(|| real::story(2, 3), ORDERS);
}

#[test]
#[should_panic(expected = "an interrupt is lost")]
fn the_model_finds_an_interrupt_that_is_lost_for_want_of_an_order() {
    check_random(|| disordered::story(1, 1), ORDERS);
}
