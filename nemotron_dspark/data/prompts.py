"""Prompts: what is asked, without answers. Read for regeneration and for evaluation.

A row holds `conversations` or `messages` (answers in it only say where the turns are, unless results of tools follow),
`turns` (DeepSpec's evaluation files) or one `prompt`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_dspark.chat.format import Message
from nemotron_dspark.chat.mask import with_opening_tag
from nemotron_dspark.data.conversations import RowError, Skipped, parse_messages, parse_tools, read_rows
from nemotron_dspark.errors import InputError


@dataclasses.dataclass(frozen=True)
class Prompt:
    """``turns[k]`` is what is said before answer k: a user message, the first time perhaps after a system message.

    Or it begins with results of tools. Then ``called[k - 1]`` is the answer of the file that called them.
    """

    turns: tuple[tuple[Message, ...], ...]
    line: int
    id: str | None = None  # the row's own
    tools: tuple[Any, ...] = ()  # functions the target may call
    called: Mapping[int, Message] = dataclasses.field(default_factory=dict)

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
            item = row if isinstance(row, Skipped) else parse_prompt(row, line)
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
    answers that later turns see; results of tools follow the file's own.
    """
    found: list[list[list[int]]] = []
    prompts = (item for item in read_prompts(file) if isinstance(item, Prompt))
    for prompt in prompts:
        messages: list[Message] = []
        turns: list[list[int]] = []
        for place, turn in enumerate(prompt.turns):
            if turns:
                recorded = prompt.called.get(place - 1)
                messages.append(recorded or Message("assistant", with_opening_tag(answer(turns[-1]))))
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


def parse_prompt(row: dict[str, Any], line: int) -> Prompt:
    """A row of a prompt file; `RowError` when it holds no prompt."""
    called: dict[int, Message] = {}
    if "conversations" in row or "messages" in row:
        turns, called = _asked(parse_messages(row))
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
    name = str(own) if type(own) in (str, int) else None
    return Prompt(tuple(map(tuple, turns)), line, name, parse_tools(row), called)


def _asked(messages: tuple[Message, ...]) -> tuple[list[list[Message]], dict[int, Message]]:
    """Messages grouped by the answer they lead to, and the answers that called tools, by group.

    Without any answer each user message is to get one.
    """
    answered = any(message.role == "assistant" for message in messages)
    groups: list[list[Message]] = [[]]
    called: dict[int, Message] = {}
    last: Message | None = None  # answer
    for message in messages:
        if message.role == "assistant":
            last = message
            if groups[-1]:
                groups.append([])
            continue
        if message.role == "tool" and not groups[-1]:
            if last is None or not (last.content.strip() or last.more.get("tool_calls")):
                raise RowError("a tool result without a call before it")
            called[len(groups) - 2] = last
        elif message.role == "tool" and groups[-1][-1].role != "tool":
            raise RowError("a tool result without a call before it")
        groups[-1].append(message)
        if not answered and message.role == "user":
            groups.append([])
    groups = [group for group in groups if group]
    if not all(group[0].role == "tool" or any(message.role == "user" for message in group) for group in groups):
        raise RowError("a turn without a user message")
    return groups, called
