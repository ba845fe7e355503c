"""Specs of ordinary decoders from files as the hub has them, and attention that only one implementation computes."""

from typing import Any

import pytest
import torch

from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Target, TargetSpec, spec_from_config
from tests.targets.tiny_families import TINY, VOCAB

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 384,
    "max_position_embeddings": 4096,
}


def spec_of(model_type: str, **values: Any) -> TargetSpec:
    return spec_from_config({"model_type": model_type, **SIZES, **values})


def test_minitron_as_published():
    """The fields of nvidia/Nemotron-Mini-4B-Instruct: norm_eps, no head_dim, no gate in the MLP."""
    spec = spec_of("nemotron", num_key_value_heads=2, norm_eps=1e-5, rope_theta=10000, partial_rotary_factor=0.5)
    assert (spec.mlp, spec.intermediate_size, spec.head_dim, spec.num_key_value_heads) == ("plain", 128, 16, 2)
    assert (spec.norm_eps, spec.rope_theta, spec.tie_word_embeddings, spec.assumed) == (1e-5, 10000.0, False, ())


def test_gemma_files_leave_out_what_is_the_default():
    """Published Gemma files have no tie_word_embeddings; the first Gemma 2 ones have no soft caps either."""
    spec = spec_of("gemma2", rope_theta=10000.0)
    assert (spec.tie_word_embeddings, spec.logit_softcap, spec.head_dim, spec.num_key_value_heads) == (True, 30, 256, 4)
    assert spec_of("gemma2", final_logit_softcapping=None, rope_theta=10000.0).logit_softcap is None


def test_the_global_rope_of_gemma3_is_the_one():
    spec = spec_of("gemma3_text", rope_theta=500_000.0, rope_local_base_freq=20_000.0, sliding_window_pattern=3)
    assert (spec.rope_theta, spec.logit_softcap, spec.tie_word_embeddings) == (500_000.0, None, True)
    assert spec.assumed == ("rope theta 500000: of the layers that see everything; those with a window use 20000.",)


def gemma4(**values: Any) -> TargetSpec:
    """Sizes of the published 31B but for the layers, and a config that leaves the rest to its class."""
    sizes = {"hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32, "vocab_size": 262144}
    heads = {"num_key_value_heads": 16, "num_global_key_value_heads": 4, "attention_k_eq_v": True}
    return spec_of("gemma4_text", **(sizes | heads | {"hidden_size_per_layer_input": 0} | values))


def test_the_heads_of_gemma4_are_those_of_its_windows():
    spec = gemma4(max_position_embeddings=262144)
    assert (spec.head_dim, spec.num_key_value_heads, spec.rope_theta, spec.mlp) == (256, 16, 1e6, "gated")
    assert "those that see everything have heads of 512, 4 of them" in spec.assumed[0]
    assert spec.key_channels == 5 * 16 * 256 + 4 * 512
    shared = gemma4(num_kv_shared_layers=3, layer_types=["sliding_attention", "full_attention"] * 3)
    assert shared.key_channels == 2 * 16 * 256 + 4 * 512
    assert gemma4(enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=64).mlp == "moe"


def test_a_gemma4_that_sees_the_future_is_refused():
    with pytest.raises(InputError, match="predicts no next token: it attends in both directions") as caught:
        gemma4(use_bidirectional_attention="all")
    assert caught.value.do.endswith(".")


def test_experts_everywhere_or_only_here_and_there():
    assert (spec_of("gpt_oss").mlp, spec_of("gpt_oss").intermediate_size) == ("moe", None)
    assert spec_of("qwen3_moe").mlp == "moe"
    mixed = spec_of("qwen3_moe", mlp_only_layers=[0])
    assert (mixed.mlp, mixed.intermediate_size) == ("gated", 128)
    assert spec_of("qwen3_moe", decoder_sparse_step=2).mlp == "gated"


def test_a_default_that_matters_is_said():
    assert spec_of("mistral").assumed == (
        "rope theta 10000: the config gives none and that is the transformers default.",
    )
    assert "rope theta 150000" in spec_of("gpt_oss").assumed[0]


def without(key: str) -> dict[str, Any]:
    return {"model_type": "mistral", **{name: value for name, value in SIZES.items() if name != key}}


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers"])
def test_a_missing_size_that_no_default_can_stand_for_is_named(key):
    with pytest.raises(InputError, match=key):
        spec_from_config(without(key))


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("intermediate_size", 14336),
        ("num_attention_heads", 32),
        ("vocab_size", 32000),
        ("max_position_embeddings", 131072),
    ],
)
def test_any_other_missing_size_is_its_class_s_default_and_said(key, default):
    spec = spec_from_config(without(key) | {"rope_theta": 1e4, "head_dim": 16})
    assert getattr(spec, key) == default
    assert spec.assumed == (f"{key} {default}: the config gives none and that is the transformers default.",)


def test_a_config_that_transformers_refuses_is_two_sentences():
    with pytest.raises(InputError, match="transformers refuses") as caught:
        spec_of("gemma2", hidden_size=66)
    assert caught.value.do.endswith(".")


@pytest.mark.parametrize(("model_type", "part"), [("gemma2", "attn_logit_softcapping"), ("gpt_oss", "sinks")])
def test_what_sdpa_leaves_out_of_attention_takes_part(tmp_path, model_type, part):
    """Soft-capped scores and attention sinks: without them the logits are others."""
    model = tiny.random_model(TINY[model_type]())
    target = Target.load(str(tiny.save_target(tmp_path, model, tiny.make_tokenizer(tiny._SENTENCES, VOCAB))))
    ids = torch.randint(32, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    before = target.logits(target.capture(ids, None, ()).last)
    for layer in target.model.model.layers:
        if part == "sinks":
            layer.self_attn.sinks.fill_(-1e4)
        else:
            layer.self_attn.attn_logit_softcapping = None
    after = target.logits(target.capture(ids, None, ()).last)
    assert float((after - before).abs().max()) > 0.01
