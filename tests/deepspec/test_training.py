"""DeepSpec's trainer loop with our trainer classes: three optimiser steps end in the weights of our own loop."""

import math
import warnings
from pathlib import Path

import pytest
import torch

from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.config import TrainConfig
from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.training import schedule
from nemotron_dspark.training.batches import collate_unrolled
from nemotron_dspark.training.eagle3_objective import Eagle3Objective
from nemotron_dspark.training.optimiser import Optimiser, learning_rate
from nemotron_dspark.training.source import CacheSource
from nemotron_dspark.training.trainer import Trainer


def train_theirs(cfg):
    """DeepSpec's loop on ``cfg``: the trainer, and the draft's weights before the first step."""
    torch.manual_seed(cfg.seed)
    trainer = cfg.train.trainer_cls(0, cfg)
    before = {name: value.clone() for name, value in trainer.draft_model.state_dict().items()}
    trainer.train()
    return trainer, before


def order_of_deepspec(count, epoch):
    """The order of DeepSpec's sampler with its own seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(42 + epoch)).numpy()


def settings(cfg):
    """Our spelling of the same run."""
    return TrainConfig(
        recipe="paper",
        device="cpu",
        lr=cfg.train.lr,
        warmup_ratio=cfg.train.warmup_ratio,
        weight_decay=cfg.train.weight_decay,
        local_batch_size=cfg.train.local_batch_size,
        global_batch_size=cfg.train.global_batch_size,
        max_steps=cfg.train.max_train_steps,
        checkpoint_every=cfg.logging.checkpointing_steps,
        num_anchors=cfg.model.get("num_anchors", 1),
        seed=20261122,  # orders are remembered by seed, and ours must not be another test's
    )


def test_three_steps_of_deepspecs_loop_give_the_weights_of_ours(make_config, monkeypatch, tmp_path):
    """One forward a step: there both divide by the weight of the same slots, in DeepSpec those of all its ranks."""
    cfg = make_config("dspark")
    cfg.train.local_batch_size = cfg.train.global_batch_size
    trainer, before = train_theirs(cfg)
    cache = TargetCache(cfg.data.target_cache_path)
    # More anchors than candidates: both take all of them, so only the order is left to be made the same.
    monkeypatch.setattr(schedule, "epoch_order", lambda count, seed, epoch: order_of_deepspec(count, epoch))
    draft = DSparkDraft(DraftConfig.from_json(trainer.draft_model.config.to_dict()))
    draft.load_state_dict({name: value.clone() for name, value in before.items()}, assign=True)
    draft.set_embeddings(draft.embed_tokens.weight, draft.lm_head.weight)
    Trainer(CacheSource(cache), draft, settings(cfg), tmp_path / "ours").run()
    theirs = DSparkDraft.load(Path(cfg.logging.checkpoint_dir) / "step_3")
    ours = DSparkDraft.load(tmp_path / "ours" / "checkpoints" / "step-00000003" / "draft")
    assert_same_weights(ours, theirs, before)


def test_three_steps_of_an_eagle3_draft_too(make_config):
    cfg = make_config("eagle3")
    _, before = train_theirs(cfg)
    theirs = Eagle3Draft.load(Path(cfg.logging.checkpoint_dir) / "step_3")
    draft = Eagle3Draft(theirs.config, seed=None)
    draft.load_state_dict({name: value.clone() for name, value in before.items()}, assign=True)
    draft.set_embeddings(draft.embed_tokens.weight, draft.lm_head.weight)
    cache, config = TargetCache(cfg.data.target_cache_path), settings(cfg)
    order = order_of_deepspec(len(cache), 0)
    objective, optimiser = Eagle3Objective(draft), Optimiser(draft.trainable_parameters(), config)
    for step in range(3):
        for sample in (cache[int(at)] for at in order[step * 4 : step * 4 + 4]):
            (objective(collate_unrolled([sample], draft.config.ttt_length)).value / 4).backward()
        optimiser.clip(config.max_grad_norm)
        optimiser.step(learning_rate(step, 4, config))
    assert_same_weights(draft, theirs, before)


def assert_same_weights(ours, theirs, before):
    assert ours.config == theirs.config
    for name, value in ours.trainable_parameters().items():
        assert (value - before[name]).abs().max() > 1e-3, f"{name} has not moved"
        # Adam's first steps are as large for a gradient that is nearly nothing, and so is what rounding makes of it.
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(("total", "ratio"), [(20, 0.1), (100, 0.04), (50, 0.0)])
def test_rates_are_deepspecs_up_to_a_known_factor(deepspec_on_cpu, total, ratio):
    """DeepSpec's cosine advances once before its first use, which scales it by 1 / cos²(π / 2T): 1.0003 for T = 96."""
    from deepspec.utils.optim import BF16Optimizer

    model = torch.nn.Linear(1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = BF16Optimizer(model, lr=1e-3, total_steps=total, warmup_ratio=ratio)
        rates = []
        for _ in range(total):
            rates.append(theirs.get_learning_rate())
            theirs.step()
    warmup = int(ratio * total)
    factor = 1 / math.cos(math.pi / 2 / (total - warmup)) ** 2
    config = TrainConfig(recipe="paper", lr=1e-3, warmup_ratio=ratio)
    for step, rate in enumerate(rates):
        own = learning_rate(step, total, config)
        expected = own if step < warmup else own * factor
        assert rate == pytest.approx(expected, rel=1e-6), step
