"""Fixtures and hooks for all tests."""

import signal

from hypothesis import HealthCheck, settings

from tests.support.guest_fixtures import linux_guest, multiboot_guest
from tests.support.huge_pages import huge_pages
from tests.support.private_state import private_state
from tests.support.restored_vms import places
from tests.support.short_paths import pytest_configure, pytest_unconfigure
from tests.support.skip_policy import pytest_make_collect_report, pytest_runtest_makereport

__all__ = [
    "huge_pages",
    "linux_guest",
    "multiboot_guest",
    "places",
    "private_state",
    "pytest_configure",
    "pytest_make_collect_report",
    "pytest_runtest_makereport",
    "pytest_unconfigure",
]

# How long an example takes, and how long it takes to draw, depends on what else the host does.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# Where the tests were started by nohup or in a shell's background, these are ignored, and the
# programs that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
