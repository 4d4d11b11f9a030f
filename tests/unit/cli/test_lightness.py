"""What is imported, and when: the help and the version must not wait for what they do not need."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import stillframe
import stillframe.cli

HEAVY = ("rich", "asyncio", "qemu", "msgspec", "blake3", "backports", "ctypes", "unicorn")
ROOMS = (
    "kernel",
    "capture",
    "vmstate",
    "qmp",
    "machine",
    "snapshot",
    "still",
    "store",
    "restore",
    "doctor",
    "board.api",
    "board.hardware",
    "board.migration",
    "board.running_board",
    "api",
)


def _modules_after(code: str) -> set[str]:
    script = f"import sys, json\n{code}\nsys.stderr.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import stillframe; stillframe.__version__",
        "import stillframe; stillframe.errors.UsageError",
        "from stillframe.cli.main import main; main(['--version'])",
        "from stillframe.cli.main import main; main(['--help'])",
        "from stillframe.cli.main import main; main(['take', '--help'])",
        "from stillframe.cli.main import main; main(['board', '--help'])",
        "from stillframe.cli.main import main; main(['board', 'run', '--help'])",
        "from stillframe.cli.main import main; main(['demo', '--help'])",
    ],
)
def test_light(code: str) -> None:
    loaded = _modules_after(code)
    assert not {name for name in loaded if name.split(".")[0] in HEAVY}
    assert not {f"stillframe.{room}" for room in ROOMS} & loaded


def test_bare_package_imports_next_to_nothing() -> None:
    # While the package is imported, Ctrl-C would still show a traceback: see __main__.
    assert not {"click", "typing", "signal"} & _modules_after("import stillframe.__main__")


@pytest.mark.parametrize("words", [["ps"], ["doctor"], ["take", "/nonexistent", "-o", "/tmp/x"]])
def test_the_engine_is_for_those_who_run_boards(words: list[str]) -> None:
    code = f"from stillframe.cli.main import main; main({words})"
    assert "unicorn" not in _modules_after(code)


def test_rich_is_for_terminals() -> None:
    code = "from stillframe.cli.main import main; main(['verify', '/nonexistent'])"
    assert "rich" not in _modules_after(code)


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("stillframe.")}


def test_the_command_line_knows_the_api_only() -> None:
    allowed = ("api", "cli", "errors", "model", "version", "wings")
    for path in Path(stillframe.cli.__file__).parent.glob("*.py"):
        others = {name for name in _imports(path) if name.split(".")[1] not in allowed}
        assert not others, path


def test_functions_called_like_rooms_stay_functions() -> None:
    code = (
        "import stillframe, stillframe.restore, stillframe.doctor.checks\n"
        "assert callable(stillframe.restore) and callable(stillframe.doctor)\n"
        "from stillframe.doctor.checks import Check\n"
    )
    _modules_after(code)


def test_every_public_name_is_there() -> None:
    for name in stillframe.__all__:
        assert getattr(stillframe, name) is not None
        assert name in dir(stillframe)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(stillframe, "nothing")  # noqa: B009


def test_every_name_of_the_api_is_there() -> None:
    from stillframe import api

    for name in api.__all__:
        assert getattr(api, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(api, "nothing")  # noqa: B009
