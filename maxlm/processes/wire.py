"""JSON lines over a socket, and how long the two ends bear each other's silence."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

BEAT_S = 1.0
"""Between signs of life."""
SILENT_S, SILENT_OVER_HOSTS_S = 10.0, 60.0
"""What `limits.silent_s` is by default, on one machine and over several."""
OWN_PAUSE_S = 5.0
"""A thread that comes back after so long was asleep itself, and says nothing of others."""
_SEND_S = 5.0
_MOST_BYTES = 1 << 26
"""Of a message."""


class Wire:
    """JSON objects, one a line, over a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._sending = threading.Lock()
        self._rest = b""
        connection.settimeout(_SEND_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: dict[str, Any]) -> None:
        """A peer that is gone is found by who reads."""
        with self._sending, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come; None once the peer has closed, or says what is no message."""
        try:
            data = self.socket.recv(1 << 16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError):
            return None
        sound = data and len(self._rest) < _MOST_BYTES and all(isinstance(message, dict) for message in messages)
        return messages if sound else None

    def close(self) -> None:
        self.socket.close()
