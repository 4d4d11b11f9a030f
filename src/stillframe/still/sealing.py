"""The sealing of an encrypted snapshot file's parts: nobody can read them, or change them
unnoticed.

AES-256-GCM (NIST SP 800-38D) under a key of the file's own: HKDF-SHA256 (RFC 5869) of a data key,
with a fresh random salt per file. So a nonce, which is a part's kind and number, occurs once per
key. A second output of HKDF commits the file to its data key. Keys are plain bytes here; their
owners and wrapping are outside this room.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Callable, Mapping
from itertools import count
from typing import TYPE_CHECKING, Final, NamedTuple

from stillframe.errors import DataError, HostError, LockedError
from stillframe.still.frames import SKIPPABLE_HEADER, BytesLike, digest_of, skippable_frame

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SEAL_FRAME_MAGIC: Final = 0x184D2A53
SEALED_FRAME_MAGIC: Final = 0x184D2A54
KEY_BYTES: Final = 32
KEY_ID_BYTES: Final = 16
SEAL_MAX_BYTES: Final = 1 << 20

KIND_FRAME: Final = 1
KIND_INDEX: Final = 2
KIND_MANIFEST: Final = 3
KIND_OBJECT: Final = 4

_MAGIC: Final = b"STILLSEA"
_VERSION: Final = 1
_AES_256_GCM: Final = 1
_HEADER = struct.Struct("<8sHH16s32sI")
_NUMBER = struct.Struct("<Q")
_NONCE = struct.Struct(">IQ")
_SALT_BYTES: Final = 32
_TAG_BYTES: Final = 16
_HEAD_BYTES: Final = SKIPPABLE_HEADER.size + _NUMBER.size


class DataKey(NamedTuple):
    """A data key. ``secret``: 32 random bytes. ``id``: 16 random bytes that name it. ``slots``: the
    secret wrapped for a file's readers; empty if the slots are elsewhere."""

    id: bytes
    secret: bytes
    slots: bytes = b""


class SealHeader(NamedTuple):
    """What an encrypted file reveals without a key. ``where``: the file, for messages."""

    key_id: bytes
    salt: bytes
    slots: bytes
    body: bytes
    commitment: bytes
    where: str


Unlock = Callable[[SealHeader], bytes]
"""Returns a file's data key; raises LockedError."""


def unlock_with(secrets: Mapping[bytes, bytes]) -> Unlock:
    """Return an unlock for files whose keys are known, by the keys' ids."""

    def unlock(header: SealHeader) -> bytes:
        try:
            return secrets[header.key_id]
        except KeyError:
            raise LockedError(f"the key of {header.where} is not known") from None

    return unlock


def new_data_key() -> DataKey:
    """Return a random key that is not wrapped yet."""
    return DataKey(secrets.token_bytes(KEY_ID_BYTES), secrets.token_bytes(KEY_BYTES))


class Seal:
    """The seal of one file, which seals and opens its parts. Safe to share between threads."""

    def __init__(self, aead: AESGCM, content: bytes = b"") -> None:
        self._aead = aead
        self._numbers = count()
        self.content = content
        """Content of the file's seal frame."""

    @classmethod
    def new(cls, key: DataKey) -> Seal:
        """Make the seal of a new file.

        Raises:
            HostError: the package ``cryptography`` is missing.
        """
        salt = secrets.token_bytes(_SALT_BYTES)
        head = _HEADER.pack(_MAGIC, _VERSION, _AES_256_GCM, key.id, salt, len(key.slots))
        body = head + key.slots
        aead, commitment = _derive(key.secret, salt, b"stillframe file\0" + digest_of(body))
        return cls(aead, body + commitment)

    @classmethod
    def of(cls, header: SealHeader, secret: bytes) -> Seal:
        """Return the seal of an existing file.

        Raises:
            LockedError: the file has another key.
        """
        info = b"stillframe file\0" + digest_of(header.body)
        aead, commitment = _derive(secret, header.salt, info)
        if not hmac.compare_digest(commitment, header.commitment):
            raise LockedError(
                f"the key is not that of {header.where}", why="or the file's seal was changed"
            )
        return cls(aead)

    def seal_frame(self, data: BytesLike) -> bytearray:
        """Return a frame as the file holds it, sealed under a unique number."""
        number = next(self._numbers)
        nonce = _NONCE.pack(KIND_FRAME, number)
        # In place: copying a large frame would cost ten times as much as sealing it.
        frame = bytearray(_HEAD_BYTES + len(data) + _TAG_BYTES)
        SKIPPABLE_HEADER.pack_into(frame, 0, SEALED_FRAME_MAGIC, len(frame) - SKIPPABLE_HEADER.size)
        _NUMBER.pack_into(frame, SKIPPABLE_HEADER.size, number)
        self._aead.encrypt_into(nonce, data, nonce, memoryview(frame)[_HEAD_BYTES:])
        return frame

    def open_frame(self, stored: bytes) -> bytes:
        """Return what :meth:`seal_frame` was given.

        Raises:
            DataError: it is not authentic.
        """
        if len(stored) < _HEAD_BYTES + _TAG_BYTES or stored[: SKIPPABLE_HEADER.size] != (
            SKIPPABLE_HEADER.pack(SEALED_FRAME_MAGIC, len(stored) - SKIPPABLE_HEADER.size)
        ):
            raise DataError("it is no sealed frame")
        (number,) = _NUMBER.unpack_from(stored, SKIPPABLE_HEADER.size)
        return self.open(KIND_FRAME, number, memoryview(stored)[_HEAD_BYTES:])

    def seal(self, kind: int, number: int, content: BytesLike) -> bytes:
        """Seal a part; it grows by 16 bytes. No (kind, number) may occur twice."""
        nonce = _NONCE.pack(kind, number)
        return self._aead.encrypt(nonce, content, nonce)

    def open(self, kind: int, number: int, sealed: BytesLike) -> bytes:
        """Return what :meth:`seal` was given.

        Raises:
            DataError: it is not authentic.
        """
        from cryptography.exceptions import InvalidTag

        nonce = _NONCE.pack(kind, number)
        try:
            return self._aead.decrypt(nonce, sealed, nonce)
        except InvalidTag:
            raise DataError(
                "it is not authentic", why="it was damaged or changed, or belongs elsewhere"
            ) from None


def encode_seal(seal: Seal) -> bytes:
    """Return the file's seal frame."""
    return skippable_frame(SEAL_FRAME_MAGIC, seal.content)


def decode_seal(frame: bytes, where: str) -> SealHeader:
    """Decode a seal frame.

    Raises:
        DataError: malformed, or of an unknown version.
    """
    content = frame[SKIPPABLE_HEADER.size :]
    if len(content) < _HEADER.size + KEY_BYTES or frame[
        : SKIPPABLE_HEADER.size
    ] != SKIPPABLE_HEADER.pack(SEAL_FRAME_MAGIC, len(content)):
        raise DataError(f"the seal of {where} is malformed")
    magic, version, cipher, key_id, salt, slots_bytes = _HEADER.unpack_from(content)
    if magic != _MAGIC or _HEADER.size + slots_bytes + KEY_BYTES != len(content):
        raise DataError(f"the seal of {where} is malformed")
    if (version, cipher) != (_VERSION, _AES_256_GCM):
        raise DataError(
            f"the seal of {where} has version {version} and cipher {cipher}",
            why=f"only {_VERSION} and {_AES_256_GCM} are known",
            remedy="read it with a newer Stillframe",
        )
    body, commitment = content[:-KEY_BYTES], content[-KEY_BYTES:]
    return SealHeader(key_id, salt, body[_HEADER.size :], body, commitment, where)


def seal_object(secret: bytes, name: str, content: bytes) -> bytes:
    """Seal a small object that is not part of a snapshot file; ``name`` binds it to its place.

    Raises:
        HostError: the package ``cryptography`` is missing.
    """
    salt = secrets.token_bytes(_SALT_BYTES)
    aead, commitment = _derive(secret, salt, b"stillframe object\0" + name.encode())
    return salt + commitment + Seal(aead).seal(KIND_OBJECT, 0, content)


def open_object(secret: bytes, name: str, sealed: bytes) -> bytes:
    """Return what :func:`seal_object` was given.

    Raises:
        DataError: it is not authentic, or has another name or key.
    """
    salt, commitment = sealed[:_SALT_BYTES], sealed[_SALT_BYTES : _SALT_BYTES + KEY_BYTES]
    aead, expected = _derive(secret, salt, b"stillframe object\0" + name.encode())
    if not hmac.compare_digest(commitment, expected):
        raise DataError(f"{name} is not authentic", why="it was changed, or belongs elsewhere")
    try:
        return Seal(aead).open(KIND_OBJECT, 0, sealed[_SALT_BYTES + KEY_BYTES :])
    except DataError as error:
        raise DataError(f"{name} is not authentic", why=error.why) from error


def hidden_name(secret: bytes, name: str) -> str:
    """Return a stand-in for a name that others can see; deterministic (HKDF as a PRF)."""
    return _derived(secret, b"", b"stillframe name\0" + name.encode()).hex()[:KEY_BYTES]


def _derive(secret: bytes, salt: bytes, info: bytes) -> tuple[AESGCM, bytes]:
    """Return the cipher under a key of its own, and the commitment to ``secret``."""
    derived = _derived(secret, salt, info)
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(derived[:KEY_BYTES]), derived[KEY_BYTES:]


def _derived(secret: bytes, salt: bytes, info: bytes) -> bytes:
    try:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError as error:
        raise HostError(
            "encryption needs the package cryptography",
            remedy="pip install 'stillframe[encryption]'",
        ) from error
    return HKDF(SHA256(), 2 * KEY_BYTES, salt, info).derive(secret)
