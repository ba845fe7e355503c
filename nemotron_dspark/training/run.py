"""One training run in one folder: checks that target, draft and data fit, trains, leaves the finished draft.

On a finished cache the target is never loaded; its config, tokenizer, embedding and LM head are all that is read. On
conversations the target itself runs beside the draft.
"""

import contextlib
import dataclasses
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from nemotron_dspark import files
from nemotron_dspark.cache.build import inputs_of
from nemotron_dspark.cache.checksums import fingerprint
from nemotron_dspark.cache.formats import sample_sizes
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cache.tokens import read_report
from nemotron_dspark.cache.verify import check_mask_token
from nemotron_dspark.chat.mask_token import choose_mask_token
from nemotron_dspark.config import RunConfig, TrainConfig
from nemotron_dspark.drafts.config import DraftConfig, build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.targets.families import needs_remote_code
from nemotron_dspark.targets.locate import locate
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.target import resolve_device as target_device
from nemotron_dspark.targets.target import resolve_dtype
from nemotron_dspark.targets.weights import read_embedding_and_head
from nemotron_dspark.training import online, rolling
from nemotron_dspark.training import run_folder as folders
from nemotron_dspark.training.checkpoints import check_space, expected_disk
from nemotron_dspark.training.loop import Watcher, train
from nemotron_dspark.training.metrics import StepMetrics
from nemotron_dspark.training.ranks import ALONE, Ranks
from nemotron_dspark.training.sharding import shards
from nemotron_dspark.training.source import CacheSource, Source

_SUMMARIES = {
    "cached": "cached: {samples}, {states} of hidden states are read; the target is not loaded.",
    "online": "online: the target runs in the training loop; {samples}. No hidden states are written; a cache of them "
    "would take {states}.",
    "rolling": "rolling: the target runs beside the training; {samples}. Of {states} of hidden states at most {budget} "
    "are on the disk; each is made again after {reuse} epochs.",
    "whole": "rolling: the target runs beside the training; {samples}. All {states} of hidden states fit into the "
    "budget and are made once.",
}


@dataclasses.dataclass(frozen=True)
class TrainReport:
    """What a run did; `dataclasses.asdict` of it is the JSON of `nds train`."""

    run_folder: str
    draft_folder: str
    mode: str  # where hidden states came from: "cached", or what `cache.mode` says
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
    cache_folder: Path | None,
    run_folder: Path,
    config: RunConfig,
    *,
    conversations: Path | None = None,
    resume: bool = True,
    watcher: Watcher | None = None,
    ranks: Ranks = ALONE,
) -> TrainReport:
    """Train a draft for ``target_name`` in ``run_folder``, from where an earlier call stopped.

    Either on ``cache_folder``, or on the file ``conversations``, over which the target runs meanwhile as ``cache.mode``
    says. Of several ``ranks`` all call it alike; the first prepares what lies in the folder, and writes.

    Raises:
        InputError: target, cache or data, configuration and run folder do not fit together, or one of them is damaged;
            also when ``resume`` is False and the folder holds a run.
        CheckError: the loss became infinite or NaN, or the loaded target is not right.
        EnvironmentFault: no such device, the disk is full, or the ranks do not share the folder.
    """
    run_folder, watcher = Path(run_folder), watcher or Watcher()
    with ranks.in_turn():
        if not ranks.first:
            resume = True
            if not (run_folder / folders.RUN_FILE).is_file():
                raise EnvironmentFault(
                    f"Process {ranks.rank} on {platform.node()} does not see what the first one wrote to {run_folder}.",
                    "Give --out on a disk that all machines share.",
                )
        run = _prepare(target_name, cache_folder, run_folder, config, conversations, resume, watcher, ranks)
        if ranks.first:
            check_space(run_folder, run.draft, config.train.keep_checkpoints)
    for note in run.notes:
        watcher.note(f"note: {note}")
    watcher.note(_summary(run.mode, run.source, run.states, run.draft, config, run_folder))
    if ranks.size > 1:
        watcher.note(f"{ranks.size} processes, train.parallel={config.train.parallel}.")
    embedding, head = run.draft.embed_tokens.weight, run.draft.lm_head.weight
    with contextlib.closing(run.source):
        result = train(run.source, run.draft, config.train, run_folder, watcher=watcher, ranks=ranks)
    draft_folder = run_folder / "draft"
    if ranks.first:
        folders.publish(result.checkpoint, embedding, head, draft_folder)
    return TrainReport(
        str(run_folder),
        str(draft_folder),
        run.mode,
        result.steps,
        result.resumed_from,
        len(run.source.lengths),
        result.tokens,
        result.seconds,
        sum(parameter.numel() for parameter in run.draft.trainable_parameters().values()),
        tuple(run.notes),
        result.last,
    )


@dataclasses.dataclass(frozen=True)
class _Run:
    mode: str
    source: Source
    states: int  # bytes of all hidden states
    draft: DSparkDraft
    notes: list[str]


def _prepare(
    target_name: str,
    cache_folder: Path | None,
    run_folder: Path,
    config: RunConfig,
    conversations: Path | None,
    resume: bool,
    watcher: Watcher,
    ranks: Ranks,
) -> _Run:
    """Check that everything fits, take the folder, tokenise, and make the draft that is to be trained."""
    allowed = config.target.trust_remote_code
    folder = locate(target_name, revision=config.target.revision, weights=True, code=allowed)
    spec = TargetSpec.from_folder(folder, target_name, trust_remote_code=allowed)
    trusted = allowed and needs_remote_code(files.read_json(folder / "config.json"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    cache = TargetCache(cache_folder) if conversations is None else None
    draft_config, notes = _draft_config(tokenizer, spec, cache, config)
    device, dtype = resolve_device(config.train, ranks)
    settings = {
        "target": target_name,
        "mode": "cached" if cache is not None else config.cache.mode,
        "draft": {**draft_config.to_json(), "dtype": str(dtype).removeprefix("torch.")},
        "train": config.train.model_dump(mode="json", exclude={*folders.FREE_KEYS, "precision"}),
    }
    if cache is not None:
        notes += _check_cache(cache, spec, draft_config, target_name)
        if ranks.first:
            check_mask_token(cache, draft_config.mask_token_id)
        settings["cache"] = fingerprint(cache.folder)
        source: Source = CacheSource(cache)
        source.plan(config.train, ranks)  # refuses what does not fit before the folder is touched
        folders.claim(run_folder, settings, resume)
        states = sum(cache.layout.shard_sizes)
    else:
        wanted = config.target.model_copy(update={"name": target_name})
        settings["source"] = inputs_of(
            folder,
            tokenizer,
            target_name,
            resolve_dtype(wanted.dtype, target_device(wanted.device)),
            conversations,
            draft_config.target_layer_ids,
            config.data,
        )
        if config.cache.mode == "rolling":
            settings["source"]["cache"] = config.cache.model_dump(exclude={"mode"})
        folders.claim(run_folder, settings, resume)
        store = online.tokenised(
            run_folder,
            conversations,
            tokenizer,
            config.data,
            max_positions=spec.max_position_embeddings,
            mask_token_id=draft_config.mask_token_id,
            inputs=settings["source"],
            progress=lambda lines: watcher.working(f"tokenising, line {lines:,}"),
        )
        notes += _notes_on_data(run_folder)
        taps = draft_config.target_layer_ids
        sizes = sample_sizes(
            config.cache,
            store.lengths,
            lambda: store.targets(len(store)),
            num_taps=len(taps),
            hidden_size=spec.hidden_size,
        )
        states = int(sizes.sum())
        if config.cache.mode == "online":
            source = online.OnlineSource(store, wanted, taps, watcher.working)
        else:
            source = rolling.RollingSource(
                run_folder / rolling.FOLDER,
                store,
                wanted,
                spec,
                taps,
                config.cache,
                note=watcher.note,
                working=watcher.working,
            )
        source.plan(config.train, ranks)
    if config.draft.confidence_head and not config.train.confidence_alpha:
        notes.append("the confidence head is not trained: train.confidence_alpha is 0.")
    if ranks.first:
        folders.describe(run_folder, settings, config, notes, cache_folder if cache is not None else conversations)

    draft = DSparkDraft(
        draft_config,
        seed=config.train.seed,
        attention=config.train.attention,
        recompute_layers=config.train.activation_checkpointing,
    )
    embeddings = read_embedding_and_head(folder, spec)
    draft.set_embeddings(embeddings.embedding, embeddings.head)
    draft = draft.to(dtype)
    for part in (draft.embed_tokens, draft.lm_head) if shards(config.train, ranks) else (draft,):
        part.to(device)  # of the others only a part goes there, once they are sharded
    return _Run(settings["mode"], source, states, draft, notes)


def resolve_device(config: TrainConfig, ranks: Ranks = ALONE) -> tuple[torch.device, torch.dtype]:
    """The device and the weights' type that ``config`` means on this machine.

    Raises:
        InputError: one GPU for several processes.
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
    if ranks.size > 1 and device.type == "cuda":
        if device.index is not None:
            raise InputError(
                f"train.device={name} is one GPU, and there are {ranks.size} processes.", "Leave train.device at auto."
            )
        if ranks.local >= torch.cuda.device_count():
            raise EnvironmentFault(
                f"{platform.node()} has {torch.cuda.device_count()} GPUs, too few for its processes.",
                f"Start torchrun with --nproc-per-node {torch.cuda.device_count()}.",
            )
        device = torch.device("cuda", ranks.local)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return device, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def _draft_config(
    tokenizer: Any, spec: TargetSpec, cache: TargetCache | None, config: RunConfig
) -> tuple[DraftConfig, list[str]]:
    mask = choose_mask_token(tokenizer, spec, override=config.draft.mask_token_id)
    section = config.draft
    if section.taps is None and cache is not None:  # it was built with some; they are the only ones there are
        section = section.model_copy(update={"taps": list(cache.taps)})
    draft_config, notes = build_draft_config(spec, section, mask_token_id=mask.id, num_anchors=config.train.num_anchors)
    return draft_config, [*notes, f"mask token {mask.id}: {mask.reason} (draft.mask_token_id sets it)."]


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
    made_from = cache.target_name
    if made_from is not None and made_from != target_name:
        return [f"the cache names another target, {made_from}; training goes on with {target_name}."]
    return []


def _notes_on_data(run_folder: Path) -> list[str]:
    tally, notes = read_report(run_folder / online.FOLDER / online.REPORT)
    cut = [f"{tally.cut} samples were cut off at the maximal length."] if tally.cut else []
    return [*notes, *cut, *tally.skipped.sentences()]


def _summary(mode: str, source: Source, states: int, draft: DSparkDraft, config: RunConfig, run_folder: Path) -> str:
    """What is about to run, and what it will take on the disk; ``states`` is the size of all hidden states."""
    tokens = int(source.lengths.sum())
    budget = min(states, int(config.cache.budget_gb * 1e9))
    disk = expected_disk(draft, config.train.keep_checkpoints + 1)
    disk += {"cached": 0, "online": 5 * tokens, "rolling": 5 * tokens + budget}[mode]
    whole = mode == "rolling" and states <= budget
    text = _SUMMARIES["whole" if whole else mode].format(
        samples=f"{len(source.lengths):,} samples, {tokens:,} tokens",
        states=files.size_text(states),
        budget=files.size_text(budget),
        reuse=config.cache.reuse,
    )
    return f"{text} Expected in {run_folder}: {files.size_text(disk)}."
