/* A 32-bit process without a C library, which does nothing but pause(2). */
void _start(void) {
    for (;;) __asm__ volatile("int $0x80" ::"a"(29) : "memory");
}
