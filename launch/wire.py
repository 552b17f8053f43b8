"""One connection between the supervisor and a node's agent: JSON objects, one a line."""

import json
import socket
from contextlib import suppress
from typing import Any

Message = dict[str, Any]

_LONGEST = 1 << 24
"""Bytes of a message: far more than a node's stacks, and no more memory than a stranger may take."""


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
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            # Half a line may be on its way, to which the next message must not be the other half.
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def receive(self) -> list[Message] | None:
        """The messages that have come since, None once the peer is gone or says what is no message. Call it when the
        socket is readable."""
        try:
            data = self._socket.recv(1 << 20)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):  # the latter: a thousand brackets in each other
            return None
        whole = len(self._buffer) <= _LONGEST and all(isinstance(message, dict) for message in messages)
        return messages if whole else None

    def close(self) -> None:
        self._socket.close()
