"""A server as an object: in the foreground by `nds serve`, or inside another program that talks to it over HTTP.

Its port is taken before the model is loaded, and it ends its answers before it ends.
It listens on 127.0.0.1 unless told, and for other machines only with an API key or when nobody is to need one.
"""

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from nemotron_dspark.config.run import ServeConfig
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.serving import needs_extra
from nemotron_dspark.serving.engine import Engine
from nemotron_dspark.serving.guard import Access
from nemotron_dspark.serving.server import make_app
from nemotron_dspark.serving.service import Served
from nemotron_dspark.targets import Target

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
            raise _port_in_use(host, port) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise EnvironmentFault(f"Port {port} needs privileges.", "Choose one above 1023 with --port.") from None
        raise _no_such_address(host) from None
    return bound


def _no_such_address(host: str) -> InputError:
    return InputError(f"{host} is not an address of this machine.", "Give --host one of its own, such as 127.0.0.1.")


def _port_in_use(host: str, port: int) -> EnvironmentFault:
    return EnvironmentFault(
        f"Port {port} on {host} is in use.",
        "Stop what listens there, or choose another port with --port (0 takes a free one).",
    )


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


class Server:
    """``with Server(target, draft) as server: OpenAI(base_url=server.base_url, api_key="-")``.

    Attributes:
        url: ``http://127.0.0.1:PORT``.
        base_url: ``{url}/v1``.
        model_id: the name to ask for.
        engine: for its counters.
    """

    def __init__(
        self,
        target: Target | Served,
        draft: Draft | None = None,
        config: ServeConfig | None = None,
        bound: socket.socket | None = None,
        api_key: str | None = None,
    ):
        """
        Args:
            target: loaded; or a `Served`, which has its decoder.
            draft: a draft that fits it; None decodes plainly.
            config: the `serve` section; None takes its defaults on a free port.
            bound: a socket of `bind`; None binds what ``config`` says.
            api_key: what a request must carry; None asks for none.

        Raises:
            InputError: other machines could reach it without a key, and ``config.no_auth`` does not say that they may.
        """
        config = config or ServeConfig(port=0)
        access = Access(api_key, config.no_auth)
        access.check_host(bound.getsockname()[0] if bound else config.host)
        served = target if isinstance(target, Served) else Served.of(target, draft, config)
        self._socket = bound or bind(config.host, config.port)
        self._app = make_app(served, config, access)
        self.engine: Engine = self._app.state.engine
        self.model_id = served.model_id
        self.url = url_of(self._socket)
        self.base_url = f"{self.url}/v1"

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Answer until SIGTERM or Ctrl-C, then let answers in progress end; returns normally. Main thread only."""
        http = HttpServer(self._app, on_ready)

        def leave(*_: Any) -> None:
            http.should_exit = True

        # uvicorn takes the signals while it runs and raises them again afterwards: to handlers that end in exit code 0.
        previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
        with self._socket:
            host, port = self._socket.getsockname()[:2]
            try:
                http.run(sockets=[self._socket])
            except OSError as error:
                if error.errno == errno.EADDRINUSE:  # two servers bound it at the same moment and the other one listens
                    raise _port_in_use(host, port) from None
                raise
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._http = HttpServer(self._app, ready.set)
        self._thread = threading.Thread(target=self._http.run, args=([self._socket],), name="nds-server", daemon=True)
        self._thread.start()
        while not ready.wait(0.05):
            if not self._thread.is_alive():
                raise EnvironmentFault(f"The server at {self.base_url} did not start.", "Look at the log above.")
        return self

    def __exit__(self, *_: object) -> None:
        self._http.should_exit = True
        self._thread.join()
