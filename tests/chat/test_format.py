"""Bundled chat formats are complete, recognise their own templates and render what their markers say."""

import re

import pytest
import yaml
from tokenizers import processors

from nemotron_dspark.chat.format import (
    Conversation,
    Message,
    bundled_formats,
    load_format,
    recognise,
    render,
    render_prompt,
)
from nemotron_dspark.chat.mask import tokenise
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.resources import resource_folder
from tests.chat import chat_templates as templates

TEMPLATES = {
    "chatml": tiny.CHAT_TEMPLATE,
    "qwen3": templates.QWEN3,
    "qwen3_5": templates.QWEN3_5,
    "nemotron_3": templates.NEMOTRON_3,
    "nemotron_3_super": templates.NEMOTRON_3_SUPER,
    "nemotron_3_ultra": templates.NEMOTRON_3_ULTRA,
    "nemotron_nano_v2": templates.NANO_V2,
    "nemotron_h_reasoning": templates.H_REASONING,
    "llama3": templates.LLAMA3,
    "llama_nemotron": templates.LLAMA_NEMOTRON,
    "nemotron_mini": templates.NEMOTRON_MINI,
    "gemma": templates.GEMMA,
    "granite": templates.GRANITE,
    "plain": None,
}
NAMES = [name for name in TEMPLATES if name != "plain"]
SWITCHES = {  # of a target whose reasoning no argument of its template switches: system texts, on and off
    "nemotron_nano_v2": ("/think", "/no_think"),
    "nemotron_h_reasoning": ("{'reasoning': True}", "{'reasoning': False}"),
    "llama_nemotron": ("detailed thinking on", "detailed thinking off"),
}


def test_every_family_has_its_file_and_every_file_loads_under_its_own_name():
    names = {path.stem for path in resource_folder("templates").glob("*.yaml")}
    assert names == set(bundled_formats()) == set(TEMPLATES)
    assert all(chat_format.checked for chat_format in bundled_formats().values())


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_told_from_its_relatives(name, make_tokenizer):
    assert recognise(make_tokenizer(TEMPLATES[name])).name == name


@pytest.mark.parametrize("name", NAMES)
def test_a_template_is_recognised_however_it_writes_its_line_breaks(name, make_tokenizer):
    escaped = re.sub(r"'[^'{}%]*'", lambda quoted: quoted[0].replace("\n", "\\n"), TEMPLATES[name])
    tokenizer = make_tokenizer(escaped)
    assert recognise(tokenizer).name == name
    messages = [Message("user", "What?")]
    assert render_prompt(tokenizer, messages) == render_prompt(make_tokenizer(TEMPLATES[name]), messages)


def test_a_template_nobody_described(make_tokenizer):
    assert recognise(make_tokenizer(templates.STRICT)) is None


@pytest.mark.parametrize("name", NAMES)
def test_markers_are_what_the_template_prints(name, make_tokenizer):
    tokenizer, chat_format = make_tokenizer(TEMPLATES[name]), bundled_formats()[name]
    messages = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant", "user")]
    text = tokenizer.apply_chat_template(messages[:3], tokenize=False)
    if chat_format.system is not None:
        assert chat_format.system + "SYSTEM" in text
    else:
        assert chat_format.user + "SYSTEM\n\nUSER" in text
    user = chat_format.user + ("SYSTEM\n\n" if chat_format.system is None else "")
    assert user + "USER" in text
    assert chat_format.assistant in text
    assert text.rstrip().endswith("ASSISTANT" + (chat_format.end_of_turn or "").rstrip())
    followed = tokenizer.apply_chat_template(messages, tokenize=False)
    fields = chat_format.deepspec
    assert chat_format.assistant.endswith(fields.assistant_header)
    assert chat_format.user.endswith(fields.user_header)
    assert "ASSISTANT" + fields.end_of_turn_token in followed


@pytest.mark.parametrize("name", [name for name in NAMES if name != "nemotron_nano_v2"])  # prints a pair that trains
def test_deepspecs_fields_find_what_an_answer_without_reasoning_trains(name, make_tokenizer):
    """DeepSpec puts the prefix before an answer, renders, and trains from header and prefix to the end of the turn."""
    tokenizer, fields = make_tokenizer(TEMPLATES[name]), bundled_formats()[name].deepspec
    messages = [Message("user", "What?"), Message("assistant", "A state.")]
    prefix, end = fields.assistant_loss_prefix or "", fields.end_of_turn_token
    text = render(tokenizer, [messages[0], Message("assistant", prefix + "A state.")])
    trained = text.rpartition(fields.assistant_header)[2].removeprefix(prefix)
    trained = trained[: trained.index(end) + len(end)] if end in trained else trained.rstrip() + end
    (sample,) = tokenise(tokenizer, Conversation(tuple(messages)), max_length=99).samples
    assert tokenizer.decode(sample.input_ids[sample.loss_mask == 1]) == trained.rstrip("\n")


@pytest.mark.parametrize("name", [name for name in NAMES if bundled_formats()[name].thinking])
def test_the_prompt_prints_the_tags_of_its_mode(name, make_tokenizer):
    tokenizer, chat_format = make_tokenizer(TEMPLATES[name]), bundled_formats()[name]
    for thinking in (True, False):
        if name in SWITCHES:
            messages, thinks = [Message("system", SWITCHES[name][not thinking])], None
        else:
            messages, thinks = [], thinking
        ids = render_prompt(tokenizer, [*messages, Message("user", "What?")], thinks)
        tags = chat_format.thinking.when_on if thinking else chat_format.thinking.when_off
        assert tokenizer.decode(ids).endswith(chat_format.assistant + tags)


def test_the_prompt_ends_where_the_target_starts_to_write(make_tokenizer):
    tokenizer = make_tokenizer(templates.NEMOTRON_3)
    for thinking, end in ((None, "<think>\n"), (True, "<think>\n"), (False, "<think></think>")):
        ids = render_prompt(tokenizer, [Message("user", "What?")], thinking)
        assert tokenizer.decode(ids).endswith(f"<|im_start|>assistant\n{end}")


def test_no_special_tokens_are_added_to_the_rendering(make_tokenizer):
    tokenizer = make_tokenizer(None)
    assert render_prompt(tokenizer, [Message("user", "state")]) == tokenizer.encode("state", add_special_tokens=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"user": 3}, "user"),
        ({"recognise": "text"}, "recognise"),
        ({"colour": "red"}, "colour"),
        ({"user": ...}, "user"),
        ({"thinking": "on"}, "thinking"),
        ({"thinking": {"switch": "", "when_on": 1, "when_off": "", "history": ""}}, "thinking.when_on"),
        ({"deepspec": {"user_header": "x"}}, "deepspec.assistant_header"),
    ],
)
def test_a_malformed_format_is_named(tmp_path, change, said):
    values = yaml.safe_load((resource_folder("templates") / "chatml.yaml").read_text()) | change
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not ...}))
    with pytest.raises(InputError, match=f"mine.yaml.*{said}"):
        load_format(path)


def test_plain_text_begins_as_the_tokenizer_begins_it(make_tokenizer):
    tokenizer = make_tokenizer(template=None)
    assert render(tokenizer, [Message("user", "state")]) == "state"
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    messages = [Message("user", "state"), Message("assistant", "block"), Message("user", "of")]
    assert render(tokenizer, messages) == f"<s>stateblock{tokenizer.eos_token}of"
    assert render_prompt(tokenizer, messages)[:2] == tokenizer("state")["input_ids"][:2]
