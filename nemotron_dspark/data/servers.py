"""Several OpenAI-compatible servers of one target, used as long as they answer.

Each server has its own workers that take the next request from a common queue, so a fast server takes more of them.
What a server fails at goes back into the queue for whoever is free. It rests meanwhile, longer each time, and is used
again as soon as it answers; only when no server is left does the work stop.
"""

import asyncio
import importlib
import logging
import socket
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from nemotron_dspark.errors import EnvironmentFault, InputError

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletion

_RETRIES = 5  # failures one after the other, with growing pauses, until a server counts as lost
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds; doubled with each failure
_TIMEOUT = 1800.0  # seconds; a long answer on a small machine is slow
_CONNECT_TIMEOUT, _PROBE_TIMEOUT = 15.0, 30.0
_log = logging.getLogger(__name__)


class Unavailable(Exception):
    """The server could not answer now; another one, or the same one later, may."""

    def __init__(self, error: "openai.APIError"):
        import openai

        super().__init__(one_line(error))
        late = isinstance(error, openai.APITimeoutError) and type(error.__cause__).__name__ != "ConnectTimeout"
        self.by_request = late or getattr(error, "status_code", None) == 500  # so it may be this very request


class Endpoint:
    """One of the servers; `connect` finds out whether it answers."""

    def __init__(self, url: str, group: "list[Endpoint]", *, model: str | None, api_key: str):
        import openai

        self.url, self.answered, self.ready = url, 0, asyncio.Event()
        self._group, self._given_model, self.model = group, model, model
        self._failures = 0  # one after the other, a burst counted once
        self._told = False  # that it does not answer
        # Reasoning belongs to what the target wrote, between its tags.
        self._optional: dict[str, Any] = {"skip_special_tokens": False, "separate_reasoning": False}
        self._optional["return_token_ids"] = True
        self._client = openai.AsyncOpenAI(
            base_url=url,
            api_key=api_key,
            max_retries=0,
            timeout=openai.Timeout(_TIMEOUT, connect=_CONNECT_TIMEOUT),
            http_client=openai.DefaultAsyncHttpxClient(transport=_keepalive_transport()),
        )

    async def ask(self, body: dict[str, Any], **request: Any) -> "ChatCompletion":
        """The answer to a chat request; ``body`` holds fields that are not OpenAI's.

        Raises:
            Unavailable: call `rest`, then ask again, here or elsewhere.
            openai.BadRequestError, openai.UnprocessableEntityError: the server refuses this request.
            InputError: it refuses any.
        """
        import openai

        optional = self._optional  # reasoning tags are special tokens in some tokenizers, and must stay in answers
        try:
            answer = await self._client.chat.completions.create(
                model=self.model or "", **request, extra_body=optional | body
            )
        except openai.BadRequestError as error:
            refused = next((key for key in optional if key in error.message), None)
            if refused is None:
                raise
            self._optional = {key: value for key, value in self._optional.items() if key != refused}
            return await self.ask(body, **request)  # a server that does not take the field
        except openai.UnprocessableEntityError:
            raise
        except openai.APIError as error:
            self._refuse(error)
            raise Unavailable(error) from error
        if not getattr(answer, "choices", None):
            raise self._no_openai()
        self._failures = 0
        return answer

    async def rest(self, error: Unavailable) -> None:
        """Pause, then wait until the server answers again; whoever fails first waits for all its workers.

        Raises:
            EnvironmentFault: no server is left.
        """
        if not self.ready.is_set():
            await self.ready.wait()
            return
        self.ready.clear()
        await self._pause(str(error))
        await self.connect()

    async def connect(self) -> None:
        """Ask for the models until there is an answer; errors as in `ask` and `rest`."""
        import openai

        while True:
            try:
                listed = await self._client.models.list(timeout=_PROBE_TIMEOUT)
            except openai.APIError as error:
                if self._given_model and isinstance(error, openai.APIStatusError) and error.status_code < 500:
                    break  # it is there, and lists no models
                self._refuse(error)
                if not self._told:
                    self._told = True
                    _log.warning("The server at %s does not answer (%s).", self.url, one_line(error))
                await self._pause(one_line(error))
            else:
                models = getattr(listed, "data", None)
                if not models:
                    raise self._no_openai()
                self.model = self._given_model or models[0].id
                break
        names = {server.model for server in self._group if server.model}
        if len(names) > 1:
            raise InputError(
                f"The servers serve different models: {', '.join(sorted(names))}.",
                "Give servers of one target, started with the same --served-model-name.",
            )
        if self._told:
            self._told = False
            _log.warning("The server at %s answers.", self.url)
        self.ready.set()

    async def close(self) -> None:
        await self._client.close()

    @property
    def _lost(self) -> bool:
        return self._failures > _RETRIES

    async def _pause(self, why: str) -> None:
        self._failures += 1
        if all(server._lost for server in self._group):
            urls = ", ".join(server.url for server in self._group)
            raise EnvironmentFault(
                f"The server{'s' * (len(self._group) > 1)} at {urls} fail{'s' * (len(self._group) == 1)}: {why}.",
                "See that it runs, then run the same command again; answers so far are kept.",
            )
        await asyncio.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(self._failures - 1, 30)))

    def _refuse(self, error: Exception) -> None:
        """`InputError` if the server would refuse everything."""
        import openai

        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError | openai.NotFoundError):
            raise InputError(
                f"The server at {self.url} refuses: {error.message}.", "Check --base-url, --model and --api-key."
            ) from None

    def _no_openai(self) -> InputError:
        return InputError(
            f"The server at {self.url} does not answer as an OpenAI-compatible one.",
            "Check --base-url; it ends in /v1.",
        )


async def serve_all(
    servers: Sequence[Endpoint],
    queue: "asyncio.Queue[Any]",
    work: Callable[[Endpoint], Awaitable[None]],
    concurrency: int,
) -> None:
    """Run ``work(server)``, which empties ``queue``, ``concurrency`` times for each server until all of it is done.

    Whatever one of them raises stops all.
    """
    finished = asyncio.ensure_future(queue.join())
    tasks: list[asyncio.Future[None]] = [finished]
    tasks += [asyncio.ensure_future(server.connect()) for server in servers]
    tasks += [asyncio.ensure_future(work(server)) for server in servers for _ in range(concurrency)]
    try:
        pending = set(tasks)
        while not finished.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(server.close() for server in servers), return_exceptions=True)


def one_line(error: Exception) -> str:
    cause = f" ({error.__cause__})" if error.__cause__ and str(error.__cause__) else ""
    return " ".join(f"{str(error).rstrip('.')}{cause}".split()).rstrip(".")


def _keepalive_transport() -> Any:
    """Let the kernel notice within two minutes that a machine is gone: a preempted one closes no connection.

    None, the client's own transport, where a proxy stands between.
    """
    import openai

    if urllib.request.getproxies() or not hasattr(socket, "TCP_KEEPIDLE"):
        return None
    client = openai.DefaultAsyncHttpxClient.__mro__[1]  # httpx's, or httpx2's with openai 3
    httpx = importlib.import_module(client.__module__.partition(".")[0])
    tcp = [(socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)]
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *((socket.IPPROTO_TCP, name, value) for name, value in tcp)]
    return httpx.AsyncHTTPTransport(limits=openai.DEFAULT_CONNECTION_LIMITS, socket_options=options)
