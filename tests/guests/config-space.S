# Writes all ones to every register of configuration space that is read-only, in every width, and looks whether any
# bit changed. Reads what is not there: all ones.
    .include "prelude.inc"
    .include "pci.inc"

    .set BEFORE, 0x200000
    .set HEADER, 64                     # bytes compared: the header; capabilities have writable registers

main:
    mov $0x10441af4, %eax
    call pci_find
    movw $0, COMMAND(%esi)

    mov %esi, %ebx
    mov $BEFORE, %edi
    mov $(HEADER / 4), %ecx
    cld
1:  mov (%ebx), %eax
    stosl
    add $4, %ebx
    dec %ecx
    jnz 1b

    xor %ecx, %ecx
2:  cmp $BAR0, %ecx                     # not the BARs, the command, and the two bytes that software may keep
    jb 3f
    cmp $0x28, %ecx
    jb 5f
3:  cmp $COMMAND, %ecx
    je 5f
    cmp $0x0c, %ecx
    je 5f
    cmp $0x3c, %ecx
    je 5f
    movl $-1, (%esi, %ecx)
    movw $-1, 2(%esi, %ecx)
    movb $-1, 3(%esi, %ecx)
5:  add $4, %ecx
    cmp $HEADER, %ecx
    jb 2b

    xor %ecx, %ecx
6:  mov (%esi, %ecx), %eax
    cmp BEFORE(%ecx), %eax
    je 7f
    PRINT "FAILED: changed at "
    PRINT_HEX %ecx
    PRINT " to "
    PRINT_HEX %eax
    PRINT "\n"
    EXIT FAILED
7:  add $4, %ecx
    cmp $HEADER, %ecx
    jb 6b
    PRINT "unchanged\n"

    movw $-1, COMMAND(%esi)
    movzwl COMMAND(%esi), %eax
    PRINT "command "
    PRINT_HEX %eax
    movw $-1, STATUS(%esi)
    movzwl STATUS(%esi), %eax
    PRINT " status "
    PRINT_HEX %eax
    PRINT "\n"
    PRINT "nobody "
    PRINT_HEX ECAM+31*0x8000
    PRINT " function 1 "
    PRINT_HEX 0x1000(%esi)
    PRINT " extended "
    PRINT_HEX 0x100(%esi)
    PRINT " across "
    PRINT_HEX 0xffe(%esi)               # two bytes of this function, two of the next, which is not there
    PRINT "\n"
    EXIT 0
