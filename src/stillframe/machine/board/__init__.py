"""The board: our own x86-64 VM on the Unicorn engine (docs/design/board.md)."""
