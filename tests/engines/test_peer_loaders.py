"""speculators, ModelOpt and SpecForge load what is exported for them, every tensor in its place, and compute the same.

NDS_PEERS names the folders of their unpacked wheels (speculators, hs-connectors, loguru, pydantic-settings;
nvidia-modelopt, omegaconf, antlr4-python3-runtime, pulp, nvidia-ml-py; specforge), separated by colons.
"""

import os
import subprocess
import sys

import pytest
import torch

from nemotron_dspark.config import DraftSection
from nemotron_dspark.drafts.config import DraftConfig, build_draft_config, build_eagle3_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.engines.exchange import export_draft, import_draft
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.weights import read_embedding_and_head
from nemotron_dspark.training.batches import collate
from nemotron_dspark.training.objective import DSparkObjective, LossWeights
from tests.training.conftest import Sample

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
    needs(package)
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
    said = in_their_code(load + COMPARE, tmp_path)
    assert f"same {len(weights)}" in said
    if format_name != "modelopt":  # what it saves itself comes in
        import_draft(tmp_path / "out-saved", tmp_path / "back", target)
        back = DSparkDraft.load(tmp_path / "back")
        assert back.config == draft.config
        assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in weights.items())


@torch.no_grad()
def needs(package):
    """Skip the test where ``package`` is in no folder of NDS_PEERS."""
    if not any(os.path.isdir(os.path.join(folder, package)) for folder in PEERS.split(":")):
        pytest.skip(f"needs {package} in a folder of NDS_PEERS")


def in_their_code(code, tmp_path):
    """What ``code`` prints in a process of its own, given the exported draft in ``out`` and ours in ``ours.pt``."""
    run = subprocess.run(
        [sys.executable, "-c", BEFORE + code, str(tmp_path / "out"), str(tmp_path / "ours.pt")],
        env={**os.environ, "PYTHONPATH": PEERS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


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


# Blocks of a sequence in its training forward, under its own mask, and the gradients of their squares.
MODELOPT_BLOCKS = """
from types import SimpleNamespace
from safetensors.torch import load_file
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from modelopt.torch.speculative.plugins import modeling_dflash
from modelopt.torch.speculative.plugins.hf_dflash import HFDFlashModel
from modelopt.torch.speculative.plugins.modeling_dspark import DSparkModule
modeling_dflash._compiled_sink_attention = modeling_dflash._sink_attention_impl
values = json.load(open(f"{folder}/config.json"))
nested = values["dflash_config"]
config = Qwen3Config(**{key: value for key, value in values.items() if key != "dflash_config"})
config._attn_implementation = "sdpa"
config.attention_sink_bias = nested.get("attention_sink_bias", False)
for key, value in nested.items():
    setattr(config, key, value)
model = DSparkModule(config).train()
model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=True)
model.rotary_emb = Qwen3RotaryEmbedding(config)
its = SimpleNamespace(
    dflash_block_size=config.block_size, mask_token_id=config.mask_token_id,
    dflash_draft_attention="causal" if nested["causal"] else "bidirectional",
    _base_model_embeddings=lambda found: given["embedding"][found],
)
kept = torch.ones_like(given["anchors"], dtype=torch.bool)
blocks, length = given["anchors"].shape[1], ids.shape[1]
embedded = HFDFlashModel._build_noise_embedding(its, ids, given["anchors"], kept, blocks)
places = HFDFlashModel._build_position_ids(its, length, given["anchors"], "cpu")
window = nested.get("swa_window_size") if nested.get("use_swa") else None
mask = HFDFlashModel._build_draft_attention_mask(
    its, length, given["anchors"], kept, blocks, torch.float32, "cpu", window=window
)
with torch.enable_grad():
    hidden = model(embedded, taps, places, mask)
    hidden.square().mean().backward()
torch.testing.assert_close(hidden.unflatten(1, (blocks, -1)), given["hidden"], rtol=1e-4, atol=1e-4)
found = dict(model.named_parameters())
for name, gradient in given["gradients"].items():
    torch.testing.assert_close(found[name].grad, gradient, rtol=1e-3, atol=1e-6, msg=lambda said: f"{name}: {said}")
print("same", len(given["gradients"]))
"""


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 9},
        {"causal_block": True},
        {"attention_sinks": True},
        {"sliding_window": 9, "causal_block": True, "attention_sinks": True},
    ],
)
def test_windows_causal_blocks_and_sinks_are_trained_as_modelopt_trains_them(tiny_llama, tmp_path, changes):
    needs("modelopt")
    target = Checkpoint.find(tiny_llama)
    section = DraftSection(num_layers=2, block_size=5, taps=[0, 1], intermediate_size=96, markov_rank=8, **changes)
    config, _ = build_draft_config(target.read_spec(), section, mask_token_id=20)
    draft, generator = DSparkDraft(config, seed=3), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in draft.trainable_parameters().items():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (1.0 if "sink" in name else 0.1))
    draft.save(tmp_path / "draft", slim=True)
    export_draft(tmp_path / "draft", "modelopt", tmp_path / "out", target)
    found = read_embedding_and_head(target.folder, target.read_spec())
    draft.set_embeddings(found.embedding.float(), found.head.float())
    ids = torch.randint(32, config.vocab_size, (2, 40), generator=generator)
    taps = torch.randn(2, 40, 2 * config.hidden_size, generator=generator)
    anchors = torch.tensor([[0, 8, 30], [4, 20, 35]])
    hidden = draft(ids, taps, anchors, torch.ones_like(anchors, dtype=torch.bool))
    hidden.square().mean().backward()
    gradients = {name: tensor.grad for name, tensor in draft.trainable_parameters().items() if tensor.grad is not None}
    assert any("sink" in name for name in gradients) == ("attention_sinks" in changes)
    given = {"ids": ids, "taps": taps, "anchor": 0, "previous": ids, "anchors": anchors, "hidden": hidden.detach()}
    given |= {"gradients": gradients, "embedding": draft.embed_tokens.weight.detach()}
    torch.save(given, tmp_path / "ours.pt")
    said = in_their_code(MODELOPT_BLOCKS, tmp_path)
    assert f"same {len(gradients)}" in said


# The loss of a sequence with every block that fits behind position 5, in total variation, which is half of our L1.
SPECULATORS_DFLASH = """
from speculators import SpeculatorModel
from speculators.losses.eager import tv_loss
from torch.nn.attention.flex_attention import create_mask
model = SpeculatorModel.from_pretrained(folder)
assert type(model).__name__ == "DFlashDraftModel" and not model.config.sample_from_anchor
held = model.state_dict()
different = [name for name, tensor in given["weights"].items() if not torch.equal(held[name], tensor)]
assert not different, different
model.embed_tokens.weight.data, model.lm_head.weight.data = given["embedding"], given["head"]
model.verifier_lm_head.weight.data, model.verifier_norm = given["head"], torch.nn.Identity()
model.config.transformer_layer_config._attn_implementation, model._create_mask_fn = "sdpa", create_mask
with torch.enable_grad():
    _, loss, _ = model(
        taps, ids, given["mask"], given["last"], torch.zeros_like(ids), loss_config={"tv": (tv_loss, 1.0)},
        gamma=4.0, max_anchors=given["anchors"],
    )
    loss.backward()
gradient = torch.cat([value.grad.flatten() for name, value in model.named_parameters() if name in given["weights"]])
order = [name for name, _ in model.named_parameters() if name in given["weights"]]
torch.save({"loss": loss.detach(), "gradient": gradient, "order": order}, sys.argv[2] + ".theirs")
model.save_pretrained(f"{folder}-saved")
"""


def test_the_loss_and_the_gradients_of_a_dflash_draft_are_speculators(tiny_llama, tmp_path):
    needs("speculators")
    target = Checkpoint.find(tiny_llama)
    section = DraftSection(kind="dflash", num_layers=2, block_size=4, taps=[0, 1], intermediate_size=96)
    config, _ = build_draft_config(target.read_spec(), section, mask_token_id=20)
    draft, generator = DSparkDraft(config, seed=3), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    draft.save(tmp_path / "draft", slim=True)
    export_draft(tmp_path / "draft", "speculators", tmp_path / "out", target)
    weights = {name: tensor.detach() for name, tensor in draft.trainable_parameters().items()}
    found = read_embedding_and_head(target.folder, target.read_spec())
    draft.set_embeddings(found.embedding.float(), found.head.float())
    length = 24
    ids = torch.randint(32, config.vocab_size, (1, length), generator=generator)
    taps, last = (torch.randn(1, length, size * config.hidden_size, generator=generator) for size in (2, 1))
    mask = torch.arange(length) >= 5
    anchors = torch.arange(5, length - config.block_width)  # theirs: those whose block fits
    given = {"ids": ids, "taps": taps, "anchor": 0, "previous": ids, "weights": weights, "last": last}
    given |= {"mask": mask[None].long(), "anchors": len(anchors)}
    given |= {"embedding": draft.embed_tokens.weight.detach(), "head": draft.lm_head.weight.detach()}
    torch.save(given, tmp_path / "ours.pt")
    in_their_code(SPECULATORS_DFLASH, tmp_path)
    theirs = torch.load(tmp_path / "ours.pt.theirs", weights_only=True)
    batch = collate([Sample(ids[0], mask, taps[0], last[0])], [anchors], config.block_size)
    loss = DSparkObjective(draft, LossWeights(ce=0.0, l1=0.5, confidence=0.0))(batch)
    value = loss.total / int(loss.sums.slots.sum())  # theirs is a mean over slots, whatever they weigh
    value.backward()
    torch.testing.assert_close(value.detach(), theirs["loss"], rtol=1e-5, atol=1e-6)
    gradient = torch.cat([draft.get_parameter(name).grad.flatten() for name in theirs["order"]])
    assert len(theirs["order"]) == len(weights)
    torch.testing.assert_close(gradient, theirs["gradient"], rtol=1e-3, atol=1e-6)
    import_draft(tmp_path / "out-saved", tmp_path / "back", target)
    assert DSparkDraft.load(tmp_path / "back").config == config


def test_speculators_loads_an_eagle3_draft_every_tensor_in_its_place(tiny_hybrid, tmp_path):
    needs("speculators")
    target = Checkpoint.find(tiny_hybrid)
    section = DraftSection(taps=[0, 1, 2, 4, 6], intermediate_size=96, block_size=3)
    config, _ = build_eagle3_config(target.read_spec(), section, ttt_length=3)
    draft = Eagle3Draft(config, seed=3)
    draft.save(tmp_path / "draft", slim=True)
    export_draft(tmp_path / "draft", "speculators", tmp_path / "out", target)
    weights = {name: tensor.detach() for name, tensor in draft.trainable_parameters().items()}
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(2, config.vocab_size, config.hidden_size, generator=generator)
    draft.set_embeddings(*table)
    ids = torch.randint(32, config.vocab_size, (1, 12), generator=generator)
    taps = torch.randn(1, 12, 5 * config.hidden_size, generator=generator)
    with torch.no_grad():
        steps = [draft.logits(hidden) for hidden in draft(ids, taps)]
    given = {"ids": ids, "taps": taps, "anchor": 0, "previous": ids, "weights": weights}
    torch.save(given | {"embedding": table[0], "head": table[1], "steps": steps}, tmp_path / "ours.pt")
    code = """
from speculators import SpeculatorModel
from torch.nn.attention.flex_attention import create_mask
model = SpeculatorModel.from_pretrained(folder)
held = model.state_dict()
different = [name for name, tensor in given["weights"].items() if not torch.equal(held[name], tensor)]
assert not different, different
assert model.config.eagle_aux_hidden_state_layer_ids == [1, 2, 3, 5, 7]
model.embed_tokens.weight.data, model.lm_head.weight.data = given["embedding"], given["head"]
model.config.transformer_layer_config._attn_implementation = model._attn_impl = "sdpa"
model._create_mask_fn = create_mask
# Position i reads the token after it: their ids come shifted by one.
shifted = torch.cat((ids[:, 1:], ids.new_zeros(1, 1)), dim=-1)
kept = []
model.lm_head.register_forward_hook(lambda module, inputs, output: kept.append(output))
model(taps, shifted, torch.zeros_like(ids), position_ids=torch.arange(12)[None], ttt_steps=3)
for step, (theirs, ours) in enumerate(zip(kept, given["steps"], strict=True)):
    behind = 12 - 1 - step
    torch.testing.assert_close(theirs[:, :behind], ours[:, :behind], rtol=1e-3, atol=1e-3)
print("same", len(kept))
"""
    said = in_their_code(code, tmp_path)
    assert "same 3" in said
