"""speculators, ModelOpt and SpecForge load what is exported for them, every tensor in its place, and compute the same.

NDS_PEERS names the folders of their unpacked wheels (speculators, hs-connectors, loguru, pydantic-settings;
nvidia-modelopt, omegaconf, antlr4-python3-runtime, pulp, nvidia-ml-py; specforge), separated by colons.
"""

import os
import subprocess
import sys

import pytest
import torch

from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.engines.exchange import export_draft, import_draft
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.weights import read_embedding_and_head

PEERS = os.environ.get("NDS_PEERS", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not PEERS, reason="needs NDS_PEERS: folders of wheels of speculators, ModelOpt, SpecForge"),
]

# What each is asked in a process of its own: the hidden states, teacher-forced logits and confidences of one block.
SPECULATORS = """
from speculators import SpeculatorModel
from torch.nn.attention.flex_attention import create_mask
model = SpeculatorModel.from_pretrained(folder)
assert model.config.aux_hidden_state_layer_ids == [1, 2] and model.config.sample_from_anchor
held, rename = dict(model.state_dict()), lambda name: name
model.embed_tokens.weight.data, model.lm_head.weight.data = given["embedding"], given["head"]
model.config.transformer_layer_config._attn_implementation, model._create_mask_fn = "sdpa", create_mask
mask = torch.zeros(ids.shape)
mask[0, anchor] = 1
last = taps[..., : given["head"].shape[1]]  # for its loss
hidden, base, *_ = model._backbone_forward(taps, ids, mask, last, torch.zeros_like(ids), max_anchors=1)
embedded = model.markov_head.prev_embeddings(previous)
logits = base + model.markov_head.block_bias(prev_token_ids=previous, hidden_states=hidden)
confidence = model.confidence_head(torch.cat((hidden, embedded), dim=-1))
model.save_pretrained(f"{folder}-saved")
"""
MODELOPT = """
from safetensors.torch import load_file
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from modelopt.torch.speculative.plugins.modeling_dspark import DSparkModule
values = json.load(open(f"{folder}/config.json"))
config = Qwen3Config(**{key: value for key, value in values.items() if key != "dflash_config"})
config._attn_implementation = "sdpa"
for key, value in values["dflash_config"].items():
    setattr(config, key, value)
model = DSparkModule(config).eval()
print(model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=True))
held = model.state_dict()
def rename(name):
    return name.replace("markov_head.", "").replace("confidence_head.proj", "confidence_proj")
block = torch.full_like(previous, config.mask_token_id)
block[:, 0] = ids[:, anchor]
model.rotary_emb = Qwen3RotaryEmbedding(config)  # makes its own with an argument that transformers no longer has
embedded = given["embedding"][block]
hidden = model(embedded, taps[:, :anchor], torch.arange(anchor + previous.shape[1])[None])
logits = hidden @ given["head"].T + model.compute_markov_bias(previous, hidden)
confidence = model.compute_confidence_logits(previous, hidden)
"""
SPECFORGE = """
from transformers import Qwen3Config
from specforge.modeling.draft.dspark import DSparkDraftModel
config = Qwen3Config.from_pretrained(folder)
config._attn_implementation = "sdpa"
model, loading = DSparkDraftModel.from_pretrained(folder, config=config, output_loading_info=True)
assert not any(loading.values()), loading
model.eval()
held, rename = model.state_dict(), lambda name: name
block = torch.full_like(previous, model.mask_token_id)
block[:, 0] = ids[:, anchor]
places = torch.arange(anchor + previous.shape[1])[None]
hidden = model(places, noise_embedding=given["embedding"][block], target_hidden=taps[:, :anchor])
logits = model.apply_markov_logits(hidden @ given["head"].T, prev_token_ids=previous, hidden_states=hidden)
confidence = model.predict_confidence(hidden, prev_token_ids=previous)
model.save_pretrained(f"{folder}-saved")
"""
BEFORE = """
import json, sys, torch
folder = sys.argv[1]
given = torch.load(sys.argv[2], weights_only=True)
ids, taps, anchor, previous = given["ids"], given["taps"], given["anchor"], given["previous"]
torch.set_grad_enabled(False)
"""
COMPARE = """
ours = given["weights"]
different = [name for name, tensor in ours.items() if not torch.equal(held[rename(name)], tensor)]
assert not different, different
for name, found in (("hidden", hidden), ("logits", logits), ("confidence", confidence)):
    torch.testing.assert_close(found, given[name], rtol=1e-4, atol=1e-4, msg=lambda said: f"{name}: {said}")
print("same", len(ours))
"""


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize(
    ("format_name", "package", "load"),
    [
        ("speculators", "speculators", SPECULATORS),
        ("modelopt", "modelopt", MODELOPT),
        ("specforge", "specforge", SPECFORGE),
    ],
)
def test_its_own_loader_finds_every_tensor_and_its_model_says_the_same(
    tiny_llama, tmp_path, format_name, package, load, head
):
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
    draft = DSparkDraft(config, seed=3).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.trainable_parameters().values():  # far from what they start as
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    draft.save(tmp_path / "draft", slim=True)
    export_draft(tmp_path / "draft", format_name, tmp_path / "out", target)
    weights = {name: tensor for name, tensor in draft.state_dict().items() if not tensor.is_meta}
    torch.save({"weights": weights} | one_block(draft, target, generator), tmp_path / "ours.pt")
    code = BEFORE + load + COMPARE
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "ours.pt")],
        env={**os.environ, "PYTHONPATH": PEERS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert f"same {len(weights)}" in run.stdout
    if format_name != "modelopt":  # what it saves itself comes in
        import_draft(tmp_path / "out-saved", tmp_path / "back", target)
        back = DSparkDraft.load(tmp_path / "back")
        assert back.config == draft.config
        assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in weights.items())


@torch.no_grad()
def one_block(draft, target, generator):
    """What a block is drafted from, and its numbers here."""
    config, anchor = draft.config, 11
    found = read_embedding_and_head(target.folder, target.read_spec())
    draft.set_embeddings(found.embedding.float(), found.head.float())
    ids = torch.randint(32, config.vocab_size, (1, anchor + config.block_size + 1), generator=generator)
    taps = torch.randn(*ids.shape, config.num_taps * config.hidden_size, generator=generator)
    previous = ids[:, anchor : anchor + config.block_size]
    hidden = draft(ids, taps, torch.tensor([[anchor]]), torch.tensor([[True]]))[0]
    latents = draft.markov_head.latents(hidden, draft.markov_head.embed(previous, hidden.dtype))
    return {
        "ids": ids,
        "taps": taps,
        "anchor": anchor,
        "previous": previous,
        "embedding": draft.embed_tokens.weight.detach(),
        "head": draft.lm_head.weight.detach(),
        "hidden": hidden,
        "logits": draft.base_logits(hidden) + draft.markov_head.markov_w2(latents),
        "confidence": draft.confidence(hidden, previous),
    }
