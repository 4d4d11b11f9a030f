"""Following a job to its end."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

import pytest

from stillframe.cli import take as subject
from stillframe.cli.cancelling import CancelRequests
from stillframe.cli.progress import PlainProgress
from stillframe.errors import RefusedError


class EndsAfterTheTimeout:
    """A job that ends between the end of a wait and the question whether it has ended."""

    stats = SimpleNamespace(phase="setup")

    def __init__(self, end: Any) -> None:
        self._end = end
        self._waits = 0

    def wait(self, timeout_s: float | None = None) -> Any:
        self._waits += 1
        if self._waits == 1:
            raise TimeoutError
        if isinstance(self._end, Exception):
            raise self._end
        return self._end

    def done(self) -> bool:
        return True


def follow(end: Any) -> Any:
    with CancelRequests() as requests:
        return subject._follow(
            EndsAfterTheTimeout(end),  # type: ignore[arg-type]
            queue.SimpleQueue(),
            PlainProgress(),
            requests,
            quiet=True,
        )


def test_a_job_that_ends_just_after_the_timeout_has_succeeded() -> None:
    assert follow("the snapshot") == "the snapshot"


def test_its_own_error_is_told() -> None:
    with pytest.raises(RefusedError, match="no"):
        follow(RefusedError("no"))
