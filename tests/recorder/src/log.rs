//! The file that the lines go to.

use std::fs::File;
use std::io::Write;
use std::sync::{Mutex, PoisonError};

static LOG: Mutex<Option<File>> = Mutex::new(None);

/// Writes a line. Where there is no file, nobody wants to know.
pub fn line(text: &str) {
    let mut log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    if log.is_none() {
        let Some(path) = std::env::var_os("RECORDER_LOG") else { return };
        *log = File::options().create(true).append(true).open(path).ok();
    }
    if let Some(file) = &mut *log {
        // A full disk shows in what is missing.
        let _ = writeln!(file, "{text}");
    }
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
