# Starts all other processors by INIT and two SIPIs to everyone. Each takes a number, says its local APIC id and halts.
# The command line says how many processors there are: three decimal digits.
    .include "prelude.inc"
    .include "lapic.inc"
    .include "trampoline.inc"

main:
    LAPIC_ENABLE
    mov start_info, %ebx
    mov 24(%ebx), %esi
    xor %eax, %eax
    mov $3, %ecx
1:  movzbl (%esi), %edx
    sub $'0', %edx
    imul $10, %eax
    add %edx, %eax
    inc %esi
    dec %ecx
    jnz 1b
    mov %eax, wanted

    PUT_TRAMPOLINE
    call here                           # first, so that the others come behind it
    START_OTHERS
2:  pause
    mov arrived, %eax
    cmp wanted, %eax
    jne 2b
3:  cmpl $0, lock_word                  # the last one may be printing
    jne 3b
    PRINT "all "
    PRINT_HEX arrived
    PRINT "\n"
    EXIT 0

# Says this processor's id and counts it. One at a time.
here:
1:  mov $1, %eax
    xchg %eax, lock_word
    test %eax, %eax
    jz 2f
    pause
    jmp 1b
2:  mov LAPIC_ID, %edx
    shr $24, %edx
    PRINT "processor "
    PRINT_HEX %edx
    PRINT "\n"
    lock incl arrived
    movl $0, lock_word
    ret

# Here other processors begin, one at a time on the same stack, since only one holds the lock.
other:
1:  mov $1, %eax
    xchg %eax, stack_lock
    test %eax, %eax
    jz 2f
    pause
    jmp 1b
2:  mov $(STACK - 0x8000), %esp
    movl $0x1ff, LAPIC_SPURIOUS
    call here
    movl $0, stack_lock
    jmp stop

    .data
    .balign 4
wanted:
    .long 0
arrived:
    .long 0
lock_word:
    .long 0
stack_lock:
    .long 0
