"""The doctor's checks for boards."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

from stillframe.board.memory.own_protection import open_own_protection
from stillframe.doctor.checks import Check
from stillframe.doctor.host import Look, check_userfaultfd, host_check, waiting_child
from stillframe.kernel.remote_attach import attach
from stillframe.kernel.userfaultfd import own_userfaultfd


def _userfaultfd() -> Check:
    with own_userfaultfd() as uffd:
        pass
    if uffd.kind == "userfaultfd":
        return check_userfaultfd()
    return host_check(
        "userfaultfd",
        "warn",
        "for boards only: of faults in user mode",
        "run as root, or set vm.unprivileged_userfaultfd=1, for other VMs",
    )


def _attach() -> Check:
    with waiting_child() as pid:
        attach(pid, user_mode_only_ok=True).close()
    return host_check("attach", "ok", "a userfaultfd was made in another process and fetched")


def _board() -> Check:
    """Our own VM needs no privileges: without userfaultfd it protects its RAM with mprotect."""
    try:
        version = importlib.metadata.version("unicorn")
    except importlib.metadata.PackageNotFoundError:
        return host_check(
            "board",
            "warn",
            "the Unicorn engine is not installed: our own VM cannot be run",
            "pip install 'stillframe[board]'",
        )
    protection = open_own_protection()
    protection.close()
    return host_check(
        "board", "ok", f"Unicorn {version}; our own VM protects its RAM by {protection.kind}"
    )


class BoardChecks:
    """The board's ``doctor.host.KindChecks``."""

    vmm = "board"
    always: Mapping[str, Look] = {"board": _board}
    alone: Mapping[str, Look] = {"userfaultfd": _userfaultfd, "attach": _attach}


CHECKS = BoardChecks()
