# Interrupts of virtio-rng: one arrives, one waits as a pending bit while its vector is masked, none is sent without a
# vector.
    .include "prelude.inc"
    .include "lapic.inc"
    .include "virtio.inc"

    .set VECTOR, 0x50
    .set MSIX, 0x11                     # the capability
    .set CONTROL, 2
    .set TABLE, 4
    .set PENDING, 8

main:
    SET_GATE VECTOR, interrupt
    LAPIC_ENABLE
    mov $VIRTIO_RNG, %eax
    call virtio_open

    mov $MSIX, %al
    call pci_capability
    mov BAR0(%esi), %edx
    and $~15, %edx
    mov TABLE(%edi), %eax
    and $~7, %eax
    add %edx, %eax
    mov %eax, table
    mov PENDING(%edi), %eax
    and $~7, %eax
    add %edx, %eax
    mov %eax, pending

    mov table, %edx
    PRINT "masked at reset "
    PRINT_HEX 12(%edx)
    PRINT "\n"
    movw $0x8000, CONTROL(%edi)         # enabled, function not masked
    movl $0xfee00000, (%edx)            # to local APIC 0
    movl $0, 4(%edx)
    movl $VECTOR, 8(%edx)
    movl $0, 12(%edx)                   # not masked

    call virtio_negotiate
    movw $0, QUEUE_SELECT(%ebx)
    movw $9, QUEUE_VECTOR(%ebx)         # none of its vectors: refused
    movzwl QUEUE_VECTOR(%ebx), %eax
    PRINT "vector 9 "
    PRINT_HEX %eax
    movw $0, QUEUE_VECTOR(%ebx)
    movzwl QUEUE_VECTOR(%ebx), %eax
    PRINT " vector 0 "
    PRINT_HEX %eax
    PRINT "\n"
    xor %eax, %eax
    call virtio_queue
    call virtio_driver_ok
    DESCRIPTOR 0, BUFFERS, 16, WRITE

    # The interrupt wakes the halted processor.
    call request
1:  sti
    hlt
    cli
    cmpl $1, interrupts
    jne 1b
    PRINT "interrupt\n"

    # Masked: it waits.
    mov table, %edx
    movl $1, 12(%edx)
    call request
    call virtio_wait
    mov pending, %edx
    mov $100000, %ecx
2:  testl $1, (%edx)
    jnz 3f
    dec %ecx
    jnz 2b
    PRINT "FAILED: no pending bit\n"
    EXIT FAILED
3:  sti
    nop
    cli
    PRINT "masked: interrupts "
    PRINT_HEX interrupts
    PRINT "\n"
    mov table, %edx
    movl $0, 12(%edx)
4:  sti
    hlt
    cli
    cmpl $2, interrupts
    jne 4b
    mov pending, %edx
    PRINT "unmasked: pending "
    PRINT_HEX (%edx)
    PRINT "\n"

    # VIRTQ_AVAIL_F_NO_INTERRUPT: none is wanted.
    movw $1, AVAILABLE
    call request
    call virtio_wait
    movw $0, AVAILABLE
    call request
5:  sti
    hlt
    cli
    cmpl $3, interrupts
    jb 5b
    PRINT "suppressed: interrupts "
    PRINT_HEX interrupts
    PRINT "\n"
    EXIT 0

request:
    push %edx
    xor %eax, %eax
    call virtio_submit
    pop %edx
    ret

interrupt:
    incl interrupts
    LAPIC_END
    INTERRUPT_RETURN

    .data
interrupts:
    .long 0
table:
    .long 0
pending:
    .long 0
