"""A loss token is one the target itself would have written after its generation prompt."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_dspark.chat.format import Conversation, Message, RenderError, render_prompt
from nemotron_dspark.chat.mask import NotMaskable, tokenise, with_opening_tag
from nemotron_dspark.recipe import tiny
from tests.chat.chat_templates import EMPTY_PAIR, H_REASONING, LLAMA3, NANO_V2, NEMOTRON_3, NEMOTRON_MINI, QWEN3, STRICT

LONG = 4096


def spans(tokenizer, tokenised):
    """The text of every run of loss tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokenised.loss_mask, [0]])))
    return [tokenizer.decode(tokenised.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def the_sample(tokenizer, conversation, **given):
    """The only sample of a conversation, all answers of which train."""
    found = tokenise(tokenizer, conversation, **{"max_length": LONG, **given})
    assert found.unfit == ()
    (sample,) = found.samples
    return sample


def rendered(tokenizer, conversation, **switches):
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
    return tokenizer.apply_chat_template(messages, tokenize=True, **switches)["input_ids"]


def prompt_before_last(tokenizer, conversation, thinking=None):
    return render_prompt(tokenizer, conversation.messages[:-1], thinking)


def test_ids_are_those_of_the_template_up_to_the_last_end(make_tokenizer, talk):
    tokenizer = make_tokenizer()
    conversation = talk("s:Be brief.", "u:What is state?", "a:A hybrid.\n", "u:And?", "a: more state")
    sample = the_sample(tokenizer, conversation)
    assert [*sample.input_ids, *tokenizer.encode("\n")] == rendered(tokenizer, conversation)
    assert sample.input_ids.dtype == np.int32
    assert sample.loss_mask.dtype == np.uint8


def test_every_answer_and_its_end_but_not_the_newline_after_it(make_tokenizer, talk):
    tokenizer = make_tokenizer()
    conversation = talk("s:Be brief.", "u:What is state?", "a:A hybrid.\n", "u:And?", "a: more state")
    sample = the_sample(tokenizer, conversation)
    assert spans(tokenizer, sample) == ["A hybrid.\n<|im_end|>", " more state<|im_end|>"]


def test_what_precedes_the_last_answer_is_the_prompt_of_the_server(make_tokenizer, talk):
    tokenizer = make_tokenizer()
    conversation = talk("u:What?", "a:first", "u:And?", "a:second")
    sample = the_sample(tokenizer, conversation)
    prompt = prompt_before_last(tokenizer, conversation)
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert sample.loss_mask[len(prompt)] == 1
    assert sample.loss_mask[len(prompt) - 1] == 0


def test_user_turns_after_the_last_answer_are_left_out(make_tokenizer, talk):
    tokenizer = make_tokenizer()
    answered = the_sample(tokenizer, talk("u:What?", "a:state"))
    sample = the_sample(tokenizer, talk("u:What?", "a:state", "u:unanswered"))
    assert sample.input_ids.tolist() == answered.input_ids.tolist()


def test_cut_to_the_maximal_length(make_tokenizer, talk):
    conversation = talk("u:What?", "a:state of a hybrid model and more")
    whole = the_sample(make_tokenizer(), conversation)
    cut = the_sample(make_tokenizer(), conversation, max_length=15)
    assert cut.input_ids.tolist() == whole.input_ids[:15].tolist()
    assert cut.loss_mask.tolist() == whole.loss_mask[:15].tolist()


@pytest.mark.parametrize(
    ("answer", "thinking", "opened", "loss"),
    [
        ("<think>\nwhy\n</think>\nstate", None, "<think>\n", "why\n</think>\nstate<|im_end|>"),
        ("<think>\nwhy\n</think>\nstate", True, "<think>\n", "why\n</think>\nstate<|im_end|>"),
        ("why\n</think>\nstate", None, "<think>\n", "why\n</think>\nstate<|im_end|>"),  # as a server returns it
        ("state", None, "<think></think>", "state<|im_end|>"),
        ("state", False, "<think></think>", "state<|im_end|>"),
        ("<think></think>state", False, "<think></think>", "state<|im_end|>"),
    ],
)
def test_nemotron_3_in_both_modes(make_tokenizer, talk, answer, thinking, opened, loss):
    tokenizer = make_tokenizer(NEMOTRON_3)
    sample = the_sample(tokenizer, talk("u:What?", f"a:{answer}"), thinking=thinking)
    assert spans(tokenizer, sample) == [loss]
    text = tokenizer.decode(sample.input_ids)
    asked = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
    assert text == f"{asked}<|im_start|>assistant\n{opened}{loss}"


@pytest.mark.parametrize(
    ("template", "answer", "thinking"),
    [
        (NEMOTRON_3, "state", True),
        (NEMOTRON_3, "<think></think>state", True),
        (NEMOTRON_3, "<think>\nwhy</think>state", False),
        (NEMOTRON_3, "why</think>state", False),
        (QWEN3, "state", True),  # the prompt opens nothing, but with reasoning on the target would
        (QWEN3, "<think>\nwhy</think>state", False),
        (NANO_V2, "state", None),
    ],
)
def test_an_answer_of_the_other_mode_is_refused(make_tokenizer, talk, template, answer, thinking):
    with pytest.raises(NotMaskable, match="reasoning"):
        tokenise(make_tokenizer(template), talk("u:What?", f"a:{answer}"), max_length=LONG, thinking=thinking)


def test_reasoning_of_earlier_turns_trains_in_a_sample_of_its_own_and_is_no_context_of_later_ones(make_tokenizer, talk):
    tokenizer = make_tokenizer(NEMOTRON_3)
    conversation = talk("u:What?", "a:<think>\nearlier</think>state", "u:And?", "a:<think>\nwhy</think>more")
    first, second = tokenise(tokenizer, conversation, max_length=LONG).samples
    assert spans(tokenizer, first) == ["earlier</think>state<|im_end|>"]
    assert spans(tokenizer, second) == ["why</think>more<|im_end|>"]
    prompt = prompt_before_last(tokenizer, conversation)
    assert second.input_ids[: len(prompt)].tolist() == prompt
    assert "earlier" not in tokenizer.decode(second.input_ids)


def test_answers_share_a_sample_as_long_as_the_history_stays(make_tokenizer, talk):
    """The third question finds the first two answers without reasoning as they were; the fourth finds one rewritten."""
    tokenizer = make_tokenizer(NEMOTRON_3)
    reasoned = "a:<think></think>one", "a:<think></think>two", "a:<think></think>three"
    turns = [turn for pair in zip(("u:1?", "u:2?", "u:3?"), reasoned, strict=True) for turn in pair]
    (sample,) = tokenise(tokenizer, talk(*turns), max_length=LONG).samples
    assert spans(tokenizer, sample) == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]


def test_an_answer_that_has_lost_its_reasoning_trains_nothing_and_is_named(make_tokenizer, talk):
    tokenizer = make_tokenizer(NEMOTRON_3)
    conversation = talk("u:What?", "a:state", "u:And?", "a:<think>\nwhy</think>more", "u:So?", "a:why</think>less")
    found = tokenise(tokenizer, conversation, max_length=LONG)
    assert found.unfit == (1,)
    assert [spans(tokenizer, sample) for sample in found.samples] == [
        ["why</think>more<|im_end|>"],
        ["why</think>less<|im_end|>"],
    ]


def test_the_last_answer_decides_the_mode_of_a_conversation(make_tokenizer, talk):
    tokenizer = make_tokenizer(NEMOTRON_3)
    found = tokenise(tokenizer, talk("u:What?", "a:<think>why</think>state", "u:And?", "a:more"), max_length=LONG)
    assert found.unfit == (1,)
    assert [spans(tokenizer, sample) for sample in found.samples] == [["more<|im_end|>"]]


def test_earlier_answers_without_reasoning_train_where_the_mode_is_off(make_tokenizer, talk):
    tokenizer = make_tokenizer(NEMOTRON_3)
    sample = the_sample(tokenizer, talk("u:What?", "a:state", "u:And?", "a:more"))
    assert spans(tokenizer, sample) == ["state<|im_end|>", "more<|im_end|>"]


@pytest.mark.parametrize(
    ("question", "answer", "opened", "loss"),
    [
        ("What?", "<think>\nwhy</think>\nstate", "<think>\n", "why</think>\nstate\n<SPECIAL_12>"),  # would open twice
        ("What?", "why</think>\nstate", "<think>\n", "why</think>\nstate\n<SPECIAL_12>"),
        ("What? /no_think", "state", "<think></think>", "state\n<SPECIAL_12>"),
    ],
)
def test_nano_v2_opens_reasoning_once(make_tokenizer, talk, question, answer, opened, loss):
    tokenizer = make_tokenizer(NANO_V2)
    sample = the_sample(tokenizer, talk(f"u:{question}", f"a:{answer}"))
    assert spans(tokenizer, sample) == [loss]
    text = tokenizer.decode(sample.input_ids)
    assert text == f"<SPECIAL_10>System\n\n<SPECIAL_11>User\nWhat?\n<SPECIAL_11>Assistant\n{opened}{loss}"


def test_an_end_that_a_server_left_in_the_answer_is_not_doubled(make_tokenizer, talk):
    """Nano v2 writes a line break and its end token; without the token the answer keeps the line break."""
    tokenizer = make_tokenizer(NANO_V2)
    sample = the_sample(tokenizer, talk("u:What? /no_think", "a:state\n"))
    assert spans(tokenizer, sample) == ["state\n<SPECIAL_12>"]


@pytest.mark.parametrize(
    ("template", "ends"), [(H_REASONING, "\n<SPECIAL_11>"), (NEMOTRON_MINI, "\n<extra_id_1>"), (STRICT, "")]
)
def test_a_turn_without_an_end_of_its_own_ends_with_the_token_that_begins_the_next(
    make_tokenizer, talk, template, ends
):
    tokenizer = make_tokenizer(template)
    sample = the_sample(tokenizer, talk("u:What?", "a:state", "u:And?", "a:more"))
    assert spans(tokenizer, sample) == ["state" + ends, "more" + ends]


def test_tags_that_only_the_template_writes_train_nothing(make_tokenizer, talk):
    tokenizer = make_tokenizer(EMPTY_PAIR)
    sample = the_sample(tokenizer, talk("u:What?", "a: state "))
    assert spans(tokenizer, sample) == ["state<|im_end|>"]
    assert "assistant\n<think>\n\n</think>\n\nstate" in tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize(
    ("template", "answer", "loss"),
    [
        (tiny.CHAT_TEMPLATE, "state of", "state of"),
        (NEMOTRON_3, "still reasoning", "still reasoning"),
        (NEMOTRON_3, "<think>\nstill reasoning", "still reasoning"),
        (NEMOTRON_3, "why</think>\nstate of", "why</think>\nstate of"),
        (NANO_V2, "still reasoning.", "still reasoning."),
        (H_REASONING, "state of", "state of"),
    ],
)
def test_an_answer_that_was_cut_off_has_no_end(make_tokenizer, talk, template, answer, loss):
    tokenizer = make_tokenizer(template)
    conversation = talk("u:What?", f"a:{answer}", complete=False)
    sample = the_sample(tokenizer, conversation)
    assert spans(tokenizer, sample) == [loss]
    assert sample.loss_mask[-1] == 1  # nothing follows
    prompt = prompt_before_last(tokenizer, conversation)
    assert sample.input_ids[: len(prompt)].tolist() == prompt


def test_only_the_last_answer_is_the_one_cut_off(make_tokenizer, talk):
    tokenizer = make_tokenizer()
    sample = the_sample(tokenizer, talk("u:What?", "a:state", "u:And?", "a:mo", complete=False))
    assert spans(tokenizer, sample) == ["state<|im_end|>", "mo"]


def test_without_a_template_contents_are_joined_and_an_answer_ends_with_eos(make_tokenizer, talk):
    tokenizer = make_tokenizer(None)
    sample = the_sample(tokenizer, talk("u:def f():\n", "a:    return 1\n"))
    assert tokenizer.decode(sample.input_ids) == "def f():\n    return 1\n<|im_end|>"
    assert spans(tokenizer, sample) == ["    return 1\n<|im_end|>"]


def test_messages_the_template_refuses_are_named(make_tokenizer, talk):
    with pytest.raises(RenderError, match="no system turns here"):
        tokenise(make_tokenizer(STRICT), talk("s:x", "u:What?", "a:state"), max_length=LONG)


def test_a_conversation_without_an_answer_is_refused(make_tokenizer, talk):
    with pytest.raises(NotMaskable, match="no assistant turn"):
        tokenise(make_tokenizer(), talk("u:What?"), max_length=LONG)


def test_tokens_that_read_the_past_differently_part_the_samples(make_tokenizer, talk):
    """Split as GPT-2 does, the two line breaks before an answer are one token in its prompt and two in later ones."""
    conversation = talk("u:What?", "a:state", "u:And?", "a:more")
    tokenizer = make_tokenizer(LLAMA3, lines=False)
    first, second = tokenise(tokenizer, conversation, max_length=LONG).samples
    assert (spans(tokenizer, first), spans(tokenizer, second)) == (["state<|eot_id|>"], ["more<|eot_id|>"])
    prompt = prompt_before_last(tokenizer, conversation)
    assert second.input_ids[: len(prompt)].tolist() == prompt
    assert the_sample(make_tokenizer(LLAMA3), conversation).loss_tokens == first.loss_tokens + second.loss_tokens


@pytest.mark.parametrize(
    ("answer", "recorded"),
    [
        ("why</think>state", "<think>why</think>state"),
        ("<think>why</think>state", "<think>why</think>state"),
        ("state", "state"),
        ("a </think> and a <think>", "<think>a </think> and a <think>"),
    ],
)
def test_an_answer_is_recorded_with_the_tag_it_closes(answer, recorded):
    assert with_opening_tag(answer) == recorded


_TEXT = st.text(alphabet=st.sampled_from("ab .\n\tэ🙂<think>/"), min_size=1, max_size=30).filter(str.strip)
_TOKENIZER = tiny.make_tokenizer(["ab ab.\n\n ab\t", "a\n\nb  a"], 320)


@settings(max_examples=150)
@given(st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=3))
def test_loss_tokens_spell_the_answers_and_ids_before_them_the_prompts_whatever_they_contain(pairs):
    messages = [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    found = tokenise(_TOKENIZER, Conversation(tuple(messages)), max_length=LONG)
    answers, prompts = [], []
    for sample in found.samples:
        answers += spans(_TOKENIZER, sample)
        prompts += [sample.input_ids[:at].tolist() for at in np.flatnonzero(np.diff(sample.loss_mask, prepend=0) == 1)]
    assert answers == [answer + "<|im_end|>" for _, answer in pairs]
    assert prompts == [render_prompt(_TOKENIZER, messages[: 2 * n + 1]) for n in range(len(pairs))]
