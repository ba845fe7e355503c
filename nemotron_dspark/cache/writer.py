"""Write a target cache so that nothing computed is ever lost.

Lengths decide the layout, so every sample goes straight to its final place in whatever order it is computed. Until it
is complete a shard lies in `.build/`; `commit` makes the samples written so far durable and enters them in a journal
there. A killed build continues with the samples the journal does not have. `manifest.json` comes last: a folder that
has one is complete.
"""

import contextlib
import fcntl
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from nemotron_dspark.cache.format import (
    CHECKSUMS,
    FIELDS,
    INDEX,
    MANIFEST,
    Layout,
    Manifest,
    bytes_per_token,
    lay_out,
    shard_name,
)
from nemotron_dspark.cache.reader import Sample
from nemotron_dspark.errors import CheckError, EnvironmentFault
from nemotron_dspark.files import disk_errors, fsync_folder, read_json, sha256, write_json, write_whole

WORK = ".build"  # inside the cache folder, removed when the cache is complete
_ENTRY = struct.Struct("<QI")  # sample id and the CRC-32 of its eight bytes: a torn or empty entry does not count


class CacheWriter:
    """Writer of one cache folder; use as a context manager. One process at a time: a second one is refused."""

    def __init__(
        self,
        folder: Path | str,
        lengths: np.ndarray,  # int [samples]
        *,
        taps: tuple[int, ...],
        hidden_size: int,
        shard_bytes: int,
        extra: Mapping[str, Any] | None = None,
    ):
        self.folder = Path(folder)
        self.work = self.folder / WORK
        self.layout: Layout = lay_out(lengths, num_taps=len(taps), hidden_size=hidden_size, shard_bytes=shard_bytes)
        names = tuple(map(shard_name, range(len(self.layout.shard_sizes))))
        self.manifest = Manifest(len(lengths), tuple(taps), hidden_size, names, extra or {})
        self._journal = self.work / "written.journal"
        self._digests_file = self.work / CHECKSUMS
        self._open: dict[int, int] = {}  # shard id -> file descriptor
        self._pending: list[int] = []
        with disk_errors(self.folder):
            self.work.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.work)
        remove_leftovers(self.folder)
        self.written = self._resume()  # bool [samples]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
        os.close(self._lock)

    @property
    def missing_bytes(self) -> int:
        """Bytes that the samples not written yet will take."""
        lengths = self.layout.index["seq_len"][~self.written].astype(np.int64)
        return int(lengths.sum()) * bytes_per_token(len(self.manifest.taps), self.manifest.hidden_size)

    def write(
        self,
        sample_id: int,
        input_ids: np.ndarray,  # int32 [S]
        loss_mask: np.ndarray,  # uint8 [S]
        taps: Tensor,  # [S, T·H]
        last: Tensor,  # [S, H]
    ) -> None:
        """Put one sample in its place; it counts as written after the next `commit`."""
        record = self.layout.index[sample_id]
        length, width = int(record["seq_len"]), self.manifest.hidden_size
        shapes = (input_ids.shape, loss_mask.shape, tuple(taps.shape), tuple(last.shape))
        if shapes != ((length,), (length,), (length, len(self.manifest.taps) * width), (length, width)):
            raise ValueError(f"sample {sample_id} of length {length} was given with shapes {shapes}")
        parts = (
            np.ascontiguousarray(input_ids, dtype="<i4"),
            np.ones(length, dtype=np.uint8),
            np.ascontiguousarray(loss_mask, dtype=np.uint8),
            _bf16_bits(taps),
            _bf16_bits(last),
        )
        descriptor = self._descriptor(int(record["shard_id"]))
        with disk_errors(self.folder):
            for name, part in zip(FIELDS, parts, strict=True):
                _write_at(descriptor, part, int(record[name]))
        self._pending.append(sample_id)

    def commit(self) -> None:
        """Make everything written so far durable, note it, and put shards that are complete in place."""
        with disk_errors(self.folder):
            for descriptor in self._open.values():
                os.fsync(descriptor)
            with open(self._journal, "ab") as journal:
                journal.write(b"".join(map(_entry, self._pending)))
                journal.flush()
                os.fsync(journal.fileno())
        shards = set(self.layout.index["shard_id"][self._pending].tolist())
        self.written[self._pending] = True
        self._pending.clear()
        for shard in sorted(shards):
            if self._samples(shard).all():
                self._close_shard(shard)

    def finish(self, extra_files: Iterable[str] = ()) -> Manifest:
        """Write index, checksums (of ``extra_files`` too) and manifest; the cache is complete when this returns."""
        if not self.written.all():
            raise CheckError(
                f"{int((~self.written).sum())} samples of {self.folder} were never written.",
                "Run the same build again.",
            )
        write_whole(self.folder / INDEX, lambda file: file.write(self.layout.index.tobytes()))
        digests = dict(self._digests)
        for name in (INDEX, *extra_files):
            digests[name] = sha256(self.folder / name)
        write_json(self.folder / CHECKSUMS, {"algorithm": "sha256", "files": dict(sorted(digests.items()))})
        write_whole(self.folder / MANIFEST, lambda file: file.write(self.manifest.to_bytes()))
        shutil.rmtree(self.work)
        return self.manifest

    def _samples(self, shard: int) -> np.ndarray:  # bool [samples of the shard], a view
        return self.written[self.layout.shard_starts[shard] : self.layout.shard_starts[shard + 1]]

    def _partial(self, shard: int) -> Path:
        return self.work / f"{shard_name(shard)}.partial"

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            with disk_errors(self.folder):
                self._open[shard] = os.open(self._partial(shard), os.O_RDWR | os.O_CREAT, 0o644)
                os.ftruncate(self._open[shard], self.layout.shard_sizes[shard])
        return self._open[shard]

    def _close_shard(self, shard: int) -> None:
        os.close(self._open.pop(shard))
        self._record_digest(shard, self._partial(shard))
        os.replace(self._partial(shard), self.folder / shard_name(shard))
        fsync_folder(self.folder)

    def _record_digest(self, shard: int, path: Path) -> None:
        self._digests[shard_name(shard)] = sha256(path)
        write_json(self._digests_file, self._digests)

    def _resume(self) -> np.ndarray:  # bool [samples]
        """What an earlier, killed build has written for certain."""
        self.written = np.zeros(len(self.layout.index), dtype=bool)
        noted = np.zeros_like(self.written)
        noted[_read_journal(self._journal, len(noted))] = True
        self._digests = read_json(self._digests_file) if self._digests_file.is_file() else {}
        for shard, size in enumerate(self.layout.shard_sizes):
            samples = slice(self.layout.shard_starts[shard], self.layout.shard_starts[shard + 1])
            done, partial = self.folder / shard_name(shard), self._partial(shard)
            if _size(done) == size:
                self.written[samples] = True
                if shard_name(shard) not in self._digests:
                    self._record_digest(shard, done)
            elif _size(partial) == size:
                self.written[samples] = noted[samples]
                if self.written[samples].all():  # killed between the last commit and the rename
                    self._descriptor(shard)
                    self._close_shard(shard)
        kept = np.flatnonzero(self.written & noted).tolist()
        write_whole(self._journal, lambda file: file.write(b"".join(map(_entry, kept))))
        return self.written


def write_cache(
    folder: Path | str,
    samples: Iterable[Sample],
    *,
    taps: tuple[int, ...],
    hidden_size: int,
    shard_bytes: int = 4 * 1024**3,
    extra: Mapping[str, Any] | None = None,
) -> Manifest:
    """A cache of samples that are already in memory."""
    samples = list(samples)
    lengths = np.asarray([len(sample.input_ids) for sample in samples])
    with CacheWriter(
        folder, lengths, taps=taps, hidden_size=hidden_size, shard_bytes=shard_bytes, extra=extra
    ) as writer:
        for number, sample in enumerate(samples):
            writer.write(
                number,
                sample.input_ids.numpy().astype(np.int32),
                sample.loss_mask.numpy().astype(np.uint8),
                sample.taps,
                sample.last,
            )
        writer.commit()
        return writer.finish()


def lock(folder: Path) -> int:
    """Descriptor of a lock on ``folder`` that ends with the process; `EnvironmentFault` when another one holds it."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise EnvironmentFault(
            f"Another process is writing {folder.parent}.", "Wait for it, or choose another folder."
        ) from None
    return descriptor


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of a process that was killed inside `files.write_whole`."""
    for path in (*folder.glob(".*.tmp"), *(folder / WORK).glob(".*.tmp")):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _bf16_bits(tensor: Tensor) -> np.ndarray:  # uint16, same shape
    return tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy()


def _write_at(descriptor: int, array: np.ndarray, offset: int) -> None:
    view = memoryview(array).cast("B")
    while view:  # one call writes at most 2 GiB
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _entry(sample_id: int) -> bytes:
    return _ENTRY.pack(sample_id, zlib.crc32(struct.pack("<Q", sample_id)))


def _read_journal(path: Path, num_samples: int) -> list[int]:
    data = path.read_bytes() if path.is_file() else b""
    whole = data[: len(data) - len(data) % _ENTRY.size]
    return [
        sample_id
        for sample_id, check in _ENTRY.iter_unpack(whole)
        if sample_id < num_samples and check == zlib.crc32(struct.pack("<Q", sample_id))
    ]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
