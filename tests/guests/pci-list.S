# Lists the functions on bus 0: device number, device and vendor, class and revision, header type.
    .include "prelude.inc"
    .include "pci.inc"
main:
    xor %ecx, %ecx
    mov $ECAM, %esi
1:  mov (%esi), %eax
    cmp $-1, %eax
    je 2f
    PRINT_HEX %ecx
    PRINT " "
    PRINT_HEX %eax
    PRINT " "
    PRINT_HEX 8(%esi)
    PRINT " "
    PRINT_HEX 12(%esi)
    PRINT "\n"
2:  add $0x8000, %esi
    inc %ecx
    cmp $32, %ecx
    jne 1b
    EXIT 0
