"""The cache of complete images: limit, eviction, locks, leftovers, and several makers at once."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stillframe.errors import BusyError, HostError, NotFoundError, RefusedError, UsageError
from stillframe.image.cached import ImageCache
from stillframe.image.new_image import NewImage, cached_blocks
from stillframe.image.stored import RECORD, images_directory
from stillframe.model import BlockRecord, Manifest
from stillframe.still.index import KIND_DATA, PageRun
from stillframe.vmstate.page_records import page_records

PAGE = 4096
BLOCKS = (
    BlockRecord(idstr="pc.ram", used_length_bytes=8 << 20, page_size_bytes=PAGE),
    BlockRecord(idstr="vga.vram", used_length_bytes=1 << 20, page_size_bytes=PAGE),
)
MANIFEST = Manifest(
    created="", mode="background", stillframe_version="0", stream_bytes=0, blocks=BLOCKS
)


def name(number: int) -> str:
    return f"{number:02x}" * 32


def make(cache: ImageCache, number: int, pages: int = 16) -> bool:
    """The image of a snapshot whose first pages hold its number."""
    content = bytes([number]) * PAGE * pages
    raw = page_records(0, content, block="pc.ram")
    with NewImage(cache, BLOCKS) as new:
        new.write(raw, PageRun(0, 0, pages, KIND_DATA, 0), block=0)
        return new.commit(name(number), f"/snapshots/{number}", MANIFEST)


@pytest.fixture
def cache(tmp_path: Path) -> ImageCache:
    return ImageCache(tmp_path / "images")


def ids(cache: ImageCache) -> list[str]:
    return sorted(image.id for image in cache.images())


def left(cache: ImageCache) -> list[str]:
    """What is there beside images."""
    return [p.name for p in cache.directory.iterdir() if p.name.startswith(".")]


def test_an_image_holds_the_pages_and_is_sparse(cache: ImageCache) -> None:
    assert make(cache, 7)
    image = cache.open(name(7))
    assert image is not None
    with image:
        assert list(image.fds) == [0]
        assert os.pread(image.fds[0], 16 * PAGE, 0) == b"\7" * 16 * PAGE
        assert os.fstat(image.fds[0]).st_size == 8 << 20
        assert not os.pread(image.fds[0], 8 << 20, 16 * PAGE).strip(b"\0")
    (listed,) = cache.images()
    assert 16 * PAGE <= listed.size_bytes < 1 << 20
    assert (listed.snapshot, listed.in_use, listed.is_sound) == ("/snapshots/7", False, True)
    assert left(cache) == []


def test_a_part_of_a_run_goes_to_its_place(cache: ImageCache) -> None:
    raw = b"".join(
        page_records(n * PAGE, bytes([n]) * PAGE, block="pc.ram" if n == 10 else None)
        for n in range(10, 20)
    )
    run = PageRun(0, 10, 10, KIND_DATA, 0)
    with NewImage(cache, BLOCKS) as new:
        new.write(raw, run, block=0, part=(13, 2))
        content = os.pread(new.fds[0], 8 << 20, 0)
    assert content[13 * PAGE : 15 * PAGE] == b"\x0d" * PAGE + b"\x0e" * PAGE
    assert not content[: 13 * PAGE].strip(b"\0")
    assert not content[15 * PAGE :].strip(b"\0")


def test_more_pages_than_one_call_writes(cache: ImageCache) -> None:
    pages = 1500
    content = b"".join(n.to_bytes(8, "little") * (PAGE // 8) for n in range(1, pages + 1))
    raw = page_records(0, content, block="pc.ram")
    with NewImage(cache, BLOCKS) as new:
        new.write(raw, PageRun(0, 0, pages, KIND_DATA, 0), block=0)
        assert os.pread(new.fds[0], pages * PAGE, 0) == content


def test_only_blocks_that_an_image_may_hold() -> None:
    huge = BlockRecord(idstr="huge", used_length_bytes=8 << 20, page_size_bytes=2 << 20)
    assert cached_blocks([*BLOCKS, huge]) == [0]


def test_none_is_made_that_would_hold_nothing(cache: ImageCache) -> None:
    huge = BlockRecord(idstr="huge", used_length_bytes=8 << 20, page_size_bytes=2 << 20)
    with pytest.raises(RefusedError, match="on huge pages"):
        NewImage(cache, [huge])
    assert not cache.directory.exists()


def test_what_was_not_used_for_longest_goes_first(cache: ImageCache) -> None:
    for number in (1, 2, 3):
        make(cache, number, pages=256)
        os.utime(cache.directory / name(number) / RECORD, (number, number))  # long ago
    (size,) = {image.size_bytes for image in cache.images()}
    cache.set_limit(3 * size)
    used = cache.open(name(1))
    assert used is not None
    used.close()
    make(cache, 4, pages=256)
    assert ids(cache) == sorted([name(1), name(3), name(4)])
    cache.set_limit(size)
    assert ids(cache) == [name(4)]


def test_what_is_in_use_is_never_removed(cache: ImageCache) -> None:
    make(cache, 1, pages=256)
    image = cache.open(name(1))
    assert image is not None
    # A VM holds it by a descriptor that it has inherited.
    vm = subprocess.Popen(["sleep", "600"], pass_fds=(image.lock,))
    try:
        image.close()
        assert [one.in_use for one in cache.images()] == [True]
        cache.set_limit(0)
        with pytest.raises(BusyError, match="in use"):
            cache.remove(name(1))
        cache.forget([name(1)])
        cache.set_limit(1 << 20)
        with pytest.raises(RefusedError, match=r"does not fit.*MiB are in use.*image limit"):
            make(cache, 2, pages=256)
        assert ids(cache) == [name(1)]
    finally:
        vm.kill()
        vm.wait()
    cache.remove(name(1))
    assert ids(cache) == left(cache) == []


def test_one_that_does_not_fit_is_refused_and_leaves_nothing(cache: ImageCache) -> None:
    cache.set_limit(1 << 20)
    with pytest.raises(RefusedError, match="the limit is 1 MiB"):
        make(cache, 1, pages=512)
    assert ids(cache) == left(cache) == []


def test_one_that_passes_the_limit_is_given_up_while_it_is_made(cache: ImageCache) -> None:
    cache.set_limit(1 << 20)
    raw = page_records(0, b"x" * PAGE * 128, block="pc.ram")
    with NewImage(cache, BLOCKS) as new:
        for _ in range(2):
            new.write(raw, PageRun(0, 0, 128, KIND_DATA, 0), block=0)
        with pytest.raises(RefusedError, match="the limit is 1 MiB"):
            new.write(raw, PageRun(0, 0, 1, KIND_DATA, 0), block=0)
        assert os.fstat(new.fds[0]).st_blocks
        new.give_up()
        assert os.fstat(new.fds[0]).st_blocks == 0


def test_for_one_that_does_not_fit_nothing_goes(cache: ImageCache) -> None:
    make(cache, 1)
    with pytest.raises(RefusedError, match="does not fit"):
        cache.make_room(cache.limit_bytes + 1)
    assert ids(cache) == [name(1)]


def test_two_who_make_the_same_one(cache: ImageCache) -> None:
    made: list[bool] = []
    threads = [threading.Thread(target=lambda: made.append(make(cache, 5))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]
    assert ids(cache) == [name(5)]
    assert left(cache) == []


def test_one_that_somebody_has_written_to_is_not_used(cache: ImageCache) -> None:
    make(cache, 1)
    make(cache, 2)
    with (cache.directory / name(1) / "0.ram").open("r+b") as file:
        file.write(b"x")
    with (cache.directory / name(2) / "0.ram").open("r+b") as file:
        file.truncate(PAGE)
    assert cache.open(name(1)) is None
    assert cache.open(name(2)) is None
    assert [image.is_sound for image in cache.images()] == [False, False]
    cache.make_room(0)
    assert ids(cache) == []


def test_a_damaged_one_is_made_anew(cache: ImageCache) -> None:
    make(cache, 1)
    (cache.directory / name(1) / "0.ram").unlink()
    assert cache.open(name(1)) is None
    assert make(cache, 1)
    image = cache.open(name(1))
    assert image is not None
    image.close()


def test_a_damaged_one_that_is_in_use_is_not_taken_for_a_new_one(cache: ImageCache) -> None:
    make(cache, 1)
    image = cache.open(name(1))
    assert image is not None
    with image:
        (cache.directory / name(1) / "0.ram").chmod(0o640)
        with pytest.raises(BusyError, match="damaged, and in use"):
            make(cache, 1)
    assert make(cache, 1)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"format": 2}', b"x" * 100])
def test_what_is_no_image_is_passed_over(cache: ImageCache, content: bytes) -> None:
    make(cache, 1)
    (cache.directory / name(1) / RECORD).write_bytes(content)
    (cache.directory / "note.txt").write_text("hello")
    (cache.directory / "empty").mkdir()
    assert cache.images() == []
    assert cache.open(name(1)) is None


def test_what_is_not_ours_stays(cache: ImageCache) -> None:
    """Somebody may have named a directory of other things."""
    other = cache.directory / "photos"
    other.mkdir(parents=True)
    (other / RECORD).write_text("{}")
    make(cache, 1)
    cache.set_limit(0)
    assert (other / RECORD).exists()
    assert ids(cache) == []


def test_what_has_an_images_name_and_is_none_is_in_the_way(cache: ImageCache) -> None:
    other = cache.directory / name(1)
    other.mkdir(parents=True)
    (other / "something").touch()
    with pytest.raises(HostError, match="is in the way"):
        make(cache, 1)
    assert (other / "something").exists()
    assert left(cache) == []


def test_one_under_another_id_is_not_used(cache: ImageCache) -> None:
    make(cache, 1)
    (cache.directory / name(1)).rename(cache.directory / name(2))
    assert cache.open(name(2)) is None


def test_what_a_killed_maker_left_is_swept(cache: ImageCache) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path;"
        "from tests.unit.image.test_cached import BLOCKS;"
        "from stillframe.image.cached import ImageCache;"
        "from stillframe.image.new_image import NewImage;"
        "new = NewImage(ImageCache(Path(sys.argv[1])), BLOCKS);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(cache.directory)], check=False)
    assert len(left(cache)) == 1
    with NewImage(cache, BLOCKS):
        assert len(left(cache)) == 1  # not only once an image is complete: there may be no room
    assert left(cache) == []
    make(cache, 1)
    assert ids(cache) == [name(1)]


def test_what_is_being_made_is_not_swept(cache: ImageCache) -> None:
    with NewImage(cache, BLOCKS) as new:
        cache.sweep()
        make(cache, 1)
        assert new.commit(name(2), "", MANIFEST)
    assert ids(cache) == sorted([name(1), name(2)])


def test_whoever_comes_late_removes_no_new_one(
    cache: ImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opened the record of the old one, and gets the lock on that when all is over."""
    make(cache, 1)
    opened, replaced = threading.Event(), threading.Event()
    lock = fcntl.flock

    def late(fd: int, how: int) -> None:
        if threading.current_thread().name == "late" and not opened.is_set():
            opened.set()
            replaced.wait(60)
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    remover = threading.Thread(target=lambda: cache.remove(name(1)), name="late")
    remover.start()
    assert opened.wait(60)
    cache.remove(name(1))
    make(cache, 1)
    image = cache.open(name(1))
    assert image is not None
    with image:
        replaced.set()
        remover.join()
        assert ids(cache) == [name(1)]
        assert image.is_sound


def test_whoever_only_looks_is_no_user(cache: ImageCache) -> None:
    make(cache, 1)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            assert not any(image.in_use for image in cache.images())

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(100):
            cache.remove(name(1))
            make(cache, 1)
    finally:
        stop.set()
        for looker in lookers:
            looker.join()


def test_several_evict_at_once(cache: ImageCache) -> None:
    make(cache, 255, pages=256)
    cache.set_limit(2 * cache.images()[0].size_bytes)
    failed: list[Exception] = []

    def work(first: int) -> None:
        for number in range(first, first + 40):
            try:
                make(cache, number, pages=256)
            except Exception as error:  # noqa: BLE001 - for the test's thread
                failed.append(error)

    threads = [threading.Thread(target=work, args=(40 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert left(cache) == []


def test_whoever_opens_one_that_is_being_removed_gets_none_or_a_whole_one(
    cache: ImageCache,
) -> None:
    stop = threading.Event()
    seen: list[bytes] = []

    def open_again() -> None:
        while not stop.is_set():
            image = cache.open(name(9))
            if image is not None:
                with image:
                    seen.append(os.pread(image.fds[0], PAGE, 15 * PAGE))

    reader = threading.Thread(target=open_again)
    reader.start()
    for _ in range(40):
        make(cache, 9)
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            try:
                cache.remove(name(9))
                break
            except BusyError:
                time.sleep(0.001)
    stop.set()
    reader.join()
    assert set(seen) <= {b"\x09" * PAGE}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    with pytest.raises(HostError, match="others may write there"):
        ImageCache(theirs)
    theirs.chmod(0o700)
    os.chown(theirs, 65534, 65534)
    with pytest.raises(HostError, match="cannot be trusted"):
        ImageCache(theirs)


def test_a_directory_that_somebody_else_made_since(cache: ImageCache) -> None:
    cache.directory.mkdir()
    cache.directory.chmod(0o777)
    with pytest.raises(HostError, match="others may write there"):
        make(cache, 1)
    assert list(cache.directory.iterdir()) == []


def test_a_directory_that_cannot_be_looked_at(tmp_path: Path) -> None:
    """Such as that of root, whose HOME a service of another user still has."""
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(HostError, match="cannot look at"):
        ImageCache(tmp_path / "loop" / "images")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="is no directory"):
        ImageCache(tmp_path / "file")


def test_names(cache: ImageCache) -> None:
    make(cache, 0xAB)
    assert cache.find("ababab").id == name(0xAB)
    for wrong, kind in (("ab", UsageError), ("cdcdcd", NotFoundError), ("", UsageError)):
        with pytest.raises(kind):
            cache.find(wrong)
    with pytest.raises(NotFoundError):
        cache.remove(name(1))


def test_the_limit_stays(cache: ImageCache) -> None:
    assert cache.limit_bytes == 16 << 30
    cache.set_limit(5 << 30)
    assert ImageCache(cache.directory).limit_bytes == 5 << 30
    (cache.directory / "limit.json").write_text("nonsense")
    assert cache.limit_bytes == 16 << 30
    with pytest.raises(UsageError):
        cache.set_limit(-1)


def test_where_images_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STILLFRAME_IMAGES", str(tmp_path / "a"))
    assert images_directory() == tmp_path / "a"
    monkeypatch.delenv("STILLFRAME_IMAGES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert images_directory() == tmp_path / "stillframe" / "images"


def test_a_lock_of_somebody_who_looks_does_not_stand_in_the_way(cache: ImageCache) -> None:
    make(cache, 1)
    with (cache.directory / name(1) / RECORD).open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        image = cache.open(name(1))
        assert image is not None
        image.close()
    shutil.rmtree(cache.directory / name(1))
    assert cache.images() == []
