"""Loss masks from the generation prompt: a loss token is one the target itself would have written, and nothing else.

When an answer was generated, the target read the rendering of the messages before it with the generation prompt, and
wrote reasoning, answer and end of turn. So that is what a sample holds: exactly this prompt and exactly this text.
Later answers of a conversation stand in the same sample as long as the template leaves the past as it was; where it
rewrites it (drops reasoning, prints other tags), a conversation becomes several samples. Each answer trains in one.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from torch import Tensor

from nemotron_dspark.chat.format import Conversation, Message, RenderError, render, template_source
from nemotron_dspark.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mask = TypeVar("Mask", np.ndarray, Tensor)

_OPENED = re.compile(r"<think>\s*$")  # how a generation prompt may end
_CLOSED = re.compile(r"<think>\s*</think>\s*$")
_TAG = re.compile(r"\s*<think>")  # how an answer may begin
_PAIR = re.compile(r"\s*<think>\s*</think>")
_TWICE = re.compile(r"^(\s*<think>\s*)<think>\s*")  # a template's own tag before that of the answer
_PROBE = "\u2063probe\u2063of\u2063content\u2063"  # invisible separators: no template and no text contains this


class NotMaskable(InputError):
    """No answer of the conversation can be what the target would have written."""


@dataclasses.dataclass(frozen=True)
class Tokenised:
    """One sample."""

    input_ids: np.ndarray  # int32 [S]
    loss_mask: np.ndarray  # uint8 [S], 1 where the token is the target's own

    @property
    def loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


def predicts_loss_token(loss_mask: Mask) -> Mask:
    """Positions from which the loss predicts a token, bool [S - 1], of a mask [S] (NumPy or torch).

    They are those that carry loss and whose next token does: an anchor is one (`training.anchors`), and slot k of
    anchor a is predicted from a + k, and counts only while the mask is set from a to a + k + 1. So no other position's
    last hidden state is looked at.
    """
    loss = loss_mask != 0
    return cast(Mask, loss[:-1] & loss[1:])  # NumPy types a comparison as Any


@dataclasses.dataclass(frozen=True)
class TokenisedConversation:
    samples: tuple[Tokenised, ...]  # at least one, in the order of their last answers
    unfit: tuple[int, ...]  # answers, counted from 1, that the target would not have written in this thinking mode
    retold: tuple[int, ...]  # answers whose token ids came after another prompt than the template's: their text is used


@dataclasses.dataclass(frozen=True)
class _Turn:
    """What the target read before an answer, and what it wrote."""

    prompt: str
    written: str
    as_rendered: bool  # the template prints this answer as prompt + written
    token_ids: tuple[int, ...] = ()  # of what was written, where they are known


def tokenise(
    tokenizer: "PreTrainedTokenizerBase", conversation: Conversation, *, max_length: int, thinking: bool | None = None
) -> TokenisedConversation:
    """Token ids and loss masks of ``conversation``; samples are cut to ``max_length`` tokens.

    An answer stands in the sample of a later one if its tokens (prompt and what was written) are exactly how that one's
    begin, else it ends a sample of its own. ``thinking`` None tries the template's default, then off, then on, and
    takes the mode that fits the last answer best. An answer that was cut off has no end of turn. Token ids that the
    server kept of an answer are used if it had read the template's prompt.

    Raises:
        NotMaskable: no answer fits, or there is none; or the template leaves tool calls or tool results out.
        RenderError: the template refuses the messages.
    """
    answers = [message for message in conversation.messages if message.role == "assistant" and message.trains]
    turns = _turns(tokenizer, conversation, thinking)
    samples: list[tuple[list[int], np.ndarray]] = []  # last answer first
    for turn in reversed([turn for turn in turns if turn is not None]):
        start, ids = _encode(tokenizer, turn)
        holder = next((sample for sample in samples if sample[0][: len(ids)] == ids), None)
        if holder is None:
            holder = (ids, np.zeros(len(ids), dtype=np.uint8))
            samples.append(holder)
        holder[1][start : len(ids)] = 1
    return TokenisedConversation(
        samples=tuple(
            Tokenised(np.asarray(ids[:max_length], dtype=np.int32), loss_mask[:max_length])
            for ids, loss_mask in reversed(samples)
        ),
        unfit=tuple(number for number, turn in enumerate(turns, start=1) if turn is None),
        retold=tuple(
            number
            for number, (turn, answer) in enumerate(zip(turns, answers, strict=True), start=1)
            if turn is not None and answer.token_ids and not turn.token_ids
        ),
    )


def with_opening_tag(answer: str) -> str:
    """``answer`` with the `<think>` it closes: a generation prompt may have printed it.

    Templates find reasoning by its tags, so a history is only rendered as in a chat if answers are recorded whole.
    """
    before, closed, _ = answer.partition("</think>")
    return f"<think>{answer}" if closed and "<think>" not in before else answer


@dataclasses.dataclass(frozen=True)
class _Rendering:
    """How one conversation is printed."""

    tokenizer: "PreTrainedTokenizerBase"
    tools: tuple[Any, ...]
    thinking: bool | None

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        return render(
            self.tokenizer,
            messages,
            generation_prompt=generation_prompt,
            thinking=self.thinking,
            tools=self.tools,
        )

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _turns(
    tokenizer: "PreTrainedTokenizerBase", conversation: Conversation, thinking: bool | None
) -> list[_Turn | None]:
    """Every answer as a turn in the mode that fits best, later ones counting more; None for one that does not fit.

    All answers of a conversation were written in one mode. One that fits only another mode has lost its reasoning.
    """
    messages = conversation.messages
    answers = [index for index, message in enumerate(messages) if message.role == "assistant" and message.trains]
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=0)
    cut = None if conversation.complete else last
    if not answers:
        raise NotMaskable("The conversation has no assistant turn.", "Regenerate answers with `nds data regenerate`.")
    modes: list[bool | None] = [thinking]
    if thinking is None and "enable_thinking" in template_source(tokenizer):
        modes += [False, True]
    _check_tools(_Rendering(tokenizer, conversation.tools, thinking), messages)
    best: list[_Turn | None] = []
    best_fit: list[int] = []
    for mode in (_Rendering(tokenizer, conversation.tools, thinking) for thinking in modes):
        turns = [_turn(mode, messages[: i + 1], complete=i != cut) for i in answers]
        fit = [0 if turn is None else 1 + turn.as_rendered for turn in reversed(turns)]
        if answers[-1] == cut:  # cut inside its reasoning an answer looks like one without: no mode is better
            fit[0] = min(fit[0], 1)
        if fit > best_fit:
            best, best_fit = turns, fit
        if min(fit) == 2:
            break
    if not any(best):
        raise NotMaskable(
            "The answers are not what the target would write after the generation prompt: "
            "the template opens or skips reasoning and the answers do not.",
            "Set data.thinking to the mode the answers were made in, or regenerate them.",
        )
    return best


def _turn(mode: _Rendering, messages: Sequence[Message], *, complete: bool) -> _Turn | None:
    """The last message as what the target wrote after its prompt; None if it cannot have written that in this mode."""
    before, answer = messages[:-1], messages[-1]
    prompt, text = mode.render(before, generation_prompt=True), mode.render(messages)
    whole = not answer.more.keys() & {"tool_calls", "reasoning_content"}  # the content is all that is printed of it
    content: str | None = answer.content
    probe = Message("assistant", (answer.content if whole else "") + _PROBE)
    _, found, after = mode.render([*before, probe]).rpartition(_PROBE)
    if not found:  # the template does not print the content
        return None
    if not whole:
        content = _printed(prompt, text, after, answer.more.get("reasoning_content", "").strip())
    elif not text.endswith(answer.content + after):  # the template trims, so the target was trained on trimmed ones
        content = answer.content.strip() if complete else answer.content.lstrip()
    if content is not None:
        content = _continuation(prompt, content, must_reason=complete and _must_reason(mode, before, prompt))
    token_ids = answer.token_ids if answer.token_ids and mode.encode(prompt) == list(answer.prompt_token_ids) else ()
    if content is None and not token_ids:
        return None
    written = content or ""
    as_rendered = bool(token_ids) or text == prompt + written + after
    if complete:
        end = after.rstrip() or _next_marker(mode, messages)
        written += end
        if token_ids and token_ids[-1] not in mode.tokenizer.added_tokens_decoder:  # the server kept the end to itself
            token_ids = (*token_ids, *mode.encode(end))
    return _Turn(prompt, written, as_rendered, token_ids)


def _printed(prompt: str, text: str, after: str, reasoning: str) -> str | None:
    """All that ``text`` has between the assistant's marker and ``after``: reasoning, content and tool calls.

    None where the template leaves the reasoning out, or does not print it after such a prompt.
    """
    closed = _CLOSED.search(prompt)
    tags = closed or _OPENED.search(prompt)
    head = prompt[: tags.start()] if tags else prompt
    if not text.startswith(head) or not text.endswith(after):
        return None
    content = text[len(head) : len(text) - len(after)]
    if reasoning:
        return _TWICE.sub(r"\1", content, count=1) if reasoning in content and not closed else None
    empty = _PAIR.match(content)  # a mark of the mode, not what was said
    return content[empty.end() :].lstrip() if empty else content


def _check_tools(mode: _Rendering, messages: Sequence[Message]) -> None:
    """`NotMaskable` where the template leaves tool calls or tool results out."""
    unseen = {"calls", "results"}
    for place, message in enumerate(messages):
        kind, probe = "results", dataclasses.replace(message, content=_PROBE, parts=())
        if calls := message.more.get("tool_calls"):
            renamed = {**calls[0], "function": {**calls[0]["function"], "name": _PROBE}}
            kind, probe = "calls", dataclasses.replace(message, more={**message.more, "tool_calls": [renamed]})
        elif message.role != "tool":
            continue
        if kind in unseen and _PROBE not in mode.render([*messages[:place], probe]):
            raise NotMaskable(
                f"The chat template does not print tool {kind}.",
                "Take these conversations out, or give it one that does.",
            )
        unseen.discard(kind)


def _must_reason(mode: _Rendering, messages: Sequence[Message], prompt: str) -> bool:
    """Whether ``prompt`` opens reasoning, or would close it at once if it were switched off and does not."""
    if _OPENED.search(prompt):
        return True
    if mode.thinking is False or "enable_thinking" not in template_source(mode.tokenizer) or _CLOSED.search(prompt):
        return False
    return bool(_CLOSED.search(dataclasses.replace(mode, thinking=False).render(messages, generation_prompt=True)))


def _continuation(prompt: str, content: str, must_reason: bool) -> str | None:
    """``content`` without the reasoning tags that ``prompt`` has already printed; None if it is of the other mode."""
    opened, closed = _OPENED.search(prompt), _CLOSED.search(prompt)
    if closed:
        printed, tags = closed.group(), _PAIR.match(content)
        if tags is None and ("</think>" in content or _TAG.match(content)):
            return None
    else:
        printed, tags = (opened.group(), _TAG.match(content)) if opened else ("", None)
        if must_reason and not ("</think>" in content or _TAG.match(content)):
            return None
        if opened and _PAIR.match(content):
            return None
    if tags is None:
        return content
    if content.startswith(printed):
        return content[len(printed) :]
    return content[tags.end() :].lstrip()


def _next_marker(mode: _Rendering, messages: Sequence[Message]) -> str:
    """The end of a turn that has none of its own: what begins the next one, up to and with its first added token.

    That token is what such a target stops at. Empty if the next turn begins without one.
    """
    probes = [Message("assistant", messages[-1].content + _PROBE), Message("user", _PROBE)]
    try:
        between = mode.render([*messages[:-1], *probes]).split(_PROBE)[-2]
    except (RenderError, IndexError):
        return ""
    added = [token.content for token in mode.tokenizer.added_tokens_decoder.values() if token.content.strip()]
    places = [(between.index(text), -len(text), text) for text in added if text in between]
    if not places:
        return ""
    start, _, text = min(places)
    return between[: start + len(text)]


def _encode(tokenizer: "PreTrainedTokenizerBase", turn: _Turn) -> tuple[int, list[int]]:
    """How many tokens the prompt has, and all tokens; what was written begins with a token of its own."""
    prompt = tokenizer(turn.prompt, add_special_tokens=False)["input_ids"]
    if turn.token_ids:
        return len(prompt), [*prompt, *turn.token_ids]
    ids = tokenizer(turn.prompt + turn.written, add_special_tokens=False)["input_ids"]
    if ids[: len(prompt)] != prompt:  # a token across the border: the target read the prompt as it is, then wrote
        ids = prompt + tokenizer(turn.written, add_special_tokens=False)["input_ids"]
    return len(prompt), ids


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Consecutive tokens of one kind."""

    text: str
    trained: bool
    special: bool  # added tokens: markers, tags


def stretches(tokenizer: "PreTrainedTokenizerBase", sample: Tokenised) -> list[Stretch]:
    """``sample`` from its first token to its last; the texts together are the whole sample."""
    added = tokenizer.added_tokens_decoder.keys()
    tokens = zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True)
    result = []
    for (trained, special), group in itertools.groupby(tokens, key=lambda token: (bool(token[1]), token[0] in added)):
        text = tokenizer.decode([index for index, _ in group], clean_up_tokenization_spaces=False)
        result.append(Stretch(cast(str, text), trained, special))  # one sequence gives one text
    return result
