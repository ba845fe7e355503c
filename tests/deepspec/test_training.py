"""DeepSpec's trainer loop with our trainer classes: three optimiser steps end in the weights of our own loop."""

from pathlib import Path

import torch

from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.config import TrainConfig
from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.training import batches
from nemotron_dspark.training.loop import train


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
        device="cpu",
        lr=cfg.train.lr,
        warmup_ratio=cfg.train.warmup_ratio,
        weight_decay=cfg.train.weight_decay,
        global_batch_size=cfg.train.global_batch_size,
        max_steps=cfg.train.max_train_steps,
        checkpoint_every=cfg.logging.checkpointing_steps,
        num_anchors=cfg.model.get("num_anchors", 1),
    )


def test_three_steps_of_deepspecs_loop_give_the_weights_of_ours(make_config, monkeypatch, tmp_path):
    cfg = make_config("dspark")
    trainer, before = train_theirs(cfg)
    cache = TargetCache(cfg.data.target_cache_path)
    # More anchors than candidates: both take all of them, so only the order is left to be made the same.
    monkeypatch.setattr(batches, "_cached_order", lambda count, seed, epoch: order_of_deepspec(count, epoch))
    draft = DSparkDraft(DraftConfig.from_json(trainer.draft_model.config.to_dict()))
    draft.load_state_dict({name: value.clone() for name, value in before.items()}, assign=True)
    draft.set_embeddings(draft.embed_tokens.weight, draft.lm_head.weight)
    train(cache, draft, settings(cfg), tmp_path / "ours")
    theirs = DSparkDraft.load(Path(cfg.logging.checkpoint_dir) / "step_3")
    ours = DSparkDraft.load(tmp_path / "ours" / "checkpoints" / "step-00000003" / "draft")
    assert ours.config == theirs.config
    for name, value in ours.trainable_parameters().items():
        assert (value - before[name]).abs().max() > 1e-3, f"{name} has not moved"
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=0, atol=2e-6, msg=name)
