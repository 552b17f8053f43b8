"""One connection between the supervisor and a node's agent: JSON objects, one a line."""

import json
import socket
from contextlib import suppress
from typing import Any

Message = dict[str, Any]


class Wire:
    """A socket that speaks messages. Sending to a peer that is gone is no error: its end is seen when reading."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._buffer = b""
        # A host that vanished must not keep a sender waiting.
        self._socket.settimeout(10.0)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def address(self) -> str:
        """The peer's, as it is seen from here."""
        return str(self._socket.getpeername()[0])

    def send(self, **message: Any) -> None:
        with suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """The messages that have come since, None once the peer is gone. Call it when the socket is readable."""
        try:
            data = self._socket.recv(1 << 20)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self._socket.close()
