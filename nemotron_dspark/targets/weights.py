"""Two tensors out of a checkpoint: the token embedding and the LM head. Training never loads a target.

Safetensors files are mapped, not read: out of a 16 GB checkpoint only these two tensors leave the disk.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json
from nemotron_dspark.targets.spec import TargetSpec

INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """A target's token embedding and LM head in the checkpoint's dtype; the same tensor when they are tied."""

    embedding: Tensor  # [V, H]
    head: Tensor  # [V, H]


def read_embedding_and_head(folder: Path, spec: TargetSpec) -> Embeddings:
    """The two tensors of the checkpoint in ``folder``, single-file or sharded, under any spelling ``spec.names`` lists.

    Raises:
        InputError: a file is missing, truncated or not safetensors, a tensor is missing, has another shape than the
            config says, or is stored quantised. The message names file and tensor.
    """
    files = _tensor_files(Path(folder))
    embedding = _read(files, spec.names.embedding_tensors, "token embedding", spec, folder)
    if spec.tie_word_embeddings:
        return Embeddings(embedding, embedding)
    return Embeddings(embedding, _read(files, spec.names.head_tensors, "LM head", spec, folder))


def open_tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Functions that read each tensor of the checkpoint in ``folder``, by name; `InputError` as above."""

    def read(path: Path, name: str) -> Tensor:
        with safe_open(path, framework="pt") as shard:
            return shard.get_tensor(name)

    return {name: functools.partial(read, path, name) for name, path in _tensor_files(Path(folder)).items()}


def parameter_count(folder: Path) -> int | None:
    """Elements of all tensors in the folder's safetensors files, from their headers; None when there are no files.

    Multi-token-prediction layers (``mtp.*``) and what reads pictures (``model.visual.*``, Qwen3.5) are left out, as
    transformers leaves them out of the language model.
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        return None
    tensors = (named for path in paths for named in _shapes(path).items())
    return sum(math.prod(shape) for name, shape in tensors if not name.startswith(("mtp.", "model.visual.")))


def missing_shards(folder: Path) -> tuple[str, ...]:
    """Names of shards that the index lists and the folder lacks; none when there is not even one shard or no index."""
    folder = Path(folder)
    if not (folder / INDEX).is_file() or not any(folder.glob("*.safetensors")):
        return ()
    return tuple(sorted({path.name for path in _tensor_files(folder).values() if not path.is_file()}))


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX)
        weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
        if not isinstance(weight_map, dict):
            raise InputError(f"{folder / INDEX} has no weight_map.", "Download the file again.")
        return {name: folder / file for name, file in weight_map.items()}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise InputError(
            f"{folder} holds no safetensors file.",
            "Download the target's weights; checkpoints in pickle formats (.bin, .pt) are not read.",
        )
    return {name: path for path in paths for name in _shapes(path)}


def _shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file, from its header; the file's length is checked against it."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_slice(name).get_shape() for name in names}
    except (SafetensorError, OSError):
        raise InputError(f"{path} is truncated or not a safetensors file.", "Download this file again.") from None


def _read(files: dict[str, Path], names: Sequence[str], what: str, spec: TargetSpec, folder: Path) -> Tensor:
    name = next((name for name in names if name in files), None)
    if name is None:
        raise InputError(
            f"The checkpoint {folder} has no tensor {' or '.join(names)} (the {what}).",
            "Check that the folder holds the whole checkpoint and that config.json belongs to it.",
        )
    path, expected = files[name], (spec.vocab_size, spec.hidden_size)
    if not path.is_file():
        raise InputError(
            f"The shard {path}, which holds {name}, does not exist.", "Download this file; the other shards can stay."
        )
    try:
        with safe_open(path, framework="pt") as shard:
            tensor = shard.get_tensor(name)
    except (SafetensorError, OSError) as error:
        if "does not contain" in str(error):  # the index promises a tensor that the shard lacks
            raise InputError(
                f"{path} does not hold {name}, although the index says so.", "Download both files again."
            ) from None
        raise InputError(
            f"{path}, which holds {name}, is truncated or not a safetensors file.",
            "Download this file again; the other shards can stay.",
        ) from None
    if tuple(tensor.shape) != expected:
        raise InputError(
            f"{name} in {path} has shape {tuple(tensor.shape)}, but config.json says {expected}.",
            "Use the config.json that belongs to these weights.",
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(
            f"{name} in {path} is stored as {str(tensor.dtype).removeprefix('torch.')}, which is quantised.",
            "Train the draft from the target's BF16 checkpoint; it can be served beside the quantised one.",
        )
    return tensor
