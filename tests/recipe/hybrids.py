"""Configs of hybrids that people run beside the Nemotrons: what shapes a model, nothing else.

Each says in its preset where its values are from, and gives the number of parameters that is published for it. Numbers
that multiply something are left out where they were not seen: they shape nothing.
"""

import copy
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """One row of the table, and what must follow from it."""

    repository: str
    values: dict[str, Any]
    billions: float  # parameters of the language model when built
    attention: tuple[int, ...]  # ids of the layers that attend
    taps: tuple[int, ...]
    swiglu: int  # width of the draft's MLP
    rope: float | None

    @property
    def name(self) -> str:
        return self.repository.split("/")[1]

    def config(self) -> dict[str, Any]:
        """A config.json of this shape."""
        return copy.deepcopy(self.values)


BAMBA_9B = {
    "model_type": "bamba",
    "attention_bias": False,
    "attn_layer_indices": [9, 18, 27],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "mamba_chunk_size": 256,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
GRANITE_4_H_SMALL = {
    "model_type": "granitemoehybrid",
    "hidden_size": 4096,
    "intermediate_size": 768,
    "layer_types": ["attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)],
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "num_local_experts": 72,
    "position_embedding_type": "nope",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000,  # unused: no position embedding
    "shared_intermediate_size": 1536,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 100352,
}
FALCON_H1_7B = {
    "model_type": "falcon_h1",
    "head_dim": 128,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "mamba_d_conv": 4,
    "mamba_d_head": 128,
    "mamba_d_ssm": 3072,
    "mamba_d_state": 256,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 24,
    "mamba_rms_norm": False,
    "max_position_embeddings": 262144,
    "num_attention_heads": 12,
    "num_hidden_layers": 44,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1e11,
    "tie_word_embeddings": False,
    "vocab_size": 130048,
}
QWEN3_NEXT_80B = {
    "model_type": "qwen3_next",
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
QWEN3_5_35B = {
    "model_type": "qwen3_5_moe",
    "text_config": {
        "model_type": "qwen3_5_moe_text",
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": 2048,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 10,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "moe_intermediate_size": 512,
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "vocab_size": 248320,
    },
    "tie_word_embeddings": False,
}
LFM2_1B = {
    "model_type": "lfm2",
    "block_auto_adjust_ff_dim": True,
    "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "conv_L_cache": 3,
    "conv_bias": False,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "hidden_size": 2048,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-05,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "vocab_size": 65536,
}


HYBRIDS = (
    Hybrid(
        "ibm-granite/granite-4.0-h-small", GRANITE_4_H_SMALL, 32.207, (5, 15, 25, 35), (1, 10, 19, 28, 35), 9216, None
    ),
    Hybrid("tiiuae/Falcon-H1-7B-Instruct", FALCON_H1_7B, 7.586, tuple(range(44)), (1, 11, 21, 31, 41), 12288, 1e11),
    Hybrid(
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        QWEN3_NEXT_80B,
        79.674,
        tuple(range(3, 48, 4)),
        (3, 11, 23, 35, 43),
        4608,
        1e7,
    ),
    Hybrid("Qwen/Qwen3.5-35B-A3B", QWEN3_5_35B, 34.661, tuple(range(3, 40, 4)), (3, 11, 19, 27, 35), 4608, 1e7),
    Hybrid("LiquidAI/LFM2-1.2B", LFM2_1B, 1.170, (2, 5, 8, 10, 12, 14), (2, 5, 8, 10, 12), 8192, 1e6),
    Hybrid("ibm-ai-platform/Bamba-9B-v2", BAMBA_9B, 9.780, (9, 18, 27), (1, 9, 15, 22, 27), 14336, 1e4),
)
