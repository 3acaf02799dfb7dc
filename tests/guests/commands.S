# Says "ready", then reads from the serial port what to do: a letter.
#   o  switch off through ACPI's sleep control register     r  reset through ACPI's reset register
#   p  report a panic through pvpanic                       c  report a panic with a crash kernel through pvpanic
#   t  triple fault                                         q  end the run through the debug-exit port with 7
#   h  halt for ever with interrupts off
    .include "prelude.inc"

    .set LINE_STATUS, COM1 + 5
    .set SLEEP_CONTROL, 0x620
    .set RESET, 0x622
    .set PVPANIC, 0x505

main:
    PRINT "ready\n"
next:
    mov $LINE_STATUS, %dx
1:  in %dx, %al
    test $1, %al                        # a byte was received
    jz 1b
    mov $COM1, %dx
    in %dx, %al
    cmp $'o', %al
    je off
    cmp $'r', %al
    je reset
    cmp $'p', %al
    je panic
    cmp $'c', %al
    je crash
    cmp $'t', %al
    je triple_fault
    cmp $'q', %al
    je quit
    cmp $'h', %al
    je stop
    PRINT "what?\n"
    jmp next

off:
    mov $SLEEP_CONTROL, %dx
    mov $(1 << 5 | 5 << 2), %al         # sleep enable, type S5
    out %al, %dx
    jmp stop
reset:
    mov $RESET, %dx
    mov $1, %al
    out %al, %dx
    jmp stop
panic:
    mov $PVPANIC, %dx
    mov $1, %al
    out %al, %dx
    PRINT "after the panic\n"
    jmp next
crash:
    mov $PVPANIC, %dx
    mov $2, %al
    out %al, %dx
    PRINT "crash kernel\n"
    jmp next
triple_fault:
    lidt nothing
    ud2
quit:
    EXIT 7

    .data
nothing:
    .word 0
    .long 0
