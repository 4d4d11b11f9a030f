/* Write protection without userfaultfd: mprotect(2), and a SIGSEGV handler that turns a fault
 * into the message that a userfaultfd would give, in a pipe, so that one fault loop reads both.
 *
 * A thread that writes to a protected page lands in the handler: it puts the message into the
 * pipe of the range and waits until the page is un-protected; then the write runs again.
 *
 * Locking discipline:
 *   - `range` is changed under `lock`, which the handler never takes. A slot is only filled
 *     while it is inactive and no handler is between `inside` + 1 and `inside` - 1.
 *   - `word` is a table of generations, by 64 KiB of address: un-protecting bumps those of its
 *     range, after mprotect. A waiter reads its word before it sends the message, so the
 *     un-protecting that the message brings about cannot go by unseen.
 *   - the handler uses system calls, atomics and its own stack only; it saves errno, and may
 *     nest (SA_NODEFER), for instance when it is interrupted by a handler that faults.
 *
 * The handler stays installed, since a fault may be on its way to it at any moment. Whatever is
 * not ours goes to the handler that was there before, or to the default action. Limits: a thread
 * that blocks SIGSEGV and writes to protected RAM is killed by the kernel; and who installs a
 * handler of its own over ours while RAM is protected, and does not pass faults on, gets them.
 * After fork the child's faults are its own (the pid is compared); exec resets everything.
 */
#ifndef STILLFRAME_SIGNAL_FAULTS_H
#define STILLFRAME_SIGNAL_FAULTS_H

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "_capture_sys.h"

#define SF_SIGNAL_RANGES 64
#define SF_SIGNAL_WORDS 1024
#define SF_SIGNAL_SHIFT 16
#define SF_SIGNAL_STACK (64 << 10)
#define SF_ERR_WRITE 2 /* x86 page fault error code: it was a write */

struct sf_signal_range {
    uint64_t start, end;
    uint64_t active;
    int fd;
};

static struct {
    struct sf_signal_range range[SF_SIGNAL_RANGES];
    uint32_t word[SF_SIGNAL_WORDS];
    uint32_t waiters[SF_SIGNAL_WORDS];
    uint32_t inside;
    uint32_t passed; /* a fault has been passed on */
    uint32_t probe;
    pid_t pid;
    int installed;
    struct sigaction oldest, newest; /* what was there before us: at first, and lately */
    pthread_mutex_t lock;
    pthread_once_t once;
    pthread_key_t stack_key;
} sf_signals = {.lock = PTHREAD_MUTEX_INITIALIZER, .once = PTHREAD_ONCE_INIT};

#define SF_LOAD(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
#define SF_ADD(p, n) __atomic_fetch_add((p), (n), __ATOMIC_SEQ_CST)

static inline uint32_t sf_signal_slot(uint64_t address) {
    return (uint32_t)(address >> SF_SIGNAL_SHIFT) & (SF_SIGNAL_WORDS - 1);
}

/* --- un-protecting, for everybody but the handler ------------------------------------- */

static inline void sf_signal_wake(uint64_t hva, uint64_t length) {
    uint64_t first = hva >> SF_SIGNAL_SHIFT, last = (hva + length - 1) >> SF_SIGNAL_SHIFT;
    if (last - first >= SF_SIGNAL_WORDS) last = first + SF_SIGNAL_WORDS - 1;
    for (uint64_t n = first; n <= last; n++) {
        uint32_t i = (uint32_t)n & (SF_SIGNAL_WORDS - 1);
        /* Bump, then look for waiters; the waiter counts itself, then reads the word. Both
         * sequentially consistent: else we could miss the waiter, and it our bump. */
        SF_ADD(&sf_signals.word[i], 1u);
        if (SF_LOAD(&sf_signals.waiters[i]))
            syscall(SYS_futex, &sf_signals.word[i], FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
    }
}

static inline int sf_signal_protect(uint64_t hva, uint64_t length, int on) {
    if (mprotect((void *)(uintptr_t)hva, length, on ? PROT_READ : PROT_READ | PROT_WRITE) != 0)
        return -errno;
    /* After mprotect: who sees the new word and runs its write again finds the page writable. */
    if (!on) sf_signal_wake(hva, length);
    return 0;
}

/* --- the handler -------------------------------------------------------------------------- */

/* Whether memory can be written to by now: an atomic addition of nothing, made by the kernel,
 * which answers EFAULT where it cannot (futex(2), FUTEX_WAKE_OP; nobody waits at `probe`). */
static inline int sf_signal_writable(uint64_t address) {
    uint32_t add_nothing = (uint32_t)FUTEX_OP(FUTEX_OP_ADD, 0, FUTEX_OP_CMP_LT, 0);
    return syscall(SYS_futex, &sf_signals.probe, FUTEX_WAKE_OP_PRIVATE, 0l, 0l, address & ~3ull,
                   (unsigned long)add_nothing) >= 0;
}

/* 1: the write may run again; 0: the fault is not ours. */
static inline int sf_signal_serve(uint64_t address) {
    struct sf_uffd_msg message = {.event = 0x12, .arg0 = 3, .arg1 = address}; /* WRITE | WP */
    struct sf_signal_range *range = NULL;
    struct timespec patience = {1, 0}; /* then the write runs again, and tells anew */
    uint32_t i = sf_signal_slot(address), seen;
    ssize_t sent;
    /* From here on no slot is filled anew and no pipe is closed. */
    SF_ADD(&sf_signals.inside, 1u);
    for (int n = 0; n < SF_SIGNAL_RANGES && range == NULL; n++) {
        struct sf_signal_range *r = &sf_signals.range[n];
        if (SF_LOAD(&r->active) && r->start <= address && address < r->end) range = r;
    }
    if (range == NULL) {
        SF_ADD(&sf_signals.inside, -1u);
        /* It may have been ours at the moment of the fault, and released since. */
        return sf_signal_writable(address);
    }
    SF_ADD(&sf_signals.waiters[i], 1u);
    seen = SF_LOAD(&sf_signals.word[i]);
    /* After the word: a range that is released later bumps it after this. */
    if (SF_LOAD(&range->active) && sf_signal_writable(address)) {
        /* Un-protected between the fault and the reading of the word: that bump is past, and
         * nobody may read the pipe any more. */
        SF_ADD(&sf_signals.inside, -1u);
    } else if (SF_LOAD(&range->active)) {
        sent = write(range->fd, &message, sizeof message);
        SF_ADD(&sf_signals.inside, -1u);
        if (sent != (ssize_t)sizeof message) patience = (struct timespec){0, 1000000}; /* full */
        syscall(SYS_futex, &sf_signals.word[i], FUTEX_WAIT_PRIVATE, seen, &patience, NULL, 0);
    } else {
        SF_ADD(&sf_signals.inside, -1u);
    }
    SF_ADD(&sf_signals.waiters[i], -1u);
    return 1;
}

static inline void sf_signal_default(int number, const siginfo_t *info) {
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigaction(number, &action, NULL);
    /* A fault comes again by itself when we return; what kill(2) or raise(3) sent does not. */
    if (info->si_code <= 0) syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), number);
}

static inline void sf_signal_pass_on(int number, siginfo_t *info, void *context, int by_kernel) {
    struct sigaction *to = &sf_signals.newest;
    sigset_t mask, before;
    /* Who was installed over us may pass it back to us, by a call or by raising it again. */
    if (!by_kernel || (info->si_code <= 0 && SF_LOAD(&sf_signals.passed))) to = &sf_signals.oldest;
    if (!(to->sa_flags & SA_SIGINFO) && (to->sa_handler == SIG_DFL || to->sa_handler == SIG_IGN)) {
        /* A fault that is ignored kills too (sigaction(2)); a SIGSEGV that was sent does not. */
        if (to->sa_handler == SIG_DFL || info->si_code > 0) sf_signal_default(number, info);
        return;
    }
    mask = to->sa_mask;
    if (!(to->sa_flags & SA_NODEFER)) sigaddset(&mask, number);
    pthread_sigmask(SIG_BLOCK, &mask, &before);
    __atomic_store_n(&sf_signals.passed, 1u, __ATOMIC_SEQ_CST);
    struct sigaction was = *to;
    if (was.sa_flags & SA_RESETHAND) {
        to->sa_flags = 0;
        to->sa_handler = SIG_DFL;
    }
    if (was.sa_flags & SA_SIGINFO)
        was.sa_sigaction(number, info, context);
    else
        was.sa_handler(number);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void sf_signal_handler(int number, siginfo_t *info, void *context) {
    int saved = errno;
    const ucontext_t *user = context;
    /* The kernel puts the context right above its return address (Linux
     * arch/x86/include/asm/sigframe.h); another handler that calls us does not. */
    int by_kernel = (char *)context == (char *)__builtin_frame_address(0) + 16;
    int ours = info->si_code == SEGV_ACCERR && (user->uc_mcontext.gregs[REG_ERR] & SF_ERR_WRITE) &&
               getpid() == sf_signals.pid && sf_signal_serve((uint64_t)(uintptr_t)info->si_addr);
    if (!ours) sf_signal_pass_on(number, info, context, by_kernel);
    errno = saved;
}

/* --- set up --------------------------------------------------------------------------------- */

/* With `lock` held. Again at each range, since others may have been installed over us. */
static inline int sf_signal_install(void) {
    struct sigaction now, ours = {.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART};
    ours.sa_sigaction = sf_signal_handler;
    sigemptyset(&ours.sa_mask);
    if (sigaction(SIGSEGV, NULL, &now) != 0) return -errno;
    if (sf_signals.pid != getpid()) { /* a forked child begins anew: it has none of the ranges */
        sf_signals.inside = 0;
        memset(sf_signals.waiters, 0, sizeof sf_signals.waiters);
        memset(sf_signals.range, 0, sizeof sf_signals.range);
        sf_signals.pid = getpid();
    }
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == sf_signal_handler) return 0;
    sf_signals.newest = now;
    if (!sf_signals.installed) sf_signals.oldest = now;
    sf_signals.installed = 1;
    return sigaction(SIGSEGV, &ours, NULL) == 0 ? 0 : -errno;
}

static inline void sf_signal_await_outside(void) {
    while (SF_LOAD(&sf_signals.inside)) sched_yield();
}

/* Faults in the range are told to `fd` from now on. */
static inline int sf_signal_register(uint64_t hva, uint64_t length, int fd) {
    struct sf_signal_range *free_slot = NULL;
    pthread_mutex_lock(&sf_signals.lock);
    int rc = sf_signal_install();
    for (int n = 0; n < SF_SIGNAL_RANGES; n++) {
        struct sf_signal_range *r = &sf_signals.range[n];
        if (!r->active)
            free_slot = free_slot ? free_slot : r;
        else if (r->start < hva + length && hva < r->end)
            rc = -EBUSY;
    }
    if (rc == 0 && free_slot == NULL) rc = -ENOSPC;
    if (rc == 0) {
        sf_signal_await_outside();
        free_slot->start = hva;
        free_slot->end = hva + length;
        free_slot->fd = fd;
        /* Last: a handler that sees it active sees the rest. */
        __atomic_store_n(&free_slot->active, 1, __ATOMIC_SEQ_CST);
    }
    pthread_mutex_unlock(&sf_signals.lock);
    return rc;
}

/* Un-protect all ranges that are told to `fd`, forget them and wake whoever waits; on return
 * nobody writes to `fd` any more, so it can be closed. */
static inline int sf_signal_release(int fd) {
    int rc = 0;
    pthread_mutex_lock(&sf_signals.lock);
    for (int n = 0; n < SF_SIGNAL_RANGES; n++) {
        struct sf_signal_range *r = &sf_signals.range[n];
        if (!r->active || r->fd != fd) continue;
        if (mprotect((void *)(uintptr_t)r->start, r->end - r->start, PROT_READ | PROT_WRITE) != 0)
            rc = -errno;
        /* Inactive before the bump: a handler that still saw it active read the word before. */
        __atomic_store_n(&r->active, 0, __ATOMIC_SEQ_CST);
        sf_signal_wake(r->start, r->end - r->start);
    }
    sf_signal_await_outside();
    pthread_mutex_unlock(&sf_signals.lock);
    return rc;
}

/* --- the calling thread's alternate stack ------------------------------------------------------ */

static void sf_signal_free_stack(void *stack) {
    stack_t none = {.ss_flags = SS_DISABLE};
    sigaltstack(&none, NULL);
    munmap(stack, SF_SIGNAL_STACK);
}
static void sf_signal_make_key(void) { pthread_key_create(&sf_signals.stack_key, sf_signal_free_stack); }

/* Faults of this thread are handled on a stack of their own until it ends, and can be. */
static inline int sf_signal_prepare_thread(void) {
    stack_t stack;
    sigset_t segv;
    sigemptyset(&segv);
    sigaddset(&segv, SIGSEGV);
    pthread_sigmask(SIG_UNBLOCK, &segv, NULL);
    if (sigaltstack(NULL, &stack) != 0) return -errno;
    if (!(stack.ss_flags & SS_DISABLE)) return 0; /* it has one */
    pthread_once(&sf_signals.once, sf_signal_make_key);
    void *memory = mmap(NULL, SF_SIGNAL_STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) return -errno;
    stack = (stack_t){.ss_sp = memory, .ss_size = SF_SIGNAL_STACK};
    if (sigaltstack(&stack, NULL) != 0 || pthread_setspecific(sf_signals.stack_key, memory) != 0) {
        munmap(memory, SF_SIGNAL_STACK);
        return -ENOMEM;
    }
    return 0;
}
#endif
