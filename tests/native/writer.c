/* A process that stands in for a VMM in tests of the capture core: one mapping, written in
 * a known order. Pass n writes n into the first word of each page, in address order.
 *
 * Usage: writer KIND MIB PAGES_PER_S; KIND is private, shared or hugetlb. Prints
 * "ADDRESS LENGTH FD" (FD -1 for private memory), then a line "PASSES LONGEST_GAP_US" for each
 * line that it reads; ends with its standard input. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static volatile uint64_t passes, longest_ns, writes;

static uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

static void *commands(void *unused) {
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        printf("%lu %lu %lu\n", passes, longest_ns / 1000, writes);
        fflush(stdout);
        if (line[0] == 'r') longest_ns = 0;
    }
    _exit(0);
    return unused;
}

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    size_t length = (size_t)atol(argv[2]) << 20;
    long pages_per_s = atol(argv[3]);
    int fd = -1;
    size_t page = 4096;
    if (strcmp(argv[1], "private")) {
        int huge = !strcmp(argv[1], "hugetlb");
        fd = memfd_create("writer", huge ? MFD_HUGETLB : 0);
        if (fd < 0 || ftruncate(fd, (off_t)length)) return 3;
        if (huge) page = 2 << 20;
    }
    char *ram = mmap(NULL, length, PROT_READ | PROT_WRITE, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
    if (ram == MAP_FAILED) return 4;
    madvise(ram, length, MADV_NOHUGEPAGE);
    size_t written = length - length / 4; /* the last quarter is never populated */
    written -= written % page;
    for (size_t at = 0; at < written; at += page) *(volatile uint64_t *)(ram + at) = 0;
    printf("%lu %zu %d\n", (unsigned long)ram, length, fd);
    fflush(stdout);
    pthread_t thread;
    pthread_create(&thread, NULL, commands, NULL);
    uint64_t last = now_ns(), began = last;
    for (uint64_t pass = 1;; pass++) {
        for (size_t at = 0; at < written; at += page) {
            *(volatile uint64_t *)(ram + at) = pass;
            writes++;
            uint64_t now = now_ns();
            if (now - last > longest_ns) longest_ns = now - last;
            last = now;
            while (pages_per_s && (now_ns() - began) < writes * 1000000000ull / (uint64_t)pages_per_s) {
                uint64_t then = now_ns();
                usleep(100);
                (void)then;
                last = now_ns();
            }
        }
        passes = pass;
    }
}
