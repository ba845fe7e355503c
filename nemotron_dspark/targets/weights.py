"""Weights out of a checkpoint. Training reads two, the token embedding and the LM head, and never loads a target.

Safetensors files are mapped, not read: out of a 16 GB checkpoint only these two tensors leave the disk. What is stored
quantised is dequantised on the way (`quantised.py`).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json
from nemotron_dspark.targets.quantised import Weight, weights_of
from nemotron_dspark.targets.schemes import scheme_of
from nemotron_dspark.targets.shards import INDEX, Stored, stored_tensors, tensors_here
from nemotron_dspark.targets.spec import TargetSpec


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """A target's token embedding and LM head in the checkpoint's dtype; the same tensor when they are tied."""

    embedding: Tensor  # [V, H]
    head: Tensor  # [V, H]


def read_embedding_and_head(folder: Path, spec: TargetSpec) -> Embeddings:
    """The two tensors of the checkpoint in ``folder``, single-file or sharded, under any spelling ``spec.names`` lists.

    Raises:
        InputError: a file is missing, truncated or not safetensors, a tensor is missing, has another shape than the
            config says, or is quantised in a way that is not read here. The message names file and tensor.
    """
    tensors = weights_in(Path(folder))
    embedding = _read(tensors, spec.names.embedding_tensors, "token embedding", spec, folder)
    if spec.tie_word_embeddings:
        return Embeddings(embedding, embedding)
    return Embeddings(embedding, _read(tensors, spec.names.head_tensors, "LM head", spec, folder))


def open_tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Functions that read each weight of the checkpoint in ``folder``, by name; `InputError` as above.

    One that is stored quantised comes dequantised, in BF16; the tensors of its scales are not listed.
    """
    return {name: tensor.read for name, tensor in weights_in(Path(folder)).items()}


def weights_in(folder: Path, chosen: Callable[[str], bool] = lambda name: True) -> Mapping[str, Weight | Stored]:
    """The weights of the checkpoint in ``folder`` by name; of the tensors stored there, those whose name is ``chosen``.

    Raises:
        InputError: as `stored_tensors`, or they are quantised in a way that is not read here.
    """
    stored = {name: tensor for name, tensor in stored_tensors(folder).items() if chosen(name)}
    scheme = scheme_of(folder)
    return stored if scheme is None else weights_of(stored, scheme)


def parameter_count(folder: Path) -> int | None:
    """Weights in the folder's safetensors files, from their headers; None when there are no files.

    Multi-token-prediction layers (``mtp.*``) and what reads pictures (``model.visual.*``, Qwen3.5) are left out, as
    transformers leaves them out of the language model. In a quantised checkpoint two values in a byte count as two,
    and scales do not count; where it is quantised in an unknown way, elements are counted as they are stored.
    """
    stored = tensors_here(Path(folder))
    if not stored:
        return None
    tensors: Mapping[str, Weight | Stored] = stored
    with contextlib.suppress(InputError):
        if scheme := scheme_of(Path(folder)):
            tensors = weights_of(stored, scheme)
    return sum(
        math.prod(tensor.shape) for name, tensor in tensors.items() if not name.startswith(("mtp.", "model.visual."))
    )


def stored_size(folder: Path) -> int | None:
    """Bytes of the checkpoint's weights on a disk: the files' that are here, else what the index says of them all."""
    folder = Path(folder)
    if not missing_shards(folder) and (here := list(folder.glob("*.safetensors"))):
        return sum(path.stat().st_size for path in here)
    listed = read_json(folder / INDEX) if (folder / INDEX).is_file() else None
    metadata = listed.get("metadata") if isinstance(listed, dict) else None
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return int(size) if isinstance(size, int | float) else None


def missing_shards(folder: Path) -> tuple[str, ...]:
    """Names of shards that the index lists and the folder lacks; none when there is not even one shard or no index."""
    folder = Path(folder)
    if not (folder / INDEX).is_file() or not any(folder.glob("*.safetensors")):
        return ()
    paths = {tensor.shard.path for tensor in stored_tensors(folder).values()}
    return tuple(sorted(path.name for path in paths if not path.is_file()))


def _read(
    tensors: Mapping[str, Weight | Stored], names: Sequence[str], what: str, spec: TargetSpec, folder: Path
) -> Tensor:
    name = next((name for name in names if name in tensors), None)
    if name is None:
        raise InputError(
            f"The checkpoint {folder} has no tensor {' or '.join(names)} (the {what}).",
            "Check that the folder holds the whole checkpoint and that config.json belongs to it.",
        )
    tensor, path, expected = tensors[name].read(), tensors[name].shard.path, (spec.vocab_size, spec.hidden_size)
    if tuple(tensor.shape) != expected:
        raise InputError(
            f"{name} in {path} has shape {tuple(tensor.shape)}, but config.json says {expected}.",
            "Use the config.json that belongs to these weights.",
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(
            f"{name} in {path} is stored as {str(tensor.dtype).removeprefix('torch.')}, which is quantised, and "
            "config.json does not say how.",
            "Restore config.json from the checkpoint's repository, or use the target's BF16 checkpoint.",
        )
    return tensor
