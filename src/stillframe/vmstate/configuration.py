"""The configuration section (QEMU ``migration/savevm.c``, ``vmstate_configuration``)."""

from __future__ import annotations

from stillframe.errors import DataError
from stillframe.vmstate.records import Configuration
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.wire import NAME_LIMIT_BYTES, SectionType

CAPABILITY_IGNORE_SHARED = "x-ignore-shared"
CAPABILITY_MAPPED_RAM = "mapped-ram"

_READABLE_CAPABILITIES = frozenset({CAPABILITY_IGNORE_SHARED, CAPABILITY_MAPPED_RAM})
_CAPABILITY_LIMIT = 64
_PAGE_BITS = range(10, 17)
_PREFIX = "configuration/"


def read_configuration(source: StreamSource) -> Configuration:
    """Read the section, after its type byte.

    Raises:
        DataError: truncated, malformed, or with an unknown subsection or capability.
    """
    length = source.u32("the configuration section")
    if not 0 < length <= NAME_LIMIT_BYTES:
        raise DataError(
            f"the machine type's name has {length} bytes", offset_bytes=source.offset - 4
        )
    name = source.text(length, "the machine type's name")
    capabilities: tuple[str, ...] = ()
    page_bits: int | None = None
    uuid: bytes | None = None
    seen: set[str] = set()
    while source.peek() == SectionType.SUBSECTION:
        start = source.offset
        source.take(1, "a subsection of the configuration")
        subsection = source.name("a subsection's name")
        version = source.u32("a subsection of the configuration")
        if subsection in seen or version != 1:
            raise DataError(
                f"subsection '{subsection}' is there twice or has an unknown version",
                why=f"version {version}",
                offset_bytes=start,
            )
        seen.add(subsection)
        match subsection.removeprefix(_PREFIX):
            case "capabilities":
                capabilities = _read_capabilities(source)
            case "target-page-bits":
                page_bits = source.u32("the target's page size")
                if page_bits not in _PAGE_BITS:
                    raise DataError(
                        f"a target page of 2^{page_bits} bytes is not possible",
                        offset_bytes=source.offset - 4,
                    )
            case "uuid":
                uuid = source.take(16, "the machine's UUID")
            case _:
                raise DataError(
                    f"the configuration has an unknown subsection '{subsection}'",
                    offset_bytes=start,
                )
    return Configuration(
        name=name, capabilities=capabilities, target_page_bits=page_bits, uuid=uuid
    )


def _read_capabilities(source: StreamSource) -> tuple[str, ...]:
    start = source.offset
    count = source.u32("the list of capabilities")
    if count > _CAPABILITY_LIMIT:
        raise DataError(f"the stream claims {count} capabilities", offset_bytes=start)
    names = tuple(source.name("a capability's name") for _ in range(count))
    for name in names:
        if name not in _READABLE_CAPABILITIES:
            raise DataError(
                f"the stream depends on capability '{name}', which is not known",
                offset_bytes=start,
            )
    return names
