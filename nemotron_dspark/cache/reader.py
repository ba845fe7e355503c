"""Read a target cache sample by sample: checked when opened, and each sample when it is first read.

Files are read, not mapped: where one is cut off or its disk fails, a mapped page kills the process without a word.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nemotron_dspark.cache.checksums import changed_files, read_checksums, read_sample_checksums, sample_checksum
from nemotron_dspark.cache.compact import FORMAT, CompactLayout
from nemotron_dspark.cache.deepspec_layout import DeepSpecLayout
from nemotron_dspark.cache.layout import RESTORE, Layout, Sample, read_manifest
from nemotron_dspark.errors import InputError


def read_layout(folder: Path) -> Layout:
    """The layout of the cache in ``folder``; `InputError` when it is none, or its manifest or index is malformed."""
    values = read_manifest(folder)
    compact = isinstance(values, dict) and values.get("format") == FORMAT
    return CompactLayout.read(folder) if compact else DeepSpecLayout.read(folder)


class TargetCache:
    """A finished cache folder in any format, ours or DeepSpec's. ``cache[i]`` is a `Sample` that owns its memory."""

    def __init__(self, folder: Path | str, *, check_files: bool = True):
        """Open ``folder``; ``check_files`` compares every file but the shards with its checksum.

        Raises:
            InputError: the manifest or index is missing, malformed or not what was written, a shard is missing, or a
                sample lies outside its shard. The message names the file, and the sample where there is one.
        """
        self.folder = Path(folder)
        self.layout = read_layout(self.folder)
        self.taps, self.hidden_size = self.layout.taps, self.layout.hidden_size
        self.lengths = self.layout.lengths  # int64 [samples], tokens of each
        # the target it was made from, as far as it says
        self.target_name: str | None = self.layout.extra.get("target_model_name_or_path")
        for fault in self.layout.check_files(self.folder):
            raise InputError(fault, RESTORE)
        if check_files:
            digests = read_checksums(self.folder)
            small = [name for name in digests if name not in self.layout.shard_files]
            for fault in changed_files(self.folder, digests, small):
                raise InputError(fault, RESTORE)
        self._checksums = read_sample_checksums(self.folder, len(self))
        self._unread = np.ones(len(self), dtype=bool)

    def __len__(self) -> int:
        return len(self.layout.lengths)

    def __getitem__(self, sample_id: int) -> Sample:
        """The sample; `InputError` when its bytes, read for the first time, are not those that were written."""
        if not 0 <= sample_id < len(self):
            raise IndexError(sample_id)
        fields = self.fields(sample_id)
        if self._unread[sample_id]:
            if not self.intact(sample_id, fields):
                raise InputError(f"{self.where(sample_id)} is not what was written: its checksum differs.", RESTORE)
            self._unread[sample_id] = False
        return self.layout.decode(sample_id, fields)

    def fields(self, sample_id: int) -> list[np.ndarray]:
        """Bytes of one sample as they lie in its shard, uint8 each."""
        return self._read(sample_id, self.layout.fields(sample_id))

    def intact(self, sample_id: int, fields: Sequence[np.ndarray]) -> bool:
        """Whether ``fields`` have the checksum they were written with; True where there is none."""
        return self._checksums is None or sample_checksum(fields) == int(self._checksums[sample_id])

    def input_ids(self, sample_id: int) -> Tensor:
        """int64 [S], without its hidden states being read or its checksum looked at."""
        (ids,) = self._read(sample_id, self.layout.fields(sample_id)[:1])
        return torch.from_numpy(ids.view("<i4").astype(np.int64))

    def all_input_ids(self) -> Iterator[Tensor]:
        """`input_ids` of each sample in turn."""
        return map(self.input_ids, range(len(self)))

    def loss_mask(self, sample_id: int) -> np.ndarray:
        """Bool [S], without its hidden states being read or its checksum looked at."""
        (mask,) = self._read(sample_id, [self.layout.fields(sample_id)[self.layout.mask_field]])
        return mask != 0

    def where(self, sample_id: int) -> str:
        """The sample's place, for messages."""
        return f"{self.folder / self.layout.shard_files[int(self.layout.shards[sample_id])]}: sample {sample_id}"

    def _read(self, sample_id: int, places: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The bytes at these offsets, of these sizes."""
        fields = [np.empty(size, dtype=np.uint8) for _, size in places]
        whole = True
        try:
            with open(self.folder / self.layout.shard_files[int(self.layout.shards[sample_id])], "rb") as file:
                for field, (offset, _) in zip(fields, places, strict=True):
                    file.seek(offset)
                    whole &= file.readinto(field.data) == len(field)
        except OSError as error:
            raise InputError(f"{self.where(sample_id)} cannot be read: {error.strerror}.", RESTORE) from None
        if not whole:
            raise InputError(f"{self.where(sample_id)} is cut off: the file has become too short.", RESTORE)
        return fields
