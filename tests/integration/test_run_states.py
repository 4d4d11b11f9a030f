"""The run state after a take is the one before, whatever it is, and the restored VM's too."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from guests.qemu import qemu_binary
from stillframe import api
from stillframe.errors import RefusedError
from stillframe.machine import Mode
from stillframe.qmp.client import QmpClient
from tests.support.newer_qemu import qemu_version, require_newer_qemu
from tests.support.probes import has_uffd_wp
from tests.support.run_states import STATES, state_of, vm_in_state, wait_state
from tests.support.taking import PATIENT_MS

pytestmark = pytest.mark.qemu

MODES: tuple[Mode, ...] = ("background", "stop")
LOADED = {"debug": "paused"}


@pytest.fixture(params=["stock", "newer"])
def qemu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The program that the test's VMs run."""
    has_uffd_wp().require()
    program = qemu_binary() if request.param == "stock" else require_newer_qemu()
    monkeypatch.setenv("STILLFRAME_QEMU", program)
    return program


@pytest.mark.parametrize("state", STATES)
def test_the_state_is_kept(qemu: str, state: str, tmp_path: Path) -> None:
    with vm_in_state(state, tmp_path) as vm:
        for mode in MODES:
            file = tmp_path / f"{mode}.still"
            if state == "suspended" and qemu_version(qemu) < (9,):
                with pytest.raises(RefusedError, match=r"suspended.*wake it first"):
                    api.take(vm.qmp, file, mode=mode, max_drain_ms=PATIENT_MS).wait(60)
                assert not file.exists()
            else:
                api.take(vm.qmp, file, mode=mode, max_drain_ms=PATIENT_MS).wait(60)
            with QmpClient.connect(vm.second_qmp, timeout_s=60) as qmp:
                assert state_of(qmp) == state
                if mode == "stop" and state == "suspended":
                    qmp.execute("system_wakeup")
                    wait_state(qmp, "running")
    if file.exists() and state != "io-error":  # whose disk is none to lay an overlay on
        restored = api.restore(file, program=qemu, trust=True)
        try:
            assert restored.state == LOADED.get(state, state)
            if state == "suspended":
                with QmpClient.connect(restored.qmp_address) as qmp:
                    qmp.execute("system_wakeup")
                    wait_state(qmp, "running")
        finally:
            os.kill(restored.pid, signal.SIGKILL)


def test_a_restore_that_would_never_wake_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    has_uffd_wp().require()
    stock = qemu_binary()
    if qemu_version(stock) >= (9,):
        pytest.skip("this QEMU wakes restored guests")
    monkeypatch.setenv("STILLFRAME_QEMU", require_newer_qemu())
    with vm_in_state("suspended", tmp_path, machine="pc-i440fx-7.2") as vm:
        api.take(vm.qmp, tmp_path / "a.still", max_drain_ms=PATIENT_MS).wait(60)
    with pytest.raises(RefusedError, match="wake it first"):
        api.restore(tmp_path / "a.still", program=stock, trust=True)
