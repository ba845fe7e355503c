"""How a checkpoint is quantised, by its config: who wrote it, and whether that is read here (`quantised.py`).

Lists of ignored layers and of mixed precisions need no reading: a weight that was quantised has its scales beside it,
one that was left alone has none. What the config has to say is the size of blocks, and what else was done to weights.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json

READ = "Use the target's BF16 checkpoint, or one in FP8, NVFP4 or MXFP4 (docs/targets.md, Quantised checkpoints)."
_MODELOPT = {"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL", "MXFP8", "NVFP4", "W4A16_NVFP4"}
_MODELOPT |= {"W4A8_NVFP4_FP8", "MXFP4", "W4A8_MXFP4_FP8", "MIXED_PRECISION", "NONE"}
_COMPRESSED = {"dense", "float-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"}
_COMPRESSED |= {"mxfp8-quantized", "mixed-precision"}
_BLOCK = (128, 128)  # rows and columns of FP8 blocks where the config gives no size


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a checkpoint was quantised, as far as its config has to say it."""

    writer: str  # ModelOpt, compressed-tensors or transformers
    blocks: tuple[tuple[int, int], ...]  # rows and columns that blocks of FP8 may have


def scheme_of(folder: Path) -> Scheme | None:
    """How the checkpoint in ``folder`` is quantised, by config.json or ModelOpt's own file; None when it is not.

    Raises:
        InputError: in a way that is not read here.
    """
    stated, method = _stated(folder)
    if not stated:
        return None
    if method == "fp8":
        block = stated.get("weight_block_size", _BLOCK)
        return Scheme("transformers", (_pair(block),) if block else ())
    if method == "mxfp4":
        return Scheme("transformers", ())
    if method.startswith("modelopt"):
        layers = (stated.get("quantized_layers") or {}).values()
        algorithms = [stated.get("quant_algo"), *(layer.get("quant_algo") for layer in layers)]
        for algorithm in algorithms:
            if str(algorithm).upper() not in _MODELOPT:
                raise unread(folder, f"ModelOpt's {algorithm}")
        return Scheme("ModelOpt", (_BLOCK,))
    if method == "compressed-tensors":
        return Scheme("compressed-tensors", _compressed_blocks(folder, stated))
    raise unread(folder, method or "a method that config.json does not name")


def _stated(folder: Path) -> tuple[dict[str, Any], str]:
    """What the checkpoint's files say of its quantisation, and the method's name."""
    path, own = folder / "config.json", folder / "hf_quant_config.json"
    config = read_json(path) if path.is_file() else {}
    parts = (config, config.get("text_config") or {}) if isinstance(config, dict) else ()
    found = (part.get(key) for part in parts for key in ("quantization_config", "compression_config"))
    stated = next((value for value in found if isinstance(value, dict) and value), None)
    if stated is None and own.is_file():
        written = read_json(own)
        stated = (written.get("quantization") if isinstance(written, dict) else None) or {}
        return stated, "modelopt"
    stated = stated or {}
    return stated, str(stated.get("quant_method") or ("modelopt" if "quant_algo" in stated else ""))


def _compressed_blocks(folder: Path, stated: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Sizes of blocks in a config of compressed-tensors, which is refused when it says what is not undone here."""
    if (stated.get("transform_config") or {}).get("config_groups"):
        raise unread(folder, "rotations (transform_config) of compressed-tensors")
    if (stated.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise unread(folder, f"the sparse format {stated['sparsity_config']['format']} of compressed-tensors")
    blocks = []
    groups = [group for group in (stated.get("config_groups") or {}).values() if isinstance(group, dict)]
    for group in [*groups, {}]:
        weights, form = group.get("weights") or {}, group.get("format") or stated.get("format") or "dense"
        if form not in _COMPRESSED:
            raise unread(folder, f"the format {form} of compressed-tensors")
        if weights and (weights.get("type"), weights.get("num_bits")) not in (("float", 8), ("float", 4)):
            raise unread(folder, f"{weights.get('num_bits')} bits {weights.get('type')} of compressed-tensors")
        if block := weights.get("block_structure"):
            blocks.append(_pair(block.split("x") if isinstance(block, str) else block))
    return tuple(dict.fromkeys(blocks))


def _pair(block: Any) -> tuple[int, int]:
    return int(block[0]), int(block[1])


def unread(folder: Path, what: str) -> InputError:
    """What is raised when the weights in ``folder`` are quantised with ``what``."""
    return InputError(f"The weights in {folder} are quantised with {what}, which is not read here.", READ)
