"""The demo's target: a small Nemotron-H that is trained for about a minute and saved as an ordinary checkpoint."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from nemotron_dspark.recipe import tiny
from nemotron_dspark.recipe.corpus import MODULES, Passage, passages, sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCAB = 1024
PATTERN = "M-*-M-*-"
HIDDEN = 128
LENGTH = 128  # tokens of a training sequence
BATCH = 8
PEAK_LR = 4e-3


@dataclasses.dataclass(frozen=True)
class TargetTraining:
    steps: int
    tokens: int
    loss: float  # smoothed, per token, nats
    parameters: int


def train_target(
    folder: Path, steps: int, *, seed: int = 0, progress: Callable[[int, float], None] | None = None
) -> TargetTraining:
    """Train a target and save it, its tokenizer and its generation config in ``folder``.

    ``progress`` is called with the steps done and the smoothed loss.
    """
    texts = sources(MODULES)
    tokenizer = tiny.make_tokenizer(texts, VOCAB)
    config = tiny.nemotron_h_config(
        PATTERN,
        VOCAB,
        HIDDEN,
        mamba_num_heads=4,
        mamba_head_dim=HIDDEN // 2,
        n_groups=1,
        max_position_embeddings=2048,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    loss = fit(model, token_stream(tokenizer, passages(texts, 12_000, seed)), steps, seed=seed, progress=progress)
    tiny.save_target(folder, model.eval(), tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return TargetTraining(steps, steps * BATCH * LENGTH, loss, parameters)


def fit(
    model: Any,
    stream: torch.Tensor,  # [tokens]
    steps: int,
    *,
    peak_lr: float = PEAK_LR,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> float:
    """Train a transformers model on random pieces of a row of tokens; the smoothed loss at the end."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    smoothed = None
    for step in range(steps):
        rate = min(1.0, (step + 1) / 30) * max(1 - step / steps, 0.02)
        for group in optimiser.param_groups:
            group["lr"] = peak_lr * rate
        starts = torch.randint(0, len(stream) - LENGTH, (BATCH, 1), generator=generator)
        batch = stream[starts + torch.arange(LENGTH)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        smoothed = loss.item() if smoothed is None else 0.97 * smoothed + 0.03 * loss.item()
        if progress:
            progress(step + 1, smoothed)
    return smoothed or float("nan")


def token_stream(tokenizer: "PreTrainedTokenizerBase", items: list[Passage]) -> torch.Tensor:
    """All conversations rendered by the chat template, one after the other, as one row of tokens."""
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": item.question}, {"role": "assistant", "content": item.answer}], tokenize=False
        )
        for item in items
    ]
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    return torch.tensor([token for row in ids for token in row])
