"""The vmdescription in the stream's tail, and the section lengths that it states.

Sources: QEMU ``migration/savevm.c`` (``qemu_savevm_state_vmdesc``), ``migration/vmstate.c``
(``vmsd_desc_field_start``), ``scripts/analyze-migration.py``.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from stillframe.errors import DataError
from stillframe.vmstate.footers import FOOTER_BYTES, SectionSpan, read_header
from stillframe.vmstate.wire import SectionType

DESCRIPTION_LIMIT_BYTES = 64 << 20
PARSE_LIMIT_BYTES = 16 << 20
"""Larger descriptions are kept but not parsed; real ones take a few MB at most."""

_HEAD_BYTES = 5
_TEXT_BYTES = bytes(range(0x20, 0x100))
_SUBSECTION_HEAD_BYTES = 6
"""Type byte, name length and version, without the name itself."""


class _Field(msgspec.Struct):
    size: int
    array_len: int = 1


class _Subsection(msgspec.Struct):
    vmsd_name: str
    fields: tuple[_Field, ...] = ()
    subsections: tuple[_Subsection, ...] = ()


class _DeviceEntry(msgspec.Struct):
    name: str
    instance_id: int
    fields: tuple[_Field, ...] = ()
    subsections: tuple[_Subsection, ...] = ()


class _Root(msgspec.Struct):
    devices: tuple[_DeviceEntry, ...]


def split_description(tail: bytes, *, tail_offset: int) -> tuple[int, bytes | None]:
    """Find EOF and the description at the end of a stream.

    Args:
        tail: the stream from its first device section, or from EOF, to its end.
        tail_offset: the tail's offset in the stream, for errors.

    Returns:
        The offset of the EOF byte in ``tail``, and the description's text or None.

    Raises:
        DataError: the stream is truncated, something follows it, or the description is larger than
            any real one.
    """
    # JSON text has no control characters: the last one belongs to the header before it.
    last_control = len(tail.rstrip(_TEXT_BYTES))
    for start in range(last_control - 1, max(last_control - 1 - _HEAD_BYTES, 0), -1):
        length = int.from_bytes(tail[start + 1 : start + _HEAD_BYTES], "big")
        if (
            tail[start] == SectionType.VMDESCRIPTION
            and tail[start - 1] == SectionType.EOF
            and start + _HEAD_BYTES + length == len(tail)
        ):
            if length > DESCRIPTION_LIMIT_BYTES:
                raise DataError(
                    f"the vmdescription has {length} bytes", offset_bytes=tail_offset + start
                )
            text = tail[start + _HEAD_BYTES :]
            if not text.startswith(b"{") or not text.endswith(b"}"):
                raise DataError(
                    "the vmdescription is not a JSON object", offset_bytes=tail_offset + start
                )
            return start - 1, text
    if not tail or tail[-1] != SectionType.EOF:
        raise DataError(
            "the stream does not end with EOF or a description",
            why="it is truncated, or something follows it",
            offset_bytes=tail_offset + len(tail),
        )
    return len(tail) - 1, None


Sizes: TypeAlias = dict[tuple[str, int], list[int]]
"""Payload lengths by (idstr, instance id); repeated keys in section order."""


def described_sizes(text: bytes, *, text_offset: int) -> Sizes | None:
    """Return the payload lengths that a description states; None if it is too large to parse.

    Args:
        text_offset: the text's offset in the stream, for errors.

    Raises:
        DataError: it is not JSON, or does not have a description's shape.
    """
    if len(text) > PARSE_LIMIT_BYTES:
        return None
    try:
        root = msgspec.json.decode(text, type=_Root)
        sizes: Sizes = {}
        for device in root.devices:
            size = _size(device.fields, device.subsections)
            sizes.setdefault((device.name, device.instance_id), []).append(size)
        return sizes
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DataError(
            "the vmdescription is malformed", why=str(error), offset_bytes=text_offset
        ) from error


def _size(fields: tuple[_Field, ...], subsections: tuple[_Subsection, ...]) -> int:
    total = sum(field.size * field.array_len for field in fields)
    for subsection in subsections:
        total += _SUBSECTION_HEAD_BYTES + len(subsection.vmsd_name)
        total += _size(subsection.fields, subsection.subsections)
    return total


def follow_sizes(
    tail: bytes, eof: int, sizes: Sizes, *, footers: bool | None
) -> tuple[SectionSpan, ...] | None:
    """Cut the tail by the described lengths; None if they do not fit it.

    Args:
        eof: offset of the EOF byte.
        footers: whether sections have footers; None to let the first one decide.
    """
    spans: list[SectionSpan] = []
    left = {key: iter(lengths) for key, lengths in sizes.items()}
    position = 0
    while position < eof:
        header = read_header(tail, position)
        if header is None or tail[position] != SectionType.FULL:
            return None
        size = next(left.get((header.idstr, header.instance_id), iter(())), -1)
        if size < 0:
            return None
        payload_end = header.payload_start + size
        if payload_end > eof:
            return None
        has_footer = tail[
            payload_end : payload_end + FOOTER_BYTES
        ] == b"\x7e" + header.section_id.to_bytes(4, "big")
        if footers is None:
            footers = has_footer
        if footers != has_footer:
            return None
        position = payload_end + (FOOTER_BYTES if has_footer else 0)
        spans.append(SectionSpan(header, payload_end, position))
    return tuple(spans) if position == eof else None
