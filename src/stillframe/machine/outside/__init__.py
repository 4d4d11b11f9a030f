"""A VM of another process, seen from outside: what all kinds of them have in common.

``machine.qemu`` and ``machine.board.outside`` add what differs; ``machine.running`` finds them.
"""
