"""One conversation is as many samples as its template makes necessary, and every count says so."""

import json

import pytest

from nemotron_dspark.config.run import DataConfig
from nemotron_dspark.data.check import check_data
from nemotron_dspark.data.conversations import Skipped
from nemotron_dspark.data.samples import read_samples
from nemotron_dspark.recipe import tiny
from tests.chat.chat_templates import NEMOTRON_3

ANY = DataConfig(min_loss_tokens=1)


@pytest.fixture
def tokenizer():
    tokenizer = tiny.make_tokenizer(["state of a hybrid model\n\n", "<think> and answer.\n"], 384)
    tokenizer.chat_template = NEMOTRON_3
    return tokenizer


@pytest.fixture
def write(tmp_path):
    """``write(["long", "short"], …)`` writes one conversation a list, an answer a text, and returns the file."""

    def make(*conversations):
        path = tmp_path / "data.jsonl"
        lines = []
        for answers in conversations:
            turns = [("user", "What?"), ("assistant", "")] * len(answers)
            turns = [(r, answers[n // 2] if r == "assistant" else c) for n, (r, c) in enumerate(turns)]
            lines.append(json.dumps({"conversations": [{"role": r, "content": c} for r, c in turns]}))
        path.write_text("\n".join(lines))
        return path

    return make


def test_samples_of_a_conversation_follow_each_other(tokenizer, write):
    file = write(["<think>a</think>b", "<think>c</think>d"], ["e", "f"], ["<think>g</think>h"])
    found = list(read_samples(file, tokenizer, ANY))
    assert [item.line for item in found] == [1, 1, 2, 3]
    losses = [tokenizer.decode(item.tokens.input_ids[item.tokens.loss_mask == 1]) for item in found]
    end = "<|im_end|>"
    assert losses == [f"a</think>b{end}", f"c</think>d{end}", f"e{end}f{end}", f"g</think>h{end}"]


def test_short_turns_are_left_out_and_counted_once_a_conversation(tokenizer, write):
    long = "<think>state</think>state of a hybrid model"
    file = write([long, "<think>b</think>c", "<think>d</think>e"], ["f"])
    *kept, part, whole = read_samples(file, tokenizer, DataConfig(min_loss_tokens=6))
    assert [item.line for item in kept] == [1]
    assert part == Skipped(1, "a turn of fewer than 6 loss tokens; the rest is used")
    assert whole == Skipped(2, "fewer than 6 loss tokens")


def test_an_answer_of_another_mode_is_said(tokenizer, write):
    sample, said = read_samples(write(["lost", "<think>a</think>b"]), tokenizer, ANY)
    assert tokenizer.decode(sample.tokens.input_ids[sample.tokens.loss_mask == 1]) == "a</think>b<|im_end|>"
    assert said == Skipped(1, "an answer that does not fit the conversation's thinking mode; the rest is used")


def test_a_check_counts_conversations_once_and_samples_each(tokenizer, write):
    file = write(["<think>a</think>b", "<think>c</think>d"], ["e", "f"], [" "])
    report = check_data(file, tokenizer, ANY)
    assert (report.conversations, report.answers, report.samples) == (2, 4, 3)
    samples = [item.tokens for item in read_samples(file, tokenizer, ANY) if not isinstance(item, Skipped)]
    assert report.tokens == sum(len(sample.input_ids) for sample in samples)
    assert report.loss_tokens == sum(sample.loss_tokens for sample in samples)
    assert report.skipped.total == 1
    assert check_data(file).samples is None
