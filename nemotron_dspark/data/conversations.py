"""Conversations from JSON lines: what can be used is yielded, what cannot is named with its line and the reason."""

import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
    """As `read_rows`, of lines that are numbered from ``first``."""
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
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise RowError("a turn is not an object")
        spelled = turn.get("role", turn.get("from"))
        role = ROLES.get(spelled) if isinstance(spelled, str) else None
        content = turn.get("content", turn.get("value"))
        if role is None:
            raise RowError("a turn has an unknown role")
        if not isinstance(content, str):
            raise RowError("a turn's content is not text")
        messages.append(Message(role, content))
    return tuple(messages)


def parse_conversation(row: dict[str, Any], line: int) -> Conversation:
    """A conversation with at least one answer; ``"finish": "length"`` marks a last answer that was cut off."""
    messages = parse_messages(row)
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise RowError("no assistant turn")
    if not all(answer.content.strip() for answer in answers):
        raise RowError("empty answer")
    return Conversation(messages, line, complete=row.get("finish") != "length")


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
