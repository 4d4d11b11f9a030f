"""Construction of a capture's native core, with a first small spill."""

from __future__ import annotations

from collections.abc import Sequence

from stillframe.capture import _capture
from stillframe.capture.block_files import BlockFiles
from stillframe.capture.core_errors import no_memory
from stillframe.capture.fault_threads import FaultThreads
from stillframe.capture.write_protection import WriteProtection
from stillframe.model import TARGET_PAGE_BYTES, RamBlock

SLAB_BYTES = 1 << 20
MAX_WINDOW_BYTES = 1 << 20
FIRST_SPILL_BYTES = 32 << 20


def slab_bytes(blocks: Sequence[RamBlock]) -> int:
    """Return the size of a slab, the unit of the spill: large enough for any block's piece."""
    return max([SLAB_BYTES, *(block.page_size_bytes for block in blocks)])


def new_core(
    protection: WriteProtection | None,
    pid: int,
    blocks: Sequence[RamBlock],
    files: BlockFiles,
    threads: FaultThreads,
    *,
    spill_bytes: int,
) -> _capture.Capture:
    """Make the core for these blocks, given in pieces; the guest is not touched.

    Raises:
        HostError: there is no memory for the smallest spill.
    """
    by_signal = protection is not None and protection.kind == "mprotect"
    slab = slab_bytes(blocks)
    try:
        core = _capture.Capture(
            protection.fileno() if protection is not None else -1,
            threads.stop_fd,
            pid,
            [
                (
                    block.hva,
                    block.pages,
                    -(-block.used_length_bytes // TARGET_PAGE_BYTES),
                    block.page_size_bytes,
                    # Private memory is only in the VMM's page tables: read it from the process.
                    fd if fd is not None and block.shared else -1,
                    block.backing_offset_bytes,
                    # A chunk may have holes anyway: see BlockFiles.count_used.
                    int(block.shared and block.backing != "hugetlbfs" and not by_signal),
                    block.idstr.encode(),
                )
                for block, fd in zip(blocks, files.readers, strict=True)
            ],
            slab_bytes=slab,
            spill_slabs=spill_bytes // slab,
            max_window_bytes=MAX_WINDOW_BYTES,
            by_signal=by_signal,
            task_fd=-1 if protection is None or by_signal else files.open_tasks(pid),
            asked_fd=threads.asked_fd,
        )
        if core.grow_spill(max(2, min(spill_bytes, FIRST_SPILL_BYTES) // slab)) < 2:
            raise MemoryError
    except MemoryError as error:
        raise no_memory(2 * slab) from error
    return core
