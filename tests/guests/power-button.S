# Waits, halted, for a press of the power button: an interrupt of the generic event device. Says so, and switches off,
# unless the command line is "ignore".
    .include "prelude.inc"
    .include "lapic.inc"

    .set EVENTS, 0x624                  # reading tells what happened, and clears it
    .set SLEEP_CONTROL, 0x620
    .set POWER_BUTTON, 1
    .set EVENT_PIN, 9
    .set EVENT_VECTOR, 0x49

main:
    SET_GATE EVENT_VECTOR, pressed
    LAPIC_ENABLE
    IOAPIC_ROUTE EVENT_PIN, EVENT_VECTOR
    PRINT "ready\n"
1:  sti
    hlt
    jmp 1b

pressed:
    mov $EVENTS, %dx
    in %dx, %eax
    PRINT "event "
    PRINT_HEX %eax
    in %dx, %eax
    PRINT " then "
    PRINT_HEX %eax
    PRINT "\n"
    mov start_info, %ebx
    mov 24(%ebx), %esi                  # the command line
    cmpb $'i', (%esi)
    je 1f
    mov $SLEEP_CONTROL, %dx
    mov $(1 << 5 | 5 << 2), %al         # sleep enable, type S5
    out %al, %dx
1:  LAPIC_END
    INTERRUPT_RETURN
