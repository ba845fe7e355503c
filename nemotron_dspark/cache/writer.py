"""Write a target cache so that nothing computed is ever lost.

Lengths decide the layout, so every sample goes straight to its final place, in whatever order and by whatever process
it is computed. Until it is complete a shard lies in `.build/`. Samples that are durable are entered in a journal there,
by one process; a killed build continues with the samples the journal does not have. `manifest.json` comes last: a
folder that has one is complete.
"""

import contextlib
import fcntl
import hashlib
import itertools
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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


class ShardFiles:
    """The unfinished shards of a cache, for whoever computes samples of it: any thread, any process."""

    def __init__(self, folder: Path, layout: Layout | None = None):
        self.folder = folder
        self.layout = layout
        self._open: dict[int, int] = {}  # shard id -> file descriptor
        self._opening = threading.Lock()

    def partial(self, shard: int) -> Path:
        return self.folder / WORK / f"{self.layout.shard_files[shard]}.partial"

    def write(
        self,
        sample_id: int,
        input_ids: np.ndarray,  # int32 [S]
        loss_mask: np.ndarray,  # uint8 [S]
        taps: Tensor,  # [S, T·H]
        last: Tensor,  # [S, H]
    ) -> int:
        """Put one sample in its place and return its checksum; it is durable after the next `flush`."""
        length, width = int(self.layout.lengths[sample_id]), self.layout.hidden_size
        shapes = (input_ids.shape, loss_mask.shape, tuple(taps.shape), tuple(last.shape))
        if shapes != ((length,), (length,), (length, len(self.layout.taps) * width), (length, width)):
            raise ValueError(f"sample {sample_id} of length {length} was given with shapes {shapes}")
        parts = self.layout.encode(sample_id, input_ids, loss_mask, taps, last)
        descriptor = self._descriptor(int(self.layout.shards[sample_id]))
        with disk_errors(self.folder):
            for part, (offset, _) in zip(parts, self.layout.pieces(sample_id), strict=True):
                _write_at(descriptor, part, offset)
        return sample_checksum(parts)

    def flush(self) -> None:
        """Make everything written here durable."""
        with disk_errors(self.folder):
            for descriptor in self._open.values():
                os.fsync(descriptor)
        self.close()

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _descriptor(self, shard: int) -> int:
        with self._opening:
            if shard not in self._open:
                with disk_errors(self.folder):
                    self._open[shard] = os.open(self.partial(shard), os.O_RDWR | os.O_CREAT, 0o644)
                    os.ftruncate(self._open[shard], self.layout.shard_sizes[shard])
                    _write_at(self._open[shard], np.frombuffer(self.layout.preamble(shard), np.uint8), 0)
            return self._open[shard]


class CacheWriter:
    """Keeper of one cache folder; use as a context manager. One at a time: a second one is refused.

    Samples may be written by others, to `ShardFiles` of the same folder, in any process; `enter` notes them here, in
    any thread. Shards that are complete are put in place by a thread of its own, which reads them once more.
    """

    def __init__(self, folder: Path | str, layout: Layout | None = None):
        """``layout`` may be of the first shards only, and then `extend`ed to more of them."""
        self.folder = Path(folder)
        self.work = self.folder / WORK
        self.layout: Layout | None = None
        self.files = ShardFiles(self.folder)
        self.written = np.zeros(0, dtype=bool)  # [samples]
        self.reused = 0  # samples that an earlier, killed build had written
        self._checksums = np.zeros(0, dtype="<u4")
        self._written_bytes = 0
        self._bounds = np.zeros(1, dtype=np.int64)  # first sample of each shard, and the number of samples
        self._journal = self.work / "written.journal"
        self._digests_file = self.work / CHECKSUMS
        self._pending: dict[int, int] = {}  # sample -> checksum
        self._state = threading.RLock()
        with disk_errors(self.folder):
            self.work.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.work)
        self._closer = ThreadPoolExecutor(1, "close-shards")
        self._closing: list[Future] = []
        remove_leftovers(self.folder)
        self._noted = _read_journal(self._journal)  # sample -> checksum, of samples that the layout does not reach yet
        self._digests = read_json(self._digests_file) if self._digests_file.is_file() else {}
        self._rewrite_journal()  # without a torn entry at its end
        if layout is not None:
            self.extend(layout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()
        self._closer.shutdown(cancel_futures=True)
        os.close(self._lock)

    @property
    def missing_bytes(self) -> int:
        """Bytes that the samples of the layout that are not written yet will take."""
        return sum(self.layout.shard_sizes) - self._written_bytes

    def extend(self, layout: Layout) -> None:
        """Go on with ``layout``, which begins with the shards of the one before; what is there of the others counts."""
        with self._state:
            shards, samples = len(self._bounds) - 1, len(self.written)
            self.layout = self.files.layout = layout
            self._bounds = np.searchsorted(layout.shards, np.arange(len(layout.shard_files) + 1))
            new = len(layout.lengths) - samples
            self.written = np.append(self.written, np.zeros(new, dtype=bool))
            self._checksums = np.append(self._checksums, np.zeros(new, dtype="<u4"))
            lost = [self._resume(shard) for shard in range(shards, len(layout.shard_files))]
            if any(lost):
                self._rewrite_journal()
            found = samples + np.flatnonzero(self.written[samples:])
            self.reused += len(found)
            self._written_bytes += sum(map(layout.sample_bytes, found.tolist()))

    def write(
        self,
        sample_id: int,
        input_ids: np.ndarray,  # int32 [S]
        loss_mask: np.ndarray,  # uint8 [S]
        taps: Tensor,  # [S, T·H]
        last: Tensor,  # [S, H]
    ) -> None:
        """Put one sample in its place; it counts as written after the next `commit`."""
        self._pending[sample_id] = self.files.write(sample_id, input_ids, loss_mask, taps, last)

    def commit(self) -> None:
        """Make everything written so far durable and note it."""
        self.files.flush()
        self.enter(self._pending)
        self._pending = {}

    def enter(self, checksums: Mapping[int, int]) -> None:
        """Note samples that are durable, by id with their checksums; shards that they complete are put in place."""
        with self._state:
            with disk_errors(self.folder), open(self._journal, "ab") as journal:
                journal.write(b"".join(itertools.starmap(_entry, checksums.items())))
                journal.flush()
                os.fsync(journal.fileno())
            for sample_id, checksum in checksums.items():
                self._checksums[sample_id] = checksum
                self._written_bytes += self.layout.sample_bytes(sample_id)
            self.written[list(checksums)] = True
            for shard in np.unique(self.layout.shards[list(checksums)]).tolist():
                if self._samples(shard).all():
                    self._close(shard)
            for closed in self._closing:
                if closed.done():
                    closed.result()

    def finish(self, extra_files: Iterable[str] = ()) -> None:
        """Write index, checksums (of ``extra_files`` too) and manifest; the cache is complete when this returns."""
        if not self.written.all():
            raise CheckError(
                f"{int((~self.written).sum())} samples of {self.folder} were never written.",
                "Run the same build again.",
            )
        for closed in self._closing:
            closed.result()
        finish_cache(self.folder, self.layout, self._checksums, self._digests, extra_files)
        shutil.rmtree(self.work)

    def _samples(self, shard: int) -> np.ndarray:  # bool [samples of the shard], a view
        return self.written[self._bounds[shard] : self._bounds[shard + 1]]

    def _close(self, shard: int) -> None:
        partial = self.files.partial(shard)
        self._closing.append(self._closer.submit(self._put_in_place, self.layout.shard_files[shard], partial))

    def _put_in_place(self, name: str, partial: Path) -> None:
        with disk_errors(self.folder):
            digest = sha256(partial)
            with self._state:
                self._digests[name] = digest
                write_json(self._digests_file, self._digests)
            os.replace(partial, self.folder / name)
            fsync_folder(self.folder)

    def _resume(self, shard: int) -> bool:
        """Count what an earlier, killed build has written of ``shard`` for certain; whether it noted more than that."""
        samples = range(self._bounds[shard], self._bounds[shard + 1])
        noted = {sample: self._noted.pop(sample) for sample in samples if sample in self._noted}
        if not noted:
            return False
        name, size = self.layout.shard_files[shard], self.layout.shard_sizes[shard]
        done, partial = self.folder / name, self.files.partial(shard)
        whole = _size(done) == size and name in self._digests  # both are written before it is put in place
        if whole and len(noted) < len(samples):  # the journal was lost
            os.replace(done, partial)
        elif not whole and _size(partial) != size:
            return True
        for sample, checksum in noted.items():
            self.written[sample], self._checksums[sample] = True, checksum
        if not whole and len(noted) == len(samples):  # killed between the last note and the rename
            self._close(shard)
        return False

    def _rewrite_journal(self) -> None:
        known = {sample: int(self._checksums[sample]) for sample in np.flatnonzero(self.written).tolist()}
        entries = itertools.starmap(_entry, (known | self._noted).items())
        write_whole(self._journal, lambda file: file.write(b"".join(entries)))


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
    view = memoryview(array.reshape(-1).view(np.uint8))
    while view:  # one call writes at most 2 GiB
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _entry(sample_id: int, checksum: int) -> bytes:
    return _ENTRY.pack(sample_id, checksum, zlib.crc32(_CONTENT.pack(sample_id, checksum)))


def _read_journal(path: Path) -> dict[int, int]:
    """Checksum of every sample that was noted."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data[: len(data) - len(data) % _ENTRY.size]
    return {
        sample_id: checksum
        for sample_id, checksum, check in _ENTRY.iter_unpack(whole)
        if check == zlib.crc32(_CONTENT.pack(sample_id, checksum))
    }


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
