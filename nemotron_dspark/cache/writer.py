"""Write a target cache so that nothing computed is ever lost.

Lengths decide the layout, so every sample goes straight to its final place in whatever order it is computed. Until it
is complete a shard lies in `.build/`; `commit` makes the samples written so far durable and enters them in a journal
there. A killed build continues with the samples the journal does not have. `manifest.json` comes last: a folder that
has one is complete.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from nemotron_dspark.cache.checksums import CHECKSUMS, SAMPLES, sample_checksum, write_checksums
from nemotron_dspark.cache.format import DeepSpecLayout
from nemotron_dspark.cache.layout import INDEX, MANIFEST, WORK, Layout, Sample
from nemotron_dspark.errors import CheckError, EnvironmentFault
from nemotron_dspark.files import disk_errors, fsync_folder, read_json, sha256, write_json, write_whole

_CONTENT = struct.Struct("<QI")  # sample id, its checksum
_ENTRY = struct.Struct("<QII")  # and the CRC-32 of these twelve bytes: a torn entry does not count


class CacheWriter:
    """Writer of one cache folder; use as a context manager. One process at a time: a second one is refused."""

    def __init__(self, folder: Path | str, layout: Layout):
        self.folder = Path(folder)
        self.work = self.folder / WORK
        self.layout = layout
        self._bounds = np.searchsorted(layout.shards, np.arange(len(layout.shard_files) + 1))
        self._journal = self.work / "written.journal"
        self._digests_file = self.work / CHECKSUMS
        self._open: dict[int, int] = {}  # shard id -> file descriptor
        self._pending: list[int] = []
        self._checksums = np.zeros(len(layout.lengths), dtype="<u4")
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
        return sum(map(self.layout.sample_bytes, np.flatnonzero(~self.written).tolist()))

    def write(
        self,
        sample_id: int,
        input_ids: np.ndarray,  # int32 [S]
        loss_mask: np.ndarray,  # uint8 [S]
        taps: Tensor,  # [S, T·H]
        last: Tensor,  # [S, H]
    ) -> None:
        """Put one sample in its place; it counts as written after the next `commit`."""
        length, width = int(self.layout.lengths[sample_id]), self.layout.hidden_size
        shapes = (input_ids.shape, loss_mask.shape, tuple(taps.shape), tuple(last.shape))
        if shapes != ((length,), (length,), (length, len(self.layout.taps) * width), (length, width)):
            raise ValueError(f"sample {sample_id} of length {length} was given with shapes {shapes}")
        parts = self.layout.encode(sample_id, input_ids, loss_mask, taps, last)
        descriptor = self._descriptor(int(self.layout.shards[sample_id]))
        with disk_errors(self.folder):
            for part, (offset, _) in zip(parts, self.layout.pieces(sample_id), strict=True):
                _write_at(descriptor, part, offset)
        self._checksums[sample_id] = sample_checksum(parts)
        self._pending.append(sample_id)

    def commit(self) -> None:
        """Make everything written so far durable, note it, and put shards that are complete in place."""
        with disk_errors(self.folder):
            for descriptor in self._open.values():
                os.fsync(descriptor)
            with open(self._journal, "ab") as journal:
                journal.write(self._entries(self._pending))
                journal.flush()
                os.fsync(journal.fileno())
        shards = set(self.layout.shards[self._pending].tolist())
        self.written[self._pending] = True
        self._pending.clear()
        for shard in sorted(shards):
            if self._samples(shard).all():
                self._close_shard(shard)

    def finish(self, extra_files: Iterable[str] = ()) -> None:
        """Write index, checksums (of ``extra_files`` too) and manifest; the cache is complete when this returns."""
        if not self.written.all():
            raise CheckError(
                f"{int((~self.written).sum())} samples of {self.folder} were never written.",
                "Run the same build again.",
            )
        finish_cache(self.folder, self.layout, self._checksums, self._digests, extra_files)
        shutil.rmtree(self.work)

    def _samples(self, shard: int) -> np.ndarray:  # bool [samples of the shard], a view
        return self.written[self._bounds[shard] : self._bounds[shard + 1]]

    def _partial(self, shard: int) -> Path:
        return self.work / f"{self.layout.shard_files[shard]}.partial"

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            with disk_errors(self.folder):
                self._open[shard] = os.open(self._partial(shard), os.O_RDWR | os.O_CREAT, 0o644)
                os.ftruncate(self._open[shard], self.layout.shard_sizes[shard])
                _write_at(self._open[shard], np.frombuffer(self.layout.preamble(shard), np.uint8), 0)
        return self._open[shard]

    def _close_shard(self, shard: int) -> None:
        os.close(self._open.pop(shard))
        self._record_digest(shard, self._partial(shard))
        os.replace(self._partial(shard), self.folder / self.layout.shard_files[shard])
        fsync_folder(self.folder)

    def _record_digest(self, shard: int, path: Path) -> None:
        self._digests[self.layout.shard_files[shard]] = sha256(path)
        write_json(self._digests_file, self._digests)

    def _resume(self) -> np.ndarray:  # bool [samples]
        """What an earlier, killed build has written for certain."""
        self.written = np.zeros(len(self.layout.lengths), dtype=bool)
        noted = np.zeros_like(self.written)
        for sample_id, checksum in _read_journal(self._journal, len(noted)):
            noted[sample_id], self._checksums[sample_id] = True, checksum
        self._digests = read_json(self._digests_file) if self._digests_file.is_file() else {}
        for shard, (name, size) in enumerate(zip(self.layout.shard_files, self.layout.shard_sizes, strict=True)):
            samples = slice(self._bounds[shard], self._bounds[shard + 1])
            done, partial = self.folder / name, self._partial(shard)
            if _size(done) == size and name in self._digests:  # its digest and its samples are noted before its rename
                self.written[samples] = noted[samples]
                if not noted[samples].all():  # the journal was lost
                    os.replace(done, partial)
            elif _size(partial) == size:
                self.written[samples] = noted[samples]
                if self.written[samples].all():  # killed between the last commit and the rename
                    self._descriptor(shard)
                    self._close_shard(shard)
        write_whole(self._journal, lambda file: file.write(self._entries(np.flatnonzero(self.written).tolist())))
        return self.written

    def _entries(self, sample_ids: Iterable[int]) -> bytes:
        return b"".join(_entry(sample_id, int(self._checksums[sample_id])) for sample_id in sample_ids)


def finish_cache(
    folder: Path,
    layout: Layout,
    checksums: np.ndarray,  # uint32 [samples]
    digests: Mapping[str, str],  # of the shards
    extra_files: Iterable[str] = (),
) -> None:
    """Write everything but the shards; the manifest comes last."""
    write_whole(folder / INDEX, lambda file: file.write(layout.index()))
    write_whole(folder / SAMPLES, lambda file: file.write(checksums.astype("<u4").tobytes()))
    manifest = layout.manifest()
    digests = {**digests, MANIFEST: hashlib.sha256(manifest).hexdigest()}
    write_checksums(folder, digests | {name: sha256(folder / name) for name in (INDEX, SAMPLES, *extra_files)})
    write_whole(folder / MANIFEST, lambda file: file.write(manifest))


def write_cache(
    folder: Path | str,
    samples: Iterable[Sample],
    *,
    taps: tuple[int, ...],
    hidden_size: int,
    shard_bytes: int = 4 * 1024**3,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """A cache, in DeepSpec's format, of samples that are already in memory."""
    samples = list(samples)
    lengths = np.asarray([len(sample.input_ids) for sample in samples])
    layout = DeepSpecLayout.of(lengths, taps=taps, hidden_size=hidden_size, shard_bytes=shard_bytes, extra=extra)
    with CacheWriter(folder, layout) as writer:
        for number, sample in enumerate(samples):
            writer.write(
                number,
                sample.input_ids.numpy().astype(np.int32),
                sample.loss_mask.numpy().astype(np.uint8),
                sample.taps,
                sample.last,
            )
        writer.commit()
        writer.finish()


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


def _write_at(descriptor: int, array: np.ndarray, offset: int) -> None:
    view = memoryview(array).cast("B")
    while view:  # one call writes at most 2 GiB
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _entry(sample_id: int, checksum: int) -> bytes:
    return _ENTRY.pack(sample_id, checksum, zlib.crc32(_CONTENT.pack(sample_id, checksum)))


def _read_journal(path: Path, num_samples: int) -> list[tuple[int, int]]:
    """Samples that were noted, and their checksums."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data[: len(data) - len(data) % _ENTRY.size]
    return [
        (sample_id, checksum)
        for sample_id, checksum, check in _ENTRY.iter_unpack(whole)
        if sample_id < num_samples and check == zlib.crc32(_CONTENT.pack(sample_id, checksum))
    ]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
