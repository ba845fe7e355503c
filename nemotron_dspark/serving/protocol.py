"""OpenAI's request bodies and errors: what is understood, what is refused, what is ignored.

A field that would change the answer and is not implemented is refused, so that nobody mistakes the answer for what was
asked; a field that cannot change it (user, metadata, penalties of 0) is ignored.
"""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nemotron_dspark.chat.format import Message
from nemotron_dspark.data.conversations import RowError, parse_messages
from nemotron_dspark.serving import needs_extra

with needs_extra():
    from starlette.exceptions import HTTPException

MAX_STOPS = 4  # as OpenAI's, and so are the next three
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5
_MAX_LEVELS = 64  # of what is nested in a field: tools, a schema

# Fields that would change the answer, each with the values beside null that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
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
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    response_format: Any = None
    speculative: bool | None = None
    return_rounds: bool | None = None

    @property
    def asked_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell beside each token's own log-probability; None for neither."""
        return None

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

    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer is to keep, if any; `ApiError` for a response_format that asks otherwise."""
        given = self.response_format if self.response_format is not None else {"type": "text"}
        kind = given.get("type") if isinstance(given, dict) else None
        if kind == "text":
            return None
        if kind == "json_object":
            return {"type": "object"}
        outer = given.get("json_schema") if kind == "json_schema" else None
        schema = outer.get("schema") if isinstance(outer, dict) else None
        if not isinstance(schema, dict):
            raise ApiError(
                400,
                "response_format is none that this server knows.",
                'Send {"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}, or type json_object or text.',
                param="response_format",
            )
        return _checked_value(schema, "response_format")

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


def _checked_value(value: Any, field: str) -> Any:
    """``value``; `ApiError` when it is nested too deep for templates and grammars, or holds half a character."""
    if _deeper(value, _MAX_LEVELS):
        raise ApiError(400, f"{field} is nested more than {_MAX_LEVELS} deep.", "Make it flatter.", param=field)
    _checked_text(json.dumps(value, ensure_ascii=False), field, field)
    return value


def _deeper(value: Any, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(each, levels - 1) for each in inside)


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and value == other


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    reasoning_content: Any = None


class TemplateSwitches(BaseModel):
    """``chat_template_kwargs``, as vLLM takes them."""

    model_config = ConfigDict(extra="forbid")

    enable_thinking: bool | None = None


class ChatRequest(CommonRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: TemplateSwitches | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def thinking(self) -> bool | None:
        return self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None

    def offered(self) -> tuple[Any, ...]:
        """The functions that the target may call; `ApiError` when they are none or tool_choice is none."""
        for index, tool in enumerate(self.tools or ()):
            function = tool.get("function")
            named = isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]
            if tool.get("type") != "function" or not named:
                raise ApiError(
                    400,
                    f"tools.{index} is no function with a name.",
                    'Send {"type": "function", "function": {"name": …, "parameters": {…}}}.',
                    param="tools",
                )
        demanded = self.demanded()
        tools = () if self.tool_choice == "none" else tuple(self.tools or ())
        if tools and self.answer_schema() is not None:
            what = "A response_format leaves the target no way to call tools."
            raise ApiError(400, what, 'Leave one of the two out, or send tool_choice "none".', param="response_format")
        if tools and self.parallel_tool_calls is False and not demanded:
            what = "parallel_tool_calls = false is supported only where a call is demanded."
            do = 'Leave it out, or send tool_choice "required".'
            raise ApiError(400, what, do, param="parallel_tool_calls", code="unsupported")
        return _checked_value(tools, "tools")

    def demanded(self) -> tuple[Any, ...]:
        """The functions of which the target must call one, if it must; `ApiError` for a tool_choice that is none."""
        tools = tuple(self.tools or ())
        if self.tool_choice in (None, "auto", "none"):
            return ()
        if self.tool_choice == "required":
            found = tools
        else:
            name = self._chosen
            if name is None:
                what = "tool_choice is none that this server knows."
                do = 'Send "auto", "none", "required", or {"type": "function", "function": {"name": …}}.'
                raise ApiError(400, what, do, param="tool_choice", code="unsupported")
            found = tuple(tool for tool in tools if tool["function"]["name"] == name)[:1]
        if not found:
            what = "tool_choice demands a function that is not among tools."
            raise ApiError(400, what, "Send its description in tools.", param="tool_choice")
        return found

    @property
    def _chosen(self) -> str | None:
        """The name of the function that tool_choice says, if it says one."""
        choice = self.tool_choice if isinstance(self.tool_choice, dict) else {}
        function = choice.get("function")
        name = function.get("name") if choice.get("type") == "function" and isinstance(function, dict) else None
        return name if isinstance(name, str) else None

    @property
    def several_calls(self) -> bool:
        """Whether a demanded call may be followed by others."""
        return self.tool_choice == "required" and self.parallel_tool_calls is not False

    @property
    def speaks_of_tools(self) -> bool:
        """Whether the messages hold calls or results."""
        return any(message.role == "tool" or message.tool_calls for message in self.messages)

    def conversation(self) -> list[Message]:
        """The messages as text, and the calls and reasoning beside it; `ApiError` for contents that are not."""
        return [_message(message, f"messages.{index}") for index, message in enumerate(self.messages)]


def _message(message: ChatMessage, where: str) -> Message:
    role = "system" if message.role == "developer" else message.role
    given = {
        key: value for key, value in message if key in ("tool_calls", "tool_call_id", "reasoning_content") and value
    }
    try:  # as a conversation that trains is read
        more = parse_messages({"messages": [{"role": role, "content": "", **given}]})[0].more if given else {}
    except RowError as error:
        what = f"{where} cannot be used: {error}."
        raise ApiError(400, what, "Send it as OpenAI's API describes it.", param=where) from None
    _checked_value(dict(more), where)
    calls_only = message.content is None and "tool_calls" in more
    return Message(role, "" if calls_only else _text(message, where), more=more)


def _text(message: ChatMessage, where: str) -> str:
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
    logprobs: int | bool | None = None

    @property
    def asked_logprobs(self) -> int | None:
        if isinstance(self.logprobs, bool) or not 0 <= (self.logprobs or 0) <= MAX_COMPLETION_LOGPROBS:
            if self.logprobs is False:
                return None
            do = f"Send a number from 0 to {MAX_COMPLETION_LOGPROBS}."
            raise ApiError(400, f"logprobs = {self.logprobs} is not accepted.", do, param="logprobs")
        return self.logprobs

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
