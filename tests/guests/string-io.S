# String instructions: 5000 bytes to the serial port by one rep outsb (more than a page), and 16 from an unclaimed port.
    .include "prelude.inc"

    .set TEXT, 0x200000
    .set COUNT, 5000

main:
    mov $TEXT, %edi
    mov $COUNT, %ecx
    mov $'a', %al
1:  stosb
    inc %al
    cmp $'z', %al
    jbe 2f
    mov $'a', %al
2:  dec %ecx
    jnz 1b
    mov $TEXT, %esi
    mov $COUNT, %ecx
    mov $COM1, %dx
    rep outsb
    PRINT "\n"

    mov $TEXT, %edi
    movl $0, 12(%edi)
    mov $16, %ecx
    mov $0x9000, %dx
    rep insb
    PRINT_HEX TEXT+12
    PRINT "\n"
    EXIT 0
