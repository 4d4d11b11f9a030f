"""The bare-metal guest: an ELF file that ``qemu-system-x86_64 -kernel`` boots by multiboot."""

from __future__ import annotations

from pathlib import Path

from guests.build import FREESTANDING, SOURCES, built, common_headers, run_tool


def multiboot_image() -> Path:
    """Return the ELF image; build it if its sources have changed.

    The code is 64-bit, but QEMU boots only 32-bit ELF files this way, so the file is relabelled.

    Raises:
        HostError: gcc or objcopy is missing or fails, or the cache cannot be written.
    """
    directory = SOURCES / "multiboot"
    parts = [directory / "boot.S", directory / "main.c"]
    script = directory / "link.ld"
    headers = common_headers()
    purpose = "build the bare-metal guest"

    def make(scratch: Path, output: Path) -> None:
        linked = scratch / "guest64.elf"
        command = [
            "gcc",
            *FREESTANDING,
            "-mno-red-zone",
            "-T",
            str(script),
            "-Wl,-z,max-page-size=4096",
        ]
        run_tool([*command, "-o", str(linked), *map(str, parts)], purpose, package="gcc")
        command = ["objcopy", "-I", "elf64-x86-64", "-O", "elf32-i386", str(linked), str(output)]
        run_tool(command, purpose, package="binutils")

    return built("multiboot.elf", [*parts, script, *headers, Path(__file__)], make)
