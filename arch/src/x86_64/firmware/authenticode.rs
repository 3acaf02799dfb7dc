//! What signatures of EFI executables are of, and what firmware measures of them (Microsoft, "Windows Authenticode Portable
//! Executable Signature Format", version 1.0): a digest of all but the checksum and the signatures themselves. All numbers
//! are little-endian.

use std::io;
use std::ops::Range;

use sha2::Digest;
use sha2::digest::Output;

use super::super::boot::KernelImage;

const PE_OFFSET: u64 = 0x3c;
/// Behind the PE signature: the COFF header, which tells how many sections there are and how long the optional header is.
const COFF_SIZE: u64 = 24;
const SECTION_COUNT: usize = 6;
const OPTIONAL_SIZE: usize = 20;
/// In the optional header: its kind, the size of all headers, the checksum, how many directories there are, the entry of the
/// signatures.
const PE32_PLUS: u16 = 0x20b;
const HEADERS_SIZE: u64 = 60;
const CHECKSUM: u64 = 64;
const DIRECTORY_COUNT: u64 = 108;
const SIGNATURES: u64 = 144;
const SIGNATURES_INDEX: u32 = 4;
/// A section's header, and in it the size and place of its contents in the file.
const SECTION_SIZE: u64 = 40;
const RAW_SIZE: usize = 16;
/// Where a file ends, for the digest, and where a signature begins.
const ALIGNMENT: u64 = 8;
/// In front of a signature: its length with this, a revision, and that it is PKCS #7.
const SIGNATURE_HEAD: usize = 8;
const PKCS7: [u8; 4] = [0, 2, 2, 0];
/// The most bytes of signatures that are read.
const MAX_SIGNATURES: u64 = 1 << 20;

/// Why there is no digest.
#[derive(Debug, thiserror::Error)]
pub enum PeError {
    /// Reading failed.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// It is no EFI executable for x86-64.
    #[error("it is no EFI executable: {0}")]
    Format(&'static str),
}

/// An EFI executable, as far as its headers tell.
#[derive(Debug)]
pub struct Executable<'a> {
    image: &'a dyn KernelImage,
    /// Parts of the file that count, in their order.
    parts: Vec<Range<u64>>,
    signatures: Range<u64>,
}

impl<'a> Executable<'a> {
    /// Reads the headers.
    ///
    /// # Errors
    /// [`PeError`].
    pub fn read(image: &'a dyn KernelImage) -> Result<Self, PeError> {
        let wrong = |what| PeError::Format(what);
        let size = image.size();
        let pe = u64::from(word(image, PE_OFFSET)?);
        let coff = bytes(image, pe, COFF_SIZE)?;
        if !coff.starts_with(b"PE\0\0") {
            return Err(wrong("it has no PE header"));
        }
        let half =
            |at: usize| coff.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |two| u16::from_le_bytes(*two));
        let (sections, optional_size) = (half(SECTION_COUNT), u64::from(half(OPTIONAL_SIZE)));
        let optional = pe + COFF_SIZE;
        if word(image, optional)? & 0xffff != u32::from(PE32_PLUS) {
            return Err(wrong("it is not for a processor of 64 bits"));
        }
        let headers = u64::from(word(image, optional + HEADERS_SIZE)?);
        let has_signatures = word(image, optional + DIRECTORY_COUNT)? > SIGNATURES_INDEX;
        let first_section = optional + optional_size;
        if headers > size || first_section + u64::from(sections) * SECTION_SIZE > headers {
            return Err(wrong("its headers are longer than they say"));
        }
        let mut parts = Vec::with_capacity(4 + usize::from(sections));
        parts.push(0..optional + CHECKSUM);
        let mut signatures = size..size;
        if has_signatures {
            let (start, len) =
                (u64::from(word(image, optional + SIGNATURES)?), u64::from(word(image, optional + SIGNATURES + 4)?));
            if len > 0 {
                signatures = start..start + len;
            }
            parts.push(optional + CHECKSUM + 4..optional + SIGNATURES);
            parts.push(optional + SIGNATURES + 8..headers);
        } else {
            parts.push(optional + CHECKSUM + 4..headers);
        }
        if signatures.end != size || signatures.start < headers {
            return Err(wrong("its signatures are not at its end"));
        }
        let (mut end, mut counted) = (headers, headers);
        for section in sections_of(image, first_section, sections)? {
            if section.start < end || section.end > signatures.start {
                return Err(wrong("its sections overlap, or lie outside of the file"));
            }
            end = section.end;
            counted += section.end - section.start;
            parts.push(section);
        }
        // What is behind the sections, as the specification has it: from where they would end without gaps.
        parts.push(counted..signatures.start);
        if parts.iter().any(|part| part.start > part.end) {
            return Err(wrong("its headers contradict each other"));
        }
        Ok(Self { image, parts, signatures })
    }

    /// The signatures, each as DER.
    ///
    /// # Errors
    /// [`PeError`], also where there are more than anybody would make.
    pub fn signatures(&self) -> Result<Vec<Vec<u8>>, PeError> {
        let len = self.signatures.end - self.signatures.start;
        if len > MAX_SIGNATURES {
            return Err(PeError::Format("its signatures take more than 1 MiB"));
        }
        let all = bytes(self.image, self.signatures.start, len)?;
        let mut rest = &*all;
        let mut signatures = Vec::new();
        while let Some((head, behind)) = rest.split_at_checked(SIGNATURE_HEAD) {
            let len = head.first_chunk().map_or(0, |len| u32::from_le_bytes(*len));
            let len = usize::try_from(len).unwrap_or(usize::MAX).saturating_sub(SIGNATURE_HEAD);
            let Some(signature) = behind.get(..len) else { break };
            if head.ends_with(&PKCS7) {
                signatures.push(signature.to_vec());
            }
            let next = len.next_multiple_of(usize::try_from(ALIGNMENT).unwrap_or(8));
            rest = behind.get(next..).unwrap_or_default();
        }
        Ok(signatures)
    }

    /// The digest, of the file with zeros up to a multiple of eight bytes.
    ///
    /// # Errors
    /// Reading failed.
    pub fn digest<D: Digest>(&self) -> io::Result<Output<D>> {
        let mut hash = D::new();
        for part in &self.parts {
            self.image.read(part.start, part.end - part.start, &mut |bytes| {
                hash.update(bytes);
                Ok(())
            })?;
        }
        let end = self.signatures.start;
        let missing = usize::try_from(end.next_multiple_of(ALIGNMENT) - end).map_err(io::Error::other)?;
        hash.update([0; 8].split_at(missing).0);
        Ok(hash.finalize())
    }
}

/// Where the contents of sections lie, by ascending offset; those without any are left out.
fn sections_of(image: &dyn KernelImage, first: u64, count: u16) -> Result<Vec<Range<u64>>, PeError> {
    let headers = bytes(image, first, u64::from(count) * SECTION_SIZE)?;
    let mut sections: Vec<Range<u64>> = headers
        .chunks_exact(40)
        .filter_map(|header| {
            let (size, place) = header.get(RAW_SIZE..RAW_SIZE + 8)?.split_at(4);
            let number = |bytes: &[u8]| bytes.first_chunk().map(|bytes| u64::from(u32::from_le_bytes(*bytes)));
            let (size, place) = (number(size)?, number(place)?);
            (size > 0).then_some(place..place + size)
        })
        .collect();
    sections.sort_unstable_by_key(|section| section.start);
    Ok(sections)
}

fn word(image: &dyn KernelImage, at: u64) -> Result<u32, PeError> {
    let bytes = bytes(image, at, 4)?;
    Ok(bytes.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes)))
}

/// Some bytes, no more than 65,535 headers of sections.
fn bytes(image: &dyn KernelImage, at: u64, len: u64) -> Result<Vec<u8>, PeError> {
    if at.checked_add(len).is_none_or(|end| end > image.size()) {
        return Err(PeError::Format("it is truncated"));
    }
    let mut bytes = Vec::new();
    image.read(at, len, &mut |part| {
        bytes.extend_from_slice(part);
        Ok(())
    })?;
    Ok(bytes)
}
