# Works on a disk without a pause: writes a number to a sector, reads it back, and goes on with the next number, over 64
# sectors in turn. Ends the run where the disk gives back another number than it was given. Meanwhile it obeys letters
# from the serial port:
#   r  prints how many rounds it has done, and how many cycles of the time stamp counter passed at the most between two
#      looks at it since the last r; the counter is looked at all the time, also while the disk is waited for
#   q  ends the run
    .include "prelude.inc"
    .include "virtio.inc"

    .set IN, 0
    .set OUT, 1
    .set HEADER, BUFFERS                # type, reserved, sector
    .set STATUS_BYTE, BUFFERS + 0x10
    .set DATA, BUFFERS + 0x1000
    .set SECTOR, 512
    .set SECTORS, 64
    .set LINE_STATUS, COM1 + 5
    # Rounds between two looks at the serial port, which are exits.
    .set OFTEN, 16
    .set NMI, 2                         # clients of the API may send it

main:
    SET_GATE NMI, ignored
    mov $VIRTIO_BLOCK, %eax
    call virtio_open
    call virtio_start
    DESCRIPTOR 0, HEADER, 16, NEXT, 1
    DESCRIPTOR 2, STATUS_BYTE, 1, WRITE
    movl $0, HEADER+4
    movl $0, HEADER+12
    PRINT "ready\n"
    rdtsc
    mov %eax, looked
round:
    incl rounds
    mov rounds, %eax
    and $(SECTORS - 1), %eax
    mov %eax, HEADER+8
    mov rounds, %eax
    mov %eax, DATA
    movl $OUT, HEADER
    DESCRIPTOR 1, DATA, SECTOR, NEXT, 2
    call request
    movl $0, DATA
    movl $IN, HEADER
    DESCRIPTOR 1, DATA, SECTOR, NEXT|WRITE, 2
    call request
    mov DATA, %eax
    cmp rounds, %eax
    REQUIRE je, "the disk has lost a write"
    testl $(OFTEN - 1), rounds
    jnz round

    mov $LINE_STATUS, %dx
    in %dx, %al
    test $1, %al                        # a byte was received
    jz round
    mov $COM1, %dx
    in %dx, %al
    cmp $'q', %al
    je quit
    PRINT "rounds "
    PRINT_HEX rounds
    PRINT " longest "
    PRINT_HEX longest
    PRINT "\n"
    movl $0, longest
    rdtsc
    mov %eax, looked
    jmp round
quit:
    EXIT 0

ignored:
    INTERRUPT_RETURN

# Has the disk carry out what HEADER says, and looks at the counter until it has. Changes %eax and %edx.
request:
    movb $0xee, STATUS_BYTE
    xor %eax, %eax
    call virtio_submit
1:  rdtsc
    mov %eax, %edx
    sub looked, %edx
    mov %eax, looked
    cmp longest, %edx
    jbe 2f
    mov %edx, longest
2:  mov USED+2, %ax
    cmp AVAILABLE+2, %ax
    jne 1b
    cmpb $0, STATUS_BYTE
    REQUIRE je, "the disk has failed"
    ret

    .data
    .balign 4
rounds:
    .long 0
looked:                                 # the counter's low half when it was last looked at
    .long 0
longest:
    .long 0
    .text
