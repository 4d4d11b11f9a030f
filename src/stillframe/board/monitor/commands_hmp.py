"""QMP commands with plain-text answers: x-query-ramblock and human-monitor-command.

The texts have the format of QEMU 8.0 and later, which tools parse (QEMU ``system/physmem.c``:
ram_block_format; ``system/memory.c``: mtree_print_flatview).
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from stillframe.board.hardware.board import Board
from stillframe.board.monitor.command_set import CommandContext, CommandTable, NoArguments
from stillframe.qmp.errors import QmpError

_LAST_ADDRESS = (1 << 64) - 1


class HumanMonitorCommand(msgspec.Struct, frozen=True, rename="kebab"):
    """Arguments of ``human-monitor-command`` (QEMU ``qapi/misc.json``)."""

    command_line: str
    cpu_index: int | None = None


def add_hmp_commands(commands: CommandTable, board: Board) -> None:
    """Add the commands to the table."""
    monitor = HumanMonitor(board)

    def query_ramblock(_context: CommandContext, _arguments: NoArguments) -> object:
        return {"human-readable-text": ramblock_text(board)}

    def human_monitor(_context: CommandContext, arguments: HumanMonitorCommand) -> object:
        cpu = arguments.cpu_index
        if cpu is not None and not 0 <= cpu < board.config.vcpus:
            raise QmpError("Parameter 'cpu-index' expects a CPU number")
        return monitor.run(arguments.command_line)

    commands.add("x-query-ramblock", query_ramblock)
    commands.add("human-monitor-command", human_monitor, arguments=HumanMonitorCommand)


def ramblock_text(board: Board) -> str:
    """Return the text of ``info ramblock``.

    The board has no RAM address space as QEMU has: ``Offset`` places the blocks one after another.
    """
    lines = [
        f"{'Block Name':>24} {'PSize':>8}  {'Offset':>18} {'Used':>18} {'Total':>18} "
        f"{'HVA':>18} {'RO':>3}"
    ]
    offset = 0
    for block in board.ram_blocks():
        numbers = (offset, block.used_length_bytes, block.max_length_bytes, block.hva)
        lines.append(
            f"{block.idstr:>24} {block.page_size_bytes >> 10:>4} KiB  "
            + " ".join(f"{number:#018x}" for number in numbers)
            + f" {'ro' if block.readonly else 'rw':>3}"
        )
        offset += block.max_length_bytes
    return "".join(f"{line}\n" for line in lines)


class HumanMonitor:
    """The few commands of the human monitor that tools use."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._commands: dict[str, Callable[[list[str]], str]] = {"gpa2hva": self._gpa2hva}
        self._topics: dict[str, Callable[[], str]] = {
            "kvm": lambda: "kvm support: not compiled\n",
            "mtree": self._mtree,
            "name": lambda: f"{board.name}\n",
            "network": lambda: "",
            "ramblock": lambda: ramblock_text(board),
            "status": self._status,
        }

    def run(self, line: str) -> str:
        """Run a line and return its output or error text, with CR LF line ends as on a terminal."""
        words = line.split()
        if not words:
            return ""
        return self._run(words[0], words[1:]).replace("\n", "\r\n")

    def _run(self, name: str, words: list[str]) -> str:
        if name == "info":
            return self._info(words)
        command = self._commands.get(name)
        return command(words) if command else f"unknown command: '{name}'\n"

    def _info(self, words: list[str]) -> str:
        if not words:
            return "".join(f"info {topic}\n" for topic in self._topics)
        topic, *rest = words
        text = self._topics.get(topic)
        if text is None:
            return f"unknown command: 'info {topic}'\n"
        if topic == "mtree" and rest[:1] == ["-f"]:
            rest, text = rest[1:], self._flat_view
        if rest and topic == "mtree" and rest[0].startswith("-"):
            return _usage(f"mtree: unsupported option {rest[0]}", "info mtree")
        if rest:
            return _usage(f"{topic}: extraneous characters at the end of line", f"info {topic}")
        return text()

    def _status(self) -> str:
        state = self._board.run_state
        if state == "running":
            return "VM status: running\n"
        return f"VM status: paused{'' if state == 'paused' else f' ({state})'}\n"

    def _mtree(self) -> str:
        head = f"address-space: memory\n  {0:016x}-{_LAST_ADDRESS:016x} (prio 0, i/o): system\n"
        return head + "".join(f"  {line}\n" for line in self._ranges()) + "\n"

    def _flat_view(self) -> str:
        spaces = ["memory", *(f"cpu-memory-{n}" for n in range(self._board.config.vcpus))]
        head = "FlatView #0\n" + "".join(f' AS "{space}", root: system\n' for space in spaces)
        body = "".join(f"{line}\n" for line in self._ranges())
        return f"{head} Root memory region: system\n{body}\n"

    def _ranges(self) -> list[str]:
        return [
            f"  {one.gpa:016x}-{one.gpa + one.length_bytes - 1:016x} (prio 0, ram): {one.idstr}"
            + (f" @{one.offset_bytes:016x}" if one.offset_bytes else "")
            for one in self._board.memory_map()
        ]

    def _gpa2hva(self, words: list[str]) -> str:
        if not words:
            return _usage("unexpected end of expression", "gpa2hva")
        if len(words) > 1:
            return _usage("gpa2hva: extraneous characters at the end of line", "gpa2hva")
        try:
            gpa = int(words[0], 0)
        except ValueError:
            return _usage(f"invalid char '{words[0][0]}' in expression", "gpa2hva")
        blocks = {block.idstr: block for block in self._board.ram_blocks()}
        for one in self._board.memory_map():
            if one.gpa <= gpa < one.gpa + one.length_bytes:
                hva = blocks[one.idstr].hva + one.offset_bytes + gpa - one.gpa
                return f"Host virtual address for {gpa:#x} ({one.idstr}) is {hva:#x}\n"
        return f"No memory is mapped at address {gpa & _LAST_ADDRESS:#x}\n"


def _usage(what: str, command: str) -> str:
    return f'{what}\nTry "help {command}" for more information\n'
