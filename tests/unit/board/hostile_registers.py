"""Gives engines registers as a hostile stream might, and runs them: a process that must not die.

Run as ``python -m tests.unit.board.hostile_registers SEED COUNT``.
"""

from __future__ import annotations

import random
import struct
import sys
import threading

from unicorn.unicorn_py3 import UcError

from stillframe.board.hardware.engine import Engine
from stillframe.board.hardware.layout import GDT_GPA
from stillframe.board.hardware.registers import Registers, Segment
from stillframe.board.memory.guest_ram import GuestRam

_SHORT = {"selectors", "fp_exponents", "fpuc", "fpus", "fptag", "fpcs", "fpds", "fpop", "cr8"}
_RUN_S = 0.005


class NoPorts:
    def port_in(self, port: int, size_bytes: int) -> int:
        return 0

    def port_out(self, port: int, size_bytes: int, value: int) -> None:
        return None


def number(choose: random.Random, bits: int) -> int:
    """Any, but rather small, large or a power of two."""
    match choose.randrange(5):
        case 0:
            return choose.getrandbits(bits)
        case 1:
            return (1 << bits) - 1 - choose.getrandbits(min(bits, 12))
        case 2:
            return 1 << choose.randrange(bits)
        case _:
            return choose.getrandbits(min(bits, 16))


def hostile(choose: random.Random) -> Registers:
    registers = Registers()
    for name, value in list(vars(registers).items()):
        if choose.random() < 0.6:
            continue
        bits = 16 if name in _SHORT else 64
        if isinstance(value, list):
            value[:] = [number(choose, bits) for _ in value]
        elif isinstance(value, Segment):
            value.selector, value.base = number(choose, 16), number(choose, 64)
            value.limit, value.flags = number(choose, 32), number(choose, 32)
        elif isinstance(value, int):
            setattr(registers, name, number(choose, bits))
    if choose.random() < 0.7:
        registers.eip = choose.randrange(1 << 16)
    return registers


def give(choose: random.Random) -> None:
    ram = GuestRam("test.ram", 1 << 20)
    ram.write(0, choose.randbytes(1 << 16))
    if choose.random() < 0.5:
        ram.write(GDT_GPA, struct.pack("<3Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF))
    engine = Engine(NoPorts())
    engine.map(0, ram)
    timer = threading.Timer(_RUN_S, engine.stop)
    try:
        registers = hostile(choose)
        engine.write_registers(registers)
        engine.clear_stop()
        timer.start()
        engine.run()
        engine.read_registers(registers)
        for address in (0, registers.idt.base, registers.gdt.base):
            engine.translate(address, write=False)
    except UcError:
        pass  # refused, which is an answer
    finally:
        timer.cancel()
        if timer.ident is not None:
            timer.join()
        engine.close()
        ram.close()


if __name__ == "__main__":
    generator = random.Random(int(sys.argv[1]))
    for _ in range(int(sys.argv[2])):
        give(generator)
    print("survived")
