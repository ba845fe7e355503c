"""Whatever the template does to tags and history, every answer trains as the target wrote it, after what it read.

Conversations are made here as a server would make them: render the messages so far with the generation prompt, let the
"target" write, record the answer, ask on. The samples must give back exactly these prompts and these texts.
"""

import dataclasses

import pytest

from nemotron_dspark.chat.format import Conversation, Message, render_prompt
from nemotron_dspark.chat.mask import tokenise, with_opening_tag
from nemotron_dspark.recipe import tiny
from tests.chat import chat_templates as templates
from tests.chat.test_mask import spans

LONG = 4096
ANSWERS = ("It is a state.", "- of\n- a hybrid", "Nothing\u2019s more.")


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to ask a family, and what its target then writes around its answers."""

    template: str | None
    end: str
    begins: str = ""  # what the target writes before its answer
    system: str | None = None
    thinking: bool | None = None
    samples: int = 1  # of a conversation of three turns
    asked: bool | None = None  # what the server was told where the data's setting says nothing


REASONS = "why\nthis?\n</think>\n"
OWN_TAG = "<think>\nwhy\nthis?\n</think>\n\n"
ON, OFF, IM_END, EOT = "{'reasoning': True}", "{'reasoning': False}", "<|im_end|>", "<|eot_id|>"
MODES = {
    "plain": Mode(None, IM_END),
    "chatml": Mode(tiny.CHAT_TEMPLATE, IM_END),
    "chatml with a system text": Mode(tiny.CHAT_TEMPLATE, IM_END, system="Be brief."),
    "nemotron_3 by default": Mode(templates.NEMOTRON_3, IM_END, REASONS, samples=3),
    "nemotron_3 on": Mode(templates.NEMOTRON_3, IM_END, REASONS, "Be brief.", True, samples=3),
    "nemotron_3 off": Mode(templates.NEMOTRON_3, IM_END, thinking=False),
    "nemotron_3 off, found": Mode(templates.NEMOTRON_3, IM_END, asked=False),
    "nemotron_3_super on": Mode(templates.NEMOTRON_3_SUPER, IM_END, REASONS, samples=3),
    "nemotron_3_super off": Mode(templates.NEMOTRON_3_SUPER, IM_END, thinking=False),
    "nemotron_3_ultra on": Mode(templates.NEMOTRON_3_ULTRA, IM_END, REASONS, samples=3),
    "nemotron_3_ultra off": Mode(templates.NEMOTRON_3_ULTRA, IM_END, thinking=False),
    "nano_v2 by default": Mode(templates.NANO_V2, "\n<SPECIAL_12>", REASONS, samples=3),
    "nano_v2 on": Mode(templates.NANO_V2, "\n<SPECIAL_12>", REASONS, "Be brief. /think", samples=3),
    "nano_v2 off": Mode(templates.NANO_V2, "\n<SPECIAL_12>", system="/no_think Be brief.", samples=3),
    "h_reasoning on": Mode(templates.H_REASONING, "\n<SPECIAL_11>", REASONS, f"x {ON}", samples=3),
    "h_reasoning off": Mode(templates.H_REASONING, "\n<SPECIAL_11>", "", OFF, samples=3),
    "h_reasoning unasked": Mode(templates.H_REASONING, "\n<SPECIAL_11>"),
    "qwen3 by default": Mode(templates.QWEN3, IM_END, OWN_TAG, samples=3),
    "qwen3 on": Mode(templates.QWEN3, IM_END, OWN_TAG, "Be brief.", True, samples=3),
    "qwen3 off": Mode(templates.QWEN3, IM_END, thinking=False, samples=3),
    "qwen3 off, found": Mode(templates.QWEN3, IM_END, asked=False, samples=3),
    "qwen3 off by /no_think": Mode(templates.QWEN3, IM_END, "<think>\n\n</think>\n\n", "/no_think", samples=3),
    "qwen3_5 by default": Mode(templates.QWEN3_5, IM_END, REASONS + "\n", samples=3),
    "qwen3_5 on": Mode(templates.QWEN3_5, IM_END, REASONS + "\n", "Be brief.", True, samples=3),
    "qwen3_5 off": Mode(templates.QWEN3_5, IM_END, thinking=False, samples=3),
    "qwen3_5 off, found": Mode(templates.QWEN3_5, IM_END, asked=False, samples=3),
    "gemma": Mode(templates.GEMMA, "<end_of_turn>"),
    "gemma with a system text": Mode(templates.GEMMA, "<end_of_turn>", system="Be brief."),
    "gemma_2": Mode(templates.GEMMA_2, "<end_of_turn>"),
    "llama3": Mode(templates.LLAMA3, EOT, system="Be brief."),
    "llama_nemotron on": Mode(templates.LLAMA_NEMOTRON, EOT, OWN_TAG, "detailed thinking on", samples=3),
    "llama_nemotron off": Mode(templates.LLAMA_NEMOTRON, EOT, "", "detailed thinking off"),
    "llama_nemotron /no_think": Mode(templates.LLAMA_NEMOTRON, EOT, "", "/no_think", samples=3),
    "granite": Mode(templates.GRANITE, "<|end_of_text|>"),
    "nemotron_mini": Mode(templates.NEMOTRON_MINI, "\n<extra_id_1>", system="Be brief."),
}


def ask(tokenizer, mode, turns):
    """A conversation, and of each answer the prompt's ids and the text the target wrote after it."""
    messages = [Message("system", mode.system)] if mode.system else []
    heard = []
    for number in range(turns):
        messages.append(Message("user", f"question {number}?"))
        thinking = mode.asked if mode.thinking is None else mode.thinking
        heard.append((render_prompt(tokenizer, messages, thinking), mode.begins + ANSWERS[number] + mode.end))
        messages.append(Message("assistant", with_opening_tag(mode.begins + ANSWERS[number])))
    return Conversation(tuple(messages), "test:1"), heard


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("name", MODES)
def test_every_answer_trains_once_as_it_was_written_after_what_was_read(name, turns, make_tokenizer):
    mode = MODES[name]
    tokenizer = make_tokenizer(mode.template)
    conversation, heard = ask(tokenizer, mode, turns)
    found = tokenise(tokenizer, conversation, max_length=LONG, thinking=mode.thinking)
    assert found.unfit == ()
    assert [text for sample in found.samples for text in spans(tokenizer, sample)] == [text for _, text in heard]
    starts = [
        (sample, start)
        for sample in found.samples
        for start in range(len(sample.loss_mask))
        if sample.loss_mask[start] and not (start and sample.loss_mask[start - 1])
    ]
    for (sample, start), (prompt, _) in zip(starts, heard, strict=True):
        assert sample.input_ids[:start].tolist() == prompt
    assert len(found.samples) == (mode.samples if turns > 1 else 1)


@pytest.mark.parametrize("name", [name for name, mode in MODES.items() if mode.begins])
def test_an_answer_that_was_cut_inside_its_reasoning_trains_as_far_as_it_goes(name, make_tokenizer):
    mode = MODES[name]
    tokenizer = make_tokenizer(mode.template)
    whole, heard = ask(tokenizer, mode, 2)
    prompt, written = heard[-1]
    written = written[: written.index("why") + 2] if "why" in written else "<think>"
    messages = (*whole.messages[:-1], Message("assistant", written))
    found = tokenise(
        tokenizer, Conversation(messages, "test:1", complete=False), max_length=LONG, thinking=mode.thinking
    )
    last = found.samples[-1]
    assert spans(tokenizer, last) == [written]
    assert last.input_ids[: len(prompt)].tolist() == prompt
    assert last.loss_mask[-1] == 1
