"""OpenAI's response bodies: what the engine delivers, as a whole answer or as chunks, of one choice or of several.

The two endpoints differ in names and where the text goes. Chats are split into reasoning, content and calls; what is
not OpenAI's (rounds, token ids, how the answer was decoded) stands beside it in fields of its own.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nemotron_dspark.serving.engine import Finished, Round, TextDelta, Token, Usage
from nemotron_dspark.serving.parts import Part, Splitter
from nemotron_dspark.serving.text import REPLACEMENT


def usage_json(usages: Sequence[Usage]) -> dict[str, Any]:
    """OpenAI's usage over all choices, and beside it how they were decoded when a draft took part."""
    prompt = usages[0].prompt_tokens
    completion = sum(usage.completion_tokens for usage in usages)
    value: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": usages[0].reused},
    }
    if any(usage.proposed for usage in usages):
        rounds, accepted = sum(usage.rounds for usage in usages), sum(usage.accepted for usage in usages)
        value["speculative"] = {"rounds": rounds, "accepted_length": round(accepted / rounds, 4)}
    return value


class Answer:
    """Bodies of one request's answer: whole, or as chunks."""

    def __init__(
        self,
        model_id: str,
        choices: int,
        splitter: Callable[[], Splitter] | None,
        *,
        logprobs: bool = False,
        rounds: bool = False,
    ):
        """``splitter`` makes one for each choice of a chat; None: a completion, whose text is left whole."""
        self._chat = splitter is not None
        self._choices = [_Choice(index, splitter() if splitter else None, logprobs, rounds) for index in range(choices)]
        self._fixed = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_id,
        }

    def whole(self, ends: Sequence[Finished], prompt_ids: Sequence[int] | None = None) -> dict[str, Any]:
        """The body of an answer that is not streamed; with token ids, placed as vLLM's, if the prompt's are given."""
        choices = [choice.whole(end) for choice, end in zip(self._choices, ends, strict=True)]
        body = {**self._body("chat.completion", choices), "usage": usage_json([end.usage for end in ends])}
        if prompt_ids is not None:
            for choice, end in zip(choices, ends, strict=True):
                choice["token_ids"] = list(end.token_ids)
            for holder in [body] if self._chat else choices:
                holder["prompt_token_ids"] = list(prompt_ids)
        return body

    def opening(self) -> Iterator[dict[str, Any]]:
        """The chunks that name the role; only chats have them."""
        if self._chat:
            for choice in self._choices:
                yield self._chunk([choice.body({"delta": {"role": "assistant", "content": ""}})])

    def chunks(self, index: int, event: TextDelta | Finished) -> Iterator[dict[str, Any]]:
        """The chunks of what the engine delivered for one choice; the last one of its end has a reason."""
        for choice in self._choices[index].deltas(event):
            yield self._chunk([choice])

    def usage(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """The chunk after the last one, for who asked for it."""
        return {**self._chunk([]), "usage": usage_json(usages)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._body("chat.completion.chunk", choices)

    def _body(self, chat_object: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._fixed, "object": chat_object if self._chat else "text_completion", "choices": choices}


class _Choice:
    """One choice in the making."""

    def __init__(self, index: int, splitter: Splitter | None, logprobs: bool, rounds: bool):
        self._index = index
        self._splitter = splitter
        self._logprobs, self._rounds = logprobs, rounds
        self._calls = 0
        self._offset = 0  # of the text, for the log-probabilities of completions

    def body(self, text: dict[str, Any], reason: str | None = None, rounds: Sequence[Round] = ()) -> dict[str, Any]:
        """``text`` as a choice of a body, with what else is told of its ``rounds``."""
        choice: dict[str, Any] = {"index": self._index, **text, "logprobs": None, "finish_reason": reason}
        if self._logprobs and rounds:
            said = [token for each in rounds for token in each.tokens if token.text is not None]
            choice["logprobs"] = _chat_logprobs(said) if self._splitter else self._completion_logprobs(said)
        if self._rounds and rounds:
            choice["rounds"] = [
                {"tokens": [t.text for t in each.tokens], "kept": each.kept, "refused": list(each.refused)}
                for each in rounds
            ]
        return choice

    def whole(self, end: Finished) -> dict[str, Any]:
        if self._splitter is None:
            return self.body({"text": end.text}, end.reason, end.rounds)
        parts = [*self._splitter.push(end.text), *self._splitter.finish()]
        texts = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("content", "reasoning")}
        calls = [self._call(part) for part in parts if part.call]
        message: dict[str, Any] = {"role": "assistant", "content": texts["content"] or (None if calls else "")}
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        if calls:
            message["tool_calls"] = calls
        return self.body({"message": message}, self._reason(end), end.rounds)

    def deltas(self, event: TextDelta | Finished) -> Iterator[dict[str, Any]]:
        end = event if isinstance(event, Finished) else None
        texts = list(self._texts(event.text, end is not None))
        if event.rounds and not texts:
            texts = [{"delta": {}} if self._splitter else {"text": ""}]
        for at, text in enumerate(texts):
            yield self.body(text, rounds=() if at else event.rounds)
        if end is not None:
            yield self.body({"delta": {}} if self._splitter else {"text": ""}, self._reason(end))

    def _texts(self, text: str, last: bool) -> Iterator[dict[str, Any]]:
        if self._splitter is None:
            if text:
                yield {"text": text}
            return
        for part in [*self._splitter.push(text), *(self._splitter.finish() if last else [])]:
            if part.call:
                at = self._calls
                yield {"delta": {"tool_calls": [{"index": at, **self._call(part)}]}}
            else:
                yield {"delta": {"content" if part.kind == "content" else "reasoning_content": part.text}}

    def _call(self, part: Part) -> dict[str, Any]:
        self._calls += 1
        call = part.call
        function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)} if call else {}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}

    def _reason(self, end: Finished) -> str:
        return "tool_calls" if self._calls and end.reason == "stop" else end.reason

    def _completion_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text or "")
        return {
            "tokens": [token.spelled for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [dict(token.top) for token in tokens],
            "text_offset": offsets,
        }


def _chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    def told(spelled: str, logprob: float | None) -> dict[str, Any]:
        whole = REPLACEMENT not in spelled  # else it is a part of a character, of which only the bytes would tell
        return {"token": spelled, "logprob": logprob, "bytes": list(spelled.encode()) if whole else None}

    return {
        "content": [
            told(token.spelled, token.logprob) | {"top_logprobs": [told(*each) for each in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }
