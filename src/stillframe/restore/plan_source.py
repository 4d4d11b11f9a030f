"""The source of a plan: a snapshot, or a VM that is about to be forked."""

from __future__ import annotations

import os
from typing import Protocol

import msgspec

from stillframe.errors import InternalError
from stillframe.model import BlockRecord, Manifest
from stillframe.still.skeleton import Skeleton


class PlanSource(Protocol):
    """The part of ``still.snapshot.Snapshot`` that a plan needs."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def blocks(self) -> tuple[BlockRecord, ...]: ...

    @property
    def description(self) -> str: ...

    @property
    def owner_uid(self) -> int | None: ...

    @property
    def others_may_write(self) -> bool: ...

    @property
    def was_taken_here(self) -> bool: ...

    def check_restorable(self) -> None: ...

    def skeleton(self) -> Skeleton: ...


class LiveSource(msgspec.Struct, frozen=True, kw_only=True):
    """A running VM of this host, before the instant. ``description``: its name for people."""

    manifest: Manifest
    description: str
    others_may_write: bool = False
    was_taken_here: bool = True

    @property
    def owner_uid(self) -> int:
        return os.geteuid()

    @property
    def blocks(self) -> tuple[BlockRecord, ...]:
        return self.manifest.blocks

    def check_restorable(self) -> None:
        """Always so: all of the VM will be there."""

    def skeleton(self) -> Skeleton:
        raise InternalError("a running VM has no device state before the instant")
