"""`nds taps search`: the rows it regresses on are the target's own, and a person gets a table, a picture and a flag."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nemotron_dspark.cli import app
from nemotron_dspark.config import DataConfig, load_config
from nemotron_dspark.data.samples import LinedSample, read_samples
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import taps
from nemotron_dspark.targets import Target
from nemotron_dspark.targets.tap_search import PARTS
from nemotron_dspark.targets.taps import check_taps

GAMMA = 3
HIDDEN = 64
DATA = DataConfig(min_loss_tokens=4)


@pytest.fixture(scope="module")
def target(tiny_hybrid):
    return Target.load(str(tiny_hybrid))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """Twenty conversations of different lengths, one of two answers, and lines that are no use."""
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    words = ["the", "state", "of", "a", "model", "is", "not", "only", "keys", "and", "values"]
    rows = [
        {
            "conversations": [
                {"role": "user", "content": f"{at} of"},
                {"role": "assistant", "content": " ".join(words[at % 5 :][: 3 + at % 4])},
            ]
        }
        for at in range(20)
    ]
    rows[4]["conversations"] += rows[9]["conversations"]
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([*lines[:6], "not json", '{"conversations": []}', *lines[6:]]) + "\n")
    return path


def collected(target, file, **changes):
    settings = {"gamma": GAMMA, "tokens": 100_000, "width": 128, "seed": 0, "data": DATA} | changes
    return taps.collect(target, file, **settings)


def test_rows_are_the_taps_and_the_later_states_of_positions_whose_tokens_are_answers(target, conversations):
    data, count = collected(target, conversations)
    layers = tuple(range(target.spec.num_layers - 1))
    expected = []
    for sample in read_samples(conversations, target.tokenizer, DATA):
        if not isinstance(sample, LinedSample):
            continue
        ids = torch.from_numpy(sample.tokens.input_ids.astype(np.int64))
        captured = target.capture(ids[None], None, layers)
        inside = sample.tokens.loss_mask != 0
        for t in range(len(ids) - GAMMA - 1):
            if inside[t + 1 : t + GAMMA + 2].all():
                later = captured.last[0, t + 2 : t + GAMMA + 2]
                expected.append((captured.taps[0, t].view(len(layers), HIDDEN), later))
    assert count == 20
    assert data.features.shape == (len(expected), len(layers), HIDDEN)
    assert data.targets.shape == (len(expected), GAMMA, HIDDEN)
    found = [(features, later) for features, later in zip(data.features, data.targets, strict=True)]
    for rows in (found, expected):  # drawn in another order
        rows.sort(key=lambda row: (row[0].sum().item(), row[1].sum().item()))
    for at in (0, 1):
        torch.testing.assert_close(torch.stack([row[at] for row in found]), torch.stack([row[at] for row in expected]))


def test_no_conversation_is_in_two_parts(target, conversations):
    data, count = collected(target, conversations)
    assert data.conversations.unique().tolist() == list(range(count))
    assert data.conversations.diff().min() == 0  # all rows of one conversation together
    assert set(data.parts.tolist()) == set(PARTS)


def test_rows_are_the_same_for_a_seed_and_others_for_another(target, conversations):
    first, again = (collected(target, conversations, tokens=100, width=16)[0] for _ in range(2))
    assert torch.equal(first.features, again.features)
    assert torch.equal(first.targets, again.targets)
    other = collected(target, conversations, tokens=100, width=16, seed=1)[0]
    assert first.features.shape != other.features.shape or not torch.equal(first.features, other.features)


def test_no_conversation_gives_more_than_its_share(target, conversations):
    data, count = collected(target, conversations, tokens=60)
    assert data.conversations.bincount().max() == 60 // 20
    assert count == 20
    assert len(data.conversations) <= 60


def test_pieces_of_layers_give_what_one_forward_gives(target, conversations, monkeypatch):
    whole = collected(target, conversations, tokens=100, width=16)[0]
    monkeypatch.setattr(taps, "_PIECE_BYTES", 30 * HIDDEN * 4 * 2 * 3)
    pieces = collected(target, conversations, tokens=100, width=16)[0]
    torch.testing.assert_close(pieces.features, whole.features)
    assert torch.equal(pieces.targets, whole.targets)


def test_a_projection_maps_equal_layers_to_equal_numbers_and_keeps_small_dimensions():
    project = taps._Projection(hidden=64, width=16, seed=0)
    states = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    huge = states.clone()
    huge[:, 5] = 1e4  # as some dimensions of large models are
    found = project.features(torch.stack([states, states, huge], dim=1), 0)
    assert found.shape == (200, 3, 16)
    assert torch.equal(found[:, 0], found[:, 1])
    spread = [float((found[:, at] - found[:, at].mean(0)).norm()) for at in (0, 2)]
    assert spread[1] == pytest.approx(spread[0], rel=0.1)
    assert torch.equal(taps._Projection(64, 64, 0).features(huge[:, None], 0)[:, 0], huge)  # narrow enough: left alone


@pytest.fixture
def nds(tiny_hybrid, conversations, tmp_path):
    """Run `nds taps search` on the tiny target; the result has exit_code, stdout, stderr and exception."""
    base = ["taps", "search", "--target", str(tiny_hybrid), "--data", str(conversations), "--out", str(tmp_path)]
    small = ["--tokens", "300", "--set", "data.min_loss_tokens=4", "--set", "draft.block_size=3"]
    return lambda *arguments: CliRunner().invoke(app, [*base, *small, *arguments])


def test_search_prints_a_table_a_picture_and_the_flag_to_use(nds, tmp_path, target):
    result = nds("--count", "3")
    assert result.exit_code == 0, result.exception
    found = json.loads((tmp_path / "taps.json").read_text())
    assert check_taps(target.spec, found["taps"]) == tuple(found["taps"])
    assert [one["layer"] for one in sorted(found["layers"], key=lambda one: -one["alone"])] == [
        one["layer"] for one in found["layers"]
    ]
    assert sorted(one["layer"] for one in found["layers"] if one["order"]) == found["taps"]
    assert (tmp_path / "taps.png").read_bytes().startswith(b"\x89PNG")
    listed = ",".join(map(str, found["taps"]))
    *_, last = result.stdout.strip().splitlines()
    assert f"--taps {listed} " in last
    assert f"draft: {{taps: [{listed}]}}" in last
    assert load_config(assignments=[f"draft.taps={listed}"]).draft.taps == found["taps"]
    for word in ("Mamba-2", "attention", "default", "even", "searched", "20 conversations"):
        assert word in result.stdout
    assert "positions that count, not 300" in result.stderr


def test_json_is_one_object_and_nothing_else(nds, tmp_path):
    result = nds("--json", "--set", "draft.num_taps=2")
    assert result.exit_code == 0, result.exception
    value = json.loads(result.stdout)
    assert len(value["taps"]) == 2  # the count of the configuration
    assert value["picture"] == str(tmp_path / "taps.png")
    assert {key: value[key] for key in json.loads((tmp_path / "taps.json").read_text())}.keys() == value.keys() - {
        "picture"
    }
    assert value["ahead"] == [2, 3, 4]


def test_more_taps_than_layers_are_refused(nds):
    result = nds("--count", "8")
    assert isinstance(result.exception, InputError)
    assert "7 layers that may be one" in result.exception.what


def test_too_few_conversations_are_refused(tiny_hybrid, conversations, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(conversations.read_text().splitlines()[16:20]))
    arguments = ["taps", "search", "--target", str(tiny_hybrid), "--data", str(few), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--set", "data.min_loss_tokens=4"])
    assert isinstance(result.exception, InputError)
    assert "usable conversations, and a search needs 5" in result.exception.what
