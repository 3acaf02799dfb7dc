//! The kernel's image: what is in a bzImage is unpacked by the monitor, or was kept from an earlier run.
//!
//! The guest's own decompressor does the same at the price of faults on all the memory that it touches. Whatever goes
//! wrong here costs time and no boot: the last resort is the bzImage as it is.

mod cache;
mod entry;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::SystemTime;

use api::KernelCache;
use arch::KernelImage;
use arch::payload::{self, Packed, PayloadError};

pub use self::cache::grant;
use self::cache::{Cache, Key};
use self::entry::Entry;
use crate::memory::FirstPages;
use crate::sandbox::{self, Access, Grant};

/// What is loaded as the kernel.
#[derive(Debug, Clone)]
pub enum Image {
    /// The kernel file as it is.
    File,
    /// What was in the file, in memory.
    Unpacked(Arc<Vec<u8>>),
    /// What was in it, from the cache.
    Cached(Arc<Entry>),
}

impl Image {
    /// What was unpacked.
    pub fn unpacked(&self) -> Option<&dyn KernelImage> {
        match self {
            Self::File => None,
            Self::Unpacked(bytes) => Some(&**bytes),
            Self::Cached(entry) => Some(&**entry),
        }
    }
}

/// Gets images ready, on a thread of its own, and keeps what was unpacked for later runs.
///
/// The thread takes apart what may be hostile, so it has no rights but to its cache. It stays for the next boot, since
/// one that is made later would have no more rights than the owner has then.
#[derive(Default)]
pub struct Kernels {
    worker: Mutex<Option<Worker>>,
}

/// The thread.
struct Worker {
    jobs: Sender<Job>,
    thread: JoinHandle<()>,
}

/// What the thread is asked for.
enum Job {
    /// An image.
    Image(ImageJob),
    /// Memory that the guest is about to touch, so that its first access does not wait for the host.
    Populate(FirstPages),
}

/// An image to be made ready.
struct ImageJob {
    kernel: File,
    packed: Packed,
    kept: Kept,
    ready: SyncSender<Image>,
}

/// What becomes of a kernel that was kept in an earlier run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// It is taken.
    Taken,
    /// It is damaged: what is unpacked anew takes its place.
    Replaced,
}

/// An image that is being made ready.
pub enum Pending {
    /// It is there.
    Ready(Image),
    /// A thread is at work.
    Working(Receiver<Image>),
}

impl Pending {
    /// Waits for the image.
    pub fn wait(self) -> Image {
        match self {
            Self::Ready(image) => image,
            // The thread died: the file is still there.
            Self::Working(image) => image.recv().unwrap_or(Image::File),
        }
    }
}

impl Kernels {
    /// Begins to make the image of `kernel` ready, with what is kept as `cache` said the first time.
    pub fn begin(&self, kernel: &File, cache: &KernelCache, kept: Kept) -> Pending {
        let work =
            Packed::find(kernel).and_then(|packed| Ok((packed, kernel.try_clone().map_err(PayloadError::Read)?)));
        let (packed, kernel) = match work {
            Ok(work) => work,
            Err(PayloadError::None) => return Pending::Ready(Image::File),
            Err(error) => {
                unpacks_itself(&error);
                return Pending::Ready(Image::File);
            }
        };
        let (ready, pending) = sync_channel(1);
        match self.give(Job::Image(ImageJob { kernel, packed, kept, ready }), cache) {
            // A thread that has died has dropped the job, and the wait ends.
            Ok(()) => Pending::Working(pending),
            Err(error) => {
                unpacks_itself(&PayloadError::Read(error));
                Pending::Ready(Image::File)
            }
        }
    }

    /// Populates memory beside the guest, where there is a thread for it: one that has taken a Linux apart.
    pub fn populate(&self, pages: FirstPages) {
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(worker) = &*worker {
            // Where the thread has died, the guest's own accesses populate its memory.
            let _ = worker.jobs.send(Job::Populate(pages));
        }
    }

    /// Gives the thread a job, which it does after those before.
    fn give(&self, job: Job, cache: &KernelCache) -> io::Result<()> {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        let worker = match &mut *worker {
            Some(worker) => worker,
            none => {
                let (sender, jobs) = channel();
                let cache = cache.clone();
                let thread = Builder::new().name("kernel".into()).spawn(move || work(&jobs, &cache))?;
                none.insert(Worker { jobs: sender, thread })
            }
        };
        worker.jobs.send(job).map_err(io::Error::other)
    }
}

impl Drop for Kernels {
    /// What is being put into the cache is finished first.
    fn drop(&mut self) {
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Worker { jobs, thread }) = worker else { return };
        drop(jobs);
        if thread.join().is_err() {
            tracing::error!("the thread that unpacks kernels panicked");
        }
    }
}

/// Does jobs until there will be no more.
fn work(jobs: &Receiver<Job>, cache: &KernelCache) {
    let cache = Cache::open(cache);
    let grant = cache.as_ref().map(|cache| Grant { path: cache.path().to_owned(), access: Access::Keep });
    if let Err(error) = sandbox::confine_thread(grant.as_slice()) {
        tracing::error!("the thread that unpacks kernels keeps its rights, so it does nothing: {error}");
        return;
    }
    sandbox::enter(sandbox::Thread::Loader);
    for job in jobs {
        let job = match job {
            Job::Image(job) => job,
            Job::Populate(pages) => {
                pages.populate();
                continue;
            }
        };
        let (image, key) = make(&job, cache.as_ref()).unwrap_or_else(|error| {
            unpacks_itself(&error);
            (Image::File, None)
        });
        // The owner may have given up.
        let _ = job.ready.send(image.clone());
        if let (Some(cache), Some(key), Image::Unpacked(bytes)) = (&cache, key, image) {
            cache.keep(&key, &bytes);
        }
    }
}

/// Tells that the kernel is entered the slow way.
pub fn unpacks_itself(error: &PayloadError) {
    tracing::info!("the kernel unpacks itself, which takes longer: {error}");
}

/// Takes the image from the cache, or unpacks it. An image that is to be kept has a key.
fn make(job: &ImageJob, cache: Option<&Cache>) -> Result<(Image, Option<Key>), PayloadError> {
    let kept = cache.filter(|_| job.kept == Kept::Taken);
    if let Some(entry) = kept.and_then(|cache| cache.find_file(&job.kernel)) {
        return Ok((Image::Cached(Arc::new(entry)), None));
    }
    let payload = job.packed.read(&job.kernel).map_err(PayloadError::Read)?;
    let key = cache.map(|_| Key::new(&job.kernel, &payload, SystemTime::now()));
    if let Some(entry) = kept.zip(key.as_ref()).and_then(|(cache, key)| cache.find(key)) {
        return Ok((Image::Cached(Arc::new(entry)), None));
    }
    let mut bytes = vec![0; job.packed.unpacked_size(&payload)?];
    advise_huge(&mut bytes);
    payload::unpack(&payload, &mut bytes)?;
    Ok((Image::Unpacked(Arc::new(bytes)), key))
}

/// Asks for transparent huge pages, which come with a fraction of the faults.
#[expect(unsafe_code, reason = "madvise takes a raw address")]
fn advise_huge(bytes: &mut [u8]) {
    // SAFETY: bytes of any kind are bytes, and nothing is done with them.
    let (_, pages, _) = unsafe { bytes.align_to_mut::<Page>() };
    let Some(start) = NonNull::new(pages.as_mut_ptr().cast()) else { return };
    // SAFETY: the range is whole pages of a buffer that is alive, and MADV_HUGEPAGE does not change its contents.
    let advised =
        unsafe { nix::sys::mman::madvise(start, size_of_val(pages), nix::sys::mman::MmapAdvise::MADV_HUGEPAGE) };
    // Small pages do as well.
    drop(advised.map_err(io::Error::from));
}

#[repr(C, align(4096))]
struct Page([u8; 4096]);
