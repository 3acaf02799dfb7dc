# Shows what the monitor hands over by the PVH protocol: command line, memory map, initramfs and ACPI's root pointer.
    .include "prelude.inc"

    # struct hvm_start_info
    .set MAGIC, 0
    .set VERSION, 4
    .set MODULE_COUNT, 12
    .set MODULES, 16
    .set CMDLINE, 24
    .set RSDP, 32
    .set MEMORY_MAP, 40
    .set MEMORY_MAP_COUNT, 48

main:
    mov start_info, %ebx
    PRINT "magic "
    PRINT_HEX MAGIC(%ebx)
    PRINT " version "
    PRINT_HEX VERSION(%ebx)
    PRINT "\ncmdline "
    mov CMDLINE(%ebx), %esi
    call print
    PRINT "\n"

    mov MEMORY_MAP(%ebx), %edi
    mov MEMORY_MAP_COUNT(%ebx), %ecx
1:  PRINT "memory "                     # base, length, type
    PRINT_HEX 4(%edi)
    PRINT_HEX (%edi)
    PRINT " "
    PRINT_HEX 12(%edi)
    PRINT_HEX 8(%edi)
    PRINT " "
    PRINT_HEX 16(%edi)
    PRINT "\n"
    add $24, %edi
    dec %ecx
    jnz 1b

    cmpl $0, MODULE_COUNT(%ebx)
    je 2f
    mov MODULES(%ebx), %edi
    PRINT "initramfs of "
    PRINT_HEX 8(%edi)
    PRINT " begins with "
    mov (%edi), %edi
    PRINT_HEX (%edi)
    PRINT "\n"

2:  mov RSDP(%ebx), %edi
    PRINT "acpi "
    PRINT_HEX (%edi)
    PRINT_HEX 4(%edi)
    PRINT "\n"
    EXIT 0
