# Takes processors as they come: starts each by INIT and SIPI, and has it say so and spin. Lets go of those that are to go.
# It asks the processors' registers again and again instead of waiting for their event.
    .include "prelude.inc"
    .include "lapic.inc"
    .include "trampoline.inc"

    .set INIT, 0x4500                   # INIT, asserted, to the destination
    .set START, 0x4600 | TRAMPOLINE_PAGE    # SIPI, to the destination
    .set NEXT, 0x6f8                    # what is asked: the processor, and the notification
    .set ANSWER, 0x6fc
    .set STATUS, 0x700                  # a byte for each processor
    .set CHECK, 1                       # the notification that one comes; any other here is that one is to go

main:
    LAPIC_ENABLE
    PUT_TRAMPOLINE
    PRINT "ready\n"
again:
    pause
    mov $NEXT, %dx
    in %dx, %eax
    cmp $-1, %eax
    je again
    movzbl %al, %ecx
    cmp $CHECK, %ah
    jne eject

    mov $ANSWER, %dx                    # status 0: all is well
    out %eax, %dx
    movl $0, arrived
    shl $24, %ecx                       # the numbers are the local APIC ids
    mov %ecx, LAPIC_COMMAND + 0x10
    movl $INIT, LAPIC_COMMAND
    movl $START, LAPIC_COMMAND
1:  pause
    cmpl $0, arrived
    je 1b
    jmp again

eject:
    PRINT "gave back "
    PRINT_HEX %ecx
    PRINT "\n"
    mov $STATUS, %edx
    add %ecx, %edx
    mov $1, %al
    out %al, %dx
    jmp again

# Here other processors begin, one at a time.
other:
    mov $(STACK - 0x8000), %esp
    mov LAPIC_ID, %edx
    shr $24, %edx
    PRINT "processor "
    PRINT_HEX %edx
    PRINT "\n"
    movl $1, arrived
2:  pause
    jmp 2b

    .data
    .balign 4
arrived:
    .long 0
