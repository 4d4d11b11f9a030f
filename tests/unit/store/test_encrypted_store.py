"""An encrypted store: who opens it, what its folder shows, and what somebody else can do to it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from stillframe import api
from stillframe.cli.main import main
from stillframe.errors import DataError, LockedError, NotFoundError, UsageError
from stillframe.store import keys as keys_room
from stillframe.store.keys import Keys, make_key
from stillframe.store.opening import make_store, open_store
from stillframe.store.records import catalog_key, data_key
from stillframe.store.sealed_backend import open_stored
from stillframe.store.store import Store
from stillframe.store.store_keys import list_keys
from tests.support_store.stores import PAGE, put

RAM = {(0, page): b"plain text of RAM! " * (PAGE // 19) + b"." * (PAGE % 19) for page in range(8)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_room, "SCRYPT_LOG_N", 4)
    for name in ("", "_FILE", "_COMMAND"):
        monkeypatch.delenv(f"STILLFRAME_PASSWORD{name}", raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store", key=make_key(passphrase="pass"))


def files(store: Store) -> list[Path]:
    return [path for path in Path(store.description).rglob("*") if path.is_file()]


def test_what_its_folder_shows(store: Store) -> None:
    entry = put(store, vm="secret-name", pages=RAM)
    store.tag(entry, ["secret-tag"])
    content = [(str(path).encode(), path.read_bytes()) for path in files(store)]
    assert len(content) == 5  # config, key, catalog, tag, snapshot
    for word in (
        b"secret-name",
        b"secret-tag",
        b"plain text of RAM",
        b"/usr/bin/qemu",
        b"namespace",
    ):
        assert [name for name, data in content if word in name or word in data] == []
    assert store.catalog().tags == {entry.id: ("secret-tag",)}
    assert store.find("secret-name@secret-tag") == entry


def test_who_opens_it(store: Store, tmp_path: Path) -> None:
    entry = put(store)
    place = tmp_path / "store"
    found = open_store(place, Keys(passphrase="pass"))
    assert list(found.list()) == [entry]
    with found.open(entry) as snapshot:
        assert snapshot.is_encrypted
    for keys, words in ((None, "is encrypted"), (Keys(passphrase="word"), "wrong passphrase")):
        with pytest.raises(LockedError, match=words):
            open_store(place, keys)
    plain = make_store(tmp_path / "plain")
    with pytest.raises(UsageError, match="not encrypted"):
        open_store(plain.description, Keys(passphrase="pass", only_encrypted=True))


def test_keys_come_and_go(store: Store, tmp_path: Path) -> None:
    entry = put(store)
    (new,) = api.add_key(store, passphrase="word", label="backup")
    assert [key.label for key in list_keys(store.backend)] == ["", "backup"]
    other = open_store(tmp_path / "store", Keys(passphrase="word"))
    assert other.key == store.key._replace(slots=b"") if store.key else False
    old = next(key.id for key in list_keys(store.backend) if key.id != new.id)
    assert api.remove_key(other, old).id == old
    with pytest.raises(LockedError):
        open_store(tmp_path / "store", Keys(passphrase="pass"))
    assert list(open_store(tmp_path / "store", Keys(passphrase="word")).list()) == [entry]
    with pytest.raises(UsageError, match="last key"):
        api.remove_key(other, new.id)
    with pytest.raises(NotFoundError):
        api.remove_key(other, "nonesuch")


def test_objects_do_not_stand_for_each_other(store: Store) -> None:
    one, two = put(store, vm="a"), put(store, vm="b")
    paths = [store.backend.path(catalog_key(entry.id)) for entry in (one, two)]
    assert paths[0] is not None
    assert paths[1] is not None
    paths[0].write_bytes(paths[1].read_bytes())
    catalog = store.catalog()
    assert list(catalog.entries) == [two.id]
    assert "not authentic" in str(catalog.damaged[one.id])


def test_a_plain_snapshot_that_somebody_put_there(store: Store, tmp_path: Path) -> None:
    entry = put(store)
    plain = make_store(tmp_path / "plain")
    other = put(plain)
    data = store.backend.path(data_key(entry.name))
    theirs = plain.backend.path(data_key(other.name))
    assert data is not None
    assert theirs is not None
    data.write_bytes(theirs.read_bytes())
    with pytest.raises(DataError, match="not encrypted"):
        open_stored(store.backend, data_key(entry.name))
    with pytest.raises(DataError, match="not encrypted"):
        store.open(entry)


def by_name(name: str, store: Store, keys: Keys) -> str:
    return os.fspath(api.locate(name, store=store.description, keys=keys))


def test_a_name_opens_what_the_catalog_says(store: Store, tmp_path: Path) -> None:
    """Whoever can write to the store can put plain files there, and exchange what is sealed."""
    web, db = put(store, vm="web1"), put(store, vm="db1")
    keys = Keys(passphrase="pass")
    place, other = Path(by_name("web1@latest", store, keys)), Path(store.location(db))
    with api.open(place, keys=keys) as snapshot:
        assert snapshot.id == web.id
    plain = make_store(tmp_path / "plain")
    before = place.read_bytes()
    for file in (other, Path(plain.location(put(plain)))):
        place.write_bytes(file.read_bytes())
        # Before the name is looked up, and between that and the opening.
        with pytest.raises(DataError, match="another snapshot than the store's catalog says"):
            by_name("web1@latest", store, keys)
        with pytest.raises(DataError, match="another snapshot than the store's catalog says"):
            api.open(place, keys=keys)
    place.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match="another snapshot than the store's catalog says"):
        store.open(web)
    place.write_bytes(before)
    api.open(by_name("web1@latest", store, keys), keys=keys).close()


def test_a_configuration_that_says_that_nothing_is_encrypted(store: Store, tmp_path: Path) -> None:
    """Else the next snapshot would be written in the clear."""
    make_store(tmp_path / "plain")
    (tmp_path / "store" / "config").write_bytes((tmp_path / "plain" / "config").read_bytes())
    with pytest.raises(DataError, match="says that it is not encrypted"):
        open_store(tmp_path / "store", Keys(passphrase="pass"))


def test_a_key_of_another_store(store: Store, tmp_path: Path) -> None:
    """A slot that somebody made for a data key of their own opens nothing."""
    theirs = make_store(tmp_path / "theirs", key=make_key(passphrase="pass"))
    for one in store.backend.listing("keys/"):
        store.backend.delete(one.key)
    for one in theirs.backend.listing("keys/"):
        store.backend.create(one.key, theirs.backend.read(one.key))
    with pytest.raises(DataError, match="are gone"):
        open_store(tmp_path / "store", Keys(passphrase="pass"))


def test_a_chain_made_one_file_stays_encrypted(store: Store, tmp_path: Path) -> None:
    """And opens by the store's passphrase, without the store."""
    first = put(store)
    second = put(store, parent=first)
    keys = Keys(passphrase="pass")
    store_again = open_store(store.description, keys)
    file = tmp_path / "whole.still"
    api.export(store_again.location(second), file, format="still", keys=keys)
    with pytest.raises(LockedError):
        api.open(file)
    with api.open(file, keys=Keys(passphrase="pass")) as snapshot:
        assert snapshot.is_encrypted
        assert snapshot.verify().missing_pages == 0


def test_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "s"
    monkeypatch.setenv("STILLFRAME_STORE", str(place))
    (tmp_path / "one").write_text("first\n")
    (tmp_path / "two").write_text("second\n")
    assert main(["init", "--encrypt", "--password-file", str(tmp_path / "one"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["encrypted"] is True
    entry = put(open_store(place, Keys(passphrase="first")))
    assert main(["ls"]) == 12
    first, second = (["--password-file", str(tmp_path / name)] for name in ("one", "two"))
    assert main(["ls", *first]) == 0
    assert entry.short_id in capsys.readouterr().out
    assert main(["ls", *second]) == 12
    new = ["key", "add", "--new-password-file", str(tmp_path / "two"), "--label", "laptop"]
    assert main([*new, *first]) == 0
    assert main(["tag", "web1@latest", "good", *second]) == 0
    assert main(["verify", "web1@good", "-q", *second]) == 0
    assert main(["show", entry.short_id, *second]) == 0
    capsys.readouterr()
    assert main(["key", "ls", "--json"]) == 0
    keys = json.loads(capsys.readouterr().out)
    assert [(key["kind"], key["label"]) for key in keys] == [("scrypt", ""), ("scrypt", "laptop")]
    assert main(["key", "rm", keys[0]["id"], *second]) == 0
    assert main(["ls", *first]) == 12
    assert main(["check", "--read-data", *second]) == 0
    assert main(["check", "--read-data"]) == 12
    monkeypatch.setenv("STILLFRAME_PASSWORD", "second")
    assert main(["rm", entry.short_id]) == 0
    assert main(["take", "nosuchvm", "--encrypt"]) == 2
    assert "has its own key" in capsys.readouterr().err


def test_copies_between_stores_of_one_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, other = tmp_path / "s", tmp_path / "other"
    monkeypatch.setenv("STILLFRAME_STORE", str(place))
    monkeypatch.setenv("STILLFRAME_PASSWORD", "pass")
    assert main(["init", "--encrypt"]) == 0
    keys = Keys(passphrase="pass")
    first = put(store := open_store(place, keys))
    second = put(store, parent=first)
    store.tag(second, ["good"])
    assert main(["init", str(tmp_path / "foreign"), "--encrypt"]) == 0
    assert main(["init", str(tmp_path / "plain")]) == 0
    for name, words in (("foreign", "--keys-of"), ("plain", "plain is not encrypted")):
        assert main(["copy", "--to", str(tmp_path / name), "-q"]) == 2
        said = capsys.readouterr().err
        assert "not the same key" in said
        assert words in said
    assert main(["init", str(other), "--keys-of", str(place)]) == 0
    assert main(["copy", "--to", str(other), "-q"]) == 0
    copied = open_store(other, keys)
    assert {entry.id for entry in copied.list()} == {first.id, second.id}
    assert copied.catalog().tags == {second.id: ("good",)}
    with copied.open(copied.find(second.id)) as snapshot:
        assert snapshot.verify().missing_pages == 0
    assert main(["init", str(tmp_path / "x"), "--keys-of", str(tmp_path / "plain")]) == 2


def test_keys_of_a_store_that_is_not_encrypted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STILLFRAME_STORE", str(tmp_path / "s"))
    assert main(["init"]) == 0
    for words, code in ((["key", "ls"], 0), (["key", "add"], 2)):
        assert main(words) == code
        assert "is not encrypted" in capsys.readouterr().err


def test_a_take_into_a_store_that_is_not_encrypted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever names a key does not get a snapshot in the clear."""
    monkeypatch.setenv("STILLFRAME_STORE", str(tmp_path / "plain"))
    (tmp_path / "word").write_text("pass")
    assert main(["init"]) == 0
    assert main(["take", "nosuchvm", "--password-file", str(tmp_path / "word")]) == 2
    assert "is not encrypted" in capsys.readouterr().err


def test_prune_by_the_command_line(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(store, created="2026-01-01T00:00:00+00:00")
    newest = put(store, created="2026-01-02T00:00:00+00:00")
    monkeypatch.setenv("STILLFRAME_STORE", store.description)
    monkeypatch.setenv("STILLFRAME_PASSWORD", "pass")
    assert main(["prune", "--keep-last", "1"]) == 0
    assert f"keeps {newest.label}: last" in capsys.readouterr().out
    assert list(store.list()) == [newest]


def test_keys_of_a_store_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["key", "ls", "--store", str(tmp_path / "none")]) == 9
    assert "there is no store at" in capsys.readouterr().err


def test_a_damaged_key_locks_out_nobody_else(store: Store, tmp_path: Path) -> None:
    put(store)
    (new,) = api.add_key(store, passphrase="word", label="backup")
    (old,) = (one.key for one in store.backend.listing("keys/") if new.id not in one.key)
    config = store.backend.read("config")
    (tmp_path / "store" / old).write_bytes(b"rot")
    keys = Keys(passphrase="word")
    assert len(open_store(tmp_path / "store", keys).list()) == 1
    assert api.list_keys(tmp_path / "store") == [new]
    assert api.check(store=tmp_path / "store", keys=keys).findings[0].key == old
    with pytest.raises(LockedError):
        open_store(tmp_path / "store", Keys(passphrase="pass"))
    api.repair(store=tmp_path / "store", keys=keys)
    with pytest.raises(UsageError, match="last key"):
        api.remove_key(store, new.id)
    assert store.backend.read("config") == config


@pytest.mark.parametrize(("content", "how"), [(b"rot", "damaged"), (None, "gone")])
def test_without_its_keys_the_configuration_stays(
    store: Store, tmp_path: Path, content: bytes | None, how: str
) -> None:
    """It names the data key; a key that is put back opens the store."""
    put(store)
    config = store.backend.read("config")
    (key,) = (tmp_path / "store" / "keys").iterdir()
    copy = key.read_bytes()
    key.unlink()
    if content is not None:
        key.write_bytes(content)
    for verb in (open_store, lambda place, keys: api.repair(store=place, keys=keys)):
        with pytest.raises(DataError, match=how):
            verb(tmp_path / "store", Keys(passphrase="pass"))
    assert store.backend.read("config") == config
    key.write_bytes(copy)
    assert len(open_store(tmp_path / "store", Keys(passphrase="pass")).list()) == 1


@pytest.mark.parametrize("wrong", [b"rot", None])
def test_a_damaged_configuration_stays_until_another_is_known(
    store: Store, tmp_path: Path, wrong: bytes | None
) -> None:
    put(store)
    (tmp_path / "store" / "config").write_bytes(b"rot")
    (key,) = (tmp_path / "store" / "keys").iterdir()
    if wrong is not None:
        key.write_bytes(wrong)
    with pytest.raises((DataError, LockedError)):
        api.repair(store=tmp_path / "store", keys=Keys(passphrase="wrong"))
    assert store.backend.read("config") == b"rot"
