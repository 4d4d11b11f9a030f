"""An open snapshot file: locates index and manifest from its end, reads frames, checks digests."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from stillframe.errors import DataError, LockedError
from stillframe.model import Manifest
from stillframe.still.frame_reader import FrameReader
from stillframe.still.frames import SKIPPABLE_HEADER, decompress_frame, digest_of
from stillframe.still.host_mark import HostKey
from stillframe.still.index import Index
from stillframe.still.index_codec import decode_index
from stillframe.still.instant import instant_of
from stillframe.still.sealing import (
    KIND_INDEX,
    KIND_MANIFEST,
    SEAL_MAX_BYTES,
    Seal,
    Unlock,
    decode_seal,
)
from stillframe.still.sinks import Source
from stillframe.still.trailer import (
    INDEX_FRAME_MAGIC,
    MANIFEST_FRAME_MAGIC,
    TRAILER_FRAME_BYTES,
    Trailer,
    read_trailer,
    seek_table_matches,
)
from stillframe.vmstate.wire import STREAM_MAGIC

MANIFEST_MAX_BYTES: Final = 64 << 20
INDEX_MAX_BYTES: Final = 1 << 30
NEEDS_KEY: Final = "give its passphrase (--password-file, STILLFRAME_PASSWORD) or an --identity"
FORMAT: Final = 1
INCREMENT_FORMAT: Final = 2
"""A reader that does not know parents thus refuses an increment, instead of taking it for a full
snapshot."""
_ID = re.compile(r"[0-9a-f]{64}")


class Container(FrameReader):
    """The frames, index and manifest of one file. An increment holds only what changed.

    Everything is checked before it is used: lengths against the file's size, contents against their
    digests. (Digests protect against damage. An attacker who can write the file can also write
    matching digests; to detect that, compare :attr:`id` with a known one, or encrypt: of an
    encrypted file, only authentic content is returned.)

    Args:
        source: the file; owned from here on, also if this raises.
        unlock: gives the data key of an encrypted file.

    Raises:
        DataError: not a snapshot file, damaged, or of an unknown version.
        LockedError: it is encrypted, and there is no key, or another one.
    """

    def __init__(self, source: Source, unlock: Unlock | None = None) -> None:
        super().__init__()
        self.source = source
        try:
            try:
                trailer, self._seek_table_offset = read_trailer(source)
            except DataError as error:
                if not self._is_stream():
                    raise
                raise DataError(
                    f"{source.description} is a migration stream, not a snapshot file",
                    remedy="convert it with 'stillframe import'",
                ) from error
            self._trailer = trailer
            self.id = self.content_id = trailer.snapshot_id
            self.place = source.description
            self.secret: bytes | None = None
            """The data key of an encrypted file; ``key_id`` names it."""
            self.key_id = self.slots = b""
            self._seal = self._unlock(trailer, unlock) if trailer.seal_bytes else None
            self.manifest = decode_manifest(self._read_manifest(trailer))
            self.index = self._read_index(trailer)
            if self._seal is not None:
                self.check_rest()  # so that no byte of the file is left unchecked
        except BaseException:
            source.close()
            raise

    def _is_stream(self) -> bool:
        magic = STREAM_MAGIC.to_bytes(4, "big")
        return self.source.size_bytes >= len(magic) and self.source.read_at(0, 4) == magic

    def _unlock(self, trailer: Trailer, unlock: Unlock | None) -> Seal:
        if trailer.seal_bytes > SEAL_MAX_BYTES:
            raise DataError(f"the seal has {trailer.seal_bytes} bytes")
        offset = trailer.index_offset - SKIPPABLE_HEADER.size - trailer.seal_bytes
        frame = self.source.read_at(offset, trailer.seal_bytes)
        header = decode_seal(frame, self.source.description)
        if unlock is None:
            raise LockedError(f"{self.source.description} is encrypted", remedy=NEEDS_KEY)
        self.secret, self.key_id, self.slots = unlock(header), header.key_id, header.slots
        return Seal.of(header, self.secret)

    def _read_own(
        self, name: str, magic: int, offset: int, length: int, digest: bytes, kind: int
    ) -> bytes:
        header = self.source.read_at(offset - SKIPPABLE_HEADER.size, SKIPPABLE_HEADER.size)
        content = self.source.read_at(offset, length)
        if header != SKIPPABLE_HEADER.pack(magic, length) or digest_of(content) != digest:
            raise DataError(f"the {name} is damaged", offset_bytes=offset)
        if self._seal is None:
            return content
        try:
            return self._seal.open(kind, 0, content)
        except DataError as error:
            raise DataError(
                f"the {name} is not authentic", why=error.why, offset_bytes=offset
            ) from error

    def was_taken_here(self) -> bool:
        """Return whether the mark says that this user took it on this host."""
        key = HostKey.load()
        if key is None or not self.manifest.mark:
            return False
        manifest = self._read_manifest(self._trailer)
        return key.made(self.manifest.mark, self._trailer.index_digest, manifest)

    def _read_manifest(self, trailer: Trailer) -> bytes:
        if trailer.manifest_bytes > MANIFEST_MAX_BYTES:
            raise DataError(f"the manifest has {trailer.manifest_bytes} bytes")
        return self._read_own(
            "manifest",
            MANIFEST_FRAME_MAGIC,
            trailer.manifest_offset,
            trailer.manifest_bytes,
            trailer.manifest_digest,
            KIND_MANIFEST,
        )

    def _read_index(self, trailer: Trailer) -> Index:
        if trailer.index_bytes > INDEX_MAX_BYTES:
            raise DataError(f"the index has {trailer.index_bytes} bytes")
        content = self._read_own(
            "index",
            INDEX_FRAME_MAGIC,
            trailer.index_offset,
            trailer.index_bytes,
            trailer.index_digest,
            KIND_INDEX,
        )
        index = decode_index(content)
        own_start = trailer.index_offset - SKIPPABLE_HEADER.size - trailer.seal_bytes
        if index.stored_bytes != own_start:
            raise DataError("the index does not cover the file's frames")
        manifest = self.manifest
        if (
            index.target_page_bytes != manifest.target_page_bytes
            or index.stream_bytes != manifest.stream_bytes
            or [(b.idstr, b.used_length_bytes) for b in index.blocks]
            != [(b.idstr, b.used_length_bytes) for b in manifest.blocks]
        ):
            raise DataError("the index does not agree with the manifest")
        self._own_sizes = (
            *([trailer.seal_bytes] if trailer.seal_bytes else ()),
            SKIPPABLE_HEADER.size + trailer.index_bytes,
            SKIPPABLE_HEADER.size + trailer.manifest_bytes,
            TRAILER_FRAME_BYTES,
        )
        return index

    def stand_in_for(self, increment: Container) -> None:
        """Assume the id and place of that snapshot: this file is its whole form.

        Raises:
            DataError: it is another snapshot's whole form, or encrypted otherwise.
        """
        if self.manifest.whole_of != increment.id or self.manifest.parent is not None:
            raise DataError(f"{self.source.description} is no whole form of {increment.place}")
        if (self.secret, self.key_id) != (increment.secret, increment.key_id):
            raise DataError(f"{self.source.description} is not encrypted as {increment.place} is")
        self.id, self.place = increment.id, increment.place

    @property
    def stands_in(self) -> bool:
        """Whether it is a whole form, read in place of the file that has its id."""
        return self.id != self.content_id

    def close(self) -> None:
        """Close the file."""
        self.source.close()

    @property
    def may_lack_pages(self) -> bool:
        return self.manifest.mode == "import"

    def check_rest(self) -> None:
        """Check the seek table (for zstd tools, unused here) against the index.

        Raises:
            DataError: it does not list the file's frames.
        """
        offset = self._seek_table_offset
        frame = self.source.read_at(offset, self.source.size_bytes - offset)
        own = ((size, 0) for size in self._own_sizes)
        sizes = self.index.frame_sizes(sealed=self._seal is not None)
        if not seek_table_matches(frame, [*sizes, *own]):
            raise DataError("the seek table does not list the file's frames", offset_bytes=offset)

    def read_stored(self, number: int) -> bytes:
        """Return a frame as the file holds it, after verifying its digest.

        Raises:
            DataError: damaged.
        """
        entry = self.index.frame(number)
        stored = self.source.read_at(entry.offset_bytes, entry.stored_bytes)
        if digest_of(stored) != entry.digest:
            raise DataError(
                f"frame {number} of {self.source.description} is damaged",
                why="its digest is not the one in the index",
                offset_bytes=entry.offset_bytes,
            )
        return stored

    def read_frame(self, number: int) -> bytes:
        """Return a decompressed frame, after verifying digest, seal and content checksum.

        Raises:
            DataError: damaged.
        """
        entry = self.index.frame(number)
        stored = self.read_stored(number)
        try:
            if self._seal is not None:
                stored = self._seal.open_frame(stored)
            return decompress_frame(stored, entry.raw_bytes)
        except DataError as error:
            raise self.at_frame(number, error) from error

    def at_frame(self, number: int, error: DataError) -> DataError:
        """Return the error with the frame's number and offset added."""
        return type(error)(
            f"frame {number} of {self.source.description}: {error.what}",
            why=error.why,
            offset_bytes=self.index.frame(number).offset_bytes,
        )


def decode_manifest(content: bytes) -> Manifest:
    """Decode a manifest's JSON.

    Raises:
        DataError: malformed, or of an unknown format.
    """
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError("the manifest is malformed", why=str(error)) from error
    if manifest.format not in (FORMAT, INCREMENT_FORMAT):
        raise DataError(
            f"the manifest has format {manifest.format}, only {FORMAT} and {INCREMENT_FORMAT} are"
            " known",
            remedy="read it with a newer Stillframe",
        )
    if (manifest.format == INCREMENT_FORMAT) != (manifest.parent is not None):
        raise DataError(f"the manifest has format {manifest.format}, but does not say so")
    if manifest.parent is not None and _ID.fullmatch(manifest.parent.id) is None:
        raise DataError("the manifest names a parent whose id is none")
    if manifest.whole_of and _ID.fullmatch(manifest.whole_of) is None:
        raise DataError("the manifest says that it is the whole form of what is no id")
    instant_of(manifest.created)
    return manifest
