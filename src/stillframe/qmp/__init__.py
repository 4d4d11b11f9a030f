"""QMP, QEMU's machine protocol: the client (``client``) and the server (``server``)."""
