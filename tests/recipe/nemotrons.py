"""Compact configs of the Nemotrons people run, made from a table of dimensions: what shapes a model, nothing else.

The spellings differ as they do in the published files: a pattern or a list of layer kinds under old or new names, the
attention's head dimension under two names or none.
"""

import dataclasses
from typing import Any

H_52 = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
H_98 = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
H_118 = "M-M-M-M*" + "-M-M-M-M-M*" * 9 + "-M-M-M-M-M-"
NANO_V2_56 = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
NANO_V2_62 = "M-M-M-M*" + "-M-M-M-M*" * 5 + "-M-M-M-M-"
NANO_3_42 = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
NANO_3_52 = "MEMEM*" + "EMEMEM*" * 4 + "EMEMEMEM*EMEMEMEME"
SUPER_88 = "MEMEMEM*" + "EMEMEMEM*" * 2 + "EMEMEMEMEM*" * 4 + "EMEMEMEM*EMEMEMEME"
ULTRA_108 = "MEMEMEM*EMEMEM*" + "EMEMEMEM*EMEMEMEM*EMEMEM*" * 3 + "EMEMEMEM*EMEMEMEME"

OLD_NAMES = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
NEW_NAMES = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


@dataclasses.dataclass(frozen=True)
class Nemotron:
    """One row of the table, and what must follow from it."""

    repository: str
    pattern: str
    hidden: int
    heads: int
    kv_heads: int
    mlp: int  # width of the MLP, or of one expert
    mamba: tuple[int, int, int]  # heads, their width, state size
    positions: int
    billions: float  # parameters when built
    attention: tuple[int, ...]  # ids of the attention layers
    taps: tuple[int, ...]
    swiglu: int  # width of the draft's MLP
    experts: dict[str, int] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.repository.split("/")[1]

    def config(self) -> dict[str, Any]:
        """A config.json of this shape."""
        values = COMMON | {
            "hybrid_override_pattern": self.pattern,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.mlp,
            "mamba_num_heads": self.mamba[0],
            "mamba_head_dim": self.mamba[1],
            "ssm_state_size": self.mamba[2],
            "max_position_embeddings": self.positions,
        }
        if self.experts:
            values |= {"moe_intermediate_size": self.mlp, "moe_shared_expert_intermediate_size": 2 * self.mlp}
        return {key: value for key, value in (values | self.experts | self.extra).items() if value is not None}


COMMON = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"},  # must not be run
    "vocab_size": 131072,
    "head_dim": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "layer_norm_epsilon": 1e-5,
    "mlp_hidden_act": "relu2",
    "rope_theta": 10000,  # unused by the architecture
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "time_step_limit": [0.0, float("inf")],
}
OLD_HEAD_DIM = {"head_dim": None, "attention_head_dim": 128}
EXPERTS_128 = {"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 6}
EXPERTS_512 = {"n_routed_experts": 512, "n_shared_experts": 1, "num_experts_per_tok": 22}


def listed(pattern: str, names: dict[str, str]) -> dict[str, Any]:
    """The layers as the list that newer configs have in the place of a pattern."""
    return {"hybrid_override_pattern": None, "layers_block_type": [names[character] for character in pattern]}


SHAPE_H_8B = (H_52, 4096, 32, 8, 21504, (128, 64, 128))
SHAPE_H_47B = (H_98, 8192, 64, 8, 30720, (256, 64, 256))
SHAPE_NANO_3_30B = (NANO_3_52, 2688, 32, 2, 1856, (64, 64, 128))
FROM_H_8B = (8.101, (7, 18, 29, 40), (1, 13, 25, 37, 49), 14336)
FROM_H_47B = (46.792, (17, 38, 49, 60, 86), (1, 25, 49, 72, 95), 20480)
FROM_NANO_3_30B = (31.578, (5, 12, 19, 26, 33, 42), (1, 12, 26, 37, 49), 6144)
SUPER = (SUPER_88, 4096, 32, 2, 2688, (128, 64, 128), 262144, 120.669, (7, 16, 25, 36, 47, 58, 69, 78))
MTP_PATTERN = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
MTP_LIST = {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["attention", "moe"]}

NEMOTRONS = (
    Nemotron(
        "nvidia/Nemotron-H-4B-Base-8K", H_52, 3072, 32, 8, 12288, (112, 64, 128), 8192,
        4.489, (7, 18, 29, 40), (1, 13, 25, 37, 49), 8192, extra=OLD_HEAD_DIM | {"chunk_size": 256},
    ),
    Nemotron("nvidia/Nemotron-H-8B-Base-8K", *SHAPE_H_8B, 8192, *FROM_H_8B, extra=OLD_HEAD_DIM),
    Nemotron("nvidia/Nemotron-H-8B-Reasoning-128K", *SHAPE_H_8B, 131072, *FROM_H_8B, extra=OLD_HEAD_DIM),
    Nemotron("nvidia/Nemotron-H-47B-Base-8K", *SHAPE_H_47B, 8192, *FROM_H_47B, extra=OLD_HEAD_DIM),
    Nemotron(
        "nvidia/Nemotron-H-47B-Reasoning-128K", *SHAPE_H_47B, 131072, *FROM_H_47B, extra={"head_dim": None}
    ),
    Nemotron(
        "nvidia/Nemotron-H-56B-Base-8K", H_118, 8192, 64, 8, 32768, (256, 64, 256), 8192,
        56.324, tuple(range(7, 107, 11)), (1, 29, 58, 87, 115), 22016, extra=OLD_HEAD_DIM,
    ),
    Nemotron(
        "nvidia/NVIDIA-Nemotron-Nano-9B-v2", NANO_V2_56, 4480, 40, 8, 15680, (128, 80, 128), 131072,
        8.888, (14, 21, 30, 39), (1, 14, 27, 39, 53), 10496,
    ),
    Nemotron(
        "nvidia/NVIDIA-Nemotron-Nano-12B-v2", NANO_V2_62, 5120, 40, 8, 20480, (128, 80, 128), 131072,
        12.310, tuple(range(7, 53, 9)), (1, 16, 30, 43, 59), 13824, extra={"eos_token_id": 12},
    ),
    Nemotron(
        "nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16", NANO_3_42, 3136, 40, 8, 12544, (96, 80, 128), 262144,
        3.974, (12, 17, 24, 32), (1, 12, 20, 32, 39), 8448, extra={"chunk_size": 256},
    ),
    Nemotron(
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", *SHAPE_NANO_3_30B, 262144, *FROM_NANO_3_30B,
        experts=EXPERTS_128,
    ),
    Nemotron(
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16", *SHAPE_NANO_3_30B, 262144, *FROM_NANO_3_30B,
        experts=EXPERTS_128, extra=listed(NANO_3_52, NEW_NAMES),
    ),
    Nemotron(
        "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8", *SUPER, (1, 22, 43, 64, 85), 9216,
        experts=EXPERTS_512 | {"moe_latent_size": 1024}, extra=MTP_PATTERN,
    ),
    Nemotron(
        "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4", *SUPER, (1, 22, 43, 64, 85), 9216,
        experts=EXPERTS_512 | {"moe_latent_size": 1024},
        extra=MTP_PATTERN | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
    ),
    Nemotron(
        "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16", ULTRA_108, 8192, 64, 2, 5120, (256, 64, 128), 262144,
        549.309, (7, 14, 23, 32, 39, 48, 57, 64, 73, 82, 89, 98), (1, 27, 53, 79, 105), 18432,
        experts=EXPERTS_512 | {"moe_latent_size": 2048},
        extra=listed(ULTRA_108, OLD_NAMES) | MTP_LIST | {"time_step_limit": [0.0, 1e308]},
    ),
    Nemotron(
        "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4", *SHAPE_NANO_3_30B, 1048576, *FROM_NANO_3_30B,
        experts=EXPERTS_128, extra=listed(NANO_3_52, OLD_NAMES) | MTP_LIST | {"num_hidden_layers": 52},
    ),
)  # fmt: skip

MINI = {  # nvidia/Nemotron-Mini-4B-Instruct, an ordinary decoder
    "model_type": "nemotron",
    "hidden_act": "relu2",
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "kv_channels": 128,
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "vocab_size": 256000,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
LLAMA_8B = {  # nvidia/Llama-3.1-Nemotron-Nano-8B-v1
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
    "eos_token_id": [128001, 128008, 128009],
}
SUPER_49B = {  # nvidia/Llama-3_3-Nemotron-Super-49B-v1: only its own code builds it
    "model_type": "nemotron-nas",
    "auto_map": {
        "AutoConfig": "configuration_decilm.DeciLMConfig",
        "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
    },
    "block_configs": [{"attention": {"no_op": False}, "ffn": {"no_op": False}}] * 80,
    "hidden_size": 8192,
    "vocab_size": 128256,
}
