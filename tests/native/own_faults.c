/* Faults of all sorts in the calling process, for tests of the SIGSEGV handler. */
#define _GNU_SOURCE
#include <alloca.h>
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static char *fixable;
static volatile int fixed;
static sigjmp_buf escape;

/* --- a handler of somebody else's, which mends faults at `fixable` ------------------------- */

static void mend(void) {
    fixed++;
    mprotect(fixable, 4096, PROT_READ | PROT_WRITE);
}
static void on_fault_plain(int number) {
    (void)number;
    mend();
}
static void on_fault(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    if (info->si_addr != fixable + 8) abort();
    mend();
}
static void on_fault_escape(int number, siginfo_t *info, void *context) {
    (void)number, (void)info, (void)context;
    fixed++;
    siglongjmp(escape, 1);
}
static struct sigaction below;
static void on_fault_calls_below(int number, siginfo_t *info, void *context) {
    fixed++;
    if (below.sa_flags & SA_SIGINFO)
        below.sa_sigaction(number, info, context);
    else
        signal(number, SIG_DFL);
}

int install(const char *kind) {
    struct sigaction action = {.sa_flags = SA_SIGINFO};
    action.sa_sigaction = on_fault;
    if (!strcmp(kind, "plain")) action = (struct sigaction){.sa_handler = on_fault_plain};
    if (!strcmp(kind, "escape")) action.sa_sigaction = on_fault_escape;
    if (!strcmp(kind, "below")) action.sa_sigaction = on_fault_calls_below;
    return sigaction(SIGSEGV, &action, &below);
}

/* A fault that the handler above mends; how many it has mended. */
int fault_and_be_mended(void) {
    if (!fixable) fixable = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(fixable, 4096, PROT_READ);
    if (!sigsetjmp(escape, 1)) *(volatile char *)(fixable + 8) = 1;
    return fixed;
}

/* --- faults that nobody mends ----------------------------------------------------------------- */

void fault(const char *kind) {
    if (!strcmp(kind, "null")) *(volatile int *)8 = 1;
    char *page = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!strcmp(kind, "read-only")) *(volatile char *)page = 1;
    mprotect(page, 4096, PROT_READ | PROT_WRITE);
    if (!strcmp(kind, "execute")) ((void (*)(void))page)();
    mprotect(page, 4096, PROT_NONE);
    if (!strcmp(kind, "no-access")) *(volatile char *)page;
}

/* --- threads of a special sort -------------------------------------------------------------------- */

struct special {
    char *at;
    int (*prepare)(void);
    int blocks;
};

/* Less than any processor's signal frame: what else would be left may hold one without AVX-512. */
#define LEFT_BYTES 512

static __attribute__((noinline)) void write_near_the_end(char *at, char *low) {
    char here;
    size_t room = (size_t)(&here - low) - LEFT_BYTES;
    char *taken = alloca(room);
    taken[0] = taken[room - 1] = 0;
    __asm__ volatile("" : : "r"(taken) : "memory");
    *(volatile char *)at = 7;
}
static void *run(void *argument) {
    struct special *special = argument;
    pthread_attr_t attributes;
    void *low;
    size_t size;
    if (special->blocks) {
        sigset_t mask;
        sigfillset(&mask);
        pthread_sigmask(SIG_BLOCK, &mask, NULL);
    }
    if (special->prepare && special->prepare()) abort();
    if (special->blocks) {
        *(volatile char *)special->at = 7;
        return NULL;
    }
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &low, &size);
    pthread_attr_destroy(&attributes);
    write_near_the_end(special->at, low);
    return NULL;
}

/* Write by a thread that has hardly any stack left, or that blocks all signals. `prepare` is
 * called in that thread, if it is not NULL. */
int write_by_special_thread(char *at, int (*prepare)(void), int blocks) {
    struct special special = {at, prepare, blocks};
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 256 << 10);
    int rc = pthread_create(&thread, &attributes, run, &special);
    pthread_attr_destroy(&attributes);
    return rc ? rc : pthread_join(thread, NULL);
}

/* errno after a write that faults. */
int errno_after_write(char *at) {
    errno = 77;
    *(volatile char *)at = 7;
    return errno;
}
