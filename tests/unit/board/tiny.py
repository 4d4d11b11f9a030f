"""Tiny guests, compiled in the test without the guest library, and a board that runs one."""

from __future__ import annotations

import hashlib
import io
import queue
import shlex
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from stillframe.board.hardware.board import Board
from stillframe.board.hardware.config import BoardConfig
from stillframe.board.state.load_state import StateLoader
from stillframe.vmstate.source import StreamSource

TIMEOUT_S = 60.0
RESULTS = 0x800000
"""Where tiny guests leave numbers of eight bytes (``results`` in C)."""

_HEADER = """
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32;
typedef unsigned long long u64;
struct info { u64 magic, ram_bytes, vcpus, framebuffer, width, height, disk_sectors, dimm_address,
              dimm_bytes, command_line; };
#define results ((volatile u64 *)0x800000)
static inline u8 in8(u16 p)
{ u8 v; __asm__ volatile("inb %1,%0":"=a"(v):"Nd"(p):"memory"); return v; }
static inline u32 in32(u16 p)
{ u32 v; __asm__ volatile("inl %1,%0":"=a"(v):"Nd"(p):"memory"); return v; }
static inline void out8(u16 p, u8 v) { __asm__ volatile("outb %0,%1"::"a"(v),"Nd"(p):"memory"); }
static inline void out32(u16 p, u32 v) { __asm__ volatile("outl %0,%1"::"a"(v),"Nd"(p):"memory"); }
static inline void halt(void) { for (;;) __asm__ volatile("hlt"); }
static inline void power_off(u32 status) { out32(0x560, status << 16 | 0x5f0f); halt(); }
static inline u64 clock(void) { u64 low = in32(0x500); return (u64)in32(0x504) << 32 | low; }

struct frame { u64 rip, cs, rflags, rsp, ss; };
struct gate { u64 low, high; };
static struct gate table[48];
static void gate(unsigned vector, void *handler)
{
    u64 at = (u64)handler;
    table[vector].low = (at & 0xffff) | 0x08ULL << 16 | 0x8e00ULL << 32 | (at >> 16 & 0xffff) << 48;
    table[vector].high = at >> 32;
}
static void load_table(void)
{
    struct __attribute__((packed)) { u16 limit; u64 base; } at = { sizeof table - 1, (u64)table };
    __asm__ volatile("lidt %0"::"m"(at));
}
static void line_on(unsigned line, void *handler)
{
    gate(0x20 + line, handler);
    out32(0x5a0, in32(0x5a0) | 1u << line);
}
/* What an interrupt brings about: between the look and hlt it would be slept through. */
#define SLEEP_UNTIL(condition) do { \\
    __asm__ volatile("cli"); \\
    while (!(condition)) __asm__ volatile("sti; hlt; cli" : : : "memory"); \\
    __asm__ volatile("sti"); } while (0)
#define HANDLER __attribute__((interrupt, target("general-regs-only")))
"""

_FLAGS = shlex.split(
    "-O1 -ffreestanding -nostdlib -static -no-pie -fno-pic -mno-red-zone -fno-stack-protector "
    "-fcf-protection=none -fno-asynchronous-unwind-tables -mcmodel=small -Wl,--build-id=none "
    "-Wl,-Ttext-segment=0x100000 -Wl,-z,max-page-size=4096 -Wl,-z,noexecstack"
)

_directory = tempfile.TemporaryDirectory(prefix="stillframe-tiny-")


def compile_guest(source: str) -> str:
    """Compile ``void _start(struct info *info, u64 cpu)``; returns the ELF file's path."""
    text = _HEADER + source
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = Path(_directory.name) / f"{name}.elf"
    if not path.exists():
        subprocess.run(
            ["gcc", *_FLAGS, "-x", "c", "-", "-o", str(path)],
            input=text.encode(),
            check=True,
            timeout=120,
        )
    return str(path)


class Tiny:
    """A board with a tiny guest; closed on leaving."""

    def __init__(
        self,
        source: str | None,
        *,
        vcpus: int = 1,
        ram_mib: int = 16,
        disk: Path | None = None,
        serial: str = "none",
        command_line: str = "",
        display: tuple[int, int] = (16, 16),
    ) -> None:
        self.board = Board(
            BoardConfig(
                guest_path=None if source is None else compile_guest(source),
                vcpus=vcpus,
                ram_bytes=ram_mib << 20,
                disk_path=None if disk is None else str(disk),
                serial=serial,
                command_line=command_line,
                display_width=display[0],
                display_height=display[1],
            )
        )
        self.events: queue.SimpleQueue[tuple[str, dict[str, object]]] = queue.SimpleQueue()
        self.board.add_listener(lambda name, data: self.events.put((name, data)))

    def __enter__(self) -> Tiny:
        return self

    def __exit__(self, *_error: object) -> None:
        self.board.close()

    def run(self) -> int | None:
        """Power on, and wait for the guest's end; gives the exit status."""
        self.board.power_on()
        return self.ended()

    def ended(self) -> int | None:
        """The exit status of the guest, which ends by itself."""
        assert self.board.wait(TIMEOUT_S), self.board.run_state
        return self.board.exit_status

    def results(self, count: int) -> tuple[int, ...]:
        """The first numbers that the guest has left."""
        return struct.unpack(f"<{count}Q", self.board.rams[0].read(RESULTS, 8 * count))

    def event(self, wanted: str) -> dict[str, object]:
        """Wait for an event; earlier ones are forgotten."""
        while True:
            name, data = self.events.get(timeout=TIMEOUT_S)
            if name == wanted:
                return data

    def told(self) -> list[str]:
        """The names of the events that have not been looked at."""
        names = []
        while not self.events.empty():
            names.append(self.events.get()[0])
        return names

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for the guest to bring something about in its RAM; bounded."""
        pause = threading.Event()
        for _ in range(int(TIMEOUT_S / 0.002)):
            if condition():
                return
            pause.wait(0.002)
        raise AssertionError(f"it did not come about; {self.board.run_state}, {self.results(8)}")


def transfer(source: Tiny, target: Tiny) -> None:
    """Save a board that is stopped, with its RAM, and load it into one that waits for it."""
    saved = bytearray()

    class Buffer:
        def write(self, data: bytes | bytearray | memoryview, /) -> None:
            saved.extend(data)

    source.board.saver.header(Buffer())
    source.board.saver.save_all_device_states(Buffer(), inactivate_disks=True, send_eof=True)
    for mine, theirs in zip(source.board.rams, target.board.rams, strict=True):
        assert mine.idstr == theirs.idstr
        theirs.write(0, mine.read(0, mine.length_bytes))
    load(target.board, bytes(saved))


def load(board: Board, stream: bytes) -> None:
    """Load a stream into a board that waits for one."""
    loader = StateLoader(board.registry, machine_type=board.machine_type)
    loader.load(StreamSource(io.BytesIO(stream)))
