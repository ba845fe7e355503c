"""Bundled chat formats are complete, recognise their own templates and render what their markers say."""

import pytest
import yaml

from nemotron_dspark.chat.format import Message, bundled_formats, load_format, recognise, render_prompt
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.resources import resource_folder
from tests.chat.chat_templates import H_REASONING, NANO_V2, NEMOTRON_3, STRICT

TEMPLATES = {
    "chatml": tiny.CHAT_TEMPLATE,
    "nemotron_3": NEMOTRON_3,
    "nemotron_nano_v2": NANO_V2,
    "nemotron_h_reasoning": H_REASONING.replace("\n{%- for", "{%- set x = \"{'reasoning': True}\" -%}{%- for", 1),
    "plain": None,
}


def test_every_file_loads_under_its_own_name():
    names = {path.stem for path in resource_folder("templates").glob("*.yaml")}
    assert names == set(bundled_formats())
    assert {"plain", "chatml", "nemotron_3", "nemotron_nano_v2", "nemotron_h_reasoning", "llama3"} <= names
    assert all(chat_format.checked for chat_format in bundled_formats().values())


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_recognised(name, make_tokenizer):
    assert recognise(make_tokenizer(TEMPLATES[name])).name == name


def test_a_template_nobody_described(make_tokenizer):
    assert recognise(make_tokenizer(STRICT)) is None


@pytest.mark.parametrize("name", ["chatml", "nemotron_3", "nemotron_nano_v2", "nemotron_h_reasoning"])
def test_markers_are_what_the_template_prints(name, make_tokenizer):
    tokenizer, chat_format = make_tokenizer(TEMPLATES[name]), bundled_formats()[name]
    messages = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant")]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    for marker, content in ((chat_format.system, "SYSTEM"), (chat_format.user, "USER")):
        assert marker + content in text
    assert chat_format.assistant in text
    assert text.endswith("ASSISTANT" + (chat_format.end_of_turn or ""))


def test_the_prompt_ends_where_the_target_starts_to_write(make_tokenizer):
    tokenizer = make_tokenizer(NEMOTRON_3)
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
    ],
)
def test_a_malformed_format_is_named(tmp_path, change, said):
    values = yaml.safe_load((resource_folder("templates") / "chatml.yaml").read_text()) | change
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not ...}))
    with pytest.raises(InputError, match=f"mine.yaml.*{said}"):
        load_format(path)
