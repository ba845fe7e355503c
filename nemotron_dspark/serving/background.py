"""A server inside this process: the demo and the tests talk to it as any client would."""

import threading
from types import TracebackType
from typing import Any

from nemotron_dspark.config.run import ServeConfig
from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.serving.engine import Engine
from nemotron_dspark.serving.listen import HttpServer, bind, url_of
from nemotron_dspark.serving.server import Served, make_app


class ServerThread:
    """``with ServerThread(target, draft) as server: OpenAI(base_url=server.base_url, api_key="-")``.

    Attributes:
        base_url: ``http://127.0.0.1:PORT/v1``.
        model_id: the name to ask for.
        engine: for its counters.
    """

    def __init__(self, target: Any, draft: Any = None, config: ServeConfig | None = None):
        """
        Args:
            target: a `Target`, or a `Served` that is ready.
            draft: a `DSparkDraft`; None decodes plainly.
            config: the `serve` section; None takes its defaults on a free port.
        """
        self._config = config or ServeConfig(port=0)
        self._served = target if isinstance(target, Served) else Served.of(target, draft, self._config)
        self.model_id = self._served.model_id
        self.base_url = ""
        self.engine: Engine

    def __enter__(self) -> "ServerThread":
        self._socket = bind(self._config.host, self._config.port)
        self.base_url = f"{url_of(self._socket)}/v1"
        app = make_app(self._served, self._config)
        self.engine = app.state.engine
        ready = threading.Event()
        self._server = HttpServer(app, ready.set)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="nds-server", daemon=True)
        self._thread.start()
        while not ready.wait(0.05):
            if not self._thread.is_alive():
                raise EnvironmentFault(f"The server at {self.base_url} did not start.", "Look at the log above.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()
