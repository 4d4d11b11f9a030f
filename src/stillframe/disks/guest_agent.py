"""The QEMU guest agent: freezes the guest's file systems, sets its clock, writes its files.

Sources: QEMU ``docs/interop/qemu-ga.rst``, ``qga/qapi-schema.json`` (guest-fsfreeze-*,
guest-set-time, guest-file-*).
"""

from __future__ import annotations

import base64
import contextlib

from stillframe.disks.agent_channel import START_REMEDY, THAW, AgentPlace, open_agent
from stillframe.errors import MachineError
from stillframe.qmp.client import QmpClient
from stillframe.qmp.replies import as_map

_ANSWER_S = 5.0
_WORDS = 200
"""How much of a guest's text we show, in characters."""


class GuestAgent:
    """A connection to the agent; thaw, then close it on every path.

    Args:
        place: the agent's place (``find_agent``). qmp: the VM's monitor.
        answer_s: how long it may take to answer at first; each command gets at least five seconds.
        frozen: the agent froze the file systems earlier, as in a restored guest.

    Raises:
        RefusedError: the agent does not answer in time. BusyError: another client holds it.
    """

    def __init__(
        self,
        place: AgentPlace,
        qmp: QmpClient,
        *,
        answer_s: float | None = None,
        frozen: bool = False,
    ) -> None:
        self.frozen = frozen
        self._link = open_agent(place, qmp, _ANSWER_S if answer_s is None else answer_s)
        self._answer_s = max(answer_s or 0, _ANSWER_S)

    def freeze(self) -> int:
        """Freeze the guest's file systems; return how many.

        Raises:
            MachineError: the agent refused, or did not answer in time; ``close`` thaws.
        """
        self.frozen = True
        count = self._ask("guest-fsfreeze-freeze")
        return count if isinstance(count, int) else 0

    def thaw(self) -> None:
        """Thaw the file systems. Does nothing if they are not frozen.

        Raises:
            MachineError: the agent refused, or did not answer in time.
        """
        if self.frozen:
            self._ask(THAW)
            self.frozen = False

    def set_time(self, time_ns: int) -> None:
        """Set the guest's clock and its RTC.

        Args:
            time_ns: since the epoch.

        Raises:
            MachineError: the agent refused, or did not answer in time.
        """
        self._ask("guest-set-time", {"time": time_ns})

    def write_file(self, path: str, content: bytes) -> None:
        """Write a file in the guest.

        Raises:
            MachineError: the agent refused, or did not answer in time.
        """
        handle = self._ask("guest-file-open", {"path": path, "mode": "w"})
        try:
            text = base64.b64encode(content).decode()
            reply = self._ask("guest-file-write", {"handle": handle, "buf-b64": text})
            if as_map(reply).get("count") != len(content):
                raise MachineError(
                    f"the guest agent did not write all of {path}", guest_state="running"
                )
        finally:
            self._ask("guest-file-close", {"handle": handle})

    def _ask(self, command: str, arguments: dict[str, object] | None = None) -> object:
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        try:
            reply = self._link.ask(request, self._answer_s)
            if "error" not in reply and "return" not in reply:
                raise ValueError("what it said is no answer")
        except (OSError, EOFError, ValueError) as error:
            raise MachineError(
                f"the guest agent did not answer '{command}'",
                why=str(error),
                remedy=START_REMEDY,
                guest_state="running",
            ) from error
        if "error" in reply:
            raise MachineError(
                f"the guest agent refused '{command}'",
                why=_words(as_map(reply["error"]).get("desc")),
                remedy="look at the guest's file systems, or take it without --quiesce"
                if command.startswith("guest-fsfreeze")
                else None,
                guest_state="running",
            )
        return reply.get("return")

    def close(self) -> None:
        """Thaw if need be, and disconnect; never raises."""
        with contextlib.suppress(MachineError):
            self.thaw()
        self._link.close()


def _words(said: object) -> str:
    """Return the guest's text, shortened; escape lone surrogates, which JSON can name but nothing
    can encode."""
    return str(said)[:_WORDS].encode(errors="backslashreplace").decode()
