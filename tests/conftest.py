"""Fixtures and hooks for all tests."""

from tests.support.guest_fixtures import linux_guest, multiboot_guest
from tests.support.skip_policy import pytest_make_collect_report, pytest_runtest_makereport

__all__ = [
    "linux_guest",
    "multiboot_guest",
    "pytest_make_collect_report",
    "pytest_runtest_makereport",
]
