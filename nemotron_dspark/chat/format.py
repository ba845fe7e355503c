"""Conversations as text: the tokenizer's own chat template renders them, a bundled one when it ships none.

The bundled formats (`templates/*.yaml`) are data: names to recognise a format by, markers for people and for DeepSpec,
and how each was checked. Nothing here or in the loss masks depends on the markers.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, ValidationError

from nemotron_dspark.config.validation import input_error
from nemotron_dspark.errors import InputError
from nemotron_dspark.resources import resource_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Message:
    role: str  # "system", "user", "assistant" or "tool"
    content: str
    parts: tuple[str, ...] = ()  # texts that ``content`` was given as, where it was a list of parts
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # tool_calls, reasoning_content, name, …
    token_ids: tuple[int, ...] = ()  # what the server that wrote this answer says it wrote, and read before it
    prompt_token_ids: tuple[int, ...] = ()
    trains: bool = True  # False: an answer that the target did not write, which is context alone

    def to_json(self) -> dict[str, Any]:
        """The message as OpenAI's API spells it."""
        return {"role": self.role, "content": self.content, **self.more}


@dataclasses.dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    line: int = 0  # of its file, counted from 1
    complete: bool = True  # False: the last answer was cut off, so the target never ended that turn
    tools: tuple[Any, ...] = ()  # descriptions of the functions the target may call, as its template takes them


_TAKES_REASONING = re.compile(r"""[.'"]reasoning_content""")  # as a template reads it from a message


class RenderError(InputError):
    """The chat template refuses these messages."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Thinking(_Part):
    """How a format's reasoning is switched."""

    switch: str  # in words
    when_on: str  # what the generation prompt prints behind the assistant's marker with reasoning on, and off
    when_off: str
    history: str  # what becomes of the reasoning of earlier answers, in words


class DeepSpecTemplate(_Part):
    """The arguments of DeepSpec's ChatTemplate."""

    assistant_header: str
    user_header: str
    system_prompt: str | None
    end_of_turn_token: str
    assistant_loss_prefix: str | None


class ChatFormat(_Part):
    """One file of `templates/`."""

    name: str
    description: str
    recognise: tuple[str, ...]  # a chat template that contains all of these is of this format
    system: str | None  # what a turn of each role begins with; None where the format has no such turn
    user: str | None
    assistant: str | None
    end_of_turn: str | None  # None where nothing but the next turn's marker ends one
    thinking: Thinking | None  # None: the format has no reasoning
    deepspec: DeepSpecTemplate | None  # None where DeepSpec's search for markers cannot do it
    jinja: str | None  # used for a tokenizer that ships no template; None where every known checkpoint ships one
    checked: str


def load_format(path: Path) -> ChatFormat:
    """Read one YAML file; `InputError` names the file and the key that is missing, unknown or of another type."""
    try:
        return ChatFormat.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise input_error(error, str(path), "Compare it with templates/nemotron_3.yaml.") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}.", "Correct the file.") from None


@functools.cache
def bundled_formats() -> dict[str, ChatFormat]:
    """Every format in `templates/`, by name."""
    formats = [load_format(path) for path in sorted(resource_folder("templates").glob("*.yaml"))]
    return {chat_format.name: chat_format for chat_format in formats}


def template_source(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The jinja text that renders this tokenizer's chats: its own, else that of `templates/plain.yaml`.

    Plain text begins with the token that the tokenizer itself puts before a text: Gemma's base models need it.
    """
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, dict):  # several named templates
        source = source.get("default") or next(iter(source.values()), None)
    if source:
        return source
    begins = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" * begins + (bundled_formats()["plain"].jinja or "")


def recognise(tokenizer: "PreTrainedTokenizerBase") -> ChatFormat | None:
    """The bundled format of this tokenizer's template: plain without a template, None for one nobody described."""
    if not getattr(tokenizer, "chat_template", None):
        return bundled_formats()["plain"]
    source = template_source(tokenizer).replace("\\n", "\n")  # jinja files write line breaks either way
    fitting = [f for f in bundled_formats().values() if f.recognise and all(text in source for text in f.recognise)]
    return max(fitting, key=lambda chat_format: len(chat_format.recognise), default=None)


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    generation_prompt: bool = False,
    thinking: bool | None = None,
    tools: Sequence[Any] = (),
) -> str:
    """The text of ``messages``; with ``generation_prompt`` it ends where the model starts to write the next answer.

    Parts of a content go to the template as a list if it prints those, else joined by line breaks, as vLLM does it.

    Raises:
        RenderError: the template refuses the messages (roles that do not alternate, a role it does not know).
    """
    source = template_source(tokenizer)
    in_parts = any(message.parts for message in messages) and _prints_parts(tokenizer)
    switches: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    try:
        return _applied(
            tokenizer,
            [_for_template(message, source, in_parts) for message in messages],
            chat_template=source,
            add_generation_prompt=generation_prompt,
            tools=list(tools) or None,
            **switches,
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise RenderError(
            f"The chat template refuses the messages: {' '.join(str(error).split())}.",
            "Check the order of roles and the contents.",
        ) from None


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    thinking: bool | None = None,
    tools: Sequence[Any] = (),
) -> list[int]:
    """Token ids of ``messages`` and the generation prompt after them: what the target reads before it answers."""
    text = render(tokenizer, messages, generation_prompt=True, thinking=thinking, tools=tools)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _for_template(message: Message, source: str, in_parts: bool) -> dict[str, Any]:
    given = message.to_json()
    if message.parts and in_parts:
        given["content"] = [{"type": "text", "text": text} for text in message.parts]
    if "reasoning_content" in given and not _TAKES_REASONING.search(source):
        if "</think>" not in source:
            raise ValueError("it prints no reasoning")
        given["content"] = f"<think>\n{given.pop('reasoning_content')}\n</think>\n\n{message.content}"
    return given


def _prints_parts(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the template prints a content of parts as it prints their text."""
    text, source = "part of a content", template_source(tokenizer)
    contents = (text, [{"type": "text", "text": text}])
    try:
        whole, part = (_applied(tokenizer, [{"role": "user", "content": c}], chat_template=source) for c in contents)
    except (TemplateError, TypeError, ValueError, KeyError):
        return False
    return whole == part


def _applied(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]], **settings: Any) -> str:
    return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **settings))
