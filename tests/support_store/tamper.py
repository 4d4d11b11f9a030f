"""What someone can do who knows the format: change a file and make its digests match again."""

from __future__ import annotations

from array import array

from stillframe.still.frames import EncodedFrame, skippable_frame
from stillframe.still.index import Index
from stillframe.still.index_codec import decode_index, encode_index
from stillframe.still.trailer import (
    INDEX_FRAME_MAGIC,
    MANIFEST_FRAME_MAGIC,
    SEEK_FOOTER,
    TRAILER_FRAME_BYTES,
    decode_trailer,
    encode_seek_table,
    encode_trailer,
    seek_table_bytes,
    trailer_of,
)


class Parts:
    """A file taken apart. Change what you like, then :meth:`join`."""

    def __init__(self, content: bytes) -> None:
        size = len(content)
        seek = size - seek_table_bytes(content[-SEEK_FOOTER.size :], size)
        place = seek - TRAILER_FRAME_BYTES
        trailer = decode_trailer(content[place:seek], place)
        self.payload = content[: trailer.index_offset - 8]
        self.index = content[trailer.index_offset :][: trailer.index_bytes]
        self.manifest = content[trailer.manifest_offset :][: trailer.manifest_bytes]

    def decoded(self) -> Index:
        """The index, decoded."""
        return decode_index(self.index)

    def join(self, sizes: list[tuple[int, int]] | None = None) -> bytes:
        """The file with matching digests, trailer and seek table."""
        if sizes is None:
            sizes = list(self.decoded().frame_sizes())
        trailer = encode_trailer(trailer_of(self.index, self.manifest, len(self.payload)))
        own = [
            skippable_frame(INDEX_FRAME_MAGIC, self.index),
            skippable_frame(MANIFEST_FRAME_MAGIC, self.manifest),
            trailer,
        ]
        table = encode_seek_table([*sizes, *((len(frame), 0) for frame in own)])
        return b"".join([self.payload, *own, table])


def with_frames(content: bytes, frames: list[EncodedFrame]) -> bytes:
    """The same index rows over other frames."""
    parts = Parts(content)
    old = parts.decoded()
    parts.payload = b"".join(frame.data for frame in frames)
    parts.index = encode_index(
        Index(
            target_page_bytes=old.target_page_bytes,
            blocks=old.blocks,
            raw_bytes=array("I", [frame.raw_bytes for frame in frames]),
            stored_bytes=array("I", [len(frame.data) for frame in frames]),
            digests=b"".join(frame.digest for frame in frames),
            columns=old.columns,
        )
    )
    return parts.join()
