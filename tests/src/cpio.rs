//! Writes a cpio archive of the "newc" kind, as the kernel unpacks it into its first root file system
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive that is being written. Everything in it belongs to root and has no time.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a folder; the folders above it must have been added.
    pub fn folder(&mut self, path: &str) {
        self.entry(path, 0o040_755, &[]);
    }

    /// Adds an executable file.
    pub fn program(&mut self, path: &str, content: &[u8]) {
        self.entry(path, 0o100_755, content);
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, 0o100_644, content);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.entry(path, 0o120_777, target.as_bytes());
    }

    /// The archive, whole.
    pub fn finish(mut self) -> Vec<u8> {
        self.entries = 0; // the end has no inode number
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        let inode = self.entries;
        self.entries += 1;
        // magic, inode, mode, owner, group, links, time, size, device of the file, device of the node, name, check
        let header = [inode, mode, 0, 0, 1, 0, length(content.len()), 0, 0, 0, 0, length(path.len() + 1), 0];
        self.bytes.extend(b"070701");
        for field in header {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("nothing in an initramfs is as large as 4 GiB")
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_cpio_program_reads_it() {
        let mut archive = Archive::default();
        archive.folder("bin");
        archive.program("bin/odd", b"12345");
        archive.link("bin/link", "odd");
        archive.file("last", b"");
        let mut cpio = Command::new("cpio")
            .args(["-itv", "--quiet", "--numeric-uid-gid"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        let output = cpio.wait_with_output().unwrap();
        assert!(output.status.success());
        let list = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0][0], "drwxr-xr-x");
        assert_eq!((lines[1][0], lines[1][4], *lines[1].last().unwrap()), ("-rwxr-xr-x", "5", "bin/odd"));
        assert_eq!(lines[2][lines[2].len() - 3..], ["bin/link", "->", "odd"]);
        assert_eq!((lines[3][0], lines[3][4]), ("-rw-r--r--", "0"));
        assert_eq!(lines.len(), 4);
    }
}
