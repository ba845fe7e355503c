"""Split an answer's text into what was thought, what is said, and which functions are called, while it comes.

Text is handed on as soon as it is certain what it belongs to; only what may be the beginning of a tag, and a call that
is not complete, are held back. Line breaks around reasoning are the template's and in neither part.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from nemotron_dspark.chat.tool_calls import ToolCall, read_calls
from nemotron_dspark.serving.text import overlap

OPENS, CLOSES = "<think>", "</think>"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of an answer: ``text`` of one kind, or a complete call."""

    kind: Literal["content", "reasoning", "call"]
    text: str = ""
    call: ToolCall | None = None


class Splitter:
    """Parts of one answer.

    ``reasoning`` is "open" when the prompt ended inside reasoning, "possible" when the answer may open it, None when
    all tags are text. ``tags`` stand around calls of ``tools``; None leaves calls in the text.
    """

    def __init__(
        self,
        reasoning: Literal["open", "possible"] | None = None,
        tags: tuple[str, str] | None = None,
        tools: Sequence[Any] = (),
    ):
        self._tags, self._tools = tags, tools
        self._state = {"open": "reasoning", "possible": "start", None: "content"}[reasoning]
        self._text = ""  # not yet handed on
        self._fresh = reasoning is not None  # nothing of the present part was handed on: leading line breaks go
        self._space = ""  # white space that is dropped if a tag follows
        self._called = False

    def push(self, new: str) -> list[Part]:
        """What is certain now and was not before."""
        self._text += new
        return self._parts(final=False)

    def finish(self) -> list[Part]:
        """The rest, once no further text comes. A call that was not completed is text."""
        return self._parts(final=True)

    def _parts(self, *, final: bool) -> list[Part]:
        found: list[Part] = []
        while True:
            state = self._state
            if state == "start":
                self._start(final)
            elif state == "reasoning":
                before, ended = self._until(CLOSES, final)
                found += self._trimmed("reasoning", before, ended or final)
                if ended:
                    self._state, self._fresh, self._space = "content", True, ""
            elif state == "content":
                before, ended = self._until(self._tags[0] if self._tags else None, final)
                found += self._trimmed("content", before, ended or (final and self._called))
                if ended:
                    self._state, self._space = "call", ""
            else:
                found += self._call(final)
            if self._state == state:
                break
        if final and self._space:
            found.append(Part("content", self._space))
            self._space = ""
        return found

    def _start(self, final: bool) -> None:
        begun = self._text.lstrip()
        if begun.startswith(OPENS):
            self._text, self._state = begun[len(OPENS) :], "reasoning"
        elif final or not OPENS.startswith(begun):
            self._state, self._fresh = "content", False

    def _until(self, tag: str | None, final: bool) -> tuple[str, bool]:
        """Take the text before ``tag``, as far as it has come, and the tag if it is there."""
        before, found, after = self._text.partition(tag) if tag else (self._text, "", "")
        if not found and tag and not final:
            held = overlap(before, tag)
            before, after = before[: len(before) - held], before[len(before) - held :]
        self._text = after
        return before, bool(found)

    def _trimmed(self, kind: Literal["content", "reasoning"], text: str, last: bool) -> list[Part]:
        """``text`` as a part, without line breaks at its beginning if that is the part's, nor space before a tag."""
        if self._fresh:
            text = text.lstrip("\n")
        white = "\n" if kind == "reasoning" else None
        if kind == "reasoning" or self._tags:
            text = self._space + text
            shown = text.rstrip(white)
            self._space = "" if last else text[len(shown) :]
        else:
            shown = text
        if not shown:
            return []
        self._fresh = False
        return [Part(kind, shown)]

    def _call(self, final: bool) -> list[Part]:
        opening, closing = self._tags or ("", "")
        inner, found, after = self._text.partition(closing)
        if not found and not final:
            return []
        self._text, self._state = after, "content"
        try:
            calls = read_calls(inner, self._tools) if found else []
        except (ValueError, RecursionError):
            calls = []
        if not calls:  # no call after all: it stays what it is, text
            self._fresh = False
            return [Part("content", f"{opening}{inner}{found}")]
        self._called = self._fresh = True
        return [Part("call", call=call) for call in calls]
