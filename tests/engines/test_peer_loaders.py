"""speculators and ModelOpt load the drafts that are exported for them, every tensor in its place.

NDS_PEERS names the folders of their unpacked wheels (speculators, hs-connectors, loguru, pydantic-settings;
nvidia-modelopt, omegaconf, antlr4-python3-runtime, pulp, nvidia-ml-py), separated by colons.
"""

import os
import subprocess
import sys

import pytest
import torch

from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.engines.exchange import export_draft
from nemotron_dspark.targets import Checkpoint

PEERS = os.environ.get("NDS_PEERS", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not PEERS, reason="needs NDS_PEERS: the folders of unpacked wheels of speculators and ModelOpt"),
]

SPECULATORS = """
from speculators import SpeculatorModel
model = SpeculatorModel.from_pretrained(folder)
assert model.config.aux_hidden_state_layer_ids == [1, 2] and model.config.sample_from_anchor
held, rename = model.state_dict(), lambda name: name
"""
MODELOPT = """
from safetensors.torch import load_file
from transformers import Qwen3Config
from modelopt.torch.speculative.plugins.modeling_dspark import DSparkModule
values = json.load(open(f"{folder}/config.json"))
config = Qwen3Config(**{key: value for key, value in values.items() if key != "dflash_config"})
for key, value in values["dflash_config"].items():
    setattr(config, key, value)
model = DSparkModule(config)
print(model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=True))
held = model.state_dict()
def rename(name):
    return name.replace("markov_head.", "").replace("confidence_head.proj", "confidence_proj")
"""
COMPARE = """
ours = torch.load(sys.argv[2], weights_only=True)
different = [name for name, tensor in ours.items() if not torch.equal(held[rename(name)], tensor)]
assert not different, different
print("same", len(ours))
"""


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize(
    ("format_name", "package", "load"),
    [
        ("speculators", "speculators", SPECULATORS),
        ("modelopt", "modelopt", MODELOPT),
    ],
)
def test_its_own_loader_finds_every_tensor(tiny_llama, tmp_path, format_name, package, load, head):
    if not any(os.path.isdir(os.path.join(folder, package)) for folder in PEERS.split(":")):
        pytest.skip(f"needs {package} in a folder of NDS_PEERS")
    target = Checkpoint.find(tiny_llama)
    spec = target.read_spec()
    config = DraftConfig(
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        num_target_layers=spec.num_layers,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=12345.0,
        max_position_embeddings=512,
        block_size=5,
        mask_token_id=20,
        target_layer_ids=(0, 1),
        markov_rank=8,
        markov_head_type=head,
    )
    draft = DSparkDraft(config, seed=3)
    draft.save(tmp_path / "draft", slim=True)
    export_draft(tmp_path / "draft", format_name, tmp_path / "out", target)
    weights = {name: tensor for name, tensor in draft.state_dict().items() if not tensor.is_meta}
    torch.save(weights, tmp_path / "ours.pt")
    code = "import json, sys, torch\nfolder = sys.argv[1]\n" + load + COMPARE
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "ours.pt")],
        env={**os.environ, "PYTHONPATH": PEERS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert f"same {len(weights)}" in run.stdout
