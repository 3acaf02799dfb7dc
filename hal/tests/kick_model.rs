//! Kicks of a vCPU, tried in many orders: the lock-free part as it is (`hal/src/kvm/kick/pending.rs`), with the atomics of a
//! scheduler that decides at each access who goes on, and KVM as far as kicks know it. Whoever waits for ever is found.
#![expect(clippy::duplicate_mod, reason = "the same code once as it is, and once with a planted bug")]

use std::sync::Arc;
use std::sync::Mutex as PlainMutex;

use shuttle::rand::Rng;
use shuttle::sync::atomic::{self, AtomicBool, Ordering, Ordering::SeqCst};
use shuttle::sync::{Condvar, Mutex};
use shuttle::thread::{self, JoinHandle};
use shuttle::{check_pct, check_random, rand};

/// Orders that are tried.
const ORDERS: usize = 10_000;
/// Who kicks.
const KICKERS: usize = 2;

/// The story with a number of this type for the thread that runs the vCPU.
macro_rules! kicks_of {
    ($module:ident, $runner:path) => {
        #[path = "../src/kvm/kick"]
        mod $module {
            mod sync {
                pub(super) use shuttle::sync::atomic::{AtomicBool, Ordering::SeqCst};
                pub(super) use shuttle::thread::yield_now;
                pub(super) use $runner as AtomicU64;
            }
            mod pending;

            use std::sync::Arc;

            use self::pending::Pending;
            use super::{KICKERS, Kvm, SeqCst, thread};

            /// A vCPU's thread runs its guest until all have kicked it; each kick must end a run.
            pub(super) fn story() {
                let kvm = Arc::new(Kvm::default());
                let pending = Arc::new(Pending::new());
                let kickers: Vec<_> = (0..KICKERS)
                    .map(|number| {
                        let (kvm, pending) = (kvm.clone(), pending.clone());
                        thread::spawn(move || {
                            kvm.done[number].store(true, SeqCst);
                            pending.kick(|thread| kvm.deliver(thread));
                        })
                    })
                    .collect();
                while !kvm.done.iter().all(|done| done.load(SeqCst)) {
                    kvm.mapped.store(true, SeqCst);
                    if pending.enter(Kvm::THREAD) {
                        kvm.immediate_exit.store(true, SeqCst);
                    }
                    while !(kvm.run() && pending.take(|| kvm.immediate_exit.store(false, SeqCst))) {}
                    pending.leave();
                    kvm.mapped.store(false, SeqCst);
                }
                kickers.into_iter().for_each(|kicker| kicker.join().unwrap());
            }
        }
    };
}

kicks_of!(real, shuttle::sync::atomic::AtomicU64);
// The planted bug: which thread runs the vCPU is stored without an order between this and the look at the note behind it.
kicks_of!(disordered, super::super::Late);

/// KVM and the kernel's signals as kicks know them.
#[derive(Default)]
struct Kvm {
    /// The kicker of this number has something to say.
    done: [AtomicBool; KICKERS],
    /// The vCPU's page is mapped.
    mapped: AtomicBool,
    immediate_exit: AtomicBool,
    call: Mutex<Call>,
    signal: Condvar,
}

#[derive(Default)]
struct Call {
    /// The thread is inside KVM_RUN.
    inside: bool,
    signalled: bool,
}

impl Kvm {
    const THREAD: u32 = 7;

    /// KVM_RUN: whether it was interrupted. It looks at the byte once, as it begins; a signal ends it at any time, also
    /// one that is no kick, and so does an exit of the guest.
    fn run(&self) -> bool {
        *self.call.lock().unwrap() = Call { inside: true, signalled: false };
        let interrupted = self.immediate_exit.load(SeqCst)
            || match rand::thread_rng().gen_range(0..4) {
                0 => false,
                1 => true,
                _ => self.is_signalled(),
            };
        *self.call.lock().unwrap() = Call::default();
        interrupted
    }

    fn is_signalled(&self) -> bool {
        let call = self.signal.wait_while(self.call.lock().unwrap(), |call| !call.signalled).unwrap();
        call.signalled
    }

    /// What a kick does to the thread that it saw: a signal that comes outside KVM_RUN is taken by the empty handler.
    fn deliver(&self, thread: u32) {
        assert_eq!(thread, Self::THREAD);
        assert!(self.mapped.load(SeqCst), "the byte is written after its page is unmapped");
        self.immediate_exit.store(true, SeqCst);
        let mut call = self.call.lock().unwrap();
        call.signalled = call.inside;
        drop(call);
        self.signal.notify_all();
        assert!(self.mapped.load(SeqCst), "a signal goes to a thread that has left");
    }
}

/// A number whose stores arrive late, but before its next change: what they may do without a full order.
struct Late {
    value: Arc<atomic::AtomicU64>,
    on_its_way: PlainMutex<Option<JoinHandle<()>>>,
}

impl Late {
    fn new(value: u64) -> Self {
        Self { value: Arc::new(atomic::AtomicU64::new(value)), on_its_way: PlainMutex::default() }
    }

    fn arrived(&self) -> &atomic::AtomicU64 {
        let on_its_way = self.on_its_way.lock().unwrap().take();
        on_its_way.into_iter().for_each(|store| store.join().unwrap());
        &self.value
    }

    fn store(&self, value: u64, order: Ordering) {
        self.arrived();
        let stored = self.value.clone();
        *self.on_its_way.lock().unwrap() = Some(thread::spawn(move || stored.store(value, order)));
    }

    fn load(&self, order: Ordering) -> u64 {
        self.value.load(order)
    }

    fn fetch_update(&self, set: Ordering, get: Ordering, new: impl FnMut(u64) -> Option<u64>) -> Result<u64, u64> {
        self.value.fetch_update(set, get, new)
    }

    fn fetch_sub(&self, by: u64, order: Ordering) -> u64 {
        self.value.fetch_sub(by, order)
    }

    fn fetch_and(&self, with: u64, order: Ordering) -> u64 {
        self.arrived().fetch_and(with, order)
    }
}

#[test]
fn each_kick_ends_a_run_and_none_reaches_a_thread_that_has_left() {
    check_random(real::story, ORDERS);
    check_pct(real::story, ORDERS, 3);
}

#[test]
#[should_panic(expected = "deadlock")]
fn the_model_finds_a_kick_that_is_lost_for_want_of_an_order() {
    check_pct(disordered::story, ORDERS, 3);
}
