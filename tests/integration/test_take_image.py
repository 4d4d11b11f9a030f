"""``take --image``: the complete image of what is being saved."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.errors import RefusedError, UsageError
from stillframe.image.cached import ImageCache
from stillframe.image.keeping import ImageKeeping
from stillframe.image.new_image import NewImage
from tests.integration.cli import program
from tests.support.board_process import ledger
from tests.support.image_cache import RAM_MIB, image_cache, image_source, run, taken, wrong_pages  # noqa: F401 - fixtures
from tests.support.killing import kill_at_random_moments
from tests.support.small_file_system import mounted_tmpfs
from tests.support.taking import consistency, take

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("places")]


@pytest.mark.parametrize("mode", ["background", "stop"])
def test_a_take_makes_it_in_its_own_pass(
    source: GuestVm, cache: ImageCache, tmp_path: Path, mode: str
) -> None:
    file = tmp_path / "x.still"
    snapshot_id = taken(source, file, mode=mode)
    assert [image.id for image in cache.images()] == [snapshot_id]
    assert wrong_pages(cache, file) == []
    assert consistency(source, file).consistent


def test_that_of_an_increment_is_whole(source: GuestVm, cache: ImageCache, tmp_path: Path) -> None:
    """Most of its pages come from the parent, which is an increment itself."""
    first, second, third = (tmp_path / f"{n}.still" for n in range(3))
    take(source, first)
    api.take(source.pid, second, parent=first).wait(120)
    source.wait_tick()
    taken(source, third, parent=second)
    assert third.stat().st_size < first.stat().st_size / 4
    assert wrong_pages(cache, third) == []


def test_that_of_a_restored_vm_whose_unchanged_pages_nobody_reads(
    source: GuestVm, cache: ImageCache, tmp_path: Path
) -> None:
    first, second = tmp_path / "1.still", tmp_path / "2.still"
    take(source, first)
    (vm, _) = api.fork(first, 2, wait=True)
    done = api.take(vm.pid, second, image=True, parent=first).wait(120)
    assert done.statistics.pages.unchanged > 1000
    assert wrong_pages(cache, second) == []


def test_a_take_whose_image_has_no_room_is_a_take_all_the_same(
    source: GuestVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.still"
    with mounted_tmpfs(tmp_path / "small", "size=16m", "mode=0700") as place:
        monkeypatch.setenv("STILLFRAME_IMAGES", str(place))
        done = api.take(source.pid, file, image=True).wait(120)
        assert any(
            note.startswith("no image is kept: ") and "No space left" in note for note in done.notes
        ), done.notes
        assert list(place.iterdir()) == []
        api.verify(file)
        monkeypatch.setenv("STILLFRAME_IMAGES", str(tmp_path / "limited"))
        api.image_limit(1 << 20)
        done = api.take(source.pid, tmp_path / "y.still", image=True).wait(120)
        assert any("the limit is 1 MiB" in note for note in done.notes), done.notes
        assert api.images() == []
        shown = run("image", "add", str(file))
        assert shown.returncode == 3
        assert "does not fit" in shown.stderr
    assert source.is_progressing()


def test_the_image_leaves_the_snapshot_its_room(
    source: GuestVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the disk of the snapshot, which has room for that alone."""
    take(source, tmp_path / "plain.still")
    size = ((tmp_path / "plain.still").stat().st_size >> 20) * 4 // 3
    with mounted_tmpfs(tmp_path / "disk", f"size={size}m", "mode=0700") as place:
        monkeypatch.setenv("STILLFRAME_IMAGES", str(place / "images"))
        done = api.take(source.pid, place / "x.still", image=True).wait(120)
        assert any("No space left" in note for note in done.notes), done.notes
        api.verify(place / "x.still")
        assert list((place / "images").iterdir()) == []


def test_a_take_whose_image_cannot_be_begun_is_a_take_all_the_same(
    source: GuestVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted_tmpfs(tmp_path / "small", "nr_inodes=2", "mode=0700") as place:
        monkeypatch.setenv("STILLFRAME_IMAGES", str(place))
        done = api.take(source.pid, tmp_path / "x.still", image=True).wait(120)
    assert any("No space left" in note for note in done.notes), done.notes
    api.verify(tmp_path / "x.still")


def test_the_guest_does_not_wait_for_a_slow_disk_of_the_image(
    source: GuestVm, cache: ImageCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up before the spill is full, and nothing is written from then on."""
    write, written, done = NewImage.write, 0, threading.Event()

    def slow(*args: object, **options: object) -> None:
        nonlocal written
        written += 1
        done.wait(1.0)
        write(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(NewImage, "write", slow)
    taken = api.take(source.pid, tmp_path / "x.still", image=True, spill_bytes=16 << 20).wait(120)
    assert any("too slow" in note for note in taken.notes), taken.notes
    assert written < RAM_MIB // 4  # of about one for each MiB that the guest has filled
    assert list(cache.directory.iterdir()) == []
    api.verify(tmp_path / "x.still")


def test_while_the_guest_stands_still_nothing_is_written_to_the_image(
    source: GuestVm, cache: ImageCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only once the snapshot has its name, so that the guest has gone on."""
    file, write = tmp_path / "x.still", NewImage.write
    named: list[bool] = []

    def noted(*args: object, **options: object) -> None:
        named.append(file.exists())
        write(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(NewImage, "write", noted)
    taken(source, file, mode="stop")
    assert set(named) == {True}
    assert wrong_pages(cache, file) == []


def test_a_take_that_keeps_an_image_is_killed_at_any_moment(
    source: GuestVm, cache: ImageCache, tmp_path: Path
) -> None:
    """The guest goes on, an image that has a name is whole, and nothing else stays."""
    directory = tmp_path / "killed"
    directory.mkdir()
    kill_at_random_moments(
        source, directory, lambda: None, times=6, seed=29, words=("--image", "--disks", "none")
    )
    assert all(image.is_sound for image in cache.images())
    cache.sweep()
    assert [path.name for path in cache.directory.iterdir() if path.name.startswith(".")] == []
    taken(source, tmp_path / "next.still")
    assert wrong_pages(cache, tmp_path / "next.still") == []


def test_a_snapshot_into_a_pipe_has_an_image_too(source: GuestVm, tmp_path: Path) -> None:
    with (tmp_path / "x.still").open("wb") as file:
        done = program.run("take", source.pid, "-o", "-", "--image", "--disks", "none", stdout=file)
    assert done.returncode == 0, done.stderr
    (image,) = api.images()
    assert not image.snapshot.startswith("/")  # nobody knows where that went
    assert api.restore(tmp_path / "x.still").image_path is None
    kept = program.run(
        "take", source.pid, "-o", "-", "--image", "--mode", "stop", "--disks", "none",
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert kept.returncode == 0
    assert b"no image is kept: " in kept.stderr


def test_a_take_that_fails_keeps_none(
    source: GuestVm, cache: ImageCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLFRAME_FAULT", "manifest")
    with pytest.raises(Exception, match="fault point"):
        taken(source, tmp_path / "x.still")
    assert list(cache.directory.iterdir()) == []
    assert source.is_progressing()


def test_an_encrypted_snapshot_has_none(source: GuestVm, tmp_path: Path) -> None:
    key = api.make_key(passphrase="secret")
    file = tmp_path / "x.still"
    with pytest.raises(UsageError, match="in the clear; leave --image out"):
        taken(source, file, key=key)
    assert not file.exists()
    api.take(source.pid, file, key=key).wait(120)
    with pytest.raises(RefusedError, match="in the clear"):
        api.add_image(file, keys=api.Keys(passphrase="secret"))
    assert source.is_progressing()


def test_what_is_never_restored_on_one_has_none(source: GuestVm, tmp_path: Path) -> None:
    file = tmp_path / "x.still"
    with pytest.raises(UsageError, match="for analysis is never restored"):
        taken(source, file, for_analysis=True)
    api.take(source.pid, file, for_analysis=True).wait(120)
    with pytest.raises(RefusedError, match="for analysis is never restored"):
        api.add_image(file)
    assert source.is_progressing()


def test_a_board_has_none(tmp_path: Path) -> None:
    file = tmp_path / "x.still"
    with ledger("--ram", 16 << 20, options="rate=20") as board:
        with pytest.raises(UsageError, match="boards do not run on one"):
            api.take(board.pid, file, image=True).wait(60)
        api.take(board.pid, file).wait(60)
        with pytest.raises(RefusedError, match="boards do not run on one"):
            api.add_image(file)


def test_of_a_store_it_goes_with_its_snapshot(
    source: GuestVm, cache: ImageCache, tmp_path: Path
) -> None:
    store = api.init(tmp_path / "store")
    first = api.take(source.pid, store=store, image=True).wait(120)
    second = api.take(source.pid, store=store, image=True).wait(120)
    assert sorted(image.id for image in cache.images()) == sorted([first.id, second.id])
    for entry in store.list():
        assert wrong_pages(cache, Path(store.location(entry))) == []
    api.rm("origin@latest", store=store)
    assert [image.id for image in cache.images()] == [first.id]
    api.prune(keep_last=-1, store=store)
    assert len(cache.images()) == 1


def test_the_snapshot_does_not_wait_for_the_rest_of_its_image(
    source: GuestVm, cache: ImageCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes of its parents may be much, and far away."""
    store = api.init(tmp_path / "store")
    api.take(source.pid, store=store).wait(120)
    copy, seen = ImageKeeping._copy_rest, []

    def copy_rest(*args: object) -> None:
        seen.append(len(store.list()))
        copy(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageKeeping, "_copy_rest", copy_rest)
    second = api.take(source.pid, store=store, image=True).wait(120)
    assert seen == [2]
    assert wrong_pages(cache, Path(store.location(store.find(second.id)))) == []
