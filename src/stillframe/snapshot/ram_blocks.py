"""Checks, by the machine's signatures, that the saved RAM blocks are those of the instant."""

from __future__ import annotations

from stillframe.errors import SnapshotFailed

Signature = tuple[tuple[str, int, int, int], ...]
"""(name, address, used length, maximal length) of every block; lengths in bytes."""


def check_instant(before: Signature, now: Signature) -> None:
    """Check that the blocks at the instant are those that were listed.

    Args:
        before: queried before the blocks were listed.
        now: queried after the device state was saved, at the latest right after cont.

    Raises:
        SnapshotFailed: after hotplug or a resize the device state refers to other blocks.
    """
    changes = [f"{name} appeared" for name in _new(before, now)] + _harmed(before, now)
    if changes:
        raise SnapshotFailed(
            "the VM's RAM blocks changed before the instant",
            why="; ".join(changes),
            remedy="take another snapshot once it has settled",
            guest_state="running",
        )


def check_kept(instant: Signature, now: Signature) -> list[str]:
    """Check that the blocks of the instant are still unchanged when they have been saved.

    Returns:
        Notes on blocks that appeared since; the snapshot does not need them.

    Raises:
        SnapshotFailed: one vanished, moved or was resized.
    """
    harmed = _harmed(instant, now)
    if harmed:
        raise SnapshotFailed(
            "the VM's RAM blocks changed while they were saved",
            why="; ".join(harmed),
            remedy="take another snapshot once it has settled",
            guest_state="running",
        )
    return [
        f"RAM block {name} appeared after the instant: not in the snapshot"
        for name in _new(instant, now)
    ]


def _new(before: Signature, now: Signature) -> list[str]:
    known = {block[0] for block in before}
    return [name or "without a name" for name, *_ in now if name not in known]


def _harmed(before: Signature, now: Signature) -> list[str]:
    left = set(now)
    lengths = {name: used for name, _, used, _ in now}
    found = []
    for block in before:
        name, _, used_bytes, _ = block
        if block in left:
            continue
        if name not in lengths:
            found.append(f"{name} vanished")
        elif lengths[name] != used_bytes:
            found.append(f"{name} was resized from {used_bytes} to {lengths[name]} bytes")
        else:
            found.append(f"{name} was replaced")
    return found
