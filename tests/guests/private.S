# Makes memory private and shared by KVM's hypercall, in a VM whose memory begins shared. By the command line's first letter:
# "p" looks at what pages hold, "d" has a device write to private ones, "w" to ones that become private meanwhile, "r" asks for what cannot be, "x" hides its own code,
# and "b" takes the time of 1 GiB in steps of 2 MiB, and waits for a byte after each of its lines.
    .include "prelude.inc"
    .include "virtio.inc"
    .include "private.inc"

    .set ABOVE, 0x800000                # as much memory as there is, from 8 MiB on, and more
    .set REGISTERS, 0xfec00000          # of the I/O APIC
    .set ROUNDS, 300
    # What the time is taken of.
    .set FIRST, 0x40000000
    .set STEPS, 512
    .set STEP, 0x200000

main:
    mov start_info, %eax
    mov 24(%eax), %eax                  # the command line
    mov (%eax), %al
    cmp $'p', %al
    je pages
    cmp $'d', %al
    je device
    cmp $'w', %al
    je at_work
    cmp $'r', %al
    je refused
    cmp $'x', %al
    je hidden
    jmp time

pages:
    movl $0x11111111, PAGE - 0x1000
    movl $0x22222222, PAGE
    movl $0x33333333, PAGE + 0x1000
    movl $0x44444444, PAGE + 0x2000
    MAP PAGE, 2, PRIVATE                # after the first of a large page
    SAY "private", %eax
    PRINT_HEX "(PAGE - 0x1000)"
    PRINT_HEX PAGE
    PRINT_HEX "(PAGE + 0x1000)"
    PRINT_HEX "(PAGE + 0x2000)"
    PRINT "\n"
    movl $0x55555555, PAGE
    movl $0x66666666, PAGE + 0x1000
    MAP PAGE, 1, PRIVATE                # it is
    SAY "kept", PAGE
    MAP PAGE, 1, SHARED
    SAY "shared", PAGE
    SAY "its neighbour", "(PAGE + 0x1000)"
    movl $0x77777777, PAGE
    MAP PAGE, 1, PRIVATE
    SAY "private again", PAGE
    EXIT 0

device:
    OPEN_RNG
    RANDOM
    cmpl $0, PAGE
    REQUIRE jne, "the device wrote nothing"
    MAP PAGE, 1, PRIVATE
    RANDOM
    SAY "private", PAGE
    MAP PAGE, 1, SHARED
    SAY "shared", PAGE
    RANDOM
    MAP AVAILABLE, 1, PRIVATE           # a part of the ring
    RANDOM
    MAP AVAILABLE, 1, SHARED
    RANDOM
    EXIT 0

at_work:
    OPEN_RNG
    mov $ROUNDS, %edi
1:  call virtio_start
    DESCRIPTOR 0, PAGE, 0x4000, WRITE
    xor %eax, %eax
    call virtio_submit
    MAP (PAGE + 0x2000), 1, PRIVATE
    call virtio_wait
    cmp $DONE, %eax
    jne 2f
    incl whole
2:  cmpl $0, PAGE + 0x2000
    REQUIRE je, "a device wrote to private memory"
    MAP (PAGE + 0x2000), 1, SHARED
    dec %edi
    jnz 1b
    SAY "whole", whole
    EXIT 0

refused:
    MAP REGISTERS, 1, PRIVATE
    SAY "a device", %eax
    MAP REGISTERS, 1, SHARED
    SAY "shared", %eax
    MAP ABOVE, 0x100000, PRIVATE        # 4 GiB
    SAY "too much", %eax
    MAP PAGE, 0xffffffff, PRIVATE
    SAY "16 TiB", %eax
    MAP PAGE, 0, PRIVATE
    SAY "nothing", %eax
    MAP (PAGE + 8), 1, PRIVATE
    SAY "half a page", %eax
    movl $0x11111111, PAGE
    MAP PAGE, 1, SHARED
    SAY "as it was", PAGE
    EXIT 0

hidden:
    PRINT "hides\n"
    MAP 0x100000, 0x100, PRIVATE        # code, tables, stack
    EXIT 1

# Converts each step, and says how many ticks of the time stamp counter that took, as two words.
    .macro CONVERT text, attributes
    mov $\attributes, %edi
    call convert
    PRINT "\text "
    call ticks
    .endm

# Writes to each page.
    .macro TOUCH text
    call touch
    PRINT "\text "
    call ticks
    .endm

time:
    PRINT "begins\n"
    call wait
    CONVERT "private, empty", PRIVATE
    TOUCH "touched"
    CONVERT "shared, full", SHARED
    TOUCH "touched"
    CONVERT "private, full", PRIVATE
    TOUCH "touched"
    CONVERT "shared, full", SHARED
    EXIT 0

# %edi: attributes. Begins the ticks anew.
convert:
    call begin
    mov $FIRST, %ebx
    mov $STEPS, %esi
1:  mov $(STEP >> 12), %ecx
    mov %edi, %edx
    mov $MAP_GPA_RANGE, %eax
    vmmcall
    test %eax, %eax
    REQUIRE jz, "no conversion"
    add $STEP, %ebx
    dec %esi
    jnz 1b
    ret

# Begins the ticks anew.
touch:
    call begin
    mov $FIRST, %ebx
    mov $(STEPS * STEP >> 12), %ecx
1:  movl $1, (%ebx)
    add $0x1000, %ebx
    dec %ecx
    jnz 1b
    ret

begin:
    rdtsc
    mov %eax, began
    mov %edx, began + 4
    ret

ticks:
    rdtsc
    sub began, %eax
    sbb began + 4, %edx
    PRINT_HEX %edx
    PRINT_HEX %eax
    PRINT " ticks\n"
wait:
    mov $(COM1 + 5), %dx                # the line's status: bit 0 says that there is a byte
    in %dx, %al
    test $1, %al
    jz wait
    mov $COM1, %dx
    in %dx, %al
    ret

    .bss
    .balign 8
whole:
    .skip 4
began:
    .skip 8
