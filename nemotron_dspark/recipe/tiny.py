"""Small real checkpoints made on the spot: a BPE tokenizer with Nemotron 3's special tokens and ChatML, and a target.

They are ordinary checkpoint folders (config.json, safetensors, tokenizer files), so every stage treats them as it
treats a downloaded one. The demo trains one on real text; tests and the selftest use random weights.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

RESERVED = 32  # ids 0-31 are added tokens, as 0-999 are in Nemotron's tokenizers
_NAMED = {0: "<unk>", 1: "<s>", 2: "</s>", 10: "<|im_start|>", 11: "<|im_end|>", 12: "<think>", 13: "</think>"}
SPECIAL_TOKENS = [_NAMED.get(index, f"<SPECIAL_{index}>") for index in range(RESERVED)]

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``vocab_size`` ids (if ``texts`` has enough merges) with Nemotron 3's special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def nemotron_h_config(pattern: str = "M-*-M-*-", vocab_size: int = 384, hidden_size: int = 64, **changes: Any):
    """A small `NemotronHConfig`. ``pattern`` takes the four layer kinds M, *, - and E."""
    from transformers import NemotronHConfig

    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "hybrid_override_pattern": pattern,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "intermediate_size": 4 * hidden_size,
        "mamba_num_heads": 8,
        "mamba_head_dim": hidden_size // 4,
        "ssm_state_size": 16,
        "n_groups": 2,
        "conv_kernel": 4,
        "chunk_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": hidden_size,
        "moe_shared_expert_intermediate_size": hidden_size,
        "max_position_embeddings": 4096,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 11,
        "pad_token_id": 0,
        "use_mamba_kernels": True,
    }
    return NemotronHConfig(**(values | changes))


def decoder_config(family: str, vocab_size: int = 384, hidden_size: int = 64, num_layers: int = 6, **changes: Any):
    """A small config of an ordinary decoder: ``family`` is "llama" or "qwen3"."""
    from transformers import LlamaConfig, Qwen3Config

    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 11,
        "pad_token_id": 0,
    }
    return {"llama": LlamaConfig, "qwen3": Qwen3Config}[family](**(values | changes))


def random_model(
    config: Any, seed: int = 0, spread: float = 3.0, *, kind: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """A model with random weights, in fp32 and eval mode.

    Matrices are ``spread`` times larger than the usual initialisation, and Mamba mixers get convolutions and step sizes
    as large as trained ones have, so that attention, state and experts really influence the logits; with the usual
    initialisation a broken state would hide behind the residual stream.
    """
    torch.manual_seed(seed)
    model = kind.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear_attn" not in name and ".conv" in name and parameter.dim() == 3:
                parameter.uniform_(-0.7, 0.7)
            elif "linear_attn" not in name and name.endswith("dt_bias"):
                parameter.uniform_(-3.0, 0.0)  # steps of 0.05 to 0.7 before the input has its say
            elif parameter.dim() >= 2 and not any(part in name for part in ("embed", "conv", "A_log")):
                parameter.mul_(spread)
    return model


def save_target(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save model, tokenizer and generation config as an ordinary checkpoint folder; returns ``folder``."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


_SENTENCES = (
    "The state of a hybrid model is not only its keys and values.",
    "def advance(state, block, accepted):\n    return state.keep(block[:accepted])\n",
    "Every accepted token moves the recurrent state by exactly one step; 0123456789 [](){}<>=+-*/.",
)


def random_target(
    folder: Path, family: str = "nemotron_h", *, vocab_size: int = 384, seed: int = 0, **changes: Any
) -> Path:
    """A checkpoint folder with random weights and a tokenizer of ``vocab_size`` ids; returns ``folder``.

    Extra keywords change the config (``pattern="MEM*-"`` for nemotron_h).
    """
    tokenizer = make_tokenizer(_SENTENCES, vocab_size)
    if family == "nemotron_h":
        config = nemotron_h_config(vocab_size=vocab_size, **changes)
    else:
        config = decoder_config(family, vocab_size=vocab_size, **changes)
    return save_target(folder, random_model(config, seed), tokenizer)
