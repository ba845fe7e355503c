"""Prompts: what is asked, without answers. Read for regeneration and for evaluation.

A row holds `conversations` or `messages` (answers in it only say where the turns are), `turns` (DeepSpec's evaluation
files) or one `prompt`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemotron_dspark.chat.format import Message
from nemotron_dspark.chat.mask import with_opening_tag
from nemotron_dspark.data.conversations import RowError, Skipped, parse_messages, parse_tools, read_rows
from nemotron_dspark.errors import InputError


@dataclasses.dataclass(frozen=True)
class Prompt:
    """``turns[k]`` is what is said before answer k: a user message, the first time perhaps after a system message."""

    turns: tuple[tuple[Message, ...], ...]
    line: int
    id: str | None = None  # the row's own
    tools: tuple[Any, ...] = ()  # functions the target may call

    @property
    def first(self) -> tuple[Message, ...]:
        """The messages before the first answer."""
        return self.turns[0]


def read_prompts(path: Path | str) -> Iterator[Prompt | Skipped]:
    """Every prompt of a JSON-lines file in order, and a `Skipped` for each line that holds none.

    Raises:
        InputError: the file cannot be read, or (after the last line) holds no prompt.
    """
    usable = False
    for line, row in read_rows(Path(path)):
        try:
            item = row if isinstance(row, Skipped) else _prompt(row, line)
        except RowError as error:
            item = Skipped(line, str(error))
        usable |= isinstance(item, Prompt)
        yield item
    if not usable:
        raise InputError(f"{path} holds no prompt.", 'Write one JSON object a line: {"prompt": "…"}.')


def rendered_prompts(
    file: Path | str,
    render: Callable[[Sequence[Message], Sequence[Any]], list[int]],  # of messages and tools, to token ids
    answer: Callable[[list[int]], str],
    *,
    room: float,
    limit: int | None = None,
) -> list[list[list[int]]]:
    """Token ids, at most ``room``, of what is read before each answer to the (first ``limit``) prompts in ``file``.

    A list for each prompt, with one of ids for each of its turns. In a prompt of several turns ``answer`` writes the
    answers that later turns see.
    """
    found: list[list[list[int]]] = []
    prompts = (item for item in read_prompts(file) if isinstance(item, Prompt))
    for prompt in prompts:
        messages: list[Message] = []
        turns: list[list[int]] = []
        for turn in prompt.turns:
            if turns:
                messages.append(Message("assistant", with_opening_tag(answer(turns[-1]))))
            messages += turn
            ids = render(messages, prompt.tools)
            if not 0 < len(ids) <= room:
                break
            turns.append(ids)
        if turns:
            found.append(turns)
        if len(found) == limit:
            break
    return found


def rendered_turns(
    file: Path | str,
    render: Callable[[Sequence[Message], Sequence[Any]], list[int]],
    answer: Callable[[list[int]], str],
    *,
    room: float,
    limit: int | None = None,
) -> list[list[int]]:
    """The turns of `rendered_prompts`, one list of token ids each."""
    return list(itertools.chain.from_iterable(rendered_prompts(file, render, answer, room=room, limit=limit)))


def _prompt(row: dict[str, Any], line: int) -> Prompt:
    if "conversations" in row or "messages" in row:
        turns = _asked(parse_messages(row))
    else:
        texts = row.get("turns", [row["prompt"]] if "prompt" in row else None)
        if not isinstance(texts, list):
            raise RowError("no conversations, messages, turns or prompt")
        if not all(isinstance(text, str) for text in texts):
            raise RowError("a prompt is not text")
        turns = [[Message("user", text)] for text in texts]
    if not turns:
        raise RowError("empty conversation")
    if not all(message.content.strip() for turn in turns for message in turn if message.role == "user"):
        raise RowError("empty prompt")
    own = row.get("id")
    return Prompt(tuple(map(tuple, turns)), line, str(own) if type(own) in (str, int) else None, parse_tools(row))


def _asked(messages: tuple[Message, ...]) -> list[list[Message]]:
    """Messages grouped by the answer they lead to; without any answer each user message is to get one."""
    if any(message.role == "tool" for message in messages):
        raise RowError("tool turns cannot be regenerated")
    answered = any(message.role == "assistant" for message in messages)
    groups: list[list[Message]] = [[]]
    for message in messages:
        if message.role != "assistant":
            groups[-1].append(message)
        if message.role == ("assistant" if answered else "user"):
            groups.append([])
    groups = [group for group in groups if group]
    if not all(any(message.role == "user" for message in group) for group in groups):
        raise RowError("a turn without a user message")
    return groups
