"""NVIDIA's draft for Nemotron 3.5 Lightning: its keys and tensor names on a small target, in, trained on, out again.

The published checkpoint is not seen here. Keys and names are those that its readers ask for; sizes are small.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_dspark.config import load_config
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.pair import load_draft
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.engines.exchange import export_draft, import_draft
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Checkpoint, Target
from tests.caches import write_cache
from tests.drafts import plain
from tests.training.runs import train_run
from tests.training.small_cache import samples

HIDDEN, VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP, RANK = 32, 1024, 6, 4, 2, 8, 48, 16
TAPS = (1, 5, 19, 29, 41, 51)
PUBLISHED = {
    "architectures": ["Qwen3DSparkModel"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_sink_bias": True,
    "block_size": 8,
    "dflash_config": {
        "attention_sink_bias": True,
        "causal": True,
        "mask_token_id": 990,
        "sample_from_anchor": False,
        "swa_window_size": 1024,
        "target_layer_ids": list(TAPS),
        "use_swa": True,
    },
    "dspark_bonus_anchor": True,
    "dspark_markov_rank": RANK,
    "eagle_aux_hidden_state_layer_ids": [tap + 1 for tap in TAPS],
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "markov_rank": RANK,
    "max_position_embeddings": 4096,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "sample_from_anchor": False,
    "sliding_window": 1024,
    "target_layer_ids": list(TAPS),
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB,
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A hybrid of 52 layers."""
    folder = tmp_path_factory.mktemp("lightning") / "target"
    changes = {"mamba_num_heads": 4, "n_groups": 1, "intermediate_size": 32}
    return tiny.random_target(folder, vocab_size=VOCAB, pattern="M-*-" + 12 * "M---", hidden_size=HIDDEN, **changes)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Config and tensors as NVIDIA's, with an embedding of its own and no LM head."""
    folder = tmp_path_factory.mktemp("published")
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"embed_tokens.weight": (VOCAB, HIDDEN), "fc.weight": (HIDDEN, len(TAPS) * HIDDEN)}
    shapes |= {"hidden_norm.weight": (HIDDEN,), "norm.weight": (HIDDEN,)}
    shapes |= {f"markov_head.markov_w{at}.weight": (VOCAB, RANK) for at in (1, 2)}
    for at in range(LAYERS):
        own = {f"{norm}.weight": (HIDDEN,) for norm in ("input_layernorm", "post_attention_layernorm")}
        own |= {"self_attn.q_proj.weight": (queries, HIDDEN), "self_attn.o_proj.weight": (HIDDEN, queries)}
        own |= {f"self_attn.{part}_proj.weight": (keys, HIDDEN) for part in "kv"}
        own |= {f"self_attn.{part}_norm.weight": (HEAD_DIM,) for part in "qk"}
        own |= {"self_attn.attention_sink_bias": (HEADS,), "mlp.down_proj.weight": (HIDDEN, MLP)}
        own |= {f"mlp.{part}_proj.weight": (MLP, HIDDEN) for part in ("gate", "up")}
        shapes |= {f"layers.{at}.{name}": shape for name, shape in own.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.3 + ("norm" in name)).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    return folder, tensors


@pytest.fixture(scope="module")
def imported(published, target, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "draft"
    return out, import_draft(published[0], out, Checkpoint.find(target))


def assert_holds(folder, tensors):
    found = load_file(folder / "model.safetensors")
    assert found.keys() >= tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    return found.keys() - tensors.keys()


def test_it_comes_in_and_goes_out_equal_to_the_bit(published, imported, target, tmp_path):
    (_, tensors), (out, said) = published, imported
    assert assert_holds(out, tensors) == {"lm_head.weight"}  # the target's
    assert any("embedding is not the target's" in remark for remark in said.remarks)
    config = DSparkDraft.load(out).config
    assert (config.block_size, config.block_width, config.mask_token_id) == (7, 8, 990)
    assert (config.sliding_window, config.causal_block, config.attention_sinks) == (1024, True, True)
    assert (config.target_layer_ids, config.enable_confidence_head) == (TAPS, False)
    for name in ("vllm", "sglang"):
        export_draft(out, name, tmp_path / name, Checkpoint.find(target), slim=True)
        assert not assert_holds(tmp_path / name, tensors)
        written = json.loads((tmp_path / name / "config.json").read_text())
        ignored = ("dspark_markov_rank", "eagle_aux_hidden_state_layer_ids", "rope_theta", "torch_dtype")
        for key, value in PUBLISHED.items():
            assert key in ignored or written[key] == value, key
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10000
        import_draft(tmp_path / name, tmp_path / f"{name}-again", Checkpoint.find(target))
        assert DSparkDraft.load(tmp_path / f"{name}-again").config == config
    with pytest.raises(InputError, match="modelopt takes the target's embedding, and this draft has its own"):
        export_draft(out, "modelopt", tmp_path / "out")


def test_its_quantised_twin_is_refused_in_two_sentences(published, target, tmp_path):
    save_file(published[1], tmp_path / "model.safetensors")
    values = PUBLISHED | {"quantization_config": {"quant_algo": "W4A16_NVFP4"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"quantised, and drafts here are not\. Import the one in bfloat16"):
        import_draft(tmp_path, tmp_path / "out", Checkpoint.find(target))


def test_it_drafts_with_its_own_embedding_and_the_output_stays_the_target_s(published, imported, target):
    loaded = Target.of(load_config({"name": str(target), "dtype": "float32"}).target)
    draft = load_draft(imported[0], loaded)
    assert torch.equal(draft.embed_tokens.weight, published[1]["embed_tokens.weight"].float())
    prompt, plenty = list(range(40, 52)), Sampling(temperature=0.0, max_new_tokens=10)
    decoder = Decoder(loaded, draft)
    found = decoder.generate(prompt, plenty, frozenset())
    assert found.tokens == Decoder(loaded).generate(prompt, plenty, frozenset()).tokens
    assert set(found.proposed) == {7}
    state = loaded.prefill(prompt, TAPS)[1]
    with torch.no_grad():
        context = draft.new_context()
        draft.extend(context, state.taps, [len(prompt)])
        hidden = draft.block_hidden(context, torch.tensor([found.tokens[0]]))[0]
    expected = plain.block_hidden(draft, [*prompt, found.tokens[0]], state.taps[0], len(prompt)).float()
    torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-3)


def test_training_goes_on_from_it_and_it_is_exported_again(published, imported, target, tmp_path):
    extra = {"target_model_name_or_path": str(target)}
    write_cache(tmp_path / "cache", samples(hidden=HIDDEN, taps=TAPS), taps=TAPS, hidden_size=HIDDEN, extra=extra)
    settings = ("train.global_batch_size=4", "train.num_anchors=8", "train.device=cpu", "train.max_steps=2")
    config = load_config(assignments=[*settings, f"train.init={imported[0]}", "train.precision=bf16", "train.lr=1e-2"])
    trained = train_run(str(target), tmp_path / "cache", tmp_path / "run", config)
    before, after = DSparkDraft.load(imported[0]), DSparkDraft.load(trained.draft_folder)
    same = {"num_anchors", "max_position_embeddings"}
    assert after.config.model_dump(exclude=same) == before.config.model_dump(exclude=same)
    assert torch.equal(after.embed_tokens.weight, before.embed_tokens.weight)
    for name, parameter in after.trainable_parameters().items():
        moved = not torch.equal(parameter, before.trainable_parameters()[name])
        assert moved or "norm" in name, name  # in bf16 a norm of 1 does not always move
    export_draft(trained.draft_folder, "vllm", tmp_path / "out", Checkpoint.find(target), slim=True)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == published[1].keys()
