//! The architecture's own types to KVM's and back.

use kvm_bindings::{
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, kvm_cpuid_entry2, kvm_dtable, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events,
};

use crate::{CpuidEntry, DescriptorTable, Error, EventState, MpState, Registers, Segment, SystemRegisters};

impl From<&kvm_cpuid_entry2> for CpuidEntry {
    fn from(from: &kvm_cpuid_entry2) -> Self {
        Self {
            function: from.function,
            index: (from.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(from.index),
            eax: from.eax,
            ebx: from.ebx,
            ecx: from.ecx,
            edx: from.edx,
        }
    }
}

impl From<&CpuidEntry> for kvm_cpuid_entry2 {
    fn from(from: &CpuidEntry) -> Self {
        Self {
            function: from.function,
            index: from.index.unwrap_or(0),
            flags: if from.index.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: from.eax,
            ebx: from.ebx,
            ecx: from.ecx,
            edx: from.edx,
            ..Default::default()
        }
    }
}

/// Converts between two structures whose fields have the same names and types.
macro_rules! same_fields {
    ($ours:ty, $kvms:ty, { $($field:ident),* }) => {
        impl From<&$kvms> for $ours {
            fn from(from: &$kvms) -> Self {
                Self { $($field: from.$field),* }
            }
        }

        impl From<&$ours> for $kvms {
            fn from(from: &$ours) -> Self {
                Self { $($field: from.$field),* }
            }
        }
    };
}

same_fields!(Registers, kvm_regs, {
    rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags
});

impl From<&kvm_segment> for Segment {
    fn from(from: &kvm_segment) -> Self {
        let fields = [
            (from.type_, 0),
            (from.s, 4),
            (from.dpl, 5),
            (from.present, 7),
            (from.avl, 12),
            (from.l, 13),
            (from.db, 14),
            (from.g, 15),
            (from.unusable, 16),
        ];
        let access = fields.iter().fold(0, |access, (value, shift)| access | u32::from(*value) << shift);
        Self { base: from.base, limit: from.limit, selector: from.selector, access }
    }
}

impl From<&Segment> for kvm_segment {
    fn from(from: &Segment) -> Self {
        let [low, middle, high, _] = from.access.to_le_bytes();
        Self {
            base: from.base,
            limit: from.limit,
            selector: from.selector,
            type_: low & 0xf,
            s: low >> 4 & 1,
            dpl: low >> 5 & 3,
            present: low >> 7,
            avl: middle >> 4 & 1,
            l: middle >> 5 & 1,
            db: middle >> 6 & 1,
            g: middle >> 7,
            unusable: high & 1,
            padding: 0,
        }
    }
}

impl From<&kvm_dtable> for DescriptorTable {
    fn from(from: &kvm_dtable) -> Self {
        Self { base: from.base, limit: from.limit }
    }
}

impl From<&DescriptorTable> for kvm_dtable {
    fn from(from: &DescriptorTable) -> Self {
        Self { base: from.base, limit: from.limit, padding: [0; 3] }
    }
}

impl From<&kvm_sregs> for SystemRegisters {
    fn from(from: &kvm_sregs) -> Self {
        Self {
            cs: (&from.cs).into(),
            ds: (&from.ds).into(),
            es: (&from.es).into(),
            fs: (&from.fs).into(),
            gs: (&from.gs).into(),
            ss: (&from.ss).into(),
            tr: (&from.tr).into(),
            ldt: (&from.ldt).into(),
            gdt: (&from.gdt).into(),
            idt: (&from.idt).into(),
            cr0: from.cr0,
            cr2: from.cr2,
            cr3: from.cr3,
            cr4: from.cr4,
            cr8: from.cr8,
            efer: from.efer,
            apic_base: from.apic_base,
        }
    }
}

impl From<&SystemRegisters> for kvm_sregs {
    fn from(from: &SystemRegisters) -> Self {
        Self {
            cs: (&from.cs).into(),
            ds: (&from.ds).into(),
            es: (&from.es).into(),
            fs: (&from.fs).into(),
            gs: (&from.gs).into(),
            ss: (&from.ss).into(),
            tr: (&from.tr).into(),
            ldt: (&from.ldt).into(),
            gdt: (&from.gdt).into(),
            idt: (&from.idt).into(),
            cr0: from.cr0,
            cr2: from.cr2,
            cr3: from.cr3,
            cr4: from.cr4,
            cr8: from.cr8,
            efer: from.efer,
            apic_base: from.apic_base,
            // The interrupt being delivered is part of the events.
            interrupt_bitmap: [0; 4],
        }
    }
}

impl TryFrom<&kvm_mp_state> for MpState {
    type Error = Error;

    fn try_from(from: &kvm_mp_state) -> Result<Self, Error> {
        Ok(match from.mp_state {
            KVM_MP_STATE_RUNNABLE => Self::Runnable,
            KVM_MP_STATE_UNINITIALIZED => Self::Uninitialized,
            KVM_MP_STATE_INIT_RECEIVED => Self::InitReceived,
            KVM_MP_STATE_HALTED => Self::Halted,
            KVM_MP_STATE_SIPI_RECEIVED => Self::SipiReceived,
            other => return Err(Error::State(format!("KVM's run state {other} has no meaning on this architecture"))),
        })
    }
}

impl From<MpState> for kvm_mp_state {
    fn from(from: MpState) -> Self {
        let mp_state = match from {
            MpState::Runnable => KVM_MP_STATE_RUNNABLE,
            MpState::Uninitialized => KVM_MP_STATE_UNINITIALIZED,
            MpState::InitReceived => KVM_MP_STATE_INIT_RECEIVED,
            MpState::Halted => KVM_MP_STATE_HALTED,
            MpState::SipiReceived => KVM_MP_STATE_SIPI_RECEIVED,
        };
        Self { mp_state }
    }
}

impl From<&kvm_vcpu_events> for EventState {
    fn from(from: &kvm_vcpu_events) -> Self {
        let on_its_way = from.exception.injected != 0 || from.exception.pending != 0;
        let error_code = (from.exception.has_error_code != 0).then_some(from.exception.error_code);
        let payload = (from.exception_has_payload != 0).then_some(from.exception_payload);
        let smm = [from.smi.smm, from.smi.pending, from.smi.smm_inside_nmi, from.smi.latched_init];
        Self {
            exception: on_its_way.then_some((from.exception.nr, error_code, payload)),
            exception_injected: from.exception.injected != 0,
            interrupt: (from.interrupt.injected != 0).then_some((from.interrupt.nr, from.interrupt.soft != 0)),
            interrupt_shadow: from.interrupt.shadow,
            nmi_injected: from.nmi.injected != 0,
            nmi_pending: from.nmi.pending != 0,
            nmi_masked: from.nmi.masked != 0,
            sipi_vector: from.sipi_vector,
            smm: smm.iter().rev().fold(0, |bits, flag| bits << 1 | u8::from(*flag != 0)),
            triple_fault: from.triple_fault.pending != 0,
        }
    }
}

impl From<&EventState> for kvm_vcpu_events {
    fn from(from: &EventState) -> Self {
        let mut to = Self {
            flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM,
            ..Default::default()
        };
        if let Some((vector, error_code, payload)) = from.exception {
            to.exception.nr = vector;
            to.exception.injected = from.exception_injected.into();
            to.exception.pending = (!from.exception_injected).into();
            to.exception.has_error_code = error_code.is_some().into();
            to.exception.error_code = error_code.unwrap_or(0);
            to.exception_has_payload = payload.is_some().into();
            to.exception_payload = payload.unwrap_or(0);
            // KVM looks at "pending" and the payload only where this flag is set.
            to.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
        }
        if let Some((vector, soft)) = from.interrupt {
            to.interrupt.injected = 1;
            to.interrupt.nr = vector;
            to.interrupt.soft = soft.into();
        }
        to.interrupt.shadow = from.interrupt_shadow;
        to.nmi.injected = from.nmi_injected.into();
        to.nmi.pending = from.nmi_pending.into();
        to.nmi.masked = from.nmi_masked.into();
        if from.sipi_vector != 0 {
            to.sipi_vector = from.sipi_vector;
            to.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        }
        to.smi.smm = from.smm & 1;
        to.smi.pending = from.smm >> 1 & 1;
        to.smi.smm_inside_nmi = from.smm >> 2 & 1;
        to.smi.latched_init = from.smm >> 3 & 1;
        if from.triple_fault {
            to.triple_fault.pending = 1;
            to.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        }
        to
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_rights_are_the_bits_of_the_manual() {
        // 64-bit code: type 0xb, S, DPL 3, P, AVL, L, G.
        let code = Segment { base: 1, limit: 0xffff_ffff, selector: 0x33, access: 0xb0fb };
        let kvms = kvm_segment::from(&code);
        assert_eq!((kvms.type_, kvms.s, kvms.dpl, kvms.present), (0xb, 1, 3, 1));
        assert_eq!((kvms.avl, kvms.l, kvms.db, kvms.g, kvms.unusable), (1, 1, 0, 1, 0));
        assert_eq!(Segment::from(&kvms), code);
        let unusable = Segment { access: 0x1_4093, ..code };
        let kvms = kvm_segment::from(&unusable);
        assert_eq!((kvms.db, kvms.g, kvms.unusable), (1, 0, 1));
        assert_eq!(Segment::from(&kvms), unusable);
    }

    #[test]
    fn events_come_back_as_they_went() {
        let all = EventState {
            exception: Some((14, Some(6), Some(0xdead))),
            exception_injected: false,
            interrupt: Some((0x41, true)),
            interrupt_shadow: 2,
            nmi_injected: true,
            nmi_pending: true,
            nmi_masked: true,
            sipi_vector: 9,
            smm: 0b1101,
            triple_fault: true,
        };
        let injected = EventState { exception: Some((13, None, None)), exception_injected: true, ..all };
        for events in [EventState::default(), all, injected] {
            assert_eq!(EventState::from(&kvm_vcpu_events::from(&events)), events);
        }
        assert_eq!(kvm_vcpu_events::from(&all).exception.pending, 1);
        assert_eq!(kvm_vcpu_events::from(&injected).exception.pending, 0);
    }

    #[test]
    fn leaves_without_an_index_are_told_from_those_with_index_0() {
        for index in [None, Some(0), Some(3)] {
            let leaf = CpuidEntry { function: 7, index, eax: 1, ebx: 2, ecx: 3, edx: 4 };
            assert_eq!(CpuidEntry::from(&kvm_cpuid_entry2::from(&leaf)), leaf);
        }
    }
}
