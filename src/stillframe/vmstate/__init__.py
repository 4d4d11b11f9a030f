"""QEMU's migration stream: bytes and records, no I/O."""
