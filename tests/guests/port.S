# Writes registers of a hot-plug port, and reads at once what became of them. Reads where there is no function, too.
    .include "prelude.inc"
    .include "pci.inc"

    .set BUSES, 0x18
    .set SLOT_CONTROL, 0x40 + 0x18      # the PCI Express capability is the first

main:
    mov $0x000c1b36, %eax
    call pci_find
    movl $-1, (%esi)
    movw $-1, COMMAND(%esi)
    movw $-1, STATUS(%esi)
    movb $0x2a, BUSES+1(%esi)
    movw $0x0200, SLOT_CONTROL(%esi)    # the power indicator blinks
    PRINT "port "
    PRINT_HEX (%esi)
    PRINT " "
    PRINT_HEX COMMAND(%esi)
    PRINT " header "
    PRINT_HEX 12(%esi)
    PRINT " buses "
    PRINT_HEX BUSES(%esi)
    PRINT " slot "
    PRINT_HEX SLOT_CONTROL(%esi)
    PRINT " next "
    PRINT_HEX 0x1000(%esi)
    PRINT " nobody "
    PRINT_HEX 0x2000(%esi)
    PRINT " extended "
    PRINT_HEX 0x100(%esi)
    PRINT "\n"
    EXIT 0
