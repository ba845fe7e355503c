"""A target whose tokenizer has no token to spare trains, cached and online, with one that its data never uses."""

import json

import pytest

from nemotron_dspark import stages
from nemotron_dspark.config import load_config
from nemotron_dspark.recipe import tiny
from nemotron_dspark.recipe.describe import inspect
from tests.training import small_cache

ROWS = [
    [("user", f"keep block {n}"), ("assistant", "every accepted token moves the state by one step")] for n in "0123"
]


@pytest.fixture
def target(tmp_path):
    """A tiny llama whose special tokens have names of their own, and no row of the embedding without a token."""
    tokenizer = tiny.make_tokenizer(["the state of a hybrid model", "advance(state, block)"], 384)
    folder = tiny.random_target(tmp_path / "target", "llama", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((folder / file).read_text().replace("<SPECIAL_", "<kind_"))
    return folder


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"conversations": [{"role": role, "content": text} for role, text in turns]} for turns in ROWS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_it_is_counted_over_the_data_and_the_same_everywhere(target, data, tmp_path):
    config = load_config(str(target), assignments=[*small_cache.SETTINGS, "data.min_loss_tokens=2"])
    found = inspect(config)
    assert found.mask_token is None
    assert "counted over the data" in found.mask_reason
    built = stages.build_cache(config, data, tmp_path / "cache")
    assert built.mask_token.id == 31
    assert "<kind_31>" in built.mask_token.reason
    stages.train(config, tmp_path / "cached", cache=tmp_path / "cache")
    stages.train(config, tmp_path / "online", data=data)
    for run in ("cached", "online"):
        assert json.loads((tmp_path / run / "draft" / "config.json").read_text())["mask_token_id"] == 31
        notes = json.loads((tmp_path / run / "run.json").read_text())["notes"]
        assert any(note.startswith("mask token 31: <kind_31>, the last special token") for note in notes)
    assert stages.train(config, tmp_path / "online", data=data).resumed_from == 4
