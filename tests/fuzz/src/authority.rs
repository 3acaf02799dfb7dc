//! A firmware's database of keys and an executable's signature, both of any content: no key is found but one of the database.

use arch::tdx::authority::signer;

use crate::allocated;

/// In front of a database's entry: who put it there.
const OWNER: usize = 16;
/// What a search may take for each byte of both, and beside it: it lists entries and certificates.
const FOR_EACH_BYTE: usize = 16;
const BESIDE: usize = 4096;

/// Looks for the key of the database that has signed. The first two bytes say how long the database is.
pub fn look_for_a_key(content: &[u8]) {
    let Some((length, rest)) = content.split_first_chunk() else { return };
    let Some((database, signature)) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length))) else { return };
    let signatures = [signature.to_vec()];
    let (found, taken) = allocated::during(|| signer(database, &signatures));
    assert!(taken <= BESIDE + FOR_EACH_BYTE * content.len(), "{taken} bytes were allocated for {}", content.len());
    let Some(entry) = found else { return };
    assert!(entry.len() > OWNER && database.as_ptr_range().contains(&entry.as_ptr()));
    assert!(database.windows(entry.len()).any(|window| window == entry));
    // A signature that says nothing, or one without a key, in front of it changes nothing.
    let more = [Vec::new(), vec![0x30, 0], signature.to_vec()];
    assert_eq!(signer(database, &more), Some(entry));
    assert_eq!(signer(&[], &signatures), None);
    assert_eq!(signer(database, &more[..2]), None);
}

/// A database with certificates of these names, and a signature of one of that name whose issuer has this one.
pub fn signed(keys: &[&[u8]], name: &[u8], issuer: &[u8]) -> Vec<u8> {
    let database: Vec<u8> = keys.iter().flat_map(|key| list(&certificate(key, key))).collect();
    let certificates = element(0xa0, &[&certificate(name, issuer)]);
    let signed = element(0x30, &[&[2, 1, 1], &element(0x31, &[]), &element(0x30, &[b"data"]), &certificates]);
    let signature = element(0x30, &[&[6, 1, 1], &element(0xa0, &[&signed])]);
    let length = u16::try_from(database.len()).expect("a few keys");
    [&length.to_le_bytes()[..], &database, &signature].concat()
}

/// A list of one certificate, as the database has it.
fn list(certificate: &[u8]) -> Vec<u8> {
    let kind = *b"\xa1\x59\xc0\xa5\xe4\x94\xa7\x4a\x87\xb5\xab\x15\x5c\x2b\xf0\x72";
    let each = u32::try_from(OWNER + certificate.len()).expect("a short one");
    [&kind[..], &(28 + each).to_le_bytes(), &[0; 4], &each.to_le_bytes(), &[1; OWNER], certificate].concat()
}

/// Version, number, algorithm, issuer, validity, subject, and what a signature would be.
fn certificate(name: &[u8], issuer: &[u8]) -> Vec<u8> {
    let (version, other) = (element(0xa0, &[&[2, 1, 2]]), element(0x30, &[b"else"]));
    let parts = [&version, &[2, 1, 9][..], &other, &element(0x30, &[issuer]), &other, &element(0x30, &[name])];
    element(0x30, &[&element(0x30, &parts), &other, &[3, 1, 0]])
}

/// An element of DER.
fn element(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let inside = parts.concat();
    let length = u16::try_from(inside.len()).expect("a short one").to_be_bytes();
    [&[tag, 0x82, length[0], length[1]], &inside[..]].concat()
}
