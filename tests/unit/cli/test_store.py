"""A store from the command line: every verb, its words and its exit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillframe.cli.main import COMMANDS, main
from stillframe.cli.other_verbs import OTHER_VERBS
from stillframe.store import compaction
from stillframe.store.opening import open_store
from stillframe.store.records import Entry, data_key
from stillframe.store.store import Store
from tests.support_store.small import write_small
from tests.support_store.stores import put

Run = Callable[..., tuple[int, str, str]]
JsonOf = Callable[..., Any]
Refused = Callable[..., None]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the program here: (exit code, standard output, standard error)."""

    def run_here(*words: object) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            patch.setenv("STILLFRAME_STORE", "/nonexistent")  # whatever is set is set back
            code = main(list(map(str, words)))
        out, err = capsys.readouterr()
        return code, out, err

    return run_here


@pytest.fixture
def json_of(run: Run) -> JsonOf:
    def of(*words: object, code: int = 0) -> Any:
        found, out, err = run(*words, "--json")
        assert found == code, err
        return json.loads(out)

    return of


@pytest.fixture
def refused(run: Run) -> Refused:
    """One line, and nothing on standard output."""

    def refuse(code: int, words: str, *arguments: object) -> None:
        found, out, err = run(*arguments)
        assert (found, out) == (code, ""), err
        assert len(err.splitlines()) == 1, err
        assert words in err

    return refuse


@pytest.fixture
def place(run: Run, tmp_path: Path) -> Path:
    """A store, made by the program."""
    code, _, err = run("init", tmp_path / "store")
    assert code == 0, err
    return tmp_path / "store"


@pytest.fixture
def store(place: Path) -> Store:
    return open_store(place)


@pytest.fixture
def chain(store: Store) -> list[Entry]:
    first = put(store, created="2026-11-23T10:00:00+00:00")
    second = put(store, created="2026-11-23T11:00:00+00:00", parent=first)
    return [first, second, put(store, vm="db", created="2026-11-23T12:00:00+00:00", disk=b"d" * 9)]


def test_init(json_of: JsonOf, refused: Refused, tmp_path: Path) -> None:
    made = json_of("init", tmp_path / "s", "--append-only", "--full-every", 5)
    assert made["store"] == str(tmp_path / "s")
    assert (made["append_only"], made["full_every"], len(made["id"])) == (True, 5, 32)
    refused(2, "is a store already", "init", tmp_path / "s")
    refused(7, "", "init", "/proc/store")
    refused(3, "append-only", "prune", "--keep-last", 1, "--store", tmp_path / "s")


def test_where_there_is_none(refused: Refused, tmp_path: Path) -> None:
    calls = ("ls", "rm aaaa", "tag aaaa x", "check", "repair", "prune --keep-last 1",
             "show web1@latest", "take 1")  # fmt: skip
    for words in map(str.split, calls):
        refused(9, "stillframe init", *words, "--store", tmp_path / "none")


def test_ls(json_of: JsonOf, run: Run, place: Path, store: Store, chain: list[Entry]) -> None:
    store.tag(chain[1], ["nightly", "good"])
    found = json_of("ls", "--store", place)
    assert [one["id"] for one in found] == [chain[2].id, chain[0].id, chain[1].id]
    assert found[2] == {
        "id": chain[1].id,
        "short_id": chain[1].short_id,
        "vm": "web1",
        "created": "2026-11-23T11:00:00+00:00",
        "parent": chain[0].id,
        "file_bytes": chain[1].file_bytes,
        "own_bytes": chain[1].file_bytes,
        "whole": False,
        "disks_bytes": 0,
        "ram_bytes": 32768,
        "mode": "background",
        "for_analysis": False,
        "shared_bytes": chain[0].file_bytes,
        "tags": ["good", "nightly"],
    }
    assert found[1]["shared_bytes"] == chain[0].file_bytes
    lines = run("ls", "web1", "--store", place)[1].splitlines()
    assert lines[0].split() == ["VM", "ID", "TIME", "SIZE", "SHARED", "TAGS"]
    assert [line.split()[1:3] for line in lines[1:]] == [
        [chain[0].short_id, lines[1].split()[2]],
        ["└", chain[1].short_id],
    ]
    assert lines[2].endswith("good, nightly")


def test_names_are_taken_wherever_files_are(
    json_of: JsonOf, refused: Refused, run: Run, place: Path, chain: list[Entry], tmp_path: Path
) -> None:
    for name in (chain[1].id, chain[1].id[:4], "web1@latest", "web1@2026-11-23T11:00Z"):
        assert json_of("verify", name, "--store", place)["id"] == chain[1].id
        assert json_of("show", name, "--store", place)["id"] == chain[1].id
    out = tmp_path / "out.raw"
    words = ["export", "web1@latest", "--format=raw", "--block=ram", "-o", out, "--store", place]
    assert run(*words)[0] == 0
    assert out.stat().st_size == 32768
    refused(9, "no snapshot web1@never", "verify", "web1@never", "--store", place)
    refused(9, "no snapshot of a VM 'web2'", "restore", "web2@latest", "--store", place)
    refused(9, "there is no file web1", "verify", "web1", "--store", place)


def test_a_file_that_is_there_wins(
    json_of: JsonOf,
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
    chain: list[Entry],
    tmp_path: Path,
) -> None:
    from stillframe.store.backends.local import LocalSink

    snapshot_id, _, _ = write_small(LocalSink(tmp_path / "web1@latest"))
    monkeypatch.chdir(tmp_path)
    assert json_of("verify", "web1@latest", "--store", place)["id"] == snapshot_id


def test_tag(json_of: JsonOf, refused: Refused, run: Run, place: Path, chain: list[Entry]) -> None:
    assert json_of("tag", "web1@latest", "a", "b", "--store", place) == {"tags": ["a", "b"]}
    assert run("tag", "web1@a", "--remove", "a", "--store", place) == (0, "b\n", "")
    assert json_of("tag", "--add", "c", "web1@latest", "--store", place) == {"tags": ["b", "c"]}
    refused(2, "cannot be a tag", "tag", "web1@latest", "a b", "--store", place)


def test_rm(
    json_of: JsonOf, refused: Refused, run: Run, place: Path, store: Store, chain: list[Entry]
) -> None:
    refused(3, chain[1].short_id, "rm", chain[0].id, "--store", place)
    refused(9, "no snapshot", "rm", "ffff0000ffff", "db@latest", "--store", place)
    dry = json_of("rm", "db@latest", "--dry-run", "--store", place)
    assert dry["removed"] == [chain[2].id]
    assert len(store.list()) == 3
    code, out, err = run("rm", "db@latest", "web1@latest", chain[0].short_id, "--store", place)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 3
    assert [one.key for one in store.backend.listing("")] == ["config"]


def test_prune(
    json_of: JsonOf, refused: Refused, run: Run, place: Path, store: Store, chain: list[Entry]
) -> None:
    refused(2, "--keep-", "prune", "--store", place)
    old = put(store, created="2025-01-01T00:00:00+00:00")
    dry = run("prune", "--keep-last=1", "--dry-run", "--store", place)[1]
    assert f"keeps {chain[0].label}: snapshot {chain[1].label} needs it" in dry
    assert f"would remove {old.label}" in dry
    assert dry.splitlines()[-1].startswith("would remove 1 of 4 snapshots")
    done = json_of("prune", "--keep-last", 1, "--store", place)
    assert done["removed"] == [old.id]
    assert set(done["needed"]) == {chain[0].id}
    assert len(store.list()) == 3


def test_prune_makes_chains_short(
    json_of: JsonOf,
    run: Run,
    place: Path,
    store: Store,
    chain: list[Entry],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compaction, "MOST_FILES", 2)
    last = put(store, created="2026-11-23T12:00:00+00:00", parent=chain[1])
    words = ("prune", "web1", "--keep-last=1", "--store", place)
    dry = run(*words, "--dry-run")[1]
    assert f"would compact {last.label}: it needs no parent then" in dry
    assert dry.splitlines()[-1].startswith("would remove 2 of 3 snapshots")
    assert json_of("ls", "web1", "--store", place)[-1]["whole"] is False
    done = json_of(*words)
    assert (done["compacted"], done["not_compacted"]) == ([last.id], {})
    assert sorted(done["removed"]) == sorted([chain[0].id, chain[1].id])
    (left,) = json_of("ls", "web1", "--store", place)
    assert (left["id"], left["whole"]) == (last.id, True)
    assert left["own_bytes"] > left["file_bytes"]
    assert json_of("verify", last.short_id, "--store", place)["id"] == last.id


def test_check_and_repair(
    json_of: JsonOf, refused: Refused, run: Run, place: Path, store: Store, chain: list[Entry]
) -> None:
    assert run("check", "--read-data", "--store", place)[1].endswith("sound\n")
    assert run("repair", "--store", place)[:2] == (0, "nothing to mend\n")
    path = place / data_key(chain[0].name)
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    assert run("check", "--store", place)[0] == 0
    code, out, _ = run("check", "--read-data=100%", "--store", place)
    assert code == 8
    assert f"affects {chain[1].label}" in out
    assert chain[2].short_id not in out
    found = json_of("check", "--read-data", "--store", place, code=8)
    assert set(found["lost"]) == {chain[0].id, chain[1].id}
    assert json_of("verify", "db@latest", "--store", place)["sound"]
    assert set(json_of("repair", "--read-data", "--store", place, code=8)["lost"]) == {
        chain[0].id,
        chain[1].id,
    }
    assert len(store.list()) == 3
    json_of("repair", "--read-data", "--forget", "--store", place)
    assert list(store.list()) == [chain[2]]
    refused(2, "5%", "check", "--read-data=0%", "--store", place)
    assert json_of("check", "--read-data-subset", "50%", "--store", place)["read_bytes"] >= 0


def test_verbs_of_other_tools_name_ours(refused: Refused, run: Run) -> None:
    for verb, ours in (
        ("forget", "stillframe prune --keep-"),
        ("snapshots", "stillframe ls"),
        ("backup", "stillframe take"),
        ("mount", "stillframe export"),
        ("unlock", "no locks"),
        ("stats", "stillframe ls"),
        ("extract", "stillframe export"),
        ("compact", "stillframe prune"),
    ):
        refused(2, ours, verb, "--whatever", "x")
    assert not set(OTHER_VERBS) & set(COMMANDS)
    for sentence in OTHER_VERBS.values():
        for verb in re.findall(r"'stillframe (\w+)", sentence):
            assert run(verb, "--help")[0] == 0
