"""The clones of one fork: the caller's options, their common directory, their names."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

import msgspec

from stillframe.errors import UsageError
from stillframe.restore.plan import plan_restore
from stillframe.restore.plan_source import PlanSource
from stillframe.restore.private_directories import make_owned, remove, sweep
from stillframe.restore.records import RestorePlan
from stillframe.restore.restored import FORK_PREFIX, FORKS, RestoredVm, list_restored

MOST_CLONES = 1000
CloneKind = Literal["domain", "qemu"]


class CloneOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The caller's choices for clones; see :func:`stillframe.restore.fork.fork`.

    ``environment``: for their VMMs, in addition to the caller's. ``kind``: for a libvirt domain;
    None is the default, domains.

    Raises:
        UsageError: an invalid number or name.
    """

    count: int = 1
    name: str | None = None
    trust: bool = False
    extra_args: Sequence[str] = ()
    program: str | None = None
    environment: Mapping[str, str] = {}
    paused: bool = False
    wait: bool = False
    fill: bool = False
    kind: CloneKind | None = None
    on_running: Callable[[list[RestoredVm]], None] | None = None

    def __post_init__(self) -> None:
        self.names("")
        if any(word.split("=")[0] in ("-name", "--name") for word in self.extra_args):
            raise UsageError("clones are not named so", remedy="use --name PATTERN before --")

    def names(self, vm: str, taken: Collection[str] = ()) -> list[str]:
        """Return a name for each clone of a VM; ``{n}`` in the pattern is its number.

        Args:
            vm: the VM's name; empty if it has none.
            taken: names of other VMs, which the default pattern skips.
        """
        pattern = f"{vm or 'clone'}-{{n}}" if self.name is None else self.name
        if not 1 <= self.count <= MOST_CLONES:
            raise UsageError(
                f"{self.count} clones make no sense", remedy=f"choose 1 to {MOST_CLONES}"
            )
        if self.count > 1 and "{n}" not in pattern:
            raise UsageError(
                f"the name {pattern!r} would be that of {self.count} clones",
                remedy="write {n} where each has its number",
            )
        if not pattern or "\0" in pattern:
            raise UsageError("a clone needs a name")
        found = (pattern.replace("{n}", str(number)) for number in itertools.count(1))
        if self.name is None:
            found = (name for name in found if name not in taken)
        return list(itertools.islice(found, self.count))


class ForkDirectory:
    """A directory in shared memory for what the clones of one fork share; it exists as long as one
    of them runs. The ``with`` block holds it until they have started.

    Raises:
        HostError: it cannot be made.
    """

    def __init__(self) -> None:
        sweep(FORKS, FORK_PREFIX)
        self.path = FORKS / f"{FORK_PREFIX}{os.getpid()}-{time.monotonic_ns():x}"
        self._lock_fd = make_owned(self.path)
        self._is_used = False

    @property
    def lock(self) -> int:
        """The descriptor of its lock, for the clones to hold."""
        return self._lock_fd

    def keep(self) -> None:
        """Keep the directory after the ``with`` block: there are clones now."""
        self._is_used = True

    def __enter__(self) -> ForkDirectory:
        return self

    def __exit__(self, *_error: object) -> None:
        if not self._is_used:
            remove(self.path)
        os.close(self._lock_fd)


def names_of_restored() -> set[str]:
    """Return the names of the running VMs that this user restored."""
    return {vm.name for vm in list_restored()}


def plan_clones(source: PlanSource, options: CloneOptions) -> list[RestorePlan]:
    """Return a plan for each clone; errors as ``plan_restore``."""
    record = source.manifest.machine
    plans = []
    for name in options.names("" if record is None else record.name, names_of_restored()):
        plan = plan_restore(
            source,
            name=name,
            extra_args=options.extra_args,
            program=options.program,
            paused=options.paused,
            clones=options.count,
            forwards=True,
        )
        environment = {**plan.environment, **options.environment}
        plans.append(msgspec.structs.replace(plan, environment=environment))
    return plans
