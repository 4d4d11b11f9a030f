"""The mark of a snapshot that this user took on this host.

It is a keyed BLAKE3 of the index's digest and the manifest, so it covers the machine's record, the
blocks and every byte of the stream. The key never leaves the user's state directory. A missing or
wrong mark means "from elsewhere", and nothing more.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from blake3 import blake3

from stillframe.errors import HostError

NO_MARK: Final = "0" * 64
_FIELD: Final = b'"mark": "%s"'
_KEY_BYTES: Final = 32


def state_directory() -> Path:
    """Return the user's directory for persistent state; it may not exist yet.

    Raises:
        HostError: there is no home directory.
    """
    given = os.environ.get("XDG_STATE_HOME", "")
    if given.startswith("/"):
        return Path(given) / "stillframe"
    if os.geteuid() == 0:
        return Path("/var/lib/stillframe")
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path.home() raises without a home
    if not home.is_absolute():
        raise HostError("there is no home directory", remedy="set XDG_STATE_HOME")
    return home / ".local" / "state" / "stillframe"


class HostKey:
    """The key of this user on this host. In a home shared by several hosts, each host's key
    differs."""

    def __init__(self, secret: bytes) -> None:
        machine = b""
        with contextlib.suppress(OSError):
            machine = Path("/etc/machine-id").read_bytes()
        self._key = blake3(machine, key=secret).digest()

    @classmethod
    def load(cls) -> HostKey | None:
        """Return the key, if it exists and is secret."""
        with contextlib.suppress(OSError, HostError):
            fd = os.open(state_directory() / "host.key", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                status = os.fstat(fd)
                secret = file.read(_KEY_BYTES + 1)
            if (
                stat.S_ISREG(status.st_mode)
                and status.st_uid == os.geteuid()
                and not status.st_mode & 0o077
                and len(secret) == _KEY_BYTES
            ):
                return cls(secret)
        return None

    @classmethod
    def load_or_make(cls) -> HostKey:
        """Return the key; make it with mode 0600 on first use.

        Raises:
            HostError: it cannot be made, or others may know it.
        """
        if (found := cls.load()) is not None:
            return found
        path = state_directory() / "host.key"
        new = path.with_name(f".host.key.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(new, flags, 0o600), "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            # Link it: a rename would replace a key that another process makes at this moment.
            with contextlib.suppress(FileExistsError):
                os.link(new, path)
        except OSError as error:
            raise HostError(f"cannot make the key {path}", why=error.strerror) from error
        finally:
            with contextlib.suppress(OSError):
                new.unlink()
        if (made := cls.load()) is None:
            raise HostError(f"cannot use the key {path}", why="it is damaged, or open to others")
        return made

    def marked(self, index_digest: bytes, manifest: bytes) -> bytes:
        """Return a manifest that holds ``NO_MARK`` with its mark in that place."""
        mark = self._mark(index_digest, manifest)
        return manifest.replace(_FIELD % NO_MARK.encode(), _FIELD % mark, 1)

    def made(self, mark: str, index_digest: bytes, manifest: bytes) -> bool:
        """Return whether this key made the manifest's mark."""
        given = mark.encode()
        unmarked = manifest.replace(_FIELD % given, _FIELD % NO_MARK.encode(), 1)
        return hmac.compare_digest(given, self._mark(index_digest, unmarked))

    def _mark(self, index_digest: bytes, manifest: bytes) -> bytes:
        return blake3(index_digest + manifest, key=self._key).hexdigest().encode()
