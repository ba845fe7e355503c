"""Write a target cache so that nothing computed is ever lost.

Lengths decide the layout, so every sample goes straight to its final place, in whatever order and by whatever process
it is computed. Until it is complete a shard lies in `.build/`. There a journal has the samples that are durable, and a
killed build continues with those that no journal has. The ranks of several machines have one each, on the disk that
they share, and the first reads them all. `manifest.json` comes last: a folder that has one is complete.
"""

import hashlib
import itertools
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from nemotron_dspark.cache.checksums import CHECKSUMS, SAMPLES, sample_checksum, write_checksums
from nemotron_dspark.cache.compact import CompactLayout
from nemotron_dspark.cache.deepspec_layout import DeepSpecLayout
from nemotron_dspark.cache.layout import INDEX, MANIFEST, WORK, Layout
from nemotron_dspark.config.run import CacheConfig
from nemotron_dspark.distributed import SINGLE, DistContext
from nemotron_dspark.errors import CheckError
from nemotron_dspark.files import disk_errors, fsync_folder, read_json, sha256, write_json, write_whole
from nemotron_dspark.folders import check_space

Written = dict[int, int]  # sample ids, with the checksum of each

_SPARE_BYTES = 16 * 1024**2  # of disk: index, checksums and the file system's own needs
_CONTENT = struct.Struct("<QI")  # sample id, its checksum
_ENTRY = struct.Struct("<QII")  # and the CRC-32 of these twelve bytes: a torn entry does not count


class ShardFiles:
    """The unfinished shards of a cache, for whoever computes samples of it: any thread, any process."""

    def __init__(self, folder: Path, layout: Layout):
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
            for part, (offset, _) in zip(parts, self.layout.fields(sample_id), strict=True):
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
                    # Not to read: NFS would fill up a page of which another machine is writing the rest.
                    self._open[shard] = os.open(self.partial(shard), os.O_WRONLY | os.O_CREAT, 0o644)
                    os.ftruncate(self._open[shard], self.layout.shard_sizes[shard])
                    _write_at(self._open[shard], np.frombuffer(self.layout.preamble(shard), np.uint8), 0)
            return self._open[shard]


class CacheWriter:
    """Writer of one cache folder, which the caller has `locked`; use as a context manager.

    Samples may be written by others, to `ShardFiles` of the same folder, in any process; `mark_written` notes them
    here, in any thread. Complete shards are put in place by a thread of its own, which reads them once more.

    Every rank of ``context`` has one, rank 0 first. What the others note it gathers, and it alone holds the lock, puts
    shards in place and finishes.
    """

    def __init__(self, folder: Path | str, layout: Layout, context: DistContext = SINGLE):
        self.folder, self.layout, self.context = Path(folder), layout, context
        self.files = ShardFiles(self.folder, layout)
        self.written = np.zeros(len(layout.lengths), dtype=bool)  # [samples]
        self._checksums = np.zeros(len(layout.lengths), dtype="<u4")
        self._bounds = np.searchsorted(layout.shards, np.arange(len(layout.shard_files) + 1))  # first sample of each
        work = self.folder / WORK
        self._journal, self._digests_file = _journal(work, context.rank), work / CHECKSUMS
        self._gathered = dict.fromkeys((_journal(work, rank) for rank in range(1, context.world_size)), 0)  # bytes
        self._state = threading.RLock()
        self._closer = ThreadPoolExecutor(1, "close-shards")
        self._closing: list[Future] = []
        with disk_errors(self.folder):
            work.mkdir(parents=True, exist_ok=True)
        self._digests = read_json(self._digests_file) if self._digests_file.is_file() else {}
        if context.is_main:
            for path in (*self.folder.glob(".*.tmp"), *work.glob(".*.tmp")):  # of a kill inside `files.write_whole`
                path.unlink(missing_ok=True)
            journals = [*work.glob("*.journal")]
            self._resume({id_: check for path in journals for id_, check in _entries(path.read_bytes()).items()})
            for path in set(journals) - {self._journal}:
                path.unlink()
        else:
            self._note(_entries(_journal(work, 0).read_bytes()))
            write_whole(self._journal, lambda file: None)
        self.reused = int(self.written.sum())  # samples that an earlier, killed build had written

    @staticmethod
    def of(
        folder: Path,
        cache: CacheConfig,
        lengths: np.ndarray,  # int [samples]
        predicting: np.ndarray,  # int [samples], `predicts_loss_token` counted: last states that a compact cache keeps
        *,
        taps: Sequence[int],
        hidden_size: int,
        extra: Mapping[str, Any],  # for the manifest
        context: DistContext = SINGLE,
    ) -> "CacheWriter":
        """The writer of a cache of such samples in the format that ``cache`` asks for.

        Raises:
            EnvironmentFault: what is not written yet does not fit on the disk.
        """
        settings = {"taps": taps, "hidden_size": hidden_size, "shard_bytes": cache.shard_bytes, "extra": extra}
        compact = cache.format == "compact"
        layout: Layout = (
            CompactLayout.of(lengths, predicting, **settings) if compact else DeepSpecLayout.of(lengths, **settings)
        )
        writer = CacheWriter(folder, layout, context)
        if not context.is_main:
            return writer
        missing = sum(layout.shard_sizes) - sum(map(layout.sample_bytes, np.flatnonzero(writer.written).tolist()))
        check_space(
            folder,
            missing + _SPARE_BYTES,
            "The cache needs",
            "Free some space, and the same command goes on; or choose another disk, a compact cache "
            "(--cache-format compact), fewer conversations or taps, or none (`nds train --data`): see `nds plan`.",
        )
        return writer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()
        self._closer.shutdown(cancel_futures=True)

    def commit(self, written: Written) -> None:
        """Make what was written to `files` durable, and note these samples of it."""
        self.files.flush()
        self.mark_written(written)

    def mark_written(self, checksums: Written) -> None:
        """Note samples that are durable, by id with their checksums; shards that they complete are put in place."""
        if not checksums:
            return
        with self._state:
            with disk_errors(self.folder), open(self._journal, "ab") as journal:
                journal.write(b"".join(itertools.starmap(_entry, checksums.items())))
                journal.flush()
                os.fsync(journal.fileno())
            self._note(checksums)
            for shard in np.unique(self.layout.shards[list(checksums)]).tolist() if self.context.is_main else ():
                if self.written[self._bounds[shard] : self._bounds[shard + 1]].all():
                    self._closing.append(self._closer.submit(self._put_in_place, shard))
            for closed in self._closing:
                if closed.done():
                    closed.result()

    def gather(self) -> None:
        """On rank 0, note what the other ranks have noted since the last call."""
        for journal, start in self._gathered.items() if self.context.is_main else ():
            with disk_errors(self.folder), open(journal, "rb") as file:
                file.seek(start)
                data = file.read()
            found = _entries(data)
            if len(found) == len(data) // _ENTRY.size:  # else one is being written, and all are read again
                self._gathered[journal] += len(found) * _ENTRY.size
            self.mark_written({sample: check for sample, check in found.items() if not self.written[sample]})

    def finish(self, extra_files: Iterable[str] = ()) -> None:
        """Write index, checksums (of ``extra_files`` too) and, last, the manifest, which makes the cache complete."""
        if not self.written.all():
            raise CheckError(
                f"{int((~self.written).sum())} samples of {self.folder} were never written.",
                "Run the same build again.",
            )
        for closed in self._closing:
            closed.result()
        folder, manifest = self.folder, self.layout.manifest()
        write_whole(folder / INDEX, lambda file: file.write(self.layout.records.tobytes()))
        write_whole(folder / SAMPLES, lambda file: file.write(self._checksums.tobytes()))
        digests = {name: sha256(folder / name) for name in (INDEX, SAMPLES, *extra_files)}
        digests[MANIFEST] = hashlib.sha256(manifest).hexdigest()
        write_checksums(folder, self._digests | digests)
        write_whole(folder / MANIFEST, lambda file: file.write(manifest))
        shutil.rmtree(folder / WORK)

    def _note(self, checksums: Written) -> None:
        ids = list(checksums)
        self.written[ids], self._checksums[ids] = True, list(checksums.values())

    def _put_in_place(self, shard: int) -> None:
        name, partial = self.layout.shard_files[shard], self.files.partial(shard)
        with disk_errors(self.folder):
            digest = sha256(partial)
            with self._state:
                self._digests[name] = digest
                write_json(self._digests_file, self._digests)
            os.replace(partial, self.folder / name)
            fsync_folder(self.folder)

    def _resume(self, noted: Written) -> None:
        """Count what an earlier, killed build has written for certain, and rewrite the journal without the rest of it.

        ``noted`` is the checksum of every sample in its journals.
        """
        for shard, name in enumerate(self.layout.shard_files):
            samples = range(self._bounds[shard], self._bounds[shard + 1])
            found = [sample for sample in samples if sample in noted]
            done, partial, size = self.folder / name, self.files.partial(shard), self.layout.shard_sizes[shard]
            whole = _size(done) == size and name in self._digests  # both are written before it is put in place
            if not found or (not whole and _size(partial) != size):
                continue
            if whole and len(found) < len(samples):  # the journal was lost
                os.replace(done, partial)
            self._note({sample: noted[sample] for sample in found})
            if not whole and len(found) == len(samples):  # killed between the last note and the rename
                self._closing.append(self._closer.submit(self._put_in_place, shard))
        entries = b"".join(_entry(sample, noted[sample]) for sample in np.flatnonzero(self.written).tolist())
        write_whole(self._journal, lambda file: file.write(entries))


def _write_at(descriptor: int, array: np.ndarray, offset: int) -> None:
    view = array.reshape(-1).view(np.uint8).data
    while view:  # one call writes at most 2 GiB
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _entry(sample_id: int, checksum: int) -> bytes:
    return _ENTRY.pack(sample_id, checksum, zlib.crc32(_CONTENT.pack(sample_id, checksum)))


def _journal(work: Path, rank: int) -> Path:
    return work / (f"written-{rank}.journal" if rank else "written.journal")


def _entries(data: bytes) -> Written:
    """Checksum of every sample that was noted, in a journal's bytes."""
    whole = data[: len(data) - len(data) % _ENTRY.size]
    return {
        sample_id: checksum
        for sample_id, checksum, check in _ENTRY.iter_unpack(whole)
        if check == zlib.crc32(_CONTENT.pack(sample_id, checksum))
    }


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
