"""Temporary files in a directory with a short name: a socket's path has at most 107 bytes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

_MADE = pytest.StashKey[Path]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.basetemp is None:
        config.stash[_MADE] = Path(tempfile.mkdtemp(prefix="sf-"))
        config.option.basetemp = str(config.stash[_MADE] / "t")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _MADE in config.stash:
        shutil.rmtree(config.stash[_MADE], ignore_errors=True)
