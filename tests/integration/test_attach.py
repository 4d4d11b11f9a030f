"""Remote attach on processes that check their own state, with and without our death in it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stillframe.errors import HostError, MachineError, RefusedError
from stillframe.kernel.injection import RemoteSyscalls
from stillframe.kernel.remote_attach import attach
from tests.support.native_build import build
from tests.support.probes import has_qemu, has_uffd_wp
from tests.support.victim_process import VictimProcess
from tests.support.waiting import wait_until

_ROOT = Path(__file__).resolve().parents[2]
_NOBODY = 65534
_SYS_PAUSE, _SYS_GETPID, _SYS_PAUSE_32 = 34, 39, 29


@pytest.fixture(autouse=True)
def _needs_uffd() -> None:
    has_uffd_wp().require()


@pytest.fixture
def working() -> Iterator[VictimProcess]:
    with VictimProcess("work") as victim:
        yield victim


def _attach_often(pid: int, times: int) -> None:
    chance = random.Random(times)
    for _ in range(times):
        attach(pid).close()
        time.sleep(chance.random() * 0.003)


# --- state ----------------------------------------------------------------------------------------


def test_attaching_hundreds_of_times_changes_nothing(working: VictimProcess) -> None:
    _attach_often(working.pid, 300)
    status = working.assert_unharmed()
    assert status.interrupted == 0, "a call returned EINTR without any signal"
    assert working.open_userfaultfds() == 0


def test_no_signal_is_lost_while_attaching(working: VictimProcess) -> None:
    sent = 0
    ended = threading.Event()

    def send() -> None:
        nonlocal sent
        while not ended.is_set() and sent < 3000:
            os.kill(working.pid, signal.SIGRTMIN)  # queued, so each one counts
            os.kill(working.pid, signal.SIGUSR1)
            sent += 1
            time.sleep(0.0005)

    working.command("a")
    sender = threading.Thread(target=send)
    sender.start()
    try:
        _attach_often(working.pid, 150)
    finally:
        ended.set()
        sender.join()
    working.command("A")
    wait_until(lambda: working.command().rt_signals >= sent)
    status = working.assert_unharmed()
    assert status.rt_signals == sent
    assert status.usr1_signals > 0
    assert status.alarms > 10


def test_a_signal_that_comes_meanwhile_ends_sigsuspend() -> None:
    """A call that a handler was to interrupt must not be restarted after it."""
    with VictimProcess("suspend") as victim:
        ended = threading.Event()

        def hammer() -> None:
            while not ended.is_set():
                attach(victim.pid).close()

        thread = threading.Thread(target=hammer)
        thread.start()
        try:
            for n in range(1, 201):
                os.kill(victim.pid, signal.SIGRTMIN)
                deadline = time.monotonic() + 60
                while (status := victim.command()).suspended < n:
                    assert time.monotonic() < deadline, f"call {n} did not end: {status}"
            assert status.rt_signals == 200
            assert status.errors == 0
        finally:
            ended.set()
            thread.join()


def test_a_signal_that_comes_while_it_stands_still_ends_its_call() -> None:
    """As any signal would: the handler runs, and the call is not made again."""
    with VictimProcess("pause") as victim:
        for n in range(1, 21):
            _wait_for_call(victim.pid, _SYS_PAUSE)
            failures: list[BaseException] = []
            thread = threading.Thread(target=_signal_inside, args=(victim.pid, failures))
            thread.start()
            thread.join()
            assert not failures
            deadline = time.monotonic() + 60
            while (status := victim.command()).suspended < n:
                assert time.monotonic() < deadline, f"call {n} did not end: {status}"
            assert (status.rt_signals, status.errors) == (n, 0)


def _signal_inside(pid: int, failures: list[BaseException]) -> None:
    try:
        with RemoteSyscalls(pid) as remote:
            assert remote.call(_SYS_GETPID) == pid
            os.kill(pid, signal.SIGRTMIN)
            assert remote.call(_SYS_GETPID) == pid
    except BaseException as error:  # noqa: BLE001 - raised by the caller
        failures.append(error)


def _wait_for_call(pid: int, number: int) -> None:
    wait_until(lambda: Path(f"/proc/{pid}/syscall").read_text().split()[0] == str(number))


def test_a_stopped_process_stays_stopped(working: VictimProcess) -> None:
    """SIGSTOP cannot be blocked: one that is in force, or comes meanwhile, stays in force."""
    for _ in range(20):
        os.kill(working.pid, signal.SIGSTOP)
        attach(working.pid).close()
        _wait_for_state(working.pid, "T")
        os.kill(working.pid, signal.SIGCONT)
        working.assert_unharmed()


def _wait_for_state(pid: int, state: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        stat = Path(f"/proc/{pid}/stat").read_text()
        if stat.rsplit(")", 1)[1].split()[0] == state:
            return
        assert time.monotonic() < deadline, stat
        time.sleep(0.005)


# --- our death ------------------------------------------------------------------------------------


def _wait_until_untraced(pid: int) -> None:
    # A thread is joined a moment before the kernel has let go of what it traced.
    deadline = time.monotonic() + 60
    while "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def _die_often(pid: int, times: int, most_us: int) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.attach_killer",
            *map(str, (pid, times, times, most_us)),
        ],
        cwd=_ROOT,
        check=True,
        timeout=240,
    )


def test_kill_9_of_the_attaching_process_at_any_moment(working: VictimProcess) -> None:
    for _ in range(5):
        _die_often(working.pid, 100, 9000)
        working.assert_unharmed()
    attach(working.pid).close()
    working.assert_unharmed()


def test_kill_9_of_the_attaching_process_under_signals(working: VictimProcess) -> None:
    working.command("a")
    for _ in range(2):
        _die_often(working.pid, 100, 9000)
        working.assert_unharmed()
    working.command("A")
    assert working.command().alarms > 10


@pytest.mark.parametrize("moment", ["frame", "called", "between"])
def test_the_thread_comes_back_by_itself(working: VictimProcess, moment: str) -> None:
    """The frame alone, deterministically: the tracer lets go where it would have died."""
    for _ in range(50):
        failure: list[BaseException] = []

        def abandon(failures: list[BaseException] = failure) -> None:
            try:
                remote = RemoteSyscalls(working.pid)
                remote.__enter__()
                if moment != "frame":
                    assert remote.call(_SYS_GETPID) == working.pid
                if moment == "between":
                    remote.call(_SYS_GETPID)
            except BaseException as error:  # noqa: BLE001 - raised below
                failures.append(error)

        # The kernel detaches when the thread ends, as it does when the process dies.
        thread = threading.Thread(target=abandon)
        thread.start()
        thread.join()
        assert not failure
        _wait_until_untraced(working.pid)
    working.assert_unharmed()


# --- seccomp --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["kill", "errno"])
def test_a_filter_that_forbids_it_is_evaluated_and_not_tried(mode: str) -> None:
    with VictimProcess(mode) as victim:
        for _ in range(20):
            with pytest.raises(RefusedError, match="seccomp filter does not allow userfaultfd"):
                attach(victim.pid)
        victim.assert_unharmed()


def test_a_filter_that_allows_it() -> None:
    with VictimProcess("allow") as victim:
        _attach_often(victim.pid, 20)
        victim.assert_unharmed()


@pytest.mark.qemu
def test_a_real_qemu_with_its_sandbox_on() -> None:
    has_qemu().require()
    qemu = os.environ.get("STILLFRAME_QEMU", "qemu-system-x86_64")
    denied = ("obsolete", "elevateprivileges", "spawn", "resourcecontrol")
    sandbox = ("-sandbox", ",".join(["on", *(f"{name}=deny" for name in denied)]))
    process = subprocess.Popen(
        [qemu, "-M", "none", "-nodefaults", "-display", "none", "-qmp", "stdio", *sandbox],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert "QMP" in process.stdout.readline()
        for _ in range(10):
            attach(process.pid).close()
        process.stdin.write('{"execute": "qmp_capabilities"}\n')
        process.stdin.flush()
        assert "return" in process.stdout.readline()
    finally:
        process.kill()
        process.communicate(timeout=30)


# --- privileges -----------------------------------------------------------------------------------


def _lender(victim: VictimProcess) -> Callable[[int], tuple[int, Callable[[], None]]]:
    def lend(device: int) -> tuple[int, Callable[[], None]]:
        socket.send_fds(victim.channel, [b"d"], [device])
        number = victim.command("f").result
        assert number > 2

        def take_back() -> None:
            assert victim.command(f"x {number}").result == 0

        return number, take_back

    return lend


@pytest.mark.skipif(os.geteuid() != 0, reason="missing root: starts a process as nobody")
def test_a_process_without_privileges_borrows_the_device() -> None:
    with VictimProcess("nobody") as victim:
        with pytest.raises(HostError, match="not allowed"):
            attach(victim.pid)
        if not os.path.exists("/dev/userfaultfd"):
            pytest.skip("missing userfaultfd-device: no /dev/userfaultfd (Linux 6.1)")
        for _ in range(20):
            uffd = attach(victim.pid, lend_device=_lender(victim))
            assert uffd.features
            uffd.close()
        victim.assert_unharmed()
        assert victim.open_userfaultfds() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="missing root: starts a process as nobody")
def test_a_process_without_privileges_that_serves_its_own_system_calls() -> None:
    """It is given a userfaultfd for faults in user mode, as anybody may have it."""
    with VictimProcess("nobody") as victim:
        for _ in range(20):
            uffd = attach(victim.pid, user_mode_only_ok=True)
            assert uffd.features
            assert uffd.kind == "userfaultfd-user"
            uffd.close()
        victim.assert_unharmed()
        assert victim.open_userfaultfds() == 0


# --- what cannot be attached to -------------------------------------------------------------------


def test_a_process_that_is_gone() -> None:
    process = subprocess.Popen(["true"])
    zombie = process.pid
    _wait_for_state(zombie, "Z")
    with pytest.raises(MachineError, match="gone"):
        attach(zombie)
    process.wait(timeout=30)
    with pytest.raises(MachineError, match="gone"):
        attach(zombie)


@pytest.mark.skipif(os.geteuid() != 0, reason="missing root: starts a process as nobody")
def test_a_process_of_another_user(working: VictimProcess) -> None:
    reader, writer = os.pipe()
    child = os.fork()  # and not exec: that user need not be able to read this checkout
    if child == 0:
        text = "attached"
        try:
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
            attach(working.pid)
        except BaseException as error:  # noqa: BLE001 - told to the parent
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        told = answers.read()
    os.waitpid(child, 0)
    assert told.startswith("HostError"), told
    assert "may not be inspected" in told
    assert "run as root" in told
    working.assert_unharmed()


def test_a_process_under_a_debugger(working: VictimProcess) -> None:
    gdb = shutil.which("gdb")
    if gdb is None:
        pytest.skip("missing gdb: no gdb in PATH")
    debugger = subprocess.Popen(
        [gdb, "-q", "-nx", "-ex", "set confirm off", "-p", str(working.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for_state(working.pid, "t")
        with pytest.raises(HostError, match="traces the VM") as caught:
            attach(working.pid)
        assert caught.value.guest_state == "running"
    finally:
        debugger.communicate(b"detach\nquit\n", timeout=120)
    working.assert_unharmed()
    attach(working.pid).close()


def test_a_32_bit_process() -> None:
    program = build("tests/native/pause32.c", "-m32", "-nostdlib", "-static", "-ffreestanding")
    process = subprocess.Popen([str(program)])
    try:
        _wait_for_call(process.pid, _SYS_PAUSE_32)  # it is that program now, and no Python
        with pytest.raises(RefusedError, match="64-bit"):
            attach(process.pid)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(timeout=30)
