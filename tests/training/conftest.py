import dataclasses

import numpy as np
import pytest
import torch

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.drafts.config import DFlashConfig, DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft

HIDDEN, VOCABULARY, TAPS = 24, 53, 2


@dataclasses.dataclass
class Sample:
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    taps: torch.Tensor
    last: torch.Tensor


class MemoryCache:
    """Samples in memory with the interface of a target cache; the last hidden state tells the next token."""

    def __init__(self, samples: int = 24, seed: int = 0, dtype: torch.dtype = torch.bfloat16):
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator)
        self._samples = []
        for _ in range(samples):
            length = int(torch.randint(12, 40, (), generator=generator))
            ids = (torch.arange(length) * 7 + int(torch.randint(0, 5, (), generator=generator))) % 50 + 3
            mask = torch.ones(length, dtype=torch.bool)
            mask[: length // 3] = False
            if length % 3 == 0:
                mask[length * 2 // 3] = False  # two turns
            noise = torch.randn(length, HIDDEN, generator=generator) * 0.3
            taps = torch.cat((self.embedding[ids] + noise, noise), dim=-1)
            last = self.embedding[ids.roll(-1)] + noise
            self._samples.append(Sample(ids, mask, taps.to(dtype), last.to(dtype)))

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(sample.input_ids) for sample in self._samples])

    def input_ids(self, index: int) -> torch.Tensor:
        return self._samples[index].input_ids

    def loss_mask(self, index: int) -> np.ndarray:
        return self._samples[index].loss_mask.numpy()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def new_draft(
    seed: int = 0,
    cache: MemoryCache | None = None,
    attention: str = "auto",
    recompute_layers: bool = False,
    kind: type[DraftConfig] = DraftConfig,
    **changes,
) -> DSparkDraft:
    values = {
        "hidden_size": HIDDEN,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "block_size": 4,
        "mask_token_id": 1,
        "target_layer_ids": tuple(range(TAPS)),
        "num_target_layers": 4,
        "num_anchors": 8,
        "markov_rank": 6,
    }
    if kind is DFlashConfig:
        del values["markov_rank"]
    config = kind(**(values | changes))
    draft = DSparkDraft(config, seed=seed, attention=attention, recompute_layers=recompute_layers)
    if config.draft_vocab_size is not None:
        draft.set_vocabulary(torch.arange(config.draft_vocab_size) * VOCABULARY // config.draft_vocab_size)
    embedding = (cache or MemoryCache(1)).embedding
    draft.set_embeddings(embedding, embedding)
    return draft


def settings(**changes) -> TrainConfig:
    values = {
        "recipe": "paper",
        "device": "cpu",
        "lr": 3e-3,
        "local_batch_size": 2,
        "global_batch_size": 6,
        "max_steps": 9,
        "log_every": 2,
        "checkpoint_every": 3,
    }
    return TrainConfig(**(values | changes))


@pytest.fixture
def make_cache():
    return MemoryCache


@pytest.fixture
def make_draft():
    return new_draft


@pytest.fixture
def make_settings():
    return settings
