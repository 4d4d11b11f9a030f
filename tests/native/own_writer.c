/* A thread of the calling process that writes its memory in a known order, as writer.c does:
 * pass n writes n into the first and the last word of each page, in address order.
 * Made for tests that load it with ctypes; the interpreter's lock plays no part in it. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

struct writer {
    char *ram;
    size_t length;
    long pause_us; /* between pages; 0: full speed */
    volatile int pause_wanted, paused, end;
    volatile uint64_t pages;
    pthread_t thread;
};

static void *run(void *argument) {
    struct writer *w = argument;
    for (uint64_t pass = 1;; pass++) {
        for (size_t at = 0; at < w->length; at += 4096) {
            while (w->pause_wanted && !w->end) {
                w->paused = 1;
                usleep(20);
            }
            w->paused = 0;
            if (w->end) return NULL;
            *(volatile uint64_t *)(w->ram + at) = pass;
            *(volatile uint64_t *)(w->ram + at + 4088) = pass;
            w->pages++;
            if (w->pause_us) usleep((useconds_t)w->pause_us);
        }
    }
}

struct writer *writer_start(char *ram, size_t length, long pause_us) {
    struct writer *w = calloc(1, sizeof *w);
    w->ram = ram;
    w->length = length;
    w->pause_us = pause_us;
    if (pthread_create(&w->thread, NULL, run, w)) abort();
    return w;
}
void writer_pause(struct writer *w) {
    w->pause_wanted = 1;
    while (!w->paused) usleep(20);
}
void writer_continue(struct writer *w) { w->pause_wanted = 0; }
uint64_t writer_pages(struct writer *w) { return w->pages; }
void writer_end(struct writer *w) {
    w->end = 1;
    pthread_join(w->thread, NULL);
    free(w);
}

/* Some words at random pages, by the calling thread. */
void write_words(char *ram, const uint64_t *offsets, size_t count, uint64_t value) {
    for (size_t i = 0; i < count; i++) *(volatile uint64_t *)(ram + offsets[i]) = value;
}
