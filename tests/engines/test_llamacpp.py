"""llama.cpp's real server with our exported pairs. NDS_LLAMACPP is the path of llama-server.

The demo's hybrid target, made on the spot, is served with drafts that are trained on its answers: greedy answers are
those of plain decoding, and the accepted length is that of our own decoder.
"""

import json
import os

import pytest
import torch

from benchmarks.engines import compare
from nemotron_dspark import train
from nemotron_dspark.config import load_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.recipe.demo import Budget, run_demo
from nemotron_dspark.resources import resource_folder
from tests.engines.pairs import write_random_draft

SERVER = os.environ.get("NDS_LLAMACPP", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(not SERVER, reason="NDS_LLAMACPP is not set; make test-engines sets it"),
]
TOKENS = 160


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's run folder, with a target and a draft, in a minute; sixteen of its prompts are in few.jsonl."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    run_demo(folder, Budget().scaled(0.15))
    rows = (folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(rows[:16]))
    return folder


def config_for(target):
    return load_config(
        {"name": str(target), "dtype": "float32"}, eval={"max_new_tokens": TOKENS, "temperatures": [0.0]}
    )


def weakened(source, out, noise):
    """A copy of a draft with noise in its matrices, which drafts less well and so tells more."""
    draft = DSparkDraft.load(source)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.trainable_parameters().values():
            if parameter.ndim > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * noise)
    draft.save(out)
    return out


def assert_same(found):
    assert found.identical == found.lossless == found.prompts
    assert found.theirs == pytest.approx(found.ours, rel=0.05)
    assert found.their_tokens_a_pass == pytest.approx(found.our_tokens_a_pass, rel=0.02)
    assert found.their_slots == pytest.approx(found.our_slots, abs=0.06)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_hybrid_and_its_draft_are_served_as_here(demo, noise, tmp_path):
    draft = demo / "run" / "draft"
    if noise:
        draft = weakened(draft, tmp_path / "weak", noise)
    found = compare(config_for(demo / "target"), draft, demo / "few.jsonl", tmp_path / "gguf", SERVER)
    assert found.ours > 1.5
    assert_same(found)


def test_other_shapes_of_draft_are_served_as_here(demo, tmp_path):
    """Two layers, a block of five, the embedding as a tap, no Markov head, a confidence head that reads no token."""
    config = load_config(
        str(demo / "target"),
        file=resource_folder("configs") / "demo.yaml",
        draft={
            "num_layers": 2,
            "block_size": 5,
            "taps": [-1, 2, 5],
            "markov_rank": 0,
            "confidence_with_markov": False,
            "mask_token_id": 31,
        },
        train={"max_steps": 200},
    )
    train(config, tmp_path / "run", data=demo / "conversations.jsonl")
    draft = tmp_path / "run" / "draft"
    found = compare(config_for(demo / "target"), draft, demo / "few.jsonl", tmp_path / "gguf", SERVER)
    assert found.ours > 1.5
    assert_same(found)


def test_a_llama_and_its_draft_are_served_as_here(tiny_llama, tmp_path):
    """Random weights: what a draft of them accepts is chance, and the same here and there."""
    draft = write_random_draft(tmp_path / "draft", tiny_llama)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "state " * count}) + "\n" for count in range(1, 9)))
    found = compare(config_for(tiny_llama), draft, prompts, tmp_path / "gguf", SERVER)
    assert_same(found)
