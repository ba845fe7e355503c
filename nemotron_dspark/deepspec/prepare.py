"""The target cache of a DeepSpec run, built by our own builder: proofs first, resumable, one worker per GPU.

DeepSpec's script would run a hybrid unchecked, looks for the embedding under another name and refuses a folder that is
not empty. Here the conversations are cut into as many parts as there are GPUs on all nodes; every worker builds a cache
of its part, which resumes by itself; the first node joins them by renaming shards, in DeepSpec's format.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from nemotron_dspark.cache.build import REPORT, BuildProgress, build_cache
from nemotron_dspark.cache.checksums import read_checksums, read_sample_checksums
from nemotron_dspark.cache.format import RECORD, DeepSpecLayout, Manifest, shard_name
from nemotron_dspark.cache.layout import INDEX, MANIFEST
from nemotron_dspark.cache.writer import finish_cache
from nemotron_dspark.config.run import CacheConfig, DataConfig
from nemotron_dspark.deepspec.config_file import template_name
from nemotron_dspark.errors import InputError, NdsError
from nemotron_dspark.files import fsync_folder, read_json, write_json, write_whole
from nemotron_dspark.targets import Target, spec_from_folder
from nemotron_dspark.targets.locate import locate
from nemotron_dspark.targets.proofs import prove
from nemotron_dspark.targets.taps import check_taps

PARTS = ".parts"
NOTE = "prepare.json"  # what the cache is made from
_INPUTS = ("target", "taps", "mask_token_id", "chat_template", "data", "cache")

Report = Callable[[int, BuildProgress], None]  # part, how far it is


@dataclasses.dataclass(frozen=True)
class Job:
    """A preparation, the same on every node."""

    target: str
    taps: tuple[int, ...]
    mask_token_id: int | None  # data that contains it is refused
    chat_template: str | None
    data: DataConfig
    cache: CacheConfig
    conversations: tuple[Path, ...]
    out: Path
    parts: int  # workers on all nodes together
    names: Mapping[str, str]  # project_name and exp_name, for the manifest

    @staticmethod
    def of(cfg: Mapping[str, Any], conversations: Sequence[Path], out: Path, parts: int, **options: int) -> "Job":
        """What the config asks for; ``options`` are ``min_loss_tokens`` and ``shard_bytes``."""
        model, data = cfg["model"], cfg["data"]
        return Job(
            target=str(model["target_model_name_or_path"]),
            taps=tuple(int(tap) for tap in model["target_layer_ids"]),
            mask_token_id=model.get("mask_token_id"),
            chat_template=data.get("chat_template"),
            data=DataConfig(max_length=int(data["max_length"]), min_loss_tokens=options["min_loss_tokens"]),
            cache=CacheConfig(shard_bytes=options["shard_bytes"]),
            conversations=tuple(Path(path).absolute() for path in conversations),
            out=out.absolute(),
            parts=parts,
            names={key: str(cfg[key]) for key in ("project_name", "exp_name") if cfg.get(key) is not None},
        )

    def folder(self, part: int) -> Path:
        return self.out / PARTS / f"{part:05d}-of-{self.parts:05d}"

    def slice(self, part: int) -> Path:
        return self.folder(part).with_suffix(".jsonl")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A finished target cache of a DeepSpec run."""

    folder: Path
    samples: int
    shards: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"folder": str(self.folder)}


def begin(job: Job) -> bool:
    """Claim ``job.out`` for this job; True when its cache is there already.

    Raises:
        InputError: data is missing or too little, the target has no such taps or another chat template, or ``out``
            holds something else or a preparation of other inputs.
    """
    for path in job.conversations:
        if not path.is_file():
            raise InputError(f"{path} does not exist.", "Check the path given to --data.")
    inputs = {
        **{key: str(value) for key, value in vars(job).items() if key in _INPUTS},
        "conversations": [[str(path), path.stat().st_size] for path in job.conversations],
        "parts": job.parts,
    }
    note = job.out / NOTE
    if note.is_file():
        known = read_json(note)
        changed = [key for key in inputs if known.get(key) != inputs[key]]
        finished = (job.out / MANIFEST).is_file()
        if changed and not (finished and changed == ["parts"]):  # a finished cache does not show who made it
            raise InputError(
                f"{job.out} was begun with other inputs: {', '.join(changed)} changed.",
                "Choose another folder for --out, or delete this one; `parts` is the number of GPUs of all nodes.",
            )
        return finished and not (job.out / PARTS).exists()
    if job.out.is_dir() and any(not path.name.startswith(".") for path in job.out.iterdir()):
        raise InputError(f"{job.out} holds other files.", "Choose another folder for --out.")
    folder = locate(job.target, weights=True)
    check_taps(spec_from_folder(folder, job.target), job.taps)
    check_template(job, AutoTokenizer.from_pretrained(folder))
    if (total := sum(map(_lines, job.conversations))) < job.parts:
        raise InputError(
            f"There are {total} conversations for {job.parts} workers.", "Use fewer GPUs (CUDA_VISIBLE_DEVICES)."
        )
    write_json(note, inputs)
    return False


def check_template(job: Job, tokenizer: Any) -> None:
    """`InputError` when the config names another chat template than the target's tokenizer has."""
    name = template_name(tokenizer)
    if job.chat_template is not None and job.chat_template != name:
        raise InputError(
            f"The config says the chat template {job.chat_template!r}, the tokenizer of {job.target} has {name!r}.",
            f"Use --opts data.chat_template={name!r}.",
        )


def build_part(job: Job, part: int, device: str, report: Report) -> None:
    """Build the cache of one part, or finish it; the target is proven before.

    Raises:
        InputError: data, template or folder cannot be used.
        CheckError: a proof failed.
    """
    if (job.folder(part) / MANIFEST).is_file() or (job.out / MANIFEST).is_file():
        return
    _cut(job, part)
    target = Target.load(job.target, device=device)
    prove(target, job.taps)
    build_cache(
        target,
        job.slice(part),
        job.folder(part),
        taps=job.taps,
        data=job.data,
        cache=job.cache,
        mask_token_id=job.mask_token_id,
        on_progress=lambda progress: report(part, progress),
    )


def missing_parts(job: Job) -> list[int]:
    """Parts that no worker has finished yet."""
    if (job.out / MANIFEST).is_file():
        return []
    return [part for part in range(job.parts) if not (job.folder(part) / MANIFEST).is_file()]


def wait_for_parts(job: Job, tell: Callable[[list[int]], None], seconds: float = 10.0) -> None:
    """Return when the other nodes have finished their parts, on a folder that all share."""
    while missing := missing_parts(job):
        tell(missing)
        time.sleep(seconds)


def join(job: Job) -> Manifest:
    """Make one cache of the finished parts. May be killed and called again at any point."""
    if (job.out / MANIFEST).is_file():
        shutil.rmtree(job.out / PARTS, ignore_errors=True)
        return Manifest.read(job.out)
    parts = [Manifest.read(job.folder(part)) for part in range(job.parts)]
    indices, checksums, sizes, digests, shards, samples = [], [], [], {}, 0, 0
    for part, manifest in enumerate(parts):
        folder = job.folder(part)
        index = np.fromfile(folder / INDEX, dtype=RECORD)
        index["sample_id"] += np.uint64(samples)
        index["shard_id"] += np.uint32(shards)
        indices.append(index)
        checksums.append(read_sample_checksums(folder, manifest.num_samples))
        known = read_checksums(folder)
        for name in manifest.shard_files:
            final = job.out / shard_name(shards)
            if (folder / name).is_file():  # else an earlier call has moved it
                (folder / name).rename(final)
            sizes.append(final.stat().st_size)
            digests[final.name] = known[name]
            shards += 1
        samples += manifest.num_samples
    fsync_folder(job.out)
    write_json(job.out / REPORT, _report(job))
    extra = {**parts[0].extra, "source_jsonl_paths": [str(path) for path in job.conversations], **job.names}
    whole = Manifest(samples, job.taps, parts[0].hidden_size, tuple(map(shard_name, range(shards))), extra)
    layout = DeepSpecLayout(np.concatenate(indices), whole, sizes)
    finish_cache(job.out, layout, np.concatenate(checksums), digests, [REPORT])
    shutil.rmtree(job.out / PARTS, ignore_errors=True)
    return whole


def run_workers(job: Job, first: int, devices: Sequence[str], report: Report) -> None:
    """Build the parts from ``first``, one per device, each in its own process; an error in one is raised here."""
    if len(devices) == 1:
        build_part(job, first, devices[0], report)
        return
    from torch import multiprocessing
    from torch.multiprocessing.spawn import ProcessException

    faults = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        multiprocessing.spawn(_worker, args=(job, first, list(devices), faults, report), nprocs=len(devices))
    except ProcessException:
        if faults.empty():
            raise
        kind, what, do = faults.get()
        raise kind(what, do) from None


def _worker(rank: int, job: Job, first: int, devices: list[str], faults: Any, report: Report) -> None:
    try:
        build_part(job, first + rank, devices[rank], report)
    except NdsError as error:
        faults.put((type(error), error.what, error.do))
        raise SystemExit(error.exit_code) from None


def _cut(job: Job, part: int) -> None:
    """Write this part's lines: as even a share as possible, in the order of the files."""
    path = job.slice(part)
    if path.is_file():
        return
    total = sum(map(_lines, job.conversations))
    first, stop = part * total // job.parts, (part + 1) * total // job.parts

    def write(file: Any) -> None:
        number = 0
        for source in job.conversations:
            with open(source, "rb") as lines:
                for line in lines:
                    if first <= number < stop:
                        file.write(line if line.endswith(b"\n") else line + b"\n")
                    number += 1

    write_whole(path, write)


def _lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _report(job: Job) -> dict[str, Any]:
    """`build.json` of the whole: what `nds cache info` reads."""
    results = [read_json(job.folder(part) / REPORT)["result"] for part in range(job.parts)]
    sums = {key: sum(result[key] for result in results) for key in ("samples", "tokens", "loss_tokens", "cut")}
    return {"inputs": {"parts": job.parts}, "result": sums}
