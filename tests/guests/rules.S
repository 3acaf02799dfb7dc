# Breaks virtio's rules, one after the other, on the device that the command line names by its first letter: the rng or
# the blk. After each break the device must need a reset, and work again after it. Then changes what is frozen while
# the device runs: nothing may come of it.
    .include "prelude.inc"
    .include "virtio.inc"

    .set HEADER, BUFFERS + 0x2000       # of a disk's request
    .set INVALID_HIGH, 0xb000           # the upper half of an address where no memory is

# Starts the device, has a routine break a rule, and looks what becomes of it.
    .macro RULE name, routine
    call virtio_start
    call \routine
    call virtio_wait
    PRINT "\name: "
    call verdict
    call works
    .endm

# Changes something that is frozen after DRIVER_OK, after which the device works as before.
    .macro FROZEN name, routine
    call virtio_start
    call \routine
    PRINT "\name: "
    call good_request
    call verdict
    .endm

main:
    mov start_info, %ebx
    mov 24(%ebx), %eax                  # the command line
    mov (%eax), %cl
    mov $VIRTIO_RNG, %eax
    cmp $'b', %cl
    jne 1f
    mov $VIRTIO_BLOCK, %eax
1:  mov %eax, device
    call virtio_open
    RULE "descriptor loop", descriptor_loop
    RULE "descriptor that follows itself", self_loop
    RULE "address outside memory", outside
    RULE "address that wraps around", wrap
    RULE "huge length", huge
    RULE "chain longer than 4 GiB", huge_sum
    RULE "head beyond the queue", far_head
    RULE "next beyond the queue", far_next
    RULE "available index jump", jump
    RULE "indirect not negotiated", indirect
    RULE "readable after writable", wrong_order
    RULE "ring outside memory", ring_outside
    FROZEN "ring moved while running", move_ring
    FROZEN "size changed while running", change_size
    FROZEN "queue enabled again", enable_again
    FROZEN "features changed while running", change_features
    PRINT "end\n"
    EXIT 0

# %eax: what virtio_wait returned.
verdict:
    cmp $DONE, %eax
    je 1f
    cmp $BROKEN, %eax
    je 2f
    PRINT "nothing happened\n"
    ret
1:  PRINT "served\n"
    ret
2:  PRINT "needs reset\n"
    ret

# Resets the device and does a proper request.
works:
    call virtio_start
    call good_request
    cmp $DONE, %eax
    REQUIRE je, "it does not work after the reset"
    ret

# A request that the device can serve. Returns as virtio_wait does.
good_request:
    cmpl $VIRTIO_BLOCK, device
    je 1f
    DESCRIPTOR 0, BUFFERS, 16, WRITE
    jmp 2f
1:  DESCRIPTOR 0, BUFFERS, 512, NEXT|WRITE, 1
    DESCRIPTOR 1, BUFFERS+0x1000, 1, WRITE
2:  call submit_first
    jmp virtio_wait

# What follows are chains from descriptor 0 on that are wrong in one way only. A disk's request needs a header in front of
# them: see submit_first. Their last byte is then the request's status.

descriptor_loop:
    DESCRIPTOR 0, BUFFERS, 16, NEXT|WRITE, 1
    DESCRIPTOR 1, BUFFERS+0x100, 16, NEXT|WRITE, 2
    DESCRIPTOR 2, BUFFERS+0x200, 16, NEXT|WRITE, 0
    jmp submit_first
self_loop:
    DESCRIPTOR 0, BUFFERS, 16, NEXT|WRITE, 0
    jmp submit_first
outside:
    DESCRIPTOR 0, BUFFERS, 16, WRITE, 0, INVALID_HIGH
    jmp submit_first
wrap:
    DESCRIPTOR 0, 0xfffffff0, 0x20, WRITE, 0, 0xffffffff
    jmp submit_first
huge:
    DESCRIPTOR 0, BUFFERS, 0xffffffff, WRITE
    jmp submit_first
huge_sum:
    .irp number, 0, 1, 2, 3, 4, 5
    DESCRIPTOR \number, 0x100000, 0xf0000000, NEXT|WRITE, \number+1
    .endr
    DESCRIPTOR 6, 0x100000, 0xf0000000, WRITE
    jmp submit_first
far_head:
    mov $RING_SIZE, %eax
    jmp virtio_submit
far_next:
    DESCRIPTOR 0, BUFFERS, 16, NEXT|WRITE, 0x7fff
    jmp submit_first
jump:
    DESCRIPTOR 0, BUFFERS, 16, WRITE
    call head
    .irp slot, 0, 1, 2, 3, 4, 5, 6, 7
    mov %ax, AVAILABLE+4+2*\slot
    .endr
    addw $1000, AVAILABLE+2
    jmp virtio_kick
indirect:
    DESCRIPTOR 0, BUFFERS, 16, INDIRECT|WRITE
    jmp submit_first
wrong_order:
    DESCRIPTOR 0, BUFFERS, 16, NEXT|WRITE, 1
    DESCRIPTOR 1, BUFFERS+0x100, 16
    jmp submit_first

# The ring is refused when it is enabled, so this one starts the device anew.
ring_outside:
    call virtio_negotiate
    movw $0, QUEUE_SELECT(%ebx)
    movw $RING_SIZE, QUEUE_SIZE(%ebx)
    movl $0xfffff000, QUEUE_DESCRIPTORS(%ebx)
    movl $INVALID_HIGH, QUEUE_DESCRIPTORS+4(%ebx)
    movl $AVAILABLE, QUEUE_AVAILABLE(%ebx)
    movl $0, QUEUE_AVAILABLE+4(%ebx)
    movl $USED, QUEUE_USED(%ebx)
    movl $0, QUEUE_USED+4(%ebx)
    movw $1, QUEUE_ENABLE(%ebx)
    movw $1, AVAILABLE+2
    movw $0, USED+2
    jmp virtio_driver_ok

move_ring:
    movl $0x300000, QUEUE_DESCRIPTORS(%ebx)
    movl $0x300000, QUEUE_AVAILABLE(%ebx)
    movl $0x300000, QUEUE_USED(%ebx)
    ret
change_size:
    movw $4, QUEUE_SIZE(%ebx)
    movzwl QUEUE_SIZE(%ebx), %eax
    cmp $RING_SIZE, %eax
    REQUIRE je, "the size changed"
    ret
enable_again:
    movw $1, QUEUE_ENABLE(%ebx)
    movw $0, QUEUE_ENABLE(%ebx)
    ret
change_features:
    movl $1, DRIVER_FEATURE_SELECT(%ebx)
    movl $0, DRIVER_FEATURE(%ebx)
    movb $(ACKNOWLEDGE | DRIVER), DEVICE_STATUS(%ebx)   # no bit may be cleared but by a reset
    ret

submit_first:
    call head
    jmp virtio_submit

# Returns in %eax the head of the chain that goes on with descriptor 0: descriptor 0 itself, and for a disk descriptor 7
# with the header of a read.
head:
    xor %eax, %eax
    cmpl $VIRTIO_BLOCK, device
    jne 1f
    movl %eax, HEADER                   # read
    movl %eax, HEADER+8                 # sector 0
    movl %eax, HEADER+12
    DESCRIPTOR 7, HEADER, 16, NEXT, 0
    mov $7, %eax
1:  ret

    .data
    .balign 4
device:
    .long 0
