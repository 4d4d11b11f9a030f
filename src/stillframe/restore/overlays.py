"""Makes the overlays of a plan with ``qemu-img`` (QEMU ``docs/tools/qemu-img.rst``)."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from stillframe.errors import HostError
from stillframe.restore.program import find_standard
from stillframe.restore.records import DiskOverlay
from stillframe.restore.show import printable

_TIMEOUT_S = 60.0


class _ImageInfo(msgspec.Struct, rename="kebab"):
    virtual_size: int
    format: str


def make_overlays(overlays: Sequence[DiskOverlay]) -> None:
    """Make all overlays; the disks themselves are only read.

    Raises:
        HostError: ``qemu-img`` is missing, or cannot read a disk or write an overlay.
    """
    if not overlays:
        return
    program = find_standard("qemu-img")
    for overlay in overlays:
        info = _info(program, overlay)
        # -u: the base is not opened again, which the lock of a running VM would forbid.
        base = ["-b", overlay.base, "-F", info.format]
        target = [overlay.overlay, str(info.virtual_size)]
        _run(
            [program, "create", "-q", "-u", "-f", "qcow2", *base, "--", *target],
            f"cannot make an overlay over {printable(overlay.base)}",
        )
        Path(overlay.overlay).chmod(0o600)


def _info(program: str, overlay: DiskOverlay) -> _ImageInfo:
    chosen = ["-f", overlay.base_format] if overlay.base_format else []
    failure = f"cannot read the disk {printable(overlay.base)}"
    output = _run(
        [program, "info", "-U", "--output=json", *chosen, "--", overlay.base],
        failure,
    )
    try:
        return msgspec.json.decode(output, type=_ImageInfo)
    except msgspec.MsgspecError as error:
        raise HostError(failure, why=str(error)) from error


def _run(command: list[str], failure: str) -> bytes:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(failure, why=f"qemu-img took longer than {_TIMEOUT_S:g} s") from error
    except (OSError, ValueError) as error:
        raise HostError(failure, why=str(error)) from error
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise HostError(failure, why=printable(words[-1]) if words else None)
    return done.stdout
