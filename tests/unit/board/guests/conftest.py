"""Guests for the tests of this directory, compiled from the sources of the checkout."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stillframe.board.guests import build_guest, build_own_guest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def own_guest(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds a guest of the package, once."""
    pytest.importorskip("unicorn", reason="missing unicorn: pip install 'stillframe[board]'")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("missing x86-64: guests are built on such hosts only")
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("missing compiler: no cc, gcc or clang")
    directory = tmp_path_factory.mktemp("board-guests")

    def build(name: str) -> Path:
        path = directory / f"{name}.elf"
        if not path.exists():
            build_own_guest(name, directory)
        return path

    return build


@pytest.fixture(scope="session")
def selftest_guest(
    own_guest: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The guest that exercises the library."""
    path = tmp_path_factory.mktemp("selftest") / "selftest.elf"
    assert build_guest(HERE / "selftest.c", path) == "", "the compiler warns"
    return path
