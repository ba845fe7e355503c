"""Checkpoints that are whole or absent: ``checkpoints/step-N/`` under a temporary name, then renamed.

In each: ``draft/`` (a slim copy that `DSparkDraft.load` reads), ``optimiser.safetensors``, ``state.json`` (the step and
the sums of the metrics since their last line) and ``manifest.json`` with every file's checksum, written last.

All tensors are whole, also those that several processes trained in parts: the first one gathers and writes them, any
number of processes reads them. (torch.distributed.checkpoint would write the parts; its own format is pickle, and its
safetensors are another set of files for every number of processes.)
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from nemotron_dspark import files
from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft, write_draft
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.training.step_sums import StepSums

_NAME = re.compile(r"step-(\d{8})")
MANIFEST = "manifest.json"
RUN_FILE = "run.json"  # of the run's folder


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is. Order and anchors follow from the step, so this is all there is besides tensors."""

    step: int  # optimiser steps done
    tokens: int  # tokens seen
    seconds: float  # spent training, over all resumptions
    sums: StepSums  # of the steps since the last line of metrics


def save_checkpoint(
    folder: Path,
    config: DraftConfig,
    weights: Mapping[str, Tensor],
    optimiser_tensors: Mapping[str, Tensor],
    progress: Progress,
    keep: int,
) -> Path:
    """Write ``folder/step-N`` whole and remove all but the newest ``keep``; returns its path."""
    final = step_folder(folder, progress.step)
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_draft(temporary / "draft", config, weights)
        content = save({name: tensor.cpu().contiguous() for name, tensor in optimiser_tensors.items()})
        files.write_whole(temporary / "optimiser.safetensors", lambda file: file.write(content))
        files.write_json(temporary / "state.json", vars(progress) | {"sums": progress.sums.to_json()})
        written = sorted(path for path in temporary.rglob("*") if path.is_file())
        sums = {str(path.relative_to(temporary)): files.sha256(path) for path in written}
        files.write_json(temporary / MANIFEST, {"sha256": sums})
        shutil.rmtree(final, ignore_errors=True)  # one that was found damaged
        os.replace(temporary, final)
        files.fsync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the space back
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoint_bytes(trained: int, weight_bytes: int) -> int:
    """Weights and two fp32 moments of ``trained`` parameters, and fp32 masters unless the weights are fp32."""
    return (weight_bytes + 8 + (4 if weight_bytes < 4 else 0)) * trained


def expected_disk(draft: DSparkDraft, checkpoints: int) -> int:
    """Bytes of so many checkpoints and of the finished draft, which has the target's embedding and head."""
    trained = sum(parameter.numel() for parameter in draft.trainable_parameters().values())
    width = draft.dtype.itemsize
    return checkpoints * checkpoint_bytes(trained, width) + width * (trained + 2 * draft.lm_head.weight.numel())


def check_space(run_folder: Path, draft: DSparkDraft, keep: int) -> None:
    """`EnvironmentFault` when the disk cannot hold the checkpoints that are still to come and the finished draft.

    ``keep`` of them stay and one more is being written.
    """
    there = len(list_checkpoints(run_folder / "checkpoints"))
    missing = expected_disk(draft, max(1, keep + 1 - there))
    free = shutil.disk_usage(run_folder).free
    if free < missing:
        raise EnvironmentFault(
            f"The checkpoints and the draft need {files.size_text(missing)} more, and {run_folder} has "
            f"{files.size_text(free)} free.",
            "Free some space, give --out on another disk, or keep fewer (train.keep_checkpoints); `nds plan` tells "
            "what a run needs before it starts.",
        )


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps is."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file())


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        sums = files.read_json(checkpoint / MANIFEST)["sha256"]
        for name, digest in sums.items():
            if not (checkpoint / name).is_file():
                return f"{checkpoint / name} is missing"
            if files.sha256(checkpoint / name) != digest:
                return f"{checkpoint / name} is not what was written"
    except (InputError, KeyError, TypeError) as error:
        return f"{checkpoint / MANIFEST} is malformed ({error})"
    return None


def read_progress(checkpoint: Path) -> Progress:
    """Raises `InputError` for a checkpoint that an older version wrote, whose sums had no names."""
    values = files.read_json(checkpoint / "state.json")
    if "sums" not in values:
        raise InputError(
            f"{checkpoint} was written by an older version of nds, whose checkpoints this one does not read.",
            f"Finish that run with the version that its {RUN_FILE} names, or give a new folder to --out.",
        )
    return Progress(values["step"], values["tokens"], values["seconds"], StepSums.from_json(values["sums"]))


def restore_weights(checkpoint: Path, draft: DSparkDraft) -> dict[str, Tensor]:
    """Load the checkpoint's weights into ``draft`` in place; returns the optimiser's tensors."""
    try:
        saved = DSparkDraft.load(checkpoint / "draft")
        tensors = load_file(checkpoint / "optimiser.safetensors")
    except SafetensorError as error:
        raise InputError(
            f"{checkpoint} is damaged: {error}.", "Delete this checkpoint; the one before is used."
        ) from None
    if {**saved.config.to_json(), "dtype": ""} != {**draft.config.to_json(), "dtype": ""}:
        raise InputError(f"{checkpoint} holds a draft of another shape.", "Train into another --out.")
    weights = saved.trainable_parameters()
    with torch.no_grad():
        for name, parameter in draft.trainable_parameters().items():
            parameter.copy_(weights[name])
    return tensors
