"""A small config per model type: what `test_families` runs every promise on. A new family adds one function here."""

from collections.abc import Callable
from typing import Any

from nemotron_dspark.recipe import tiny

VOCAB = 384
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


TINY: dict[str, Callable[[], Any]] = {
    "nemotron_h": lambda: tiny.nemotron_h_config("ME*-M*-M", VOCAB),
    "llama": lambda: tiny.decoder_config("llama", VOCAB),
    "qwen3": lambda: tiny.decoder_config("qwen3", VOCAB),
    "olmo2": _olmo2,
}
