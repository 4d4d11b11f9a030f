"""The sources of keys on the command line: options, the environment, the terminal."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stillframe.cli.parameters import FILE
from stillframe.errors import HostError, NotFoundError, UsageError

if TYPE_CHECKING:
    from stillframe.api import DataKey, Keys

Command = TypeVar("Command", bound=Callable[..., Any])
_VARIABLE = "STILLFRAME_PASSWORD"
_READS = ("parent", "keys_of")
"""Options of encrypting commands that name inputs, which may themselves be encrypted."""

_password_file = click.option(
    "--password-file",
    type=FILE,
    metavar="FILE",
    help="The passphrase of an encrypted snapshot or store.",
)
_identities = click.option(
    "--identity",
    "identities",
    type=FILE,
    multiple=True,
    metavar="FILE",
    help="An age identity or SSH key that opens an encrypted snapshot or store.",
)


def key_options(command: Command) -> Command:
    """Add the options that open encrypted snapshots; the command gets ``keys``."""

    @_password_file
    @_identities
    @functools.wraps(command)
    def with_keys(
        *arguments: Any, password_file: str | None, identities: tuple[str, ...], **options: Any
    ) -> Any:
        keys = _keys(password_file, identities, only_encrypted=bool(password_file or identities))
        return command(*arguments, keys=keys, **options)

    return with_keys  # type: ignore[return-value]


def encrypt_options(command: Command) -> Command:
    """Add the options that encrypt the output; the command gets ``key``."""

    @click.option("--encrypt", is_flag=True, help="Encrypt with a passphrase.")
    @click.option(
        "--recipient",
        "recipients",
        multiple=True,
        metavar="AGE|SSH",
        help="Encrypt for this age recipient or public SSH key.",
    )
    @_password_file
    @functools.wraps(command)
    def with_key(
        *arguments: Any,
        encrypt: bool,
        recipients: tuple[str, ...],
        password_file: str | None,
        **options: Any,
    ) -> Any:
        into_store = "output" in options and options["output"] is None
        reads = into_store or any(map(options.get, _READS))
        if password_file is not None and not encrypt and not reads:
            raise UsageError("--password-file is for an encrypted snapshot", remedy="add --encrypt")
        if "identities" in options:
            identities = options.pop("identities")
            named = bool(password_file or identities)
            options["keys"] = _keys(password_file, identities, only_encrypted=into_store and named)
        key = _new_key(encrypt, recipients, password_file)
        return command(*arguments, key=key, **options)

    return with_key  # type: ignore[return-value]


def encrypt_with_keys_options(command: Command) -> Command:
    """As :func:`encrypt_options`; the command also gets ``keys``, for its inputs (a ``parent``, a
    store)."""
    return encrypt_options(_identities(command))


def _keys(password_file: str | None, identities: tuple[str, ...], *, only_encrypted: bool) -> Keys:
    """Make the keys from the options and the environment; the terminal is asked only if needed."""
    from stillframe import api

    return api.Keys(
        passphrase=lambda: read_passphrase(password_file),
        identities=identities,
        only_encrypted=only_encrypted,
    )


def _new_key(
    encrypt: bool, recipients: tuple[str, ...], password_file: str | None
) -> DataKey | None:
    if not encrypt and not recipients:
        return None
    from stillframe import api

    passphrase = read_passphrase(password_file, new=True) if encrypt else None
    return api.make_key(passphrase=passphrase, recipients=recipients)


def read_passphrase(
    password_file: str | None, *, new: bool = False, environment: bool = True
) -> str | None:
    """Get the passphrase from the file, the environment or the terminal; None if none has it.

    Args:
        new: prompt for it twice, and fail if there is none.
        environment: also look in the environment.

    Raises:
        NotFoundError, HostError, UsageError: it cannot be read, or is empty; or there is no new
            passphrase.
    """
    given = _given_passphrase(password_file, os.environ if environment else {})
    if given is None and sys.stdin.isatty():
        given = click.prompt("Passphrase", hide_input=True, confirmation_prompt=new, err=True)
    if given == "":
        raise UsageError("the passphrase is empty")
    if given is None and new:
        raise UsageError(
            "there is no passphrase to encrypt with",
            remedy=f"give --password-file or {_VARIABLE}, or encrypt to a --recipient",
        )
    return given


def _given_passphrase(password_file: str | None, environment: Mapping[str, str]) -> str | None:
    if password_file is not None:
        return _from_file(password_file)
    if (word := environment.get(_VARIABLE)) is not None:
        return word
    if path := environment.get(f"{_VARIABLE}_FILE"):
        return _from_file(path)
    if line := environment.get(f"{_VARIABLE}_COMMAND"):
        return _from_command(line)
    return None


def _from_file(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "surrogateescape").rstrip("\r\n")
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {path}") from error
    except OSError as error:
        raise HostError(f"cannot read {path}", why=error.strerror) from error


def _from_command(line: str) -> str:
    try:
        done = subprocess.run(
            shlex.split(line),
            stdout=subprocess.PIPE,
            check=True,
            encoding="utf-8",
            errors="surrogateescape",
        )
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise HostError(f"{_VARIABLE}_COMMAND does not tell the passphrase", why=str(error)) from (
            error
        )
    return done.stdout.rstrip("\r\n")
