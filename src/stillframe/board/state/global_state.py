"""The ``globalstate`` section: the run state, saved like a device.

Source: QEMU ``migration/global_state.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stillframe.board.state.fields import StateDescription, boolean, buffer, u32, unused
from stillframe.errors import DataError
from stillframe.vmstate.devices import (
    GLOBAL_STATE_BYTES,
    GLOBAL_STATE_IDSTR,
    RUN_STATE_LIMIT_BYTES,
    pack_run_state,
    unpack_run_state,
)

RUN_STATES = frozenset(
    {
        "debug",
        "inmigrate",
        "internal-error",
        "io-error",
        "paused",
        "postmigrate",
        "prelaunch",
        "finish-migrate",
        "restore-vm",
        "running",
        "save-vm",
        "shutdown",
        "suspended",
        "watchdog",
        "guest-panicked",
        "colo",
    }
)
"""QEMU's run states (``qapi/run-state.json``)."""

_NAME_BYTES = RUN_STATE_LIMIT_BYTES + 1
_REST_BYTES = GLOBAL_STATE_BYTES - 4 - _NAME_BYTES - 2


class GlobalState:
    """The object registered under ``globalstate``.

    ``run_state``: the one last saved or loaded, of :data:`RUN_STATES`; empty before.
    ``received``: whether it was loaded.

    Args:
        get_run_state: returns the run state to store in a stream: the machine's before it was
            stopped to be saved.
    """

    def __init__(self, get_run_state: Callable[[], str]) -> None:
        self._get_run_state = get_run_state
        self.run_state = ""
        self.received = False
        self.size = 0
        self.runstate = bytes(_NAME_BYTES)
        self.has_vm_was_suspended = False
        self.vm_was_suspended = False

    def store(self) -> None:
        """Set the fields from the machine's run state."""
        self.run_state = self._get_run_state()
        self.received = False
        self.size, self.runstate = pack_run_state(self.run_state)

    def loaded(self) -> None:
        """Set the run state from the loaded fields.

        Raises:
            DataError: it is not a known run state.
        """
        name = unpack_run_state(self.size, self.runstate)
        if name not in RUN_STATES:
            raise DataError(f"the globalstate section has an unknown run state '{name}'")
        self.run_state = name
        self.received = True


def _store(state: Any) -> None:
    state.store()


def _loaded(state: Any, version_id: int) -> None:
    state.loaded()


GLOBAL_STATE = StateDescription(
    name=GLOBAL_STATE_IDSTR,
    version_id=1,
    minimum_version_id=1,
    fields=(
        u32("size"),
        buffer("runstate", _NAME_BYTES),
        boolean("has_vm_was_suspended"),
        boolean("vm_was_suspended"),
        unused(_REST_BYTES),
    ),
    pre_save=_store,
    post_load=_loaded,
)
