"""QEMUs without a guest (the BIOS runs, or nothing does) for tests of the machine's rooms.

The monitors are left free: what is under test connects to them.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from guests.qemu import qemu_binary
from tests.support.listening import wait_listening

_START_S = 60.0


class BareVm:
    """One QEMU process; ``qmp`` and ``second_qmp`` are the paths of its two monitors."""

    def __init__(
        self,
        *arguments: str,
        name: str | None = None,
        cwd: Path | None = None,
        qmp: bool = True,
        program: str | None = None,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="bare-vm-")
        directory = Path(self._directory.name)
        self.qmp, self.second_qmp = str(directory / "qmp"), str(directory / "qmp2")
        self._stderr = directory / "stderr"
        command = [
            program or qemu_binary(),
            "-display",
            "none",
            "-serial",
            "null",
            "-monitor",
            "none",
        ]
        if not {"-accel", "-enable-kvm"} & set(arguments):
            command += ["-accel", "tcg"]
        if qmp:
            command += ["-qmp", f"unix:{self.qmp},server=on,wait=off"]
            command += ["-qmp", f"unix:{self.second_qmp},server=on,wait=off"]
        if name is not None:
            command += ["-name", name]
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd=cwd,
            )
        try:
            self._wait(Path(self.second_qmp) if qmp else None)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    def _wait(self, monitor: Path | None) -> None:
        if monitor is None:
            return
        try:
            wait_listening(monitor, _START_S, lambda: self.process.poll() is None)
        except RuntimeError as error:
            raise RuntimeError(f"QEMU did not start: {self._stderr.read_text()}") from error

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._directory.cleanup()

    def __enter__(self) -> BareVm:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
