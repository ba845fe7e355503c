"""Conversations in, target cache out: tokenise, lay out, run the target, write.

Everything but the hidden states follows from the tokenised lengths: the layout, and the batches (similar lengths within
one shard). So a build that was killed anywhere goes on with the batches it has not written, and ends in the same bytes.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nemotron_dspark import __version__
from nemotron_dspark.cache.capture import CapturesStates, captured_states
from nemotron_dspark.cache.formats import new_layout
from nemotron_dspark.cache.layout import MANIFEST, WORK, Layout
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cache.tokens import TokenStore, check_no_mask_token, read_report, tokenise
from nemotron_dspark.cache.writer import CacheWriter, lock, remove_leftovers
from nemotron_dspark.chat.format import recognise
from nemotron_dspark.chat.mask import Tokenised
from nemotron_dspark.config.run import CacheConfig, DataConfig
from nemotron_dspark.data.conversations import SkipTally
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.files import disk_errors, read_json, sha256

REPORT = "build.json"
_SPARE_BYTES = 16 * 1024**2  # index, checksums and the file system's own needs


class Tokens(Protocol):
    """Tokenised samples; `cache.tokens.TokenStore` has it."""

    lengths: np.ndarray  # int64 [samples]
    ids: np.ndarray  # int64 [samples], what a person knows them by

    def __len__(self) -> int: ...
    def __getitem__(self, sample_id: int) -> Tokenised: ...


@dataclasses.dataclass(frozen=True)
class BuildProgress:
    """How far a build is; ``stage`` is "tokenise" (samples = lines read, no total) or "capture"."""

    stage: str
    samples: int
    total_samples: int
    tokens: int
    total_tokens: int


@dataclasses.dataclass(frozen=True)
class BuildReport:
    folder: Path
    samples: int
    tokens: int
    loss_tokens: int
    cut: int  # samples that max_length cut off
    bytes: int
    shards: int
    skipped: SkipTally
    notes: tuple[str, ...]
    reused_samples: int  # written by an earlier, interrupted build
    seconds: float

    def to_json(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"folder": str(self.folder), "skipped": self.skipped.to_json(), "notes": list(self.notes)}


def build_cache(
    target: CapturesStates,
    conversations_file: Path | str,
    out_folder: Path | str,
    *,
    taps: tuple[int, ...],
    data: DataConfig | None = None,
    cache: CacheConfig | None = None,
    mask_token_id: int | None = None,
    progress: Callable[[BuildProgress], None] | None = None,
) -> BuildReport:
    """Write the cache of ``conversations_file`` under ``target`` to ``out_folder``, or finish one that was interrupted.

    A finished cache of the same inputs is left as it is. With ``mask_token_id``, data that contains it is refused.

    Raises:
        InputError: unusable data, or a folder that holds something else or was built from other inputs.
        EnvironmentFault: not enough free space (known before the target runs), or the disk is full.
        CheckError: the target's hidden states are not finite.
    """
    started = time.monotonic()
    data, cache = data or DataConfig(), cache or CacheConfig()
    conversations, folder = Path(conversations_file), Path(out_folder)
    report = progress or (lambda _: None)
    inputs = {
        **inputs_of(
            Path(target.folder), target.tokenizer, target.spec.name, str(target.dtype), conversations, taps, data
        ),
        "cache": layout_settings(cache),
    }
    work = folder / WORK
    _check_folder(folder, inputs)
    if (folder / MANIFEST).is_file():
        shutil.rmtree(work, ignore_errors=True)  # killed between the manifest and this
        return _finished(folder, started)
    with disk_errors(folder):
        work.mkdir(parents=True, exist_ok=True)
    if (folder / REPORT).is_file():
        check_no_mask_token(TokenStore(work), mask_token_id, folder)
    else:
        held = lock(work)
        try:
            remove_leftovers(folder)
            tokenise(
                work,
                folder / REPORT,
                conversations,
                target.tokenizer,
                data,
                max_positions=target.spec.max_position_embeddings,
                mask_token_id=mask_token_id,
                inputs=inputs,
                progress=lambda lines: report(BuildProgress("tokenise", lines, 0, 0, 0)),
            )
        finally:
            os.close(held)
    store = TokenStore(work)
    layout = new_layout(
        cache,
        store.lengths,
        lambda sample: store[sample].loss_mask,
        taps=taps,
        hidden_size=target.spec.hidden_size,
        extra=_manifest_extra(target, conversations, data),
    )
    with CacheWriter(folder, layout) as writer:
        reused = int(writer.written.sum())
        check_space(folder, writer.missing_bytes)
        write_states(target, store, writer, cache.batch_tokens, report)
        writer.finish(extra_files=[REPORT])
    return _finished(folder, started, reused)


def batches(layout: Layout, batch_tokens: int) -> list[list[int]]:
    """Sample ids of every forward: within a shard by descending length, at most ``batch_tokens`` padded tokens.

    A pure function of the lengths, so that a resumed build computes what the first one would have. The longest samples
    come first: if they do not fit in memory, that shows at once.
    """
    lengths = layout.lengths.tolist()
    bounds = np.searchsorted(layout.shards, np.arange(len(layout.shard_files) + 1)).tolist()
    result: list[list[int]] = []
    for first, stop in itertools.pairwise(bounds):
        ordered = sorted(range(first, stop), key=lambda sample: (-lengths[sample], sample))
        batch: list[int] = []
        for sample in ordered:
            if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
                result.append(batch)
                batch = []
            batch.append(sample)
        result.append(batch)
    return result


def write_states(
    target: CapturesStates,
    store: Tokens,
    writer: CacheWriter,
    batch_tokens: int,
    report: Callable[[BuildProgress], None],
) -> None:
    """Run the target over the samples of ``store`` that ``writer`` does not have yet."""
    total = int(store.lengths.sum())
    for batch in batches(writer.layout, batch_tokens):
        if not writer.written[batch].all():
            samples = [store[sample_id] for sample_id in batch]
            taps, last = captured_states(target, samples, store.ids[batch], writer.layout.taps)
            taps, last = taps.cpu(), last.cpu()
            for row, (sample_id, sample) in enumerate(zip(batch, samples, strict=True)):
                length = len(sample.input_ids)
                writer.write(sample_id, sample.input_ids, sample.loss_mask, taps[row, :length], last[row, :length])
            writer.commit()
        written = writer.written
        report(BuildProgress("capture", int(written.sum()), len(store), int(store.lengths[written].sum()), total))


def _finished(folder: Path, started: float, reused: int | None = None) -> BuildReport:
    cache = TargetCache(folder)
    tally, notes = read_report(folder / REPORT)
    return BuildReport(
        folder=folder,
        samples=tally.samples,
        tokens=tally.tokens,
        loss_tokens=tally.loss_tokens,
        cut=tally.cut,
        bytes=sum(cache.layout.shard_sizes),
        shards=len(cache.layout.shard_files),
        skipped=tally.skipped,
        notes=notes,
        reused_samples=tally.samples if reused is None else reused,
        seconds=time.monotonic() - started,
    )


def _check_folder(folder: Path, inputs: dict[str, Any]) -> None:
    """`InputError` unless ``folder`` is absent, empty, or a build of the same inputs."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file.", "Choose a folder for the cache.")
    if (folder / REPORT).is_file():
        known = read_json(folder / REPORT).get("inputs", {})
        changed = sorted(key for key in known.keys() | inputs.keys() if known.get(key) != inputs.get(key))
        if changed:
            raise InputError(
                f"{folder} was built from other inputs: {', '.join(changed)} changed.",
                "Choose another folder, or delete this one.",
            )
        return
    foreign = [path.name for path in folder.iterdir() if path.name != WORK and not path.name.endswith(".tmp")]
    if foreign:
        raise InputError(
            f"{folder} is not empty and not a build of ours: it has {foreign[0]}.", "Choose another folder."
        )


def check_space(folder: Path, missing: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < missing + _SPARE_BYTES:
        raise EnvironmentFault(
            f"The cache needs {missing / 1e9:.2f} GB more and {folder} has {free / 1e9:.2f} GB free.",
            "Free some space, and the same command goes on; or choose another disk, fewer conversations or taps, or no "
            "cache (`nds train --data`): `nds plan` compares them.",
        )


def inputs_of(
    folder: Path, tokenizer: Any, name: str, dtype: str, conversations: Path, taps: Sequence[int], data: DataConfig
) -> dict[str, Any]:
    """What the hidden states depend on, as it can be told from outside; ``folder`` is the target's.

    Raises:
        InputError: there is no file ``conversations``.
    """
    if not conversations.is_file():
        raise InputError(f"{conversations} does not exist.", "Check the path of the data file.")
    return {
        "conversations": sha256(conversations),
        "target": _weights_identity(folder),
        "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "target_name": name,
        "dtype": dtype,
        "taps": list(taps),
        "data": data.model_dump(),
    }


def layout_settings(cache: CacheConfig) -> dict[str, Any]:
    """The settings on which a cache's bytes depend."""
    compact = {"format", "quantisation"} if cache.format == "compact" else set()
    return cache.model_dump(include={"shard_bytes", "batch_tokens"} | compact)


def _weights_identity(folder: Path) -> str:
    """Digest of config, tokenizer, and size, head and tail of every weight file (reading them whole takes minutes)."""
    digest = hashlib.sha256()
    for path in sorted((folder / "config.json", folder / "tokenizer.json", *folder.glob("*.safetensors"))):
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def _manifest_extra(target: CapturesStates, conversations: Path, data: DataConfig) -> dict[str, Any]:
    chat_format = recognise(target.tokenizer)
    return {
        "target_model_name_or_path": target.spec.name,
        "source_jsonl_paths": [str(conversations)],
        "chat_template": chat_format.name if chat_format else "the tokenizer's own",
        "max_length": data.max_length,
        "min_loss_tokens": data.min_loss_tokens,
        "project_name": "nemotron-dspark",
        "exp_name": None,
        "git_sha": f"nemotron-dspark {__version__}",
    }
