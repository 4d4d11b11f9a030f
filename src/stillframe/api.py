"""The public functions of Stillframe, in one place.

The rooms below are imported by the function that needs them: reading a snapshot needs no
userfaultfd, and listing VMs no compressor.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from stillframe.errors import HostError, NotFoundError, UsageError
from stillframe.version import __version__

if TYPE_CHECKING:
    from stillframe.doctor.checks import Check, CheckStatus
    from stillframe.doctor.survey import SurveyedVm
    from stillframe.hosting.running_board import RunningBoard
    from stillframe.machine import Hindrance, Machine
    from stillframe.machine.board.board_command import Protection
    from stillframe.machine.outside.machine import OutsideMachine
    from stillframe.machine.outside.vm_info import VmInfo
    from stillframe.model import Statistics
    from stillframe.restore.records import RestorePlan
    from stillframe.restore.start import RestoredVm
    from stillframe.snapshot.job import JobControl, SnapshotJob
    from stillframe.snapshot.take import TakenSnapshot
    from stillframe.store.backends import Sink
    from stillframe.store.snapshot import Snapshot
    from stillframe.store.verify import VerifyReport
    from stillframe.vmstate.source import Source

__all__ = [
    "BOARD_GUESTS",
    "COMPRESSIONS",
    "DEFAULT_SPILL_BYTES",
    "EXPORT_FORMATS",
    "MODES",
    "Check",
    "CheckStatus",
    "Compression",
    "ExportFormat",
    "Hindrance",
    "Machine",
    "Mode",
    "OutsideMachine",
    "Protection",
    "RestorePlan",
    "RestoredVm",
    "RunningBoard",
    "Sink",
    "Snapshot",
    "SnapshotJob",
    "Source",
    "Statistics",
    "StrPath",
    "SurveyedVm",
    "TakenSnapshot",
    "VerifyReport",
    "VmInfo",
    "build_guest",
    "check_board",
    "connect",
    "doctor",
    "export",
    "import_stream",
    "list_vms",
    "open",
    "plan_lines",
    "plan_restore",
    "restore",
    "standard_output",
    "start_board",
    "survey",
    "take",
    "verify",
    "work_directory",
]

_TYPES: Final = {
    "Check": "stillframe.doctor.checks",
    "CheckStatus": "stillframe.doctor.checks",
    "Hindrance": "stillframe.machine",
    "Machine": "stillframe.machine",
    "OutsideMachine": "stillframe.machine.outside.machine",
    "Protection": "stillframe.machine.board.board_command",
    "RestorePlan": "stillframe.restore.records",
    "RestoredVm": "stillframe.restore.start",
    "RunningBoard": "stillframe.hosting.running_board",
    "Sink": "stillframe.store.backends",
    "Snapshot": "stillframe.store.snapshot",
    "SnapshotJob": "stillframe.snapshot.job",
    "Source": "stillframe.vmstate.source",
    "Statistics": "stillframe.model",
    "SurveyedVm": "stillframe.doctor.survey",
    "TakenSnapshot": "stillframe.snapshot.take",
    "VerifyReport": "stillframe.store.verify",
    "VmInfo": "stillframe.machine.outside.vm_info",
}
"""Classes of what the functions take and return, and where they live."""


def __getattr__(name: str) -> Any:
    if name == "BOARD_GUESTS":
        return importlib.import_module("stillframe.machine.board.guests").GUEST_NAMES
    if name in _TYPES:
        return getattr(importlib.import_module(_TYPES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


Compression: TypeAlias = Literal["zstd", "none"]
ExportFormat: TypeAlias = Literal["qemu", "raw", "elf"]
Mode: TypeAlias = Literal["background", "stop"]
StrPath: TypeAlias = str | os.PathLike[str]

COMPRESSIONS: Final[tuple[Compression, ...]] = ("zstd", "none")
EXPORT_FORMATS: Final[tuple[ExportFormat, ...]] = ("qemu", "raw", "elf")
MODES: Final[tuple[Mode, ...]] = ("background", "stop")
DEFAULT_SPILL_BYTES: Final = 256 << 20
BOARD_GUESTS: tuple[str, ...]
"""The guests that come with the package."""


def list_vms() -> list[VmInfo]:
    """The QEMUs and boards that run on this host, by pid. The guests are not touched."""
    from stillframe.machine.running import list_vms as listed

    return listed()


def survey() -> list[SurveyedVm]:
    """The running VMs, and whether each can be snapshotted, else why not.

    Connects to each VM's monitor for a moment. The guests are not touched.
    """
    from stillframe.doctor.survey import survey as surveyed

    return surveyed()


def connect(vm: str | int, *, timeout_s: float = 5.0) -> OutsideMachine:
    """Connect to a running VM. The guest is not touched; use it as a context manager.

    Args:
        vm: QMP socket path, ``host:port``, pid, or the VM's name.
        timeout_s: how long its monitor may take to answer.

    Raises:
        NotFoundError: no such VM or socket.
        UsageError: the name is ambiguous, or the VM has no QMP monitor.
        BusyError: every monitor of the VM is held by another client.
        HostError: not permitted. MachineError: the VM does not answer.
    """
    from stillframe.machine.running import connect as connected

    return connected(str(vm), timeout_s=timeout_s)


def doctor(vm: str | int | None = None, *, directory: StrPath = ".") -> list[Check]:
    """What this host, and one VM, lack for snapshots, each with its remedy.

    The host is tried for real: a small process of ours is attached to as a VM would be. The
    guest of ``vm`` is not touched.

    Args:
        directory: where snapshots would go; its free space is looked at.

    Raises:
        NotFoundError, UsageError: there is no such VM. Whatever else stands in the way is in
            the list.
    """
    from stillframe.doctor.host import host_checks
    from stillframe.doctor.vm import vm_checks

    if vm is None:
        return host_checks(Path(directory))
    seen = vm_checks(str(vm))
    return [*host_checks(Path(directory), for_board=seen.vmm == "board"), *seen.checks]


def take(
    vm: str | int | Machine,
    output: StrPath | Sink,
    *,
    compression: Compression = "zstd",
    level: int | None = None,
    spill_bytes: int = DEFAULT_SPILL_BYTES,
    max_bandwidth_bytes_per_s: int | None = None,
    mode: Mode = "background",
    arm: bool = True,
    overwrite: bool = False,
    on_progress: Callable[[Statistics], None] | None = None,
) -> SnapshotJob:
    """Begin a snapshot of a running VM, and return at once; the job's own thread does the work.

    The destination is opened before the VM is touched. When the job ends, however it ends, the
    guest runs (if it ran before) and nothing of ours is left in it.

    Args:
        vm: as for :func:`connect`; or a machine, which stays the caller's to close.
        output: file to make, with mode 0600 and only once it is complete; or a sink.
        level: of zstd, -50 to 19; None chooses while it runs, so that the snapshot is durable
            soonest. Not with ``compression="none"``.
        spill_bytes: most memory for pages that the guest overwrote before they were written.
        max_bandwidth_bytes_per_s: limit on what is written; None is unlimited.
        mode: ``background``, or ``stop`` to keep the guest stopped while it is saved.
        arm: protect RAM before the stop, so that the downtime does not grow with RAM.
        overwrite: replace a file of that name.
        on_progress: called from the job's thread about ten times a second; must be quick.

    Returns:
        The job: ``wait()``, ``cancel()``, ``stats``, or ``await job``. ``wait`` raises
        NotFoundError, UsageError, BusyError, HostError, RefusedError (the VM was not touched),
        MachineError, SinkError, SnapshotFailed or SnapshotCancelled; ``guest_state`` tells
        what the guest does then.

    Raises:
        UsageError: options that make no sense, or the file exists.
        SinkError: the destination may not be written to.
    """
    from stillframe.snapshot.job import SnapshotJob
    from stillframe.snapshot.options import SnapshotOptions
    from stillframe.snapshot.take import take_snapshot

    if spill_bytes <= 0:
        raise UsageError(f"a spill of {spill_bytes} bytes makes no sense")
    if max_bandwidth_bytes_per_s is not None and max_bandwidth_bytes_per_s <= 0:
        raise UsageError(f"a bandwidth of {max_bandwidth_bytes_per_s} bytes/s makes no sense")
    _check_choice("mode", mode, MODES)
    options = SnapshotOptions(
        compression_level="adaptive"
        if (compression, level) == ("zstd", None)
        else _level(compression, level),
        spill_bytes=spill_bytes,
        max_bandwidth_bytes_per_s=max_bandwidth_bytes_per_s,
        mode=mode,
        arm=arm,
    )
    sink = _open_sink(output, overwrite)

    def work(control: JobControl) -> TakenSnapshot:
        with _aborting(sink):
            if not isinstance(vm, str | int):
                return take_snapshot(control, vm, sink, options)
            control.enter("setup", "connecting")
            with connect(vm) as machine:
                return take_snapshot(control, machine, sink, options)

    return SnapshotJob(work, on_progress=on_progress)


def open(path: StrPath) -> Snapshot:  # noqa: A001 - stillframe.open, as gzip.open
    """Open a snapshot file: manifest, index, any page, the stream. Use it as a context manager.

    Raises:
        NotFoundError: no such file.
        UsageError: not a regular file. HostError: not permitted.
        DataError: not a snapshot, damaged, or of a version that we do not know.
    """
    from stillframe.store.snapshot import Snapshot

    return Snapshot.open(path)


def verify(path: StrPath, *, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Check every digest of a snapshot file, and that its stream parses to the end.

    Args:
        progress: called with (bytes of the stream done, bytes in all).

    Raises:
        DataError: the file is damaged; it names the place. Else as :func:`open`.
    """
    with open(path) as snapshot:
        return snapshot.verify(progress=progress)


def export(
    path: StrPath,
    output: StrPath | Sink,
    *,
    format: ExportFormat,  # noqa: A002 - the command line's word
    block: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a snapshot's content in a form that other programs read.

    Args:
        format: ``qemu``, the migration stream; ``raw``, guest-physical memory from address 0
            on, or one block; ``elf``, a core file with guest-physical segments and vCPUs.
        block: only with ``raw``: the block to write.
        progress: called with the bytes written so far.

    Raises:
        UsageError: the arguments do not go together, or the file exists.
        NotFoundError: no such block. SinkError: the destination cannot take it.
        DataError: the snapshot is damaged. Else as :func:`open`.
    """
    from stillframe.store.backends.counting import counting
    from stillframe.store.export_elf import export_elf
    from stillframe.store.export_qemu import export_qemu
    from stillframe.store.export_raw import export_raw

    _check_choice("format", format, EXPORT_FORMATS)
    if block is not None and format != "raw":
        raise UsageError(f"format {format} holds all blocks", remedy="one block: format raw")
    with open(path) as snapshot:
        sink = _open_sink(output, overwrite)
        if progress is not None:
            sink = counting(sink, progress)
        with _aborting(sink):
            if format == "qemu":
                export_qemu(snapshot, sink)
            elif format == "elf":
                export_elf(snapshot, sink)
            else:
                export_raw(snapshot, sink, block=block)


def import_stream(
    source: StrPath | Source,
    output: StrPath | Sink,
    *,
    compression: Compression = "zstd",
    level: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Turn a QEMU migration stream into a snapshot file; returns its id.

    Args:
        source: a file, or anything open for reading bytes (a pipe, standard input).
        progress: called with the bytes of the stream read so far.

    Raises:
        NotFoundError, HostError: there is no such stream, or it may not be read.
        SinkError: the destination cannot be written.
        DataError: the stream is damaged, or does not hold a whole VM.
        UsageError: options that make no sense, or the file exists.
    """
    from stillframe.store.import_stream import import_stream as imported

    encoded = _level(compression, level)
    with _opened(source) as stream:
        sink = _open_sink(output, overwrite)
        with _aborting(sink):
            return imported(
                stream,
                sink,
                stillframe_version=__version__,
                level=_writer_level(encoded),
                progress=progress,
            )


def plan_restore(
    path: StrPath,
    *,
    qmp_socket: str | None = None,
    extra_args: Sequence[str] = (),
    program: str | None = None,
    paused: bool = False,
) -> RestorePlan:
    """Say how a snapshot would be started, and what that would touch. Nothing is made or started.

    Arguments and errors are those of :func:`restore`, which carries such a plan out.
    """
    from stillframe.restore.plan import plan_restore as planned

    with open(path) as snapshot:
        return planned(
            snapshot,
            qmp_socket=qmp_socket,
            extra_args=extra_args,
            program=program,
            paused=paused,
        )


def plan_lines(plan: RestorePlan) -> Iterator[str]:
    """A plan as lines for people, with nothing in them that a terminal would obey."""
    from stillframe.restore.show import plan_lines as lines

    return lines(plan)


def restore(
    path: StrPath,
    *,
    qmp_socket: str | None = None,
    trust: bool = False,
    extra_args: Sequence[str] = (),
    program: str | None = None,
    paused: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> RestoredVm:
    """Start a new VM from a snapshot. The VM that it was taken of is not touched.

    The new VM runs if the old one ran at the instant and ``paused`` is not set; it needs no
    process of ours afterwards. Its disks are overlays over the recorded ones.

    Args:
        qmp_socket: where its monitor is to listen; else a private place.
        trust: the caller has read the plan, and answers for a file that is not the caller's
            own, or that runs programs of the host.
        extra_args: QEMU options of the caller, in place of recorded ones or besides them.
        program: another QEMU than the recorded one, a name or a path.
        on_progress: called with the bytes of the stream sent, and the bytes in all.

    Raises:
        NotFoundError: no such file, or a file of the VM is gone.
        TrustError: read the plan first. RefusedError: an option cannot be used.
        UsageError, HostError, DataError: the arguments, the host, the snapshot.
        MachineError: QEMU did not take it; its own words. No VM and no file is left behind.
    """
    from stillframe.restore.start import restore as restored

    return restored(
        path,
        qmp_socket=qmp_socket,
        trust=trust,
        extra_args=extra_args,
        program=program,
        paused=paused,
        on_progress=on_progress,
    )


def check_board() -> None:
    """Find out whether a board can be run here.

    Raises:
        HostError: the extra ``board`` is not installed.
    """
    from stillframe.hosting.running_board import check_engine

    check_engine()


def work_directory(purpose: str) -> AbstractContextManager[Path]:
    """A private directory for files that nobody wants afterwards. What a process that was killed
    left for the same purpose is removed.

    Raises:
        HostError: it cannot be made.
    """
    from stillframe.hosting.work_directory import work_directory

    return work_directory(purpose)


def build_guest(source: StrPath, output: StrPath) -> str:
    """Compile a guest for the board: a C file, or a directory of them, with the guest library.

    Returns:
        The compiler's warnings.

    Raises:
        NotFoundError: no such source. UsageError: the compiler refuses it, in its words; or the
            output is no name for a file. SinkError: it has no directory that may be written to.
        HostError: there is no C compiler.
    """
    from stillframe.machine.board.guests import build_guest as built
    from stillframe.store.backends.local import LocalSink

    LocalSink(output, overwrite=True).abort()  # its name and directory, as those of other outputs
    return built(Path(source), Path(output))


def start_board(
    guest: StrPath | None = None,
    *,
    ram_bytes: int | None = None,
    vcpus: int | None = None,
    name: str = "",
    qmp: StrPath | None = None,
    disk: StrPath | None = None,
    incoming: StrPath | None = None,
    display: StrPath | None = None,
    resolution: str | None = None,
    serial: str = "none",
    append: str = "",
    paused: bool = False,
    protection: Protection = "auto",
) -> RunningBoard:
    """Start a board, our own VM, in this process; it has threads of its own.

    Args:
        guest: an ELF file (docs/design/board.md), or one of ``BOARD_GUESTS``; may be left out with
            ``incoming``, and is needed for a reset only then.
        ram_bytes: 64 MiB if it is not said. vcpus: 1 if it is not said.
        name: in ``ps``; else as its guest.
        qmp: where its monitor listens; else in a private place, see ``RunningBoard.qmp``.
        disk: a raw file, which the guest may write to.
        incoming: a snapshot file, a file with a stream, or a migration URI, in place of a start.
            A snapshot file also tells RAM, vCPUs, resolution, guest, name and command line, where
            they are not said.
        display: recorded only: whoever wants the picture asks ``save_picture``.
        resolution: of the display, such as ``640x480``.
        serial: ``stdio``, ``none``, a file, or ``unix:PATH``.
        append: the guest's command line.
        paused: the guest waits for ``cont``.
        protection: how it write-protects its RAM for snapshots that it takes of itself.

    Raises:
        UsageError: options that make no sense, or nothing to run.
        HostError: the extra ``board`` is not installed, or the host does not give what is needed.
        NotFoundError, DataError: the guest, or what is to come in, cannot be read.
    """
    from stillframe.hosting.recorded import recorded_board
    from stillframe.hosting.running_board import RunningBoard as Running
    from stillframe.machine.board.board_command import parse_options

    given = {
        "--ram": ram_bytes,
        "--cpus": vcpus,
        "--name": name or None,
        "--disk": disk,
        "--display": display,
        "--resolution": resolution,
        "--serial": serial,
        "--append": append or None,
        "--protection": protection,
    }
    words = [] if guest is None else [os.fspath(guest)]
    words += [f"{option}={value}" for option, value in given.items() if value is not None]
    source = None if incoming is None else os.fspath(incoming)
    if "" in (guest, source):
        raise UsageError("an empty word is no file", remedy="name a guest, or what is to come in")
    base = recorded_board(source) if source is not None else None
    return Running(
        parse_options(words, cwd=str(Path.cwd()), base=base).board,
        qmp=None if qmp is None else os.fspath(qmp),
        incoming=source,
        paused=paused,
    )


def standard_output() -> Sink:
    """A sink into standard output, for :func:`take`, :func:`export` and :func:`import_stream`.

    Raises:
        UsageError: it is a terminal. SinkError: it is closed.
    """
    from stillframe.store.backends.pipe import PipeSink

    return PipeSink(1)


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"there is no {what} {value!r}", remedy=f"choose {', '.join(choices)}")


def _level(compression: Compression, level: int | None) -> int | None:
    """The options' compression level: None for none."""
    from stillframe.store.frames import LEVEL_DEFAULT, check_level

    _check_choice("compression", compression, COMPRESSIONS)
    if compression == "none":
        if level is not None:
            raise UsageError("compression none has no level")
        return None
    return check_level(LEVEL_DEFAULT if level is None else level)


def _writer_level(level: int | None) -> int:
    from stillframe.store.frames import LEVEL_NONE

    return LEVEL_NONE if level is None else level


def _open_sink(output: StrPath | Sink, overwrite: bool) -> Sink:
    if isinstance(output, str | os.PathLike):
        from stillframe.store.backends.local import LocalSink

        return LocalSink(output, overwrite=overwrite)
    return output


@contextmanager
def _aborting(sink: Sink) -> Iterator[None]:
    """Leave nothing behind unless the sink was committed."""
    try:
        yield
    finally:
        sink.abort()


@contextmanager
def _opened(source: StrPath | Source) -> Iterator[Source]:
    if not isinstance(source, str | os.PathLike):
        yield source
        return
    try:
        stream: Any = Path(source).open("rb")  # noqa: SIM115 - closed below
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no file {source}") from error
    except IsADirectoryError as error:
        raise UsageError(f"{source} is a directory", remedy="name a file") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise HostError(f"cannot read {source}", why=why) from error
    with stream:
        yield stream
