"""Processes that share a store and die at any of their calls, all in this one."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stillframe.still.frames import BytesLike
from stillframe.still.sinks import Sink, Source
from stillframe.store import workers
from stillframe.store.backends.objects import Backend, StoredObject


class Died(BaseException):
    """The process is no more: nothing catches that, and it does nothing from here on."""


class Mortal:
    """A backend as one process has it. ``at_call`` is told of every call, before it is made."""

    def __init__(self, below: Backend, at_call: Callable[[str], None]) -> None:
        self._below = below
        self._at_call = at_call
        self._dies_at: int | None = None
        self._dies_after = False
        self._calls = 0
        self.is_dead = False

    def die_at(self, call: int | None, *, after: bool = False) -> None:
        """At the ``call``-th call from now on that changes anything; ``after`` what it does, or
        before."""
        self._calls, self._dies_at, self._dies_after = 0, call, after

    def _do(self, name: str, call: Callable[[], Any], *, changes: bool = False) -> Any:
        if self.is_dead:
            raise Died
        self._at_call(name)
        self._calls += changes
        dies = changes and self._dies_at == self._calls
        if dies and not self._dies_after:
            self.is_dead = True
            raise Died
        done = call()
        if dies:
            self.is_dead = True
            raise Died
        return done

    @property
    def description(self) -> str:
        return self._below.description

    def create(self, key: str, data: bytes) -> bool:
        return self._do(f"create {key}", lambda: self._below.create(key, data), changes=True)

    def read(self, key: str) -> bytes:
        return self._do(f"read {key}", lambda: self._below.read(key))

    def open(self, key: str) -> Source:
        return self._do(f"open {key}", lambda: self._below.open(key))

    def listing(self, prefix: str) -> list[StoredObject]:
        return self._do(f"listing {prefix}", lambda: self._below.listing(prefix))

    def delete(self, key: str) -> None:
        self._do(f"delete {key}", lambda: self._below.delete(key), changes=True)

    def sink(self, key: str) -> Sink:
        return _MortalSink(self, self._below.sink(key))

    def path(self, key: str) -> Path | None:
        return self._below.path(key)


class _MortalSink:
    def __init__(self, mortal: Mortal, below: Sink) -> None:
        self._mortal = mortal
        self._below = below
        self.description = below.description

    def write(self, data: BytesLike) -> None:
        if self._mortal.is_dead:
            raise Died
        self._below.write(data)

    def commit(self) -> None:
        self._mortal._do("commit", self._below.commit, changes=True)

    def abort(self) -> None:
        self._below.abort()


class Host:
    """The processes of a host: each has a pid, and is alive until it is told otherwise."""

    def __init__(self) -> None:
        self._pids = itertools.count(1000)
        self._alive: set[int] = set()
        self._now = threading.local()

    def start(self) -> int:
        pid = next(self._pids)
        self._alive.add(pid)
        return pid

    def kill(self, pid: int) -> None:
        self._alive.discard(pid)

    @contextmanager
    def running(self, pid: int) -> Iterator[None]:
        """What this thread does is done by that process."""
        self._now.pid = pid
        try:
            yield
        finally:
            self._now.pid = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workers, "_own_pid", lambda: self._now.pid)
            patch.setattr(workers, "start_ticks", lambda pid: int(pid in self._alive))
            yield


def nobody_looks(_call: str) -> None:
    """For ``at_call``."""
