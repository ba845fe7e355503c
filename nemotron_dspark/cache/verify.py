"""A finished cache: whether it is whole (checksums, bounds, values; one sentence a fault), and what it holds."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_dspark.cache.build import REPORT
from nemotron_dspark.cache.checksums import (
    CHECKSUMS,
    SAMPLES,
    changed_files,
    read_checksums,
    sample_checksum,
    write_checksums,
)
from nemotron_dspark.cache.layout import INDEX, MANIFEST, RESTORE
from nemotron_dspark.cache.reader import TargetCache, read_layout
from nemotron_dspark.data.tokens import check_no_mask_token
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json, sha256, write_whole

_LIMIT = 20  # faults of samples that are listed
_BINS = 8  # of lengths, at most


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    folder: Path
    samples: int
    files_with_checksums: int
    problems: tuple[str, ...]

    @property
    def whole(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {"whole": self.whole} | dataclasses.asdict(self)


def verify(folder: Path | str, *, progress: Callable[[str], None] = lambda name: None) -> VerifyReport:
    """Read every byte of a cache and say what is wrong with it. A cache without checksums (DeepSpec's) is checked for
    bounds and values only; that is not a problem.

    Raises:
        InputError: ``folder`` has no manifest that can be read.
    """
    folder = Path(folder)
    problems, digests = [], {}
    try:
        digests = read_checksums(folder)
    except InputError as error:
        problems.append(error.what)
    for name in digests:
        progress(name)
        problems += changed_files(folder, digests, [name])
    progress("samples")
    samples = 0
    try:
        layout = read_layout(folder)
        samples = len(layout.lengths)
        if digests:
            known = {INDEX, *layout.shard_files}
            problems += [f"{folder / CHECKSUMS} has no checksum of {name}." for name in sorted(known - digests.keys())]
        misplaced = layout.check_files(folder)
        problems += misplaced
        if not misplaced:
            cache = TargetCache(folder, check_files=False)
            wrong = (fault for sample in range(samples) for fault in _faults(cache, sample, cache.fields(sample)))
            problems += itertools.islice(wrong, _LIMIT)
    except InputError as error:
        if not (folder / MANIFEST).is_file():
            raise
        problems.append(error.what)
    return VerifyReport(folder, samples, len(digests), tuple(dict.fromkeys(problems)))


def write_missing_checksums(folder: Path | str, *, progress: Callable[[str], None] = lambda name: None) -> VerifyReport:
    """Give a cache that has none, DeepSpec's, the checksums by which later damage is found; all values are checked.

    Raises:
        InputError: it has them, or a value in it cannot be right.
    """
    folder = Path(folder)
    if (folder / CHECKSUMS).is_file():
        raise InputError(f"{folder} has checksums already.", "`nds cache verify` compares them.")
    cache = TargetCache(folder, check_files=False)
    checksums, digests = np.zeros(len(cache), dtype="<u4"), {}
    for shard, name in enumerate(cache.layout.shard_files):
        progress(name)
        digests[name] = sha256(folder / name)
        for sample_id in np.flatnonzero(cache.layout.shards == shard).tolist():  # in memory, as the shard was just read
            fields = cache.fields(sample_id)
            for fault in _faults(cache, sample_id, fields):
                raise InputError(fault, RESTORE)
            checksums[sample_id] = sample_checksum(fields)
    write_whole(folder / SAMPLES, lambda file: file.write(checksums.tobytes()))
    digests |= {name: sha256(folder / name) for name in (MANIFEST, INDEX, SAMPLES)}
    write_checksums(folder, digests)
    return VerifyReport(folder, len(cache), len(digests), ())


def check_mask_token(cache: TargetCache, mask_token_id: int | None) -> None:
    """`InputError` naming the sample in which the draft's mask token occurs."""
    check_no_mask_token(cache.all_input_ids(), mask_token_id, cache.folder)


def _faults(cache: TargetCache, sample_id: int, fields: Sequence[np.ndarray]) -> list[str]:
    """Sentences on one sample; its checksum is compared where there is one."""
    changed = [] if cache.intact(sample_id, fields) else ["is not what was written: its checksum differs"]
    return [f"{cache.where(sample_id)} {fault}." for fault in changed + cache.layout.faults(sample_id, fields)]


@dataclasses.dataclass(frozen=True)
class LengthBin:
    """Samples of ``first`` to ``last`` tokens."""

    first: int
    last: int
    samples: int


@dataclasses.dataclass(frozen=True)
class CacheInfo:
    folder: Path
    target: str | None
    chat_template: str | None
    format: str  # in a few words
    taps: tuple[int, ...]
    hidden_size: int
    samples: int
    tokens: int
    loss_tokens: int | None  # None for a cache that was built elsewhere
    bytes: int
    bytes_per_token: int
    shards: int
    lengths: tuple[LengthBin, ...]


def length_bins(lengths: np.ndarray) -> tuple[LengthBin, ...]:
    """At most `_BINS` bins of equal width from the shortest to the longest sample."""
    if not len(lengths):
        return ()
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // _BINS)
    counts = np.bincount((lengths - low) // width)
    return tuple(
        LengthBin(low + number * width, min(high, low + (number + 1) * width - 1), samples)
        for number, samples in enumerate(counts.tolist())
    )


def summarise(folder: Path | str) -> CacheInfo:
    """Numbers of the cache in ``folder``; `InputError` when it cannot be opened."""
    cache = TargetCache(folder)
    report = cache.folder / REPORT
    result = read_json(report).get("result") if report.is_file() else None
    size, tokens = sum(cache.layout.shard_sizes), int(cache.lengths.sum())
    return CacheInfo(
        folder=cache.folder,
        target=cache.target_name,
        chat_template=cache.layout.extra.get("chat_template"),
        format=cache.layout.label,
        taps=cache.taps,
        hidden_size=cache.hidden_size,
        samples=len(cache),
        tokens=tokens,
        loss_tokens=result["loss_tokens"] if result else None,
        bytes=size,
        bytes_per_token=size // tokens if tokens else 0,
        shards=len(cache.layout.shard_files),
        lengths=length_bins(cache.lengths),
    )
