# Two processors make the same memory private and shared by KVM's hypercall, again and again, in a VM whose memory begins shared;
# then it is as the last call made it, for the guest and for a device. Then the machine is reset with memory that is private.
    .include "prelude.inc"
    .include "lapic.inc"
    .include "trampoline.inc"
    .include "virtio.inc"
    .include "private.inc"

    .set ROUNDS, 300
    .set RESET, 0x622

main:
    SAY "begins", PAGE
    LAPIC_ENABLE
    PUT_TRAMPOLINE
    START_OTHERS
1:  pause
    cmpl $0, arrived
    je 1b
    mov $ROUNDS, %edi
    call rounds
1:  pause
    cmpl $0, done
    je 1b
    MAP PAGE, 4, SHARED
    SAY "refused", refused
    SAY "shared", "(PAGE + 0x3000)"

    OPEN_RNG
    RANDOM
    cmpl $0, PAGE
    REQUIRE jne, "the device wrote nothing"
    MAP PAGE, 4, PRIVATE
    movl $0x11111111, PAGE
    SAY "private", PAGE
    mov $RESET, %dx                     # ACPI's reset register
    mov $1, %al
    out %al, %dx
    jmp stop

# Makes four pages private and shared, %edi times. What is refused is counted.
rounds:
1:  MAP PAGE, 4, PRIVATE
    test %eax, %eax
    jz 2f
    lock incl refused
2:  MAP (PAGE + 0x1000), 3, SHARED      # not the same range as the other's
    test %eax, %eax
    jz 3f
    lock incl refused
3:  dec %edi
    jnz 1b
    ret

# Here the other processor begins.
other:
    mov $(STACK - 0x8000), %esp
    movl $1, arrived
    mov $ROUNDS, %edi
    call rounds
    movl $1, done
    jmp stop

    .data
    .balign 4
arrived:
    .long 0
done:
    .long 0
refused:
    .long 0
