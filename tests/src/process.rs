//! What runs in a host or guest while a test goes on: processes, and connections to sockets.

use std::io::{self, Read, Write};
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::client::{Client, Line, PATIENCE, Remote};
use crate::command::Output;
use crate::protocol::{CHUNK, Message, Request, Status, Stream};

/// One channel of a session: what a process or a socket is made of.
pub(crate) struct Channel {
    pub(crate) client: Client,
    pub(crate) number: u32,
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.client.shared.lock().channels.remove(&self.number);
        let _ = self.client.shared.send(&Message::Close(self.number));
    }
}

impl Channel {
    /// Ends it here and there: whoever reads it finds its end.
    fn close(&self) {
        if let Some(remote) = self.client.shared.lock().channels.get_mut(&self.number) {
            remote.output.text.end();
        }
        self.client.shared.changed.notify_all();
        let _ = self.client.shared.send(&Message::Close(self.number));
    }

    pub(crate) fn open(&self, request: Request) -> Result<u32> {
        self.client.shared.send(&Message::Open(self.number, request))?;
        self.wait("an answer", PATIENCE, |remote| remote.opened.take())?.map_err(anyhow::Error::msg)
    }

    fn wait<T>(&self, what: &str, patience: Duration, mut ready: impl FnMut(&mut Remote) -> Option<T>) -> Result<T> {
        let found = self
            .client
            .shared
            .wait(Instant::now() + patience, |state| state.channels.get_mut(&self.number).and_then(&mut ready))?;
        found.ok_or_else(|| {
            let heard = self.client.shared.lock().channels.get(&self.number).map(Remote::heard).unwrap_or_default();
            anyhow!(self.client.shared.late(what, patience, &heard))
        })
    }

    fn write(&self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let length = self.wait("its input to be read", PATIENCE, |remote| {
                let length = remote.credit.min(bytes.len()).min(CHUNK);
                remote.credit -= length;
                (length > 0).then_some(length)
            })?;
            let (now, later) = bytes.split_at(length);
            self.client.shared.send(&Message::Data(self.number, Stream::Input, now.to_vec()))?;
            bytes = later;
        }
        Ok(())
    }
}

/// A process of this machine, which does not outlive whoever holds it.
pub(crate) struct Killed(pub(crate) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process in a host or guest. Dropping it kills its process group.
pub struct Process {
    pub(crate) channel: Channel,
    pub(crate) line: String,
    pub(crate) pid: u32,
}

impl Process {
    /// Its process id there.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Writes to its standard input, at the pace at which it is read.
    ///
    /// # Errors
    /// Where it does not read in time, or the agent is gone.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        self.channel.write(bytes).with_context(|| format!("writing to `{}`", self.line))
    }

    /// Closes its standard input.
    ///
    /// # Errors
    /// Where the agent is gone.
    pub fn close_input(&self) -> Result<()> {
        self.channel.client.shared.send(&Message::End(self.channel.number, Stream::Input))
    }

    /// Sends it a signal, by number.
    ///
    /// # Errors
    /// Where the agent is gone.
    pub fn kill(&self, signal: i32) -> Result<()> {
        self.channel.client.shared.send(&Message::Signal(self.channel.number, signal))
    }

    /// Waits for a line of its output that contains `part`, after the last one that was waited for, and returns it.
    ///
    /// # Errors
    /// Where its output ends before, or after [`PATIENCE`]: with the end of what it wrote.
    pub fn wait_line(&self, part: &str) -> Result<String> {
        self.wait_line_for(part, PATIENCE)
    }

    /// As [`Process::wait_line`], with a patience of its own.
    ///
    /// # Errors
    /// As [`Process::wait_line`].
    pub fn wait_line_for(&self, part: &str, patience: Duration) -> Result<String> {
        self.wait_stream(part, patience, Stream::Output)
    }

    /// As [`Process::wait_line`], on its error output.
    ///
    /// # Errors
    /// As [`Process::wait_line`].
    pub fn wait_error_line(&self, part: &str) -> Result<String> {
        self.wait_stream(part, PATIENCE, Stream::Error)
    }

    fn wait_stream(&self, part: &str, patience: Duration, stream: Stream) -> Result<String> {
        let what = format!("`{}` to write \"{part}\"", self.line);
        let found = self.channel.wait(&what, patience, |remote| {
            let heard = remote.inbox(stream);
            match heard.text.find(part) {
                Some(line) => Some(Ok(line)),
                None if heard.text.ended() => Some(Err(remote.heard())),
                None => None,
            }
        })?;
        found.map_err(|heard| {
            // The exit status follows the end of its output at once, unless a child holds on.
            let status = self.wait_for(Duration::from_secs(2));
            let status = status.map_or_else(|_| "still runs".to_owned(), |status| format!("ended with {status}"));
            anyhow!(
                "`{}` never wrote \"{part}\", and {status}{heard}{}",
                self.line,
                (self.channel.client.shared.witness)()
            )
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// After [`PATIENCE`], with the end of what it wrote.
    pub fn wait(&self) -> Result<Status> {
        self.wait_for(PATIENCE)
    }

    /// As [`Process::wait`], with a patience of its own.
    ///
    /// # Errors
    /// As [`Process::wait`].
    pub fn wait_for(&self, patience: Duration) -> Result<Status> {
        self.channel.wait(&format!("`{}` to end", self.line), patience, |remote| remote.status)
    }

    /// Has it ended, and how?
    pub fn status(&self) -> Option<Status> {
        self.channel.client.shared.lock().channels.get(&self.channel.number).and_then(|remote| remote.status)
    }

    /// All of its output that is remembered so far.
    pub fn output(&self) -> String {
        let state = self.channel.client.shared.lock();
        let bytes = state.channels.get(&self.channel.number).map(|remote| remote.output.text.bytes());
        String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
    }

    /// All of its error output that is remembered so far.
    pub fn error_output(&self) -> String {
        let state = self.channel.client.shared.lock();
        let bytes = state.channels.get(&self.channel.number).map(|remote| remote.error.text.bytes());
        String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
    }

    /// The ends of both outputs, for messages.
    pub fn last_words(&self) -> String {
        self.channel.client.shared.lock().channels.get(&self.channel.number).map(Remote::heard).unwrap_or_default()
    }

    /// Waits for its end and that of its output, and returns all of it.
    ///
    /// # Errors
    /// After `patience`, or where it wrote more than can be collected.
    pub fn finish(&mut self, patience: Duration) -> Result<Output> {
        let what = format!("`{}` to end, and its output with it", self.line);
        let (status, stdout, stderr, lost) = self.channel.wait(&what, patience, |remote| {
            let status = remote.status?;
            let (output, error) = (&mut remote.output.text, &mut remote.error.text);
            let lost = output.lost() + error.lost();
            (output.ended() && error.ended()).then(|| (status, output.take(), error.take(), lost))
        })?;
        if lost > 0 {
            bail!("`{}` wrote more than can be kept: the first {lost} bytes are gone", self.line);
        }
        Ok(Output { command: self.line.clone(), status, stdout, stderr })
    }

    /// Copies its outputs as they come until it and they have ended.
    ///
    /// # Errors
    /// Where the agent is gone, or a sink fails.
    pub fn copy_to(&self, output: &mut dyn Write, error: &mut dyn Write) -> Result<Status> {
        loop {
            let (out, err, status) = self.channel.wait("more output", Duration::from_secs(86_400), |remote| {
                let over = remote.output.text.ended() && remote.error.text.ended();
                let (out, err) = (remote.output.text.take(), remote.error.text.take());
                let status = remote.status.filter(|_| over);
                (!out.is_empty() || !err.is_empty() || status.is_some()).then_some((out, err, status))
            })?;
            output.write_all(&out)?;
            error.write_all(&err)?;
            output.flush()?;
            error.flush()?;
            if let Some(status) = status {
                return Ok(status);
            }
        }
    }
}

/// A connection to a Unix stream socket in a host or guest. Clones share it; it is closed with the last one.
#[derive(Clone)]
pub struct Socket {
    pub(crate) channel: Arc<Channel>,
}

impl Socket {
    /// Says that nothing more will be written.
    ///
    /// # Errors
    /// Where the agent is gone.
    pub fn close_input(&self) -> Result<()> {
        self.channel.client.shared.send(&Message::End(self.channel.number, Stream::Input))
    }
}

impl Line for Socket {
    fn halves(&self) -> io::Result<(Box<dyn Read + Send>, Box<dyn Write + Send>)> {
        Ok((Box::new(self.clone()), Box::new(self.clone())))
    }

    fn close(&self) {
        self.channel.close();
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // A reader may wait for long, as for an event that is still to happen: it is the story that has a deadline.
        let bytes = self.channel.wait("bytes from a socket", Duration::from_secs(86_400), |remote| {
            let bytes = remote.output.text.take_some(buffer.len());
            (!bytes.is_empty() || remote.output.text.ended()).then_some(bytes)
        });
        let bytes = bytes.map_err(io::Error::other)?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        if !bytes.is_empty() {
            let granted = u32::try_from(bytes.len()).unwrap_or(0);
            let credit = Message::Credit(self.channel.number, Stream::Output, granted);
            self.channel.client.shared.send(&credit).map_err(io::Error::other)?;
        }
        Ok(bytes.len())
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.channel.write(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
