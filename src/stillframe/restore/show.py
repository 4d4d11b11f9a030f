"""A restore plan, as text for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator

from stillframe.restore.records import RestorePlan


def shown_words(words: Iterable[str]) -> str:
    """Return a command line for people: quoted as for a shell, control characters escaped."""
    return " ".join(_shown_word(word) for word in words)


def printable(text: str) -> str:
    """Return ``text`` with everything escaped that a terminal might obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shown_word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{_escaped_controls(escaped)}'"


def _escaped_controls(text: str) -> str:
    out = []
    for char in text:
        if char.isprintable():
            out.append(char)
        elif 0xDC80 <= ord(char) <= 0xDCFF:  # a byte that is not UTF-8, as Python keeps it
            out.append(f"\\x{ord(char) - 0xDC00:02x}")
        elif ord(char) < 0x100:
            out.append(f"\\x{ord(char):02x}" if ord(char) < 0x80 else f"\\u{ord(char):04x}")
        else:
            out.append(f"\\U{ord(char):08x}")
    return "".join(out)


def plan_lines(plan: RestorePlan) -> Iterator[str]:
    """Yield the plan as lines of text, for ``--dry-run``."""
    yield f"snapshot   {printable(plan.snapshot)}"
    yield f"machine    {printable(plan.machine_type or 'unknown')}"
    yield f"program    {printable(plan.program)}"
    yield f"directory  {printable(plan.cwd)}"
    if plan.run_as is not None:
        yield f"user       {plan.run_as.uid}"
    yield f"QMP        {printable(plan.qmp_address)}"
    if plan.image.streamed:
        yield f"RAM        streamed: {printable(plan.image.streamed)}"
    elif plan.complete_image:
        yield f"RAM        on its complete image, {printable(plan.complete_image)}"
    else:
        yield "RAM        on an image, which is filled while it runs"
    yield "command line"
    yield f"  {shown_words(plan.argv)} {plan.incoming_option} fd:N"
    if plan.rewrites:
        yield "rewritten"
    for rewrite in plan.rewrites:
        yield f"  {rewrite.before or '(new)'}"
        yield f"    -> {rewrite.after or '(left out)'}"
        yield f"       {printable(rewrite.reason)}"
    yield "it touches"
    for touch in plan.touches:
        where = f"  ({touch.option.split(' ')[0]})" if touch.option else ""
        yield f"  {touch.access:<8}{touch.kind:<8} {printable(touch.target)}{where}"
    yield from _section("notes", (printable(note) for note in plan.notes))
    yield from _section("needs --trust", map(printable, plan.needs_trust))
    yield from _section(
        "refused",
        (f"{r.option}: {printable(r.reason)}; {printable(r.remedy)}" for r in plan.refusals),
    )


def _section(title: str, lines: Iterable[str]) -> Iterator[str]:
    first = True
    for line in lines:
        if first:
            yield title
            first = False
        yield f"  {line}"
