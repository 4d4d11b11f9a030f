"""``stillframe key``: list, add and remove the keys of an encrypted store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stillframe.cli.keys import key_options, read_passphrase
from stillframe.cli.options import json_option, store_option
from stillframe.cli.output import Results, say
from stillframe.cli.parameters import FILE
from stillframe.cli.text import printable, table
from stillframe.errors import UsageError

if TYPE_CHECKING:
    from stillframe.api import Keys, StoreKey


@click.group("key", short_help="List, add and remove the keys of an encrypted store.")
def command() -> None:
    """List, add and remove the keys of an encrypted store.

    Each opens all of it. The data stays as it is: who was taken off and has kept a copy of the
    store, and of the key, can read that copy.
    """


@command.command("ls")
@store_option
@json_option
def ls(as_json: bool) -> None:
    """List the keys; needs none of them."""
    from stillframe import api

    found = api.list_keys()
    if not found and not as_json:
        say("no keys: the store is not encrypted")
        return
    _show(found, as_json=as_json)


@command.command("add")
@click.option("--new-password-file", type=FILE, metavar="FILE", help="The new passphrase.")
@click.option("--recipient", metavar="AGE|SSH", help="An age recipient or public SSH key.")
@click.option("--label", default="", help="What to call it in 'key ls'.")
@store_option
@json_option
@key_options
def add(
    new_password_file: str | None, recipient: str | None, label: str, as_json: bool, keys: Keys
) -> None:
    """Add a passphrase, or a recipient."""
    from stillframe import api

    if recipient is not None and new_password_file is not None:
        raise UsageError("a key is a passphrase or a recipient", remedy="add one after the other")
    passphrase = None
    store = api.open_store(keys=keys)  # ask for the old passphrase before the new one
    if recipient is None and store.key is not None:
        passphrase = read_passphrase(new_password_file, new=True, environment=False)
    recipients = [] if recipient is None else [recipient]
    added = api.add_key(store, passphrase=passphrase, recipients=recipients, label=label)
    _show(added, as_json=as_json)


@command.command("rm")
@click.argument("key_id", metavar="ID")
@store_option
@json_option
@key_options
def rm(key_id: str, as_json: bool, keys: Keys) -> None:
    """Remove a key, as 'key ls' shows it; the last one stays."""
    from stillframe import api

    _show([api.remove_key(api.open_store(keys=keys), key_id)], as_json=as_json)


def _show(keys: list[StoreKey], *, as_json: bool) -> None:
    rows = [
        (key.id, _KINDS[key.slot.kind], f"{key.created[:19]}Z", printable(key.label))
        for key in keys
    ]
    Results(as_json=as_json).show(
        [
            {"id": key.id, "kind": key.slot.kind, "created": key.created, "label": key.label}
            for key in keys
        ],
        table(("ID", "KIND", "CREATED", "LABEL"), rows),
    )


_KINDS = {"scrypt": "passphrase", "age": "recipient"}
