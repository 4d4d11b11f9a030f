"""QMP, QEMU's machine protocol: the client (``client``)."""
