//! The service: one question for each connection, whose first read has to bring all of it, as with Intel's.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::Platform;
use crate::report;

/// The longest question that is read.
const LONGEST: usize = 64 << 10;
const HEADER: usize = 16;
const QUOTE_REQUEST: u32 = 0;
const PLATFORM_REQUEST: u32 = 4;
/// Errors of the service's.
const UNEXPECTED: u32 = 0x1_2001;
const BAD_PARAMETER: u32 = 0x1_2003;
const BAD_VERSION: u32 = 0x1_2004;
const BAD_TYPE: u32 = 0x1_2005;

/// A quote service that runs.
pub struct Service {
    platform: Arc<Platform>,
    nanoseconds: Arc<AtomicU64>,
}

impl Service {
    /// A service of a platform's at a Unix socket, until the process ends.
    ///
    /// # Errors
    /// Nobody can listen there.
    pub fn start(platform: Platform, socket: &Path) -> Result<Self> {
        let listener = UnixListener::bind(socket).with_context(|| socket.display().to_string())?;
        Ok(Self::over(platform, std::iter::from_fn(move || listener.incoming().flatten().next())))
    }

    /// A service of a platform's for whoever connects, until nobody does any more.
    pub fn over<S: Read + Write>(platform: Platform, clients: impl Iterator<Item = S> + Send + 'static) -> Self {
        let service = Self { platform: Arc::new(platform), nanoseconds: Arc::default() };
        let (platform, nanoseconds) = (service.platform.clone(), service.nanoseconds.clone());
        thread::spawn(move || {
            for stream in clients {
                // A client that does not behave is not answered.
                let _ = serve(&platform, stream, &nanoseconds);
            }
        });
        service
    }

    /// The platform.
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// The time that it took for the last answer, from the connection on.
    pub fn last(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds.load(Ordering::Acquire))
    }
}

fn serve(platform: &Platform, mut stream: impl Read + Write, nanoseconds: &AtomicU64) -> Result<()> {
    let began = Instant::now();
    let mut question = vec![0; LONGEST];
    let len = stream.read(&mut question)?;
    let question = &question[..len];
    let message = question.get(4..).context("a length")?;
    ensure!(word(question, 0)?.swap_bytes() as usize == message.len(), "the question came in pieces");
    ensure!(word(message, 8)? as usize == message.len(), "a size");
    let answer = answer(platform, message)?;
    nanoseconds.store(u64::try_from(began.elapsed().as_nanos())?, Ordering::Release);
    // Then the connection is closed.
    Ok(stream.write_all(&answer)?)
}

/// What a message is answered with.
fn answer(platform: &Platform, message: &[u8]) -> Result<Vec<u8>> {
    let kind = word(message, 4)?;
    if message[0..2] != [1, 0] {
        return reply(kind + 1, BAD_VERSION, &[0; 8]);
    }
    match kind {
        QUOTE_REQUEST => {
            let sizes = [word(message, HEADER)? as usize, word(message, HEADER + 4)? as usize];
            let body = message.get(HEADER + 8..).unwrap_or_default();
            match body.first_chunk() {
                Some(report) if sizes == [report::LEN, 0] && body.len() == report::LEN => {
                    let Some(quote) = platform.quote(report)? else { return reply(1, UNEXPECTED, &[0; 8]) };
                    let sizes = [[0; 4], u32::try_from(quote.len())?.to_le_bytes()].concat();
                    reply(1, 0, &[sizes, quote].concat())
                }
                _ => reply(1, BAD_PARAMETER, &[0; 8]),
            }
        }
        // Versions of two enclaves, sizes of the platform's id and of the processor's versions, and these.
        PLATFORM_REQUEST => reply(5, 0, &[&[4, 0, 11, 0, 16, 0, 0, 0, 16, 0, 0, 0][..], &[7; 32]].concat()),
        other => reply(other.saturating_add(1), BAD_TYPE, &[]),
    }
}

fn reply(kind: u32, error: u32, body: &[u8]) -> Result<Vec<u8>> {
    let len = u32::try_from(HEADER + body.len())?;
    let mut reply = len.to_be_bytes().to_vec();
    reply.extend_from_slice(&[1, 0, 1, 0]);
    [kind, len, error].iter().for_each(|word| reply.extend_from_slice(&word.to_le_bytes()));
    reply.extend_from_slice(body);
    Ok(reply)
}

/// A little-endian word.
fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk()).context("a word")?;
    Ok(u32::from_le_bytes(*word))
}

/// Asks a service for a quote of a report, without any monitor; `None` where it says that there is none.
///
/// # Errors
/// It does not answer as it should.
pub fn ask(socket: &Path, report: &[u8; report::LEN]) -> Result<Option<Vec<u8>>> {
    let mut stream = UnixStream::connect(socket)?;
    let sizes = [u32::try_from(report::LEN)?, 0].map(u32::to_le_bytes).concat();
    stream.write_all(&reply(QUOTE_REQUEST, 0, &[&sizes, &report[..]].concat())?)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    ensure!(word(&answer, 8)? == 1, "an answer to something else");
    if word(&answer, 16)? != 0 {
        return Ok(None);
    }
    Ok(Some(answer.get(28..).context("a quote")?.to_vec()))
}
