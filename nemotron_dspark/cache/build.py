"""Conversations in, target cache out, in two passes: tokenise everything, then run the target over it.

The first gives the samples' lengths, and everything but the hidden states follows from those: which samples share a
forward, where every byte lies, and how many there will be. So the disk is checked before the target is loaded, and a
build that was killed anywhere goes on with the samples it has not written, with any number of processes and machines,
and ends in the same bytes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from nemotron_dspark._version import __version__
from nemotron_dspark.cache.capture import BuildProgress, LoadTarget, TargetFacts, capture_all
from nemotron_dspark.cache.compact import QUANTISATION
from nemotron_dspark.cache.layout import MANIFEST, WORK, Layout
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cache.writer import CacheWriter
from nemotron_dspark.chat.format import recognise
from nemotron_dspark.config.run import CacheConfig, DataConfig, TargetConfig
from nemotron_dspark.data.tokens import Tally, read_report, tokenise
from nemotron_dspark.distributed import SINGLE, DistContext
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json, sha256
from nemotron_dspark.folders import check_claim, locked
from nemotron_dspark.targets import Target
from nemotron_dspark.targets.streamed import load_for_capture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPORT = "build.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildReport(Tally):
    """A finished cache, and what came out of the conversations."""

    folder: Path
    bytes: int
    shards: int
    notes: tuple[str, ...]
    reused_samples: int  # written by an earlier, interrupted build
    seconds: float


def build_cache(
    target: TargetFacts | Target,
    conversations_file: Path | str,
    out_folder: Path | str,
    *,
    taps: tuple[int, ...],
    data: DataConfig | None = None,
    cache: CacheConfig | None = None,
    mask_token_id: int | None = None,
    load: LoadTarget | None = None,
    helpers: Sequence[LoadTarget] = (),
    on_progress: Callable[[BuildProgress], None] = lambda progress: None,
    context: DistContext = SINGLE,
    on_prepared: Callable[[], None] = lambda: None,
) -> BuildReport:
    """Write the cache of ``conversations_file`` under ``target`` to ``out_folder``, or finish one that was interrupted.

    A finished cache of the same inputs is left as it is. ``target`` is loaded already, or by ``load``, which is called
    when all samples are tokenised and their hidden states fit on the disk. Each of ``helpers`` loads the same target in
    a process of its own, to compute a share. Processes are started for them, and to tokenise large files: a script must
    not build when it is merely imported. With ``mask_token_id``, data that contains it is refused.

    Every rank of ``context`` computes its part of the samples. The others call this when rank 0 has called
    ``on_prepared``: then all is in the folder that they need.

    Raises:
        InputError: unusable data, or a folder that holds something else or was built from other inputs.
        EnvironmentFault: not enough free space, known before the target runs; the disk is full, or a process died.
        CheckError: the target's hidden states are not finite.
    """
    started = time.monotonic()
    data, cache = data or DataConfig(), cache or CacheConfig()
    conversations, folder = Path(conversations_file), Path(out_folder)
    work, spec = folder / WORK, target.spec
    inputs = inputs_of(target.folder, target.tokenizer, spec.name, str(target.dtype), conversations, taps, data)
    compact = {"format": cache.format, "quantisation": QUANTISATION} if cache.format == "compact" else {}
    inputs["cache"] = {"shard_bytes": cache.shard_bytes, "batch_tokens": cache.batch_tokens} | compact
    known = read_json(folder / REPORT) if (folder / REPORT).is_file() else None
    check_claim(folder, "a cache", known and known.get("inputs", {}), inputs)
    # The manifest is written last: a folder that has one is whole.
    if (folder / MANIFEST).is_file():
        if context.is_main:
            shutil.rmtree(work, ignore_errors=True)  # killed between the manifest and this
        return _finished(folder, TargetCache(folder).layout, started)
    with locked(work) if context.is_main else contextlib.nullcontext():
        tokens = tokenise(
            work,
            folder / REPORT,
            conversations,
            target.tokenizer,
            data,
            max_positions=spec.max_position_embeddings,
            mask_token_id=mask_token_id,
            inputs=inputs,
            on_lines=lambda lines: on_progress(BuildProgress("tokenise", lines, 0, 0, 0)),
        )
        with CacheWriter.of(
            folder,
            cache,
            tokens.lengths,
            tokens.predicting,
            taps=taps,
            hidden_size=spec.hidden_size,
            extra=_manifest_extra(target, conversations, data),
            context=context,
        ) as writer:
            on_prepared()
            context.barrier()  # all go by the same journal, to which nothing is added before
            load = load or (lambda: cast(Target, target))  # as promised: it is loaded
            remarks = capture_all(load, tokens, writer, cache.batch_tokens, on_progress, helpers=helpers)
            # Rank 0 closes the cache when no other rank writes any more, and the others stay until it has.
            context.wait(meanwhile=lambda: on_progress(BuildProgress.of(writer)))
            if context.is_main:
                writer.gather()
                writer.finish(extra_files=[REPORT])
            context.wait()
    return _finished(folder, writer.layout, started, writer.reused, remarks)


def helper_loads(config: TargetConfig, device: torch.device, processes: int | None) -> list[LoadTarget]:
    """How the helpers of this process, which has the target on ``device``, load theirs.

    ``processes``, this one included, defaults to every CUDA device when ``config`` names none, and to one elsewhere.

    Raises:
        InputError: there are not so many devices.
    """
    devices = [config.device]
    if device.type == "cpu":
        devices *= processes or 1
    elif device.type == "cuda" and config.device in ("auto", "cuda"):
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    wanted = processes or len(devices)
    if wanted > len(devices):
        raise InputError(
            f"{wanted} processes are asked for, and {len(devices)} device{'s' * (len(devices) != 1)} can be used.",
            "Give --processes no more than there are GPUs, and leave target.device at auto.",
        )
    return [functools.partial(_load, config.model_copy(update={"device": device})) for device in devices[1:wanted]]


def _load(config: TargetConfig) -> Target:
    if config.device.startswith("cuda"):
        torch.cuda.set_device(config.device)  # kernels are started on the current device
    return load_for_capture(config)


def _finished(
    folder: Path, layout: Layout, started: float, reused: int | None = None, remarks: tuple[str, ...] = ()
) -> BuildReport:
    tally, notes = read_report(folder / REPORT)
    return BuildReport(
        **vars(tally),
        folder=folder,
        bytes=sum(layout.shard_sizes),
        shards=len(layout.shard_files),
        notes=(*notes, *remarks),
        reused_samples=tally.samples if reused is None else reused,
        seconds=time.monotonic() - started,
    )


def dtype_of(folder: Path) -> str | None:
    """The target's type in which the cache in ``folder`` was begun; None where there is none."""
    known = read_json(folder / REPORT) if (folder / REPORT).is_file() else {}
    return known.get("inputs", {}).get("dtype")


def inputs_of(
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    name: str,
    dtype: str,
    conversations: Path,
    taps: Sequence[int],
    data: DataConfig,
) -> dict[str, Any]:
    """What the hidden states depend on, as it can be told from outside; ``folder`` is the target's.

    Raises:
        InputError: there is no file ``conversations``.
    """
    if not conversations.is_file():
        raise InputError(f"{conversations} does not exist.", "Check the path of the data file.")
    return {
        "conversations": sha256(conversations),
        "target": weights_identity(folder),
        "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "target_name": name,
        "dtype": dtype,
        "taps": list(taps),
        "data": data.model_dump(),
    }


def weights_identity(folder: Path) -> str:
    """Digest of config, tokenizer, and size, head and tail of every weight file (reading them whole takes minutes)."""
    digest = hashlib.sha256()
    files = (folder / "config.json", folder / "tokenizer.json", *folder.glob("*.safetensors"))
    for path in sorted(filter(Path.is_file, files)):
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def _manifest_extra(target: TargetFacts | Target, conversations: Path, data: DataConfig) -> dict[str, Any]:
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
