"""Read a target cache sample by sample: memory-mapped, checked once when opened, and each sample on its way out."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nemotron_dspark.cache.format import FIELDS, INDEX, MANIFEST, RECORD, Manifest, field_sizes
from nemotron_dspark.errors import InputError

_RESTORE = "Restore the file or build the cache again; `nds cache verify` lists every fault."


@dataclasses.dataclass(frozen=True)
class Sample:
    input_ids: Tensor  # int64 [S]
    loss_mask: Tensor  # bool [S]
    taps: Tensor  # bf16 [S, T·H], raw outputs of the tapped layers, ascending
    last: Tensor  # bf16 [S, H], after the target's final norm


class TargetCache:
    """A finished cache folder, ours or DeepSpec's. ``cache[i]`` is a `Sample` that owns its memory."""

    def __init__(self, folder: Path | str):
        """Open ``folder``.

        Raises:
            InputError: the manifest or index is missing or malformed, a shard is missing, or a record points outside
                its shard. The message names the file, and the sample where there is one.
        """
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self.index = _read_index(self.folder, self.manifest)
        self._maps: dict[int, np.memmap] = {}

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def taps(self) -> tuple[int, ...]:
        return self.manifest.taps

    @property
    def hidden_size(self) -> int:
        return self.manifest.hidden_size

    @property
    def lengths(self) -> np.ndarray:
        """int64 [samples], tokens of each sample."""
        return self.index["seq_len"].astype(np.int64)

    def require(self, *, taps: Sequence[int] | None = None, hidden_size: int | None = None) -> None:
        """`InputError` unless the cache holds these taps of a target of this hidden size."""
        if hidden_size is not None and hidden_size != self.hidden_size:
            raise InputError(
                f"{self.folder} holds hidden states of size {self.hidden_size}, not {hidden_size}.",
                "Build a cache with this target.",
            )
        if taps is not None and tuple(taps) != self.taps:
            raise InputError(
                f"{self.folder} holds the taps {list(self.taps)}, not {list(taps)}.",
                f"Set draft.taps to {list(self.taps)}, or build a cache with the wanted taps.",
            )

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, sample_id: int) -> Sample:
        if not 0 <= sample_id < len(self):
            raise IndexError(sample_id)
        ids, _, loss, taps, last = self.fields(sample_id)
        return Sample(
            torch.from_numpy(ids.astype(np.int64)),
            torch.from_numpy(loss != 0),
            torch.from_numpy(taps.copy()).view(torch.bfloat16),
            torch.from_numpy(last.copy()).view(torch.bfloat16),
        )

    def fields(self, sample_id: int) -> tuple[np.ndarray, ...]:
        """Arrays of one sample as they lie in the shard, without a copy; bfloat16 as uint16.

        input_ids int32 [S], attention_mask uint8 [S], loss_mask uint8 [S], taps uint16 [S, T·H], last uint16 [S, H].
        """
        record = self.index[sample_id]
        shard = self._shard(int(record["shard_id"]))
        length, width = int(record["seq_len"]), self.hidden_size
        types = (np.dtype("<i4"), np.dtype("u1"), np.dtype("u1"), np.dtype("<u2"), np.dtype("<u2"))
        shapes = ((length,), (length,), (length,), (length, len(self.taps) * width), (length, width))
        return tuple(
            np.frombuffer(shard, dtype, count=int(np.prod(shape)), offset=int(record[name])).reshape(shape)
            for name, dtype, shape in zip(FIELDS, types, shapes, strict=True)
        )

    def _shard(self, shard_id: int) -> np.memmap:
        if shard_id not in self._maps:
            path = self.folder / self.manifest.shard_files[shard_id]
            try:
                self._maps[shard_id] = np.memmap(path, dtype=np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise InputError(f"{path} cannot be read: {error}.", _RESTORE) from None
        return self._maps[shard_id]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}  # worker processes map the shards themselves


def _read_index(folder: Path, manifest: Manifest) -> np.ndarray:  # RECORD [samples]
    path = folder / INDEX
    if not path.is_file():
        raise InputError(f"{path} is missing.", _RESTORE)
    size, wanted = path.stat().st_size, manifest.num_samples * RECORD.itemsize
    if size != wanted:
        raise InputError(
            f"{path} has {size} bytes; {MANIFEST} promises {manifest.num_samples} samples, that is {wanted}.", _RESTORE
        )
    index = np.fromfile(path, dtype=RECORD)
    faults = record_faults(folder, manifest, index)
    if faults:
        raise InputError(faults[0], _RESTORE)
    return index


def record_faults(folder: Path, manifest: Manifest, index: np.ndarray, limit: int = 20) -> list[str]:
    """One sentence for every shard that is missing and every record that cannot be true (at most ``limit`` records)."""
    sizes, faults = [], []
    for name in manifest.shard_files:
        path = folder / name
        sizes.append(path.stat().st_size if path.is_file() else -1)
        if sizes[-1] < 0:
            faults.append(f"The shard {path} is missing.")
    numbers = np.arange(len(index))
    wrong = index["sample_id"] != numbers
    outside = index["shard_id"] >= len(sizes)
    empty = index["seq_len"] == 0
    shard_size = np.asarray([*sizes, 0], dtype=np.int64)[np.where(outside, len(sizes), index["shard_id"])]
    short = np.zeros(len(index), dtype=bool)
    per_token = field_sizes(1, len(manifest.taps), manifest.hidden_size)
    for name, size in zip(FIELDS, per_token, strict=True):
        short |= index[name].astype(np.float64) + size * index["seq_len"].astype(np.float64) > shard_size
    short &= shard_size >= 0  # a missing shard has been named
    for sample in np.flatnonzero(wrong | outside | empty | short)[:limit].tolist():
        where = f"{folder / INDEX}: sample {sample}"
        if wrong[sample]:
            faults.append(f"{where} has the id {index['sample_id'][sample]}; ids must be dense.")
        elif outside[sample]:
            faults.append(f"{where} lies in shard {index['shard_id'][sample]}; there are {len(sizes)}.")
        elif empty[sample]:
            faults.append(f"{where} is empty.")
        else:
            name = manifest.shard_files[index["shard_id"][sample]]
            faults.append(f"{folder / name} is too short for sample {sample}: it has {shard_size[sample]} bytes.")
    return faults
