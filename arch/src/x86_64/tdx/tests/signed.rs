//! By which key firmware starts an executable.

use std::fs::File;
use std::io::Write;

use super::super::Variables;
use super::super::authority::{self, Verdict};
use super::{AUTHENTICATED, GLOBAL, SECURITY, pe, volume};
use sha2::{Digest, Sha256, Sha384};

/// An element of DER.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let inside = parts.concat();
    let head = match u8::try_from(inside.len()) {
        Ok(length @ ..0x80) => vec![tag, length],
        _ => [&[tag, 0x82][..], &u16::try_from(inside.len()).unwrap().to_be_bytes()].concat(),
    };
    [head, inside].concat()
}

/// A certificate of this name by that one: version, number, algorithm, issuer, validity, subject, a key.
fn certificate(subject: &[u8], issuer: &[u8]) -> Vec<u8> {
    let name = |name: &[u8]| der(0x30, &[name]);
    let sequence = der(0x30, &[b"else"]);
    let signed = [
        der(0xa0, &[&[2, 1, 2]]),
        vec![2, 1, 9],
        sequence.clone(),
        name(issuer),
        sequence.clone(),
        name(subject),
        der(0x30, &[&[7; 200]]),
    ];
    der(0x30, &[&der(0x30, &[&signed.concat()]), &sequence, &[3, 1, 0]])
}

/// An executable with signatures by these certificates.
fn executable(signatures: &[&[&[u8]]]) -> File {
    let mut file = pe();
    let start = u32::try_from(file.len()).unwrap();
    for certificates in signatures {
        let content =
            der(0x30, &[&[2, 1, 1], &der(0x31, &[]), &der(0x30, &[b"data"]), &der(0xa0, &[&certificates.concat()])]);
        let signature = der(0x30, &[&[6, 1, 1], &der(0xa0, &[&content])]);
        file.extend_from_slice(&u32::try_from(signature.len() + 8).unwrap().to_le_bytes());
        file.extend_from_slice(&[0, 2, 2, 0]);
        file.extend(signature);
        file.resize(file.len().next_multiple_of(8), 0);
    }
    let len = u32::try_from(file.len()).unwrap() - start;
    file[0x58 + 108] = 16;
    file[0x58 + 144..0x58 + 152].copy_from_slice(&[start.to_le_bytes(), len.to_le_bytes()].concat());
    let mut opened = tempfile::tempfile().unwrap();
    opened.write_all(&file).unwrap();
    opened
}

/// A signature list of this kind.
fn list(kind: [u8; 16], entries: &[Vec<u8>]) -> Vec<u8> {
    let each = u32::try_from(entries.first().map_or(0, Vec::len)).unwrap();
    let all = 28 + each * u32::try_from(entries.len()).unwrap();
    [&kind[..], &all.to_le_bytes(), &[0; 4], &each.to_le_bytes(), &entries.concat()].concat()
}

const X509: [u8; 16] = *b"\xa1\x59\xc0\xa5\xe4\x94\xa7\x4a\x87\xb5\xab\x15\x5c\x2b\xf0\x72";

const SHA256: [u8; 16] = *b"\x26\x16\xc4\xc1\x4c\x50\x92\x40\xac\xa9\x41\xf9\x36\x93\x43\x28";

/// What firmware measures of an entry of its database.
fn digest_of(entry: &[u8]) -> [u8; 48] {
    let head = [&[2, 0, 0, 0, 0, 0, 0, 0][..], &(entry.len() as u64).to_le_bytes(), b"d\0b\0"].concat();
    Sha384::digest([&SECURITY[..], &head, entry].concat()).into()
}

#[test]
fn the_key_is_the_first_that_has_signed() {
    let owned = |owner: u8, certificate: &[u8]| [&[owner; 16], certificate].concat();
    let (root, other, leaf) =
        (certificate(b"root", b"root"), certificate(b"other", b"other"), certificate(b"leaf", b"root"));
    let database = [
        list([0; 16], &[owned(1, &root)]),
        list(X509, &[owned(2, &other)]),
        list(X509, &[owned(3, &root), owned(4, &root)]),
    ]
    .concat();
    let keys = volume(AUTHENTICATED, &[("PK", GLOBAL, b"key"), ("db", SECURITY, &database)]);
    let keys = Variables::read(&keys);
    let of = |signatures: &[&[&[u8]]]| authority::of(&keys, &executable(signatures)).unwrap();
    let digest = |entry: Vec<u8>| Verdict::By(digest_of(&entry));
    assert_eq!(of(&[&[&leaf]]), digest(owned(3, &root)));
    // The key itself, one signature of somebody else's in front, and two keys that have signed.
    assert_eq!(of(&[&[&other]]), digest(owned(2, &other)));
    assert_eq!(of(&[&[&certificate(b"x", b"y")], &[&leaf]]), digest(owned(3, &root)));
    assert_eq!(of(&[&[&leaf, &other]]), digest(owned(2, &other)));
    assert_eq!(of(&[&[&certificate(b"root2", b"y")]]), Verdict::OfOthers);
    assert_eq!(of(&[]), Verdict::Unsigned);
    // Without secure boot nothing is looked at.
    let none = volume(AUTHENTICATED, &[("db", SECURITY, &database)]);
    assert_eq!(authority::of(&Variables::read(&none), &executable(&[&[&leaf]])).unwrap(), Verdict::Any);
}

#[test]
fn a_digest_in_the_database_is_as_good_as_a_key() {
    // All but the checksum.
    let digest = Sha256::digest([&pe()[..0x98], &pe()[0x9c..]].concat());
    let listed = [&[5; 16], &digest[..]].concat();
    let with = |entries: &[Vec<u8>]| {
        let database = [list(X509, &[certificate(b"root", b"root")]), list(SHA256, entries)].concat();
        let keys = volume(AUTHENTICATED, &[("PK", GLOBAL, b"key"), ("db", SECURITY, &database)]);
        authority::of(&Variables::read(&keys), &super::executable()).unwrap()
    };
    assert_eq!(with(&[vec![1; 48], listed.clone()]), Verdict::By(digest_of(&listed)));
    assert_eq!(with(&[vec![1; 48]]), Verdict::Unsigned);
}

#[test]
fn lists_and_signatures_that_lie_are_none() {
    let root = certificate(b"root", b"root");
    let good = list(X509, &[[&[3; 16], &*root].concat()]);
    let signed = executable(&[&[&root]]);
    let with = |database: &[u8]| {
        let keys = volume(AUTHENTICATED, &[("PK", GLOBAL, b"key"), ("db", SECURITY, database)]);
        authority::of(&Variables::read(&keys), &signed).unwrap()
    };
    assert!(matches!(with(&good), Verdict::By(_)));
    for (at, bytes) in
        [(16, [0xff; 4]), (16, [0; 4]), (20, [0xff; 4]), (24, [0xff; 4]), (24, [0; 4]), (24, [16, 0, 0, 0])]
    {
        let mut bad = good.clone();
        bad[at..at + 4].copy_from_slice(&bytes);
        assert_eq!(with(&bad), Verdict::OfOthers, "{bytes:?} at {at}");
    }
    assert_eq!(with(&good[..good.len() - 1]), Verdict::OfOthers);
    assert_eq!(with(&good[..20]), Verdict::OfOthers);
    for len in 0..root.len() {
        let cut = list(X509, &[[&[3; 16], &root[..len]].concat()]);
        assert_eq!(with(&cut), Verdict::OfOthers, "{len} bytes of a certificate");
    }
}
