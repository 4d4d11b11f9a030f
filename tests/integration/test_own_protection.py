"""The protection that this host allows, to root and to others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.probes import has_uffd_wp

_ROOT = Path(__file__).resolve().parents[2]
_UNPRIVILEGED = Path("/proc/sys/vm/unprivileged_userfaultfd")

root = pytest.mark.skipif(os.geteuid() != 0, reason="missing root: becomes another user")


def run(prefer: str, *how: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.own_protection_child", prefer, *how],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _user_mode_only() -> None:
    has_uffd_wp().require()
    if _UNPRIVILEGED.read_text().strip() != "0":
        pytest.skip("missing restricted userfaultfd: vm.unprivileged_userfaultfd=1")


@root
@pytest.mark.parametrize("prefer", ["auto", "userfaultfd"])
def test_root_has_a_full_userfaultfd(prefer: str) -> None:
    has_uffd_wp().require()
    assert run(prefer) == "userfaultfd whole"


@root
def test_root_takes_the_device_where_the_system_call_is_forbidden() -> None:
    has_uffd_wp().require()
    if not Path("/dev/userfaultfd").exists():
        pytest.skip("missing /dev/userfaultfd")
    assert run("auto", "no-userfaultfd") == "userfaultfd whole"


@root
@pytest.mark.parametrize("prefer", ["auto", "userfaultfd"])
def test_an_ordinary_user_has_one_for_user_mode(prefer: str) -> None:
    _user_mode_only()
    assert run(prefer, "nobody") == "userfaultfd-user whole"


@root
def test_where_userfaultfd_is_forbidden_the_fallback_comes_by_itself() -> None:
    assert run("auto", "nobody", "no-userfaultfd") == "mprotect whole"


@root
def test_a_demand_that_cannot_be_met_is_an_error_that_says_so() -> None:
    answer = run("userfaultfd", "nobody", "no-userfaultfd")
    assert answer.startswith("host: userfaultfd is not allowed here: Operation not permitted")


@pytest.mark.parametrize("how", [[], pytest.param(["nobody"], marks=root)])
def test_the_fallback_may_be_demanded(how: list[str]) -> None:
    assert run("mprotect", *how) == "mprotect whole"


@root
def test_missing_pages_are_told_by_any_userfaultfd_but_not_without_one() -> None:
    _user_mode_only()
    assert run("missing-pages") == "probed"
    assert run("missing-pages", "nobody") == "probed"
    answer = run("missing-pages", "nobody", "no-userfaultfd")
    assert answer.startswith("host: userfaultfd is not allowed here: Operation not permitted")
