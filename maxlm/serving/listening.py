"""The process that listens: one that ends its work before it ends."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from maxlm.config import UserError
from maxlm.serving.app import Service, make_app

_KEEP_ALIVE_S = 30


class DrainingServer(uvicorn.Server):
    """At the first signal nothing new is taken, and what is being answered is answered; at the second it ends."""

    def __init__(self, service: Service, *, drain_s: float, ready: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            service: what is served.
            drain_s: seconds that answers have after a signal.
            ready: called when clients are answered.
        """
        super().__init__(
            uvicorn.Config(
                make_app(service),
                log_level="warning",
                access_log=False,  # addresses may hold what was asked
                lifespan="off",
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,
            )
        )
        self._service, self._drain_s, self._ready = service, drain_s, ready
        self._deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        for listener in sockets or ():  # connections have it from the listener, and are old ones some day
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await super().startup(sockets)
        self._ready()

    def drain(self) -> None:
        """Take nothing new, and end when all is answered. From any thread, or a handler of signals."""
        self._service.draining = True
        if self._deadline is None:
            self._deadline = time.monotonic() + self._drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        if self._service.draining:
            self.should_exit = True
        self.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._deadline is not None and (not self._service.busy or time.monotonic() > self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)


def bind_address(host: str, port: int) -> socket.socket:
    """A socket that refuses clients until a server listens at it.

    Raises:
        UserError: there is no such address here, it is taken, or one must not have it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        # The old connections of a server that has ended do not matter; one that starts now could bind there too.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); use an address of this machine and "
            "a free port, or --port 0 for any"
        ) from error
    return found


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can call it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
