//! Programs beside which `halyard measure` is timed. Each reads a firmware's file, as that does.
//!
//! Usage: `mrtd FILE` prints the firmware's MRTD by the igvm crate; `mrtd FILE BYTES` the bare SHA-384 of as many bytes, which are
//! the file's over and over.

use std::fs::File;
use std::io::{Read, Seek};

use anyhow::{Result, bail};
use halyard_tests::{firmware, quotes::digits};
use sha2::{Digest, Sha384};

/// Bytes that are read at once, so that they are hashed while they are in the processor's cache.
const AT_ONCE: usize = 64 << 10;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args[..] {
        [path] => println!("{}", firmware::mrtd_by_igvm(&std::fs::read(path)?)?),
        [path, bytes] => println!("{}", bare(&mut File::open(path)?, bytes.parse()?)?),
        _ => bail!("usage: mrtd FILE [BYTES]"),
    }
    Ok(())
}

fn bare(file: &mut File, mut left: usize) -> Result<String> {
    let (mut buffer, mut hash) = (vec![0; AT_ONCE], Sha384::new());
    while left > 0 {
        let read = file.read(&mut buffer[..left.min(AT_ONCE)])?;
        if read == 0 && file.stream_position()? == 0 {
            bail!("the file is empty");
        } else if read == 0 {
            file.rewind()?;
        }
        hash.update(&buffer[..read]);
        left -= read;
    }
    Ok(digits(&hash.finalize()))
}
