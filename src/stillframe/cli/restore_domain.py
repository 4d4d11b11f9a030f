"""``stillframe restore`` of a libvirt domain, as a new domain."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from stillframe.cli.cancelling import OneInterrupt
from stillframe.cli.output import Results, as_object
from stillframe.cli.progress import ByteRate, choose_progress
from stillframe.cli.text import facts, printable
from stillframe.errors import UsageError

if TYPE_CHECKING:
    from stillframe.api import DomainPlan, Keys, RestoredDomain


def is_domain(file: str, kind: str | None, keys: Keys) -> bool:
    """Return whether the snapshot becomes a domain. ``kind``: the caller's choice, or None."""
    from stillframe import api

    if kind is not None:
        return kind == "domain"
    with api.open(file, keys=keys) as snapshot:
        machine = snapshot.manifest.machine
    return machine is not None and machine.domain is not None


def refuse_options(given: Mapping[str, object]) -> None:
    """Refuse options that only a plain QEMU has.

    Raises:
        UsageError: such an option is given.
    """
    for option, value in given.items():
        if value:
            raise UsageError(
                f"{option} does not go with a domain of libvirt",
                why="libvirt starts it, from the recorded XML",
                remedy="leave it out, or say --as qemu to start a QEMU without libvirt",
            )


def run(
    file: str,
    results: Results,
    *,
    name: str | None,
    revert: bool,
    yes: bool,
    paused: bool,
    verify_disks: bool,
    stream: bool,
    wait: bool,
    dry_run: bool,
    trust: bool,
    quiet: bool,
    keys: Keys,
) -> None:
    """Start the domain, or show the plan."""
    from stillframe import api

    if dry_run:
        plan = api.plan_restore_domain(file, name=name, revert=revert, stream=stream, keys=keys)
        results.show(_plan_object(plan), _plan_lines(plan))
        return
    if revert and not yes:
        _ask(file)
    with OneInterrupt(), closing(choose_progress(quiet=quiet)) as progress:
        domain = api.restore_domain(
            file,
            name=name,
            revert=revert,
            trust=trust,
            paused=paused,
            verify_disks=verify_disks,
            keys=keys,
            stream=stream,
            wait=wait,
            on_progress=ByteRate(progress, "restoring").update,
        )
    results.show(as_object(domain), _domain_lines(domain))


def _ask(file: str) -> None:
    """Ask before the running domain is ended.

    Raises:
        UsageError: there is no terminal to ask on. click.Abort: the answer is no.
    """
    if not sys.stdin.isatty():
        raise UsageError(
            "--revert ends the domain, and nobody is there to be asked", remedy="say --yes"
        )
    click.confirm(
        f"End the domain and go back to {printable(file)}? What it did since is lost.",
        abort=True,
        err=True,
    )


def _domain_lines(domain: RestoredDomain) -> list[str]:
    lines = facts(
        [
            ("domain", domain.name),
            ("uuid", domain.uuid),
            ("libvirt", domain.uri),
            ("pid", str(domain.pid)),
            ("state", domain.state),
            ("disks", domain.directory),
        ]
    )
    return [*lines, *(f"note: {printable(note)}" for note in domain.notes)]


def _plan_object(plan: DomainPlan) -> dict[str, object]:
    data: dict[str, Any] = as_object(plan)
    data["file"] = data.pop("snapshot")
    return data | {"needs_trust": list(plan.needs_trust)}


def _plan_lines(plan: DomainPlan) -> Iterator[str]:
    yield f"snapshot   {printable(plan.snapshot)}"
    yield f"domain     {printable(plan.name)}"
    yield f"libvirt    {plan.uri}"
    yield f"directory  {printable(plan.directory)}"
    yield "XML"
    yield from (f"  {printable(line)}" for line in plan.xml.splitlines())
    yield "it touches"
    for touch in plan.touches:
        where = f"  ({touch.option})" if touch.option else ""
        yield f"  {touch.access:<8}{touch.kind:<8} {printable(touch.target + where)}"
    for title, texts in (("notes", plan.notes), ("needs --trust", plan.needs_trust)):
        if texts:
            yield title
            yield from (f"  {printable(text)}" for text in texts)
