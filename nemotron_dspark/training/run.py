"""One training run in one folder: checks that target, draft and cache fit, trains, leaves the finished draft.

The target itself is never loaded; its config, tokenizer, embedding and LM head are all that is read.
"""

import dataclasses
import hashlib
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from nemotron_dspark import __version__, files
from nemotron_dspark.cache.format import CHECKSUMS, INDEX, MANIFEST
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cache.verify import check_mask_token
from nemotron_dspark.chat.mask_token import choose_mask_token
from nemotron_dspark.config import RunConfig, TrainConfig
from nemotron_dspark.drafts.builder import build_draft_config
from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.targets.families import needs_remote_code
from nemotron_dspark.targets.locate import locate
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.weights import read_embedding_and_head
from nemotron_dspark.training.batches import Plan
from nemotron_dspark.training.loop import Watcher, train
from nemotron_dspark.training.metrics import StepMetrics

RUN_FILE = "run.json"
# These change neither the order of samples nor a number that is computed.
_FREE_KEYS = ("log_every", "checkpoint_every", "keep_checkpoints", "device", "attention")


@dataclasses.dataclass(frozen=True)
class TrainReport:
    """What a run did; `dataclasses.asdict` of it is the JSON of `nds train`."""

    run_folder: str
    draft_folder: str
    steps: int
    resumed_from: int  # step of the checkpoint this call went on from; 0 = none
    samples: int
    tokens: int
    seconds: float
    parameters: int  # trained ones
    notes: tuple[str, ...]  # what was assumed or is unusual
    final: StepMetrics | None  # None: the run was finished before


def train_run(
    target_name: str,
    cache_folder: Path,
    run_folder: Path,
    config: RunConfig,
    *,
    resume: bool = True,
    watcher: Watcher | None = None,
) -> TrainReport:
    """Train a draft for ``target_name`` on ``cache_folder`` in ``run_folder``, from where an earlier call stopped.

    Raises:
        InputError: target, cache, configuration and run folder do not fit together, or one of them is damaged; also
            when ``resume`` is False and the folder holds a run.
        CheckError: the loss became infinite or NaN.
        EnvironmentFault: no such device, or the disk is full.
    """
    run_folder = Path(run_folder)
    allowed = config.target.trust_remote_code
    folder = locate(target_name, revision=config.target.revision, weights=True, code=allowed)
    spec = TargetSpec.from_folder(folder, target_name, trust_remote_code=allowed)
    trusted = allowed and needs_remote_code(files.read_json(folder / "config.json"))
    cache = TargetCache(cache_folder)
    draft_config, notes = _draft_config(folder, spec, cache, config, trusted)
    notes = [*notes, *_check_cache(cache, spec, draft_config, target_name)]
    Plan.of(config.train, len(cache))
    device, dtype = resolve_device(config.train)
    if config.draft.confidence_head and not config.train.confidence_alpha:
        notes.append("the confidence head is not trained: train.confidence_alpha is 0.")

    settings = {
        "target": target_name,
        "cache": cache_fingerprint(Path(cache_folder)),
        "draft": {**draft_config.to_json(), "dtype": str(dtype).removeprefix("torch.")},
        "train": {k: v for k, v in config.train.model_dump(mode="json").items() if k not in (*_FREE_KEYS, "precision")},
    }
    _claim_folder(run_folder, settings, resume)
    _describe(run_folder, settings, config, notes, cache_folder)

    draft = DSparkDraft(draft_config, seed=config.train.seed)
    embeddings = read_embedding_and_head(folder, spec)
    draft.set_embeddings(embeddings.embedding, embeddings.head)
    draft = draft.to(device=device, dtype=dtype)
    draft.attention = config.train.attention
    watcher = watcher or Watcher()
    for note in notes:
        watcher.note(f"note: {note}")
    result = train(cache, draft, config.train, run_folder, watcher=watcher)
    return TrainReport(
        str(run_folder),
        str(_publish(draft, run_folder / "draft")),
        result.steps,
        result.resumed_from,
        len(cache),
        result.tokens,
        result.seconds,
        sum(parameter.numel() for parameter in draft.trainable_parameters().values()),
        tuple(notes),
        result.last,
    )


def resolve_device(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """The device and the weights' type that ``config`` means on this machine.

    Raises:
        EnvironmentFault: the device is not there.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise EnvironmentFault(
            f"The device {name!r} cannot be used: {reason}.", "Set train.device to cpu, or leave it at auto."
        ) from None
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return device, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def cache_fingerprint(folder: Path) -> str:
    """Digest of what identifies a cache's content: its checksums where it has them, else its manifest and index."""
    names = [CHECKSUMS] if (folder / CHECKSUMS).is_file() else [MANIFEST, INDEX]
    return hashlib.sha256("".join(files.sha256(folder / name) for name in names).encode()).hexdigest()[:32]


def _draft_config(
    folder: Path, spec: TargetSpec, cache: TargetCache, config: RunConfig, trusted: bool
) -> tuple[DraftConfig, tuple[str, ...]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    mask = choose_mask_token(tokenizer, spec, override=config.draft.mask_token_id)
    section = config.draft
    if section.taps is None:  # the cache was built with some; they are the only ones there are
        section = section.model_copy(update={"taps": list(cache.taps)})
    draft_config, notes = build_draft_config(spec, section, mask_token_id=mask.id, num_anchors=config.train.num_anchors)
    return draft_config, (*notes, f"mask token {mask.id}: {mask.reason} (draft.mask_token_id sets it).")


def _check_cache(cache: TargetCache, spec: TargetSpec, draft: DraftConfig, target_name: str) -> list[str]:
    """Refuse a cache that does not fit; returns notes on what is merely odd."""
    if cache.hidden_size != spec.hidden_size:
        raise InputError(
            f"The cache was made from another target: its hidden size is {cache.hidden_size}, that of {target_name} is "
            f"{spec.hidden_size}.",
            "Give the target the cache was built from, or build a cache for this one.",
        )
    if tuple(cache.taps) != draft.target_layer_ids:
        raise InputError(
            f"draft.taps asks for layers {list(draft.target_layer_ids)}, the cache holds {list(cache.taps)}.",
            "Leave draft.taps out to use the cache's, or build a cache with these taps.",
        )
    check_mask_token(cache, draft.mask_token_id)
    made_from = cache.manifest.target_name
    if made_from is not None and made_from != target_name:
        return [f"the cache names another target, {made_from}; training goes on with {target_name}."]
    return []


def _claim_folder(run_folder: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Refuse a folder that holds a run with other settings, or any run when ``resume`` is False."""
    path = run_folder / RUN_FILE
    if not path.is_file():
        # Temporary names, which a kill may leave, do not count.
        if run_folder.is_dir() and any(not path.name.startswith(".") for path in run_folder.iterdir()):
            raise InputError(f"{run_folder} holds other files and no run.", "Give an empty or a new folder to --out.")
        return
    if not resume:
        raise InputError(f"{run_folder} already holds a run.", "Give a new folder to --out, or leave out --fresh.")
    before = files.read_json(path).get("settings", {})
    different = _first_difference(before, settings)
    if different:
        key, old, new = different
        raise InputError(
            f"{run_folder} holds a run with other settings: {key} was {old!r}, now it is {new!r}.",
            f"Set {key} back to go on with that run, or give a new folder to --out.",
        )


def _first_difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> tuple | None:
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found = _first_difference(old, new, f"{prefix}{key}.")
            if found:
                return found
        elif old != new:
            return f"{prefix}{key}", old, new
    return None


def _describe(
    run_folder: Path, settings: Mapping[str, Any], config: RunConfig, notes: list[str], cache_folder: Path
) -> None:
    """The folder explains itself: what was asked, what was assumed, and what it ran with.

    ``config.yaml`` can be given to --config again.
    """
    versions = {
        "nds": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    content = {"settings": settings, "cache_folder": str(cache_folder), "notes": notes, "versions": versions}
    files.write_json(run_folder / RUN_FILE, content)
    files.write_text(run_folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _publish(draft: DSparkDraft, folder: Path) -> Path:
    """Write the finished draft under a temporary name and put it in place."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    draft.save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    files.fsync_folder(folder.parent)
    return folder
