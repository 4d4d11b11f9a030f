"""The complete image of an existing snapshot: decompressed once, mapped many times."""

from __future__ import annotations

from collections.abc import Callable

from stillframe.errors import RefusedError
from stillframe.image.cached import ImageCache
from stillframe.image.new_image import NewImage, why_no_image
from stillframe.image.ram_image import PAGE_BYTES, frames_with_data
from stillframe.still.index import KIND_DATA
from stillframe.still.records import check_run
from stillframe.still.snapshot import Snapshot

Progress = Callable[[int, int], None]


def _refuse_uncacheable(snapshot: Snapshot) -> None:
    machine = snapshot.manifest.machine
    why = why_no_image(
        vmm="" if machine is None else machine.vmm,
        encrypted=bool(snapshot.secrets),
        for_analysis=snapshot.manifest.for_analysis,
    )
    if why is None and snapshot.index.target_page_bytes != PAGE_BYTES:
        why = f"its pages are not of {PAGE_BYTES} bytes"
    if why is not None:
        raise RefusedError(
            "there is no complete image of such a snapshot",
            why=why,
            remedy="restore it without",
            guest_state="none",
        )


def store_image(
    cache: ImageCache, snapshot: Snapshot, place: str, progress: Progress | None = None
) -> bool:
    """Make the image of a snapshot, unless there is one.

    Args:
        place: where the snapshot is.
        progress: called with (bytes done, bytes in total).

    Returns:
        Whether it was made.

    Raises:
        RefusedError: it cannot have one (it is encrypted, for instance), or the image exceeds the
            limit.
        DataError: the snapshot is damaged. SinkError, HostError: the cache's disk fails.
    """
    _refuse_uncacheable(snapshot)
    if cache.has(snapshot.id, snapshot.content_id):
        return False
    with NewImage(cache, snapshot.blocks) as new:
        data_bytes = sum(snapshot.index.page_counts(n)[0] * PAGE_BYTES for n in new.fds)
        cache.make_room(data_bytes)  # before the work: it may not fit at all
        frames = sorted(frames_with_data(snapshot.index, new.fds))
        for done, (frame, raw) in enumerate(snapshot.container.iter_frames(frames), 1):
            for run in snapshot.index.runs_of_frame(frame):
                if run.kind == KIND_DATA and run.block in new.fds:
                    check_run(raw, run, snapshot.blocks[run.block].idstr, PAGE_BYTES)
                    new.write(raw, run, block=run.block)
            if progress is not None:
                progress(data_bytes * done // len(frames), data_bytes)
        return new.commit(snapshot.id, place, snapshot.manifest, content_id=snapshot.content_id)
