"""Conversations from JSON lines: what can be used is yielded, what cannot is named with its line and the reason."""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from nemotron_dspark.chat.format import Conversation, Message
from nemotron_dspark.errors import InputError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}


_SHOWN = 5  # lines that are named for each reason


@dataclasses.dataclass(frozen=True)
class Skipped:
    line: int  # counted from 1
    reason: str


class SkipTally:
    """How many lines were skipped for each reason, and the first few of them."""

    def __init__(self, skipped: Iterable[Skipped] = ()) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.lines: collections.defaultdict[str, list[int]] = collections.defaultdict(list)  # by reason
        for item in skipped:
            self.add(item)

    def add(self, skipped: Skipped) -> None:
        self.counts[skipped.reason] += 1
        if len(self.lines[skipped.reason]) < _SHOWN:
            self.lines[skipped.reason].append(skipped.line)

    @property
    def total(self) -> int:
        return self.counts.total()

    def sentences(self) -> list[str]:
        """One sentence a reason, most frequent first: "3 skipped: empty answer (lines 4, 9, 12)"."""
        result = []
        for reason, count in self.counts.most_common():
            more = ", …" if count > len(self.lines[reason]) else ""
            word = "line" if count == 1 else "lines"
            result.append(f"{count} skipped: {reason} ({word} {', '.join(map(str, self.lines[reason]))}{more})")
        return result

    def to_json(self) -> list[dict[str, Any]]:
        return [{"reason": r, "count": n, "first_lines": self.lines[r]} for r, n in self.counts.most_common()]

    @staticmethod
    def from_json(values: list[dict[str, Any]]) -> "SkipTally":
        tally = SkipTally()
        for value in values:
            tally.counts[value["reason"]] = value["count"]
            tally.lines[value["reason"]] = value["first_lines"]
        return tally


class RowError(ValueError):
    """Why one row cannot be used; becomes a `Skipped`."""


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | Skipped]]:
    """(line number, object) of every line of a JSON-lines file that is not blank."""
    if not path.is_file():
        raise InputError(f"{path} is not a file.", "Check the path of the data file.")
    with open(path, "rb") as file:
        yield from rows_of(file)


def rows_of(lines: Iterable[bytes], first: int = 1) -> Iterator[tuple[int, dict[str, Any] | Skipped]]:
    """`read_rows` of lines that are numbered from ``first``."""
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # undecodable bytes too
            yield number, Skipped(number, "not valid JSON")
            continue
        yield number, row if isinstance(row, dict) else Skipped(number, "not a JSON object")


def parse_messages(row: dict[str, Any]) -> tuple[Message, ...]:
    """Messages under ``conversations`` or ``messages``, as role/content or from/value; `RowError` when unusable."""
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, list):
        raise RowError("no list under conversations or messages")
    if not turns:
        raise RowError("empty conversation")
    return tuple(map(_message, turns))


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise RowError("a turn is not an object")
    spelled = turn.get("role", turn.get("from"))
    role = ROLES.get(spelled) if isinstance(spelled, str) else None
    if role is None:
        raise RowError("a turn has an unknown role")
    more = {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    if role == "assistant" and (calls := turn.get("tool_calls")):
        more["tool_calls"] = [parse_tool_call(call) for call in calls] if isinstance(calls, list) else _refuse_call()
    if role == "assistant" and (reasoning := turn.get("reasoning_content", turn.get("reasoning"))):
        if not isinstance(reasoning, str):
            raise RowError("a turn's reasoning is not text")
        more["reasoning_content"] = reasoning
    content = turn.get("content", turn.get("value"))
    parts = tuple(map(_part, content)) if isinstance(content, list) else ()
    if content is None and "tool_calls" in more:
        content = ""
    if not isinstance(content, str | list):
        raise RowError("a turn's content is not text")
    ids = [_token_ids(turn.get(key)) for key in ("token_ids", "prompt_token_ids")]
    trains = turn.get("weight") != 0
    return Message(role, "\n".join(parts) if isinstance(content, list) else content, parts, more, *ids, trains=trains)


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) and kind == "text" else part
    if isinstance(text, str):
        return text
    if isinstance(kind, str) and kind != "text":
        raise RowError(f"a turn has a part that is no text, but {kind}")
    raise RowError("a turn's content is not text")


def parse_tool_call(call: Any) -> dict[str, Any]:
    """A tool call as templates take it: arguments as an object, given as one or as JSON; `RowError` when unusable."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        _refuse_call()
    arguments = function.get("arguments", {})
    with contextlib.suppress(ValueError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise RowError("a tool call's arguments are not a JSON object")
    own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**own, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _refuse_call() -> NoReturn:
    raise RowError("tool_calls is not a list of calls of named functions")


def _token_ids(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids or [], list) or not all(type(index) is int for index in ids or []):
        raise RowError("token ids that are not a list of numbers")
    return tuple(ids or ())


def parse_tools(row: dict[str, Any]) -> tuple[Any, ...]:
    """The functions under ``tools``, a list or its JSON; `RowError` when it is something else."""
    tools = row.get("tools") or []
    with contextlib.suppress(ValueError):
        tools = json.loads(tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools is not a list of objects")
    return tuple(tools)


def parse_conversation(row: dict[str, Any], line: int) -> Conversation:
    """A conversation with at least one answer; ``"finish": "length"`` marks a last answer that was cut off."""
    messages = parse_messages(row)
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise RowError("no assistant turn")
    if not any(answer.trains for answer in answers):
        raise RowError("every assistant turn has the weight 0")
    if not all(answer.content.strip() or answer.more.get("tool_calls") for answer in answers):
        raise RowError("empty answer")
    return Conversation(messages, line, complete=row.get("finish") != "length", tools=parse_tools(row))


def conversations_of(rows: Iterable[tuple[int, dict[str, Any] | Skipped]]) -> Iterator[Conversation | Skipped]:
    """``rows`` as conversations, and a `Skipped` for each that cannot be used."""
    for line, row in rows:
        try:
            yield row if isinstance(row, Skipped) else parse_conversation(row, line)
        except RowError as error:
            yield Skipped(line, str(error))


def read(path: Path | str) -> Iterator[Conversation | Skipped]:
    """Every conversation of a JSON-lines file in order, and a `Skipped` for each line that cannot be used.

    Raises:
        InputError: the file cannot be read, or (after the last line) holds no usable conversation.
    """
    path, tally, usable = Path(path), SkipTally(), False
    for item in conversations_of(read_rows(path)):
        if isinstance(item, Skipped):
            tally.add(item)
        usable |= isinstance(item, Conversation)
        yield item
    if not usable:
        found = "; ".join(tally.sentences()) or "it is empty"
        raise InputError(
            f"{path} holds no usable conversation: {found}.",
            'Write one JSON object a line: {"conversations": [{"role": "user", "content": "…"}, …]}.',
        )
