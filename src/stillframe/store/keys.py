"""Keys of encrypted snapshots: a data key wrapped by a passphrase, and by age recipients.

A *slot* is the data key wrapped for one reader: by scrypt (RFC 7914) and AES-256-GCM, or as an age
file (https://age-encryption.org/v1). Any one slot yields the key.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from stillframe.errors import DataError, HostError, LockedError, NotFoundError, UsageError
from stillframe.still.container import NEEDS_KEY
from stillframe.still.sealing import KEY_BYTES, DataKey, SealHeader, new_data_key

Passphrase = str | Callable[[], str | None] | None
"""The passphrase, or a function that asks for it on demand; None if there is none."""

SCRYPT_LOG_N = 17
"""128 MiB and about half a second, as OWASP's password storage cheat sheet recommends."""
_SCRYPT_LOG_N_MAX: Final = 20
"""1 GiB: the most memory that a foreign file may make us use."""
_SCRYPT_R: Final = 8
_NONCE_BYTES: Final = 12
_MOST_SLOTS: Final = 64


class Slot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A wrapped data key. ``wrapped``: the key sealed under the passphrase's key, nonce first; or
    an age file."""

    kind: Literal["scrypt", "age"]
    wrapped: bytes
    salt: bytes = b""
    log_n: int = 0


class Keys:
    """The keys, passphrase and identities that may open encrypted snapshots. Opened keys are
    cached, so that the user is asked once.

    Args:
        identities: files of age identities or SSH keys.
        only_encrypted: refuse unencrypted snapshots, which an attacker could have planted.
    """

    def __init__(
        self,
        *,
        passphrase: Passphrase = None,
        identities: Sequence[str | os.PathLike[str]] = (),
        only_encrypted: bool = False,
    ) -> None:
        self._passphrase = passphrase
        self._identities = tuple(identities)
        self.only_encrypted = only_encrypted
        self._opened: dict[bytes, bytes] = {}
        self._of_stores: dict[bytes, DataKey] = {}
        self._expected: dict[str, str] = {}

    def add(self, key: DataKey) -> None:
        """Remember a store's key with its slots."""
        self._opened[key.id] = key.secret
        self._of_stores[key.id] = key

    def expect(self, location: str, snapshot_id: str) -> None:
        """Expect this snapshot at this location, as the store's sealed catalog says: an attacker
        who can write to the store can put another file there."""
        self._expected[location] = snapshot_id

    def check(self, location: str, snapshot_id: str) -> None:
        """Raise DataError if another snapshot is expected at this location."""
        if self._expected.get(location, snapshot_id) != snapshot_id:
            raise not_the_catalogs(location)

    def with_slots(self, key: DataKey | None) -> DataKey | None:
        """Return the key with its slots, for a stand-alone file: a store's key gets that store's
        slots."""
        return key if key is None or key.slots else self._of_stores.get(key.id, key)

    def unlock(self, header: SealHeader) -> bytes:
        """Return a file's data key: this is a ``still.sealing.Unlock``.

        Raises:
            LockedError: no given key opens it. DataError: its slots are malformed.
            NotFoundError, HostError, UsageError: an identity cannot be read.
        """
        if header.key_id not in self._opened:
            slots = decode_slots(header.slots, header.where)
            self._opened[header.key_id] = self.open(slots, header.key_id, header.where)
        return self._opened[header.key_id]

    def open(self, slots: Sequence[Slot], key_id: bytes, where: str) -> bytes:
        """Return the data key in the first slot that opens; raises as :meth:`unlock`."""
        aged = [slot for slot in slots if slot.kind == "age"]
        if aged and self._identities:
            secret = _open_age(aged, key_id, _read_identities(self._identities))
            if secret is not None:
                return secret
        passphrase = None
        if any(slot.kind == "scrypt" for slot in slots):
            passphrase = self._ask()
            for slot in slots:
                if passphrase is not None and slot.kind == "scrypt":
                    secret = _open_scrypt(slot, key_id, passphrase, where)
                    if secret is not None:
                        return secret
        if passphrase is not None:
            raise LockedError(f"wrong passphrase for {where}")
        if self._identities:
            raise LockedError(f"no identity that was given opens {where}")
        raise LockedError(f"{where} is encrypted", remedy=NEEDS_KEY)

    def _ask(self) -> str | None:
        if callable(self._passphrase):
            self._passphrase = self._passphrase()
        return self._passphrase


def not_the_catalogs(location: str) -> DataError:
    """Return the error for a file that is not the snapshot that the store's catalog names."""
    return DataError(
        f"{location} is another snapshot than the store's catalog says",
        why="the file was replaced, or exchanged with another one",
        remedy="run 'stillframe check'",
    )


def make_key(*, passphrase: str | None = None, recipients: Iterable[str] = ()) -> DataKey:
    """Make a new data key, wrapped for its readers.

    Args:
        recipients: age recipients (``age1...``) or public SSH keys.

    Raises:
        UsageError: there is no reader; an empty passphrase; an invalid recipient.
        HostError: a package is missing.
    """
    return wrapped_for(new_data_key(), passphrase=passphrase, recipients=recipients)


def wrapped_for(
    key: DataKey, *, passphrase: str | None = None, recipients: Iterable[str] = ()
) -> DataKey:
    """Return the data key with slots for its readers; raises as :func:`make_key`."""
    slots = [] if passphrase is None else [wrap_passphrase(key, passphrase)]
    slots += [wrap_age(key, recipient) for recipient in recipients]
    if not 1 <= len(slots) <= _MOST_SLOTS:
        raise UsageError(
            f"a key for {len(slots)} readers makes no sense",
            remedy=f"name a passphrase or recipients, {_MOST_SLOTS} in all",
        )
    return key._replace(slots=msgspec.json.encode(slots))


def wrap_passphrase(key: DataKey, passphrase: str) -> Slot:
    """Return a slot that the passphrase opens.

    Raises:
        UsageError: it is empty. HostError: a package is missing.
    """
    if not passphrase:
        raise UsageError("the passphrase is empty")
    salt, nonce = secrets.token_bytes(32), secrets.token_bytes(_NONCE_BYTES)
    sealed = _cipher(passphrase, salt, SCRYPT_LOG_N).encrypt(nonce, key.secret, key.id)
    return Slot(kind="scrypt", wrapped=nonce + sealed, salt=salt, log_n=SCRYPT_LOG_N)


def wrap_age(key: DataKey, recipient: str) -> Slot:
    """Return a slot that the recipient's identity opens; the slot does not reveal the recipient.

    Raises:
        UsageError: the recipient is invalid. HostError: a package is missing.
    """
    pyrage = _pyrage()
    kind = pyrage.ssh if recipient.startswith("ssh-") else pyrage.x25519
    try:
        parsed = kind.Recipient.from_str(recipient.strip())
    except pyrage.RecipientError as error:
        raise UsageError(f"{recipient!r} is no age recipient", why=str(error)) from error
    return Slot(kind="age", wrapped=pyrage.encrypt(key.id + key.secret, [parsed]))


def decode_slots(content: bytes, where: str) -> list[Slot]:
    """Decode the slots that a file holds.

    Raises:
        DataError: malformed.
    """
    try:
        slots = msgspec.json.decode(content or b"[]", type=list[Slot])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"the key slots of {where} are malformed", why=str(error)) from error
    if len(slots) > _MOST_SLOTS:
        raise DataError(f"{where} has {len(slots)} key slots, at most {_MOST_SLOTS} are allowed")
    return slots


def _open_scrypt(slot: Slot, key_id: bytes, passphrase: str, where: str) -> bytes | None:
    if not 1 <= slot.log_n <= _SCRYPT_LOG_N_MAX:
        raise DataError(
            f"a key slot of {where} asks for scrypt with a cost of 2^{slot.log_n}",
            why=f"at most 2^{_SCRYPT_LOG_N_MAX} is allowed",
        )
    from cryptography.exceptions import InvalidTag

    nonce, sealed = slot.wrapped[:_NONCE_BYTES], slot.wrapped[_NONCE_BYTES:]
    try:
        secret = _cipher(passphrase, slot.salt, slot.log_n).decrypt(nonce, sealed, key_id)
    except (InvalidTag, ValueError):
        return None
    return secret if len(secret) == KEY_BYTES else None


def _open_age(slots: Iterable[Slot], key_id: bytes, identities: list[Any]) -> bytes | None:
    pyrage = _pyrage()
    for slot in slots:
        try:
            content: bytes = pyrage.decrypt(slot.wrapped, identities)
        except pyrage.DecryptError:
            continue
        if content[: len(key_id)] == key_id and len(content) == len(key_id) + KEY_BYTES:
            return content[len(key_id) :]
    return None


def _read_identities(paths: Iterable[str | os.PathLike[str]]) -> list[Any]:
    pyrage = _pyrage()
    found: list[Any] = []
    for path in paths:
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no file {path}") from error
        except OSError as error:
            raise HostError(f"cannot read {path}", why=error.strerror) from error
        try:
            if content.lstrip().startswith(b"-----BEGIN "):
                found.append(pyrage.ssh.Identity.from_buffer(content))
                continue
            lines = [line.strip() for line in content.decode("ascii").splitlines()]
            keys = [line for line in lines if line and not line.startswith("#")]
            found += [pyrage.x25519.Identity.from_str(line) for line in keys]
        except (pyrage.IdentityError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} holds no age identity", why=str(error)) from error
        if not keys:
            raise UsageError(f"{path} holds no age identity")
    return found


def _cipher(passphrase: str, salt: bytes, log_n: int) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
    except ImportError as error:
        raise _missing("cryptography") from error
    word = passphrase.encode("utf-8", "surrogateescape")
    return AESGCM(Scrypt(salt, KEY_BYTES, 1 << log_n, _SCRYPT_R, 1).derive(word))


def _pyrage() -> Any:
    try:
        import pyrage
        import pyrage.ssh
        import pyrage.x25519
    except ImportError as error:
        raise _missing("pyrage") from error
    return pyrage


def _missing(package: str) -> HostError:
    return HostError(
        f"encryption needs the package {package}", remedy="pip install 'stillframe[encryption]'"
    )
