"""Writes ``reference/errors.md`` from ``stillframe.errors``; ``--check`` only compares.

Run it after changing the error tree: ``python docs/generate_errors.py``.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from stillframe import errors

PAGE = Path(__file__).with_name("reference") / "errors.md"
_TREE_LINE = re.compile(r"[├└]── (\w+)\s+(\d+)\s+(.+)")

_HEAD = """\
# Errors and exit codes

<!-- Made by docs/generate_errors.py from stillframe/errors.py; do not edit. -->

Every error of the Python API is a `stillframe.errors.StillframeError`; its class says what to do
about it. The command line exits with the class's code and prints one line on standard error,
`stillframe: what: why; remedy [guest running]`; a refusal with several reasons prints one line per
reason. With `--json` it also writes the error as an object to standard output
([json.md](json.md#errors)). The meaning of a code never changes.

| code | class | `error` in JSON | what to do |
|---:|---|---|---|
| 0 | | | nothing: it worked |
"""

_MIDDLE = """\
| 141 | | | nothing: the reader of standard output went away (as `head` does) |

## Files

All commands use the same codes for files. A file to read: 9 if it does not exist, 2 if it is a
directory or another kind of file, 5 if you may not read it, 8 if it holds something else. A file to
write: 2 if the name is taken or invalid, 7 if its directory is missing or not writable. A socket to
listen on: 4 if a process listens there; a stale socket file is replaced.

## Guest state

An error says what the guest does now: `guest_state` is `running`, `paused`, `unknown` (look at the
VM's monitor), or `none` if no guest was involved. Whatever goes wrong with a snapshot of a running
guest, the guest runs on: `paused` then means that the VM was paused before, or that QEMU itself
does not continue it.

## Tracebacks

The command line shows none. With `STILLFRAME_DEBUG=1` in the environment it prints an error's
traceback before its line; add it to a report about exit code 70.

## The classes
"""


def page() -> str:
    """The whole page."""
    remedies = {
        found[1]: (int(found[2]), found[3]) for found in _TREE_LINE.finditer(errors.__doc__ or "")
    }
    classes = sorted((getattr(errors, name) for name in remedies), key=lambda kind: kind.exit_code)
    missing = set(errors.StillframeError.__subclasses__()) - set(classes)
    if missing:
        raise SystemExit(f"not in the tree of errors.py's docstring: {missing}")
    text = _HEAD
    for kind in classes:
        code, remedy = remedies[kind.__name__]
        if code != kind.exit_code:
            raise SystemExit(
                f"{kind.__name__} ends with {kind.exit_code}, its docstring says {code}"
            )
        text += f"| {code} | `{kind.__name__}` | `{kind.kind}` | {remedy} |\n"
    text += _MIDDLE
    for kind in classes:
        summary = (inspect.getdoc(kind) or "").partition("\n\nArgs:")[0].replace("``", "`")
        text += f"\n### {kind.__name__} ({kind.exit_code})\n\n{summary}\n"
    return text


def main() -> int:
    """Write or check the page; returns the exit code."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page())
        return 0
    if PAGE.read_text() == page():
        return 0
    sys.stderr.write(f"{PAGE} is not current: run python docs/generate_errors.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
