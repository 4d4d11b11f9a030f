"""Break the code on purpose, one way at a time, and see a test catch it.

Works on a copy of the checkout in a temp directory. A mutation that no test catches, or that no
longer applies, is reported and makes the exit code 1. Run it with the environment of the tests::

    make break-invariants            # all; takes several minutes
    python tools/break_invariants.py claim-ignored
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TEST_TIMEOUT_S = 300
CORE = "src/stillframe/memory/_capture.pyx"
TAKE = "tests/integration/test_take.py"
PROCESS = "tests/integration/test_capture_process.py"
OWN = "tests/integration/test_own_memory.py"
FAULTS = "tests/fault/test_fault_points.py"


class Mutation(NamedTuple):
    """``old`` is replaced by ``new`` in ``file``; ``tests`` must then fail."""

    name: str
    invariant: int
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "not-protected-before-devices",
        8,
        "src/stillframe/snapshot/instant.py",
        "    ram.protect_written()\n",
        "    pass\n",
        (f"{TAKE}::test_nothing_is_written_while_the_guest_stands",),
    ),
    Mutation(
        "noted-forgotten",
        1,
        "src/stillframe/memory/ram_capture.py",
        "        self._core.set_phase(_capture.PHASE_ACTIVE)\n",
        "        self._core.set_phase(_capture.PHASE_RELEASE)\n",
        (f"{TAKE}::test_never_torn_under_full_load[memfd]",),
    ),
    Mutation(
        "faults-wait-for-the-gil",
        3,
        CORE,
        "            self._fault(address)\n",
        "            with gil:\n                self._fault(address)\n",
        (f"{PROCESS}::test_faults_are_served_while_somebody_keeps_the_gil",),
    ),
    Mutation(
        "population-learned-in-the-downtime",
        6,
        "src/stillframe/snapshot/instant.py",
        "    ram.protect_written()\n",
        "    ram.learn_population()\n    ram.protect_written()\n",
        (f"{TAKE}::test_what_grows_with_ram_is_done_while_the_guest_runs",),
    ),
    Mutation(
        "claim-ignored",
        2,
        CORE,
        "won = mask & ~sf_fetch_or(&b.claim[word], mask)",
        "won = mask | (0 & sf_fetch_or(&b.claim[word], mask))",
        ("tests/property", f"{TAKE}::test_numbers_add_up"),
    ),
    Mutation(
        "un-protected-before-the-copy",
        2,
        CORE,
        "            self._window(b, page, &first, &pages)\n",
        "            self._unprotect(b, page, 1, True)\n"
        "            self._window(b, page, &first, &pages)\n",
        (f"{OWN}::test_never_torn_in_our_own_process",),
    ),
    Mutation(
        "kernel-writes-left-to-fail",
        7,
        "src/stillframe/memory/_guest_memory_sys.h",
        "if (n < 0 && errno == EFAULT) {",
        "if (0) {",
        (f"{OWN}::test_the_kernel_reads_into_protected_ram",),
    ),
    Mutation(
        "guard-never-armed",
        4,
        "src/stillframe/snapshot/guard.py",
        'self._send(b"A")',
        'self._send(b"D")',
        (f"{FAULTS}::test_kill[stopped]",),
    ),
    Mutation(
        "named-before-it-is-complete",
        5,
        "src/stillframe/store/backends/local.py",
        'os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, _MODE, dir_fd=directory_fd)',
        'os.open("early", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE, dir_fd=directory_fd)',
        (f"{FAULTS}::test_kill[swept]", "tests/contract"),
    ),
    Mutation(
        "dropped-ram-unnoticed",
        7,
        "src/stillframe/memory/ram_capture.py",
        'if numbers["lost"]:',
        "if False:",
        (PROCESS,),
    ),
    Mutation(
        "writes-while-stopped-unseen",
        8,
        "src/stillframe/memory/ram_capture.py",
        "        runs = self._core.noted_runs()\n",
        "        runs: list[tuple[int, int, int]] = []\n",
        (PROCESS,),
    ),
    Mutation(
        "spill-without-limit-check",
        9,
        CORE,
        "index = ring_take(&self.empty)\n        if index < 0:\n            began",
        "index = 0\n        if index < 0:\n            began",
        ("tests/property", PROCESS),
    ),
)


def build(copy: Path) -> None:
    """Compile the native modules in place."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    folder = copy / "src/stillframe/memory"
    for stale in folder.glob("*.so"):
        stale.unlink()
    for source in sorted(folder.glob("*.pyx")):
        generated = copy / f"{source.stem}.c"
        subprocess.run(
            [sys.executable, "-m", "cython", "-3", str(source), "--output-file", str(generated)],
            check=True,
            capture_output=True,
        )
        command = ["gcc", "-shared", "-fPIC", "-O2", "-D_GNU_SOURCE", "-fno-strict-aliasing"]
        command += [f"-I{sysconfig.get_paths()['include']}", f"-I{folder}", str(generated)]
        subprocess.run([*command, "-o", str(folder / f"{source.stem}{suffix}")], check=True)


def survives(mutation: Mutation) -> str | None:
    """None if a test caught it, else why not."""
    with tempfile.TemporaryDirectory(prefix="stillframe-broken-") as place:
        copy = Path(place) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "*.still"))
        file = copy / mutation.file
        text = file.read_text()
        if mutation.old not in text:
            return "the text to break is not there any more"
        file.write_text(text.replace(mutation.old, mutation.new))
        build(copy)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--timeout=120", *mutation.tests]
        try:
            done = subprocess.run(
                command,
                cwd=copy,
                env=os.environ | {"PYTHONPATH": str(copy / "src")},
                timeout=TEST_TIMEOUT_S,
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None
        if done.returncode == 1:
            return None
        return f"the tests ended with {done.returncode}: {done.stdout.strip()[-200:]}"


def main() -> int:
    wanted = sys.argv[1:]
    failures = 0
    for mutation in MUTATIONS:
        if wanted and mutation.name not in wanted:
            continue
        reason = survives(mutation)
        verdict = "caught" if reason is None else f"NOT CAUGHT: {reason}"
        failures += reason is not None
        print(f"{mutation.invariant}  {mutation.name}: {verdict}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
