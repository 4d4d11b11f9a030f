"""Who can open what: passphrases, age identities, SSH keys, and slots that lie."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pyrage.x25519
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from stillframe.errors import DataError, HostError, LockedError, NotFoundError, UsageError
from stillframe.still.sealing import DataKey, SealHeader
from stillframe.store import keys as keys_room
from stillframe.store import open_snapshot
from stillframe.store.keys import Keys, Slot, decode_slots, make_key, wrap_passphrase
from tests.support_store.sealed import sealed_file
from tests.support_store.small import small_file


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_room, "SCRYPT_LOG_N", 4)


def header_of(key: DataKey) -> SealHeader:
    return SealHeader(key.id, b"", key.slots, b"", b"", "x.still")


def identity(path: Path) -> str:
    """A new age identity in a file, as age-keygen writes it; its recipient."""
    new = pyrage.x25519.Identity.generate()
    path.write_text(f"# created: today\n# public key: {new.to_public()}\n{new}\n")
    return str(new.to_public())


def test_each_of_its_readers_opens_it(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    key = make_key(passphrase="pass", recipients=[identity(one), identity(two)])
    for keys in (Keys(passphrase="pass"), Keys(identities=[one]), Keys(identities=[two])):
        assert keys.unlock(header_of(key)) == key.secret
    assert key.secret not in key.slots
    assert b"age1" not in key.slots  # who may read is nobody's business


def test_ssh_keys_are_age_recipients_too(tmp_path: Path) -> None:
    path = tmp_path / "id"
    private = Ed25519PrivateKey.generate()
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    key = make_key(recipients=[public.decode()])
    assert Keys(identities=[path]).unlock(header_of(key)) == key.secret


def test_a_passphrase_is_asked_for_once_and_only_if_it_helps(tmp_path: Path) -> None:
    asked: list[int] = []

    def ask() -> str:
        asked.append(1)
        return "pass"

    known = tmp_path / "known"
    keys = Keys(passphrase=ask, identities=[known])
    assert keys.unlock(header_of(only_age := make_key(recipients=[identity(known)])))
    assert asked == []
    key = make_key(passphrase="pass")
    for _ in range(2):
        assert keys.unlock(header_of(key)) == key.secret
    assert keys.unlock(header_of(only_age)) == only_age.secret
    assert asked == [1]


def test_wrong_ones(tmp_path: Path) -> None:
    header = header_of(make_key(passphrase="pass", recipients=[identity(tmp_path / "a")]))
    identity(tmp_path / "other")
    for keys, words in (
        (Keys(passphrase="word"), "wrong passphrase for x.still"),
        (Keys(identities=[tmp_path / "other"]), "no identity that was given opens x.still"),
        (Keys(), "x.still is encrypted"),
        (Keys(passphrase=lambda: None), "x.still is encrypted"),
    ):
        with pytest.raises(LockedError, match=words):
            keys.unlock(header)


def test_for_whom_no_key_can_be_made() -> None:
    with pytest.raises(UsageError, match="0 readers"):
        make_key()
    with pytest.raises(UsageError, match="empty"):
        make_key(passphrase="")
    with pytest.raises(UsageError, match="no age recipient"):
        make_key(recipients=["age1nonsense"])
    with pytest.raises(UsageError, match="no age recipient"):
        make_key(recipients=["ssh-ed25519 nonsense"])


def test_identities_that_are_none(tmp_path: Path) -> None:
    header = header_of(make_key(recipients=[identity(tmp_path / "good")]))
    for content in (b"", b"# nothing\n", b"AGE-SECRET-KEY-1NONSENSE\n", b"\xff\xfe",
                    b"-----BEGIN OPENSSH PRIVATE KEY-----\n"):  # fmt: skip
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(UsageError, match="holds no age identity"):
            Keys(identities=[tmp_path / "bad"]).unlock(header)
    with pytest.raises(NotFoundError):
        Keys(identities=[tmp_path / "missing"]).unlock(header)
    with pytest.raises(HostError):
        Keys(identities=[tmp_path]).unlock(header)


def test_slots_that_lie() -> None:
    key = make_key(passphrase="pass")
    (slot,) = decode_slots(key.slots, "x.still")
    costly = msgspec.structs.replace(slot, log_n=40)
    lies = key._replace(slots=msgspec.json.encode([costly]))
    with pytest.raises(DataError, match=r"cost of 2\^40"):
        Keys(passphrase="pass").unlock(header_of(lies))
    for slots in (b"{", b"[1]", b'[{"kind":"rot13","wrapped":""}]', b"[" * 5000,
                  msgspec.json.encode([slot] * 65)):  # fmt: skip
        with pytest.raises(DataError):
            Keys(passphrase="pass").unlock(header_of(key._replace(slots=slots)))
    for wrapped in (b"", slot.wrapped[:-1], slot.wrapped[:-1] + b"x"):
        changed = msgspec.json.encode([msgspec.structs.replace(slot, wrapped=wrapped)])
        with pytest.raises(LockedError):
            Keys(passphrase="pass").unlock(header_of(key._replace(slots=changed)))


def test_a_slot_of_another_key_does_not_open(tmp_path: Path) -> None:
    """Whoever moves a slot from one file to another gets no key, and not the other's either."""
    key, other = make_key(passphrase="pass"), make_key(passphrase="pass")
    with pytest.raises(LockedError):
        Keys(passphrase="pass").unlock(header_of(key._replace(slots=other.slots)))
    recipient = identity(tmp_path / "a")
    aged, moved = make_key(recipients=[recipient]), make_key(recipients=[recipient])
    with pytest.raises(LockedError):
        Keys(identities=[tmp_path / "a"]).unlock(header_of(aged._replace(slots=moved.slots)))


def test_one_passphrase_is_never_wrapped_alike() -> None:
    key = make_key(passphrase="pass")
    one, two = wrap_passphrase(key, "pass"), wrap_passphrase(key, "pass")
    assert isinstance(one, Slot)
    assert one.salt != two.salt
    assert one.wrapped != two.wrapped


def test_what_is_not_encrypted_is_refused_where_a_key_was_named(tmp_path: Path) -> None:
    plain, sealed = tmp_path / "plain.still", tmp_path / "sealed.still"
    plain.write_bytes(small_file())
    key = make_key(passphrase="pass")
    sealed.write_bytes(sealed_file(key=key))
    with pytest.raises(UsageError, match="is not encrypted"):
        open_snapshot(plain, Keys(passphrase="pass", only_encrypted=True))
    open_snapshot(plain, Keys(passphrase="pass")).close()
    with open_snapshot(sealed, Keys(passphrase="pass", only_encrypted=True)) as snapshot:
        assert snapshot.verify().deep
    with pytest.raises(LockedError):
        open_snapshot(sealed)
