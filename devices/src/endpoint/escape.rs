//! The escape key of a terminal: `Ctrl-a`, then a command.

/// The byte that a terminal sends for `Ctrl-a`.
const ESCAPE: u8 = 0x01;

/// What `Ctrl-a h` shows.
pub const HELP: &str = "\r\n\
    Ctrl-a x       end the virtual machine\r\n\
    Ctrl-a h       show this\r\n\
    Ctrl-a Ctrl-a  send Ctrl-a to the guest\r\n";

/// What was asked for at the terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// End the virtual machine.
    Quit,
    /// Show [`HELP`].
    Help,
}

/// Takes commands out of a terminal's input.
#[derive(Debug, Default)]
pub struct Escape {
    /// `Ctrl-a` was the last byte.
    pending: bool,
}

impl Escape {
    /// Takes a byte of input. Gives what goes to the guest, if anything, and a command, if it completed one. A
    /// command that is not known goes to nobody.
    pub fn feed(&mut self, byte: u8) -> (Option<u8>, Option<Command>) {
        if !self.pending {
            self.pending = byte == ESCAPE;
            return ((!self.pending).then_some(byte), None);
        }
        self.pending = false;
        match byte {
            ESCAPE => (Some(ESCAPE), None),
            b'x' | b'X' => (None, Some(Command::Quit)),
            b'h' | b'H' | b'?' => (None, Some(Command::Help)),
            _ => (None, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(input: &[u8]) -> (Vec<u8>, Vec<Command>) {
        let mut escape = Escape::default();
        let mut guest = Vec::new();
        let mut commands = Vec::new();
        for byte in input {
            let (to_guest, command) = escape.feed(*byte);
            guest.extend(to_guest);
            commands.extend(command);
        }
        (guest, commands)
    }

    #[test]
    fn plain_input_goes_to_the_guest() {
        assert_eq!(feed(b"xh\x00\x03"), (b"xh\x00\x03".to_vec(), vec![]));
    }

    #[test]
    fn commands_are_taken_out() {
        assert_eq!(feed(b"ls\n\x01h\x01x"), (b"ls\n".to_vec(), vec![Command::Help, Command::Quit]));
    }

    #[test]
    fn the_escape_itself_can_be_sent() {
        assert_eq!(feed(b"\x01\x01x"), (b"\x01x".to_vec(), vec![]));
    }

    #[test]
    fn an_unknown_command_goes_to_nobody() {
        assert_eq!(feed(b"\x01qx"), (b"x".to_vec(), vec![]));
    }
}
