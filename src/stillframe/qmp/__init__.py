"""QMP, QEMU's machine protocol: the client (``client``), and parts of our server,
``board.monitor``."""
