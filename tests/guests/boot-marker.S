# Boots as far as a guest can: reads an absent clock, finds PCI, runs a virtio-rng, and says on the marker port that it
# is in user space. What it does after that is none of the boot.
    .include "prelude.inc"
    .include "virtio.inc"

    .set CLOCK, 0x71
    .set BOOT_MARKER, 0x508

main:
    mov $7, %ecx
1:  in $CLOCK, %al
    loop 1b
    mov $VIRTIO_RNG, %eax
    call virtio_open
    call virtio_start
    PRINT "up\n"
    mov $BOOT_MARKER, %dx
    mov $1, %al
    out %al, %dx
    in $CLOCK, %al
    PRINT "after\n"
    EXIT 0
