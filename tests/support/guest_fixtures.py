"""Fixtures that give real QEMUs with the guests of ``guests/``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from guests.qemu import GuestVm
from tests.support.probes import (
    has_guest_agent,
    has_huge_pages,
    has_kvm,
    has_linux_guest,
    has_multiboot_guest,
)

GuestFactory = Callable[..., GuestVm]
"""Takes the keyword arguments of :class:`GuestVm`; gives it started and ready.

With ``wait_ready=False`` it does not wait for the guest, which may be an incoming one.
"""


def _require(options: dict[str, Any]) -> None:
    if options.get("agent"):
        has_guest_agent().require()
    if options.get("accelerator") == "kvm":
        has_kvm().require()
    if options.get("memory") == "hugetlb":
        has_huge_pages(options.get("ram_mib", 256)).require()


@pytest.fixture
def linux_guest() -> Iterator[GuestFactory]:
    """Starts Linux guests; all are killed after the test."""
    has_linux_guest().require()
    with ExitStack() as stack:

        def start(*, wait_ready: bool = True, **options: Any) -> GuestVm:
            _require(options)
            vm = GuestVm("linux", **options)
            return stack.enter_context(vm.start(wait_ready=wait_ready))

        yield start


@pytest.fixture
def multiboot_guest() -> Iterator[GuestFactory]:
    """Starts bare-metal guests (``accelerator="kvm"`` for KVM); all are killed after the test."""
    has_multiboot_guest().require()
    with ExitStack() as stack:

        def start(*, wait_ready: bool = True, **options: Any) -> GuestVm:
            _require(options)
            vm = GuestVm("multiboot", **options)
            return stack.enter_context(vm.start(wait_ready=wait_ready))

        yield start
