"""A server as an object: run in the foreground by `nds serve`, or inside another program that talks to it over HTTP."""

import socket
import threading
from collections.abc import Callable
from typing import Self

from nemotron_dspark.config.run import ServeConfig
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.serving.engine import Engine
from nemotron_dspark.serving.listen import HttpServer, bind, run_until_stopped, url_of
from nemotron_dspark.serving.server import Served, make_app
from nemotron_dspark.targets import Target


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
    ):
        """
        Args:
            target: loaded; or a `Served`, which has its decoder.
            draft: a draft that fits it; None decodes plainly.
            config: the `serve` section; None takes its defaults on a free port.
            bound: a socket of `listen.bind`; None binds what ``config`` says.
        """
        config = config or ServeConfig(port=0)
        served = target if isinstance(target, Served) else Served.of(target, draft, config)
        self._socket = bound or bind(config.host, config.port)
        self._app = make_app(served, config)
        self.engine: Engine = self._app.state.engine
        self.model_id = served.model_id
        self.url = url_of(self._socket)
        self.base_url = f"{self.url}/v1"

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Answer until SIGTERM or Ctrl-C, then let answers in progress end; returns normally. Main thread only."""
        with self._socket:
            run_until_stopped(self._app, self._socket, on_ready)

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
