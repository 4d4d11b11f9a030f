"""Clones of a snapshot: several VMs that start together and share an image."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from stillframe.restore.agents import thaw
from stillframe.restore.clones import CloneOptions, ForkDirectory, plan_clones
from stillframe.restore.identity import keep_renewed
from stillframe.restore.plan import check_plan
from stillframe.restore.restored import IMAGE_NAME, RestoredVm
from stillframe.restore.start import Restoring
from stillframe.store import open_snapshot
from stillframe.store.keys import Keys
from stillframe.store.locations import Location


def fork_snapshot(
    path: Location,
    options: CloneOptions,
    directory: ForkDirectory,
    *,
    leases: Sequence[Path] = (),
    parent: str = "",
    keys: Keys | None = None,
) -> list[RestoredVm]:
    """Start the clones; if one does not start, none is left.

    Args:
        directory: what they share.
        leases: directories of disk images that they need; killing the last clone removes them.
        parent: the running VM that the snapshot is of, if the snapshot is not kept.
        keys: for an encrypted snapshot.

    Raises:
        UsageError and others: as :func:`stillframe.restore.start.restore`.
    """
    began_s = time.monotonic()
    with open_snapshot(path, keys) as snapshot:
        plans = plan_clones(snapshot, options)
        check_plan(plans[0], trust=options.trust)
        work = Restoring(
            plans, snapshot, path, began_s=began_s, leases=leases, parent=parent, fill=options.fill
        )
        vms = work.run(
            directory.path / IMAGE_NAME,
            wait=options.wait,
            owns=[directory.lock],
            on_running=options.on_running,
        )
        directory.keep()
        return keep_renewed(thaw(vms) if snapshot.manifest.quiesced else vms)
