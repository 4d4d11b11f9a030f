"""The user of a restored VM: what was another user's never runs as root (credentials(7))."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path
from typing import Any

from stillframe.restore.records import RunAs

_NOGROUP = 65534


def choose_user(uid: int) -> RunAs | None:
    """Return the user to restore a recorded VM of ``uid`` as; None if it is the caller, or if the
    caller is not root and cannot become another user."""
    if uid == os.geteuid() or os.geteuid() != 0 or not 0 < uid < 0xFFFFFFFF:
        return None
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return RunAs(uid=uid, gid=_NOGROUP)
    groups: tuple[int, ...] = ()
    kvm = Path("/dev/kvm")
    if kvm.exists() and kvm.stat().st_mode & stat.S_IRGRP:
        # The only one of the user's groups that a VM may need.
        group = kvm.stat().st_gid
        groups = (group,) if group in os.getgrouplist(entry.pw_name, entry.pw_gid) else ()
    return RunAs(uid=uid, gid=entry.pw_gid, groups=tuple(g for g in groups if g))


def identity(run_as: RunAs | None) -> dict[str, Any]:
    """Return the arguments with which ``subprocess`` drops root's rights before exec: groups, then
    gid, then uid."""
    if run_as is None:
        return {}
    return {"user": run_as.uid, "group": run_as.gid, "extra_groups": run_as.groups}
