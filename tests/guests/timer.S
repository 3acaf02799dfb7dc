# Halts, is woken by the timer of its local APIC three times, and powers off.
    .include "prelude.inc"
    .include "lapic.inc"

    .set TIMER_VECTOR, 0x40

main:
    SET_GATE TIMER_VECTOR, tick
    LAPIC_ENABLE
    movl $11, LAPIC_DIVIDE              # count at the bus clock itself
    movl $TIMER_VECTOR, LAPIC_TIMER     # one shot
    mov $3, %ebx
1:  movl $10000000, LAPIC_COUNT
    sti
    hlt
    cli
    PRINT "awake after "
    PRINT_HEX ticks
    PRINT " ticks\n"
    dec %ebx
    jnz 1b
    EXIT 0

tick:
    incl ticks
    LAPIC_END
    INTERRUPT_RETURN

    .data
ticks:
    .long 0
