import pytest
import torch

from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft

# heads·head_dim (96) is not the hidden size (64), as for some Nemotron targets.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "num_target_layers": 8,
}


def small_config(**changes) -> DraftConfig:
    values = {
        "num_hidden_layers": 2,
        "block_size": 5,
        "mask_token_id": 3,
        "target_layer_ids": (1, 4),
        "num_anchors": 16,
        "markov_rank": 12,
    }
    return DraftConfig(**(SHAPE | values | changes))


def small_draft(
    seed: int = 0, spread: float = 5.0, attention: str = "auto", recompute_layers: bool = False, **changes
) -> DSparkDraft:
    """A draft with weights large enough that every part shows in its output."""
    config = small_config(**changes)
    draft = DSparkDraft(config, seed=seed, attention=attention, recompute_layers=recompute_layers)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in draft.trainable_parameters().values():
            if parameter.dim() > 1:
                parameter.mul_(spread)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    shape = (config.vocab_size, config.hidden_size)
    draft.set_embeddings(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
    return draft


def block_logits(draft: DSparkDraft, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Logits [..., γ, V] of whole blocks [..., γ, H] whose previous tokens [..., γ] are known."""
    latents = draft.markov_head.latents(hidden, draft.markov_head.embed(previous, hidden.dtype))
    base = draft.base_logits(hidden)
    return base if latents is None else base + draft.markov_head.markov_w2(latents)


@pytest.fixture
def make_draft():
    return small_draft


@pytest.fixture
def make_config():
    return small_config
