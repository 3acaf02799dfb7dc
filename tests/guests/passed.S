# Drives a function of the host's (QEMU's "edu", docs/specs/edu.rst) that copies between its buffer and memory, in a VM whose memory
# begins shared: what the function writes to arrives while the page is shared, and does not while it is private.
    .include "prelude.inc"
    .include "virtio.inc"
    .include "private.inc"

    .set EDU, 0x11e81234                # vendor in bits 15:0, device in bits 31:16
    # Registers of its BAR.
    .set FROM, 0x80
    .set TO, 0x88
    .set COUNT, 0x90
    .set GO, 0x98
    .set BUFFER, 0x40000                # an address of the function's
    .set START, 1                       # it is 0 when the copy is done
    .set TO_MEMORY, 2

# Has the function copy eight bytes and waits until it has. %edi: its BAR.
    .macro COPY from, to, direction
    movl $\from, FROM(%edi)
    movl $\to, TO(%edi)
    movl $8, COUNT(%edi)
    movl $(START | \direction), GO(%edi)
1:  pause
    testl $START, GO(%edi)
    jnz 1b
    .endm

main:
    mov $EDU, %eax
    call pci_find
    mov BAR0(%esi), %edi                # 32 bits wide, and where the monitor has put it
    and $~0xf, %edi
    movw $MEMORY_AND_MASTER, COMMAND(%esi)
    SAY "who", 0(%edi)
    movl $0x11111111, PAGE
    COPY PAGE, BUFFER, 0
    COPY BUFFER, (PAGE + 0x1000), TO_MEMORY
    SAY "shared", "(PAGE + 0x1000)"

    MAP (PAGE + 0x1000), 1, PRIVATE
    movl $0x22222222, PAGE + 0x1000
    COPY BUFFER, (PAGE + 0x1000), TO_MEMORY
    SAY "private", "(PAGE + 0x1000)"
    COPY BUFFER, (PAGE + 0x2000), TO_MEMORY
    SAY "its neighbour", "(PAGE + 0x2000)"

    MAP (PAGE + 0x1000), 1, SHARED
    SAY "emptied", "(PAGE + 0x1000)"
    COPY BUFFER, (PAGE + 0x1000), TO_MEMORY
    SAY "shared again", "(PAGE + 0x1000)"
    EXIT 0
