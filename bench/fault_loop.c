/* The fault path in plain C, to measure ours against, and the process that faults.
 *
 * fault_loop victim MIB
 *     Maps and fills private memory, prints "ADDRESS"; for each line "STRIDE COUNT" that it
 *     reads it writes one word every STRIDE bytes, COUNT times, and prints
 *     "P50_NS P99_NS FAULTS" of the writes that faulted.
 * fault_loop serve UFFD STOP_FD PID ADDRESS LENGTH WINDOW
 *     Serves write-protect faults until STOP_FD is readable: copies WINDOW bytes around the
 *     fault into a buffer that was allocated before, then un-protects them. No claims, no
 *     bounds, no statistics: the least that any fault path must do. */
#define _GNU_SOURCE
#include <linux/types.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct message { uint8_t event, pad[7]; uint64_t flags, address, rest; };
struct writeprotect { uint64_t start, length, mode; };
#define WRITEPROTECT _IOWR(0xAA, 0x06, struct writeprotect)

#define NO_FAULT_NS 2000 /* a write that meets no protection takes far less */

static uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

static int by_size(const void *left, const void *right) {
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

static int victim(size_t length) {
    char *ram = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED) return 3;
    madvise(ram, length, MADV_NOHUGEPAGE);
    memset(ram, 7, length);
    printf("%lu\n", (unsigned long)ram);
    fflush(stdout);
    size_t stride, count;
    while (scanf("%zu %zu", &stride, &count) == 2) {
        uint64_t *took = malloc(count * sizeof *took);
        memset(took, 0, count * sizeof *took);
        size_t faults = 0;
        for (size_t n = 0; n < count; n++) {
            uint64_t began = now_ns();
            *(volatile uint64_t *)(ram + n * stride) = began;
            took[faults] = now_ns() - began;
            if (took[faults] > NO_FAULT_NS) faults++;
        }
        qsort(took, faults, sizeof *took, by_size);
        if (!faults) printf("0 0 0\n");
        else printf("%lu %lu %zu\n", took[faults / 2], took[faults * 99 / 100], faults);
        fflush(stdout);
        free(took);
    }
    return 0;
}

static int serve(char **argument) {
    int uffd = atoi(argument[0]), stop_fd = atoi(argument[1]);
    pid_t pid = atoi(argument[2]);
    uint64_t base = strtoull(argument[3], NULL, 10), length = strtoull(argument[4], NULL, 10);
    uint64_t window = strtoull(argument[5], NULL, 10), used = 0;
    char *buffer = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    struct message messages[64];
    if (buffer == MAP_FAILED) return 3;
    setpriority(PRIO_PROCESS, 0, -15);
    puts("serving");
    fflush(stdout);
    for (;;) {
        ssize_t n = read(uffd, messages, sizeof messages);
        if (n <= 0) {
            struct pollfd fds[2] = {{uffd, POLLIN, 0}, {stop_fd, POLLIN, 0}};
            if (poll(fds, 2, -1) < 0 || fds[1].revents) return 0;
            continue;
        }
        for (ssize_t i = 0; i < n / (ssize_t)sizeof *messages; i++) {
            uint64_t start = base + (messages[i].address - base) / window * window;
            struct iovec local = {buffer + used, window}, remote = {(void *)start, window};
            struct writeprotect wp = {start, window, 0};
            if (process_vm_readv(pid, &local, 1, &remote, 1, 0) != (ssize_t)window) return 4;
            used = (used + window) % length;
            if (ioctl(uffd, WRITEPROTECT, &wp)) return 5;
        }
    }
}

int main(int argc, char **argv) {
    if (argc == 3 && !strcmp(argv[1], "victim")) return victim((size_t)atol(argv[2]) << 20);
    if (argc == 8 && !strcmp(argv[1], "serve")) return serve(argv + 2);
    return 2;
}
