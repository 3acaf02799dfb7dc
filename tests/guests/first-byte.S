# The smallest guest, by which a monitor's start is timed: one byte to the serial port, then the end of the run.
# It stands alone, so that nothing is executed before the byte.

    .section .note.pvh, "a", @note
    .long 4, 4, 18              # size of the name, of the descriptor, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start

    .text
    .code32
    .globl start
start:
    mov $0x3f8, %dx             # the serial port's transmitter
    mov $'H', %al
    out %al, %dx
    mov $0, %al
    out %al, $0xf4              # the debug-exit port: ends the run where it is configured
1:  cli
    hlt
    jmp 1b
