/* Where every vCPU starts, and how it waits.
 *
 * RDI: board information. RSI: number of the vCPU. RSP: top of its stack, 16-byte aligned, a zero
 * return address below (docs/design/board.md). The loader has cleared .bss.
 */
    .section .text.start, "ax", @progbits
    .globl _start
_start:
    xorl %ebp, %ebp
    movq %cr0, %rax                     /* SSE: EM off, MP on (Intel SDM 3A, 2.5) */
    andq $~4, %rax
    orq $2, %rax
    movq %rax, %cr0
    movq %cr4, %rax
    orq $0x600, %rax                    /* OSFXSR, OSXMMEXCPT */
    movq %rax, %cr4
    andq $-16, %rsp
    call board_start                    /* does not return */
1:  cli
    hlt
    jmp 1b

    .text
/* void idle(void). An interrupt between sti and hlt makes board_interrupt skip the hlt. */
    .globl idle, idle_halt, idle_end
idle:
    pushfq
    sti
idle_halt:
    hlt
idle_end:
    popfq
    ret

    .section .note.GNU-stack, "", @progbits
