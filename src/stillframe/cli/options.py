"""Options that several commands share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from stillframe.cli.parameters import DURATION, FILE, SPILL, CompressionType, Share

Command = TypeVar("Command", bound=Callable[..., Any])
PARENTS = "STILLFRAME_PARENTS"


def _use_store(_ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """Override the environment's store for this run."""
    if value is not None:
        os.environ["STILLFRAME_STORE"] = value


store_option = click.option(
    "--store",
    type=FILE,
    metavar="PATH|URL",
    expose_value=False,
    is_eager=True,
    callback=_use_store,
    help="The store of snapshots and their names.  [default: $STILLFRAME_STORE, else your own]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Show the result as JSON.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
force_option = click.option("-f", "--force", is_flag=True, help="Replace an existing file.")


def compression_option(command: Command) -> Command:
    """``--compression``, parsed into (kind, level)."""
    return click.option(
        "--compression",
        type=CompressionType(),
        default="zstd",
        show_default=True,
        help="How pages are compressed; LEVEL is -50 (fast) to 19 (small), else it is chosen.",
    )(command)


def spill_option(more: str = "") -> Callable[[Command], Command]:
    """``--spill SIZE``. ``more``: appended to the help."""
    return click.option(
        "--spill",
        type=SPILL,
        default="256M",
        show_default=True,
        help=f"Most memory for pages that the guest overwrites before they are written.{more}",
    )


def disks_option(kinds: Sequence[str], what: str) -> Callable[[Command], Command]:
    """``--disks KIND``. ``what``: the help."""
    return click.option(
        "--disks", type=click.Choice(kinds), default="copy", show_default=True, help=what
    )


def _also_look_in(
    ctx: click.Context, param: click.Parameter, places: tuple[str, ...]
) -> tuple[str, ...]:
    """Put the places into the environment, for child processes that keep reading, too."""
    known = os.environ.get(PARENTS, "")
    # Absolute paths, because those processes have other working directories.
    own = [place if "://" in place else os.path.abspath(place) for place in places]  # noqa: PTH100
    found = [*own, *filter(None, [known])]
    if found:
        os.environ[PARENTS] = os.pathsep.join(found)
    return places


def parent_dir_option(command: Command) -> Command:
    """``--parent-dir DIR``; the command gets no argument for it."""
    return click.option(
        "--parent-dir",
        multiple=True,
        type=FILE,
        metavar="DIR",
        expose_value=False,
        callback=_also_look_in,
        help=f"Look here first for the parents of an increment; also {PARENTS}.",
    )(command)


_KEEP = {
    "last": "The newest N.",
    "hourly": "The newest of each of the last N hours that have one.",
    "daily": "The same for days.",
    "weekly": "The same for weeks.",
    "monthly": "The same for months.",
    "yearly": "The same for years.",
}


def keep_options(command: Command) -> Command:
    """``--keep-last N`` and the other options of a retention policy. The command gets ``keep``, the
    matching arguments of ``api.prune``."""

    @functools.wraps(command)
    def with_keep(
        *arguments: Any, keep_tag: tuple[str, ...], keep_within: float, **options: Any
    ) -> Any:
        keep = {f"keep_{name}": options.pop(f"keep_{name}") for name in _KEEP}
        keep |= {"keep_within_s": keep_within, "keep_tags": keep_tag}
        return command(*arguments, keep=keep, **options)

    decorated = click.option("--keep-tag", multiple=True, metavar="TAG", help="All with this tag.")(
        with_keep
    )
    decorated = click.option(
        "--keep-within",
        type=DURATION,
        default=0.0,
        metavar="TIME",
        help="All that are at most so much older than the newest: 36h, 14d.",
    )(decorated)
    for name, what in reversed(_KEEP.items()):
        decorated = click.option(
            f"--keep-{name}", type=click.IntRange(min=-1), default=0, metavar="N", help=what
        )(decorated)
    return decorated  # type: ignore[return-value]


def output_option(what: str, *, required: bool = True) -> Callable[[Command], Command]:
    """``-o FILE``."""
    return click.option("-o", "--output", required=required, type=FILE, metavar="FILE|-", help=what)


read_data_option = click.option(
    "--read-data",
    "--read-data-subset",  # restic's name for it
    "read_data",
    is_flag=False,
    flag_value="100%",
    type=Share(),
    default=None,
    help="Read the data, too: all of it, or a share by chance (--read-data=5%).",
)
max_drain_option = click.option(
    "--max-drain",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MS",
    default=100.0,
    show_default=True,
    help="Refuse if the guest would stand still longer than that for disk requests in flight.",
)
