"""A VM of another process, seen from outside: what all kinds of them share.

``machine.qemu`` and ``board.process_board`` add what differs; ``machine.finding`` finds them.
"""
