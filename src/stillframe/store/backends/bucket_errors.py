"""Translation of an object store's errors into ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from stillframe.errors import HostError, NotFoundError, SinkError

_LINE_MAX = 300
_CREDENTIALS = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    **dict.fromkeys(
        ("az", "azure", "abfs", "abfss"), "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY"
    ),
}


@contextlib.contextmanager
def translated(verb: str, name: str, *, writing: bool = False) -> Iterator[None]:
    """Translate obstore's errors into ours.

    Args:
        verb: what was attempted, such as ``"read"``.
        name: the object's name in messages.
        writing: whether this is a write, so that failures become SinkError.

    Raises:
        NotFoundError: there is no such object, or no such bucket (reads only).
        SinkError, HostError: not permitted or not reachable; SinkError if ``writing``.
    """
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except FileNotFoundError as error:
        if writing:
            raise SinkError(f"cannot {verb} {name}", why=reason(error)) from error
        raise NotFoundError(f"there is no object {name}") from error
    except BaseError as error:
        remedy = None
        if isinstance(error, PermissionDeniedError | UnauthenticatedError):
            variables = _CREDENTIALS.get(name.partition("://")[0], "AWS_ACCESS_KEY_ID, AWS_PROFILE")
            remedy = f"check the credentials ({variables}, ...; see the guide)"
        kind = SinkError if writing else HostError
        raise kind(f"cannot {verb} {name}", why=reason(error), remedy=remedy) from error


def reason(error: BaseException) -> str:
    """Return the first line of an error, without the debug text below it."""
    line = str(error).strip().split("\n")[0].removeprefix("Generic S3 error: ")
    return line if len(line) <= _LINE_MAX else f"{line[:_LINE_MAX]}..."
