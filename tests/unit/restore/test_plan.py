"""The plan as a whole: trust, programs, overrides, places, and what people see."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guests.qemu import qemu_binary
from stillframe.errors import (
    DataError,
    HostError,
    NotFoundError,
    RefusedError,
    TrustError,
    UsageError,
)
from stillframe.restore import program as program_module
from stillframe.restore.option import takes_value
from stillframe.restore.places import choose_places
from stillframe.restore.plan import check_plan, plan_restore
from stillframe.restore.program import find_emulator, find_standard
from stillframe.restore.show import plan_lines, shown_words
from stillframe.store import open_snapshot
from tests.support.probes import has_qemu
from tests.unit.restore.recorded import Planner, machine, write_snapshot


def programs(directory: Path, *names: str) -> None:
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(0o755)


@pytest.fixture
def standard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of programs that counts as a standard one."""
    directory = tmp_path / "bin"
    programs(directory, "qemu-system-x86_64", "qemu-img")
    monkeypatch.setattr(program_module, "STANDARD_DIRECTORIES", (str(directory),))
    return directory


# Programs


@pytest.mark.parametrize(
    "recorded",
    ["/bin/sh", "sh", "../../tmp/evil", "/tmp/qemu-system-x86_64;rm", "qemu-system-", ""],
)
def test_no_emulator(recorded: str) -> None:
    with pytest.raises(TrustError, match="no QEMU system emulator"):
        find_emulator(recorded)


@pytest.mark.parametrize("recorded", ["/tmp/evil/qemu-system-x86_64", "./qemu-system-x86_64"])
def test_the_program_is_this_hosts(standard: Path, recorded: str) -> None:
    assert find_emulator(recorded) == str(standard / "qemu-system-x86_64")


def test_a_missing_program(standard: Path) -> None:
    with pytest.raises(HostError, match="no program qemu-system-sparc"):
        find_emulator("/usr/bin/qemu-system-sparc")
    with pytest.raises(HostError, match="no program '/nowhere/qemu'"):
        find_emulator("qemu-system-x86_64", "/nowhere/qemu")


@pytest.mark.parametrize("which", ["file", "directory"])
def test_a_program_that_others_can_change(standard: Path, which: str) -> None:
    target = standard if which == "directory" else standard / "qemu-img"
    target.chmod(0o777)
    with pytest.raises(HostError, match="can change"):
        find_standard("qemu-img")


def test_the_callers_own_program(tmp_path: Path) -> None:
    programs(tmp_path / "own", "my-qemu")
    assert find_emulator("/bin/sh", str(tmp_path / "own/my-qemu")).endswith("own/my-qemu")


# Trust


def check(plan: Any, *, trust: bool = False) -> None:
    check_plan(plan, trust=trust)


@pytest.mark.parametrize(
    ("mode", "why"), [(0o620, "users other than you"), (0o602, "users other than you")]
)
def test_a_snapshot_that_others_may_write(planner: Planner, mode: int, why: str) -> None:
    path = write_snapshot(planner.directory / "y.still", machine(["-m", "64"]))
    path.chmod(mode)
    with open_snapshot(path) as snapshot:
        plan = plan_restore(snapshot, program="true", directory=planner.run)
    with pytest.raises(TrustError, match=f"{why}.*it would run: /.*true -m 64") as caught:
        check(plan)
    assert caught.value.exit_code == 10
    check(plan, trust=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="missing root: only root can give a file away")
def test_a_snapshot_of_somebody_else(planner: Planner) -> None:
    path = write_snapshot(planner.directory / "y.still", machine(["-m", "64"]))
    os.chown(path, 12345, 12345)
    with open_snapshot(path) as snapshot:
        plan = plan_restore(snapshot, program="true", directory=planner.run)
    with pytest.raises(TrustError, match="it belongs to user 12345, not to you"):
        check(plan)
    check(plan, trust=True)


def test_own_snapshots_are_trusted(planner: Planner) -> None:
    check(planner.plan("-m", "64"))


def test_what_runs_programs_needs_trust(planner: Planner) -> None:
    plan = planner.plan("-plugin", "/tmp/evil.so")
    with pytest.raises(TrustError, match=r"-plugin /tmp/evil.so: it loads code"):
        check(plan)
    check(plan, trust=True)


def test_trust_does_not_help_against_a_refusal(planner: Planner) -> None:
    plan = planner.plan("-device", "vfio-pci,host=1", "-readconfig", "/x")
    with pytest.raises(
        RefusedError, match=r"cannot use -device vfio-pci,host=1 \(and 1 more\)"
    ) as e:
        check(plan, trust=True)
    assert len(e.value.reasons) == 2
    assert e.value.guest_state == "none"


def test_nothing_goes_through_a_shell(planner: Planner) -> None:
    evil = "x; rm -rf / #$(reboot)`reboot`"
    argv = planner.plan("-name", evil, "-append", evil).argv
    assert argv[1:5] == ("-name", evil, "-append", evil)


@pytest.mark.parametrize(
    "option",
    [["-kernel", "/nowhere/vmlinuz"], ["-hda", "/nowhere/disk"], ["-fw_cfg", "file=/nowhere/x"]],
)
def test_a_missing_file(planner: Planner, option: list[str]) -> None:
    plan = planner.plan(*option, here=True)
    with pytest.raises(NotFoundError, match=r"there is no /nowhere/\w+: the VM was started with -"):
        check(plan)


# The recorded command line


@pytest.mark.parametrize(
    "fields",
    [
        {"argv": ()},
        {"argv": ("q", "a\0b")},
        {"argv": ("q", "x" * (1 << 17))},
        {"argv": ("q", *["-x"] * 5000)},
        {"argv": ("q", "-device", "{")},
        {"argv": ("q", "-blockdev", '{"driver":' + "[" * 3000)},
        {"cwd": "/a\0b"},
    ],
    ids=range(7),
)
def test_absurd_command_lines(planner: Planner, fields: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        planner.plan_record(msgspec.structs.replace(machine([]), **fields))


@pytest.mark.parametrize(
    "argv", [[""], ["-netdev", ""], ["-object", ","], ["-serial", ""], ["-machine", ""]]
)
def test_odd_command_lines(planner: Planner, argv: list[str]) -> None:
    assert planner.plan(*argv).argv[0].endswith("true")


@pytest.mark.parametrize(
    "argv", [["-m"], ["-append"], ["-"], ["--"], ["--", "x"], ["-m", "1", "-x"]]
)
def test_words_that_would_shift_the_others(planner: Planner, argv: list[str]) -> None:
    with pytest.raises(DataError):
        planner.plan_record(machine(argv))
    with pytest.raises(UsageError):
        planner.plan("-m", "64", extra=argv)


def test_which_options_have_values_as_qemu_has_it() -> None:
    """Else a command line could be read as another one than QEMU reads."""
    has_qemu().require()
    done = subprocess.run([qemu_binary(), "-help"], capture_output=True, text=True, check=True)
    found = re.findall(r"(?m)^--?([a-zA-Z][\w-]*)(?:/-\w+)?( ?)(?! *or )(.?)", done.stdout)
    values = {name: bool(space) and after.strip() != "" for name, space, after in found}
    values |= {"dtb": True, "async-teardown": False}  # their lines are set otherwise
    assert len(values) > 100
    assert {name: takes_value(name) for name in values} == values


# The caller's own options


def test_a_single_option_takes_the_recorded_place(planner: Planner) -> None:
    words = planner.words("-m", "64", "-smp", "2", "-m", "65", extra=["-m", "128M"])
    assert words == ["-m", "128M", "-smp", "2"]


def test_options_with_an_id_take_the_recorded_place(planner: Planner) -> None:
    argv = ["-netdev", "tap,id=n0,fd=3", "-device", "e1000,netdev=n0,id=d0", "-device", "edu"]
    extra = ["-device", "edu,id=new", "-netdev", "user,id=n0"]
    plan = planner.plan(*argv, extra=extra)
    assert not plan.refusals
    wanted = ["-netdev", "user,id=n0", "-device", "e1000,netdev=n0,id=d0", "-device", "edu"]
    assert planner.words(*argv, extra=extra) == [*wanted, "-device", "edu,id=new"]


def test_repeated_options_are_added(planner: Planner) -> None:
    words = planner.words("-global", "a.b=c", extra=["-global", "d.e=f"])
    assert words == ["-global", "a.b=c", "-global", "d.e=f"]


def test_an_own_accelerator(planner: Planner) -> None:
    assert planner.words("-enable-kvm", extra=["-accel", "tcg"]) == ["-accel", "tcg"]


def test_own_options_are_not_judged(planner: Planner) -> None:
    plan = planner.plan("-m", "64", extra=["-plugin", "/x.so", "-made-up", "y"])
    assert not plan.risks
    assert not plan.refusals


@pytest.mark.parametrize("option", ["-daemonize", "-incoming", "--loadvm"])
def test_own_options_that_cannot_work(planner: Planner, option: str) -> None:
    with pytest.raises(UsageError, match="does not go with a restore"):
        planner.plan("-m", "64", extra=[option, "x"])


# Imported streams


def test_an_imported_stream_needs_options(planner: Planner) -> None:
    with pytest.raises(UsageError, match="give the options of the VM's QEMU after --"):
        planner.plan_record(None)


def test_an_imported_stream(planner: Planner) -> None:
    plan = planner.plan_record(None, extra=["-m", "64"])
    assert plan.argv[1:5] == ("-machine", "type=pc-q35-7.2", "-m", "64")
    plan = planner.plan_record(None, extra=["-m", "64", "-M", "pc"])
    assert plan.argv[1:5] == ("-m", "64", "-M", "pc")


# Places


def test_the_monitors_place(planner: Planner) -> None:
    plan = planner.plan("-m", "64")
    assert plan.qmp_address == f"{planner.run}/qmp.sock"
    own = str(planner.directory / "my,qmp")
    plan = planner.plan("-m", "64", options={"qmp_socket": own})
    assert plan.qmp_address == own
    assert plan.argv[-1] == f"unix:{own.replace(',', ',,')},server=on,wait=off"


def test_bad_places_for_the_monitor(planner: Planner) -> None:
    taken = planner.directory / "taken"
    taken.touch()
    for path, complaint in [
        (str(taken), "exists, and is no socket"),
        (str(planner.directory / ("x" * 120)), "is too long"),
        (str(planner.directory / "no/dir"), "no directory"),
    ]:
        with pytest.raises(UsageError, match=complaint):
            planner.plan("-m", "64", options={"qmp_socket": path})


def test_bad_directories(planner: Planner) -> None:
    with pytest.raises(UsageError, match="exists already"):
        planner.plan("-m", "64", options={"directory": planner.directory})
    with pytest.raises(UsageError, match="is too long"):
        planner.plan("-m", "64", options={"directory": planner.directory / ("d" * 100)})


def test_the_usual_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    places = choose_places("my / vm", None)
    assert places.run.parent == tmp_path / "stillframe"
    assert places.run.name.startswith("myvm-")
    assert places.disks.parent == Path("/state/stillframe/restored")
    tmp_path.chmod(0o777)
    assert tmp_path not in choose_places("vm", None).run.parents


def test_planning_makes_nothing(planner: Planner) -> None:
    disk = planner.directory / "disk"
    disk.touch()
    planner.plan("-hda", str(disk), "-serial", "stdio")
    assert sorted(os.listdir(planner.directory)) == ["disk", "x.still"]
    assert stat.S_IMODE((planner.directory / "x.still").stat().st_mode) == 0o600


# What people see


def test_the_text_of_a_plan(planner: Planner) -> None:
    kernel = planner.directory / "vmlinuz"
    kernel.touch()
    plan = planner.plan(
        "-kernel", str(kernel), "-M", "q35", "-serial", "stdio", "-daemonize", "-plugin", "/x.so"
    )
    text = "\n".join(plan_lines(plan)).replace(str(planner.directory), "DIR")
    for line in [
        "machine    pc-q35-7.2",
        "QMP        DIR/run/qmp.sock",
        "  -M q35\n    -> -M pc-q35-7.2\n       the machine by its versioned name",
        "  -daemonize\n    -> (left out)",
        "  listen  socket   DIR/run/serial.sock  (-serial)",
        "  read    file     DIR/vmlinuz  (-kernel)",
        "needs --trust\n  -kernel DIR/vmlinuz: it reads DIR/vmlinuz\n"
        "  -plugin /x.so: it loads code into QEMU",
        " -incoming fd:N",
    ]:
        assert line in text


def test_terminals_are_not_attacked(planner: Planner) -> None:
    plan = planner.plan(
        "-name",
        "a\x1b[2Jb'c",
        "-kernel",
        "/\x1b]0;x\x07",
        "-device",
        "vfio-pci,x=\x9b",
        name="\x1b[31m",
        machine_type="pc\x1b[0m",
    )
    text = "\n".join(plan_lines(plan))
    assert text.replace("\n", "").isprintable()
    with pytest.raises(TrustError) as untrusted:
        check(plan)
    assert str(untrusted.value).isprintable()
    with pytest.raises(RefusedError) as caught:
        check(plan, trust=True)
    assert str(caught.value).isprintable()


def test_shown_words_can_be_pasted() -> None:
    assert shown_words(["a b", "c'd", "e\nf"]) == "'a b' 'c'\"'\"'d' $'e\\x0af'"
