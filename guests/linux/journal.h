/* Workers that write the same sequence number to RAM and to two disks, O_DIRECT and now and then
 * flushed (option sf.journal=WORKERS); or a load only (sf.load=WORKERS sf.load_disks=DISKS).
 *
 * Each has a page of RAM, and on each disk a ring of blocks of its own. It notes in RAM what it is
 * about to write (intent), writes it to one disk, notes that it is there (done), then the other. So
 * at one instant the newest block of a ring is not older than done and not newer than intent, and
 * the blocks before it are all there. guests/journal.py looks at a snapshot so. The worker itself
 * reads each block back before it writes the next, and complains.
 */
#ifndef SF_JOURNAL_H
#define SF_JOURNAL_H

#define JOURNAL_MAGIC 0x4c414e52554f4a46ULL /* "FJOURNAL" */
#define JOURNAL_RING 64
#define JOURNAL_DISKS 2
#define JOURNAL_FLUSH_EVERY 8

enum { SYS_lseek = 8, SEEK_END = 2, SYS_pread64 = 17, SYS_pwrite64 = 18, SYS_fork = 57, SYS_fdatasync = 75, SYS_finit_module = 313 };
enum { O_RDWR = 2, O_DIRECT = 0x4000, MAP_SHARED = 1 };

struct journal_page {
    u64 magic, worker, workers, intent, done[JOURNAL_DISKS];
    u64 unused[PAGE_WORDS - 6];
};

static void journal_complain(const char *what, u64 worker, u64 disk, u64 expected, u64 found)
{
    struct line line = { .length = 0 };
    line_add(&line, "\njournal FAILED: ");
    line_add(&line, what);
    line_add_number(&line, " worker=", worker);
    line_add_number(&line, " disk=", disk);
    line_add_number(&line, " expected=", expected);
    line_add_number(&line, " found=", found);
    line_add(&line, "\n");
    for (;;) {
        print_now(line.text);
        rest(1000000);
    }
}

static u64 journal_offset(u64 worker, u64 number)
{
    return (worker * JOURNAL_RING + number % JOURNAL_RING) * PAGE_BYTES;
}

/* `block` is a page of its own, so that O_DIRECT has the alignment it needs. */
static void journal_work(volatile struct journal_page *page, volatile u64 *block, const long *disks)
{
    u64 worker = page->worker;
    for (u64 number = 1;; number++) {
        page->intent = number;
        for (u64 disk = 0; disk < JOURNAL_DISKS; disk++) {
            if (number > 1) {
                u64 before = journal_offset(worker, number - 1);
                if (syscall6(SYS_pread64, disks[disk], (long)block, PAGE_BYTES, before, 0, 0) != PAGE_BYTES)
                    journal_complain("read error", worker, disk, number - 1, 0);
                for (u64 word = 0; word < PAGE_WORDS; word++)
                    if (block[word] != number - 1)
                        journal_complain("wrong block", worker, disk, number - 1, block[word]);
            }
            for (u64 word = 0; word < PAGE_WORDS; word++) block[word] = number;
            if (syscall6(SYS_pwrite64, disks[disk], (long)block, PAGE_BYTES, journal_offset(worker, number), 0, 0)
                != PAGE_BYTES)
                journal_complain("write error", worker, disk, number, 0);
            page->done[disk] = number;
            if (number % JOURNAL_FLUSH_EVERY == 0 && syscall3(SYS_fdatasync, disks[disk], 0, 0) < 0)
                journal_complain("flush error", worker, disk, number, 0);
        }
    }
}

static void journal_load_modules(void)
{
    for (int number = 0; number < 32; number++) {
        char path[] = "/modules/00";
        path[9] = '0' + number / 10;
        path[10] = '0' + number % 10;
        long fd = syscall3(SYS_open, (long)path, 0, 0);
        if (fd < 0) return;
        syscall3(SYS_finit_module, fd, (long)"", 0);
        syscall3(SYS_close, fd, 0, 0);
    }
}

static long journal_open_disk(u64 disk)
{
    char virtio[] = "/dev/vda", scsi[] = "/dev/sda";
    virtio[7] += disk;
    scsi[7] += disk;
    for (int tries = 0; tries < 500; tries++) {
        long fd = syscall3(SYS_open, (long)virtio, O_RDWR | O_DIRECT, 0);
        if (fd < 0) fd = syscall3(SYS_open, (long)scsi, O_RDWR | O_DIRECT, 0);
        if (fd >= 0) return fd;
        rest(20000);
    }
    fail("the journal's disks do not appear");
    return -1;
}

static void journal_prepare(void)
{
    static int prepared;
    if (prepared++) return;
    syscall6(SYS_mount, (long)"dev", (long)"/dev", (long)"devtmpfs", 0, 0, 0);
    journal_load_modules();
}

static void journal_start(u64 workers)
{
    if (!workers) return;
    journal_prepare();
    long disks[JOURNAL_DISKS];
    for (u64 disk = 0; disk < JOURNAL_DISKS; disk++) disks[disk] = journal_open_disk(disk);
    /* Linux names SCSI disks as it finds them, in any order; the second one is the larger one. */
    if (syscall3(SYS_lseek, disks[0], 0, SEEK_END) > syscall3(SYS_lseek, disks[1], 0, SEEK_END)) {
        long first = disks[0];
        disks[0] = disks[1];
        disks[1] = first;
    }
    long pages = syscall6(SYS_mmap, 0, 2 * workers * PAGE_BYTES, PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (pages < 0) fail("no memory for the journal");
    for (u64 worker = 0; worker < workers; worker++) {
        volatile struct journal_page *page = (void *)(pages + worker * 2 * PAGE_BYTES);
        page->worker = worker;
        page->workers = workers;
        page->magic = JOURNAL_MAGIC;
        if (syscall3(SYS_fork, 0, 0, 0) == 0) journal_work(page, (volatile u64 *)page + PAGE_WORDS, disks);
    }
}

/* Processes that write to disks and do nothing else: a request of each is in flight at any time. */
static void load_start(u64 workers, u64 disks)
{
    if (!workers) return;
    journal_prepare();
    for (u64 worker = 0; worker < workers; worker++) {
        long disk = journal_open_disk(worker % disks);
        long page = syscall6(SYS_mmap, 0, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        if (page < 0) fail("no memory for the load");
        if (syscall3(SYS_fork, 0, 0, 0) == 0)
            for (;;) syscall6(SYS_pwrite64, disk, page, PAGE_BYTES, worker * PAGE_BYTES, 0, 0);
    }
}

#endif
