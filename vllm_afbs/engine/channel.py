"""Messages between two processes: one JSON object a line over a socket."""

import json
import socket
from contextlib import suppress
from typing import Any


class ClosedError(ConnectionError):
    """The other process is gone."""


class Channel:
    """One end of a connection.

    Args:
        end: A connected stream socket.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._stream = end.makefile("rw", encoding="utf-8", newline="\n")

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message.

        Raises:
            ClosedError: Nobody reads it.
        """
        try:
            self._stream.write(json.dumps(message) + "\n")
            self._stream.flush()
        except OSError as error:
            raise ClosedError(str(error)) from None

    def receive(self) -> dict[str, Any]:
        """Waits for a message.

        Raises:
            ClosedError: None will come.
        """
        try:
            line = self._stream.readline()
        except OSError as error:
            raise ClosedError(str(error)) from None
        if not line:
            raise ClosedError("the other end is closed")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Closes this end."""
        with suppress(OSError):  # what was not sent is lost
            self._stream.close()
        self._socket.close()
