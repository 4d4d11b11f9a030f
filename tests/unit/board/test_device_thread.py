"""The thread of a device that does DMA, and what stopping it waits for."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from stillframe.board.hardware.device_thread import DeviceThread, Finish, Work

TIMEOUT_S = 20.0


class Device:
    """Work that begins when the test lets it, and ends so."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.quiet_told = threading.Event()
        self.began = threading.Event()
        self.may_end = threading.Event()
        self.pieces = 0
        self.to_put_away = 0
        self.done: list[str] = []
        self.thread = DeviceThread("test", self.lock, self, self.quiet_told.set)

    def next_work(self, *, running: bool) -> Work | None:
        if running and self.pieces:
            return lambda: self.work("pieces")
        if self.to_put_away:
            return lambda: self.work("to_put_away")
        return None

    def work(self, what: str) -> Finish:
        assert not self.lock._is_owned()  # type: ignore[attr-defined]
        self.began.set()
        assert self.may_end.wait(TIMEOUT_S)

        def finish() -> None:
            setattr(self, what, getattr(self, what) - 1)
            self.done.append(what)

        return finish


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    device.thread.start_thread()
    yield device
    device.may_end.set()
    with device.lock:
        device.thread.quit()
    device.thread.join()


def test_a_stop_waits_for_the_piece_at_hand_and_no_more(device: Device) -> None:
    with device.lock:
        device.pieces = 5
        device.thread.resume()
    assert device.began.wait(TIMEOUT_S)
    with device.lock:
        device.thread.pause()
        assert not device.thread.quiet
        assert not device.done
    device.may_end.set()
    assert device.quiet_told.wait(TIMEOUT_S)
    with device.lock:
        assert device.thread.quiet
        assert (device.done, device.pieces) == (["pieces"], 4)
        device.thread.resume()
        assert not device.thread.quiet
        device.thread.pause()
    assert device.done.count("pieces") <= 2


def test_an_idle_one_is_quiet_at_once(device: Device) -> None:
    with device.lock:
        device.thread.resume()
        device.thread.pause()
        assert device.thread.quiet
        device.pieces = 1
        device.thread.kick()  # it must not wake up
    assert not device.began.wait(0.05)


def test_what_must_be_put_away_is(device: Device) -> None:
    device.may_end.set()
    with device.lock:
        device.thread.resume()
    with device.lock:
        device.to_put_away = 3
        device.thread.pause()
    assert device.quiet_told.wait(TIMEOUT_S)
    assert device.done == ["to_put_away"] * 3


def test_kicked_when_there_is_work(device: Device) -> None:
    device.may_end.set()
    with device.lock:
        device.thread.resume()
    with device.lock:
        device.pieces = 1
        device.thread.kick()
    assert device.began.wait(TIMEOUT_S)


def test_one_that_fails_does_not_keep_the_board_from_stopping(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(what: str) -> Finish:
        raise RuntimeError("a bug")

    device.work = fail  # type: ignore[method-assign]
    with device.lock:
        device.pieces = 1
        device.thread.resume()
    assert device.quiet_told.wait(TIMEOUT_S)
    with device.lock:
        device.thread.pause()
        assert device.thread.quiet
        device.thread.resume()
        device.thread.pause()
        assert device.thread.quiet
    assert "a bug" in caplog.text
