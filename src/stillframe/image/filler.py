"""The filling of an image while VMs run from it: faults first, then the working set, then the rest.

The unit is a frame: it is read, its digest checked, it is decompressed, its pages are placed in the
files, and then the faults waiting for them are woken. A fault on a page that is there already is
woken at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from stillframe.errors import InternalError, MachineError, StillframeError
from stillframe.image import _fill
from stillframe.image.clone import Clone
from stillframe.image.ram_image import RamImage, no_memory
from stillframe.still.index import KIND_DATA

RECORDED_S = 10.0
"""How long after its start a filler records requested frames."""
_TODO, _TAKEN, _DONE, _DAMAGED = range(4)
_RETRY_S = 0.05
_MOST_AHEAD = 64
_MOST_WORKERS = 4
_ALONE_S = 1.0
"""For this long, the guests have all processors but one, so that their first work does not
stall."""

Fault = tuple[int, int, int, float]
"""Number of the clone, position of the block, page, time when the fault was read."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a filling.

    ``waiting``: faults waiting now. ``waited_ms``: the longest wait of a fault that needed a frame,
    from when it was read. ``trouble``: what holds it up now.
    """

    frames: int
    done: int
    faults: int
    waiting: int
    waited_ms: float
    trouble: str | None


class Filler:
    """The filler of one image for its clones, in threads of this process.

    Call :meth:`start` once they are watched, and :meth:`sweep` once they have loaded their state.
    Then either :meth:`wait` for the end, or :meth:`stop` and let another process go on
    (``Filling.hand_over``).

    Args:
        working_set: frames to load first, in this order.
    """

    def __init__(self, image: RamImage, *, working_set: Sequence[int] = ()) -> None:
        self._image = image
        self._container = image.snapshot.container
        self._index = image.snapshot.index
        self._state = bytearray([_DONE]) * self._index.frame_count
        for frame in image.frames():
            self._state[frame] = _TODO
        self._frames = self._left = self._state.count(_TODO)
        self._working_set = deque(f for f in working_set if self._state[f] == _TODO)
        self._next = 0
        self._wanted: deque[int] = deque()
        self._waiters: dict[int, list[Fault]] = {}
        self._ahead: dict[int, bytes] = {}
        self._asked: dict[int, None] = {}
        self._clones: list[Clone] = []
        self._waited_s = 0.0
        self._failure: StillframeError | None = None
        self._trouble: StillframeError | None = None
        self._read: list[_fill.Waiting] = []
        self._condition = threading.Condition()
        self._placing = self._sweeping = self._stopping = False
        self._began_s = 0.0
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._threads: list[threading.Thread] = []

    # For the owner

    def prefetch(self) -> None:
        """Decompress the working set ahead. All threads start now, while QEMU does: each thread
        start waits for the GIL."""
        if self._threads:
            return
        self._run(self._serve, "faults")
        self._run(self._work, "asked", True)
        if _MOST_WORKERS:
            self._run(self._work, "fill", False)
        for number in range(1, min(_MOST_WORKERS, os.cpu_count() or 1)):
            self._run(self._help, f"fill-{number}")

    def start(self, clones: Sequence[Clone], *, taken_over: bool = False) -> None:
        """Serve the clones' faults, and place the working set.

        Args:
            taken_over: another process filled before: ask the kernel which pages are there, and
                have it repeat all faults, which that process may have read.

        Raises:
            HostError: the kernel does not tell which pages are there.
        """
        self.prefetch()
        self._clones = list(clones)
        self._read = [clone.waiting for clone in self._clones]
        if taken_over:
            self._image.scan()
            self._skip_complete()
        self._began_s = time.monotonic()
        with self._condition:
            for frame in reversed(self._ahead):
                if self._state[frame] == _TAKEN:
                    self._state[frame] = _TODO
                    self._wanted.appendleft(frame)
            self._placing = True
            self._condition.notify_all()
        if taken_over:
            for clone in self._clones:
                clone.waiting.wake_all()

    def sweep(self) -> None:
        """Fill the rest, too. Call it only once the guests run, because they need the
        processors."""
        with self._condition:
            self._sweeping = True
            self._condition.notify_all()

    def check(self) -> None:
        """Raise the error that keeps pages from the guests; see :meth:`wait`."""
        if self._failure is not None:
            raise self._failure

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the image is complete, then release the clones; return False on timeout or
        stop.

        Raises:
            DataError: the snapshot is damaged or truncated; guests go on waiting for its damaged
                pages.
            MachineError: all clones have ended.
        """
        with self._condition:
            ended = self._condition.wait_for(
                lambda: not self._left or self._failure is not None or self._stopping, timeout_s
            )
            if self._failure is not None:
                raise self._failure
            if not ended or self._left:
                return False
        self.stop(release=True)
        return True

    def stop(self, *, release: bool = False) -> None:
        """End all threads and let go of the clones, which then wait for another filler.

        Args:
            release: the image is complete, so the clones need no filler.
        """
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        if self._stop_fd >= 0:
            os.eventfd_write(self._stop_fd, 1)
        for thread in self._threads:
            thread.join()
        if self._stop_fd >= 0:
            os.close(self._stop_fd)
            self._stop_fd = -1
        for clone in self._clones:
            if release:
                clone.release()
            else:
                clone.close()
        self._clones = []

    @property
    def asked(self) -> list[int]:
        """Frames that faults requested in the first seconds, in their order."""
        with self._condition:
            return list(self._asked)

    def progress(self) -> Progress:
        with self._condition:
            return Progress(
                frames=self._frames,
                done=self._frames - self._left,
                faults=sum(waiting.faults for waiting in self._read),
                waiting=sum(map(len, self._waiters.values())),
                waited_ms=self._waited_s * 1000,
                trouble=str(self._trouble) if self._trouble else None,
            )

    def _run(self, work: Callable[..., None], name: str, *arguments: object) -> None:
        thread = threading.Thread(
            target=work, args=arguments, name=f"stillframe-image-{name}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _skip_complete(self) -> None:
        incomplete = self._image.incomplete_frames()
        with self._condition:
            for frame, state in enumerate(self._state):
                if state == _TODO and frame not in incomplete:
                    self._state[frame] = _DONE
                    self._left -= 1

    # Faults

    def _serve(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._placing or self._stopping)
        waiting = self._read
        while waiting:
            faults = _fill.serve(waiting, self._stop_fd, -1)
            if faults is None:
                return
            now_s = time.monotonic()
            for clone, block, page, failure in faults:
                if failure:
                    self._retry_zero(waiting[clone], block, page)
                else:
                    self._ask((clone, block, page, now_s))
            if all(one.ended for one in waiting):
                self._fail(MachineError("the VMs of the image have ended", guest_state="none"))
                return

    def _retry_zero(self, clone: _fill.Waiting, block: int, page: int) -> None:
        time.sleep(_RETRY_S)  # no memory now: the fault repeats
        clone.wake(block, page)

    def _ask(self, fault: Fault) -> None:
        clone, block, page, now_s = fault
        location = self._index.lookup(self._image.numbers[block], page)
        assert location is not None  # only data pages are reported
        frame = location.frame
        with self._condition:
            if self._state[frame] != _DONE:
                self._waiters.setdefault(frame, []).append(fault)
                if now_s - self._began_s < RECORDED_S:
                    self._asked.setdefault(frame)
                if self._state[frame] == _TODO:
                    self._wanted.append(frame)
                    self._condition.notify_all()
                return
        self._clones[clone].waiting.wake(block, page)

    # Frames

    def _work(self, only_asked: bool) -> None:
        while (frame := self._take(only_asked)) is not None:
            try:
                raw = self._ahead.pop(frame, None) or self._container.read_frame(frame)
                if not self._may_place(frame, raw):
                    continue
                self._place(frame, raw)
            except Exception as error:  # noqa: BLE001 - a guest would wait for the frame for ever
                with self._condition:
                    self._state[frame] = _DAMAGED
                if not isinstance(error, StillframeError):
                    error = InternalError(f"filling failed: {error!r}")
                self._fail(error)

    def _help(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._sweeping or self._stopping)
            self._condition.wait_for(lambda: self._stopping or not self._left, _ALONE_S)
        self._work(False)

    def _take(self, only_asked: bool) -> int | None:
        """Return the next frame; None at the end."""
        with self._condition:
            while not self._stopping:
                frame = self._choose(only_asked)
                if frame is not None:
                    self._state[frame] = _TAKEN
                    return frame
                if not self._left and self._placing:
                    return None
                self._condition.wait()
        return None

    def _choose(self, only_asked: bool) -> int | None:
        queues = [self._wanted] if self._placing else []
        if not only_asked and (self._placing or len(self._ahead) < _MOST_AHEAD):
            queues.append(self._working_set)
        for queue in queues:
            while queue:
                frame = queue.popleft()
                if self._state[frame] == _TODO:
                    return frame
        if only_asked or not self._sweeping:
            return None
        self._next = self._state.find(_TODO, self._next)
        if self._next < 0:
            self._next = len(self._state)
            return None
        return self._next

    def _may_place(self, frame: int, raw: bytes) -> bool:
        """Return whether the frame may be placed; if it is too early, keep it for :meth:`start`."""
        with self._condition:
            if not self._placing:
                self._ahead[frame] = raw
            return self._placing

    def _place(self, frame: int, raw: bytes) -> None:
        for run in self._index.runs_of_frame(frame):
            if self._image.position(run.block) is None or run.kind != KIND_DATA:
                continue
            while (rc := self._image.place(raw, run)) < 0:
                if self._stopping:
                    return
                self._trouble = no_memory(-rc)
                time.sleep(_RETRY_S)  # its faults wait until there is memory
        now_s = time.monotonic()
        with self._condition:
            self._trouble = None
            self._state[frame] = _DONE
            self._left -= 1
            waiters = self._waiters.pop(frame, [])
            for *_, since_s in waiters:
                self._waited_s = max(self._waited_s, now_s - since_s)
            if not self._left:
                self._condition.notify_all()
        for clone, block, page, _ in waiters:
            self._clones[clone].waiting.wake(block, page)

    def _fail(self, error: StillframeError) -> None:
        with self._condition:
            self._failure = self._failure or error
            self._condition.notify_all()
