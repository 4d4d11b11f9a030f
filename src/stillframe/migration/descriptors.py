"""Descriptors that clients hand over, as a migration asks for them."""

from __future__ import annotations

import os
from typing import Protocol

from stillframe.errors import NotFoundError


class Descriptors(Protocol):
    """Where handed-over descriptors are kept (QMP ``getfd`` and ``add-fd``)."""

    def take(self, name: str) -> int:
        """The descriptor of this name, which the caller owns from here on.

        Raises:
            NotFoundError: there is none.
        """

    def open_fdset(self, fdset_id: int, flags: int) -> int:
        """A duplicate of the set's descriptor whose access mode is that of ``flags``.

        Raises:
            NotFoundError: no such set, or none of its descriptors fits.
        """


class NoDescriptors:
    """For callers that cannot be handed any."""

    def take(self, name: str) -> int:
        raise NotFoundError(f"File descriptor named '{name}' has not been found")

    def open_fdset(self, fdset_id: int, flags: int) -> int:
        raise NotFoundError(f"fdset {fdset_id} has not been found")


class InheritedDescriptors(NoDescriptors):
    """For a command line: ``fd:N`` is this process's own descriptor of that number, as it is to
    QEMU (``monitor/fds.c``: monitor_fd_param)."""

    def take(self, name: str) -> int:
        """The descriptor, which the caller owns from here on.

        Raises:
            NotFoundError: there is none.
        """
        number = int(name) if name.isascii() and name.isdigit() else -1
        try:
            os.fstat(number)
        except (OSError, OverflowError) as error:
            raise NotFoundError(f"there is no descriptor {name!r}") from error
        os.set_inheritable(number, False)
        return number
