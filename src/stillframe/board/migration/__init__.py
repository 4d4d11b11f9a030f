"""``migrate`` and ``migrate-incoming`` of the board: precopy, postcopy and background snapshots.

States and order are QEMU's; ``docs/concepts/migration.md`` draws them.
"""
