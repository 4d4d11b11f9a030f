"""A process that writes into a store and removes from it, telling what it does; for ``kill -9``.

    python -m tests.support_store.busy_writer STORE VM [COUNT]

``put ID`` when a snapshot is in; ``removing ID`` before, ``removed ID`` after. With a count it
only puts, and ends.
"""

from __future__ import annotations

import itertools
import sys

from stillframe.store import compaction
from stillframe.store.opening import open_store
from stillframe.store.records import Entry
from stillframe.store.retention import Policy
from tests.support_store.stores import put


def main(place: str, vm: str, count: int = 0) -> None:
    store = open_store(place)
    compaction.MOST_FILES = 2  # so that pruning compacts, too
    mine: list[Entry] = []
    for number in itertools.count():
        created = f"2026-01-01T00:00:{number % 60:02}.{number:06}+00:00"
        parent = mine[-1] if mine and number % 3 else None
        mine.append(put(store, vm=vm, created=created, parent=parent))
        print("put", mine[-1].id, flush=True)
        if count:
            if number + 1 == count:
                return
            continue
        store.tag(mine[-1], ["new"])
        if number % 4 == 3:
            print("pruning", vm, flush=True)
            done = store.prune(Policy(last=2), vms=[vm])
            for entry in done.removed:
                print("removed", entry.id, flush=True)
            mine = [entry for entry in mine if entry not in done.removed]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0)
