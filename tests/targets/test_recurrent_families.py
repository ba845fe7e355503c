"""Qwen3-Next, LFM2 and Jamba as published configs spell them, and the refusal of what nobody wrote a family for."""

import pytest
import torch

from nemotron_dspark.config import DraftSection
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.errors import CheckError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Checkpoint, LayerKind, Target, spec_from_config
from nemotron_dspark.targets.families import FAMILIES
from nemotron_dspark.targets.proofs import prove
from tests.recipe.hybrids import LFM2_1B, QWEN3_NEXT_80B
from tests.targets import tiny_families
from tests.targets.tiny_families import IDS, TINY, VOCAB

JAMBA_52B = {
    "model_type": "jamba",
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "mamba_d_state": 16,
    "max_position_embeddings": 262144,
    "num_attention_heads": 32,
    "num_experts": 16,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "vocab_size": 65536,
}
MAMBA_130M = {
    "model_type": "mamba",
    "expand": 2,
    "hidden_size": 768,
    "intermediate_size": 1536,
    "layer_norm_epsilon": 1e-05,
    "n_layer": 24,
    "num_hidden_layers": 24,
    "state_size": 16,
    "time_step_rank": 48,
    "vocab_size": 50280,
}


def test_qwen3_next_as_published():
    spec = spec_from_config(QWEN3_NEXT_80B)
    assert spec.layout == "GGGD" * 12
    assert (spec.mlp, spec.intermediate_size) == ("moe", None)
    assert (spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim) == (16, 2, 256)
    assert (spec.rope_theta, spec.norm_eps, spec.tie_word_embeddings) == (1e7, 1e-6, False)


def test_lfm2_as_published():
    """Attention by number, the MLP's width under another name and before its adjustment, tied without saying so."""
    spec = spec_from_config(LFM2_1B)
    assert spec.layout == "CCDCCDCCDCDCDCDC"
    assert (spec.mlp, spec.intermediate_size, spec.tie_word_embeddings) == ("gated", 8192, True)
    assert (spec.rope_theta, spec.norm_eps, spec.head_dim) == (1e6, 1e-5, 64)


def test_jamba_as_published():
    spec = spec_from_config(JAMBA_52B)
    assert spec.layout == "mmmmDmmm" * 4
    assert (spec.mlp, spec.intermediate_size, spec.rope_theta) == ("gated", 14336, None)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("lfm2", {"block_ffn_dim_multiplier": 1.5, "block_multiple_of": 32}),
        ("lfm2", {"block_auto_adjust_ff_dim": False}),
        ("lfm2_moe", {"num_dense_layers": 2, "num_experts": 4, "moe_intermediate_size": 32}),
    ],
)
def test_the_mlp_of_lfm2_is_as_wide_as_the_model_builds_it(model_type, changes):
    config = tiny_families.lfm2(model_type, **changes)
    with torch.device("meta"):
        built = tiny.AutoModelForCausalLM.from_config(config)
    assert spec_from_config(config).intermediate_size == built.model.layers[0].feed_forward.w1.out_features


@pytest.mark.parametrize(
    ("changes", "mlp"),
    [
        ({}, "moe"),
        ({"mlp_only_layers": [0]}, "gated"),
        ({"decoder_sparse_step": 2}, "gated"),
        ({"num_experts": 0}, "gated"),
    ],
)
def test_qwen3_next_says_whether_a_layer_has_an_mlp(changes, mlp):
    spec = spec_from_config(QWEN3_NEXT_80B | changes)
    assert (spec.mlp, spec.intermediate_size) == (mlp, 5120 if mlp == "gated" else None)


def load(folder, config, spread: float = 3.0) -> Target:
    model = tiny.random_model(config, spread=spread)
    return Target.load(str(tiny.save_target(folder, model, tiny.make_tokenizer(tiny._SENTENCES, VOCAB))))


def test_jamba_without_its_family_is_refused_by_a_proof_that_says_why(tmp_path, monkeypatch):
    """transformers starts the scan of several tokens from nothing although its cache holds a state."""
    monkeypatch.delitem(FAMILIES, "jamba")
    target = load(tmp_path, TINY["jamba"]())
    assert set(target.spec.layers) == {LayerKind.DECODER}
    with pytest.raises(CheckError, match="fails the verify proof") as refused:
        prove(target)
    assert "cache" in refused.value.what + refused.value.do


def test_a_family_nobody_wrote_is_refused_by_a_proof_that_says_why(tmp_path):
    """Zamba has Mamba-1 mixers with the same fault."""
    from transformers import ZambaConfig

    config = ZambaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        attn_layer_period=3,
        attn_layer_offset=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        mamba_d_state=8,
        mamba_dt_rank=16,
        n_mamba_heads=2,
        max_position_embeddings=4096,
        **IDS,
    )
    with pytest.raises(CheckError, match="fails the verify proof"):
        prove(load(tmp_path, config, spread=10.0))


def test_a_model_with_a_cache_of_its_own_is_refused_in_its_own_words(tmp_path):
    from transformers import MiniMaxConfig

    config = MiniMaxConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        block_size=32,
        max_position_embeddings=4096,
        **IDS,
    )
    with pytest.raises(CheckError, match=r"fails the verify proof .* ValueError, MiniMax uses cache of its own"):
        prove(load(tmp_path, config))


def test_mamba_as_published():
    """state-spaces/mamba-130m-hf: no heads, no limit of positions; the draft's shape is a default, and said."""
    spec = spec_from_config(MAMBA_130M)
    assert (spec.layout, spec.num_attention_heads, spec.mlp, spec.tie_word_embeddings) == ("m" * 24, 0, "none", True)
    draft, notes = build_draft_config(spec, DraftSection(), mask_token_id=5, num_anchors=8)
    assert (draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim) == (6, 6, 128)
    assert "max_position_embeddings 32768: the target has no limit, and that is Qwen3's default." in notes
    assert [
        note for note in notes if note.startswith("6 heads of 128, 6 of keys and values: the target has no attention")
    ]


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "mamba2", "rwkv"])
def test_a_draft_for_a_target_without_attention_has_the_default_shape(tmp_path, model_type):
    from transformers import AutoConfig

    sizes = {"num_heads": 128, "head_dim": 64} if model_type == "mamba2" else {}
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, hidden_size=4096, num_hidden_layers=4, **sizes)
    config.save_pretrained(tmp_path)
    spec = Checkpoint.find(tmp_path).read_spec()
    assert not any(kind.attends for kind in spec.layers)
    draft, notes = build_draft_config(spec, DraftSection(), mask_token_id=5, num_anchors=8)
    assert (draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim) == (32, 8, 128)
    assert [note for note in notes if "the target has no attention" in note]


@pytest.mark.parametrize("hidden", [64, 768, 1024, 2560, 4096, 5120])
def test_heads_of_keys_and_values_divide_the_default_heads(hidden):
    spec = spec_from_config(MAMBA_130M | {"hidden_size": hidden})
    draft, _ = build_draft_config(spec, DraftSection(), mask_token_id=5, num_anchors=8)
    assert draft.num_attention_heads == max(1, hidden // 128)
    assert draft.num_attention_heads % draft.num_key_value_heads == 0


def test_rwkv_is_refused_by_a_proof_since_its_state_is_no_cache(tmp_path):
    from transformers import RwkvConfig

    config = RwkvConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=4, **IDS)
    with pytest.raises(CheckError, match="fails the verify proof"):
        prove(load(tmp_path, config))
