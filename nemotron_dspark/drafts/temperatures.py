"""The temperatures of a confidence head, in a folder beside the draft that they were fitted to.

`confidence_sts.json` is for the engines: SGLang's `--speculative-dspark-confidence-sts-path` and TensorRT-LLM's
`confidence_sts_path` both read its list `temperatures`, one a slot. `calibration.json` is ours and says of what draft.
"""

import hashlib
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nemotron_dspark import files
from nemotron_dspark.errors import InputError

FOLDER = "calibration"
OURS, ENGINES = "calibration.json", "confidence_sts.json"
_MARKS = ("confidence_head.proj.weight", "norm.weight")  # small, and every step of training changes them


def digest(draft_folder: Path) -> str:
    """Tells drafts apart: SHA-256 of what the confidence head and the norm before it weigh, as they are stored."""
    found = hashlib.sha256()
    try:
        with safe_open(Path(draft_folder) / "model.safetensors", framework="pt") as file:
            for name in sorted(set(_MARKS) & set(file.keys())):
                found.update(file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
    except (OSError, SafetensorError) as error:
        raise InputError(f"The draft in {draft_folder} cannot be read: {error}.", "Give a whole draft.") from None
    return found.hexdigest()


def read_temperatures(draft_folder: Path, block_size: int) -> tuple[float, ...] | None:
    """The temperatures [γ] of the draft's confidence head; None where it is not calibrated.

    Raises:
        InputError: they are not one positive number a slot, or were fitted to other weights.
    """
    path = Path(draft_folder) / FOLDER / OURS
    if not path.is_file():
        return None
    again = f"Delete {path.parent} and run `nds calibrate` again."
    found = files.read_json(path)
    values = found.get("temperatures") if isinstance(found, dict) else None
    if isinstance(found, dict) and values is None:
        return None  # of a draft without a confidence head
    numbers = isinstance(values, list) and all(type(each) in (int, float) and 0 < each < math.inf for each in values)
    if not isinstance(values, list) or not numbers or len(values) != block_size:
        raise InputError(f"{path} does not hold {block_size} positive temperatures, one a slot.", again)
    if found.get("draft_digest") != digest(draft_folder):
        raise InputError(f"{path} was fitted to a draft with other weights.", again)
    return tuple(map(float, values))
