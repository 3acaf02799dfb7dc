# Drives virtio-blk: prints the text in sector 0, writes one to sector 1, flushes, and reads it back. Then requests that
# a disk refuses: beyond its end, of an unknown type. Prints each request's status byte.
    .include "prelude.inc"
    .include "virtio.inc"

    .set IN, 0
    .set OUT, 1
    .set FLUSH, 4
    .set GET_ID, 8

    .set HEADER, BUFFERS                # type, reserved, sector
    .set STATUS_BYTE, BUFFERS + 0x10
    .set DATA, BUFFERS + 0x1000
    .set SECTOR, 512

# A request of a type on a sector. Its status comes in %eax.
    .macro REQUEST type, sector, high=0
    movl $\type, HEADER
    movl $0, HEADER+4
    movl $\sector, HEADER+8
    movl $\high, HEADER+12
    call request
    .endm

main:
    mov $VIRTIO_BLOCK, %eax
    call virtio_open
    call virtio_start
    mov structures + 4 * CFG_DEVICE, %edx
    PRINT "sectors "
    PRINT_HEX (%edx)
    PRINT "\n"

    DESCRIPTOR 0, HEADER, 16, NEXT, 1
    DESCRIPTOR 1, DATA, SECTOR, NEXT|WRITE, 2
    DESCRIPTOR 2, STATUS_BYTE, 1, WRITE
    REQUEST IN, 0
    PRINT "read "
    PRINT_HEX %eax
    PRINT " "
    movb $0, DATA+32
    mov $DATA, %esi
    call print
    PRINT "\n"

    mov $DATA, %edi
    mov $written, %esi
    mov $written_length, %ecx
    rep movsb
    DESCRIPTOR 1, DATA, SECTOR, NEXT, 2
    REQUEST OUT, 1
    PRINT "write "
    PRINT_HEX %eax
    PRINT "\n"

    DESCRIPTOR 0, HEADER, 16, NEXT, 2
    REQUEST FLUSH, 0
    PRINT "flush "
    PRINT_HEX %eax
    PRINT "\n"

    DESCRIPTOR 0, HEADER, 16, NEXT, 1
    DESCRIPTOR 1, DATA, SECTOR, NEXT|WRITE, 2
    movl $0, DATA
    REQUEST IN, 1
    PRINT "read "
    PRINT_HEX %eax
    PRINT " "
    mov $DATA, %esi
    call print
    PRINT "\n"

    REQUEST IN, 0x7fffffff
    PRINT "beyond the end "
    PRINT_HEX %eax
    REQUEST IN, 0xffffffff, 0xffffffff
    PRINT " "
    PRINT_HEX %eax
    PRINT "\n"
    REQUEST 0x1234, 0
    PRINT "unknown "
    PRINT_HEX %eax
    PRINT "\n"

    DESCRIPTOR 1, DATA, 20, NEXT|WRITE, 2
    REQUEST GET_ID, 0
    PRINT "id "
    PRINT_HEX %eax
    PRINT " "
    movb $0, DATA+20
    mov $DATA, %esi
    call print
    PRINT "\n"
    EXIT 0

request:
    movb $0xee, STATUS_BYTE
    xor %eax, %eax
    call virtio_submit
    call virtio_wait
    cmp $DONE, %eax
    REQUIRE je, "no answer"
    movzbl STATUS_BYTE, %eax
    ret

    .section .rodata
written:
    .asciz "written by the guest"
    .set written_length, . - written
