//! By what firmware with secure boot starts an executable, which it measures, or that it does not (UEFI 2.10, §32.4; RFC 5652
//! and RFC 5280 for what is signed). Neither are signatures checked, nor is what firmware forbids (dbx) looked at: of an
//! executable that is not what was signed, or must not run, what is foretold does not hold anyway.

use std::fs::File;

use sha2::Sha256;

use super::super::boot::FileImage;
use super::super::firmware::{Executable, PeError};
use super::measure::Digest384;
use super::variables::{Variables, digest_of_entry};

/// a5c059a1-94e4-4aa7-87b5-ab155c2bf072: a list of certificates.
const CERTIFICATES: [u8; 16] =
    [0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72];
/// c1c41626-504c-4092-aca9-41f936934328: a list of digests, SHA-256.
const DIGESTS: [u8; 16] =
    [0x26, 0x16, 0xc4, 0xc1, 0x4c, 0x50, 0x92, 0x40, 0xac, 0xa9, 0x41, 0xf9, 0x36, 0x93, 0x43, 0x28];
/// Of a list: its kind, and the lengths of all of it, of a header of its own, and of each entry.
const LIST_HEAD: usize = 28;
/// Of an entry: who put it there.
const OWNER: usize = 16;

/// Tags of DER.
const SEQUENCE: u8 = 0x30;
const FIRST_OF_CHOICE: u8 = 0xa0;

/// Whether firmware starts an executable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Without secure boot it starts any.
    Any,
    /// It has a key that has signed it, or its digest, and measures that.
    By(Digest384),
    /// It does not: nobody has signed it.
    Unsigned,
    /// It does not: others have signed it.
    OfOthers,
}

impl Verdict {
    /// What firmware measures of what it starts it by.
    pub fn measured(self) -> Option<Digest384> {
        if let Self::By(digest) = self { Some(digest) } else { None }
    }

    /// Why it does not start it, and what helps.
    pub fn problem(self) -> Option<&'static str> {
        match self {
            Self::Any | Self::By(_) => None,
            Self::Unsigned => Some(
                "this firmware has secure boot on, and does not start the kernel, which is not signed: add its digest to \
                 the firmware's file (virt-fw-vars --add-db-hash), or take firmware without secure boot",
            ),
            Self::OfOthers => Some(
                "this firmware has secure boot on, and does not start the kernel, which no key of it has signed: add the \
                 signer's key to the firmware's file (Debian's: virt-fw-vars --distro-keys debian), or boot from a disk \
                 with a loader that Microsoft has signed",
            ),
        }
    }
}

/// Whether firmware with these variables starts an executable.
///
/// # Errors
/// [`PeError`], where the file is none.
pub fn of(variables: &Variables, file: &File) -> Result<Verdict, PeError> {
    if !variables.secure_boot() {
        return Ok(Verdict::Any);
    }
    let image = FileImage::new(file)?.ok_or(PeError::Format("it is not a regular file"))?;
    let executable = Executable::read(&image)?;
    let signatures = executable.signatures()?;
    let entry = match signer(variables.database(), &signatures) {
        Some(entry) => Some(entry),
        None => listed(variables.database(), &executable)?,
    };
    Ok(match entry {
        Some(entry) => Verdict::By(digest_of_entry(entry)),
        None if signatures.is_empty() => Verdict::Unsigned,
        None => Verdict::OfOthers,
    })
}

/// The entry of a database that is an executable's digest.
fn listed<'a>(database: &'a [u8], executable: &Executable) -> Result<Option<&'a [u8]>, PeError> {
    let entries = entries(database, DIGESTS);
    if entries.is_empty() {
        // A digest takes longer than all else of a launch.
        return Ok(None);
    }
    let digest = executable.digest::<Sha256>()?;
    Ok(entries.into_iter().find(|entry| entry.get(OWNER..) == Some(&digest[..])))
}

/// The entry of a database that is the certificate of the first signer that has one there.
pub fn signer<'a>(database: &'a [u8], signatures: &[Vec<u8>]) -> Option<&'a [u8]> {
    let entries = entries(database, CERTIFICATES);
    signatures.iter().find_map(|signature| {
        let signers = signers(signature)?;
        entries.iter().copied().find(|entry| entry.get(OWNER..).is_some_and(|key| has_signed(key, &signers)))
    })
}

/// The entries of a database's lists of a kind, each with its owner in front.
fn entries(mut database: &[u8], kind: [u8; 16]) -> Vec<&[u8]> {
    let mut entries = Vec::new();
    while let Some(head) = database.get(..LIST_HEAD) {
        let length = |at: usize| {
            let bytes = head.get(at..).and_then(|rest| rest.first_chunk());
            usize::try_from(bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))).unwrap_or(usize::MAX)
        };
        let (all, header, each) = (length(16), length(20), length(24));
        let Some((list, rest)) = database.split_at_checked(all.max(LIST_HEAD)) else { break };
        if list.starts_with(&kind) && each > OWNER {
            let behind = LIST_HEAD.checked_add(header).and_then(|start| list.get(start..));
            entries.extend(behind.unwrap_or_default().chunks_exact(each));
        }
        database = rest;
    }
    entries
}

/// A certificate is one of these, or has the name of one's issuer.
fn has_signed(key: &[u8], signers: &[&[u8]]) -> bool {
    let Some((_, subject)) = names(key) else { return false };
    signers.iter().any(|signer| key.starts_with(signer) || names(signer).is_some_and(|(issuer, _)| issuer == subject))
}

/// The certificates in signed data.
fn signers(signature: &[u8]) -> Option<Vec<&[u8]>> {
    let (content, _) = element(signature, SEQUENCE)?;
    let signed = parts(content.inside).find(|part| part.tag == FIRST_OF_CHOICE)?;
    let (signed, _) = element(signed.inside, SEQUENCE)?;
    let certificates = parts(signed.inside).find(|part| part.tag == FIRST_OF_CHOICE)?;
    Some(parts(certificates.inside).map(|part| part.whole).collect())
}

/// Whose certificate it is by whom: the names of issuer and subject.
fn names(certificate: &[u8]) -> Option<(&[u8], &[u8])> {
    let (certificate, _) = element(certificate, SEQUENCE)?;
    let (signed, _) = element(certificate.inside, SEQUENCE)?;
    // Behind a version, if there is one, a number: algorithm, issuer, validity, subject.
    let mut sequences = parts(signed.inside).filter(|part| part.tag == SEQUENCE);
    let issuer = sequences.nth(1)?;
    let subject = sequences.nth(1)?;
    Some((issuer.whole, subject.whole))
}

struct Element<'a> {
    tag: u8,
    inside: &'a [u8],
    whole: &'a [u8],
}

/// An element with this tag, and what is behind it.
fn element(bytes: &[u8], tag: u8) -> Option<(Element<'_>, &[u8])> {
    next(bytes).filter(|(element, _)| element.tag == tag)
}

/// The elements that follow each other.
fn parts(mut bytes: &[u8]) -> impl Iterator<Item = Element<'_>> {
    std::iter::from_fn(move || {
        let (element, rest) = next(bytes)?;
        bytes = rest;
        Some(element)
    })
}

fn next(bytes: &[u8]) -> Option<(Element<'_>, &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        // The number of bytes that have it.
        0x81..=0x84 => {
            let (length, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), rest)
        }
        _ => return None,
    };
    let (inside, behind) = rest.split_at_checked(length)?;
    let whole = bytes.get(..bytes.len() - behind.len())?;
    Some((Element { tag, inside, whole }, behind))
}
