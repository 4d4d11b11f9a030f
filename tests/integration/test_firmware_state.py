"""What firmware keeps outside of disks and RAM: UEFI's variables, and a TPM's state."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe import api
from stillframe.store import open_snapshot
from tests.support.bare_vm import BareVm
from tests.support.journal_vm import captured_path, manifest_of, qemu_img
from tests.support.listening import wait_listening
from tests.support.probes import has_uffd_wp
from tests.support.restoring import Restores
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

OVMF = Path("/usr/share/OVMF")
BARE = ("-nodefaults", "-M", "q35", "-m", "256")


@pytest.fixture
def restores(tmp_path: Path) -> Iterator[Restores]:
    has_uffd_wp().require()
    made = Restores(tmp_path)
    yield made
    made.close()


def test_uefis_variables_are_those_of_the_instant(restores: Restores, tmp_path: Path) -> None:
    """The restored VM has a file of its own, with what the flash held."""
    if not (OVMF / "OVMF_VARS_4M.fd").exists():
        pytest.skip("missing ovmf: no OVMF_VARS_4M.fd")
    variables, file = tmp_path / "vars.fd", tmp_path / "x.still"
    shutil.copy(OVMF / "OVMF_VARS_4M.fd", variables)
    words = ["-drive", f"if=pflash,format=raw,readonly=on,file={OVMF}/OVMF_CODE_4M.fd"]
    with BareVm(*BARE, *words, "-drive", f"if=pflash,format=raw,file={variables}") as vm:
        packaged = variables.read_bytes()
        wait_until(
            lambda: variables.read_bytes() != packaged,
            "the firmware wrote no variable",
            within_s=120,
        )
        api.take(vm.qmp, file).wait(60)
    (captured,) = manifest_of(file).captured_disks
    variables.write_bytes(bytes(variables.stat().st_size))
    restored = restores.restore(file)
    assert restored.state == "running"
    own = next(Path(restored.disk_directory or "").glob("disk*"))
    qemu_img("compare", "-U", own, captured_path(file, captured))


def test_a_tpms_state_is_in_the_device_state(restores: Restores, tmp_path: Path) -> None:
    if shutil.which("swtpm") is None:
        pytest.skip("missing swtpm: it is not installed")
    with _Swtpm(tmp_path / "one") as one, _Swtpm(tmp_path / "other") as other:
        file = tmp_path / "x.still"
        with BareVm(*BARE, *one.words, "-device", "tpm-tis,tpmdev=t") as vm:
            wait_until(one.permanent.exists, "the firmware does not start its TPM", within_s=120)
            api.take(vm.qmp, file).wait(60)
            state = one.permanent.read_bytes()
        with open_snapshot(file) as snapshot:
            assert state[_Swtpm.HEADER_BYTES :] in b"".join(snapshot.iter_stream())
        assert restores.restore(file, *other.words).state == "running"
        assert other.permanent.read_bytes() == state


class _Swtpm:
    """A TPM of its own (swtpm(8)). ``permanent``: the file that holds its seeds and keys."""

    HEADER_BYTES = 16

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        socket = directory / "socket"
        self.permanent = directory / "tpm2-00.permall"
        self.words = ["-chardev", f"socket,id=c,path={socket}"]
        self.words += ["-tpmdev", "emulator,id=t,chardev=c"]
        state, control = f"dir={directory}", f"type=unixio,path={socket}"
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", state, "--ctrl", control]
        self._process = subprocess.Popen(command)
        wait_listening(socket, 120.0, lambda: self._process.poll() is None)

    def __enter__(self) -> _Swtpm:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.wait()
