"""OS errors of destinations, with remedies."""

from __future__ import annotations

import errno
import os

from stillframe.errors import SinkError

_REMEDIES = {
    errno.ENOSPC: "free some space there, or choose another destination",
    errno.EDQUOT: "free some of your quota there, or choose another destination",
    errno.EFBIG: "raise the file size limit (ulimit -f), or choose another file system",
    errno.EROFS: "choose a destination that is not mounted read-only",
    errno.EACCES: "choose a directory that you may write to",
    errno.EPERM: "choose a directory that you may write to",
    errno.ENOENT: "make the directory first",
    errno.ENOTDIR: "one of the path's parents is not a directory",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the disk; the kernel log has details",
    errno.EPIPE: "the pipe's reader exited; find out why",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def sink_error(doing: str, description: str, error: OSError) -> SinkError:
    """Return the SinkError for an OS error of a destination.

    Args:
        doing: what was attempted, such as ``write to``.
        description: the destination.
    """
    number = error.errno or 0
    return SinkError(
        f"cannot {doing} {description}",
        why=os.strerror(number) if number else str(error),
        remedy=_REMEDIES.get(number),
    )
