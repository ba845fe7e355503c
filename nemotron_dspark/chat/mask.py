"""Loss masks from the generation prompt: a loss token is one the target itself would have written, and nothing else.

Rendering the messages before an answer with the generation prompt shows where the target starts to write, whatever the
template does: it may drop reasoning from earlier turns, open `<think>` by itself, or open it twice. Each conversation
is tokenised once; the character span of each answer becomes a token span through the tokenizer's offsets.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from nemotron_dspark.chat.format import Conversation, Message, render, template_source
from nemotron_dspark.errors import InputError

_OPENED = re.compile(r"<think>\s*$")
_CLOSED = re.compile(r"<think>\s*</think>\s*$")
_OPENING = re.compile(r"\s*<think>(\s*</think>)?\s*")
_END_PROBE = "\u2063end\u2063of\u2063content\u2063"  # invisible separators: no template and no text contains this


class NotMaskable(InputError):
    """No answer of the conversation appears in the rendering as the target would have written it."""


@dataclasses.dataclass(frozen=True)
class Tokenised:
    input_ids: np.ndarray  # int32 [S]
    loss_mask: np.ndarray  # uint8 [S], 1 where the token is the target's own

    @property
    def loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A rendering that ends with one answer; the answer and its end-of-turn token are ``text[start:end]``."""

    text: str
    start: int
    end: int
    content_end: int


def tokenise(tokenizer: Any, conversation: Conversation, *, max_length: int, thinking: bool | None = None) -> Tokenised:
    """Token ids and loss mask of ``conversation``, cut to ``max_length`` tokens.

    The text is the template's own rendering. Only where that is not what the target would have written for the last
    answer (a tag opened twice, reasoning rewritten), the text is generation prompt + answer + end of turn. Earlier
    answers count where this text contains them as they were written. ``thinking`` None tries the template's default,
    then off, then on, and takes the mode the last answer fits. An answer that was cut off has no end-of-turn token.

    Raises:
        NotMaskable: the last answer fits no mode, or there is none.
        RenderError: the template refuses the messages.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("This tokenizer gives no character offsets.", "Use a checkpoint with a tokenizer.json.")
    answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    if not answers:
        raise NotMaskable("The conversation has no assistant turn.", "Regenerate answers with `nds data regenerate`.")
    messages = conversation.messages[: answers[-1] + 1]
    final, mode = _last_turn(tokenizer, messages, conversation.complete, thinking)
    text = final.text if conversation.complete else final.text[: final.content_end]
    spans = [(final.start, final.end if conversation.complete else final.content_end)]
    for index in answers[:-1]:
        turn = _as_rendered(tokenizer, messages[: index + 1], mode)
        if turn is not None and text.startswith(turn.text[: turn.end]):
            spans.append((turn.start, turn.end))
    return _token_spans(tokenizer, text, spans, max_length)


def _last_turn(
    tokenizer: Any, messages: Sequence[Message], complete: bool, thinking: bool | None
) -> tuple[_Turn, bool | None]:
    modes: list[bool | None] = [thinking]
    if thinking is None and "enable_thinking" in template_source(tokenizer):
        modes += [False, True]
    tries = [(written, mode) for written in (False, True) for mode in modes]
    if not complete:  # cut inside its reasoning an answer looks like one without: the default mode decides
        tries.sort(key=lambda pair: modes.index(pair[1]))
    for written, mode in tries:
        turn = _as_written(tokenizer, messages, mode, complete) if written else _as_rendered(tokenizer, messages, mode)
        if turn is not None:
            return turn, mode
    raise NotMaskable(
        "The last answer is not what the target would write after the generation prompt: "
        "the template opens or skips reasoning and the answer does not.",
        "Set data.thinking to the mode the answers were made in, or regenerate them.",
    )


def _end_of_turn(tokenizer: Any, messages: Sequence[Message], mode: bool | None) -> str | None:
    """What the template prints after the content of a last assistant turn; None when it does not print the content."""
    probe = Message("assistant", messages[-1].content + _END_PROBE)
    _before, found, after = render(tokenizer, [*messages[:-1], probe], thinking=mode).rpartition(_END_PROBE)
    return after if found else None


def _turn(text: str, start: int, content_end: int) -> _Turn:
    # The newline that many templates print after the end-of-turn token is not the target's.
    return _Turn(text, start, content_end + len(text[content_end:].rstrip()), content_end)


def _as_rendered(tokenizer: Any, messages: Sequence[Message], mode: bool | None) -> _Turn | None:
    """The template's rendering, if after the generation prompt it holds the last answer and nothing else."""
    prompt = render(tokenizer, messages[:-1], generation_prompt=True, thinking=mode)
    text = render(tokenizer, messages, thinking=mode)
    tail = _end_of_turn(tokenizer, messages, mode)
    if tail is None or not text.startswith(prompt) or not text.endswith(tail):
        return None
    content_end = len(text) - len(tail)
    written = text[len(prompt) : content_end]
    if _OPENED.search(prompt) and not _reasons(messages[-1].content):
        return None
    if written.strip() not in (messages[-1].content.strip(), _continuation(prompt, messages[-1].content).strip()):
        return None
    if written != _continuation(prompt, written):  # opened twice
        return None
    return _turn(text, len(prompt), content_end)


def _as_written(tokenizer: Any, messages: Sequence[Message], mode: bool | None, complete: bool) -> _Turn | None:
    """Generation prompt + answer + end of turn, if the answer can be what the target wrote after this prompt."""
    prompt = render(tokenizer, messages[:-1], generation_prompt=True, thinking=mode)
    tail = _end_of_turn(tokenizer, messages, mode)
    content = messages[-1].content
    if tail is None:
        return None
    if _OPENED.search(prompt) and complete and not _reasons(content):
        return None  # an answer without reasoning, but the prompt asks for it
    answer = _continuation(prompt, content)
    if (_OPENED.search(prompt) or _CLOSED.search(prompt)) and _OPENING.match(answer):
        return None  # a tag that the prompt has already printed, in another form
    if not render(tokenizer, messages, thinking=mode).endswith(content + tail):
        answer = answer.strip()  # the template trims contents, so the target was trained on trimmed ones
    return _turn(prompt + answer + tail, len(prompt), len(prompt) + len(answer))


def _reasons(content: str) -> bool:
    return "</think>" in content or bool(_OPENING.match(content))


def _continuation(prompt: str, content: str) -> str:
    """``content`` without the reasoning tags that ``prompt`` has already printed."""
    opening = _OPENING.match(content)
    pattern = _CLOSED if opening and opening[1] is not None else _OPENED
    return content[opening.end() :] if opening and pattern.search(prompt) else content


def _token_spans(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], max_length: int) -> Tokenised:
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids = np.asarray(encoding["input_ids"][:max_length], dtype=np.int32)
    offsets = np.asarray(encoding["offset_mapping"][:max_length], dtype=np.int64).reshape(-1, 2)
    loss_mask = np.zeros(len(input_ids), dtype=np.uint8)
    for start, end in spans:
        # A token across a border is none the target wrote. Tokenizers that trim offsets give a whitespace token before
        # the border no width, at the border itself: hence the strict comparison.
        loss_mask[(offsets[:, 0] >= start) & (offsets[:, 1] > start) & (offsets[:, 1] <= end)] = 1
    return Tokenised(input_ids, loss_mask)
