//! Where this process's memory goes, as the kernel counts it (`/proc/self/smaps`, proc_pid_smaps(5)).

use std::io;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Builder;

use tokio::sync::oneshot;

use crate::sandbox::{self, Thread};

/// Stack of the thread that reads, in bytes.
const STACK: usize = 64 << 10;

/// Who asks: the addresses of the guest's memory, and where the answer goes.
type Asked = (Vec<Range<u64>>, oneshot::Sender<Resident>);

/// Reads in a thread of its own. The kernel looks at each page for it, which takes 0.2 s and more for 4 GiB of small ones;
/// other clients shall not wait so long. It reads once for all who have asked meanwhile, and ends when this is dropped.
#[derive(Debug)]
pub struct Reader(Sender<Asked>);

impl Reader {
    /// Starts the thread, under the policy of the API's.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn start() -> io::Result<Self> {
        let (sender, receiver) = channel();
        Builder::new().name("api-memory".into()).stack_size(STACK).spawn(move || {
            sandbox::enter(Thread::Api);
            serve(&receiver, || std::fs::read_to_string("/proc/self/smaps"));
        })?;
        Ok(Self(sender))
    }

    /// What is resident now, where the guest's memory lies at these addresses. `None` where it cannot be read.
    pub async fn resident(&self, guest: Vec<Range<u64>>) -> Option<Resident> {
        let (sender, receiver) = oneshot::channel();
        self.0.send((guest, sender)).ok()?;
        receiver.await.ok()
    }
}

/// Answers until nobody can ask any more.
fn serve(asked: &Receiver<Asked>, read: impl Fn() -> io::Result<String>) {
    while let Ok(first) = asked.recv() {
        let waiting: Vec<Asked> =
            std::iter::once(first).chain(asked.try_iter()).filter(|(_, sender)| !sender.is_closed()).collect();
        if waiting.is_empty() {
            continue;
        }
        // Who gets no answer shows no figures.
        let Ok(smaps) = read() else { continue };
        for (guest, sender) in waiting {
            // Who does not wait any more needs none.
            let _ = sender.send(resident(&smaps, &guest));
        }
    }
}

/// What is resident, in bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Resident {
    /// Of the guest's memory.
    pub guest: u64,
    /// Of that, in huge pages.
    pub guest_huge: u64,
    /// Private memory of the monitor's own.
    pub overhead: u64,
}

/// Adds up `smaps`. The guest's memory lies at the addresses `guest`.
fn resident(smaps: &str, guest: &[Range<u64>]) -> Resident {
    let mut sum = Resident::default();
    let mut of_guest = false;
    for line in smaps.lines() {
        let Some((name, rest)) = line.split_once(':') else { continue };
        // The first line of a mapping begins with its addresses: "7f00-7f10 rw-p 00000000 00:00 0".
        if let Some(start) = name.split_once('-').and_then(|(start, _)| u64::from_str_radix(start, 16).ok()) {
            of_guest = guest.iter().any(|range| range.contains(&start));
            continue;
        }
        let kib = rest.trim().strip_suffix(" kB").and_then(|number| number.parse::<u64>().ok()).unwrap_or(0);
        let into = match (name, of_guest) {
            ("Rss", true) => &mut sum.guest,
            ("AnonHugePages" | "ShmemPmdMapped" | "FilePmdMapped", true) => &mut sum.guest_huge,
            // What hugetlbfs gives is not part of the resident set.
            ("Private_Hugetlb" | "Shared_Hugetlb", true) => {
                sum.guest += kib << 10;
                &mut sum.guest_huge
            }
            ("Private_Dirty", false) => &mut sum.overhead,
            _ => continue,
        };
        *into += kib << 10;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_reading_serves_all_who_wait_and_nobody_who_does_not() {
        let (sender, receiver) = channel();
        let ask = || {
            let (to, from) = oneshot::channel();
            sender.send((vec![], to)).unwrap();
            from
        };
        drop(ask());
        let (mut one, mut other) = (ask(), ask());
        drop(sender);
        let reads = std::cell::Cell::new(0);
        serve(&receiver, || {
            reads.set(reads.get() + 1);
            Ok("1-2 rw-p 00000000 00:00 0 \nPrivate_Dirty: 4 kB\n".into())
        });
        assert_eq!(reads.get(), 1);
        for answer in [&mut one, &mut other] {
            assert_eq!(answer.try_recv().unwrap().overhead, 4096);
        }
    }

    #[test]
    fn mappings_of_the_guest_are_told_from_the_monitors_own() {
        let smaps = "1000-9000 rw-p 00000000 00:00 0 \nRss: 32 kB\nPrivate_Dirty: 32 kB\nAnonHugePages: 16 kB\n\
                     9000-a000 rw-p 00000000 00:00 0 [heap]\nRss: 4 kB\nPrivate_Dirty: 4 kB\nVmFlags: rd wr\n\
                     a000-b000 rw-s 00000000 00:0f 7 /x\nRss: 0 kB\nPrivate_Hugetlb: 2048 kB\n";
        let guest = [0x1000..0x9000, 0xa000..0xb000];
        let expected =
            Resident { guest: (32 << 10) + (2 << 20), guest_huge: (16 << 10) + (2 << 20), overhead: 4 << 10 };
        assert_eq!(resident(smaps, &guest), expected);
        assert_eq!(resident("", &guest), Resident::default());
    }
}
