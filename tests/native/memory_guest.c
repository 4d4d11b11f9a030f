/* Init of a Linux guest that fills memory, keeps auditing it, and gives it back when told to,
 * by lines on the serial port: "pop PAGES", "grow PAGES", "free". Modules are in /m, by order. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static volatile uint64_t *filled;
static volatile size_t pages;

static void *audit(void *unused) {
    for (;; usleep(300000)) {
        size_t bad = 0, count = pages;
        for (size_t i = 0; i < count && pages; i++) {
            volatile uint64_t *p = filled + i * 512;
            bad += p[0] != i + 77 || p[100] != i * 2654435761u + 1 || p[511] != ~(uint64_t)i;
        }
        if (pages) printf("AUDIT bad %zu of %zu\n", bad, count);
    }
    return unused;
}

static void *anonymous(size_t count) {
    void *p = mmap(NULL, count << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(p, count << 12, MADV_NOHUGEPAGE);
    return p;
}

static void command(const char *line) {
    size_t count = (size_t)atol(strchr(line, ' ') ? strchr(line, ' ') : "0");
    if (!strncmp(line, "pop ", 4)) {
        volatile uint64_t *p = anonymous(count);
        for (size_t i = 0; i < count; i++) {
            volatile uint64_t *q = p + i * 512;
            q[0] = i + 77;
            q[100] = i * 2654435761u + 1;
            q[511] = ~(uint64_t)i;
            for (int j = 200; j < 400; j++) q[j] = (uint64_t)rand() * (uint64_t)rand();
        }
        filled = p;
        pages = count;
    } else if (!strncmp(line, "grow ", 5)) {
        char *p = anonymous(count);
        for (size_t i = 0; i < count; i++) p[i << 12] = 1;
    } else if (!strcmp(line, "free")) {
        size_t count_now = pages;
        pages = 0;
        usleep(900000);
        munmap((void *)filled, count_now << 12);
    }
    printf("DONE %s\n", line);
}

static void online_memory(void) {
    const char *root = "/sys/devices/system/memory";
    DIR *blocks = opendir(root);
    struct dirent *entry;
    while (blocks && (entry = readdir(blocks))) {
        char path[300];
        snprintf(path, sizeof path, "%s/%s/state", root, entry->d_name);
        int fd = open(path, O_WRONLY);
        if (fd >= 0) {
            if (write(fd, "online_movable", 14) < 0) {}
            close(fd);
        }
    }
}

int main(void) {
    struct dirent **names;
    char line[99];
    int length = 0;
    mkdir("/proc", 0755), mkdir("/dev", 0755), mkdir("/sys", 0755);
    mount("proc", "/proc", "proc", 0, 0);
    mount("dev", "/dev", "devtmpfs", 0, 0);
    mount("sys", "/sys", "sysfs", 0, 0);
    int serial = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
    dup2(serial, 1);
    setvbuf(stdout, NULL, _IONBF, 0);
    int count = scandir("/m", &names, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        char path[300];
        snprintf(path, sizeof path, "/m/%s", names[i]->d_name);
        int fd = open(path, O_RDONLY);
        if (names[i]->d_name[0] != '.') syscall(SYS_finit_module, fd, "", 0);
        close(fd);
    }
    sleep(3);
    online_memory();
    pthread_t thread;
    pthread_create(&thread, NULL, audit, NULL);
    printf("READY\n");
    for (;;) {
        char c;
        if (read(serial, &c, 1) != 1) continue;
        if (c != '\n') {
            if (length < 98) line[length++] = c;
            continue;
        }
        line[length] = 0;
        length = 0;
        command(line);
    }
}
