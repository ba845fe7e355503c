"""A small config per model type: what `test_families` runs every promise on. A new family adds one function here."""

from collections.abc import Callable, Sequence
from typing import Any

from nemotron_dspark.recipe import tiny

VOCAB = 384
WINDOW = 11  # of sliding attention: shorter than every sequence of the tests
IDS = {"bos_token_id": 1, "eos_token_id": 11, "pad_token_id": 0}


def _olmo2() -> Any:
    """A type no family module knows: the general path."""
    from transformers import Olmo2Config

    return Olmo2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        **IDS,
    )


def _decoder(model_type: str, **special: Any) -> Any:
    """An ordinary decoder with what ``special`` says; head_dim is not hidden size / heads."""
    from transformers import AutoConfig

    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **IDS,
    }
    return AutoConfig.for_model(model_type, **(values | special))


def _gemma(model_type: str, **special: Any) -> Any:
    """Larger weights, so that scores and logits reach their soft caps."""
    values = {"tie_word_embeddings": True, "initializer_range": 0.1, "sliding_window": WINDOW}
    return _decoder(model_type, **(values | special))


def gemma4_text(**changes: Any) -> Any:
    """As the small ones: inputs per layer, three layers that read the keys and values of earlier ones, wider MLPs."""
    near, wide = "sliding_attention", "full_attention"
    values = {
        "num_hidden_layers": 7,
        "layer_types": [near, wide, near, wide, near, near, wide],
        "global_head_dim": 32,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
        "final_logit_softcapping": 2.0,
    }
    return _gemma("gemma4_text", **(values | changes))


def gemma4(**changes: Any) -> Any:
    """As the large ones, beside a picture's encoder: keys for values, fewer of them in wide layers, experts."""
    from transformers import Gemma4Config

    special = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "use_bidirectional_attention": "vision",
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    text = gemma4_text(**(special | changes))
    return Gemma4Config(text_config=text, vision_config=vision | heads, audio_config=None, **IDS)


_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 32,
}


def granitemoehybrid(layer_types: Sequence[str] = ("mamba", "mamba", "attention", "mamba", "mamba"), **changes: Any):
    """Experts, a bias where one is possible, rope, and all four multipliers."""
    from transformers import GraniteMoeHybridConfig

    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 32,
        "shared_intermediate_size": 96,
        "num_hidden_layers": len(layer_types),
        "layer_types": list(layer_types),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "position_embedding_type": "rope",
        "rope_theta": 5000.0,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "mamba_proj_bias": True,
        "attention_bias": True,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        **_MAMBA2,
        **IDS,
    }
    return GraniteMoeHybridConfig(**(values | changes))


def bamba(**changes: Any):
    """Attention with rope on half of each head in two of six layers, biases, bounds on the step size."""
    from transformers import BambaConfig

    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "attn_layer_indices": [2, 4],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_proj_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 5000.0,
        "time_step_limit": [0.5, 1.5],
        "max_position_embeddings": 4096,
        **_MAMBA2,
        **IDS,
    }
    return BambaConfig(**(values | changes))


def falcon_h1(**changes: Any):
    """Every multiplier other than one, heads wider than hidden / heads, no norm after the scan, as most checkpoints."""
    from transformers import FalconH1Config

    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "mamba_d_ssm": 96,
        "mamba_rms_norm": False,
        "projectors_bias": True,
        "mamba_proj_bias": True,
        "rope_theta": 1e11,
        "embedding_multiplier": 5.6,
        "lm_head_multiplier": 0.4,
        "key_multiplier": 0.7,
        "attention_in_multiplier": 1.3,
        "attention_out_multiplier": 0.9,
        "ssm_in_multiplier": 1.2,
        "ssm_out_multiplier": 0.8,
        "ssm_multipliers": [0.9, 0.7, 1.4, 0.6, 1.1],
        "mlp_multipliers": [0.8, 0.6],
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        **_MAMBA2,
        **IDS,
    }
    return FalconH1Config(**(values | changes))


def zamba2(**changes: Any):
    """Two shared blocks in three places, with adapters and rope; Mamba-2 layers between, before and behind.

    The places are such that transformers 5.15, which counts all layers to find a block's adapters, finds the same.
    """
    from transformers import Zamba2Config

    plain, hybrid = "mamba", "hybrid"
    kinds = [plain, plain, hybrid, hybrid, plain, plain, hybrid, plain]
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": len(kinds),
        "layers_block_type": kinds,
        "num_attention_heads": 4,
        "num_mem_blocks": 2,
        "use_shared_attention_adapter": True,
        "adapter_rank": 8,
        "use_mem_rope": True,
        "rope_theta": 5000.0,
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
        "mamba_d_state": 16,
        "add_bias_linear": True,
        "chunk_size": 32,
        "max_position_embeddings": 4096,
        **IDS,
    }
    return Zamba2Config(**(values | changes))


def lfm2(model_type: str = "lfm2", **changes: Any):
    """Convolutions over three positions with a bias, an MLP whose stated width is adjusted, tied by default."""
    from transformers import AutoConfig

    kinds = ["conv", "full_attention", "conv", "conv"]
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 150,
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "conv_bias": True,
        "rope_theta": 5000.0,
        "max_position_embeddings": 4096,
        **IDS,
    }
    return AutoConfig.for_model(model_type, **(values | changes))


def qwen3_next(model_type: str = "qwen3_next", **changes: Any):
    """Delta nets with two value heads to a key head, gated attention with rope on half of each head."""
    from transformers import AutoConfig

    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "full_attention_interval": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "rope_theta": 5000.0,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 20,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **IDS,
    }
    return AutoConfig.for_model(model_type, **(values | changes))


def qwen3_5(model_type: str, **changes: Any):
    """As published: the language model beside a picture's encoder."""
    from transformers import AutoConfig

    vision = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
    text = qwen3_next(f"{model_type}_text", **changes)
    return AutoConfig.for_model(model_type, text_config=text.to_dict(), vision_config=vision)


_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}


def jamba(**changes: Any):
    """Mamba-1 with biases, attention in every third layer, experts in every other one."""
    from transformers import JambaConfig

    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 6,
        "mamba_proj_bias": True,
        "max_position_embeddings": 4096,
        **IDS,
    }
    return JambaConfig(**(values | changes))


def _mamba(model_type: str, **special: Any) -> Any:
    """Without attention; biases; weights drawn as widely as the other types' are, not five times so."""
    from transformers import AutoConfig

    values = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 4, "use_bias": True, **IDS}
    values["initializer_range"] = 0.02
    return AutoConfig.for_model(model_type, **(values | special))


def _olmo_hybrid() -> Any:
    """Gated delta nets with a convolution each for queries, keys and values: no family module, so the general path."""
    from transformers import OlmoHybridConfig

    return OlmoHybridConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=12,
        linear_value_head_dim=20,
        max_position_embeddings=4096,
        **IDS,
    )


def _zaya() -> Any:
    """Attention behind convolutions whose last inputs are a state, with and without a window: the general path."""
    from transformers import ZayaConfig

    return ZayaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=3,
        layer_types=["hybrid", "hybrid_sliding", "hybrid"],
        sliding_window=WINDOW,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        moe_intermediate_size=32,
        router_hidden_size=16,
        max_position_embeddings=4096,
        **IDS,
    )


def whole_model(config: Any) -> Any:
    """The model that a published checkpoint of this config holds, with random weights."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    beside = config.model_type.startswith("qwen3_5") and "vision_config" in config.to_dict()
    return tiny.random_model(config, kind=AutoModelForImageTextToText if beside else AutoModelForCausalLM)


TINY: dict[str, Callable[[], Any]] = {
    "nemotron_h": lambda: tiny.nemotron_h_config("ME*-M*-M", VOCAB),
    "llama": lambda: tiny.decoder_config("llama", VOCAB),
    "nemotron": lambda: _decoder("nemotron", partial_rotary_factor=0.5),
    "mistral": lambda: _decoder("mistral", sliding_window=WINDOW),
    "qwen3": lambda: _decoder("qwen3", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3_moe": lambda: _decoder(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[1]
    ),
    "gemma2": lambda: _gemma("gemma2", final_logit_softcapping=2.0, attn_logit_softcapping=1.5),
    "gemma3_text": lambda: _gemma("gemma3_text", layer_types=["sliding_attention"] * 3 + ["full_attention"] * 2),
    "gemma4_text": gemma4_text,
    "gemma4": gemma4,
    "gpt_oss": lambda: _decoder(
        "gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW, intermediate_size=32
    ),
    "olmo2": _olmo2,
    "granitemoehybrid": granitemoehybrid,
    "bamba": bamba,
    "falcon_h1": falcon_h1,
    "zamba2": zamba2,
    "lfm2": lambda: lfm2(block_ffn_dim_multiplier=1.5, block_multiple_of=32),
    "lfm2_moe": lambda: lfm2(
        "lfm2_moe", num_dense_layers=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "qwen3_next": lambda: qwen3_next(intermediate_size=96, mlp_only_layers=[1], **_EXPERTS),
    "qwen3_5_text": lambda: qwen3_next("qwen3_5_text", intermediate_size=96, tie_word_embeddings=True),
    "qwen3_5_moe_text": lambda: qwen3_next("qwen3_5_moe_text", **_EXPERTS),
    "qwen3_5": lambda: qwen3_5("qwen3_5", intermediate_size=96),
    "qwen3_5_moe": lambda: qwen3_5("qwen3_5_moe", **_EXPERTS),
    "jamba": jamba,
    "mamba": lambda: _mamba("mamba", state_size=8, time_step_rank=6),
    "falcon_mamba": lambda: _mamba("falcon_mamba", state_size=8, time_step_rank=6, tie_word_embeddings=False),
    "mamba2": lambda: _mamba("mamba2", num_heads=8, head_dim=16, state_size=16, n_groups=2, chunk_size=32),
    "olmo_hybrid": _olmo_hybrid,
    "zaya": _zaya,
}
