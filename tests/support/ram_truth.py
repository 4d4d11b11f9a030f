"""RAM of a VM as it was at each instant, read beside the snapshot: what its chain must give."""

from __future__ import annotations

import pytest

from stillframe.capture.ram_capture import RamCapture
from stillframe.model import StoppedWrite
from stillframe.still.snapshot import Snapshot
from tests.support.image_vm import read_waiting

PAGE = 4096


class RamTruth:
    """All RAM at each instant from now on, by block, the latest last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.instants: list[dict[str, memoryview]] = []
        original = RamCapture.instant

        def instant(capture: RamCapture) -> tuple[StoppedWrite, ...]:
            writes = original(capture)
            self.instants.append(
                {
                    block.idstr: read_waiting(capture._pid, block.hva, block.used_length_bytes)
                    for block in capture._blocks
                }
            )
            return writes

        monkeypatch.setattr(RamCapture, "instant", instant)

    def differences(self, snapshot: Snapshot, number: int = -1) -> list[tuple[str, int]]:
        """(block, page) of all pages of a snapshot that RAM did not have at that instant."""
        truth = self.instants[number]
        assert {block.idstr for block in snapshot.blocks} == truth.keys()
        found = []
        for name, there in truth.items():
            pages = 0
            for page, content in snapshot.iter_pages(name):
                pages += 1
                if there[page * PAGE : (page + 1) * PAGE] != (content or bytes(PAGE)):
                    found.append((name, page))
            assert pages * PAGE == len(there)
        return found
