"""The overlays of a plan, made with ``qemu-img`` (QEMU ``docs/tools/qemu-img.rst``)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any

import msgspec

from stillframe.errors import HostError
from stillframe.restore.program import find_standard
from stillframe.restore.records import DiskOverlay, RunAs
from stillframe.restore.run_as import identity
from stillframe.restore.show import printable

_TIMEOUT_S = 60.0


class _ImageInfo(msgspec.Struct, rename="kebab"):
    virtual_size: int
    format: str


def make_overlays(overlays: Sequence[DiskOverlay], run_as: RunAs | None = None) -> None:
    """Make all overlays, as the VM's user; the disks themselves are only read.

    Raises:
        HostError: ``qemu-img`` is missing, or cannot read a disk or write an overlay.
    """
    if not overlays:
        return
    program = find_standard("qemu-img")
    for overlay in overlays:
        info = _info(program, overlay, run_as)
        # -u: do not open the base again, which the lock of a running VM would forbid.
        base = ["-b", overlay.base, "-F", info.format]
        target = [overlay.overlay, str(info.virtual_size)]
        _run(
            [program, "create", "-q", "-u", "-f", "qcow2", *base, "--", *target],
            f"cannot make an overlay over {printable(overlay.base)}",
            run_as,
        )


def _info(program: str, overlay: DiskOverlay, run_as: RunAs | None) -> _ImageInfo:
    chosen, base = ["-f", overlay.base_format] if overlay.base_format else [], overlay.base
    if base.startswith("json:"):
        chosen, base = [], f"json:{json.dumps(_for_info(json.loads(base[5:])))}"
    failure = f"cannot read the disk {printable(overlay.base)}"
    output = _run(
        [program, "info", "-U", "--output=json", *chosen, "--", base],
        failure,
        run_as,
    )
    try:
        return msgspec.json.decode(output, type=_ImageInfo)
    except msgspec.MsgspecError as error:
        raise HostError(failure, why=str(error)) from error


def _for_info(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree as far as its size needs it: without keys, and without what is below."""
    return {
        key: _for_info(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if key not in ("backing", "encrypt", "key-secret")
    }


def _run(command: list[str], failure: str, run_as: RunAs | None) -> bytes:
    try:
        done: subprocess.CompletedProcess[bytes] = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            umask=0o077,
            **identity(run_as),
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
