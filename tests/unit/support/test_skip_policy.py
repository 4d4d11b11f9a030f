"""The rule that a skipped test is a failure under CI, in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# pytest counts a failure outside the test's own body, as by a marker, as an error
TESTS = """
import pytest

def test_runs():
    pass

def test_skips():
    pytest.skip("missing kvm: no /dev/kvm")

@pytest.mark.skipif(True, reason="never mind")
def test_skips_by_marker():
    pass

@pytest.mark.xfail
def test_fails_as_expected():
    raise ValueError
"""

MODULE = """
import pytest
pytest.skip("missing qemu: none", allow_module_level=True)
"""


def run(directory: Path, content: str, **environment: str) -> str:
    (directory / "test_it.py").write_text(content)
    (directory / "pytest.ini").write_text("[pytest]\n")
    names = ("CI", "STILLFRAME_REQUIRE_ALL", "STILLFRAME_ALLOW_MISSING")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.support.skip_policy",
            "-p",
            "no:cacheprovider",
        ],
        cwd=directory,
        env={**clean, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("environment", "outcome"),
    [
        ({}, "1 passed, 2 skipped, 1 xfailed"),
        ({"CI": "false"}, "1 passed, 2 skipped, 1 xfailed"),
        ({"CI": "true"}, "1 failed, 1 passed, 1 xfailed, 1 error"),
        ({"STILLFRAME_REQUIRE_ALL": "1"}, "1 failed, 1 passed, 1 xfailed, 1 error"),
        (
            {"CI": "1", "STILLFRAME_ALLOW_MISSING": "hugetlb,kvm"},
            "1 passed, 1 skipped, 1 xfailed, 1 error",
        ),
    ],
)
def test_skipped_tests(tmp_path: Path, environment: dict[str, str], outcome: str) -> None:
    assert outcome in run(tmp_path, TESTS, **environment)


def test_skipped_modules(tmp_path: Path) -> None:
    assert "1 skipped" in run(tmp_path, MODULE)
    assert "1 error" in run(tmp_path, MODULE, CI="true")
    assert "1 skipped" in run(tmp_path, MODULE, CI="true", STILLFRAME_ALLOW_MISSING="qemu")
