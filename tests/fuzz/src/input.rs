//! Inputs as programs: steps of eight bytes, so that what libFuzzer cuts out or copies is mostly whole steps.

/// A step of a program. What the fields mean is up to the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Step {
    /// The operation.
    pub op: u8,
    /// The first operand.
    pub a: u8,
    /// The second operand.
    pub b: u8,
    /// The third operand.
    pub c: u8,
    /// The last operand, little-endian.
    pub d: u32,
}

impl Step {
    /// Length in bytes.
    pub const LEN: usize = 8;

    /// A step.
    pub fn new(op: u8, a: u8, b: u8, c: u8, d: u32) -> Self {
        Self { op, a, b, c, d }
    }

    /// Reads a step.
    pub fn decode(bytes: [u8; Self::LEN]) -> Self {
        let [op, a, b, c, d0, d1, d2, d3] = bytes;
        Self { op, a, b, c, d: u32::from_le_bytes([d0, d1, d2, d3]) }
    }

    /// The step as bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let [d0, d1, d2, d3] = self.d.to_le_bytes();
        [self.op, self.a, self.b, self.c, d0, d1, d2, d3]
    }

    /// The first two operands as one.
    pub fn ab(&self) -> u16 {
        u16::from_le_bytes([self.a, self.b])
    }

    /// The lower half of the last operand.
    pub fn d_low(&self) -> u16 {
        let [low, high, ..] = self.d.to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    /// The upper half of the last operand.
    pub fn d_high(&self) -> u16 {
        let [.., low, high] = self.d.to_le_bytes();
        u16::from_le_bytes([low, high])
    }
}

/// The steps of a program; an incomplete one at the end is none.
pub fn steps(data: &[u8]) -> impl Iterator<Item = Step> {
    data.as_chunks().0.iter().copied().map(Step::decode)
}

/// The width in bytes of an access, of those that a processor makes.
pub fn width(code: u8) -> usize {
    1 << (code & 3)
}

/// Some bytes that can be told from others: `seed` says which.
pub fn pattern(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len);
    for _ in 0..len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes.push(state.to_le_bytes()[3]);
    }
    bytes
}
