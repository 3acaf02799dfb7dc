//! Exits that only a confidential guest makes: its calls, its wishes for shared and private memory, its last words.
#![expect(unsafe_code, reason = "exits are read from a page that is shared with KVM")]

use kvm_bindings::kvm_run;

use super::abi::{self, CallExit};
use crate::{Conversion, ExitHandler, GpaRange, GuestCall, GuestCallStatus, VcpuId, Visibility};

/// The hypercall by which KVM hands on a wish for memory of another visibility, `KVM_HC_MAP_GPA_RANGE`: address, pages,
/// attributes.
pub(in super::super) const MAP_GPA_RANGE: u64 = 12;
/// The attribute of pages that are to be private.
const MAP_PRIVATE: u64 = 1 << 4;
const PAGE: u64 = 4096;

/// Answers MAP_GPA_RANGE. KVM takes these results, as positive numbers, and fails the run for any other.
pub(in super::super) fn map_range(arguments: &[u64; 6], host: &dyn ExitHandler) -> u64 {
    let [gpa, pages, attributes, ..] = *arguments;
    let to = if attributes & MAP_PRIVATE != 0 { Visibility::Private } else { Visibility::Shared };
    let conversion = match pages.checked_mul(PAGE).filter(|len| gpa.checked_add(*len).is_some()) {
        Some(len) => host.convert(GpaRange { start: gpa, len }, to),
        None => Conversion::Invalid,
    };
    let result = match conversion {
        Conversion::Done => 0,
        Conversion::Retry => libc::EAGAIN,
        Conversion::Invalid => libc::EINVAL,
    };
    u64::from(result.unsigned_abs())
}

/// Answers `KVM_EXIT_TDX` of a vCPU. `info` is R11 and R12 of GetTdVmCallInfo. A call that is not known keeps the status that KVM has
/// put there: there is none such.
///
/// # Safety
/// `page` must be a mapped `kvm_run` with that exit, which nobody else uses meanwhile.
pub(in super::super) unsafe fn answer_call(page: *mut kvm_run, vcpu: VcpuId, info: [u64; 2], host: &dyn ExitHandler) {
    // SAFETY: the caller vouches for the page, whose union has room for this and is aligned for it.
    let exit = unsafe { &mut *(&raw mut (*page).__bindgen_anon_1).cast::<CallExit>() };
    let [first, second, ..] = exit.arguments;
    let call = match exit.number {
        abi::CALL_GET_QUOTE => GuestCall::GetQuote { gpa: first, size: second },
        abi::CALL_SETUP_NOTIFY => GuestCall::SetupEventNotify { vcpu, vector: first },
        // KVM answers the leaf 0 itself.
        abi::CALL_INFO if first == 1 => {
            exit.arguments = [first, info[0], info[1], 0, 0];
            exit.status = status(GuestCallStatus::Success);
            return;
        }
        _ => return,
    };
    exit.status = status(host.guest_call(call));
}

/// A status as the guest finds it in R10 (GHCI 1.5, §3.1).
fn status(of: GuestCallStatus) -> u64 {
    match of {
        GuestCallStatus::Success => 0,
        GuestCallStatus::Retry => 1,
        GuestCallStatus::InvalidOperand => 1 << 63,
        GuestCallStatus::AlignError => 1 << 63 | 2,
        GuestCallStatus::Unsupported => 1 << 63 | 3,
    }
}

/// The registers whose numbers a message comes in, in its order: R14, R15, RBX, RDI, RSI, R8, R9, RDX.
const MESSAGE: [usize; 8] = [14, 15, 3, 7, 6, 8, 9, 2];
/// Of a fatal error's code: the low part is reserved, and an address goes with it.
const RESERVED: u64 = 0xffff;
const WITH_ADDRESS: u64 = 1 << 63;

/// What a guest said before it ended itself (TDG.VP.VMCALL<ReportFatalError>), from its registers in the order of their
/// numbers. It may be anything, so only characters that can be printed are told.
pub(in super::super) fn last_words(registers: &[u64]) -> String {
    let register = |number: usize| registers.get(number).copied().unwrap_or(0);
    let (code, address, mask) = (register(12), register(13), register(1));
    let mut told = format!("the guest reported a fatal error of its own, code {:#x}", code & !WITH_ADDRESS);
    if code & RESERVED != 0 {
        told.push_str(" (reserved bits are set)");
    }
    if code & WITH_ADDRESS != 0 {
        told.push_str(&format!(", about the address {address:#x}"));
    }
    let words = MESSAGE.into_iter().filter(|number| mask >> number & 1 != 0).map(register);
    let bytes = words.flat_map(u64::to_le_bytes).take_while(|byte| *byte != 0);
    let text: String =
        bytes.map(|byte| if byte == b' ' || byte.is_ascii_graphic() { char::from(byte) } else { '.' }).collect();
    if !text.is_empty() {
        told.push_str(&format!(": {text:?}"));
    }
    told
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Answers as it was told to, and remembers what it was asked.
    struct Answers {
        conversion: Conversion,
        status: GuestCallStatus,
        asked: RefCell<Vec<String>>,
    }

    impl ExitHandler for Answers {
        fn pio_read(&self, _: u16, _: &mut [u8]) {}
        fn pio_write(&self, _: u16, _: &[u8]) {}
        fn mmio_read(&self, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: u64, _: &[u8]) {}
        fn end_of_interrupt(&self, _: u8) {}
        fn convert(&self, range: GpaRange, to: Visibility) -> Conversion {
            self.asked.borrow_mut().push(format!("{:#x} {:#x} {to:?}", range.start, range.len));
            self.conversion
        }
        fn guest_call(&self, call: GuestCall) -> GuestCallStatus {
            self.asked.borrow_mut().push(format!("{call:x?}"));
            self.status
        }
    }

    fn answers(conversion: Conversion, status: GuestCallStatus) -> Answers {
        Answers { conversion, status, asked: RefCell::default() }
    }

    #[test]
    fn a_wish_for_other_memory_has_one_of_three_results() {
        for (conversion, result) in [(Conversion::Done, 0), (Conversion::Retry, 11), (Conversion::Invalid, 22)] {
            let host = answers(conversion, GuestCallStatus::Success);
            assert_eq!(map_range(&[0x1000, 2, 0x10, 0, 0, 0], &host), result);
            assert_eq!(map_range(&[1 << 40, 512, 0, 0, 0, 0], &host), result);
            assert_eq!(*host.asked.borrow(), ["0x1000 0x2000 Private", "0x10000000000 0x200000 Shared"]);
        }
        // What lies beyond all addresses is nobody's.
        let host = answers(Conversion::Done, GuestCallStatus::Success);
        for (gpa, pages) in [(0x1000, 1 << 52), (u64::MAX - 0xfff, 2)] {
            assert_eq!(map_range(&[gpa, pages, 0, 0, 0, 0], &host), 22);
        }
        assert!(host.asked.borrow().is_empty());
    }

    /// A call of the guest's, and what it finds then: the status and the arguments.
    fn call(number: u64, arguments: [u64; 5], host: &Answers) -> (u64, [u64; 5]) {
        let mut page = kvm_run::default();
        let place = (&raw mut page.__bindgen_anon_1).cast::<CallExit>();
        // SAFETY: the page is this function's, and its union has room for the exit.
        unsafe {
            *place = CallExit { flags: 0, number, status: 1 << 63 | 3, arguments };
            answer_call(&raw mut page, VcpuId(7), [2, 0x10], host);
            ((*place).status, (*place).arguments)
        }
    }

    #[test]
    fn calls_of_the_guest_are_answered_with_their_status() {
        for (status, number) in [
            (GuestCallStatus::Success, 0),
            (GuestCallStatus::Retry, 1),
            (GuestCallStatus::InvalidOperand, 0x8000_0000_0000_0000),
            (GuestCallStatus::AlignError, 0x8000_0000_0000_0002),
            (GuestCallStatus::Unsupported, 0x8000_0000_0000_0003),
        ] {
            let host = answers(Conversion::Done, status);
            assert_eq!(call(0x10002, [0x5000, 0x2000, 0, 0, 0], &host).0, number);
            assert_eq!(call(0x10004, [0x30, 0, 0, 0, 0], &host).0, number);
            assert_eq!(
                *host.asked.borrow(),
                ["GetQuote { gpa: 5000, size: 2000 }", "SetupEventNotify { vcpu: VcpuId(7), vector: 30 }"]
            );
        }
        let host = answers(Conversion::Done, GuestCallStatus::Success);
        assert_eq!(call(0x10000, [1, 9, 9, 9, 9], &host), (0, [1, 2, 0x10, 0, 0]));
        // Another leaf, and a call that is not known, stay as KVM put them.
        assert_eq!(call(0x10000, [2, 9, 9, 9, 9], &host), (1 << 63 | 3, [2, 9, 9, 9, 9]));
        assert_eq!(call(0x10003, [1, 2, 3, 4, 5], &host), (1 << 63 | 3, [1, 2, 3, 4, 5]));
        assert!(host.asked.borrow().is_empty());
    }

    #[test]
    fn last_words_are_told_as_text() {
        let mut registers = [0_u64; 16];
        assert_eq!(last_words(&registers), "the guest reported a fatal error of its own, code 0x0");
        let text = b"TD misconfigured: SEPT #VE\x1b must be off";
        for (number, part) in MESSAGE.into_iter().zip(text.chunks(8)) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            registers[number] = u64::from_le_bytes(word);
            registers[1] |= 1 << number;
        }
        (registers[12], registers[13]) = (1 << 63 | 0x2_0000, 0x7000);
        assert_eq!(
            last_words(&registers),
            "the guest reported a fatal error of its own, code 0x20000, about the address 0x7000: \
             \"TD misconfigured: SEPT #VE. must be off\""
        );
        assert!(last_words(&[0, 0, 0]).ends_with("code 0x0"));
        registers[12] = 3;
        assert!(last_words(&registers).contains("reserved bits"));
    }
}
