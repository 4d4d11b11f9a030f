"""The point of no return of precopy: the stream's end, with which the destination starts the guest.

The guest never runs in two places. A source that cannot know whether it runs there stands still.
"""

from __future__ import annotations

from stillframe.errors import SinkError, StillframeError
from stillframe.migration.live import LiveTransfer
from stillframe.migration.standing import GuestStandsStill


def hand_over(live: LiveTransfer, still: GuestStandsStill, end: bytes) -> None:
    """Send the end, and wait for the destination's word.

    Raises:
        StillframeError: the guest does not run at the destination, and goes on here: the end could
            not be sent at all, a file could not be written, or the destination has said that it
            could not load.
        SinkError: nobody knows whether it runs there; it stays as it is here.
    """
    if live.link is not None:
        live.link.check()
    # One byte goes out or does not; without it nobody starts the guest.
    live.out.write(end[:1])
    live.out.flush()
    try:
        live.out.write(end[1:])
        live.out.flush()
        live.wait_done()
        live.channel.commit()
    except BaseException as error:
        if live.channel.stores or (live.link is not None and live.link.refused):
            raise
        still.handed_over()
        if not isinstance(error, StillframeError):
            raise
        raise SinkError(
            "the guest may run at the destination, so it stays stopped here",
            why=str(error),
            remedy="find out whether it runs there; only if it does not, let it go on here (cont)",
            guest_state="paused",
        ) from error
