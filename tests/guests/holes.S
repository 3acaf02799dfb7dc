# Reads and writes ports and addresses that belong to no one, in every width: reads give all ones, writes do nothing.
    .include "prelude.inc"

    .set PORT, 0x9000
    .set ADDRESS, 0xd8000000            # in the window for 32-bit BARs, where there is none

main:
    mov $PORT, %dx
    xor %eax, %eax
    out %al, %dx
    out %ax, %dx
    out %eax, %dx
    xor %eax, %eax
    in %dx, %al
    PRINT_HEX %eax
    PRINT " "
    xor %eax, %eax
    in %dx, %ax
    PRINT_HEX %eax
    PRINT " "
    xor %eax, %eax
    in %dx, %eax
    PRINT_HEX %eax
    PRINT "\n"

    movl $0, ADDRESS
    xor %eax, %eax
    mov ADDRESS, %al
    PRINT_HEX %eax
    PRINT " "
    xor %eax, %eax
    mov ADDRESS, %ax
    PRINT_HEX %eax
    PRINT " "
    mov ADDRESS, %eax
    PRINT_HEX %eax
    PRINT "\n"

    # An access that begins in the serial port and ends behind it, and one that begins before it.
    mov $(COM1 + 6), %dx
    in %dx, %eax
    mov $(COM1 - 2), %dx
    in %dx, %eax
    # The first bytes behind configuration space.
    mov 0xf0000000, %eax
    PRINT_HEX %eax
    PRINT "\n"
    EXIT 0
