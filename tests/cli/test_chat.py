"""`nds chat` shows exactly the tokens that train, from a folder with nothing but tokenizer and config."""

import json

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from nemotron_dspark.chat.mask import tokenise
from nemotron_dspark.cli import app, chat_command, shell
from nemotron_dspark.data.conversations import Skipped, read
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny
from tests.chat.chat_templates import NEMOTRON_3

SET = ["--set", "data.min_loss_tokens=2"]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Tokenizer and config of a target whose template drops the reasoning of earlier turns; no weights."""
    folder = tmp_path_factory.mktemp("chat") / "target"
    tokenizer = tiny.make_tokenizer(["state of a hybrid model\n\n", "<think> and answer.\n"], 384)
    tokenizer.chat_template = NEMOTRON_3
    tokenizer.save_pretrained(folder)
    tiny.nemotron_h_config().save_pretrained(folder)
    return folder


@pytest.fixture
def conversations(tmp_path):
    def line(*contents):
        roles = ("user", "assistant") * len(contents)
        return json.dumps({"conversations": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]})

    path = tmp_path / "conv.jsonl"
    two = "What?", "<think>\nOne.\n</think>\nA [bold]state🙂.", "And?", "<think>\nTwo.\n</think>\nMore."
    path.write_text(
        "\n".join([line(*two), "{broken", line("Who?", ""), line("lost?", "No.", "so?", "<think>x</think>y")])
    )
    return path


def run(target, conversations, *options):
    return CliRunner().invoke(app, ["chat", "-t", str(target), "-d", str(conversations), *SET, *options])


def test_what_trains_stands_in_brackets_where_there_is_no_colour(target, conversations):
    result = run(target, conversations)
    assert result.exit_code == 0, result.output
    shown = [part.partition("⟧")[0] for part in result.stdout.split("⟦")]
    assert shown[2:] == [  # the first is before the legend, the second in it
        "One.↵\n</think>↵\nA [bold]state🙂.<|im_end|>",
        "Two.↵\n</think>↵\nMore.<|im_end|>",
        "x</think>y<|im_end|>",
    ]
    assert "line 1, 2 samples" in result.stdout
    assert "line 2 skipped: not valid JSON" in result.stdout
    assert "line 3 skipped: empty answer" in result.stdout
    assert "line 4: an answer that does not fit the conversation's thinking mode" in result.stdout
    assert "conversations 2, samples 3" in result.stdout


def test_colours_cover_the_trained_tokens_and_nothing_else(target, conversations, monkeypatch):
    monkeypatch.setattr(shell, "out", Console(force_terminal=True, color_system="truecolor", no_color=False))
    from nemotron_dspark.chat.mask import stretches
    from nemotron_dspark.targets import Checkpoint

    tokenizer = Checkpoint.find(target).load_tokenizer()
    usable = [item for item in read(conversations) if not isinstance(item, Skipped)]
    for sample in tokenise(tokenizer, usable[0], max_length=999).samples:
        found = stretches(tokenizer, sample)
        text = chat_command._coloured(found)
        assert text.plain == tokenizer.decode(sample.input_ids).replace("\n", "↵\n")
        green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
        loss = tokenizer.decode(sample.input_ids[sample.loss_mask == 1])
        assert "".join(green) == loss.replace("\n", "↵\n")
        assert {stretch.text for stretch in found if stretch.special and not stretch.trained} >= {
            "<|im_start|>",
            "<think>",
        }


def test_json_is_one_object_with_ids_tokens_and_mask(target, conversations):
    result = run(target, conversations, "--json")
    found = json.loads(result.stdout)
    assert found["format"] == "nemotron_3"
    assert [conversation["line"] for conversation in found["conversations"]] == [1, 4]
    assert [item["line"] for item in found["skipped"]] == [2, 3]
    samples = [sample for conversation in found["conversations"] for sample in conversation["samples"]]
    assert all(len(sample["ids"]) == len(sample["tokens"]) == len(sample["mask"]) for sample in samples)
    assert found["loss_tokens"] == int(np.sum([sum(sample["mask"]) for sample in samples]))
    assert found["tokens"] == sum(len(sample["ids"]) for sample in samples)
    last = samples[-1]
    trained = [token for token, mask in zip(last["tokens"], last["mask"], strict=True) if mask]
    assert "".join(trained) == "x</think>y<|im_end|>"
    assert found["conversations"][1]["left_out"]


def test_a_limit_says_that_there_is_more(target, conversations):
    result = run(target, conversations, "--limit", "1")
    assert "conversations 1, samples 2" in result.stdout
    assert "--limit" in result.stdout
    assert json.loads(run(target, conversations, "--limit", "1", "--json").stdout)["more"] is True
    assert json.loads(run(target, conversations, "--limit", "2", "--json").stdout)["more"] is False


def test_settings_are_those_of_a_build(target, conversations):
    found = json.loads(run(target, conversations, "--json", "--set", "data.thinking=false").stdout)
    (conversation,) = found["conversations"]
    (sample,) = conversation["samples"]
    trained = [token for token, mask in zip(sample["tokens"], sample["mask"], strict=True) if mask]
    assert (conversation["line"], "".join(trained)) == (4, "No.<|im_end|>")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is not a file"),
        ("{broken\n[1]\n", "no usable conversation: 1 skipped: not valid JSON"),
        ("", "is empty"),
    ],
)
def test_a_file_with_nothing_to_show_is_an_error(target, tmp_path, text, said):
    path = tmp_path / "conv.jsonl"
    if text is not None:
        path.write_text(text)
    result = run(target, path, "--json")
    assert isinstance(result.exception, InputError)
    assert said in result.exception.what
    assert result.stdout == ""


def test_a_folder_without_a_tokenizer_is_an_error(conversations, tmp_path):
    tiny.nemotron_h_config().save_pretrained(tmp_path / "bare")
    result = run(tmp_path / "bare", conversations)
    assert isinstance(result.exception, InputError)
    assert "no tokenizer" in result.exception.what
