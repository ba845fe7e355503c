"""Listening: a port taken before the model is loaded, and a server that ends its answers before it ends.

There is no authentication: it listens on 127.0.0.1 unless told.
"""

import asyncio
import errno
import ipaddress
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.serving import needs_extra

with needs_extra():
    import uvicorn
    from fastapi import FastAPI

GRACE = 5  # seconds that answers in progress have when the server is told to stop


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to ``host`` and ``port`` (0 = a free one), not listening yet; taken before the model is loaded.

    Raises:
        InputError: the address is not one of this machine.
        EnvironmentFault: the port is in use or needs privileges.
    """
    try:
        family, kind, protocol_, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise _no_such_address(host) from None
    bound = socket.socket(family, kind, protocol_)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise port_in_use(host, port) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise EnvironmentFault(f"Port {port} needs privileges.", "Choose one above 1023 with --port.") from None
        raise _no_such_address(host) from None
    return bound


def _no_such_address(host: str) -> InputError:
    return InputError(f"{host} is not an address of this machine.", "Give --host one of its own, such as 127.0.0.1.")


def port_in_use(host: str, port: int) -> EnvironmentFault:
    return EnvironmentFault(
        f"Port {port} on {host} is in use.",
        "Stop what listens there, or choose another port with --port (0 takes a free one).",
    )


def reachable_by_others(host: str) -> bool:
    """Whether other machines can reach ``host``, as an address to listen on."""
    try:
        return not ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:  # a name
        return host != "localhost"


def url_of(bound: socket.socket) -> str:
    """``http://address:port`` under which this machine reaches the socket."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpServer(uvicorn.Server):
    """uvicorn that says when it is ready and ends the engine's work before it closes connections."""

    def __init__(self, app: FastAPI, on_ready: Callable[[], None]):
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="on", ws="none", timeout_graceful_shutdown=GRACE
            )
        )
        self._engine = app.state.engine
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at a first signal; at a second Ctrl-C cut off the answers that are in progress."""
        super().handle_exit(sig, frame)
        if self.force_exit:
            self._engine.end_grace()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self._engine.stop, GRACE)
        await super().shutdown(sockets)
        if self.force_exit:  # then uvicorn leaves the application's end out, and asyncio cancels it with a traceback
            await self.lifespan.shutdown()


def run_until_stopped(app: FastAPI, bound: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then let answers in progress end; returns normally."""
    server = HttpServer(app, on_ready)

    def leave(*_: Any) -> None:
        server.should_exit = True

    # uvicorn takes the signals while it runs and raises them again afterwards: to handlers that end in exit code 0.
    previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    host, port = bound.getsockname()[:2]
    try:
        server.run(sockets=[bound])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:  # two servers bound it at the same moment and the other one listens
            raise port_in_use(host, port) from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
