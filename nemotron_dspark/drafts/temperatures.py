"""The calibration of a draft, in a folder beside it: temperatures of its confidence head, lines of that or its margins.

`calibration.json` is ours: of what draft they are, and a fit for each temperature of sampling. Engines read one fit:
SGLang's `--speculative-dspark-confidence-sts-path` and TensorRT-LLM's `confidence_sts_path` take a file with a list
`temperatures`, one a slot.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemotron_dspark import files
from nemotron_dspark.errors import InputError

FOLDER = "calibration"
FILE = "calibration.json"
_MARKS = ("confidence_head.proj.weight", "norm.weight")  # small, and every step of training changes them


def engine_file(sampled_at: float) -> str:
    """Name of the engines' file of a fit at one temperature of sampling."""
    return f"confidence_sts_{sampled_at:g}.json"


def digest(draft_folder: Path) -> str:
    """Tells drafts apart: SHA-256 of the confidence head and of the norm before it, as they are stored.

    Raises:
        InputError: the draft cannot be read.
    """
    found = hashlib.sha256()
    try:
        with safe_open(Path(draft_folder) / "model.safetensors", framework="pt") as file:
            for name in sorted(set(_MARKS) & set(file.keys())):
                found.update(file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
    except (OSError, SafetensorError) as error:
        raise InputError(f"The draft in {draft_folder} cannot be read: {error}.", "Give a whole draft.") from None
    return found.hexdigest()


Temperatures = dict[float, tuple[float, ...]]  # [γ] by temperature of sampling
Lines = dict[float, tuple[tuple[float, ...], tuple[float, ...]]]  # weights [γ] and biases [γ], likewise


def read_calibration(draft_folder: Path, block_size: int) -> tuple[Temperatures | None, Lines | None]:
    """The draft's calibration: temperatures of its confidence head, and lines of that, or of margins where it has none.

    Raises:
        InputError: it is not a number a slot, or was fitted to other weights.
    """
    path = Path(draft_folder) / FOLDER / FILE
    if not path.is_file():
        return None, None
    again = f"Delete {path.parent} and run `nds calibrate` again."
    found = files.read_json(path)
    try:
        fits = {float(fit["sampled_at"]): fit for fit in found["fits"]}
        made_for = found["draft_digest"]
        heads = {at: _numbers(fit["temperatures"], block_size) for at, fit in fits.items() if fit["temperatures"]}
        lines = {
            at: (_numbers(line["weights"], block_size, -math.inf), _numbers(line["biases"], block_size, -math.inf))
            for at, fit in fits.items()
            if (line := fit.get("with_bias") if fit["temperatures"] else fit)
        }
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path} does not hold {block_size} numbers, one a slot.", again) from None
    if made_for != digest(draft_folder):
        raise InputError(f"{path} was fitted to a draft with other weights.", again)
    return heads or None, lines or None


def _numbers(values: Any, count: int, least: float = 0.0) -> tuple[float, ...]:
    numbers = tuple(map(float, values))
    if len(numbers) != count or not all(least < each < math.inf for each in numbers):
        raise ValueError
    return numbers
