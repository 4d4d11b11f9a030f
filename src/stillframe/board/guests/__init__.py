"""Guests of the board: three that come with it, and the library to write others in C.

``include/board.h`` declares what a guest may call; ``programs/`` has the sources of the three. The
package's build (CMake) compiles them into ``bin/``, with the same flags (``board.flags``) and
linker script (``board.ld``) as :func:`build_guest`.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from stillframe.errors import HostError, NotFoundError, UsageError

__all__ = ["GUEST_NAMES", "build_guest", "build_own_guest", "guest_path"]

_DIRECTORY = Path(__file__).parent
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_TIMEOUT_S = 120

GUEST_NAMES = ("ledger", "life", "writer")
"""The guests that :func:`guest_path` knows."""


def guest_path(name: str) -> Path:
    """Return the ELF file of a packaged guest.

    Args:
        name: one of :data:`GUEST_NAMES`.

    Raises:
        NotFoundError: there is no guest of this name.
        HostError: this installation was built without guests, as on hosts that are not x86-64.
    """
    _check_name(name)
    path = _DIRECTORY / "bin" / f"{name}.elf"
    if not path.is_file():
        raise HostError(
            f"the guest {name} is not installed",
            why=f"there is no {path}: guests are built on x86-64 hosts only",
            remedy="install the package on an x86-64 host with a C compiler",
        )
    return path


def build_guest(source: Path, output: Path) -> str:
    """Compile a guest in C together with the library.

    Args:
        source: a C file, or a directory whose C files are compiled together. It includes
            ``board.h`` and defines ``board_main``.
        output: the ELF file to make; replaces an existing one once complete.

    Returns:
        The compiler's warnings.

    Raises:
        NotFoundError: the source does not exist.
        UsageError: the compiler or linker rejects it; the error has its message.
        HostError: there is no C compiler, it took too long, or the output cannot be written.
    """
    sources = sorted(source.glob("*.c")) if source.is_dir() else [source]
    if not sources or not sources[0].is_file():
        raise NotFoundError(f"there is no C source {source}")
    partial = output.with_name(f".{output.name}.partial")
    command = [
        _compiler(),
        f"@{_DIRECTORY / 'board.flags'}",
        f"-I{_DIRECTORY / 'include'}",
        "-T",
        str(_DIRECTORY / "board.ld"),
        "-o",
        str(partial),
        *map(str, sources),
        *map(str, _library_sources()),
    ]
    try:
        warnings = _compile(command, source)
        partial.replace(output)
        return warnings
    except OSError as error:
        raise HostError(f"cannot write {output}", why=error.strerror) from error
    finally:
        partial.unlink(missing_ok=True)


def build_own_guest(name: str, directory: Path | None = None) -> Path:
    """Compile one of the package's own guests, as its build does; for work in a checkout.

    Args:
        name: one of :data:`GUEST_NAMES`.
        directory: for the ELF file; by default, the one where :func:`guest_path` finds it.

    Returns:
        The ELF file.

    Raises:
        NotFoundError: there is no guest of this name.
        UsageError, HostError: as :func:`build_guest`.
    """
    _check_name(name)
    directory = directory or _DIRECTORY / "bin"
    output = directory / f"{name}.elf"
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot make {directory}", why=error.strerror) from error
    build_guest(_DIRECTORY / "programs" / name, output)
    return output


def _check_name(name: str) -> None:
    if name not in GUEST_NAMES:
        raise NotFoundError(
            f"there is no guest {name}", remedy=f"choose one of {', '.join(GUEST_NAMES)}"
        )


def _library_sources() -> list[Path]:
    library = _DIRECTORY / "lib"
    return sorted([*library.glob("*.c"), *library.glob("*.S")])


def _compiler() -> str:
    for name in _COMPILERS:
        if shutil.which(name):
            return name
    raise HostError(
        "cannot compile the guest",
        why="there is no C compiler",
        remedy="install one (on Debian and Ubuntu: apt-get install gcc)",
    )


def _compile(command: list[str], source: Path) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(
            f"cannot compile {source}", why=f"{command[0]} took more than {_COMPILE_TIMEOUT_S} s"
        ) from error
    if done.returncode:
        raise UsageError(f"cannot compile {source}", why=_first_complaint(done.stderr))
    return done.stderr


def _first_complaint(output: str) -> str:
    """Return the compiler's first line that names an error, else its last line."""
    lines = output.strip().splitlines()
    for line in lines:
        if "error:" in line or "undefined reference" in line:
            return line
    return lines[-1] if lines else "the compiler said nothing"
