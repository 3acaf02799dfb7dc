# Has virtio-rng fill a buffer of two parts, by polling, and prints it.
    .include "prelude.inc"
    .include "virtio.inc"

    .set SECOND, BUFFERS + 0x1000

main:
    mov $VIRTIO_RNG, %eax
    call virtio_open
    call virtio_start
    movl $0x11111111, SECOND+8          # behind the buffer: to stay
    DESCRIPTOR 0, BUFFERS, 8, NEXT|WRITE, 1
    DESCRIPTOR 1, SECOND, 8, WRITE
    xor %eax, %eax
    call virtio_submit
    call virtio_wait
    cmp $DONE, %eax
    REQUIRE je, "no answer"
    PRINT "used "
    PRINT_HEX USED+8                    # bytes written
    PRINT " random "
    PRINT_HEX BUFFERS
    PRINT_HEX BUFFERS+4
    PRINT_HEX SECOND
    PRINT_HEX SECOND+4
    PRINT " behind "
    PRINT_HEX SECOND+8
    PRINT "\n"
    EXIT 0
