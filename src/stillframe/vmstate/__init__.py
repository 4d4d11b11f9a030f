"""QEMU's migration stream as bytes and records, without I/O."""
