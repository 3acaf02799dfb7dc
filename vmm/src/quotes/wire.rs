//! The messages of Intel's Quote Generation Service (`qgs_msg_lib.h` in Intel's DCAP sources): a length, big-endian, and
//! then as many bytes of message, whose fields are little-endian.
//!
//! ```text
//!   0 major version, u16   2 minor version, u16   4 type, u32   8 size with this header, u32   12 error, u32
//!  16 type 0, a request for a quote: report size, u32; size of a list of ids, u32; both
//!  16 type 1, its answer: size of an id, u32; size of the quote, u32; both
//! ```

/// Bytes of a TDREPORT (Intel TDX Module ABI Specification, TDREPORT_STRUCT).
pub const REPORT_LEN: usize = 1024;
/// Bytes of a request for a quote.
pub const REQUEST_LEN: usize = PREFIX_LEN + HEADER_LEN + 8 + REPORT_LEN;

/// Bytes of the length in front of a message.
const PREFIX_LEN: usize = 4;
const HEADER_LEN: usize = 16;
/// Where an answer's id begins.
const ANSWER_LEN: usize = HEADER_LEN + 8;
/// The longest message that is taken: a quote and an id that fill a guest's buffer of 128 KiB each.
const LONGEST: usize = ANSWER_LEN + (2 << 17);

/// The version of the messages.
const MAJOR: u16 = 1;
const MINOR: u16 = 1;

const QUOTE_REQUEST: u32 = 0;
const QUOTE_ANSWER: u32 = 1;
const PLATFORM_REQUEST: u32 = 4;
const PLATFORM_ANSWER: u32 = 5;

/// Why a service's answer cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The length in front of it is none that a message has.
    #[error("its answer is {0} bytes long; 16 to {LONGEST} are taken")]
    Length(u32),
    /// The service speaks another version.
    #[error("it answers in version {0} of its protocol; version {MAJOR} is understood")]
    Version(u16),
    /// It is an answer to something else.
    #[error("its answer is of type {found}; it should be {expected}")]
    Type {
        /// The type.
        found: u32,
        /// What was asked for.
        expected: u32,
    },
    /// Sizes in it contradict each other.
    #[error("its answer's {field} is {found}, and the answer {len} bytes long")]
    Size {
        /// The field.
        field: &'static str,
        /// Its value.
        found: u32,
        /// The message's length in bytes.
        len: usize,
    },
    /// The service could not do it.
    #[error("it reports error {code:#x}{}", name_of(*.code))]
    Reported {
        /// Its number.
        code: u32,
    },
}

/// What Intel's service means by an error.
fn name_of(code: u32) -> &'static str {
    match code {
        0x1_2001 => " (unexpected)",
        0x1_2002 => " (out of memory)",
        0x1_2003 => " (a bad parameter)",
        0x1_2004 => " (the version of the protocol)",
        0x1_2005 => " (the type of the request)",
        0x1_2006 => " (the size of the request)",
        0x1_2007 => " (its code)",
        _ => "",
    }
}

/// What a service is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// A quote of a report.
    Quote,
    /// What platform it is on, which shows that it is there and speaks this protocol.
    Platform,
}

/// A request for a quote of `report`.
pub fn quote_request(report: &[u8; REPORT_LEN]) -> Vec<u8> {
    let mut message = request(QUOTE_REQUEST, 8 + REPORT_LEN);
    message.extend_from_slice(&le(REPORT_LEN));
    message.extend_from_slice(&le(0));
    message.extend_from_slice(report);
    message
}

/// A request for the platform's description.
pub fn platform_request() -> Vec<u8> {
    request(PLATFORM_REQUEST, 0)
}

/// A request's length and header, to which `rest` bytes are to be added.
fn request(kind: u32, rest: usize) -> Vec<u8> {
    let mut message = Vec::with_capacity(PREFIX_LEN + HEADER_LEN + rest);
    message.extend_from_slice(&u32::try_from(HEADER_LEN + rest).unwrap_or(u32::MAX).to_be_bytes());
    message.extend_from_slice(&MAJOR.to_le_bytes());
    message.extend_from_slice(&MINOR.to_le_bytes());
    message.extend_from_slice(&kind.to_le_bytes());
    message.extend_from_slice(&le(HEADER_LEN + rest));
    message.extend_from_slice(&le(0));
    message
}

fn le(number: usize) -> [u8; 4] {
    u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes()
}

/// An answer as it comes in, piece by piece. It holds as many bytes as have come, and no more than the longest message has.
#[derive(Debug, Default)]
pub struct Answer {
    bytes: Vec<u8>,
}

impl Answer {
    /// How many bytes are still to come; 0 where it is whole.
    ///
    /// # Errors
    /// [`WireError::Length`].
    pub fn missing(&self) -> Result<usize, WireError> {
        let Some(prefix) = self.bytes.first_chunk::<PREFIX_LEN>() else {
            return Ok(PREFIX_LEN - self.bytes.len());
        };
        let announced = u32::from_be_bytes(*prefix);
        let len = usize::try_from(announced).ok().filter(|len| (HEADER_LEN..=LONGEST).contains(len));
        let len = len.ok_or(WireError::Length(announced))?;
        Ok((PREFIX_LEN + len).saturating_sub(self.bytes.len()))
    }

    /// Adds what has come, at most as much as is missing.
    pub fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// What a whole answer to `question` brings: a quote, or nothing more than that it came.
    ///
    /// # Errors
    /// [`WireError`]: it is no such answer, or one that says that there is none.
    pub fn take(&self, question: Question) -> Result<&[u8], WireError> {
        let message = self.bytes.get(PREFIX_LEN..).unwrap_or_default();
        let len = message.len();
        let expected = match question {
            Question::Quote => QUOTE_ANSWER,
            Question::Platform => PLATFORM_ANSWER,
        };
        let major = u16::from_le_bytes(field(message, 0).ok_or(WireError::Length(0))?);
        let [found, size, error] = [4, 8, 12].map(|at| field(message, at).map_or(0, u32::from_le_bytes));
        if major != MAJOR {
            return Err(WireError::Version(major));
        }
        if found != expected {
            return Err(WireError::Type { found, expected });
        }
        if usize::try_from(size) != Ok(len) {
            return Err(WireError::Size { field: "size", found: size, len });
        }
        if error != 0 {
            return Err(WireError::Reported { code: error });
        }
        if question == Question::Platform {
            return Ok(&[]);
        }
        quote(message)
    }
}

/// The quote in an answer that is one.
fn quote(message: &[u8]) -> Result<&[u8], WireError> {
    let len = message.len();
    let [id, quote] = [16, 20].map(|at| field(message, at).map_or(0, u32::from_le_bytes));
    let size = |found, field| WireError::Size { field, found, len };
    let id_len = usize::try_from(id).map_err(|_| size(id, "id size"))?;
    let quote_len = usize::try_from(quote).ok().filter(|len| *len > 0).ok_or(size(quote, "quote size"))?;
    let rest = message.get(ANSWER_LEN..).and_then(|rest| rest.get(id_len..)).ok_or(size(id, "id size"))?;
    if rest.len() == quote_len { Ok(rest) } else { Err(size(quote, "quote size")) }
}

fn field<const LEN: usize>(message: &[u8], at: usize) -> Option<[u8; LEN]> {
    message.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a service sends: a header of these fields, and a body.
    fn answer(major: u16, kind: u32, error: u32, body: &[u8]) -> Vec<u8> {
        let mut message = request(kind, body.len());
        message[4..6].copy_from_slice(&major.to_le_bytes());
        message[16..20].copy_from_slice(&error.to_le_bytes());
        message.extend_from_slice(body);
        message
    }

    fn taken(message: &[u8], question: Question) -> Result<Vec<u8>, WireError> {
        let mut answer = Answer::default();
        // Byte by byte, as a service may send it.
        for byte in message {
            assert_ne!(answer.missing()?, 0, "more than the answer was asked for");
            answer.add(&[*byte]);
        }
        assert_eq!(answer.missing()?, 0);
        answer.take(question).map(<[u8]>::to_vec)
    }

    #[test]
    fn requests_are_those_that_a_real_qemu_sends() {
        let request = quote_request(&[7; REPORT_LEN]);
        assert_eq!(request.len(), REQUEST_LEN);
        let begins = [0, 0, 4, 0x18, 1, 0, 1, 0, 0, 0, 0, 0, 0x18, 4, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0];
        assert_eq!(request[..28], begins);
        assert!(request[28..].iter().all(|byte| *byte == 7));
        assert_eq!(platform_request(), [0, 0, 0, 16, 1, 0, 1, 0, 4, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_quote_is_taken_out_of_its_answer() {
        let body = [&3_u32.to_le_bytes()[..], &5_u32.to_le_bytes(), b"the", b"quote"].concat();
        assert_eq!(taken(&answer(1, 1, 0, &body), Question::Quote).unwrap(), b"quote");
        assert_eq!(taken(&answer(1, 5, 0, b"a platform"), Question::Platform).unwrap(), b"");
    }

    #[test]
    fn answers_that_are_none_are_refused() {
        let sizes = |id: u32, quote: u32, rest: &[u8]| {
            answer(1, 1, 0, &[&id.to_le_bytes()[..], &quote.to_le_bytes(), rest].concat())
        };
        let quote = sizes(0, 5, b"quote");
        let mut lying = quote.clone();
        lying[12] ^= 1;
        for (message, error) in [
            (answer(2, 1, 0, &quote[20..]), WireError::Version(2)),
            (answer(1, 5, 0, &quote[20..]), WireError::Type { found: 5, expected: 1 }),
            (answer(1, 1, 0x1_2001, &quote[20..]), WireError::Reported { code: 0x1_2001 }),
            (answer(1, 1, 0x1_2001, &[]), WireError::Reported { code: 0x1_2001 }),
            (answer(1, 1, 0, &[]), WireError::Size { field: "quote size", found: 0, len: 16 }),
            (lying, WireError::Size { field: "size", found: 28, len: 29 }),
            (sizes(0, 6, b"quote"), WireError::Size { field: "quote size", found: 6, len: 29 }),
            (sizes(1, 5, b"quote"), WireError::Size { field: "quote size", found: 5, len: 29 }),
            (sizes(0, 0, b""), WireError::Size { field: "quote size", found: 0, len: 24 }),
            (sizes(u32::MAX, 5, b"quote"), WireError::Size { field: "id size", found: u32::MAX, len: 29 }),
            (sizes(0, u32::MAX, b"quote"), WireError::Size { field: "quote size", found: u32::MAX, len: 29 }),
        ] {
            assert_eq!(taken(&message, Question::Quote), Err(error));
        }
        for length in [0, 15, 0x8100_0000, u32::MAX] {
            let mut answer = Answer::default();
            answer.add(&length.to_be_bytes());
            assert_eq!(answer.missing(), Err(WireError::Length(length)));
        }
    }
}
