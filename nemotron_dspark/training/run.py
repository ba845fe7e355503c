"""One training run in one folder: check that target, draft and data fit, train, leave the finished draft.

On a finished cache the target is never loaded; its config, tokenizer, embedding and LM head are all that is read. On
conversations the target itself runs beside the draft.
"""

import contextlib
import dataclasses
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from nemotron_dspark import files
from nemotron_dspark.cache.build import inputs_of
from nemotron_dspark.cache.checksums import fingerprint
from nemotron_dspark.cache.formats import sample_sizes
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cache.verify import check_mask_token
from nemotron_dspark.chat.mask_token import choose_mask_token
from nemotron_dspark.config import DraftSection, RunConfig, TrainConfig
from nemotron_dspark.data.tokens import read_report, tokenise
from nemotron_dspark.drafts.config import DraftConfig, build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.targets import spec_from_folder
from nemotron_dspark.targets.families import needs_remote_code
from nemotron_dspark.targets.locate import locate
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.target import resolve_device, resolve_dtype
from nemotron_dspark.targets.weights import read_embedding_and_head
from nemotron_dspark.training import online, rolling
from nemotron_dspark.training import run_folder as folders
from nemotron_dspark.training.callbacks import Callback, Callbacks
from nemotron_dspark.training.checkpoints import check_space, expected_disk
from nemotron_dspark.training.distributed import SINGLE, DistContext
from nemotron_dspark.training.metrics import StepMetrics
from nemotron_dspark.training.sharding import uses_fsdp
from nemotron_dspark.training.source import CacheSource, Source
from nemotron_dspark.training.trainer import Trainer

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


def train(
    config: RunConfig,
    out: Path,
    *,
    cache: Path | None = None,
    data: Path | None = None,
    resume: bool = True,
    callbacks: Sequence[Callback] = (),
    context: DistContext = SINGLE,
) -> TrainReport:
    """Train a draft for the target that ``config`` names in the run folder ``out``, from where an earlier call stopped.

    Either on ``cache``, or on the conversations in ``data``, over which the target runs meanwhile as ``cache.mode``
    says. Of several processes all call it alike; rank 0 prepares what lies in the folder, and writes.

    Raises:
        InputError: target, cache or data, configuration and run folder do not fit together, or one of them is damaged;
            also when ``resume`` is False and the folder holds a run.
        CheckError: the loss became infinite or NaN, or the loaded target is not right.
        EnvironmentFault: no such device, the disk is full, or the processes do not share the folder.
    """
    out, tell = Path(out), Callbacks(callbacks)
    with context.main_process_first():
        if not context.is_main:
            resume = True
            if not (out / folders.RUN_FILE).is_file():
                raise EnvironmentFault(
                    f"Process {context.rank} on {platform.node()} does not see what the first one wrote to {out}.",
                    "Give --out on a disk that all machines share.",
                )
        run = _Run(config, out, tell, context, resume)
        states = run.cached(Path(cache)) if cache is not None else run.beside_target(Path(str(data)))
        draft = run.new_draft()
        if context.is_main:
            check_space(out, draft, config.train.keep_checkpoints)
    for note in states.notes:
        tell.on_message(f"note: {note}")
    tell.on_message(states.summary(config, out, expected_disk(draft, config.train.keep_checkpoints + 1)))
    if context.world_size > 1:
        tell.on_message(f"{context.world_size} processes, train.parallel={config.train.parallel}.")
    with contextlib.closing(states.source):
        trainer = Trainer(states.source, draft, config.train, out, callbacks=callbacks, context=context)
        result = trainer.run()
    if context.is_main:
        folders.export_draft(result.checkpoint, draft, out / "draft")
    return TrainReport(
        str(out),
        str(out / "draft"),
        states.mode,
        result.steps,
        result.resumed_from,
        len(states.source.lengths),
        result.tokens,
        result.seconds,
        sum(parameter.numel() for parameter in draft.trainable_parameters().values()),
        tuple(states.notes),
        result.last,
    )


@dataclasses.dataclass(frozen=True)
class HiddenStates:
    """Where a run's hidden states come from."""

    mode: str  # "cached", or what `cache.mode` says
    source: Source
    size: int  # bytes of all of them
    notes: list[str]

    def summary(self, config: RunConfig, out: Path, written: int) -> str:
        """What is about to run, and what it takes on the disk; ``written`` bytes are checkpoints and the draft."""
        tokens = int(self.source.lengths.sum())
        budget = min(self.size, int(config.cache.budget_gb * 1e9))
        disk = written + {"cached": 0, "online": 5 * tokens, "rolling": 5 * tokens + budget}[self.mode]
        fits = self.mode == "rolling" and self.size <= budget
        text = _SUMMARIES["whole" if fits else self.mode].format(
            samples=f"{len(self.source.lengths):,} samples, {tokens:,} tokens",
            states=files.size_text(self.size),
            budget=files.size_text(budget),
            reuse=config.cache.reuse,
        )
        return f"{text} Expected in {out}: {files.size_text(disk)}."


class _Run:
    """What a run is made of, each part checked against the others before anything long starts."""

    def __init__(self, config: RunConfig, out: Path, tell: Callback, context: DistContext, resume: bool):
        self.config, self.out, self.tell, self.context, self.resume = config, out, tell, context, resume
        self.name = config.target.named
        allowed = config.target.trust_remote_code
        self.folder = locate(self.name, revision=config.target.revision, weights=True, code=allowed)
        self.spec = spec_from_folder(self.folder, self.name, trust_remote_code=allowed)
        trusted = allowed and needs_remote_code(files.read_json(self.folder / "config.json"))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, trust_remote_code=trusted)
        self.device, self.dtype = training_device(config.train, context)
        self.draft_config: DraftConfig

    def cached(self, folder: Path) -> HiddenStates:
        """Those of a finished cache; the target is never loaded."""
        cache = TargetCache(folder)
        section = self.config.draft
        if section.taps is None:  # it was built with some; they are the only ones there are
            section = section.model_copy(update={"taps": list(cache.taps)})
        notes = [*self._choose_draft(section), *_check_cache(cache, self.spec, self.draft_config, self.name)]
        if self.context.is_main:
            check_mask_token(cache, self.draft_config.mask_token_id)
        source = CacheSource(cache)
        source.schedule(self.config.train, self.context)  # refuses what does not fit before the folder is touched
        settings = {**self._settings("cached"), "cache": fingerprint(cache.folder)}
        self._lock(settings)
        return self._described("cached", source, sum(cache.layout.shard_sizes), notes, settings, folder)

    def beside_target(self, data: Path) -> HiddenStates:
        """Those that the target computes beside the training, over conversations that are tokenised first."""
        config, mode = self.config, self.config.cache.mode
        notes = self._choose_draft(config.draft)
        taps = self.draft_config.target_layer_ids
        dtype = resolve_dtype(config.target.dtype, resolve_device(config.target.device))
        made_from = inputs_of(self.folder, self.tokenizer, self.name, dtype, data, taps, config.data)
        if mode == "rolling":
            made_from["cache"] = config.cache.model_dump(exclude={"mode"})
        settings = {**self._settings(mode), "source": made_from}
        self._lock(settings)
        tokens = tokenise(
            self.out / online.FOLDER,
            self.out / online.FOLDER / online.REPORT,
            data,
            self.tokenizer,
            config.data,
            max_positions=self.spec.max_position_embeddings,
            mask_token_id=self.draft_config.mask_token_id,
            inputs=made_from,
            on_lines=lambda lines: self.tell.on_status(f"tokenising, line {lines:,}"),
        )
        notes += _notes_on_data(self.out)
        sizes = sample_sizes(
            config.cache,
            tokens.lengths,
            tokens.predicting,
            num_taps=len(taps),
            hidden_size=self.spec.hidden_size,
        )
        source: Source
        if mode == "online":
            source = online.OnlineSource(tokens, config.target, taps, self.tell.on_status)
        else:
            source = rolling.RollingSource(
                self.out / rolling.FOLDER,
                tokens,
                config.target,
                self.spec,
                taps,
                config.cache,
                on_message=self.tell.on_message,
                on_status=self.tell.on_status,
            )
        source.schedule(config.train, self.context)
        return self._described(mode, source, int(sizes.sum()), notes, settings, data)

    def new_draft(self) -> DSparkDraft:
        """A draft with the target's embeddings, in the type to compute in, on the device to train on."""
        config = self.config.train
        draft = DSparkDraft(
            self.draft_config,
            seed=config.seed,
            attention=config.attention,
            recompute_layers=config.activation_checkpointing,
        )
        embeddings = read_embedding_and_head(self.folder, self.spec)
        draft.set_embeddings(embeddings.embedding, embeddings.head)
        draft = draft.to(self.dtype)
        for part in (draft.embed_tokens, draft.lm_head) if uses_fsdp(config, self.context) else (draft,):
            part.to(self.device)  # of the others only a shard goes there
        return draft

    def _choose_draft(self, section: DraftSection) -> list[str]:
        """Fix the draft's config; returns notes on what was assumed."""
        mask = choose_mask_token(self.tokenizer, self.spec, override=section.mask_token_id)
        self.draft_config, notes = build_draft_config(
            self.spec, section, mask_token_id=mask.id, num_anchors=self.config.train.num_anchors
        )
        return [*notes, f"mask token {mask.id}: {mask.reason} (draft.mask_token_id sets it)."]

    def _settings(self, mode: str) -> dict[str, Any]:
        """What the folder's run must have been begun with, too."""
        return {
            "target": self.name,
            "mode": mode,
            "draft": {**self.draft_config.to_json(), "dtype": str(self.dtype).removeprefix("torch.")},
            "train": self.config.train.model_dump(mode="json", exclude={*folders.FREE_KEYS, "precision"}),
        }

    def _lock(self, settings: dict[str, Any]) -> None:
        folders.lock_run_dir(self.out, settings, self.resume)

    def _described(
        self, mode: str, source: Source, size: int, notes: list[str], settings: dict[str, Any], read_from: Path
    ) -> HiddenStates:
        if self.config.draft.confidence_head and not self.config.train.confidence_alpha:
            notes = [*notes, "the confidence head is not trained: train.confidence_alpha is 0."]
        if self.context.is_main:
            folders.write_run_info(self.out, settings, self.config, notes, read_from)
        return HiddenStates(mode, source, size, notes)


def training_device(config: TrainConfig, context: DistContext = SINGLE) -> tuple[torch.device, torch.dtype]:
    """The device of this process and the type to compute in.

    Raises:
        InputError: no device's name, or one GPU for several processes.
        EnvironmentFault: the device is not there.
    """
    device = resolve_device(config.device, "train.device")
    if context.world_size > 1 and device.type == "cuda":
        if device.index is not None:
            raise InputError(
                f"train.device={config.device} is one GPU, and there are {context.world_size} processes.",
                "Leave train.device at auto.",
            )
        if context.local_rank >= torch.cuda.device_count():
            raise EnvironmentFault(
                f"{platform.node()} has {torch.cuda.device_count()} GPUs, too few for its processes.",
                f"Start torchrun with --nproc-per-node {torch.cuda.device_count()}.",
            )
        device = torch.device("cuda", context.local_rank)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return device, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


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
