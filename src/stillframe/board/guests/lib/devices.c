/* Entropy and disk: devices that write guest RAM by themselves. */
#include "library.h"

u32 random_word(void)
{
    return in32(PORT_ENTROPY);
}

void entropy_start(void *to, u32 length_bytes)
{
    out32(PORT_ENTROPY_LOW, (u32)(u64)to);
    out32(PORT_ENTROPY_HIGH, (u64)to >> 32);
    out32(PORT_ENTROPY_LENGTH, length_bytes);
}

u32 entropy_left(void)
{
    return in32(PORT_ENTROPY_LENGTH);
}

void disk_start(u32 command, u64 sector, const void *memory, u32 sectors)
{
    out32(PORT_DISK_SECTOR_LOW, (u32)sector);
    out32(PORT_DISK_SECTOR_HIGH, sector >> 32);
    out32(PORT_DISK_ADDRESS_LOW, (u32)(u64)memory);
    out32(PORT_DISK_ADDRESS_HIGH, (u64)memory >> 32);
    out32(PORT_DISK_COUNT, sectors);
    out32(PORT_DISK_COMMAND, command);
}

u32 disk_status(void)
{
    return in32(PORT_DISK_STATUS);
}

static int disk_wait(void)
{
    u32 status;
    do status = disk_status();
    while (status == DISK_BUSY);
    return status == DISK_DONE;
}

int disk_read(u64 sector, void *to, u32 sectors)
{
    disk_start(DISK_READ, sector, to, sectors);
    return disk_wait();
}

int disk_write(u64 sector, const void *from, u32 sectors)
{
    disk_start(DISK_WRITE, sector, from, sectors);
    return disk_wait();
}

int disk_flush(void)
{
    disk_start(DISK_FLUSH, 0, 0, 0);
    return disk_wait();
}
