"""vLLM reads our drafts: its config, its loading, its model's numbers. NDS_VLLM_PYTHON is its interpreter."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_dspark.config import load_config
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.targets import Target

PYTHON = os.environ.get("NDS_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not PYTHON, reason="NDS_VLLM_PYTHON is not set; make test-engines sets it"),
]


@pytest.fixture(scope="module", params=["hybrid", "llama"])
def pair(request, tiny_hybrid, tiny_llama, tmp_path_factory):
    """Target folder, draft folder and draft: two layers, random weights that are far from their initial ones."""
    folder = {"hybrid": tiny_hybrid, "llama": tiny_llama}[request.param]
    config = load_config(str(folder), draft={"num_layers": 2, "num_taps": 3, "markov_rank": 16})
    target = Target.of(config.target)
    made, _ = build_draft_config(target.spec, config.draft, mask_token_id=31)
    draft = DSparkDraft(made)
    with torch.no_grad():
        for parameter in draft.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.head.weight)
    out = tmp_path_factory.mktemp("draft") / "draft"
    draft.save(out)
    return folder, out, draft.eval()


def vllm(target: Path, draft: Path, states: Path, out: Path) -> dict:
    script = Path(__file__).with_name("vllm_draft.py")
    done = subprocess.run(
        [PYTHON, str(script), str(target), str(draft), str(states), str(out)],
        capture_output=True,
        text=True,
        timeout=600,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def test_vllms_draft_model_computes_what_ours_does(pair, tmp_path):
    target, folder, draft = pair
    length, block = 11, draft.config.block_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(32, draft.config.vocab_size, (1, length + 1), generator=generator)
    taps = torch.randn(1, length + 1, draft.config.num_taps * draft.config.hidden_size, generator=generator)
    ids = torch.full((block,), draft.config.mask_token_id)
    ids[0] = tokens[0, length]
    states = {"ids": ids, "taps": taps[0, :length].contiguous(), "position": torch.tensor(length)}
    save_file(states, tmp_path / "states.safetensors")

    said = vllm(target, folder, tmp_path / "states.safetensors", tmp_path / "out.safetensors")

    assert said["method"] == "dspark"
    assert said["architectures"] == ["Qwen3DSparkModel"]
    assert said["layers"] == [tap + 1 for tap in draft.config.target_layer_ids]
    assert "does not support: dspark" in said["refused"] or "requires Triton" in said["refused"]
    theirs = load_file(tmp_path / "out.safetensors")
    hidden = draft(tokens, taps, torch.tensor([[length]]), torch.tensor([[True]]))[0, 0]
    base = draft.base_logits(hidden)
    torch.testing.assert_close(theirs["base"], base, atol=2e-4, rtol=2e-4)
    previous = ids[:1]
    for slot in range(block):
        embedded = draft.markov_head.embed(previous, hidden.dtype)
        confidence = draft.confidence(hidden[slot : slot + 1], previous)[0].sigmoid()
        torch.testing.assert_close(theirs["confidences"][slot], confidence, atol=1e-4, rtol=1e-4)
        logits = base[slot] + (embedded @ draft.markov_head.markov_w2.weight.T)[0]
        torch.testing.assert_close(theirs["logits"][slot], logits, atol=2e-4, rtol=2e-4)
        previous = logits.argmax()[None]
