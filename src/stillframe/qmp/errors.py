"""Errors that a QMP server sends."""

from __future__ import annotations

from typing import Literal

ErrorClass = Literal[
    "GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound", "KVMMissingCap"
]
"""QEMU ``qapi/error.json``: QapiErrorClass. New errors are GenericError."""


class QmpError(Exception):
    """A command failed, or the input is no command: the reply's ``class`` and ``desc``.

    The guest's state is what it was before the command, unless the command says otherwise.
    """

    def __init__(self, description: str, error_class: ErrorClass = "GenericError") -> None:
        super().__init__(description)
        self.error_class: ErrorClass = error_class
        self.description = description
