"""The port map: which device answers at which I/O port."""

from __future__ import annotations

from typing import Protocol

UNKNOWN_PORT = 0xFFFFFFFF
"""What an unknown port reads as, truncated to the size of the access."""


class PortDevice(Protocol):
    """A device with I/O ports. A vCPU's thread calls it with the board lock held; it must not wait
    for anything."""

    def read_port(self, offset: int, size_bytes: int, vcpu: int) -> int:
        """Return the value at a port, counted from the device's first; the caller truncates it."""

    def write_port(self, offset: int, size_bytes: int, value: int, vcpu: int) -> None:
        """Take a value of ``size_bytes`` (1, 2 or 4) that vCPU ``vcpu`` wrote."""


class PortMap:
    """Dispatches port accesses to devices. Filled when the board is made."""

    def __init__(self) -> None:
        self._devices: dict[int, tuple[PortDevice, int]] = {}

    def add(self, first: int, count: int, device: PortDevice) -> None:
        for offset in range(count):
            if first + offset in self._devices:
                raise ValueError(f"port {first + offset:#x} is taken")
            self._devices[first + offset] = (device, offset)

    def read(self, port: int, size_bytes: int, vcpu: int) -> int:
        entry = self._devices.get(port)
        value = UNKNOWN_PORT if entry is None else entry[0].read_port(entry[1], size_bytes, vcpu)
        return value & (1 << 8 * size_bytes) - 1

    def write(self, port: int, size_bytes: int, value: int, vcpu: int) -> None:
        entry = self._devices.get(port)
        if entry is not None:
            entry[0].write_port(entry[1], size_bytes, value & (1 << 8 * size_bytes) - 1, vcpu)
