"""Verbs of other tools (restic, borg, virsh), and the commands that do the same here."""

from __future__ import annotations

from typing import Final

OTHER_VERBS: Final = {
    word: what
    for words, what in (
        ("backup create save snapshot", "'stillframe take VM' takes a snapshot into the store"),
        ("snapshots list", "'stillframe ls' lists the snapshots"),
        (
            "info stats",
            "'stillframe ls' has the sizes, 'stillframe show NAME' tells of one snapshot",
        ),
        (
            "forget",
            "'stillframe rm NAME' removes a snapshot, 'stillframe prune --keep-...' those that a"
            " policy does not keep",
        ),
        ("delete remove", "'stillframe rm NAME' removes a snapshot"),
        ("compact", "'stillframe prune' makes long chains short; space comes free by itself"),
        (
            "mount umount dump extract cat",
            "'stillframe export NAME' writes RAM, an ELF core or QEMU's stream, with no mount",
        ),
        ("unlock break-lock", "a store has no locks: whoever dies leaves none"),
        ("recover repair-index rebuild-index", "'stillframe repair' makes the catalog anew"),
        ("passwd", "'stillframe key add' and 'key rm' change who can open the store"),
        ("rename", "'stillframe tag NAME TAG' names a snapshot: VM@TAG"),
        ("load start revert", "'stillframe restore NAME' runs a snapshot as a new VM"),
        ("clone", "'stillframe fork NAME|VM' runs several VMs from one"),
    )
    for word in words.split()
}
"""The other tool's verb, and the sentence that names our command."""
