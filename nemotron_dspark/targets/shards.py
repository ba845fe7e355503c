"""Where the tensors of a checkpoint lie: safetensors files, read one tensor at a time, and named in every error.

Files are mapped, not read, and each is opened once: the header of a file may list ten thousand experts.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json

INDEX = "model.safetensors.index.json"


class Shard:
    """One safetensors file, which need not be there before something in it is asked for."""

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def _file(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError):
            raise InputError(
                f"{self.path} is truncated or not a safetensors file.",
                "Download this file again; the other shards can stay.",
            ) from None

    def names(self) -> list[str]:
        """The tensors in the file."""
        return list(self._file.keys())

    def open(self, name: str) -> Any:
        """The file, which holds ``name``; `InputError` when there is no such file or it does not."""
        if not self.path.is_file():
            raise InputError(
                f"The shard {self.path}, which holds {name}, does not exist.",
                "Download this file; the other shards can stay.",
            )
        return self._file


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file. All uses raise `InputError` when the file is missing, damaged or without it."""

    name: str
    shard: Shard

    @functools.cached_property
    def _header(self) -> tuple[str, tuple[int, ...]]:
        found = self._of_file(lambda file: file.get_slice(self.name))
        return found.get_dtype(), tuple(found.get_shape())

    @property
    def dtype(self) -> str:
        """The type as safetensors spells it: BF16, F8_E4M3, U8."""
        return self._header[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._header[1]

    def read(self) -> Tensor:
        """The tensor in its own type."""
        return self._of_file(lambda file: file.get_tensor(self.name))

    def _of_file(self, take: Any) -> Any:
        file = self.shard.open(self.name)
        try:
            return take(file)
        except SafetensorError:  # the index promises a tensor that the shard lacks
            raise InputError(
                f"{self.shard.path} does not hold {self.name}, although the index says so.",
                "Download both files again.",
            ) from None


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of the checkpoint in ``folder``, single-file or sharded; by the index, shards need not be there.

    Raises:
        InputError: there is no safetensors file, one is truncated, or the index is not one.
    """
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX)
        weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
        if not isinstance(weight_map, dict):
            raise InputError(f"{folder / INDEX} has no weight_map.", "Download the file again.")
        shards = {file: Shard(folder / file) for file in set(weight_map.values())}
        return {name: Stored(name, shards[file]) for name, file in weight_map.items()}
    found = tensors_here(folder)
    if not found:
        raise InputError(
            f"{folder} holds no safetensors file.",
            "Download the target's weights; checkpoints in pickle formats (.bin, .pt) are not read.",
        )
    return found


def tensors_here(folder: Path) -> dict[str, Stored]:
    """The tensors in the safetensors files of ``folder``, whatever an index says; `InputError` as above."""
    shards = [Shard(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: Stored(name, shard) for shard in shards for name in shard.names()}
