"""How the guest agent's files are found; nothing is fetched, no VM is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from guests import agent_files
from guests.agent import wait_agent
from guests.packages import Wanted
from stillframe.errors import HostError, MachineError

LISTING = """\
\tlinux-vdso.so.1 (0x00007f47c8e23000)
\tliburing.so.2 => not found
\tlibudev.so.1 => /lib/x86_64-linux-gnu/libudev.so.1 (0x00007f47c8cec000)
\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f47c88d6000)
\t/lib64/ld-linux-x86-64.so.2 (0x00007f47c8e25000)
"""


def test_what_ldd_says() -> None:
    assert agent_files.missing_libraries(LISTING) == ["liburing.so.2"]
    assert agent_files.needed_libraries(LISTING) == {
        "lib/libudev.so.1": Path("/lib/x86_64-linux-gnu/libudev.so.1"),
        "lib/libc.so.6": Path("/lib/x86_64-linux-gnu/libc.so.6"),
        "lib64/ld-linux-x86-64.so.2": Path("/lib64/ld-linux-x86-64.so.2"),
    }


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No agent is installed; packages are what the test makes of them; the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(agent_files, "INSTALLED", tmp_path / "none")

    def unpacked(package: str, scratch: str, _wanted: Wanted) -> Path:
        tree = Path(scratch) / package
        name = "usr/sbin/qemu-ga" if package == agent_files.PACKAGE else "usr/lib/liburing.so.2"
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text(package)
        return tree

    def ldd(_program: Path, libraries: Path) -> str:
        fetched = libraries / "liburing.so.2"
        return LISTING.replace("not found", f"{fetched} (0x1)") if fetched.exists() else LISTING

    monkeypatch.setattr(agent_files, "unpacked", unpacked)
    monkeypatch.setattr(agent_files, "_ldd", ldd)
    monkeypatch.setattr(agent_files, "dependencies", lambda *_words: "  Depends: liburing2\n")
    return tmp_path / "stillframe" / "agent"


def test_program_and_missing_libraries_are_fetched_once(
    scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        files = agent_files.agent_files()
        assert files["bin/qemu-ga"].read_text() == agent_files.PACKAGE
        assert files["lib/liburing.so.2"].read_text() == "liburing2"
        monkeypatch.delattr(agent_files, "unpacked", raising=False)
    assert sorted(path.name for path in scene.iterdir()) == ["liburing.so.2", "qemu-ga"]


def test_a_library_that_no_package_has_is_named(
    scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_files, "dependencies", lambda *_words: "")
    with pytest.raises(HostError, match=r"liburing\.so\.2"):
        agent_files.agent_files()
    assert [path.name for path in scene.iterdir()] == ["qemu-ga"]


def test_waiting_for_an_agent_ends() -> None:
    def ping(_within_s: float) -> None:
        raise MachineError("no")

    with pytest.raises(MachineError, match=r"did not answer within 0\.3 s"):
        wait_agent(ping, 0.3)
