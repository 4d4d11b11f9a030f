"""The loader of a device's declared state.

Source: QEMU ``migration/vmstate.c``: ``vmstate_load_state``, ``vmstate_subsection_load``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from stillframe.board.state.state_description import (
    Array,
    Buffer,
    Embedded,
    EmbeddedArray,
    Field,
    Scalar,
    StateDescription,
    Unused,
    VariableArray,
    VariableBuffer,
    array_layout,
)
from stillframe.errors import DataError, InternalError
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.wire import SectionType


def load_state(
    description: StateDescription,
    device: Any,
    source: StreamSource,
    version_id: int,
    *,
    idstr: str | None = None,
) -> None:
    """Load the device from its section's payload, and consume no byte beyond it.

    Fields newer than ``version_id`` keep the device's values. After an error, the device is half
    loaded and must not run.

    Args:
        idstr: the section's name in errors, if not the description's.

    Raises:
        DataError: the payload is truncated, malformed, of an unsupported version, or has an unknown
            subsection; the message names the device and the field.
    """
    decoder = _Decoder(source, idstr or description.name)
    try:
        decoder.state(description, device, version_id, "")
    except DataError as error:
        if decoder.suspect is None:
            raise
        raise decoder.suspect.error(str(error)) from error
    if decoder.suspect is not None and source.peek() not in (SectionType.FOOTER, None):
        raise decoder.suspect.error("the state does not end where it must")


class _Suspect(NamedTuple):
    """Bytes that look like a subsection, but may be the guest's data.

    They become the reported error only if the load fails or does not end at the footer.
    """

    idstr: str
    name: str
    where: str
    offset_bytes: int

    def error(self, why: str) -> DataError:
        return DataError(
            f"device '{self.idstr}' seems to have an unknown subsection {self.name!r} in field "
            f"'{self.where}'",
            why=why,
            offset_bytes=self.offset_bytes,
        )


class _Decoder:
    """The decoder of one payload.

    ``suspect``: the first bytes that looked like a subsection of a structure without any.
    """

    def __init__(self, source: StreamSource, idstr: str) -> None:
        self._source = source
        self._idstr = idstr
        self.suspect: _Suspect | None = None

    def state(
        self,
        description: StateDescription,
        device: Any,
        version_id: int,
        path: str,
        *,
        embedded: bool = False,
    ) -> None:
        """Load one object; ``path`` leads to it from the section's own device."""
        self._check_version(description, version_id)
        if description.pre_load is not None:
            description.pre_load(device)
        for field in description.fields:
            if field.present(device, version_id):
                self._field(field, device, f"{path}{field.name}")
        if description.subsections or not embedded:
            self._subsections(description, device, path)
        elif self.suspect is None and self._is_own_subsection(description.name):
            self._note_suspect(path)
        if description.post_load is not None:
            start = self._source.offset
            try:
                description.post_load(device, version_id)
            except ValueError as error:
                raise DataError(
                    f"the state of {self._who(description)} is impossible",
                    why=str(error),
                    offset_bytes=start,
                ) from error

    def _note_suspect(self, path: str) -> None:
        source = self._source
        start = source.position + 2
        # The buffered bytes do for an error: reading more could block.
        name = source.buffer[start : start + source.buffer[start - 1]]
        self.suspect = _Suspect(
            self._idstr, name.decode("ascii", "replace"), path.removesuffix("."), source.offset
        )

    def _who(self, description: StateDescription) -> str:
        if description.name == self._idstr:
            return f"device '{self._idstr}'"
        return f"'{description.name}' of device '{self._idstr}'"

    def _check_version(self, description: StateDescription, version_id: int) -> None:
        if description.minimum_version_id <= version_id <= description.version_id:
            return
        if version_id > description.version_id:
            raise DataError(
                f"{self._who(description)} has version {version_id}, this machine knows up to "
                f"{description.version_id}",
                offset_bytes=self._source.offset,
            )
        raise DataError(
            f"{self._who(description)} has version {version_id}, this machine needs at least "
            f"{description.minimum_version_id}",
            offset_bytes=self._source.offset,
        )

    def _subsections(self, description: StateDescription, device: Any, path: str) -> None:
        source = self._source
        known = {subsection.name: subsection for subsection in description.subsections}
        seen: set[str] = set()
        while self._is_own_subsection(description.name):
            start = source.offset
            what = f"a subsection of device '{self._idstr}'"
            source.take(1, what)
            name = source.name(what)
            subsection = known.get(name)
            if subsection is None:
                place = f" in field '{path.removesuffix('.')}'" if path else ""
                raise DataError(
                    f"device '{self._idstr}' has an unknown subsection '{name}'{place}",
                    why="it was saved by a newer version, or with something that is not here",
                    offset_bytes=start,
                )
            if name in seen:
                raise DataError(
                    f"device '{self._idstr}' has subsection '{name}' twice", offset_bytes=start
                )
            seen.add(name)
            version_id = source.u32(f"subsection '{name}' of device '{self._idstr}'")
            self.state(subsection, device, version_id, path)

    def _is_own_subsection(self, name: str) -> bool:
        """Return whether a subsection of state ``name`` follows; consume nothing.

        Compare byte by byte, so as not to wait for bytes beyond those that follow.
        """
        source = self._source
        if source.peek() != SectionType.SUBSECTION or not source.prefetch(2):
            return False
        prefix = f"{name}/".encode("ascii")
        if source.buffer[source.position + 1] <= len(prefix):
            return False
        for place, byte in enumerate(prefix, 2):
            if not source.prefetch(place + 1) or source.buffer[source.position + place] != byte:
                return False
        return True

    def _field(self, field: Field, device: Any, where: str) -> None:
        kind = field.kind
        what = f"field '{where}' of device '{self._idstr}'"
        start = self._source.offset
        match kind:
            case Unused():
                self._source.take(kind.length_bytes, what)
                return
            case Embedded():
                self.state(
                    kind.description,
                    getattr(device, field.name),
                    kind.description.version_id,
                    f"{where}.",
                    embedded=True,
                )
                return
            case EmbeddedArray():
                inners = getattr(device, field.name)
                if len(inners) != kind.count:
                    raise InternalError(f"{what} has {len(inners)} structures, not {kind.count}")
                for index, inner in enumerate(inners):
                    self.state(
                        kind.description,
                        inner,
                        kind.description.version_id,
                        f"{where}[{index}].",
                        embedded=True,
                    )
                return
            case Scalar():
                value: Any = self._numbers(kind, 1, what)[0]
            case Buffer():
                value = self._source.take(kind.length_bytes, what)
            case VariableBuffer():
                length_bytes = self._length(device, kind.length_field, kind.limit_bytes, what)
                value = self._source.take(length_bytes, what)
            case Array():
                value = self._numbers(kind.element, kind.count, what)
            case VariableArray():
                count = self._length(device, kind.count_field, kind.limit, what)
                value = self._numbers(kind.element, count, what)
        try:
            _assign(device, field.name, value)
        except ValueError as error:
            raise DataError(
                f"{what} has an impossible value", why=str(error), offset_bytes=start
            ) from error

    def _numbers(self, kind: Scalar, count: int, what: str) -> tuple[Any, ...]:
        start = self._source.offset
        data = self._source.take(count * kind.size_bytes, what)
        if kind.code == "?" and max(data, default=0) > 1:
            raise DataError(
                f"{what} is neither false nor true", why=f"it is {max(data)}", offset_bytes=start
            )
        return array_layout(kind, count).unpack(data)

    def _length(self, device: Any, length_field: str, limit: int, what: str) -> int:
        length = int(getattr(device, length_field))
        if length > limit:
            raise DataError(
                f"{what} is too long",
                why=f"'{length_field}' is {length}, at most {limit} are possible",
                offset_bytes=self._source.offset,
            )
        return length


def _assign(device: Any, name: str, value: Any) -> None:
    """Fill a list or bytearray in place, so that its other holders see it; else replace."""
    if isinstance(value, tuple | bytes):
        present = getattr(device, name, None)
        if isinstance(present, list | bytearray):
            present[:] = value
            return
        if isinstance(value, tuple) and not isinstance(present, tuple):
            value = list(value)
    setattr(device, name, value)
