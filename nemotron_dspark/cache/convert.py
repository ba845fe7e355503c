"""From one cache format to the other, without the target: what training reads of a sample is carried over.

From DeepSpec's format to the compact one hidden states lose what the quantiser loses, and last hidden states that no
loss term looks at; the way back adds nothing, so those are zeros. It goes on where it was stopped, as a build does.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nemotron_dspark.cache.build import REPORT
from nemotron_dspark.cache.capture import BuildProgress
from nemotron_dspark.cache.checksums import fingerprint
from nemotron_dspark.cache.compact import QUANTISATION, CompactLayout
from nemotron_dspark.cache.layout import MANIFEST, WORK
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cache.writer import CacheWriter, Written
from nemotron_dspark.chat.mask import predicts_loss_token
from nemotron_dspark.config.run import CacheConfig
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json, write_json
from nemotron_dspark.folders import check_claim, locked

_COMMIT_BYTES = 256 * 1024**2  # written between two flushes


@dataclasses.dataclass(frozen=True)
class ConvertReport:
    source: Path
    folder: Path
    source_format: str  # in a few words
    format: str
    samples: int
    tokens: int
    source_bytes: int
    bytes: int
    reused_samples: int  # written by an earlier, interrupted call
    seconds: float


def convert_cache(
    source_folder: Path | str,
    out_folder: Path | str,
    cache: CacheConfig,
    *,
    on_progress: Callable[[BuildProgress], None] = lambda progress: None,
) -> ConvertReport:
    """Write the samples of ``source_folder`` to ``out_folder`` in the format of ``cache``, or finish doing so.

    Every sample's checksum is compared when it is read.

    Raises:
        InputError: the source is damaged or has that format already, or ``out_folder`` holds something else.
        EnvironmentFault: not enough free space (known before anything is written), or the disk is full.
    """
    started = time.monotonic()
    source, folder = TargetCache(source_folder), Path(out_folder)
    compact = isinstance(source.layout, CompactLayout)
    if compact == (cache.format == "compact"):
        raise InputError(
            f"{source.folder} is {'compact' if compact else 'in DeepSpec format'} already.",
            "Give --to the other format.",
        )
    reused = len(source)
    _claim(folder, source.folder, cache)
    if (folder / MANIFEST).is_file():
        shutil.rmtree(folder / WORK, ignore_errors=True)  # killed between the manifest and this
    else:
        reused = _write(source, folder, cache, on_progress)
    made = TargetCache(folder)
    return ConvertReport(
        source=source.folder,
        folder=folder,
        source_format=source.layout.label,
        format=made.layout.label,
        samples=len(made),
        tokens=int(made.lengths.sum()),
        source_bytes=sum(source.layout.shard_sizes),
        bytes=sum(made.layout.shard_sizes),
        reused_samples=reused,
        seconds=time.monotonic() - started,
    )


def _write(source: TargetCache, folder: Path, cache: CacheConfig, on_progress: Callable[[BuildProgress], None]) -> int:
    """Write the missing samples; how many were there already."""
    predicting = [predicts_loss_token(source.loss_mask(sample)).sum() for sample in range(len(source))]
    ends, pending = np.cumsum(source.lengths), 0
    written: Written = {}
    settings = {"taps": source.taps, "hidden_size": source.hidden_size, "extra": source.layout.extra}
    with (
        locked(folder / WORK),
        CacheWriter.of(folder, cache, source.lengths, np.array(predicting, np.int64), **settings) as writer,
    ):
        for sample_id in np.flatnonzero(~writer.written).tolist():
            sample = source[sample_id]
            arrays = sample.input_ids.numpy(), sample.loss_mask.numpy(), sample.taps, sample.last
            written[sample_id] = writer.files.write(sample_id, *arrays)
            pending += writer.layout.sample_bytes(sample_id)
            if pending >= _COMMIT_BYTES:
                writer.commit(written)
                written, pending = {}, 0
            tokens, total = int(ends[sample_id]), int(ends[-1])
            on_progress(BuildProgress("convert", sample_id + 1, len(source), tokens, total))
        writer.commit(written)
        writer.finish(extra_files=[REPORT])
    return writer.reused


def _claim(folder: Path, source: Path, cache: CacheConfig) -> None:
    """Note in ``folder`` what is converted; `InputError` when it holds something else."""
    compact = {"quantisation": QUANTISATION} if cache.format == "compact" else {}
    inputs = {
        "converted_from": fingerprint(source),
        "cache": {"format": cache.format, "shard_bytes": cache.shard_bytes, **compact},
    }
    note = folder / REPORT
    begun = read_json(note).get("inputs", {}) if note.is_file() else None
    check_claim(folder, "a cache", begun, inputs)
    if begun is None:
        known = read_json(source / REPORT) if (source / REPORT).is_file() else {}
        write_json(note, {"inputs": inputs, "result": known.get("result")})
