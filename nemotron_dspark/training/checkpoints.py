"""Checkpoints that are whole or absent: ``checkpoints/step-N/`` under a temporary name, then renamed.

In each: ``draft/`` (a slim copy with fp32 parameters, which `Draft.load` reads), ``optimiser.safetensors`` (AdamW's two
moments), ``state.json`` (`TrainState`) and ``manifest.json`` with every file's checksum, written last.

All tensors are full ones: rank 0 gathers and writes what is sharded, any number of processes reads it.
(torch.distributed.checkpoint would write the shards; its own format is pickle, and its safetensors are another set of
files for every number of processes.)
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from nemotron_dspark import files, folders
from nemotron_dspark.drafts.config import DraftConfig, Eagle3Config
from nemotron_dspark.drafts.dspark import Draft, write_draft
from nemotron_dspark.errors import InputError
from nemotron_dspark.training.metrics import StepSums

_NAME = re.compile(r"step-(\d{8})")
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class TrainState:
    """How far a run is. Order and anchors follow from the step, so this is all there is besides tensors."""

    step: int  # optimiser steps done
    tokens: int  # tokens seen
    seconds: float  # spent training, over all resumptions
    sums: StepSums  # of the metrics since their last line

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"sums": self.sums.to_json()}


def save_checkpoint(
    folder: Path,
    config: DraftConfig | Eagle3Config,
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    state: TrainState,
    keep: int,
    best: int | None = None,
) -> Path:
    """Write ``folder/step-N`` whole; returns its path. The newest ``keep`` stay, and that of the step ``best``."""
    final = step_folder(folder, state.step)
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_draft(temporary / "draft", config, parameters)
        content = save({name: tensor.cpu().contiguous() for name, tensor in moments.items()})
        files.write_whole(temporary / "optimiser.safetensors", lambda file: file.write(content))
        files.write_json(temporary / "state.json", state.to_json())
        written = sorted(path for path in temporary.rglob("*") if path.is_file())
        sums = {str(path.relative_to(temporary)): files.sha256(path) for path in written}
        files.write_json(temporary / MANIFEST, {"sha256": sums})
        shutil.rmtree(final, ignore_errors=True)  # one that was found damaged
        os.replace(temporary, final)
        files.fsync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the space back
    for old in list_checkpoints(folder)[:-keep]:
        if best is None or old != step_folder(folder, best):
            shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoint_bytes(trained: int, tensors: int = 0) -> int:
    """Bytes of a checkpoint of ``trained`` parameters: each in fp32, with two fp32 moments.

    Headers and checksums of so many ``tensors`` take about 120 bytes in each of three places.
    """
    return 12 * trained + 120 * 3 * tensors


def saving_bytes(trained: int) -> int:
    """Bytes of main memory while a checkpoint is written: the moments' file is made whole, then written."""
    return 8 * trained


def expected_disk(draft: Draft, checkpoints: int) -> int:
    """Bytes of so many checkpoints and of the finished draft, which has the target's embedding and head."""
    trained = sum(parameter.numel() for parameter in draft.trainable_parameters().values())
    finished = draft.compute_dtype.itemsize * (
        trained + draft.embed_tokens.weight.numel() + draft.lm_head.weight.numel()
    )
    return checkpoints * checkpoint_bytes(trained) + finished


def check_space(run_folder: Path, draft: Draft, most: int) -> None:
    """`EnvironmentFault` when the disk cannot hold ``most`` checkpoints (some may be there) and the draft."""
    there = len(list_checkpoints(run_folder / "checkpoints"))
    missing = expected_disk(draft, max(1, most - there))
    folders.check_space(
        run_folder,
        missing,
        "The checkpoints and the draft need",
        "Free some space, give --out on another disk, or keep fewer (train.keep_checkpoints); `nds plan` tells what a "
        "run needs before it starts.",
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


def read_state(checkpoint: Path) -> TrainState:
    """The state in a whole checkpoint; `InputError` for one of an earlier version."""
    values = files.read_json(checkpoint / "state.json")
    if "sums" not in values:
        raise InputError(
            f"{checkpoint} was written by an earlier version, which kept other tensors.",
            "Finish that run with the version that began it, or train into another --out.",
        )
    return TrainState(**values | {"sums": StepSums.from_json(values["sums"])})


def restore_parameters(checkpoint: Path, draft: Draft) -> dict[str, Tensor]:
    """Load the checkpoint's parameters into ``draft`` in place; returns the optimiser's moments."""
    try:
        saved = type(draft).load(checkpoint / "draft")
        moments = load_file(checkpoint / "optimiser.safetensors")
    except SafetensorError as error:
        raise InputError(
            f"{checkpoint} is damaged: {error}.", "Delete this checkpoint; the one before is used."
        ) from None
    if {**saved.config.to_json(), "dtype": ""} != {**draft.config.to_json(), "dtype": ""}:
        raise InputError(f"{checkpoint} holds a draft of another shape.", "Train into another --out.")
    if saved.d2t is not None and draft.d2t is not None and not torch.equal(saved.d2t, draft.d2t.cpu()):
        raise InputError(f"{checkpoint} holds a draft of another vocabulary.", "Train into another --out.")
    parameters = saved.trainable_parameters()
    with torch.no_grad():
        for name, parameter in draft.trainable_parameters().items():
            parameter.copy_(parameters[name])
    return moments
