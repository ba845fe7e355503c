"""The folder of a run: it belongs to one run, explains itself, and ends with the finished draft."""

import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from nemotron_dspark import files
from nemotron_dspark._version import __version__
from nemotron_dspark.config import RunConfig
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.errors import InputError
from nemotron_dspark.folders import check_claim
from nemotron_dspark.training import online

RUN_FILE = "run.json"
# Keys of `train` that change neither the order of samples nor a number that is computed, but for its rounding.
FREE_KEYS = (
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "tracker",
    "device",
    "attention",
    "parallel",
    "inference_gpus",
    "activation_checkpointing",
    "local_batch_size",
    "packed",
)


def lock_run_dir(run_folder: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Refuse a folder that holds a run with other settings, or any run when ``resume`` is False."""
    path = run_folder / RUN_FILE
    begun = files.read_json(path).get("settings", {}) if path.is_file() else None
    if begun is not None and not resume:
        raise InputError(f"{run_folder} already holds a run.", "Give a new folder to --out, or leave out --fresh.")
    for key in FREE_KEYS:  # some were not free once
        (begun or {}).get("train", {}).pop(key, None)
    (begun or {}).get("train", {}).setdefault("init", "random")  # what all drafts began with once
    (begun or {}).get("train", {}).setdefault("window", None)
    check_claim(run_folder, "a run", begun, settings, ours=[online.FOLDER])  # samples of a run that never began


def read_run_info(run_folder: Path) -> dict[str, Any]:
    """What `write_run_info` wrote in an earlier call; empty for a new run."""
    path = run_folder / RUN_FILE
    return files.read_json(path) if path.is_file() else {}


def write_run_info(
    run_folder: Path,
    settings: Mapping[str, Any],
    config: RunConfig,
    notes: Sequence[str],
    read_from: Path,
    tilings: Mapping[str, Mapping[str, int]],
) -> None:
    """Write what was asked, what was assumed, and what it runs with. ``read_from`` is the cache or the conversations.

    ``tilings`` are the objective's by type of device. They are measured once: with others, a run that goes on would sum
    in another order.

    ``config.yaml`` can be given to --config again.
    """
    versions = {
        "nds": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    content = {
        "settings": settings,
        "read_from": str(read_from),
        "tilings": tilings,
        "notes": list(notes),
        "versions": versions,
    }
    files.write_json(run_folder / RUN_FILE, content)
    files.write_text(run_folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def export_draft(checkpoint: Path, draft: Draft, folder: Path) -> Path:
    """Write the checkpoint's parameters, with the embeddings and in the compute type of ``draft``, as a whole draft."""
    embedding, head = draft.embed_tokens.weight, draft.lm_head.weight  # of a part of the vocabulary: its part
    draft = type(draft).load(checkpoint / "draft", dtype=draft.compute_dtype)
    draft.set_embeddings(embedding, head)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    draft.save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    files.fsync_folder(folder.parent)
    return folder
