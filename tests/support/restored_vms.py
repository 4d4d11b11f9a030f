"""VMs that a test restored or forked: where their directories are, and that their guests go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.serial import SerialConsole
from stillframe.restore import restored
from stillframe.restore.restored import RestoredVm, list_restored


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the VMs' directories go; what is left is ended after the test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(restored, "ROOTS_RUN", tmp_path / "stillframe")  # not others' VMs
    tmp_path.chmod(0o700)
    yield tmp_path / "stillframe"
    for vm in list_restored():
        if vm.directory.startswith(str(tmp_path)):  # not another test run's domains
            vm.kill()


def console(vm: RestoredVm) -> SerialConsole:
    """Its serial line, to be closed."""
    return SerialConsole(next(Path(path) for path in vm.sockets if "serial" in path))


def assert_guest_goes_on(vm: RestoredVm, pages: int, after_tick: int = 0) -> None:
    """The guest runs, its memory is what it wrote, and it has not started anew."""
    line = console(vm)
    try:
        assert line.is_progressing()
        assert line.wait_tick().n > after_tick
        assert line.command("audit").startswith(f"audit ok pages={pages} ")
    finally:
        line.close()
