"""The target cache of a DeepSpec run: `stages.build_cache` with the values of a DeepSpec config.

DeepSpec's script would run a hybrid unchecked, looks for the embedding under another name and refuses a folder that is
not empty. Here the target is proven, and several machines build one cache, each on all its GPUs.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemotron_dspark import stages
from nemotron_dspark.cache.build import BuildProgress
from nemotron_dspark.config.run import CacheConfig, DataConfig, DraftSection, RunConfig, TargetConfig
from nemotron_dspark.data.sources import Given
from nemotron_dspark.deepspec.config_file import template_name
from nemotron_dspark.distributed import init_distributed
from nemotron_dspark.errors import InputError
from nemotron_dspark.stages import CacheReport
from nemotron_dspark.targets import Checkpoint


def run_config(cfg: Mapping[str, Any], *, min_loss_tokens: int, shard_bytes: int, device: str = "auto") -> RunConfig:
    """What the DeepSpec config ``cfg`` asks for; `InputError` when the target has another chat template."""
    model, data = cfg["model"], cfg["data"]
    config = RunConfig(
        target=TargetConfig(name=str(model["target_model_name_or_path"]), device=device),
        draft=DraftSection(
            taps=[int(tap) for tap in model["target_layer_ids"]], mask_token_id=model.get("mask_token_id")
        ),
        data=DataConfig(max_length=int(data["max_length"]), min_loss_tokens=min_loss_tokens),
        cache=CacheConfig(shard_bytes=shard_bytes),
    )
    stated, name = data.get("chat_template"), template_name(Checkpoint.of(config.target).load_tokenizer())
    if stated not in (None, name):
        raise InputError(
            f"The config says the chat template {stated!r}, the target's tokenizer has {name!r}.",
            f"Use --opts data.chat_template={name!r}.",
        )
    return config


def prepare(
    config: RunConfig,
    data: Given,
    out: Path,
    nodes: Mapping[str, str],
    on_progress: Callable[[BuildProgress], None] | None = None,
) -> CacheReport | None:
    """Build the cache, or finish it; errors as `stages.build_cache`.

    ``nodes`` are the variables of `launch.Nodes`: the machines, of which each calls this alike. None on all but the
    first.
    """
    if int(nodes["WORLD_SIZE"]) > 1:
        os.environ.update(nodes)
        os.environ.setdefault("LOCAL_WORLD_SIZE", "1")  # a process a machine, unless torchrun says otherwise
    masked = config.draft.mask_token_id is not None  # EAGLE-3 has no mask token
    with init_distributed() as context:
        show = on_progress if context.is_main else None
        report = stages.build_cache(config, data, out, masked=masked, on_progress=show, context=context)
    return report if context.is_main else None
