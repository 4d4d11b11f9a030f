"""A VM's RAM on an image: the memory backends of its command line become mappings of files.

A backend keeps its id, and thus the RAM block its name (QEMU ``backends/hostmem.c``,
``hw/core/machine.c``). If RAM cannot be mapped, the plan says why, and the VM is streamed instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from stillframe.errors import DataError, InternalError
from stillframe.image.ram_image import PAGE_BYTES, SMALLEST_BYTES
from stillframe.model import BlockRecord
from stillframe.restore.argv_reader import unaccounted
from stillframe.restore.option import Option, split_options
from stillframe.restore.option_value import OptionValue
from stillframe.restore.records import Backend, ImagePlan, RestorePlan

_REST_LIMIT_BYTES = 1 << 30
"""Limit of the other blocks, whose pages are held in memory for the clones."""
_BACKENDS = ("memory-backend-ram", "memory-backend-memfd", "memory-backend-file")
_NOT_OURS = (
    "align", "discard-data", "hugetlb", "hugetlbsize", "mem-path", "offset", "pmem", "prealloc",
    "prealloc-context", "prealloc-threads", "readonly", "reserve", "rom", "seal", "share", "size",
    "x-use-canonical-path-for-ramblock-id",
)  # fmt: skip
"""Properties of other backends, or set anew; nothing may populate RAM before it is watched."""
_OUTSIDERS = {
    "vhost-user": "another process maps its RAM, and would not wait for a page",
    "x-vhost-user": "another process maps its RAM, and would not wait for a page",
    "vfio-user": "another process maps its RAM, and would not wait for a page",
    "x-vfio-user": "another process maps its RAM, and would not wait for a page",
    "x-pci-proxy-dev": "another process maps its RAM, and would not wait for a page",
    "vfio-": "the device needs all of RAM in its place",
    "virtio-mem": "its RAM is only partly plugged",
}
_LOCKED = "all of RAM is to be locked in its place at the start"
_CANONICAL = "/objects/"


def plan_image(words: Sequence[str], blocks: Sequence[BlockRecord], *, share: bool) -> ImagePlan:
    """Plan which blocks of a VM an image can hold.

    Args:
        words: the command line without the program.
        share: the image belongs to one VM alone, so it is that VM's RAM.

    Raises:
        DataError: the command line is malformed.
    """
    options = split_options(words, DataError)
    reason = _outsider(options, share=share)
    if reason:
        return ImagePlan(streamed=reason)
    numbers = {block.idstr: number for number, block in enumerate(blocks)}
    users = _users(options)
    backends: list[Backend] = []
    for place, option in enumerate(options):
        value = OptionValue(option.value, "qom-type") if option.name == "object" else None
        if value is None or value.get("qom-type") not in _BACKENDS:
            continue
        identity = value.get("id")
        number = numbers.get(identity, numbers.get(_CANONICAL + identity))
        if number is None or users.get(identity, "") not in ("machine", "numa", "pc-dimm"):
            continue
        found = _backend(blocks[number], number, place, identity)
        if isinstance(found, str):
            return ImagePlan(streamed=found)
        backends += found
    if "machine" not in users.values() and "numa" not in users.values():
        default = [n for n, block in enumerate(blocks) if _is_default(block.idstr)]
        if len(default) == 1:
            found = _backend(blocks[default[0]], default[0], None, blocks[default[0]].idstr)
            if isinstance(found, str):
                return ImagePlan(streamed=found)
            backends += found
    if not backends:
        return ImagePlan(streamed="it has no RAM block that an image can hold")
    mapped = {backend.block for backend in backends}
    rest = sum(b.used_length_bytes for n, b in enumerate(blocks) if n not in mapped)
    if rest > _REST_LIMIT_BYTES:
        return ImagePlan(streamed=f"{rest >> 20} MiB of its RAM are in blocks that no image holds")
    return ImagePlan(backends=tuple(backends), share=share)


def put_on_image(plan: RestorePlan, files: Mapping[int, int]) -> RestorePlan:
    """Return the plan with its RAM on an image's files.

    Args:
        files: by block: the descriptor that the VM inherits.
    """
    argv = (plan.program, *map_image(plan.argv[1:], plan.image, files))
    # The second reader read the line without these files: nothing but them may be new.
    known = {*plan.argv, *(touch.target for touch in plan.touches)}
    known |= {f"/proc/self/fd/{fd}" for fd in files.values()}
    kept = [word for word in argv if word in plan.argv]
    for option, text in unaccounted(argv, known, cwd=plan.cwd, own=kept):
        raise InternalError(f"{option} would name {text}, which no plan has")
    return msgspec.structs.replace(plan, argv=argv)


def map_image(words: Sequence[str], plan: ImagePlan, files: Mapping[int, int]) -> list[str]:
    """Return the command line with its RAM on an image; arguments as for :func:`plan_image` and
    :func:`put_on_image`."""
    by_place = {backend.option: backend for backend in plan.backends}
    found: list[str] = []
    for place, option in enumerate(split_options(words, DataError)):
        backend = by_place.get(place)
        if backend is not None:
            value = OptionValue(option.value, "qom-type")
            value.drop(*_NOT_OURS)
            value.set("qom-type", "memory-backend-file")
            found += [option.words[0], _filled(value, backend, plan, files)]
        elif option.name in ("mem-path", "mem-prealloc"):
            continue
        else:
            found += option.words
    own = by_place.get(None)
    if own is not None:
        value = OptionValue("memory-backend-file", "qom-type")
        value.set("id", own.id)
        found += ["-object", _filled(value, own, plan, files)]
        found += ["-machine", f"memory-backend={own.id}"]
    return found


def _filled(value: OptionValue, backend: Backend, plan: ImagePlan, files: Mapping[int, int]) -> str:
    value.set("size", backend.size_bytes)
    value.set("mem-path", f"/proc/self/fd/{files[backend.block]}")
    value.set("share", plan.share)
    if plan.readonly:
        value.set("readonly", True)
        value.set("rom", "off")
    value.set("x-use-canonical-path-for-ramblock-id", backend.canonical)
    return value.text


def is_memory(option: Option) -> bool:
    """Whether the option says what RAM is made of."""
    kind = option.value.partition(",")[0].removeprefix("qom-type=")
    return option.name in ("mem-path", "mem-prealloc") or (
        option.name == "object" and (kind.startswith("memory-backend-") or "{" in option.value)
    )


def _backend(
    block: BlockRecord, number: int, place: int | None, identity: str
) -> list[Backend] | str:
    """Return no backend if the block is not worth a file; a text says why no image is possible."""
    if block.page_size_bytes != PAGE_BYTES:
        return f"RAM block {block.idstr!r} is on huge pages"
    if block.used_length_bytes < SMALLEST_BYTES:
        return []
    return [
        Backend(
            block=number,
            size_bytes=block.used_length_bytes,
            id=identity,
            canonical=block.idstr.startswith(_CANONICAL),
            option=place,
        )
    ]


def _is_default(idstr: str) -> bool:
    """Whether QEMU made this RAM for ``-m`` (``default_ram_id`` of the machine types)."""
    return "/" not in idstr and idstr.endswith((".ram", ".ddr"))


def _users(options: Sequence[Option]) -> dict[str, str]:
    """Return what uses each memory backend, by its id."""
    users: dict[str, str] = {}
    for option in options:
        if option.name in ("M", "machine"):
            users[OptionValue(option.value, "type").get("memory-backend")] = "machine"
        elif option.name == "numa":
            users[OptionValue(option.value, "type").get("memdev")] = "numa"
        elif option.name == "device":
            value = OptionValue(option.value, "driver")
            users[value.get("memdev")] = value.get("driver")
    users.pop("", None)
    return users


def _outsider(options: Sequence[Option], *, share: bool) -> str:
    for option in options:
        if option.name in ("device", "netdev", "object"):
            value = OptionValue(option.value, "driver")
            kind = value.get("driver") or value.get("type") or value.get("qom-type")
            for prefix, reason in _OUTSIDERS.items():
                if kind.startswith(prefix):
                    return f"{option.text}: {reason}"
            if not share and kind.startswith("virtio-balloon"):
                # ram_block_discard_range punches holes in the file, even under a private mapping.
                return f"{option.text}: what one clone gives back, all would lose"
        if option.name == "overcommit" and OptionValue(option.value, "").is_on("mem-lock"):
            return f"{option.text}: {_LOCKED}"
        if option.name == "realtime" and OptionValue(option.value, "").get("mlock", "on") == "on":
            return f"{option.text}: {_LOCKED}"
    return ""
