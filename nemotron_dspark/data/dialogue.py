"""A prompt on its way to a conversation: the target's answers one by one, and what comes after each.

What a user says next is said whatever the answer was. The result of a tool is that of one call, so it follows only an
answer that makes that call. Where the target does something else, its answer ends a conversation of its own, a branch;
in the conversation that goes on the recorded call stands in its place, as context that does not train.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from nemotron_dspark.chat.format import Message
from nemotron_dspark.data.conversations import RowError, parse_tool_call
from nemotron_dspark.data.prompts import Prompt


@dataclasses.dataclass(frozen=True)
class Answered:
    """A conversation whose last message the target wrote."""

    messages: tuple[Message, ...]
    finish: str  # "length" where it was cut off, else "stop"


class Dialogue:
    """The state of one prompt; `take` the answer to ``messages`` until it is ``ended``."""

    def __init__(self, prompt: Prompt):
        self.prompt = prompt
        self.messages: list[Message] = list(prompt.turns[0])
        self.branches: list[Answered] = []
        self.ended: Answered | None = None
        self._turn = 0  # of the prompt, whose answer comes next

    def take(self, answer: Message, *, cut: bool) -> None:
        """The target's ``answer`` to ``messages``; ``cut``: it reached the longest answer allowed."""
        turns, recorded = self.prompt.turns, self.prompt.called.get(self._turn)
        self._turn += 1
        answered = Answered((*self.messages, answer), "length" if cut else "stop")
        if recorded is not None:
            self._follow(recorded, answer, turns[self._turn], answered)
        elif cut or answer.more.get("tool_calls") or self._turn == len(turns):
            self.ended = answered  # what follows would be said after an answer without an end, or without a result
        else:
            self.messages += [answer, *turns[self._turn]]

    def _follow(self, recorded: Message, answer: Message, results: Sequence[Message], answered: Answered) -> None:
        """Put the results of the ``recorded`` call behind ``answer``, or behind the recorded one."""
        if answered.finish == "stop" and _same(recorded, answer):
            said = answer
        else:
            earlier = [dataclasses.replace(message, trains=False) for message in self.messages]
            self.branches.append(Answered((*earlier, answer), answered.finish))
            said = dataclasses.replace(_as_sent(recorded), trains=False)
        ids = [call.get("id") for call in said.more.get("tool_calls", ())]
        self.messages += [said, *_with_ids(results, recorded.more.get("tool_calls", ()), ids)]


def _as_sent(message: Message) -> Message:
    """``message`` with its calls as OpenAI's API spells them: each with an id, arguments as JSON text."""
    calls = [
        {
            "id": call.get("id") or f"call_{place}",
            "type": "function",
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for place, call in enumerate(message.more.get("tool_calls", ()))
    ]
    return dataclasses.replace(message, more={**message.more, "tool_calls": calls}) if calls else message


def _same(recorded: Message, answer: Message) -> bool:
    """Whether both call the same functions with the same arguments, in the same order; in their text if need be."""
    made, expected = (message.more.get("tool_calls", ()) for message in (answer, recorded))
    if not expected:
        return not made and answer.content.strip() == recorded.content.strip()
    try:
        return [parse_tool_call(call)["function"] for call in made] == [call["function"] for call in expected]
    except RowError:
        return False  # arguments that are no JSON object


def _with_ids(results: Sequence[Message], calls: Sequence[dict[str, Any]], ids: Sequence[str | None]) -> list[Message]:
    """``results`` of ``calls``, which they name by id, or follow in order, with ``ids`` in place of those."""
    places = {call["id"]: place for place, call in enumerate(calls) if "id" in call}
    tools = [message for message in results if message.role == "tool"]
    found = []
    for order, message in enumerate(tools):
        place = places.get(message.more.get("tool_call_id", ""), order)
        new = ids[place] if place < len(ids) else None
        found.append(dataclasses.replace(message, more={**message.more, "tool_call_id": new}) if new else message)
    return [*found, *results[len(tools) :]]
