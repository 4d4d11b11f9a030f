"""Under CI a skipped test is a failure: what was not run was not shown to work.

In force when ``CI`` is set or ``STILLFRAME_REQUIRE_ALL=1``. A runner that cannot have a feature
(KVM on a hosted runner, say) names it: ``STILLFRAME_ALLOW_MISSING=kvm,hugetlb`` lets the skips
through whose reason begins with ``missing kvm:`` or ``missing hugetlb:``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator

import pytest

_FALSE = ("", "0", "false", "no")
_REASON = re.compile(r"(?:Skipped: )?missing ([\w-]+):")


def skips_are_failures() -> bool:
    """Whether the environment asks for every test to be run."""
    names = ("CI", "STILLFRAME_REQUIRE_ALL")
    return any(os.environ.get(name, "").lower() not in _FALSE for name in names)


def _refused(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """The reason of a skip that may not be, else None."""
    if not report.skipped or hasattr(report, "wasxfail") or not skips_are_failures():
        return None
    longrepr = report.longrepr
    reason = str(longrepr[2] if isinstance(longrepr, tuple) else longrepr)
    allowed = os.environ.get("STILLFRAME_ALLOW_MISSING", "").replace(",", " ").split()
    match = _REASON.match(reason)
    if match and match.group(1) in allowed:
        return None
    return reason


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = _refused(report)
    if reason is not None:
        report.outcome = "failed"
        report.longrepr = f"skipped, but every test must run here: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skips in a test, its fixtures, or by a marker."""
    report = yield
    _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skips of whole modules."""
    report = yield
    _fail(report)
    return report
