"""Does a cache fit a DeepSpec config, and does the config fit the machine? Answered before anything long starts.

DeepSpec asks some of this too, in bare asserts and after every rank has built its draft.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron_dspark.cache.deepspec_layout import Manifest
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.spec import TargetSpec


def check_cache(cfg: Mapping[str, Any], spec: TargetSpec) -> TargetCache:
    """The cache that ``cfg`` names, once it is certain that it was made from this target, with these taps and template.

    Raises:
        InputError: there is none, it is damaged, or it was made from something else. The message names both sides.
    """
    given = cfg["data"].get("target_cache_path")
    if not given:
        raise InputError(
            "The config names no target cache.",
            "Build one with `nds deepspec prepare`, then add --opts data.target_cache_path=FOLDER.",
        )
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise InputError(f"The target cache {folder} does not exist.", "Build it with `nds deepspec prepare`.")
    _check_manifest(Manifest.read(folder), cfg, spec, folder)
    return TargetCache(folder)


def _check_manifest(manifest: Manifest, cfg: Mapping[str, Any], spec: TargetSpec, folder: Path) -> None:
    again = "Give the cache that was built for this config, or build one with `nds deepspec prepare`."
    target = str(cfg["model"]["target_model_name_or_path"])
    if manifest.target_name is not None and manifest.target_name != target:
        raise InputError(
            f"{folder} was made from the target {manifest.target_name}, the config says {target}.",
            f"{again} If both are the same model, write the cache's spelling into the config.",
        )
    if manifest.hidden_size != spec.hidden_size:
        raise InputError(
            f"{folder} holds hidden states of size {manifest.hidden_size}, those of {target} have {spec.hidden_size}.",
            again,
        )
    taps = [int(tap) for tap in cfg["model"]["target_layer_ids"]]
    if list(manifest.taps) != taps:
        raise InputError(f"{folder} holds the taps {list(manifest.taps)}, the config asks for {taps}.", again)
    made_with, wanted = manifest.extra.get("chat_template"), cfg["data"].get("chat_template")
    if made_with is not None and wanted is not None and made_with != wanted:
        raise InputError(
            f"{folder} was made with the chat template {made_with!r}, the config says {wanted!r}.",
            f"{again} Or set data.chat_template to {made_with!r}, if that is what the target is served with.",
        )


def check_batches(cfg: Mapping[str, Any], num_samples: int, workers: int) -> None:
    """`InputError` when the batch sizes of ``cfg`` do not fit ``workers`` (GPUs of all nodes) or the cache."""
    local, whole = int(cfg["train"]["local_batch_size"]), int(cfg["train"]["global_batch_size"])
    if whole % (workers * local):
        raise InputError(
            f"train.global_batch_size {whole} is not a multiple of {workers} GPUs x train.local_batch_size {local}.",
            "Change one of them with --opts.",
        )
    if num_samples < whole:
        raise InputError(
            f"The cache has {num_samples} samples, but one optimiser step takes {whole}.",
            f"Add data, or use --opts train.global_batch_size={num_samples // (workers * local) * workers * local}.",
        )
