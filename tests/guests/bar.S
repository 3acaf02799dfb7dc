# A base address register of virtio-rng: its size, its move to another address, and that it answers at one address only,
# nowhere while memory accesses are off, and nowhere while its address is none that it may have.
    .include "prelude.inc"
    .include "pci.inc"

    .set QUEUE_COUNT, 0x12              # in the common configuration, which this function has at the BAR's start
    .set ELSEWHERE, 0xd4000000
    .set IN_RAM, 0x200000

main:
    mov $0x10441af4, %eax
    call pci_find
    call pci_enable
    mov %edi, %ebx

    # PCI 3.0 §6.2.5.1: write all ones, read back which bits are writable.
    movw $0, COMMAND(%esi)
    movl $-1, BAR0(%esi)
    movl $-1, BAR1(%esi)
    PRINT "sizing "
    PRINT_HEX BAR1(%esi)
    PRINT_HEX BAR0(%esi)
    PRINT "\n"
    mov %ebx, BAR0(%esi)
    movl $0, BAR1(%esi)
    movw $MEMORY_AND_MASTER, COMMAND(%esi)

    movzwl QUEUE_COUNT(%ebx), %eax
    PRINT "here "
    PRINT_HEX %eax
    PRINT "\n"

    movl $ELSEWHERE, BAR0(%esi)         # moved while memory accesses are on
    movzwl QUEUE_COUNT(%ebx), %eax
    PRINT "moved: old "
    PRINT_HEX %eax
    movzwl ELSEWHERE+QUEUE_COUNT, %eax
    PRINT " new "
    PRINT_HEX %eax
    PRINT "\n"

    movw $0, COMMAND(%esi)
    movzwl ELSEWHERE+QUEUE_COUNT, %eax
    PRINT "off "
    PRINT_HEX %eax
    movw $MEMORY_AND_MASTER, COMMAND(%esi)
    movzwl ELSEWHERE+QUEUE_COUNT, %eax
    PRINT " on "
    PRINT_HEX %eax
    PRINT "\n"

    movl $0x5aa55aa5, IN_RAM+QUEUE_COUNT
    movl $IN_RAM, BAR0(%esi)            # over RAM: RAM stays
    PRINT "over RAM "
    PRINT_HEX IN_RAM+QUEUE_COUNT
    movl $ECAM, BAR0(%esi)              # over configuration space, which stays
    PRINT " over ECAM "
    PRINT_HEX ECAM
    movl $-1, BAR0(%esi)                # beyond all addresses
    movl $-1, BAR1(%esi)
    movl $ELSEWHERE, BAR0(%esi)
    movl $0, BAR1(%esi)
    movzwl ELSEWHERE+QUEUE_COUNT, %eax
    PRINT " back "
    PRINT_HEX %eax
    PRINT "\n"
    EXIT 0
