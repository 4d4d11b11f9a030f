"""The board's parts, wired together: RAM, vCPUs, devices, their ports, lines and threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

from stillframe.board.hardware import layout
from stillframe.board.hardware.address_space import AddressSpace
from stillframe.board.hardware.alarm import Alarm
from stillframe.board.hardware.block import BLOCK, BlockDevice
from stillframe.board.hardware.boot import BoardInformation, place, stack_gpa, tell_of_dimm
from stillframe.board.hardware.clock import CLOCK, Clock
from stillframe.board.hardware.config import BoardConfig
from stillframe.board.hardware.device_thread import DeviceThread
from stillframe.board.hardware.disk import Disk
from stillframe.board.hardware.elf import Guest
from stillframe.board.hardware.entropy import ENTROPY, Entropy
from stillframe.board.hardware.framebuffer import FRAMEBUFFER, Framebuffer
from stillframe.board.hardware.interrupts import INTERRUPT_LINES, InterruptPorts
from stillframe.board.hardware.locks import LOCKS, LockUnits
from stillframe.board.hardware.ports import PortMap
from stillframe.board.hardware.power import POWER, PanicPort, Power
from stillframe.board.hardware.registers import REGISTERS
from stillframe.board.hardware.serial_channels import open_channel
from stillframe.board.hardware.serial_port import SerialPort
from stillframe.board.hardware.timer import TIMER, Timer
from stillframe.board.hardware.uart import UART, Uart
from stillframe.board.hardware.vcpu import Vcpu
from stillframe.board.memory.guest_ram import GuestRam
from stillframe.board.state.handlers import SaveStateRegistry
from stillframe.capture.signal_protection import prepare_thread
from stillframe.errors import UsageError

_FIRST_VCPU = 0
"""The vCPU that devices interrupt."""


class Hardware:
    """Everything that a guest sees. Methods need all of it stopped, unless they say otherwise."""

    def __init__(
        self,
        config: BoardConfig,
        lock: threading.RLock,
        clock: Clock,
        *,
        on_still: Callable[[], None],
        on_request: Callable[[], None],
    ) -> None:
        """
        Args:
            on_still: called when a vCPU has parked or a device thread has become quiet.
            on_request: called when the guest asks for reset or power off or panics, or when the
                board fails.

        Raises:
            HostError: no memory, or the disk or the serial line cannot be opened.
            UsageError, BusyError: as ``open_channel``.
        """
        self._config = config
        self.clock = clock
        self.disk = None if config.disk_path is None else Disk(config.disk_path)
        channel = open_channel(config.serial)
        self.space = AddressSpace()
        self._ram = GuestRam(layout.RAM_IDSTR, config.ram_bytes)
        self._vram = GuestRam(layout.VRAM_IDSTR, config.vram_bytes)
        self._dimm: GuestRam | None = None
        self.space.add(layout.RAM_GPA, self._ram)
        self.space.add(layout.VRAM_GPA, self._vram)
        ports = PortMap()
        self.alarm = Alarm(lock, clock)
        self.vcpus = tuple(
            Vcpu(
                index,
                lock,
                ports,
                self.space,
                on_parked=on_still,
                on_panic=lambda reason: self.power.panic(reason),
                on_failure=lambda reason: self.power.fail(reason),
            )
            for index in range(config.vcpus)
        )
        lines = tuple(vcpu.lines for vcpu in self.vcpus)
        first = lines[_FIRST_VCPU]
        self.timer = Timer(clock, lines, self.alarm.look)
        self.alarm.serve(self.timer)
        self.uart = Uart(first)
        self.serial = SerialPort(lock, self.uart, channel)
        self.entropy = Entropy(self.space, first, lambda: self._entropy_thread.kick())
        self.block = BlockDevice(self.disk, self.space, first, lambda: self._block_thread.kick())
        self._entropy_thread = DeviceThread("entropy", lock, self.entropy, on_still)
        self._block_thread = DeviceThread("block", lock, self.block, on_still)
        self.threads = (self._entropy_thread, self._block_thread)
        self.framebuffer = Framebuffer(self._vram, config.display_width, config.display_height)
        self.locks = LockUnits()
        self.power = Power(first, on_request)
        ports.add(0x3F8, Uart.COUNT, self.uart)
        ports.add(0x500, Clock.COUNT, clock)
        ports.add(0x510, Timer.COUNT, self.timer)
        ports.add(0x520, Entropy.COUNT, self.entropy)
        ports.add(0x540, BlockDevice.COUNT, self.block)
        ports.add(0x560, Power.COUNT, self.power)
        ports.add(0x580, LockUnits.COUNT, self.locks)
        ports.add(0x5A0, InterruptPorts.COUNT, InterruptPorts(lines))
        ports.add(0x5C0, PanicPort.COUNT, PanicPort(self.power))

    def register(self, registry: SaveStateRegistry) -> None:
        """Register every device's state, in the order in which it is saved."""
        for vcpu in self.vcpus:
            registry.register_device("cpu", REGISTERS, vcpu.registers, instance_id=vcpu.index)
        for vcpu in self.vcpus:
            registry.register_device(
                "interrupts", INTERRUPT_LINES, vcpu.lines, instance_id=vcpu.index
            )
        registry.register_device("clock", CLOCK, self.clock)
        registry.register_device("timer", TIMER, self.timer)
        registry.register_device("serial", UART, self.uart)
        registry.register_device("entropy", ENTROPY, self.entropy)
        registry.register_device("block", BLOCK, self.block)
        registry.register_device("framebuffer", FRAMEBUFFER, self.framebuffer)
        registry.register_device("locks", LOCKS, self.locks)
        registry.register_device("power", POWER, self.power)

    def start_threads(self) -> None:
        """Start all threads; vCPUs are parked and devices quiet at first."""
        self.serial.start_thread()
        self.alarm.start_thread()
        for thread in self.threads:
            thread.start_thread()
        for vcpu in self.vcpus:
            vcpu.start_thread()

    def end_threads(self) -> None:
        """Ask all threads to end, with the board lock held; ``close`` follows."""
        self.alarm.quit()
        for thread in self.threads:
            thread.quit()
        for vcpu in self.vcpus:
            vcpu.quit()

    def boot(self, guest: Guest, *, fresh: bool) -> None:
        """Place the guest in RAM, and reset the devices and vCPUs to their initial state.

        Args:
            fresh: RAM was never written.

        Raises:
            HostError: no memory for this thread's signal stack.
        """
        if not fresh:
            self._prepare_to_write()
        for device in (
            self.clock,
            self.timer,
            self.uart,
            self.entropy,
            self.block,
            self.locks,
            self.power,
        ):
            device.reset()
        config = self._config
        information = BoardInformation(
            ram_bytes=config.ram_bytes,
            vcpus=config.vcpus,
            width=config.display_width,
            height=config.display_height,
            disk_sectors=self.block.disk_sectors,
            dimm_bytes=0 if self._dimm is None else self._dimm.length_bytes,
            command_line=config.command_line,
        )
        place(self._ram, guest, information, fresh=fresh)
        for vcpu in self.vcpus:
            vcpu.reset()
            vcpu.registers.start_at(
                guest.entry,
                stack_gpa(config.ram_bytes, vcpu.index),
                (layout.INFO_GPA, vcpu.index),
            )

    def plug_dimm(self, length_bytes: int, *, tell: bool) -> None:
        """Add RAM block ``board.dimm0``.

        Args:
            tell: write it into the guest's board information.

        Raises:
            UsageError: there is one already, or it cannot have this length. HostError: no memory.
        """
        if self._dimm is not None:
            raise UsageError(f"a board has one DIMM, of {self._dimm.length_bytes} bytes")
        if not 0 < length_bytes <= layout.DIMM_LIMIT_BYTES:
            raise UsageError(f"a DIMM cannot have {length_bytes} bytes")
        if tell:
            self._prepare_to_write()
        dimm = GuestRam(layout.DIMM_IDSTR, length_bytes)
        self.space.add(layout.DIMM_GPA, dimm)
        self._dimm = dimm
        if tell:
            tell_of_dimm(self._ram, length_bytes)

    def _prepare_to_write(self) -> None:
        # RAM may be write-protected, and the thread may be any: a monitor client's, the control
        # thread, or one of the program that embeds the board.
        prepare_thread()

    def close(self) -> None:
        """Wait for the threads to end, and release RAM and files. Without the board lock."""
        self.alarm.join()
        for thread in self.threads:
            thread.join()
        for vcpu in self.vcpus:
            vcpu.join()
        self.serial.close()
        self.block.close()
        for vcpu in self.vcpus:
            vcpu.close()
        for ram in self.space.rams:
            ram.close()
