/* The QEMU guest agent, and a file system that it can freeze (option sf.agent=1).
 *
 * The disk whose serial number is AGENT_DISK is mounted at /data. The command `write` tells whether
 * a file there can be written: a process that was forked at the start does it, so that what waits
 * for the thaw is not the loop that measures, and no copies of its pages come to be.
 */
#ifndef SF_AGENT_H
#define SF_AGENT_H

#define AGENT_PORT "org.qemu.guest_agent.0"
#define AGENT_DISK "sf-data"
#define AGENT_FILE "/data/count"
#define AGENT_WRITE_US 1000000
#define AGENT_DEVICES 32
#define AGENT_PORTS 4 /* of each device; libvirt takes number 1 for the agent */

enum { SYS_write = 1, SYS_pipe = 22, SYS_execve = 59 };
enum { O_WRONLY = 1, O_CREAT = 0100 };

static volatile u64 *agent_written; /* how often, shared with the process that writes */
static long agent_requests = -1;    /* the end of a pipe: a byte asks for one write */
static u64 agent_asked, agent_asked_ticks;
static int agent_answer_due;

/* Whether a file of sysfs begins with `text`. */
static int agent_file_says(const char *path, const char *text)
{
    char content[64] = { 0 };
    long fd = syscall3(SYS_open, (long)path, 0, 0);
    if (fd < 0) return 0;
    syscall3(SYS_read, fd, (long)content, sizeof content - 1);
    syscall3(SYS_close, fd, 0, 0);
    const char *found = content;
    while (*text && *text == *found) text++, found++;
    return !*text;
}

static int agent_mount_disk(void)
{
    for (char letter = 'a'; letter <= 'z'; letter++) {
        char serial[] = "/sys/block/vd?/serial", device[] = "/dev/vd?";
        serial[13] = device[7] = letter;
        if (agent_file_says(serial, AGENT_DISK))
            return syscall6(SYS_mount, (long)device, (long)"/data", (long)"ext4", 0, 0, 0) == 0;
    }
    return 0;
}

/* The device of the agent's port into `path`. Its name becomes known some time after the driver. */
static int agent_find_port(struct line *path)
{
    for (int device = 0; device < AGENT_DEVICES; device++)
        for (int port = 0; port < AGENT_PORTS; port++) {
            struct line name = { .length = 0 };
            line_add_number(&name, "/sys/class/virtio-ports/vport", device);
            line_add_number(&name, "p", port);
            line_add(&name, "/name");
            if (!agent_file_says(name.text, AGENT_PORT)) continue;
            line_add_number(path, "/dev/vport", device);
            line_add_number(path, "p", port);
            return 1;
        }
    return 0;
}

static void agent_execute(void)
{
    struct line port = { .length = 0 };
    for (int tries = 0; !agent_find_port(&port); tries++) {
        if (tries == 500) fail("the guest agent's port does not appear");
        rest(20000);
    }
    for (int fd = 0; fd < 3; fd++) syscall3(SYS_open, (long)"/dev/null", O_RDWR, 0);
    const char *arguments[] = { "qemu-ga", "-m", "virtio-serial", "-p", port.text, "-t", "/run", 0 };
    const char *environment[] = { "LD_LIBRARY_PATH=/lib", "PATH=/bin", 0 };
    syscall3(SYS_execve, (long)"/bin/qemu-ga", (long)arguments, (long)environment);
    fail("cannot run the guest agent");
}

static void agent_write(long file, long requests)
{
    char request;
    while (syscall3(SYS_read, requests, (long)&request, 1) == 1) {
        u64 number = *agent_written + 1;
        if (syscall6(SYS_pwrite64, file, (long)&number, sizeof number, 0, 0, 0) != sizeof number
            || syscall3(SYS_fdatasync, file, 0, 0) < 0)
            fail("cannot write to /data");
        *agent_written = number;
    }
    for (;;) rest(1000000);
}

/* Before the memory is mapped, so that the processes it forks have none of it. */
static void agent_start(int wanted)
{
    if (!wanted) return;
    journal_prepare();
    syscall6(SYS_mount, (long)"sys", (long)"/sys", (long)"sysfs", 0, 0, 0);
    for (int tries = 0; !agent_mount_disk(); tries++) {
        if (tries == 500) fail("cannot mount the guest agent's disk");
        rest(20000);
    }
    if (syscall3(SYS_fork, 0, 0, 0) == 0) agent_execute();
    long page = syscall6(SYS_mmap, 0, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (page < 0) fail("no memory for the guest agent");
    agent_written = (volatile u64 *)page;
    int ends[2];
    long file = syscall3(SYS_open, (long)AGENT_FILE, O_WRONLY | O_CREAT, 0644);
    if (file < 0 || syscall3(SYS_pipe, (long)ends, 0, 0) < 0) fail("cannot write to /data");
    if (syscall3(SYS_fork, 0, 0, 0) == 0) agent_write(file, ends[0]);
    agent_requests = ends[1];
}

static int obey_platform(const char *command)
{
    if (agent_requests < 0 || !text_equal(command, "write")) return 0;
    agent_asked++;
    agent_asked_ticks = read_ticks();
    agent_answer_due = 1;
    syscall3(SYS_write, agent_requests, (long)"w", 1);
    return 1;
}

/* Answers `write`, as soon as everything that was asked for is written, or after a second. */
static void serve_platform(void)
{
    if (!agent_answer_due) return;
    int written = *agent_written >= agent_asked;
    if (!written && read_ticks() - agent_asked_ticks < AGENT_WRITE_US * clock.ticks_per_us) return;
    agent_answer_due = 0;
    uart_print(&uart, written ? "write ok\n" : "write held\n");
}

#endif
