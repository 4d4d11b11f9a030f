"""What the destination does about the COMMAND records of a live stream.

Source: QEMU ``migration/savevm.c``: loadvm_process_command.
"""

from __future__ import annotations

import io

from stillframe.errors import DataError
from stillframe.migration.incoming_channel import IncomingChannel
from stillframe.migration.incoming_postcopy import IncomingPostcopy
from stillframe.migration.return_path import ReturnPathWriter
from stillframe.migration.stream_commands import MOST_PACKAGED_BYTES, read_number
from stillframe.vmstate.load_state import StateLoader
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.wire import CommandCode


class IncomingCommands:
    """Handles the commands of one stream.

    Attributes:
        reply: the return path, once the source has opened it.
        loader: loads packaged streams; to be set before the first command.
    """

    def __init__(self, channel: IncomingChannel, postcopy: IncomingPostcopy) -> None:
        self._channel = channel
        self._postcopy = postcopy
        self.reply: ReturnPathWriter | None = None
        self.loader: StateLoader | None = None

    def handle(self, code: int, data: bytes, source: StreamSource) -> bool:
        """One command; True if nothing more is to be read by whoever read it.

        Raises:
            DataError: unknown, malformed, or not in its turn.
            SinkError: the source is gone.
        """
        match code:
            case CommandCode.OPEN_RETURN_PATH:
                # Else the stream was stored by somebody who could not answer either; its source
                # does not wait for us any more.
                if self._channel.can_reply:
                    self.reply = self.reply or ReturnPathWriter(self._channel.reply)
            case CommandCode.PING:
                number = read_number(data, "PING")
                if self._channel.can_reply:
                    self._reply_or_refuse(f"CMD_PING ({number:#x})").pong(number)
            case CommandCode.POSTCOPY_ADVISE:
                self._postcopy.advise(data)
            case CommandCode.POSTCOPY_RAM_DISCARD:
                self._postcopy.discard(data)
            case CommandCode.PACKAGED:
                return self._load_package(read_number(data, "PACKAGED"), source)
            case CommandCode.POSTCOPY_LISTEN:
                self._postcopy.listen(self._reply_or_refuse("CMD_POSTCOPY_LISTEN"))
            case CommandCode.POSTCOPY_RUN:
                self._postcopy.run()
                return True
            case CommandCode.SWITCHOVER_START:
                pass  # only says that the devices' states come next
            case _:
                raise DataError(f"command {code} is not for this machine")
        return False

    def _reply_or_refuse(self, what: str) -> ReturnPathWriter:
        if self.reply is None:
            raise DataError(f"{what} received with no return path")
        return self.reply

    def _load_package(self, length_bytes: int, source: StreamSource) -> bool:
        if length_bytes > MOST_PACKAGED_BYTES:
            raise DataError(f"Unreasonably large packaged state: {length_bytes}")
        if self.loader is None:
            raise DataError("a packaged stream within a packaged stream")
        content = source.take(length_bytes, "a packaged stream")
        loader, self.loader = self.loader, None
        return loader.load_sections(StreamSource(io.BytesIO(content)))
