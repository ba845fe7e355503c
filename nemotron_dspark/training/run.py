"""One training run in one folder: check that target, draft and data fit, train, leave the finished draft.

On a finished cache the target is never loaded; its config, tokenizer, embedding and LM head are all that is read. On
conversations the target itself runs beside the draft.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemotron_dspark import files
from nemotron_dspark.config import RunConfig, TrainConfig
from nemotron_dspark.distributed import SINGLE, DistContext, own_device
from nemotron_dspark.drafts.config import DraftConfig, Eagle3Config, read_draft_config
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.drafts.from_draft import TARGET, draft_of, section_like, start_from_draft
from nemotron_dspark.drafts.from_target import start_from_target
from nemotron_dspark.drafts.kinds import draft_class
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.placement import MOST_OF_MEMORY, free_memory, weight_bytes
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.target import resolve_device
from nemotron_dspark.targets.weights import read_embedding_and_head
from nemotron_dspark.training import run_folder as folders
from nemotron_dspark.training.callbacks import Callback, Callbacks
from nemotron_dspark.training.checkpoints import check_space, expected_disk
from nemotron_dspark.training.hidden_states import SOURCES, HiddenStates, Setup
from nemotron_dspark.training.inference import RemoteSource, Roles, SharedSource, StateServer, connect
from nemotron_dspark.training.metrics import StepMetrics
from nemotron_dspark.training.online import OnlineSource, on_own_device
from nemotron_dspark.training.optimiser import state_bytes
from nemotron_dspark.training.sharding import uses_fsdp
from nemotron_dspark.training.source import Source
from nemotron_dspark.training.tiling import Tiling, choose_precision, choose_tiling
from nemotron_dspark.training.trainer import Trainer, graceful_stop

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
    """What a run did; `dataclasses.asdict` of it is the JSON of `nds train`.

    A process that ran the target for others tells no steps.
    """

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
    if (start := draft_of(config.train.init)) is not None:
        section = section_like(read_draft_config(start), config.draft)
        config = config.model_copy(update={"draft": section})
    mode, read_from = ("cached", cache) if cache is not None else (config.cache.mode, data)
    if read_from is None:
        raise TypeError("train() takes a cache or data")
    world, roles = context, _roles(config.train, mode, context)
    context = world if len(roles.trainers) == world.world_size else world.part(roles.trainers)
    # Rank 0 takes the folder, tokenises and writes; the others then find all of it there.
    with world.main_process_first(out):
        resume = resume or not world.is_main
        before = folders.read_run_info(out)
        device = training_device(config.train, world)
        setup, measured = _read_target(config, out, resume, device, before, tell, context)
        states = SOURCES[mode](setup, Path(read_from))
        notes = [*measured, *states.notes]
        if world.rank not in roles.trainers:
            return _run_target(states, roles, config.train, out, world, tuple(notes))
        draft = _new_draft(setup, states.draft, states.vocabulary, device)
        tilings = before.get("tilings", {})
        if device.type not in tilings:
            tilings[device.type] = dataclasses.asdict(choose_tiling(draft.target_head))
        if context.is_main:
            folders.write_run_info(out, states.settings, config, notes, read_from, tilings)
            check_space(out, draft, config.train.most_checkpoints)
    for note in notes:
        tell.on_message(f"note: {note}")
    tell.on_message(_summary(states, draft, config, out))
    if context.world_size > 1:
        tell.on_message(f"{context.world_size} processes, train.parallel={config.train.parallel}.")
    with contextlib.closing(_with_target(states.source, roles, config, draft, world, tell)) as source:
        tiling = Tiling(**tilings[device.type])
        trainer = Trainer(source, draft, config.train, out, tiling=tiling, callbacks=callbacks, context=context)
        result = trainer.run()
    # From the checkpoint, not from memory: a run that was killed behind it leaves the same draft. One that is there has
    # perhaps been calibrated since.
    if context.is_main and (result.resumed_from < result.steps or not (out / "draft" / "config.json").is_file()):
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
        tuple(notes),
        result.last,
    )


def _roles(config: TrainConfig, mode: str, context: DistContext) -> Roles:
    """Who trains, and who runs the target if that is settled by ``config``."""
    if config.inference_gpus and mode != "online":
        raise InputError(
            f"train.inference_gpus is {config.inference_gpus}, and no target runs in the training loop ({mode}).",
            "Give --data with cache.mode=online, or set it to 0.",
        )
    return Roles.of(context.machines(), config.inference_gpus)


def _with_target(
    source: Source, roles: Roles, config: RunConfig, draft: Draft, world: DistContext, callback: Callback
) -> Source:
    """``source``, where the target runs in another process or in this one for others a source that knows so."""
    if not isinstance(source, OnlineSource) or world.world_size == 1:
        return source
    if config.train.inference_gpus:
        count = world.world_size - len(roles.trainers)
        callback.on_message(f"{count} process{'es run' if count > 1 else ' runs'} the target, and no training.")
    elif _one_a_node(source, config, draft, world):
        roles = Roles.of(world.machines(), shared=True)
        callback.on_message("One process of each machine runs the target for all of them (target.copies=node).")
    else:
        source.config = on_own_device(source.config, world)
    links, most = connect(roles, world), config.train.local_batch_size
    if not links:
        return source
    own = roles.target_of[world.rank] == world.rank
    return SharedSource(source, links, most) if own else RemoteSource(source, links[0], most)


def _one_a_node(source: OnlineSource, config: RunConfig, draft: Draft, world: DistContext) -> bool:
    """Whether the target runs once on each machine: as the settings say, or because it does not fit everywhere."""
    if config.target.copies != "auto":
        return config.target.copies == "node"
    device = resolve_device(source.config.device)
    if device.index is not None:  # named: not that of every process
        return True
    needed, free = weight_bytes(Checkpoint.of(source.config, weights=True), source.config.dtype), free_memory(device)
    if device.type == draft.embed_tokens.weight.device.type:
        trained = sum(parameter.numel() for parameter in draft.trainable_parameters().values())
        needed += state_bytes(trained, draft.compute_dtype.itemsize)
    if device.type == "cpu":  # which the processes of a machine share
        free //= max(map(len, world.machines()))
    return bool(world.all_reduce_sum(torch.tensor(needed > MOST_OF_MEMORY * free)))


def _run_target(
    states: HiddenStates, roles: Roles, config: TrainConfig, out: Path, world: DistContext, notes: tuple[str, ...]
) -> TrainReport:
    """Run the target for the processes that train, until they are done."""
    source, links = states.source, connect(roles, world)
    if not isinstance(source, OnlineSource):
        raise TypeError("only a target in the training loop runs in a process of its own")
    server = StateServer(source, links, config.local_batch_size)
    server.open()
    with graceful_stop() as stopped:
        server.run(stopped)
    if stopped:
        raise KeyboardInterrupt
    return TrainReport(str(out), str(out / "draft"), states.mode, 0, 0, len(source.lengths), 0, 0.0, 0, notes, None)


def _read_target(
    config: RunConfig,
    out: Path,
    resume: bool,
    device: torch.device,
    before: Mapping[str, Any],  # what the run's folder says of it
    callback: Callback,
    context: DistContext,
) -> tuple[Setup, list[str]]:
    """Find the target and read its config and tokenizer, not its weights; a note where the precision was measured."""
    target = Checkpoint.of(config.target, weights=True)
    tokenizer, spec = target.load_tokenizer(), target.read_spec()
    dtype, reason = _precision(config.train, device, spec, before)
    setup = Setup(config, out, resume, target.folder, spec, tokenizer, dtype, callback, context)
    return setup, [reason] if reason else []


def _new_draft(
    setup: Setup,
    draft_config: DraftConfig | Eagle3Config,
    vocabulary: torch.Tensor | None,  # int64 [N], what it can draft; None: all
    device: torch.device,
) -> Draft:
    """A draft with the target's embeddings, in the type to compute in, on the device to train on."""
    config = setup.config.train
    draft = draft_class(draft_config)(
        draft_config,
        seed=config.seed,
        attention=config.attention,
        recompute_layers=config.activation_checkpointing,
    )
    if vocabulary is not None:
        draft.set_vocabulary(vocabulary)
    embeddings = read_embedding_and_head(setup.target, setup.spec)
    draft.set_embeddings(embeddings.embedding, embeddings.head)
    if config.init == TARGET:
        start_from_target(draft, setup.target, setup.spec)
    elif (start := draft_of(config.init)) is not None:
        start_from_draft(draft, start)
    draft = draft.to(setup.dtype)
    for part in (draft.embed_tokens, draft.lm_head) if uses_fsdp(config, setup.context) else (draft,):
        part.to(device)  # of the others only a shard goes there
    for name, buffer in draft.named_buffers(recurse=False):
        setattr(draft, name, buffer.to(device))
    return draft


def _summary(states: HiddenStates, draft: Draft, config: RunConfig, out: Path) -> str:
    """What is about to run, and what it takes on the disk."""
    tokens = int(states.source.lengths.sum())
    budget = min(states.size, int(config.cache.budget_gb * 1e9))
    disk = expected_disk(draft, config.train.most_checkpoints)
    disk += {"cached": 0, "online": 5 * tokens, "rolling": 5 * tokens + budget}[states.mode]
    fits = states.mode == "rolling" and states.size <= budget
    text = _SUMMARIES["whole" if fits else states.mode].format(
        samples=f"{len(states.source.lengths):,} samples, {tokens:,} tokens",
        states=files.size_text(states.size),
        budget=files.size_text(budget),
        reuse=config.cache.reuse,
    )
    return f"{text} Expected in {out}: {files.size_text(disk)}."


def training_device(config: TrainConfig, context: DistContext = SINGLE) -> torch.device:
    """The device of this process.

    Raises:
        InputError: no device's name, or one GPU for several processes.
        EnvironmentFault: the device is not there.
    """
    return own_device(resolve_device(config.device, "train.device"), "train.device", context)


def _precision(
    config: TrainConfig, device: torch.device, spec: TargetSpec, before: Mapping[str, Any]
) -> tuple[torch.dtype, str | None]:
    """The type to compute in, and a note where it was measured; a run that goes on keeps what it was begun with."""
    if config.precision != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision], None
    if before:
        return getattr(torch, before["settings"]["draft"]["dtype"]), None
    if device.type != "cpu":
        return torch.bfloat16, None
    dtype, reason = choose_precision(spec.vocab_size, spec.hidden_size)
    return dtype, f"trains in bf16: {reason} (train.precision=fp32 rounds less)." if dtype == torch.bfloat16 else None
