# Sends back what it receives on the serial port, until a "q". The command line says how it learns of input:
#   polled     it reads the line status register over and over
#   interrupt  it halts, and pin 4 of the I/O APIC wakes it
    .include "prelude.inc"
    .include "lapic.inc"

    .set INTERRUPT_ENABLE, COM1 + 1
    .set LINE_STATUS, COM1 + 5
    .set SERIAL_PIN, 4
    .set SERIAL_VECTOR, 0x44

main:
    mov start_info, %ebx
    mov 24(%ebx), %esi                  # the command line
    cmpb $'i', (%esi)
    je by_interrupt
    PRINT "polled\n"
1:  call drain
    jmp 1b

by_interrupt:
    SET_GATE SERIAL_VECTOR, received
    LAPIC_ENABLE
    IOAPIC_ROUTE SERIAL_PIN, SERIAL_VECTOR
    mov $INTERRUPT_ENABLE, %dx
    mov $1, %al                                         # received data available
    out %al, %dx
    PRINT "interrupt\n"
1:  sti
    hlt
    jmp 1b

received:
    push %eax
    push %edx
    call drain
    LAPIC_END
    pop %edx
    pop %eax
    INTERRUPT_RETURN

# Sends back all that has been received. Changes %eax and %edx.
drain:
    mov $LINE_STATUS, %dx
    in %dx, %al
    test $1, %al
    jz 1f
    mov $COM1, %dx
    in %dx, %al
    cmp $'q', %al
    je quit
    out %al, %dx
    jmp drain
1:  ret

quit:
    EXIT 0
