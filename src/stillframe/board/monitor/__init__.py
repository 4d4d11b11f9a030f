"""The board's QMP server and its commands."""
