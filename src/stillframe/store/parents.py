"""The search for an increment's parent files, by their ids."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

from stillframe.errors import DataError, NotFoundError, StillframeError, UsageError
from stillframe.still.container import Container
from stillframe.still.sealing import DataKey, Unlock
from stillframe.still.sinks import Source
from stillframe.still.trailer import read_trailer
from stillframe.store import small_objects
from stillframe.store.backends.bucket import Bucket, is_bucket_url
from stillframe.store.backends.local_source import LocalSource
from stillframe.store.backends.objects import Backend
from stillframe.store.locations import open_location
from stillframe.store.records import SNAPSHOTS, Entry, catalog_key, data_key
from stillframe.store.sealed_backend import SealedBackend
from stillframe.store.wholes import WholeForm, decoded, pointer_key, read_whole, whole_key

SUFFIX = ".still"
VARIABLE = "STILLFRAME_PARENTS"
_BETWEEN_PLACES = re.compile(r":(?!//)")
"""A colon that is not part of a bucket URL."""
_SMALL_MAX_BYTES = 1 << 16


class ParentFiles:
    """A ``still.chain.Resolve``: looks for each parent in the given places, then at its recorded
    path (if this user took the increment on this host), then beside the increment.

    Args:
        places: files, bucket URLs of files, and directories. The colon-separated places in
            ``STILLFRAME_PARENTS`` follow them.
        unlock: gives the keys of encrypted parents.
    """

    def __init__(
        self, places: Sequence[str | os.PathLike[str]] = (), unlock: Unlock | None = None
    ) -> None:
        self._unlock = unlock
        known = filter(None, _BETWEEN_PLACES.split(os.environ.get(VARIABLE, "")))
        self._places = [os.fspath(place) for place in (*places, *known)]

    def __call__(self, child: Container) -> Container:
        """Return the parent's file, or its whole form.

        Raises:
            NotFoundError: it is nowhere; the error lists the searched places.
        """
        parent = child.manifest.parent
        assert parent is not None
        looked: list[str] = []
        for place in self._candidates(child, parent.path):
            if place in looked:
                continue
            looked.append(place)
            for file in _files(place):
                found = _opened(file, parent.id)
                if found is None:
                    continue
                if _may_be_shown(found, child):
                    return whole_form_beside(Container(found, self._unlock), self._unlock)
                found.close()
                looked[-1] += f" ({file} belongs to somebody else)"
        why = f"looked for at {', '.join(looked)}"
        if parent.path and parent.path not in looked:
            why += f", not at {parent.path}: the increment was not taken here by you"
        raise NotFoundError(
            f"the parent {parent.id} of {child.source.description} is not there",
            why=why,
            remedy="say where it is with --parent-dir",
        )

    def _candidates(self, child: Container, recorded: str) -> Iterator[str]:
        yield from self._places
        own = child.source.description
        if is_bucket_url(own):
            yield from _in_catalog(own, child)
            return
        directory = Path(own).absolute().parent
        # A foreign file must not choose where we look: an automount would make root connect to
        # another host. And no file may make us connect to a bucket.
        if recorded and not is_bucket_url(recorded):
            if child.was_taken_here():
                yield recorded
            yield str(directory / Path(recorded).name)
        yield str(directory)


def whole_form_beside(file: Container, unlock: Unlock | None) -> Container:
    """Return the whole form of an opened file if there is one beside it, else the file itself.

    Raises:
        DataError: the whole form is damaged, or another snapshot's. The file is closed.
    """

    def pointer() -> WholeForm | None:
        place = pointer_key(file.place)
        if is_bucket_url(place):
            folder, _, name = place.rpartition("/")
            return decoded(Bucket(folder).read(name), place)
        with closing(_beside(file, place)) as source:
            return decoded(source.read_at(0, min(source.size_bytes, _SMALL_MAX_BYTES)), place)

    def data(nonce: str) -> Container:
        return Container(_beside(file, whole_key(file.place, nonce)), unlock)

    return read_whole(file, pointer, data)


def _beside(file: Container, place: str) -> Source:
    """Open a file beside another. Raises NotFoundError if there is none that its owner may read."""
    try:
        source = open_location(place) if is_bucket_url(place) else _regular_file(place)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no file {place}") from error
    except (OSError, UsageError, ValueError) as error:
        raise DataError(f"{place} cannot be read", why=str(error)) from error
    if not _may_be_shown(source, file):
        source.close()
        raise NotFoundError(f"{place} belongs to somebody else")
    return source


def _in_catalog(own: str, child: Container) -> Iterator[str]:
    """Yield the parent's location according to the catalog of the child's store."""
    parent = child.manifest.parent
    assert parent is not None
    place, _, name = own.rpartition(f"/{SNAPSHOTS}")
    if not place or not name:
        return
    with suppress(StillframeError):
        backend: Backend = Bucket(place)
        if child.secret is not None:
            backend = SealedBackend(backend, DataKey(child.key_id, child.secret))
        entry = small_objects.read(backend, catalog_key(parent.id), Entry)
        yield f"{place}/{data_key(entry.name)}"


def _files(place: str) -> list[str]:
    """Return the file, or the snapshots in the directory; the path may be invalid."""
    if is_bucket_url(place):
        return [place]
    path = Path(place)
    try:
        return sorted(map(str, path.glob(f"*{SUFFIX}"))) if path.is_dir() else [place]
    except (OSError, ValueError):
        return []


def _opened(place: str, parent_id: str) -> Source | None:
    """Return the opened file if it holds that snapshot, else None."""
    try:
        source = open_location(place) if is_bucket_url(place) else _regular_file(place)
    except (StillframeError, OSError, ValueError):
        return None
    try:
        if read_trailer(source)[0].snapshot_id == parent_id:
            return source
    except DataError:
        pass
    source.close()
    return None


def _regular_file(place: str) -> Source:
    """Open a regular file and nothing else: opening a watchdog device, for example, starts its
    timer."""
    fd = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(f"{place} is not a regular file")
        return LocalSource(f"/proc/self/fd/{fd}", name=place)
    finally:
        os.close(fd)


def _may_be_shown(parent: Source, child: Container) -> bool:
    """Return whether the child's owner may read the parent: root restores another user's file as
    that user, and the file could name any snapshot as its parent."""
    owner = child.source.owner_uid
    if owner in (None, 0, os.geteuid(), parent.owner_uid):
        return True
    return not isinstance(parent, LocalSource) or parent.others_may_read
