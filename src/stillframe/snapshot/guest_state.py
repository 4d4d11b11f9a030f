"""The guest's state in the errors of a failed job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stillframe.errors import GuestState, StillframeError, host_error
from stillframe.machine import Machine


@contextmanager
def guest_told(machine: Machine) -> Iterator[None]:
    """Set ``guest_state`` of errors once everything is cleaned up; turn OSError into HostError."""
    try:
        yield
    except StillframeError as error:
        error.guest_state = guest_state_of(machine, error.guest_state)
        raise
    except OSError as error:
        trouble = host_error("the snapshot cannot be taken", error)
        trouble.guest_state = guest_state_of(machine, trouble.guest_state)
        raise trouble from error


def guest_state_of(machine: Machine, supposed: GuestState) -> GuestState:
    """Ask the machine what the guest does now; ``supposed`` if it does not answer."""
    if not machine.process_alive():
        return "none"
    try:
        return "running" if machine.status() == "running" else "paused"
    except StillframeError:
        return supposed
