"""The OpenAI-compatible HTTP server over an `Engine`.

Requests are read and checked on the event loop, prompts are tokenised on one thread, answers come from the engine's
thread. A client that goes away frees its place in the batch.
"""

import asyncio
import contextlib
import copy
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_dspark.chat.format import RenderError, render_prompt
from nemotron_dspark.config.run import ServeConfig
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.serving import needs_extra
from nemotron_dspark.serving.engine import Busy, Engine, Event, Failed, Finished, GenerationRequest, Stopped, TextDelta
from nemotron_dspark.serving.metrics import Metrics
from nemotron_dspark.serving.protocol import Answer, ApiError, ChatRequest, CompletionRequest, error_json
from nemotron_dspark.targets import Target

with needs_extra():
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BODY = 16 * 1024**2  # bytes
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclasses.dataclass(frozen=True)
class Served:
    """A decoder and what the server must know of its target."""

    model_id: str
    aliases: frozenset[str]  # other names under which requests may ask for it
    decoder: Decoder
    tokenizer: "PreTrainedTokenizerBase"
    vocab_size: int
    max_positions: int

    @staticmethod
    def of(target: Target, draft: Draft | None = None, config: ServeConfig | None = None) -> "Served":
        """Serve ``target``, with ``draft`` when there is one; `InputError` when the two do not fit."""
        config = config or ServeConfig()
        name = target.spec.name
        return Served(
            model_id=Path(name).resolve().name if Path(name).is_dir() else name,
            aliases=frozenset({name}),
            decoder=Decoder(target, draft, confidence_threshold=config.confidence_threshold),
            tokenizer=target.tokenizer,
            vocab_size=target.spec.vocab_size,
            max_positions=target.spec.max_position_embeddings,
        )


class _Service:
    """What the endpoints share."""

    def __init__(self, served: Served, config: ServeConfig):
        self.served = served
        self.config = config
        self.metrics = Metrics()
        # A tokenizer is not to be used by two threads: the engine decodes with a copy, `tokenising` has the original.
        self.engine = Engine(
            served.decoder,
            copy.deepcopy(served.tokenizer),
            max_batch_size=config.max_batch_size,
            max_queue=config.max_queue,
            metrics=self.metrics,
        )
        self.tokenising = ThreadPoolExecutor(1, "nds-tokenise")
        self.created = int(time.time())

    def check_model(self, name: str | None) -> None:
        """`ApiError` when a request asks for another model than the one that is served."""
        if name is not None and name != self.served.model_id and name not in self.served.aliases:
            raise ApiError(
                404,
                f"The model {name!r} is not served here.",
                f"Ask for {self.served.model_id!r}.",
                param="model",
                code="model_not_found",
            )

    async def prompt_ids(self, request: ChatRequest | CompletionRequest) -> list[int]:
        """The prompt's tokens, made on the tokenising thread; `ApiError` when the chat template refuses it."""
        tokenizer = self.served.tokenizer
        if isinstance(request, ChatRequest):
            tokenise = partial(render_prompt, tokenizer, request.conversation(), request.thinking)
        else:
            prompt = request.text_or_ids(self.served.vocab_size)
            if not isinstance(prompt, str):
                return prompt
            tokenise = partial(tokenizer.encode, prompt)
        try:
            return await asyncio.get_running_loop().run_in_executor(self.tokenising, tokenise)
        except RenderError as error:
            raise ApiError(400, error.what, error.do, param="messages") from None

    def max_new_tokens(self, asked: int | None, prompt_length: int) -> int:
        """What is asked for, at most the server's limit and what the model still holds; both end in "length".

        `ApiError` when the prompt leaves no room at all.
        """
        positions = self.served.max_positions
        room = positions - prompt_length
        if room < 1:
            raise ApiError(
                400,
                f"The prompt has {prompt_length} tokens; this model holds {positions} with the answer.",
                "Shorten the prompt.",
                code="context_length_exceeded",
            )
        return min(asked or room, self.config.max_new_tokens, room)

    async def checked(self, request: ChatRequest | CompletionRequest) -> GenerationRequest:
        """What the engine is to generate; `ApiError` when it is not what this server can do."""
        self.check_model(request.model)
        request.refuse_unsupported()
        stops = request.stops()
        ids = await self.prompt_ids(request)
        sampling = Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            max_new_tokens=self.max_new_tokens(request.asked_tokens, len(ids)),
        )
        return GenerationRequest(tuple(ids), sampling, stops, stream=bool(request.stream))

    async def respond(self, body: ChatRequest | CompletionRequest, request: Request) -> Response:
        """Answer one request, streaming or not."""
        job = await self.checked(body)
        exchange = _Exchange(self, request.url.path, job)
        answer = Answer(isinstance(body, ChatRequest), self.served.model_id)
        if body.stream:
            return _EventStream(_chunks(exchange, answer, body.include_usage), exchange.close)
        try:
            event = await _unless_gone(request, exchange.next())
        finally:
            exchange.close()
        if isinstance(event, Finished):
            return JSONResponse(answer.whole(event, job.prompt_ids if body.return_token_ids else None))
        if isinstance(event, Failed):
            return JSONResponse(error_json(event.status, event.message), event.status)
        return Response(status_code=499)  # nobody is there to read it


class _Exchange:
    """One request's way into the engine and its events' way back to the event loop."""

    def __init__(self, service: _Service, endpoint: str, request: GenerationRequest):
        self._service = service
        self._endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self._channel: asyncio.Queue[Event] = asyncio.Queue()
        self._outcome = "cancelled"
        try:
            self._ticket = service.engine.submit(request, self._deliver)
        except Busy:
            raise ApiError(
                503, "The batch and the queue are full.", "Try again soon.", code="queue_full", retry=True
            ) from None
        except Stopped:
            raise ApiError(503, "The server is stopping or broken.", "Ask /health, or look at its log.") from None

    def _deliver(self, event: Event) -> None:  # on the engine's thread
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._channel.put_nowait, event)

    async def next(self) -> Event:
        """Wait for the engine's next event."""
        event = await self._channel.get()
        if isinstance(event, Finished):
            self._outcome = "ok"
        elif isinstance(event, Failed):
            self._outcome = "rejected" if event.status < 500 else "failed"
        return event

    def close(self) -> None:
        """Cancel the request if its answer is not complete, and count it."""
        self._service.engine.cancel(self._ticket)
        self._service.metrics.requests.labels(self._endpoint, self._outcome).inc()


async def _unless_gone(request: Request, coming: Coroutine[Any, Any, Event]) -> Event | None:
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
    opening = answer.opening()
    if opening is not None:
        yield _sse(opening)
    while isinstance(event := await exchange.next(), TextDelta):
        yield _sse(answer.text_chunk(event.text))
    if isinstance(event, Failed):
        yield _sse(error_json(event.status, event.message))
    else:
        if event.text:
            yield _sse(answer.text_chunk(event.text))
        yield _sse(answer.text_chunk("", event.reason))
        if include_usage:
            yield _sse(answer.usage(event.usage))
    yield b"data: [DONE]\n\n"


def _sse(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class _EventStream(StreamingResponse):
    """A stream of server-sent events that says when it is over, whether it was read to its end or not."""

    def __init__(self, content: AsyncIterator[bytes], on_end: Callable[[], None]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._on_end = on_end

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self._on_end()


class _BodyLimit:
    """Refuses bodies above `MAX_BODY` before they are held in memory."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        read = 0

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY:
                raise ApiError(413, f"The body is larger than {MAX_BODY // 1024**2} MiB.", "Send a shorter prompt.")
            return message

        await self._app(scope, counted, send)


def make_app(served: Served, config: ServeConfig) -> FastAPI:
    """The server as an ASGI application; its engine runs from start-up to shut-down and is ``app.state.engine``."""
    service = _Service(served, config)

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
    app.add_middleware(_BodyLimit)
    _add_errors(app, service)

    @app.post(_CHAT)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await service.respond(body, request)

    @app.post(_COMPLETIONS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.respond(body, request)

    card = {"id": served.model_id, "object": "model", "created": service.created, "owned_by": "nemotron-dspark"}

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
        status = "ok" if engine.healthy else "unavailable"
        return JSONResponse(
            {"status": status, "active": engine.active, "waiting": engine.waiting}, 200 if engine.healthy else 503
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=Metrics.content_type)

    return app


def _add_errors(app: FastAPI, service: _Service) -> None:
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
        400, f"{field} = {str(first.get('input'))[:80]!r} is not accepted: {message}.", "Correct it.", param=field
    )
