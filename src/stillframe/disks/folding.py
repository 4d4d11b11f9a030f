"""Folding of our overlays back into the images below them, while the VM runs.

``block-commit`` of the top image is a mirror that ends with ``job-complete``, which switches the VM
to the image below (QEMU ``qapi/block-core.json``, ``block/mirror.c``). A fold never writes to an
image that a snapshot needs.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from stillframe.disks.drives import OURS, writable_drives
from stillframe.disks.images import qemu_img
from stillframe.disks.pins import is_nobodys, pinned_by, unpin
from stillframe.disks.users import users_of
from stillframe.errors import BusyError, HostError, MachineError, RefusedError
from stillframe.machine.process.resume import process_alive, start_time
from stillframe.machine.process.vm_info import reachable_path
from stillframe.qmp.client import QmpClient
from stillframe.qmp.command import QmpCommandError
from stillframe.qmp.replies import as_list, as_map

MARK = ".stillframe-"
SUFFIX = ".qcow2"
_FOLDS = f"{OURS}fold-"
_OVERLAY = re.compile(r"\.stillframe-[0-9a-f]{8}-[0-9]+\.qcow2$")
_POLL_S = 0.02
_READY_S = 600.0
_ENDING_S = 30.0


class Fold(msgspec.Struct, frozen=True, kw_only=True):
    """The overlays of one disk that can be folded.

    ``into``: the image that receives their content. ``overlays``: from the top down. ``kept``:
    those below ``into``, which stay. ``needed_by``: the snapshots they stay for, and the processes
    that have ``into`` open, such as clones. ``bytes``: what the overlays take now.
    """

    disk: str
    root: str
    node: str
    into: str
    overlays: tuple[str, ...]
    kept: tuple[str, ...]
    needed_by: tuple[str, ...]
    bytes: int


def new_token(pid: int) -> str:
    """Return a token that makes the names of one take unique; its first half identifies the VM."""
    return _vm_part(pid) + secrets.token_hex(2)


def _vm_part(pid: int) -> str:
    return hashlib.sha256(f"{pid}-{start_time(pid)}".encode()).hexdigest()[:4]


def is_overlay(path: str) -> bool:
    """Return whether an image is one of our overlays, by its name, so that this also holds for a VM
    that was started anew with it."""
    return _OVERLAY.search(path) is not None


def plan_folds(
    qmp: QmpClient, pid: int, *, only: Sequence[str] | None = None, also_pinned: bool = False
) -> tuple[Fold, ...]:
    """Return what folding would do. The guest is not touched.

    Args:
        only: these overlays, and none other. also_pinned: even overlays that a snapshot pins.

    Raises:
        MachineError: the monitor went away.
    """
    found = []
    for drive in writable_drives(qmp, pid):
        names = [name for _format, name in drive.layers]
        ours = 0
        while ours < len(names) - 1 and is_overlay(names[ours]):
            ours += 1
        if not ours:
            continue
        depth, holders = _foldable(pid, names, ours, only, also_pinned=also_pinned)
        found.append(
            Fold(
                disk=drive.label,
                root=drive.node,
                node=drive.format_node,
                into=names[depth],
                overlays=tuple(names[:depth]),
                kept=tuple(names[depth:ours]),
                needed_by=holders,
                bytes=sum(_allocated(name) for name in names[:depth]),
            )
        )
    return tuple(found)


def _foldable(
    pid: int, names: Sequence[str], ours: int, only: Sequence[str] | None, *, also_pinned: bool
) -> tuple[int, tuple[str, ...]]:
    """Return how many overlays from the top can be folded, and the holders of the next one."""
    for depth, overlay in enumerate(names[:ours]):
        if only is not None and overlay not in only:
            return depth, ()
        holder = None if also_pinned else pinned_by(overlay)
        if holder is not None:
            return depth, (holder,)
        below = reachable_path(Path(f"/proc/{pid}"), names[depth + 1]) or names[depth + 1]
        if users := users_of(below, besides=pid):
            return depth, tuple(f"process {user}" for user in users)
    return ours, ()


def fold_job(overlay: str) -> str:
    """Return the name of the job that folds an overlay, by which the guard can finish it."""
    return f"{_FOLDS}{hashlib.sha256(overlay.encode()).hexdigest()[:8]}"


def fold(
    qmp: QmpClient,
    pid: int,
    *,
    only: Sequence[str] | None = None,
    also_pinned: bool = False,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Fold, ...]:
    """Fold what can be folded; the guest runs meanwhile, and is on the image below afterwards.

    Raises:
        RefusedError: another program uses an image. BusyError: a block job works on the disk.
        MachineError: the monitor went away, or the guest writes faster than the fold.
    """
    _end_jobs(qmp, _FOLDS)
    plan = plan_folds(qmp, pid, only=only, also_pinned=also_pinned)
    for one in plan:
        if one.overlays:
            _fold(qmp, one, step)
            for path in one.overlays:
                remove_overlay(path)
    return plan


def has_ended(pid: int, start: int) -> bool:
    """Return whether a VM whose monitor is closed has exited, waiting up to half a minute."""
    deadline_s = time.monotonic() + _ENDING_S
    while process_alive(pid, start):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True


def fold_of_ended(path: str) -> None:
    """Fold an overlay whose VM has ended into the image below, from which the VM would be started.

    Raises:
        HostError: qemu-img fails, for instance because a VM uses the image.
    """
    deadline_s = time.monotonic() + _ENDING_S
    while Path(path).exists():
        try:
            qemu_img(["commit", "-q", "-f", "qcow2", path], f"cannot fold {path} back")
            remove_overlay(path)
        except HostError:  # an exiting process may still hold its locks
            if time.monotonic() > deadline_s:
                raise
            time.sleep(_POLL_S)


def _fold(qmp: QmpClient, one: Fold, step: Callable[[int, int], None]) -> None:
    nodes = _nodes_by_file(qmp)
    job = fold_job(one.overlays[0])
    arguments: dict[str, object] = {"job-id": job, "device": one.root, "auto-dismiss": False}
    if one.root != one.node:  # below a filter
        arguments["top-node"] = one.node
    into = nodes.get(one.into)
    if into is not None:
        arguments["base-node"] = into
    else:
        arguments["base"] = one.into
    try:
        qmp.execute("block-commit", arguments)
    except QmpCommandError as error:
        if " lock" in error.description:
            raise RefusedError(
                f"disk {one.disk} cannot be folded",
                why=f"another program uses {one.into}, such as a VM that was restored from it",
                remedy="end that VM first",
            ) from error
        raise BusyError(
            f"disk {one.disk} cannot be folded",
            why=error.description,
            remedy="wait for the block job to end, or cancel it",
            guest_state="running",
        ) from error
    completed = False
    try:
        completed = _follow(qmp, job, one, step)
    finally:
        with contextlib.suppress(MachineError):
            if not completed:
                qmp.execute("job-cancel", {"id": job})
                _wait_concluded(qmp, job)
            qmp.execute("job-dismiss", {"id": job})
    for path in one.overlays:
        node = nodes.get(path)
        if node is not None:
            with contextlib.suppress(QmpCommandError):
                qmp.execute("blockdev-del", {"node-name": node})


def _follow(qmp: QmpClient, job: str, one: Fold, step: Callable[[int, int], None]) -> bool:
    deadline_s = time.monotonic() + _READY_S
    asked = False
    while True:
        state = _job(qmp, job)
        status = state.get("status")
        if status == "ready" and not asked:
            qmp.execute("job-complete", {"id": job})
            asked = True
        elif status == "concluded" or not state:
            if state.get("error"):
                raise MachineError(
                    f"folding disk {one.disk} failed",
                    why=str(state.get("error")),
                    remedy="the guest goes on with its overlay; look at the image's storage",
                    guest_state="running",
                )
            return True
        if time.monotonic() > deadline_s:
            raise MachineError(
                f"disk {one.disk} was not folded in {_READY_S:g} s",
                why="the guest writes faster than that",
                remedy="try it again when it is less busy",
                guest_state="running",
            )
        done, total = state.get("current-progress"), state.get("total-progress")
        step(done if isinstance(done, int) else 0, total if isinstance(total, int) else 0)
        time.sleep(_POLL_S)


def _job(qmp: QmpClient, name: str) -> dict[str, object]:
    jobs = map(as_map, as_list(qmp.execute("query-jobs")))
    return next((dict(job) for job in jobs if job.get("id") == name), {})


def _wait_concluded(qmp: QmpClient, job: str) -> None:
    deadline_s = time.monotonic() + 10.0
    while time.monotonic() < deadline_s:
        if _job(qmp, job).get("status") in ("concluded", None):
            return
        time.sleep(_POLL_S)


def tidy(qmp: QmpClient, pid: int) -> None:
    """Remove what a dead take left behind: jobs, nodes, and overlays that no snapshot needs.

    The caller must hold the VM's lock. The guest keeps running.

    Raises:
        MachineError: the monitor went away.
    """
    _end_jobs(qmp, OURS)
    overlays = [
        name
        for drive in writable_drives(qmp, pid)
        for _format, name in drive.layers
        if is_overlay(name)
    ]
    with contextlib.suppress(RefusedError, BusyError):
        fold(qmp, pid, only=[name for name in overlays if is_nobodys(name)])
    unused = {
        str(as_map(node).get("node-name")): str(as_map(as_map(node).get("image")).get("filename"))
        for node in as_list(qmp.execute("query-named-block-nodes"))
        if str(as_map(node).get("node-name")).startswith(OURS)
    }
    _remove_unused_files(qmp, pid)
    for _round in range(2):  # a node may be below another one
        for node, file in list(unused.items()):
            with contextlib.suppress(QmpCommandError):
                qmp.execute("blockdev-del", {"node-name": node})
                del unused[node]
                if is_overlay(file):
                    remove_overlay(file)


def _end_jobs(qmp: QmpClient, prefix: str) -> None:
    """Cancel the jobs of a dead process."""
    for job in map(as_map, as_list(qmp.execute("query-jobs"))):
        name = str(job.get("id"))
        if name.startswith(prefix):
            with contextlib.suppress(QmpCommandError):
                if job.get("status") != "concluded":
                    qmp.execute("block-job-cancel", {"device": name, "force": True})
                    _wait_concluded(qmp, name)
                qmp.execute("job-dismiss", {"id": name})


def _remove_unused_files(qmp: QmpClient, pid: int) -> None:
    """Remove overlays made for this VM, beside its images, that QEMU never opened."""
    in_use = files_in_use(qmp)
    for drive in writable_drives(qmp, pid):
        for _format, name in drive.layers:
            image = Path(reachable_path(Path(f"/proc/{pid}"), name) or name)
            for path in image.parent.glob(f"{glob.escape(image.name)}{MARK}{_vm_part(pid)}*"):
                if is_overlay(str(path)) and str(path) not in in_use and is_nobodys(str(path)):
                    remove_overlay(str(path))


def remove_overlay(path: str) -> None:
    """Remove an overlay that nothing uses, and its pin; never raises."""
    with contextlib.suppress(OSError):
        Path(path).unlink(missing_ok=True)
        unpin(path)


def files_in_use(qmp: QmpClient) -> frozenset[str]:
    """Return the image files of all nodes.

    Raises:
        MachineError: the monitor went away.
    """
    return frozenset(_nodes_by_file(qmp))


def _nodes_by_file(qmp: QmpClient) -> dict[str, str]:
    """Return the format nodes, by their image's name."""
    found: dict[str, str] = {}
    for node in map(as_map, as_list(qmp.execute("query-named-block-nodes"))):
        name = str(as_map(node.get("image")).get("filename"))
        if node.get("drv") not in ("file", "host_device", "throttle", "copy-on-read"):
            found[name] = str(node.get("node-name"))
    return found


def _allocated(path: str) -> int:
    try:
        return Path(path).stat().st_blocks * 512
    except OSError:
        return 0
