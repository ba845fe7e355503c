"""A loss token is one the target itself would have written after its generation prompt."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from nemotron_dspark.chat.format import Conversation, Message, RenderError, render_prompt
from nemotron_dspark.chat.mask import NotMaskable, tokenise
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny
from tests.chat.chat_templates import EMPTY_PAIR, H_REASONING, NANO_V2, NEMOTRON_3, STRICT

LONG = 4096


def spans(tokenizer, tokenised):
    """The text of every run of loss tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokenised.loss_mask, [0]])))
    return [tokenizer.decode(tokenised.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def rendered(tokenizer, conversation, **switches):
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
    return tokenizer.apply_chat_template(messages, tokenize=True, **switches)["input_ids"]


def prompt_before_last(tokenizer, conversation, thinking=None):
    return render_prompt(tokenizer, conversation.messages[:-1], thinking)


def test_ids_are_those_of_the_template(make_tokenizer, talk):
    tokenizer = make_tokenizer()
    conversation = talk("s:Be brief.", "u:What is state?", "a:A hybrid.\n", "u:And?", "a: more state")
    sample = tokenise(tokenizer, conversation, max_length=LONG)
    assert sample.input_ids.tolist() == rendered(tokenizer, conversation)
    assert sample.input_ids.dtype == np.int32
    assert sample.loss_mask.dtype == np.uint8


def test_every_answer_and_its_end_but_not_the_newline_after_it(make_tokenizer, talk):
    tokenizer = make_tokenizer()
    conversation = talk("s:Be brief.", "u:What is state?", "a:A hybrid.\n", "u:And?", "a: more state")
    sample = tokenise(tokenizer, conversation, max_length=LONG)
    assert spans(tokenizer, sample) == ["A hybrid.\n<|im_end|>", " more state<|im_end|>"]


def test_what_precedes_the_last_answer_is_the_prompt_of_the_server(make_tokenizer, talk):
    tokenizer = make_tokenizer()
    conversation = talk("u:What?", "a:first", "u:And?", "a:second")
    sample = tokenise(tokenizer, conversation, max_length=LONG)
    prompt = prompt_before_last(tokenizer, conversation)
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert sample.loss_mask[len(prompt)] == 1
    assert sample.loss_mask[len(prompt) - 1] == 0


def test_user_turns_after_the_last_answer_are_left_out(make_tokenizer, talk):
    tokenizer = make_tokenizer()
    answered = talk("u:What?", "a:state")
    sample = tokenise(tokenizer, talk("u:What?", "a:state", "u:unanswered"), max_length=LONG)
    assert sample.input_ids.tolist() == rendered(tokenizer, answered)


def test_cut_to_the_maximal_length(make_tokenizer, talk):
    conversation = talk("u:What?", "a:state of a hybrid model and more")
    whole = tokenise(make_tokenizer(), conversation, max_length=LONG)
    cut = tokenise(make_tokenizer(), conversation, max_length=15)
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
    sample = tokenise(tokenizer, talk("u:What?", f"a:{answer}"), max_length=LONG, thinking=thinking)
    assert spans(tokenizer, sample) == [loss]
    text = tokenizer.decode(sample.input_ids)
    asked = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
    assert text == f"{asked}<|im_start|>assistant\n{opened}{loss}\n"


@pytest.mark.parametrize(("answer", "thinking"), [("state", True), ("<think>\nwhy</think>state", False)])
def test_an_answer_of_the_other_mode_is_refused(make_tokenizer, talk, answer, thinking):
    with pytest.raises(NotMaskable, match="reasoning"):
        tokenise(make_tokenizer(NEMOTRON_3), talk("u:What?", f"a:{answer}"), max_length=LONG, thinking=thinking)


def test_dropped_reasoning_of_earlier_turns_trains_nothing(make_tokenizer, talk):
    tokenizer = make_tokenizer(NEMOTRON_3)
    conversation = talk("u:What?", "a:<think>\nearlier</think>state", "u:And?", "a:<think>\nwhy</think>more")
    sample = tokenise(tokenizer, conversation, max_length=LONG)
    assert spans(tokenizer, sample) == ["why</think>more<|im_end|>"]
    prompt = prompt_before_last(tokenizer, conversation)
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert "earlier" not in tokenizer.decode(sample.input_ids)


def test_earlier_answers_without_reasoning_train_where_the_mode_is_off(make_tokenizer, talk):
    tokenizer = make_tokenizer(NEMOTRON_3)
    sample = tokenise(tokenizer, talk("u:What?", "a:state", "u:And?", "a:more"), max_length=LONG)
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
    sample = tokenise(tokenizer, talk(f"u:{question}", f"a:{answer}"), max_length=LONG)
    assert spans(tokenizer, sample) == [loss]
    text = tokenizer.decode(sample.input_ids)
    assert text == f"<SPECIAL_10>System\n<SPECIAL_11>User\n{question}\n<SPECIAL_11>Assistant\n{opened}{loss}\n"


def test_nano_v2_history_keeps_the_last_answer_trainable(make_tokenizer, talk):
    tokenizer = make_tokenizer(NANO_V2)
    conversation = talk("u:What?", "a:one</think>state", "u:And?", "a:two</think>more")
    sample = tokenise(tokenizer, conversation, max_length=LONG)
    assert spans(tokenizer, sample) == ["two</think>more\n<SPECIAL_12>"]
    prompt = prompt_before_last(tokenizer, conversation)
    assert sample.input_ids[: len(prompt)].tolist() == prompt


def test_a_turn_without_an_end_marker_ends_with_its_text(make_tokenizer, talk):
    tokenizer = make_tokenizer(H_REASONING)
    sample = tokenise(tokenizer, talk("s:x", "u:What?", "a:state ", "u:And?", "a:more\n"), max_length=LONG)
    assert spans(tokenizer, sample) == ["state ", "more\n"]


@pytest.mark.parametrize(("thinking", "opened"), [(None, "<think>\n\n</think>\n\n"), (True, "")])
def test_tags_that_only_the_template_writes_train_nothing(make_tokenizer, talk, thinking, opened):
    tokenizer = make_tokenizer(EMPTY_PAIR)
    sample = tokenise(tokenizer, talk("u:What?", "a: state "), max_length=LONG, thinking=thinking)
    assert spans(tokenizer, sample) == ["state<|im_end|>"]
    assert f"assistant\n{opened}state" in tokenizer.decode(sample.input_ids)


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
    sample = tokenise(tokenizer, conversation, max_length=LONG)
    assert spans(tokenizer, sample) == [loss]
    assert sample.loss_mask[-1] == 1  # nothing follows
    prompt = prompt_before_last(tokenizer, conversation)
    assert sample.input_ids[: len(prompt)].tolist() == prompt


def test_only_the_last_answer_is_the_one_cut_off(make_tokenizer, talk):
    tokenizer = make_tokenizer()
    sample = tokenise(tokenizer, talk("u:What?", "a:state", "u:And?", "a:mo", complete=False), max_length=LONG)
    assert spans(tokenizer, sample) == ["state<|im_end|>", "mo"]


def test_without_a_template_contents_are_joined_and_an_answer_ends_with_eos(make_tokenizer, talk):
    tokenizer = make_tokenizer(None)
    sample = tokenise(tokenizer, talk("u:def f():\n", "a:    return 1\n"), max_length=LONG)
    assert tokenizer.decode(sample.input_ids) == "def f():\n    return 1\n<|im_end|>"
    assert spans(tokenizer, sample) == ["    return 1\n<|im_end|>"]


def test_messages_the_template_refuses_are_named(make_tokenizer, talk):
    with pytest.raises(RenderError, match="no system turns here"):
        tokenise(make_tokenizer(STRICT), talk("s:x", "u:What?", "a:state"), max_length=LONG)


def test_a_conversation_without_an_answer_is_refused(make_tokenizer, talk):
    with pytest.raises(NotMaskable, match="no assistant turn"):
        tokenise(make_tokenizer(), talk("u:What?"), max_length=LONG)


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, STRICT])  # STRICT's generation prompt ends with a space
def test_a_tokenizer_that_trims_offsets_masks_the_same_tokens(make_tokenizer, talk, template):
    plain, trimming = make_tokenizer(template), make_tokenizer(template)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    conversation = talk("u:What? ", "a: state of\n a hybrid ", "u: And?", "a:<think>more</think>\n")
    expected, found = (tokenise(tokenizer, conversation, max_length=LONG) for tokenizer in (plain, trimming))
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert found.loss_mask.tolist() == expected.loss_mask.tolist()


_TEXT = st.text(alphabet=st.sampled_from("ab .\n\tэ🙂<think>/"), min_size=1, max_size=30).filter(str.strip)
_TOKENIZER = tiny.make_tokenizer(["ab ab.\n\n ab\t", "a\n\nb  a"], 320)


@settings(max_examples=150)
@given(st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=3))
def test_loss_tokens_lie_inside_the_answers_whatever_they_contain(pairs):
    """Ids are the template's; loss tokens spell answer and end, but for a token merged with the prompt's last."""
    messages = [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    conversation = Conversation(tuple(messages))
    sample = tokenise(_TOKENIZER, conversation, max_length=LONG)
    assert sample.input_ids.tolist() == rendered(_TOKENIZER, conversation)
    found = spans(_TOKENIZER, sample)
    assert len(found) == len(pairs)
    for text, (_, answer) in zip(found, pairs, strict=True):
        whole = answer + "<|im_end|>"
        assert whole.endswith(text)
        assert whole.removesuffix(text).strip("\n") == ""  # only newlines can merge with the one after the header


def test_a_tokenizer_without_offsets_is_refused(make_tokenizer, talk):
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="offsets"):
        tokenise(Slow(), talk("u:What?", "a:state"), max_length=LONG)
