"""``migrate`` and ``migrate-incoming`` of the board: precopy, postcopy and background snapshots.

The states and their order are QEMU's; see ``docs/concepts/migration.md``.
"""
