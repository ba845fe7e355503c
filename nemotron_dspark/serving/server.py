"""The OpenAI-compatible HTTP server over an `Engine`.

Requests are read on the event loop, checked and tokenised by `Service`, and answered from the engine's thread. A client
that goes away frees its place in the batch.
"""

import asyncio
import contextlib
import json
import reprlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nemotron_dspark.config.run import ServeConfig
from nemotron_dspark.serving import needs_extra
from nemotron_dspark.serving.answer import Answer
from nemotron_dspark.serving.engine import (
    Busy,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Stopped,
    Ticket,
    Usage,
)
from nemotron_dspark.serving.guard import PAGE, Access, Guard
from nemotron_dspark.serving.metrics import Metrics
from nemotron_dspark.serving.parts import Splitter
from nemotron_dspark.serving.protocol import ApiError, ChatRequest, CompletionRequest, error_json
from nemotron_dspark.serving.service import Served, Service

with needs_extra():
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException

_T = TypeVar("_T")
_BRIEFLY = reprlib.Repr()  # a body may be nested as deep as Python can go
_BRIEFLY.maxlevel, _BRIEFLY.maxstring, _BRIEFLY.maxother = 2, 80, 80
# The page may run and ask only what comes from this server, and nobody may put a frame around it.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class _Exchange:
    """One request's way into the engine, once for each choice, and the events' way back to the event loop."""

    def __init__(self, service: Service, endpoint: str, requests: Sequence[GenerationRequest]):
        self._service = service
        self._endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self._channel: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._outcome = "cancelled"
        self._tickets: list[Ticket] = []
        self.missing = len(requests)  # choices that are not complete
        try:
            for index, request in enumerate(requests):
                self._tickets.append(service.engine.submit(request, partial(self._deliver, index)))
        except Busy:
            self._cancel()
            raise ApiError(
                503, "The batch and the queue are full.", "Try again soon.", code="queue_full", retry=True
            ) from None
        except Stopped:
            self._cancel()
            raise ApiError(503, "The server is stopping or broken.", "Ask /health, or look at its log.") from None

    def _deliver(self, index: int, event: Event) -> None:  # on the engine's thread
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._channel.put_nowait, (index, event))

    async def next(self) -> tuple[int, Event]:
        """Wait for the engine's next event, and which choice it is of."""
        index, event = await self._channel.get()
        if isinstance(event, Finished):
            self.missing -= 1
            self._outcome = self._outcome if self.missing else "ok"
        elif isinstance(event, Failed):
            self._outcome = "rejected" if event.status < 500 else "failed"
        return index, event

    async def ends(self) -> list[Finished] | Failed:
        """Wait for the ends of all choices, or the first failure."""
        found: dict[int, Finished] = {}
        while self.missing:
            index, event = await self.next()
            if isinstance(event, Failed):
                return event
            if isinstance(event, Finished):
                found[index] = event
        return [found[index] for index in sorted(found)]

    def close(self) -> None:
        """Cancel what is not complete, and count the request."""
        self._cancel()
        self._service.metrics.requests.labels(self._endpoint, self._outcome).inc()

    def _cancel(self) -> None:
        for ticket in self._tickets:
            self._service.engine.cancel(ticket)


async def _unless_gone(request: Request, coming: Coroutine[Any, Any, _T]) -> _T | None:
    """What ``coming`` gives, or None when the client goes away first."""
    answer = asyncio.ensure_future(coming)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(exchange: _Exchange, answer: Answer, include_usage: bool) -> AsyncIterator[bytes]:
    """The answer as server-sent events."""
    for chunk in answer.opening():
        yield _sse(chunk)
    usages: list[Usage] = []
    while exchange.missing:
        index, event = await exchange.next()
        if isinstance(event, Failed):
            yield _sse(error_json(event.status, event.message))
            break
        for chunk in answer.chunks(index, event):
            yield _sse(chunk)
        if isinstance(event, Finished):
            usages.append(event.usage)
    else:
        if include_usage:
            yield _sse(answer.usage(usages))
    yield b"data: [DONE]\n\n"


def _sse(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class _EventStream(StreamingResponse):
    """A stream of server-sent events that says when it is over, whether it was read to its end or not."""

    def __init__(self, content: AsyncIterator[bytes], on_end: Callable[[], None]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._on_end = on_end

    async def __call__(self, *args: Any) -> None:
        try:  # a reader who does not read is cancelled when the server stops, which is no fault to be logged
            with contextlib.suppress(asyncio.CancelledError):
                await super().__call__(*args)
        finally:
            self._on_end()


async def respond(service: Service, body: ChatRequest | CompletionRequest, request: Request) -> Response:
    """Answer one request, streaming or not."""
    prompt, jobs = await service.checked(body)
    exchange = _Exchange(service, request.url.path, jobs)
    splitter = None
    if isinstance(body, ChatRequest):
        reasoning = None if body.separate_reasoning is False else prompt.reasoning
        splitter = partial(Splitter, reasoning, prompt.calls.tags if prompt.calls else None, prompt.tools)
    answer = Answer(
        service.served.model_id,
        len(jobs),
        splitter,
        logprobs=jobs[0].sampling.logprobs is not None,
        rounds=jobs[0].rounds,
    )
    if body.stream:
        return _EventStream(_chunks(exchange, answer, body.include_usage), exchange.close)
    try:
        ends = await _unless_gone(request, exchange.ends())
    finally:
        exchange.close()
    if isinstance(ends, Failed):
        return JSONResponse(error_json(ends.status, ends.message), ends.status)
    if ends is None:
        return Response(status_code=499)  # nobody is there to read it
    return JSONResponse(answer.whole(ends, prompt.ids if body.return_token_ids else None))


def make_app(served: Served, config: ServeConfig, access: Access) -> FastAPI:
    """The server as an ASGI application; its engine runs from start-up to shut-down and is ``app.state.engine``."""
    service = Service(served, config)

    # Ending waits for answers in progress, which takes its time: on a thread, so that the loop sends them meanwhile.
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)
            service.tokenising.shutdown(wait=False)

    app = FastAPI(title="nemotron-dspark", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine = service.engine
    app.add_middleware(Guard, access=access)
    _add_errors(app, service)

    @app.post(_CHAT)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await respond(service, body, request)

    @app.post(_COMPLETIONS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await respond(service, body, request)

    card = {
        **{"id": served.model_id, "object": "model", "created": service.created, "owned_by": "nemotron-dspark"},
        **{"max_model_len": served.max_positions, "block_size": served.block_size, "thinking": service.thinks},
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return card

    @app.get("/health")
    async def health() -> Response:
        engine = service.engine
        status = "unavailable" if not engine.healthy else "stuck" if engine.stuck else "ok"
        said = {"status": status, "active": engine.active, "waiting": engine.waiting}
        return JSONResponse(said, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=Metrics.content_type)

    for path, name in PAGE.items():
        app.get(path, include_in_schema=False)(_sends(Path(__file__).parent / "page" / name))
    return app


def _sends(file: Path) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def send() -> Response:
        return FileResponse(file, headers=_PAGE_HEADERS)

    return send


def _add_errors(app: FastAPI, service: Service) -> None:
    """Every error is OpenAI's JSON, and counted when it is an endpoint's that generates."""

    def answer(request: Request, error: ApiError) -> JSONResponse:
        if request.url.path in (_CHAT, _COMPLETIONS):
            outcome = "rejected" if error.status_code < 500 else "failed"
            service.metrics.requests.labels(request.url.path, outcome).inc()
        body = error_json(error.status_code, error.detail, error.param, error.code)
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):
            what = f"{request.method} {request.url.path}: {str(error.detail).lower()}."
            do = "Send one JSON object." if error.status_code == 400 else "See docs/serving.md for the endpoints."
            error = ApiError(error.status_code, what, do)
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, _explained(request, error.errors()[0]))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return answer(
            request, ApiError(500, f"The server failed: {type(error).__name__}.", "Look at its log and report it.")
        )


def _explained(request: Request, first: dict[str, Any]) -> ApiError:
    """A failed validation in two sentences."""
    field = ".".join(str(part) for part in first["loc"][1:])
    send = "Send one JSON object with the header Content-Type: application/json."
    if first["type"] == "json_invalid":
        reason = f"{first.get('ctx', {}).get('error', 'it cannot be parsed')} at character {field}"
        return ApiError(400, f"The body is not valid JSON: {reason}.", send, code="invalid_json")
    if not field:
        kind = request.headers.get("content-type", "none")
        what = "The body is empty." if first["type"] == "missing" else f"The body is no JSON object (sent as {kind})."
        return ApiError(400, what, send, code="invalid_json")
    if first["type"] == "missing":
        return ApiError(400, f"The field {field} is missing.", "Add it.", param=field)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field} is not supported by this server.", "Leave it out.", param=field)
    message = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(
        400, f"{field} = {_BRIEFLY.repr(first.get('input'))} is not accepted: {message}.", "Correct it.", param=field
    )
