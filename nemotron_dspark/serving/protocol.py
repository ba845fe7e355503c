"""OpenAI's request and response bodies: what is understood, what is refused, what is ignored.

A field that would change the answer and is not implemented is refused, so that nobody mistakes the answer for what was
asked; a field that cannot change it (user, metadata, penalties of 0) is ignored.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nemotron_dspark.chat.format import Message
from nemotron_dspark.serving import needs_extra
from nemotron_dspark.serving.engine import Finished, Usage

with needs_extra():
    from starlette.exceptions import HTTPException

MAX_STOPS = 4  # as OpenAI's

# Fields that would change the answer, each with the values beside null that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "skip_special_tokens": (True,),
    "modalities": (["text"],),
    "audio": (),
}


class ApiError(HTTPException):
    """An answer other than 200: one sentence on what is wrong, one on what to do."""

    def __init__(
        self, status: int, what: str, do: str, *, param: str | None = None, code: str | None = None, retry: bool = False
    ):
        super().__init__(status, f"{what} {do}", headers={"Retry-After": "1"} if retry else None)
        self.param = param
        self.code = code


def error_json(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error body."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    include_usage: bool = False


class CommonRequest(BaseModel):
    """Fields of both endpoints. Null means the default, as in OpenAI's."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    stop: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def refuse_unsupported(self) -> None:
        """`ApiError` for a field that would change the answer and is not implemented."""
        if self.return_token_ids and self.stream:
            what = "return_token_ids is not supported in a stream."
            raise ApiError(400, what, "Leave one of the two out.", param="return_token_ids", code="unsupported")
        for name, harmless in _UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and not any(_same(value, other) for other in harmless):
                raise ApiError(
                    400,
                    f"{name} is not supported by this server{' with this value' if harmless else ''}.",
                    "Leave it out.",
                    param=name,
                    code="unsupported",
                )

    def stops(self) -> tuple[str, ...]:
        """The stop strings; `ApiError` when there are too many or they are none."""
        stops = [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
            raise ApiError(
                400,
                "stop is not a text or a list of texts that can be used.",
                f"Give one non-empty string, or a list of at most {MAX_STOPS}.",
                param="stop",
            )
        return tuple(stops)


def _checked_text(text: str, where: str, param: str) -> str:
    """``text``; `ApiError` when it cannot be tokenised because it is no Unicode text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        what = f"{where} holds half of a surrogate pair, which is no character."
        raise ApiError(400, what, "Send the whole character.", param=param) from None
    return text


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and value == other


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None
    tool_calls: Any = None


class TemplateSwitches(BaseModel):
    """``chat_template_kwargs``, as vLLM takes them."""

    model_config = ConfigDict(extra="forbid")

    enable_thinking: bool | None = None


class ChatRequest(CommonRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: TemplateSwitches | None = None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def thinking(self) -> bool | None:
        return self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None

    def conversation(self) -> list[Message]:
        """The messages as text; `ApiError` for contents that are not."""
        return [
            Message("system" if message.role == "developer" else message.role, _text(message, f"messages.{index}"))
            for index, message in enumerate(self.messages)
        ]


def _text(message: ChatMessage, where: str) -> str:
    if message.tool_calls:
        raise ApiError(400, f"{where} has tool calls.", "Send their text as content instead.", param="messages")
    content = message.content
    if isinstance(content, str):
        return _checked_text(content, where, "messages")
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    texts = [text for text in texts if isinstance(text, str)]
    if len(texts) < len(parts):
        raise ApiError(
            400,
            f"{where}.content is neither a text nor a list of text parts.",
            'Send a string, or parts {"type": "text", "text": …}.',
            param=f"{where}.content",
        )
    return _checked_text("".join(texts), where, "messages")


class CompletionRequest(CommonRequest):
    prompt: Any

    def text_or_ids(self, vocab_size: int) -> str | list[int]:
        """The one prompt; `ApiError` when it is several, empty, or holds ids that the target does not have."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise ApiError(
                    400, f"prompt holds {len(prompt)} prompts.", "Send one request for each.", param="prompt"
                )
            prompt = prompt[0]
        if isinstance(prompt, str) and prompt:
            return _checked_text(prompt, "prompt", "prompt")
        ids = prompt if isinstance(prompt, list) else []
        if not ids or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
            raise ApiError(
                400,
                "prompt is empty, or is neither a text nor a list of this model's token ids.",
                f"Send a non-empty string or ids from 0 to {vocab_size - 1}.",
                param="prompt",
            )
        return ids


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage, and beside it how the answer was decoded when a draft took part."""
    value: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.proposed:
        value["speculative"] = {"rounds": usage.rounds, "accepted_length": round(usage.accepted / usage.rounds, 4)}
    return value


class Answer:
    """Bodies of one answer: whole, or as chunks. The two endpoints differ only in names and where the text goes."""

    def __init__(self, chat: bool, model_id: str):
        self._chat = chat
        self._fixed = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_id,
        }

    def whole(self, end: Finished, prompt_ids: Sequence[int] | None = None) -> dict[str, Any]:
        """The body of an answer that is not streamed; with token ids, placed as vLLM's, if the prompt's are given."""
        text = {"message": {"role": "assistant", "content": end.text}} if self._chat else {"text": end.text}
        body: dict[str, Any] = {**self._body("chat.completion", text, end.reason), "usage": usage_json(end.usage)}
        if prompt_ids is not None:
            choice = body["choices"][0]
            choice["token_ids"] = list(end.token_ids)
            (body if self._chat else choice)["prompt_token_ids"] = list(prompt_ids)
        return body

    def opening(self) -> dict[str, Any] | None:
        """The chunk that names the role; only chats have one."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}) if self._chat else None

    def text_chunk(self, text: str, reason: str | None = None) -> dict[str, Any]:
        """A chunk of text; the last one has a ``reason``."""
        if self._chat:
            return self._chunk({"delta": {"content": text} if text else {}}, reason)
        return self._chunk({"text": text}, reason)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk after the last one, for who asked for it."""
        return {**self._chunk({}), "choices": [], "usage": usage_json(usage)}

    def _chunk(self, text: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return self._body("chat.completion.chunk", text, reason)

    def _body(self, chat_object: str, text: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **text, "logprobs": None, "finish_reason": reason}
        return {**self._fixed, "object": chat_object if self._chat else "text_completion", "choices": [choice]}
