/* Multiboot header, and the way from 32-bit protected mode into long mode.
 *
 * RAM is mapped one to one with 2 MiB pages, the first MAPPED_GIB of it. Interrupts stay off and
 * there is no IDT: an exception resets the machine.
 * Sources: Multiboot Specification 0.6.96, sections 3.1 and 3.2; Intel SDM volume 3A, 9.8.5.
 */
#define MAPPED_GIB 16
#define STACK_BYTES 65536

    .section .multiboot, "a"
    .align 4
    .long 0x1badb002
    .long 0x00000003                    /* page-aligned modules, memory information */
    .long -(0x1badb002 + 0x00000003)

    .text
    .code32
    .globl _start
_start:
    cli
    cld
    movl $stack_top, %esp
    movl %ebx, %esi                     /* multiboot information */

    movl $pdpt + 3, pml4
    xorl %ecx, %ecx                     /* page directory pointers: present, writable */
    movl $page_directories + 3, %eax
1:  movl %eax, pdpt(,%ecx,8)
    addl $4096, %eax
    incl %ecx
    cmpl $MAPPED_GIB, %ecx
    jne 1b

    xorl %ecx, %ecx                     /* 2 MiB pages: present, writable, large */
    movl $0x83, %eax
    xorl %edx, %edx
2:  movl %eax, page_directories(,%ecx,8)
    movl %edx, page_directories+4(,%ecx,8)
    addl $0x200000, %eax
    adcl $0, %edx
    incl %ecx
    cmpl $(MAPPED_GIB * 512), %ecx
    jne 2b

    movl %cr4, %eax
    orl $0x20, %eax                     /* PAE */
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx              /* EFER */
    rdmsr
    orl $0x100, %eax                    /* LME */
    wrmsr
    movl %cr0, %eax
    orl $0x80000001, %eax               /* PG, PE */
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $0x08, $long_mode

    .code64
long_mode:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $stack_top, %esp
    movl %esi, %edi
    call start

    .section .rodata
    .align 8
gdt:
    .quad 0
    .quad 0x00209a0000000000            /* code, 64 bits */
    .quad 0x0000920000000000            /* data */
gdt_pointer:
    .word . - gdt - 1
    .long gdt

    .bss
    .align 4096
pml4:               .skip 4096
pdpt:               .skip 4096
page_directories:   .skip 4096 * MAPPED_GIB
    .skip STACK_BYTES
stack_top:

    .section .note.GNU-stack, "", @progbits
