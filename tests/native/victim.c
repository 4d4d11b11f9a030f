/* A process that checks its own state hard while others attach to it.
 *
 * Usage: victim MODE SOCKET (a file descriptor)
 *   work      registers held over a busy loop, blocking calls with timeouts, a pipe, the
 *             signal mask, the alternate stack, over and over; signals are counted
 *   suspend   sigsuspend(2) for SIGRTMIN; each signal must end one call
 *   pause     pause(2), over and over; each signal must end one call
 *   nobody    work, as user 65534
 *   errno, kill, allow   work, under a seccomp filter that answers so to userfaultfd(2)
 * Prints "ready", then a line "LOOPS ERRORS INTERRUPTED RT USR1 ALARMS SUSPENDED RESULT" for each
 * command that it reads. ERRORS is a bit set of the checks that failed.
 *   s  status      a  start a 1 ms interval timer (SIGALRM)     A  stop it
 *   f  receive a file descriptor on SOCKET; RESULT is its number  x N  close fd N */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile unsigned long loops, errors, interrupted, rt_count, usr1_count, alarms, suspended;
static int channel[2], descriptor_socket;
static char alternate[65536];

static void check(int holds, int number) {
    if (!holds) errors |= 1ul << number;
}

static int64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

static void on_signal(int number) {
    char here;
    check(&here >= alternate && &here < alternate + sizeof alternate, 20);
    volatile unsigned long sum = 0;
    for (unsigned long i = 0; i < 3000; i++) sum += i; /* long enough to be met in here */
    check(sum == 3000ul * 2999 / 2, 21);
    if (number == SIGUSR1) usr1_count++;
    else if (number == SIGALRM) alarms++;
    else rt_count++;
}

/* General registers, SSE and x87 state and flags, held over a loop without memory accesses. */
static void check_sse(void) {
    unsigned char in[256], out[256];
    uint64_t general[4], cw = 0, sw = 0;
    double pushed = 1.0 / 3, popped = 0;
    for (int i = 0; i < 256; i++) in[i] = (unsigned char)(i * 7 + 3);
    __asm__ volatile(
        "fldl %[pushed]\n"
        "movdqu (%[in]), %%xmm0; movdqu 16(%[in]), %%xmm1; movdqu 32(%[in]), %%xmm2\n"
        "movdqu 48(%[in]), %%xmm3; movdqu 64(%[in]), %%xmm4; movdqu 80(%[in]), %%xmm5\n"
        "movdqu 96(%[in]), %%xmm6; movdqu 112(%[in]), %%xmm7; movdqu 128(%[in]), %%xmm8\n"
        "movdqu 144(%[in]), %%xmm9; movdqu 160(%[in]), %%xmm10; movdqu 176(%[in]), %%xmm11\n"
        "movdqu 192(%[in]), %%xmm12; movdqu 208(%[in]), %%xmm13; movdqu 224(%[in]), %%xmm14\n"
        "movdqu 240(%[in]), %%xmm15\n"
        "movabs $0x1122334455667788, %%r12; movabs $0x99aabbccddeeff00, %%r13\n"
        "movabs $0x0123456789abcdef, %%r14; movabs $0xfedcba9876543210, %%r15\n"
        "movq $0xabcdef, -64(%%rsp)\n" /* the red zone */
        "mov $300000, %%ecx\n"
        "1: stc\n"
        "jnc 2f\n"
        "dec %%ecx\n"
        "jnz 1b\n"
        "2: mov %%rcx, %[sw]\n"
        "cmpq $0xabcdef, -64(%%rsp)\n"
        "setne %b[cw]\n"
        "fstpl %[popped]\n"
        "movdqu %%xmm0, (%[out]); movdqu %%xmm1, 16(%[out]); movdqu %%xmm2, 32(%[out])\n"
        "movdqu %%xmm3, 48(%[out]); movdqu %%xmm4, 64(%[out]); movdqu %%xmm5, 80(%[out])\n"
        "movdqu %%xmm6, 96(%[out]); movdqu %%xmm7, 112(%[out]); movdqu %%xmm8, 128(%[out])\n"
        "movdqu %%xmm9, 144(%[out]); movdqu %%xmm10, 160(%[out]); movdqu %%xmm11, 176(%[out])\n"
        "movdqu %%xmm12, 192(%[out]); movdqu %%xmm13, 208(%[out]); movdqu %%xmm14, 224(%[out])\n"
        "movdqu %%xmm15, 240(%[out])\n"
        "mov %%r12, (%[general]); mov %%r13, 8(%[general])\n"
        "mov %%r14, 16(%[general]); mov %%r15, 24(%[general])\n"
        : [popped] "=m"(popped), [sw] "=&r"(sw), [cw] "+&r"(cw)
        : [in] "r"(in), [out] "r"(out), [general] "r"(general), [pushed] "m"(pushed)
        : "rcx", "r12", "r13", "r14", "r15", "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4",
          "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
    check(!memcmp(in, out, 256), 0);
    check(general[0] == 0x1122334455667788 && general[1] == 0x99aabbccddeeff00 &&
          general[2] == 0x0123456789abcdef && general[3] == 0xfedcba9876543210, 1);
    check(popped == pushed, 2);
    check(sw == 0 && cw == 0, 3);
}

__attribute__((target("avx"))) static void check_avx(void) {
    unsigned char in[128], out[128];
    for (int i = 0; i < 128; i++) in[i] = (unsigned char)(i * 5 + 1);
    __asm__ volatile(
        "vmovdqu (%0), %%ymm0; vmovdqu 32(%0), %%ymm7; vmovdqu 64(%0), %%ymm8; vmovdqu 96(%0), %%ymm15\n"
        "mov $300000, %%ecx\n"
        "1: dec %%ecx; jnz 1b\n"
        "vmovdqu %%ymm0, (%1); vmovdqu %%ymm7, 32(%1); vmovdqu %%ymm8, 64(%1); vmovdqu %%ymm15, 96(%1)\n"
        : : "r"(in), "r"(out) : "rcx", "memory", "cc", "xmm0", "xmm7", "xmm8", "xmm15");
    check(!memcmp(in, out, 128), 4);
}

__attribute__((target("avx512f"))) static void check_avx512(void) {
    unsigned char in[192], out[192];
    uint32_t mask = 0;
    for (int i = 0; i < 192; i++) in[i] = (unsigned char)(i * 3 + 9);
    __asm__ volatile(
        "vmovdqu64 (%1), %%zmm1; vmovdqu64 64(%1), %%zmm17; vmovdqu64 128(%1), %%zmm31\n"
        "mov $0xa5a5, %%ecx; kmovw %%ecx, %%k3\n"
        "mov $300000, %%ecx\n"
        "1: dec %%ecx; jnz 1b\n"
        "kmovw %%k3, %0\n"
        "vmovdqu64 %%zmm1, (%2); vmovdqu64 %%zmm17, 64(%2); vmovdqu64 %%zmm31, 128(%2)\n"
        : "=&r"(mask) : "r"(in), "r"(out) : "rcx", "memory", "cc", "xmm1", "xmm17", "xmm31", "k3");
    check(!memcmp(in, out, 192) && mask == 0xa5a5, 5);
}

/* A call that waits a millisecond: it ends by its timeout, or by a signal that we got. */
static void check_wait(int result, int expected, int expected_errno, int error, int64_t began, int number) {
    if (result == -1 && error == EINTR) {
        interrupted++;
        return;
    }
    check(result == expected && (expected >= 0 || error == expected_errno), number);
    check(now_ns() - began >= 1000000, number + 1);
}

static void check_calls(void) {
    struct timespec ms = {0, 1000000};
    sigset_t none;
    uint32_t word = 0;
    sigemptyset(&none);
    int64_t began = now_ns();
    int result = nanosleep(&ms, NULL);
    check_wait(result, 0, 0, errno, began, 6);
    began = now_ns();
    result = poll(NULL, 0, 1);
    check_wait(result, 0, 0, errno, began, 8);
    began = now_ns();
    result = ppoll(NULL, 0, &ms, &none);
    check_wait(result, 0, 0, errno, began, 10);
    began = now_ns();
    result = (int)syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &ms, NULL, 0);
    check_wait(result, -1, ETIMEDOUT, errno, began, 12);
}

static void check_pipe(void) {
    static uint64_t expected = 0;
    uint64_t got = 0;
    ssize_t n = read(channel[0], &got, sizeof got);
    if (n == -1 && errno == EINTR) {
        interrupted++;
        return;
    }
    check(n == sizeof got && got == expected, 14);
    expected = got + 1;
}

static void *feed(void *unused) {
    for (uint64_t n = 0;; n++) {
        usleep(700);
        if (write(channel[1], &n, sizeof n) != sizeof n) check(0, 15);
    }
    return unused;
}

static long receive_descriptor(void) {
    char byte, space[CMSG_SPACE(sizeof(int))];
    struct iovec vector = {&byte, 1};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    int number = -1;
    if (recvmsg(descriptor_socket, &message, 0) == 1 && CMSG_FIRSTHDR(&message))
        memcpy(&number, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof number);
    return number;
}

static void *commands(void *unused) {
    char line[80];
    while (fgets(line, sizeof line, stdin)) {
        long result = 0;
        struct itimerval timer = {{0, line[0] == 'a' ? 1000 : 0}, {0, line[0] == 'a' ? 1000 : 0}};
        if (line[0] == 'a' || line[0] == 'A') result = setitimer(ITIMER_REAL, &timer, NULL);
        if (line[0] == 'f') result = receive_descriptor();
        if (line[0] == 'x') result = close(atoi(line + 2));
        printf("%lu %lu %lu %lu %lu %lu %lu %ld\n", loops, errors, interrupted, rt_count, usr1_count, alarms,
               suspended, result);
        fflush(stdout);
    }
    _exit(0);
    return unused;
}

static void install_filter(uint32_t action) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) _exit(9);
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    descriptor_socket = atoi(argv[2]);
    const char *mode = argv[1];
    if (!strcmp(mode, "nobody") && (setgid(65534) || setuid(65534))) return 3;
    stack_t stack = {.ss_sp = alternate, .ss_size = sizeof alternate};
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    sigset_t blocked, all, mine, now;
    pthread_t thread;
    sigemptyset(&mine);
    sigaddset(&mine, SIGUSR2); /* a mask of its own, to see that it stays */
    sigfillset(&all);
    if (sigaltstack(&stack, NULL) || pipe(channel)) return 4;
    sigaction(SIGRTMIN, &action, NULL);
    sigaction(SIGALRM, &action, NULL);
    action.sa_flags |= SA_RESTART;
    sigaction(SIGUSR1, &action, NULL);
    pthread_sigmask(SIG_SETMASK, &all, &blocked); /* the other threads take no signals */
    pthread_create(&thread, NULL, commands, NULL);
    pthread_create(&thread, NULL, feed, NULL);
    if (!strcmp(mode, "suspend")) {
        sigaddset(&mine, SIGRTMIN);
        pthread_sigmask(SIG_SETMASK, &mine, NULL);
        sigset_t none;
        sigemptyset(&none);
        puts("ready");
        fflush(stdout);
        for (;;) {
            unsigned long before = rt_count;
            check(sigsuspend(&none) == -1 && errno == EINTR, 16);
            check(rt_count > before, 17);
            suspended++;
        }
    }
    pthread_sigmask(SIG_SETMASK, &mine, NULL);
    if (!strcmp(mode, "pause")) {
        puts("ready");
        fflush(stdout);
        for (;; suspended++) check(pause() == -1 && errno == EINTR, 22);
    }
    if (!strcmp(mode, "errno")) install_filter(SECCOMP_RET_ERRNO | EPERM);
    if (!strcmp(mode, "kill")) install_filter(SECCOMP_RET_KILL_PROCESS);
    if (!strcmp(mode, "allow")) install_filter(SECCOMP_RET_ALLOW);
    puts("ready");
    fflush(stdout);
    for (;; loops++) {
        check_sse();
        if (__builtin_cpu_supports("avx")) check_avx();
        if (__builtin_cpu_supports("avx512f")) check_avx512();
        check_calls();
        check_pipe();
        pthread_sigmask(SIG_SETMASK, NULL, &now);
        check(!memcmp(&now, &mine, 8), 18);
        stack_t found;
        sigaltstack(NULL, &found);
        check(found.ss_sp == alternate && found.ss_size == sizeof alternate && !found.ss_flags, 19);
    }
}
