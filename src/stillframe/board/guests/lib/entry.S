/* Entry points of the exceptions (0-31) and of the interrupt lines (vectors 0x20-0x2f).
 *
 * The stack then has struct interrupt_frame (interrupts.c). SSE registers are kept, so that
 * handlers are ordinary C.
 */
#define VECTORS 48

    .text
    .set number, 0
    .rept VECTORS
    .balign 16
    .if number == 0
    .globl board_vectors
board_vectors:
    .endif
    /* these push an error code themselves (Intel SDM 3A, table 6-1) */
    .if number != 8 && number != 10 && number != 11 && number != 12 && number != 13 && number != 14 && number != 17 && number != 21
    pushq $0
    .endif
    pushq $number
    jmp common
    .set number, number + 1
    .endr

common:
    pushq %r15
    pushq %r14
    pushq %r13
    pushq %r12
    pushq %r11
    pushq %r10
    pushq %r9
    pushq %r8
    pushq %rbp
    pushq %rdi
    pushq %rsi
    pushq %rdx
    pushq %rcx
    pushq %rbx
    pushq %rax
    cld
    movq %rsp, %rdi
    movq %rsp, %rbp
    subq $512, %rsp
    andq $-16, %rsp
    fxsave64 (%rsp)
    call board_interrupt
    fxrstor64 (%rsp)
    movq %rbp, %rsp
    popq %rax
    popq %rbx
    popq %rcx
    popq %rdx
    popq %rsi
    popq %rdi
    popq %rbp
    popq %r8
    popq %r9
    popq %r10
    popq %r11
    popq %r12
    popq %r13
    popq %r14
    popq %r15
    addq $16, %rsp                      /* vector and error code */
    iretq

    .section .note.GNU-stack, "", @progbits
