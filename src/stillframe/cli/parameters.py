"""Click types of the commands' parameters, with shell completion."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from stillframe.cli.quantities import format_bytes, parse_duration, parse_rate, parse_size

if TYPE_CHECKING:
    from stillframe.api import Compression

_LEVEL_LOWEST, _LEVEL_HIGHEST = -50, 19
_LEVELS = {str(level): level for level in range(_LEVEL_LOWEST, _LEVEL_HIGHEST + 1)}


# ParamType is generic from click 8.4 on; older versions reject a type argument at run time.
class Size(click.ParamType):  # type: ignore[type-arg]
    """A size in bytes, within limits."""

    name = "size"

    def __init__(
        self,
        *,
        least: int,
        most: int,
        metavar: str = "SIZE",
        parse: Callable[[str], int] = parse_size,
    ) -> None:
        self._least, self._most, self._metavar, self._parse = least, most, metavar, parse

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self._metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            size = self._parse(str(value))
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)
        if not self._least <= size <= self._most:
            limits = f"{format_bytes(self._least)} to {format_bytes(self._most)}"
            self.fail(f"{value!r}: it must be {limits}", param, ctx)
        return size


class Duration(click.ParamType):  # type: ignore[type-arg]
    """A duration in seconds."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_duration(str(value))
        except ValueError as error:
            return self.fail(f"{value!r}: {error}", param, ctx)


DURATION = Duration()
IMAGES = Size(least=0, most=1 << 60)
SPILL = Size(least=1 << 20, most=1 << 40)
RATE = Size(least=1 << 10, most=1 << 40, metavar="RATE", parse=parse_rate)


class CompressionType(click.ParamType):  # type: ignore[type-arg]
    """``zstd``, ``zstd:LEVEL`` or ``none``."""

    name = "compression"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "zstd[:LEVEL]|none"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Compression, int | None]:
        if isinstance(value, tuple):
            return value
        kind, colon, level = str(value).partition(":")
        if kind == "none" and not colon:
            return "none", None
        if kind == "zstd" and not colon:
            return "zstd", None
        if kind == "zstd" and level in _LEVELS:
            return "zstd", _LEVELS[level]
        return self.fail(
            f"{value!r}: write zstd, zstd:LEVEL with a level of"
            f" {_LEVEL_LOWEST} to {_LEVEL_HIGHEST}, or none",
            param,
            ctx,
        )

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        known = ("zstd", "zstd:1", "zstd:3", "zstd:9", "zstd:19", "none")
        return [CompletionItem(word) for word in known if word.startswith(incomplete)]


class VmType(click.ParamType):  # type: ignore[type-arg]
    """A running VM: QMP socket path, host:port, pid, or name."""

    name = "vm"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        if "/" in incomplete:
            return [CompletionItem(incomplete, type="file")]
        from stillframe import api

        return [
            CompletionItem(vm.name or str(vm.pid), help=f"pid {vm.pid}")
            for vm in api.list_vms()
            if (vm.name or str(vm.pid)).startswith(incomplete)
        ]


class BlockType(click.ParamType):  # type: ignore[type-arg]
    """A RAM block of the snapshot that the argument FILE names."""

    name = "name"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from stillframe import api
        from stillframe.errors import StillframeError

        try:
            with api.open(ctx.params["file"]) as snapshot:
                names = [block.idstr for block in snapshot.blocks]
        except (StillframeError, KeyError, TypeError):
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


# The parser does not check that a snapshot file exists: we word that error ourselves.
FILE = click.Path(path_type=str, readable=False)


class Share(click.ParamType):  # type: ignore[type-arg]
    """A share in percent, above 0 and up to 100, with or without ``%``."""

    name = "share"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "PERCENT%"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        try:
            share = float(str(value).removesuffix("%")) / 100
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            self.fail(f"{value!r}: write a share of the data, such as 5%", param, ctx)
        return share


class SnapshotType(click.ParamType):  # type: ignore[type-arg]
    """A snapshot: its file, or its name in the store; an existing file takes precedence."""

    name = "file"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "FILE|NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        files = CompletionItem(incomplete, type="file")
        return [files] if "/" in incomplete else [files, *_names_in_store(incomplete)]


def _names_in_store(incomplete: str) -> list[CompletionItem]:
    from stillframe import api
    from stillframe.errors import StillframeError

    try:
        entries = [one.entry for one in api.ls()]
    except StillframeError:
        return []
    words = {f"{entry.vm}@latest": "the newest" for entry in entries}
    words |= {entry.short_id: f"{entry.vm} {entry.created[:19]}" for entry in entries}
    return [CompletionItem(w, help=h) for w, h in words.items() if w.startswith(incomplete)]


SNAPSHOT = SnapshotType()
