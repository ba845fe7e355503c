"""The target cache of a DeepSpec run: `stages.build_cache` with the values of a DeepSpec config, on several machines.

DeepSpec's script would run a hybrid unchecked, looks for the embedding under another name and refuses a folder that is
not empty. Here every machine builds, on all its GPUs, the cache of an even part of the conversations, which resumes by
itself; the first machine joins the parts by renaming their shards, in DeepSpec's format.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nemotron_dspark import stages
from nemotron_dspark.cache.build import REPORT, BuildProgress
from nemotron_dspark.cache.checksums import read_checksums, read_sample_checksums
from nemotron_dspark.cache.deepspec_layout import RECORD, DeepSpecLayout, Manifest, shard_name
from nemotron_dspark.cache.layout import INDEX, MANIFEST
from nemotron_dspark.cache.writer import finish_cache
from nemotron_dspark.config.run import CacheConfig, DataConfig, DraftSection, RunConfig, TargetConfig
from nemotron_dspark.deepspec.config_file import template_name
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import fsync_folder, read_json, write_json, write_whole
from nemotron_dspark.folders import check_claim
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.taps import check_taps

PARTS = ".parts"
NOTE = "prepare.json"  # what the cache is made from


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What a cache is to be made from, the same on every machine."""

    config: RunConfig  # target, taps, mask token, data and cache
    chat_template: str | None
    conversations: tuple[Path, ...]
    out: Path
    parts: int  # machines
    names: Mapping[str, str]  # project_name and exp_name, for the manifest

    @staticmethod
    def of(
        cfg: Mapping[str, Any],
        conversations: Sequence[Path],
        out: Path,
        parts: int,
        *,
        min_loss_tokens: int,
        shard_bytes: int,
        device: str = "auto",
    ) -> "Preparation":
        """What the DeepSpec config ``cfg`` asks for."""
        model, data = cfg["model"], cfg["data"]
        taps = [int(tap) for tap in model["target_layer_ids"]]
        config = RunConfig(
            target=TargetConfig(name=str(model["target_model_name_or_path"]), device=device),
            draft=DraftSection(taps=taps, mask_token_id=model.get("mask_token_id")),
            data=DataConfig(max_length=int(data["max_length"]), min_loss_tokens=min_loss_tokens),
            cache=CacheConfig(shard_bytes=shard_bytes),
        )
        names = {key: str(cfg[key]) for key in ("project_name", "exp_name") if cfg.get(key) is not None}
        paths = tuple(Path(path).absolute() for path in conversations)
        return Preparation(config, data.get("chat_template"), paths, out.absolute(), parts, names)

    @property
    def taps(self) -> tuple[int, ...]:
        return tuple(int(tap) for tap in self.config.draft.taps or ())

    def folder(self, part: int) -> Path:
        return self.out / PARTS / f"{part:05d}-of-{self.parts:05d}"

    def inputs(self) -> dict[str, Any]:
        """What the cache's bytes depend on."""
        return {
            "target": self.config.target.name,
            "taps": self.config.draft.taps,
            "mask_token_id": self.config.draft.mask_token_id,
            "chat_template": self.chat_template,
            "data": self.config.data.model_dump(),
            "cache": self.config.cache.model_dump(),
            "conversations": [[str(path), path.stat().st_size] for path in self.conversations],
            "parts": self.parts,
        }


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A finished target cache of a DeepSpec run."""

    folder: Path
    samples: int
    shards: int


def begin(job: Preparation) -> bool:
    """Take ``job.out`` for this preparation; True when its cache is there already.

    Raises:
        InputError: data is missing or too little, the target has no such taps or another chat template, or ``out``
            holds something else or a preparation of other inputs.
    """
    for path in job.conversations:
        if not path.is_file():
            raise InputError(f"{path} does not exist.", "Check the path given to --data.")
    inputs, note = job.inputs(), job.out / NOTE
    begun, finished = read_json(note) if note.is_file() else None, (job.out / MANIFEST).is_file()
    if finished and begun is not None:
        begun["parts"] = job.parts  # a finished cache does not show how many machines made it
    check_claim(job.out, "a cache", begun, inputs)
    if begun is not None:
        return finished and not (job.out / PARTS).exists()
    checkpoint = Checkpoint.of(job.config.target, weights=True)
    check_taps(checkpoint.read_spec(), job.taps)
    name = template_name(checkpoint.load_tokenizer())
    if job.chat_template is not None and job.chat_template != name:
        raise InputError(
            f"The config says the chat template {job.chat_template!r}, the target's tokenizer has {name!r}.",
            f"Use --opts data.chat_template={name!r}.",
        )
    if (total := sum(map(_lines, job.conversations))) < job.parts:
        raise InputError(f"There are {total} conversations for {job.parts} machines.", "Use fewer machines.")
    write_json(note, inputs)
    return False


def build_part(job: Preparation, part: int, on_progress: Callable[[BuildProgress], None] | None = None) -> None:
    """Build the cache of one part on all GPUs of this machine, or finish it; errors as `stages.build_cache`."""
    folder = job.folder(part)
    if (folder / MANIFEST).is_file() or (job.out / MANIFEST).is_file():
        return
    masked = job.config.draft.mask_token_id is not None  # EAGLE-3 has no mask token
    stages.build_cache(job.config, _part_of_lines(job, part), folder, masked=masked, on_progress=on_progress)


def missing_parts(job: Preparation) -> list[int]:
    """Parts that no machine has finished yet."""
    if (job.out / MANIFEST).is_file():
        return []
    return [part for part in range(job.parts) if not (job.folder(part) / MANIFEST).is_file()]


def wait_for_parts(job: Preparation, tell: Callable[[list[int]], None], seconds: float = 10.0) -> None:
    """Return when the other machines have finished their parts, on a folder that all share."""
    while missing := missing_parts(job):
        tell(missing)
        time.sleep(seconds)


def join(job: Preparation) -> Prepared:
    """Make one cache of the finished parts. May be killed and called again at any point."""
    if (job.out / MANIFEST).is_file():
        shutil.rmtree(job.out / PARTS, ignore_errors=True)
        whole = Manifest.read(job.out)
        return Prepared(job.out, whole.num_samples, len(whole.shard_files))
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
    layout = DeepSpecLayout(
        np.concatenate(indices),
        tuple(map(shard_name, range(shards))),
        sizes,
        taps=job.taps,
        hidden_size=parts[0].hidden_size,
        extra=extra,
    )
    finish_cache(job.out, layout, np.concatenate(checksums), digests, [REPORT])
    shutil.rmtree(job.out / PARTS, ignore_errors=True)
    return Prepared(job.out, samples, shards)


def _part_of_lines(job: Preparation, part: int) -> Path:
    """A file with this part's lines: as even a share as possible, in the order of the files."""
    path = job.folder(part).with_suffix(".jsonl")
    if path.is_file():
        return path
    total = sum(map(_lines, job.conversations))
    first, stop = part * total // job.parts, (part + 1) * total // job.parts

    def write(file: BinaryIO) -> None:
        number = 0
        for source in job.conversations:
            with open(source, "rb") as lines:
                for line in lines:
                    if first <= number < stop:
                        file.write(line if line.endswith(b"\n") else line + b"\n")
                    number += 1

    write_whole(path, write)
    return path


def _lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _report(job: Preparation) -> dict[str, Any]:
    """`build.json` of the whole: what `nds cache info` reads."""
    results = [read_json(job.folder(part) / REPORT)["result"] for part in range(job.parts)]
    sums = {key: sum(result[key] for result in results) for key in ("samples", "tokens", "loss_tokens", "cut")}
    return {"inputs": {"parts": job.parts}, "result": sums}
