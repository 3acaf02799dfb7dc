# Plugs a block of memory by virtio-mem, uses it, unplugs it, and reads where it was. By the command line's first letter:
# "p" leaves it plugged; "w" writes to it then, which ends the run or is for nothing; "d" has a device write there.
    .include "prelude.inc"
    .include "virtio.inc"

    .set VIRTIO_MEM, 0x10581af4
    .set VIRTIO_MEM_SIZE, 24            # of a request
    .set ANSWER, BUFFERS + 0x100
    .set PLUG, 0
    .set UNPLUG, 1
    # Page tables of four levels (Intel SDM, volume 3, §4.5): a page directory for each GiB.
    .set TOP, 0x21f000
    .set POINTERS, 0x220000
    .set DIRECTORIES, 0x221000
    # Where the second but last GiB of addresses is: the first GiB of plugged memory, at 4 GiB.
    .set WINDOW, 0x80000000
    .set ADDRESS_EXTENSION, 1 << 5      # of CR4
    .set EFER, 0xc0000080
    .set LONG_MODE, 1 << 8              # of EFER
    .set PRESENT_WRITABLE, 3
    .set PRESENT_WRITABLE_LARGE, 0x83

# Sends a request for the first block. Changes %eax and %edx.
    .macro ASK kind
    movl $\kind, BUFFERS
    movl $0xffffffff, ANSWER
    DESCRIPTOR 0, BUFFERS, VIRTIO_MEM_SIZE, NEXT, 1
    DESCRIPTOR 1, ANSWER, 10, WRITE
    xor %eax, %eax
    call virtio_submit
    call virtio_wait
    cmp $DONE, %eax
    REQUIRE je, "no answer"
    .endm

main:
    call paging
    mov $VIRTIO_MEM, %eax
    call virtio_open
    call virtio_start
    movl $0, BUFFERS+4
    movl $0, BUFFERS+8                  # the address: 4 GiB
    movl $1, BUFFERS+12
    movl $1, BUFFERS+16                 # one block
    movl $0, BUFFERS+20
    PRINT "before "
    PRINT_HEX WINDOW
    PRINT "\n"
1:  ASK PLUG                            # until so much is asked for
    cmpw $0, ANSWER
    jne 1b
    movl $0x600df00d, WINDOW
    movl $0x600df00d, WINDOW + 0x1ffffc
    PRINT "plugged "
    PRINT_HEX WINDOW
    PRINT_HEX WINDOW + 0x1ffffc
    PRINT "\n"
    mov start_info, %eax
    mov 24(%eax), %eax                  # the command line
    cmpb $'p', (%eax)
    jne 2f
1:  hlt                                 # it stays plugged
    jmp 1b
2:  ASK UNPLUG
    PRINT "unplug "
    PRINT_HEX ANSWER
    PRINT " then "
    PRINT_HEX WINDOW
    PRINT_HEX WINDOW + 0x1ffffc
    PRINT "\n"
    mov start_info, %eax
    mov 24(%eax), %eax                  # the command line
    cmpb $'w', (%eax)
    je 2f
    cmpb $'d', (%eax)
    je 3f
    EXIT 0
2:  PRINT "writes\n"
    movl $1, WINDOW
    PRINT "reads "
    PRINT_HEX WINDOW
    PRINT "\n"
    EXIT 1
3:  DESCRIPTOR 0, BUFFERS, VIRTIO_MEM_SIZE, NEXT, 1
    DESCRIPTOR 1, 0, 10, WRITE, 0, 1    # its answer goes to where the block was
    xor %eax, %eax
    call virtio_submit
    call virtio_wait
    cmp $BROKEN, %eax
    REQUIRE je, "a device takes memory that is not plugged"
    PRINT "needs reset\n"
    EXIT 0

# Switches paging on, and with it the mode in which 32-bit code has page tables of four levels: addresses are what they
# were, but for the window. Changes all registers.
paging:
    mov $DIRECTORIES, %edi
    xor %eax, %eax                      # the address, its low and its high half
    xor %edx, %edx
1:  mov %eax, %ecx
    or $PRESENT_WRITABLE_LARGE, %ecx
    mov %ecx, (%edi)
    mov %edx, 4(%edi)
    add $8, %edi
    add $0x200000, %eax
    jnc 1b
    mov $DIRECTORIES + 0x2000, %edi     # the window's
    mov $512, %esi
    xor %eax, %eax
2:  mov %eax, %ecx
    or $PRESENT_WRITABLE_LARGE, %ecx
    mov %ecx, (%edi)
    movl $1, 4(%edi)
    add $8, %edi
    add $0x200000, %eax
    dec %esi
    jnz 2b
    mov $TOP, %edi
    xor %eax, %eax
    mov $2048, %ecx                     # all entries of both, empty
    rep stosl
    movl $POINTERS + PRESENT_WRITABLE, TOP
    movl $DIRECTORIES + PRESENT_WRITABLE, POINTERS
    movl $DIRECTORIES + 0x1000 + PRESENT_WRITABLE, POINTERS+8
    movl $DIRECTORIES + 0x2000 + PRESENT_WRITABLE, POINTERS+16
    movl $DIRECTORIES + 0x3000 + PRESENT_WRITABLE, POINTERS+24
    mov %cr4, %eax
    or $ADDRESS_EXTENSION, %eax
    mov %eax, %cr4
    mov $TOP, %eax
    mov %eax, %cr3
    mov $EFER, %ecx
    rdmsr
    or $LONG_MODE, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000000, %eax
    mov %eax, %cr0
    ret
