"""A running stock QEMU as a machine."""
