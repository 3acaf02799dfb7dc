# Sends a text through port 0 of virtio-console, with an interrupt-free transmit queue.
    .include "prelude.inc"
    .include "virtio.inc"
main:
    mov $VIRTIO_CONSOLE, %eax
    call virtio_open
    call virtio_negotiate
    mov $1, %eax                        # port 0's transmit queue
    call virtio_queue
    call virtio_driver_ok
    DESCRIPTOR 0, text, 6, NEXT, 1
    DESCRIPTOR 1, text+6, text_length-6
    xor %eax, %eax
    call virtio_submit
    call virtio_wait
    cmp $DONE, %eax
    REQUIRE je, "no answer"
    PRINT "sent\n"
    EXIT 0

    .section .rodata
text:
    .ascii "hello from port 0\n"
    .set text_length, . - text
