//! Device configuration as bytes.

/// Reads from a configuration structure. What lies beyond it reads as zeroes.
pub(crate) fn read_from_config(config: &[u8], offset: u32, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let from = config.get(start..).unwrap_or_default();
    data.fill(0);
    for (to, from) in data.iter_mut().zip(from) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_beyond_the_end_gives_zeroes() {
        let mut data = [0xff; 4];
        read_from_config(&[1, 2, 3], 1, &mut data);
        assert_eq!(data, [2, 3, 0, 0]);
        read_from_config(&[1, 2, 3], u32::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
