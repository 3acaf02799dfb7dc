# Enters by the 64-bit Linux protocol, which an ELF kernel without a PVH note gets: long mode with paging, and the zero
# page at %rsi. Says so, and shows that its memory is mapped as it should be.

    .set ZERO_PAGE_HEADER, 0x202        # the signature in struct setup_header
    .text
    .code64
    .globl start
start:
    cmpl $0x53726448, ZERO_PAGE_HEADER(%rsi)
    jne bad
    mov %cs, %ax
    cmp $0x10, %ax                      # the selector that the protocol prescribes
    jne bad
    mov $0x200000, %ebx                 # memory beyond the kernel's own
    movabs $0x1122334455667788, %rax
    mov %rax, (%rbx)
    cmp (%rbx), %rax
    jne bad
    lea good(%rip), %rsi
    mov $0, %bl
    jmp say
bad:
    lea failed(%rip), %rsi
    mov $31, %bl
say:
    mov $0x3f8, %dx
1:  mov (%rsi), %al
    test %al, %al
    jz 2f
    out %al, %dx
    inc %rsi
    jmp 1b
2:  mov %bl, %al
    out %al, $0xf4
3:  cli
    hlt
    jmp 3b

    .section .rodata
good:
    .asciz "long mode\n"
failed:
    .asciz "FAILED: not as the protocol says\n"
