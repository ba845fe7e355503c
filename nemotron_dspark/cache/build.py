"""Conversations in, target cache out: tokenise, lay out, run the target, write; all of it at the same time.

Everything but the hidden states follows from the tokenised lengths: which samples share a forward, and where every byte
lies. So whoever computes a batch writes it to its final place, and a build that was killed anywhere goes on with the
samples it has not written, with any number of processes, and ends in the same bytes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemotron_dspark._version import __version__
from nemotron_dspark.cache.capture import CapturesStates
from nemotron_dspark.cache.compact import QUANTISATION
from nemotron_dspark.cache.formats import new_layout
from nemotron_dspark.cache.layout import MANIFEST, WORK, Layout
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cache.tokens import (
    GrowingTokens,
    Stored,
    Tokens,
    TokenStore,
    check_no_mask_token,
    read_report,
    tokenise,
)
from nemotron_dspark.cache.work import LayOut, LoadTarget, Work, share
from nemotron_dspark.cache.writer import CacheWriter
from nemotron_dspark.chat.format import recognise
from nemotron_dspark.config.run import CacheConfig, DataConfig, TargetConfig
from nemotron_dspark.data.conversations import SkipTally
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.files import read_json, sha256, write_json
from nemotron_dspark.targets import Target

REPORT = "build.json"
_SPARE_BYTES = 16 * 1024**2  # index, checksums and the file system's own needs
_ESTIMATE = 0.9  # of a size that is estimated from the first conversations: one that is short of less may begin


@dataclasses.dataclass(frozen=True)
class BuildProgress:
    """How far a build is; ``stage`` is "tokenise" (samples = lines read) or "capture". Totals are 0 until known."""

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
    helpers: Sequence[LoadTarget] = (),
    progress: Callable[[BuildProgress], None] | None = None,
) -> BuildReport:
    """Write the cache of ``conversations_file`` under ``target`` to ``out_folder``, or finish one that was interrupted.

    A finished cache of the same inputs is left as it is. With ``mask_token_id``, data that contains it is refused. Each
    of ``helpers`` loads the same target in a process of its own, to compute a share of it. Processes are started for
    them, and to tokenise large files: a script must not build when it is merely imported.

    Raises:
        InputError: unusable data, or a folder that holds something else or was built from other inputs.
        EnvironmentFault: not enough free space (estimated before the target runs, known when tokenising ends), the disk
            is full, or a process died.
        CheckError: the target's hidden states are not finite.
    """
    started = time.monotonic()
    data, cache = data or DataConfig(), cache or CacheConfig()
    conversations, folder = Path(conversations_file), Path(out_folder)
    report = _one_at_a_time(progress or (lambda _: None))
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
    lay_out = functools.partial(
        _lay_out, cache, tuple(taps), target.spec.hidden_size, _manifest_extra(target, conversations, data)
    )
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(CacheWriter(folder))
        if _tokenised(folder):
            tokens: Tokens = TokenStore(work)
            check_no_mask_token(tokens.all_ids(), mask_token_id, folder)
        else:
            write_json(folder / REPORT, {"inputs": inputs})

            def fill(grown: Callable[[Stored], None]) -> None:
                def tell(stored: Stored) -> None:
                    grown(stored)
                    report(BuildProgress("tokenise", stored.lines, 0, 0, 0))

                tokenise(
                    work,
                    folder / REPORT,
                    conversations,
                    target.tokenizer,
                    data,
                    max_positions=target.spec.max_position_embeddings,
                    mask_token_id=mask_token_id,
                    inputs=inputs,
                    processes=1 + len(helpers),
                    progress=tell,
                )

            tokens = stack.enter_context(GrowingTokens(work, fill))
        write_states(target, tokens, writer, cache.batch_tokens, report, taps=taps, lay_out=lay_out, helpers=helpers)
        writer.finish(extra_files=[REPORT])
    return _finished(folder, started, writer.reused)


def write_states(
    target: CapturesStates,
    tokens: Tokens,
    writer: CacheWriter,
    batch_tokens: int,
    report: Callable[[BuildProgress], None],
    *,
    taps: Sequence[int] | None = None,
    lay_out: LayOut | None = None,
    helpers: Sequence[LoadTarget] = (),
) -> None:
    """Run the target over the samples of ``tokens`` that ``writer`` does not have yet.

    ``lay_out`` is for a writer whose layout is to be extended as samples become known; else it reaches all of them.
    """

    def tell() -> None:
        written = writer.written
        lengths = tokens.lengths[: len(written)]
        totals = (len(tokens), int(tokens.lengths.sum())) if tokens.complete else (0, 0)
        report(BuildProgress("capture", int(written.sum()), totals[0], int(lengths[written].sum()), totals[1]))

    work = Work(tokens, writer, batch_tokens, lay_out, _check_room)
    taps = tuple(writer.layout.taps if taps is None else taps)
    share(work, target, taps, tokens, writer, tell, lay_out=lay_out, helpers=helpers)


def helping_targets(config: TargetConfig, device: torch.device, processes: int | None) -> list[LoadTarget]:
    """How the processes beside this one, which has the target on ``device``, load theirs.

    ``processes`` None takes every CUDA device when ``config`` names none, and this process alone elsewhere. Several on
    a CPU share the threads that torch has here.

    Raises:
        InputError: there are not so many devices.
    """
    if device.type == "cuda":
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        if config.device not in ("auto", "cuda"):
            devices = [config.device]
    else:
        devices = [config.device] * (processes or 1 if device.type == "cpu" else 1)
    wanted = processes or len(devices)
    if wanted > len(devices):
        raise InputError(
            f"{wanted} processes are asked for, and {len(devices)} device{'s' * (len(devices) != 1)} can be used.",
            "Give --processes no more than there are GPUs, and leave target.device at auto.",
        )
    threads = None
    if device.type == "cpu" and wanted > 1:
        threads = max(1, torch.get_num_threads() // wanted)
        torch.set_num_threads(threads)
    return [
        functools.partial(_load, config.model_copy(update={"device": device}), threads) for device in devices[1:wanted]
    ]


def _load(config: TargetConfig, threads: int | None) -> CapturesStates:
    if threads is not None:
        torch.set_num_threads(threads)
    if config.device.startswith("cuda"):
        torch.cuda.set_device(config.device)  # kernels are started on the current device
    return Target.of(config)


def _lay_out(
    cache: CacheConfig, taps: tuple[int, ...], hidden_size: int, extra: Mapping[str, Any], tokens: Tokens, samples: int
) -> Layout:
    """The layout of the first ``samples`` of ``tokens``."""
    lengths = tokens.lengths[:samples]
    return new_layout(
        cache,
        lengths,
        lambda: tokens.targets(samples),
        taps=taps,
        hidden_size=hidden_size,
        extra=extra,
    )


def _tokenised(folder: Path) -> bool:
    return (folder / REPORT).is_file() and "result" in read_json(folder / REPORT)


def _one_at_a_time(report: Callable[[BuildProgress], None]) -> Callable[[BuildProgress], None]:
    """``report`` for several threads."""
    reporting = threading.Lock()

    def locked(progress: BuildProgress) -> None:
        with reporting:
            report(progress)

    return locked


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


def check_space(folder: Path, missing: int, how: str = "") -> None:
    """`EnvironmentFault` unless ``missing`` bytes more fit on the disk; ``how`` it is known."""
    free = shutil.disk_usage(folder).free
    if free < missing + _SPARE_BYTES:
        raise EnvironmentFault(
            f"The cache needs {how}{missing / 1e9:.2f} GB more and {folder} has {free / 1e9:.2f} GB free.",
            "Free some space, and the same command goes on; or choose another disk, a compact cache "
            "(--cache-format compact), fewer conversations or taps, or none (`nds train --data`): see `nds plan`.",
        )


def _check_room(tokens: Tokens, writer: CacheWriter) -> None:
    """`check_space` for what is known to come, and for all that seems to come when the rest is like what was read."""
    check_space(writer.folder, writer.missing_bytes)
    if not tokens.complete:
        laid_out = tokens.lengths[: len(writer.written)].sum() / tokens.lengths.sum()
        whole = sum(writer.layout.shard_sizes) / laid_out / tokens.read
        shards = (path for path in (*writer.folder.glob("shard-*"), *writer.work.glob("shard-*")))
        there = sum(512 * path.stat().st_blocks for path in shards)
        check_space(writer.folder, int(_ESTIMATE * (whole - there)), "about ")


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
    compact = {"format": cache.format, "quantisation": QUANTISATION} if cache.format == "compact" else {}
    return {"shard_bytes": cache.shard_bytes, "batch_tokens": cache.batch_tokens} | compact


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
