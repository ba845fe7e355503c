"""What a run will need before anything of it runs: disk, memory, hours and dollars, for every mode there is.

`needs` has the formulas; here they are put together for one target, one workload and one machine, compared with what
the machine has, and turned into the commands that get the recommended mode.
"""

import dataclasses
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemotron_dspark.cache.deepspec_layout import bytes_per_token
from nemotron_dspark.cache.needs import capture_bytes, config_size, stored_bytes
from nemotron_dspark.config import CacheConfig, RunConfig
from nemotron_dspark.data.sources import Given, listed, one_file
from nemotron_dspark.data.tokens import TOKEN_BYTES
from nemotron_dspark.drafts.costs import FILE as PROFILE_FILE
from nemotron_dspark.drafts.costs import FOLDER as PROFILE_FOLDER
from nemotron_dspark.drafts.costs import CostTable, read_costs
from nemotron_dspark.errors import InputError
from nemotron_dspark.evaluation.expected import Expected, assumed_survival, expected
from nemotron_dspark.files import size_text as size
from nemotron_dspark.recipe import needs
from nemotron_dspark.recipe.describe import inspect, tokenizer_in
from nemotron_dspark.recipe.machines import GB, Machine
from nemotron_dspark.recipe.machines import machine as machine_called
from nemotron_dspark.recipe.needs import ASSUMED, Shape
from nemotron_dspark.recipe.workload import ANSWER_SHARE, Workload, from_file, from_numbers
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.layer_weights import USED_EXPERTS
from nemotron_dspark.targets.placement import BESIDE_DRAFT, KEPT_FREE, room_on
from nemotron_dspark.targets.streamed import pass_tokens, streams, token_bytes
from nemotron_dspark.training.schedule import most_processes

_SEGMENTS = 2  # of a rolling cache, on the disk at once


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to bring hidden states to the draft. Here is all that differs between them."""

    name: str
    setting: str | None  # that gets it with `nds train --data`; None: it takes a cache
    stored: Callable[[float, CacheConfig], float]  # (bytes of the whole cache, settings) to bytes on the disk
    forwards: Callable[[float, CacheConfig], float]  # (epochs, settings) to times the target runs over the data
    batch: Callable[[int, int], int]  # (tokens of a capture's, of a training forward) to those in the loop
    format: str | None = None  # of what is stored; None: as configured
    streams: bool = True  # a target that does not fit goes through layer by layer

    def apart(self, config: RunConfig) -> int:
        """GPUs that run the target and do not train."""
        return 0 if self.streams else config.train.inference_gpus


def _whole_cache(name: str, cache_format: str) -> Mode:
    return Mode(name, None, lambda whole, _: whole, lambda epochs, _: 1.0, lambda capture, train: 0, cache_format)


MODES = (
    _whole_cache("cached", "deepspec"),
    _whole_cache("compact", "compact"),
    Mode(
        "rolling",
        "cache.mode=rolling",
        lambda whole, cache: min(whole, 1e9 * cache.budget_gb),
        lambda epochs, cache: math.ceil(epochs / cache.reuse),
        lambda capture, train: capture,
    ),
    Mode(
        "online",
        "cache.mode=online",
        lambda whole, _: 0.0,
        lambda epochs, _: epochs,
        lambda capture, train: train,
        streams=False,
    ),
)


@dataclasses.dataclass(frozen=True)
class MemoryNeeds:
    """Bytes at the highest point of a stage, on one GPU and in main memory."""

    gpu: float
    host: float


@dataclasses.dataclass(frozen=True)
class Streaming:
    """How a target goes through that does not fit as a whole: in passes, each of which reads all its layers."""

    passes: int  # of one process, in all
    tokens: int  # of a pass
    read: float  # bytes from the disk, of all passes and processes
    in_groups: bool  # the experts of a layer are read in groups


@dataclasses.dataclass(frozen=True)
class ModeNeeds:
    """What one mode needs. ``problems`` say why it does not fit; none: it does.

    Where the target is streamed, stages that need it whole are missing if it does not fit: an engine does them.
    """

    mode: str
    disk: dict[str, float]
    memory: dict[str, MemoryNeeds]
    hours: dict[str, float]
    dollars: float | None
    problems: tuple[str, ...]
    advice: tuple[str, ...]
    streaming: Streaming | None = None

    @property
    def total_disk(self) -> float:
        return sum(self.disk.values())

    @property
    def total_hours(self) -> float:
        return sum(self.hours.values())


@dataclasses.dataclass(frozen=True)
class ResourceEstimate:
    """What every mode needs for one target, workload and machine, and which is recommended."""

    target: str
    machine: Machine
    workload: Workload
    columns: tuple[ModeNeeds, ...]
    recommended: str | None
    reason: str
    commands: tuple[str, ...]
    assumptions: tuple[str, ...]
    expected: tuple[Expected, ...] = ()  # by block length, where rounds were profiled

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values; bytes and hours."""
        values = dataclasses.asdict(self)
        for column, given in zip(values["columns"], self.columns, strict=True):
            column |= {"total_disk": given.total_disk, "total_hours": given.total_hours, "fits": not given.problems}
        values["expected"] = [each.to_json() for each in self.expected]
        return values


def plan(
    config: RunConfig,
    *,
    data: Given | None = None,
    samples: int | None = None,
    mean_length: int | None = None,
    answer_share: float = ANSWER_SHARE,
    machine: str = "here",
    price: float | None = None,
    options: Sequence[str] = (),
) -> ResourceEstimate:
    """Estimate disk, memory, hours and dollars of a run from the target's config and ``data``, or from two numbers.

    ``machine`` is a name in `machines` or "here"; ``price`` is dollars an hour for the whole machine; ``options`` are
    flags such as ``--set train.lr=1e-4``, repeated in the commands that the estimate recommends.

    Raises:
        InputError: neither or both of data and numbers, or the target's size cannot be told.
    """
    if price is not None and not price >= 0:
        raise InputError(f"--price {price:g} is negative.", "Give dollars an hour.")
    numbers = None if samples is None or mean_length is None else (samples, mean_length)
    if (data is None) == (numbers is None) or (samples is None) != (mean_length is None):
        raise InputError(
            "A plan needs to know how much data there is: either a file or two numbers.",
            "Give --data answers.jsonl, or --samples 50000 --mean-length 800.",
        )
    where = machine_called(machine)
    shape = Shape.of(inspect(config))
    positions = shape.spec.max_position_embeddings
    if numbers is not None:
        workload = from_numbers(*numbers, config.data, positions, answer_share)
    else:
        tokenizer, _ = tokenizer_in(Checkpoint.of(config.target))
        workload = from_file(one_file(data or ()), tokenizer, config.data, positions)
    answers = data if data is not None else "answers.jsonl"
    made = estimate(shape, config, workload, where, price=price, options=options, data=answers)
    costs = profiled(config) if machine == "here" or config.eval.profile is not None else None
    return made if costs is None else dataclasses.replace(made, expected=expected_of(costs))


def profiled(config: RunConfig) -> CostTable | None:
    """The table that ``eval.profile`` names, or that `nds profile` wrote here for the target or its draft."""
    if config.eval.profile is not None:
        return read_costs(Path(config.eval.profile))
    name = Path(config.target.named).name
    places = (Path("runs") / name / "draft" / PROFILE_FOLDER, Path("profiles") / name)
    return next((read_costs(place) for place in places if (place / PROFILE_FILE).is_file()), None)


def expected_of(costs: CostTable) -> tuple[Expected, ...]:
    """Speeds by block length of a draft of which as much is kept as is assumed."""
    label = f"{ASSUMED.accepted:g} tokens a round of {costs.gamma}"
    return expected(costs, {label: assumed_survival(ASSUMED.accepted, costs.gamma)})


def estimate(
    shape: Shape,
    config: RunConfig,
    workload: Workload,
    machine: Machine,
    *,
    price: float | None = None,
    options: Sequence[str] = (),
    data: Given = "answers.jsonl",
) -> ResourceEstimate:
    """The estimate for the target that ``shape`` describes; ``options`` and ``data`` are for the commands."""
    case = _Case(shape, config, workload, machine)
    columns = tuple(case.column(mode, price) for mode in MODES)
    fitting = [column for column in columns if not column.problems]
    exact = [column for column in fitting if column.mode != "compact" or fitting[0].mode != "cached"]
    best = min(exact, key=lambda column: column.total_hours) if fitting else None
    commands = _commands(best, shape, config, machine, options, data) if best else ()
    return ResourceEstimate(
        shape.name,
        machine,
        workload,
        columns,
        best.mode if best else None,
        _reason(best, columns) + (_without(best, shape, machine) if best else ""),
        commands,
        assumptions(machine),
    )


def assumptions(machine: Machine, eval_prompts: int = ASSUMED.eval_prompts) -> tuple[str, ...]:
    """Sentences on everything that is neither in the config nor a property of the machine."""
    gpus = ""
    if machine.gpus > 1:
        gpus = f"All {machine.gpus} GPUs answer, build and train; what goes between them is not counted. "
    return (
        f"{gpus}Of the peak, a forward of the target reaches {ASSUMED.forward:.0%}, training {ASSUMED.train:.0%}; of "
        f"the memory's bandwidth, generation reaches {ASSUMED.bandwidth:.0%} with {needs.concurrency(machine)} "
        "requests at a time.",
        f"Disk: {ASSUMED.read / GB:g} GB/s read, {ASSUMED.write / GB:g} GB/s written, flushed and checksummed.",
        f"Evaluation: {eval_prompts} prompts, {ASSUMED.accepted:g} tokens a round.",
    )


@dataclasses.dataclass(frozen=True)
class _Case:
    """One target, run, workload and machine."""

    shape: Shape
    config: RunConfig
    workload: Workload
    machine: Machine

    def column(self, mode: Mode, price: float | None) -> ModeNeeds:
        disk = self.disk(mode)
        memory = self.memory(mode)
        hours = self.hours(mode)
        problems, advice = [], []
        if sum(disk.values()) > self.machine.disk_bytes:
            problems.append(f"disk: {size(sum(disk.values()))} are needed, there are {size(self.machine.disk_bytes)}.")
            if mode.setting is None:
                advice += self._smaller_cache(mode, disk)
        for stage, need in memory.items():
            lacking = _lacking(need, self.machine)
            if lacking:
                problems.append(f"{stage}: {lacking}.")
                remedy = self._smaller_memory(stage, mode)
                if remedy:
                    advice.append(remedy)
        dollars = price * sum(hours.values()) if price is not None else None
        return ModeNeeds(mode.name, disk, memory, hours, dollars, tuple(problems), tuple(advice), self.streaming(mode))

    def disk(self, mode: Mode) -> dict[str, float]:
        found = {} if self.shape.weights_here else {"target": float(self.shape.stored_bytes)}
        stored = mode.stored(self.states(mode), self.config.cache)
        if stored:
            found["cache"] = float(stored)
        if mode.setting:
            found["tokens"] = float(TOKEN_BYTES * self.workload.tokens)
        one = needs.checkpoint_bytes(self.shape)
        found["checkpoints"] = float(self.config.train.most_checkpoints * one)
        found["draft"] = float(needs.draft_bytes(self.shape, self.machine.weight_bytes))
        return found

    def memory(self, mode: Mode) -> dict[str, MemoryNeeds]:
        """Per stage; without a GPU everything is in main memory."""
        width = self.machine.weight_bytes
        train_batch = self.config.train.local_batch_size * self.workload.longest
        cache_batch, before = self.workload.largest_batch(self.config.cache.batch_tokens)

        def capture(tokens: float) -> float:
            shape = self.shape
            return capture_bytes(shape.spec, shape.config, shape.taps, tokens, self.workload.longest, width)

        train = self.training()
        target = float(self.shape.parameters * width)
        streaming = self.streaming(mode)
        if streaming:
            target = self.resident_bytes + streaming.tokens * self.token_bytes
        found = {}  # on the device; in main memory; there for each further process, and how many there are
        others = self.trainers - 1
        if mode.setting is None:
            written = float(before * bytes_per_token(self.shape.taps, self.shape.hidden))
            found["cache"] = (target + capture(cache_batch), written, written, max(1, self.machine.gpus) - 1)
            found["train"] = (train.device, train.host, train.other, others)
        else:
            target += capture(mode.batch(cache_batch, train_batch))
            fullest = max(train.device, target) if mode.apart(self.config) else train.device + target
            found["train"] = (fullest, train.host, train.other, others)
        serve, holds = self.serving()
        if holds or not streaming:
            found["eval"] = (serve, 0.0, 0.0, 0)
        if not self.machine.gpus:
            return {stage: MemoryNeeds(0.0, ASSUMED.libraries + gpu + host) for stage, (gpu, host, *_) in found.items()}
        return {
            stage: MemoryNeeds(ASSUMED.cuda_context + gpu, ASSUMED.cuda_libraries * (1 + count) + host + count * other)
            for stage, (gpu, host, other, count) in found.items()
        }

    def hours(self, mode: Mode) -> dict[str, float]:
        epochs = needs.epochs(self.config.train, self.workload.samples)
        work = needs.training_seconds(self.shape, self.config.train, self.workload, self.machine, epochs, self.trainers)
        forward = needs.forward_seconds(self.shape, self.workload.tokens, self.machine)
        apart = mode.apart(self.config)
        forward /= max(1, self.machine.gpus) if mode.setting is None else apart or self.trainers
        streaming, seconds = self.streaming(mode), {}
        together = self.free_bytes * max(1, self.machine.gpus)
        if not streaming or needs.engine_bytes(self.shape, self.machine.weight_bytes) < together:
            seconds["answers"] = needs.answer_seconds(self.shape, self.workload, self.machine)
        whole = self.states(mode)
        stored = mode.stored(whole, self.config.cache)
        produced = mode.forwards(epochs, self.config.cache)
        made = produced * (max(forward, whole / ASSUMED.write) if stored else forward)
        if streaming:
            made = max(made, streaming.read / ASSUMED.read)
        read = epochs * whole / ASSUMED.read if stored else 0.0
        if mode.setting is None:
            seconds["cache"] = made
            seconds["train"] = max(work, read)
        else:  # on the same device one after the other
            seconds["train"] = max(work, made) if apart else max(work, read) + made
        if "eval" in self.memory(mode):
            seconds["eval"] = needs.evaluation_seconds(self.shape, self.config.eval, self.machine)
        return {stage: value / 3600 for stage, value in seconds.items()}

    def serving(self) -> tuple[float, bool]:
        """Bytes of evaluation on the fullest GPU, and whether the machine holds the target: on one GPU, or on all."""
        shape, machine, free = self.shape, self.machine, self.free_bytes
        whole = needs.serving_bytes(shape, machine.weight_bytes, 1, self.workload.longest)
        weights = float(shape.parameters * machine.weight_bytes)
        if not streams("auto", weights, free) or not weights < room_on(machine.gpus, free):
            return whole, whole < free
        first = min(BESIDE_DRAFT * free, weights / machine.gpus)
        return max(whole - weights + first, (weights - first) / (machine.gpus - 1)), True

    @property
    def trainers(self) -> int:
        """Processes that train."""
        return most_processes(self.config.train, self.machine.gpus) - self.config.train.inference_gpus

    def training(self) -> needs.Training:
        return needs.training_bytes(
            self.shape,
            self.config.train,
            self.workload.longest,
            self.workload.answer_share,
            self.machine.weight_bytes,
            bool(self.machine.gpus),
        )

    @property
    def token_bytes(self) -> int:
        """Of a token in flight."""
        used = config_size(self.shape.config, 1, *USED_EXPERTS) if self._in_groups else 0
        return token_bytes(self.shape.taps, self.shape.hidden, self.machine.weight_bytes, used)

    @property
    def resident_bytes(self) -> float:
        """Of a streamed target, beside its tokens."""
        return needs.streamed_bytes(self.shape, self.machine.weight_bytes, self.free_bytes)

    @property
    def _in_groups(self) -> bool:
        return needs.in_groups(self.shape, self.machine.weight_bytes, self.free_bytes)

    @property
    def free_bytes(self) -> float:
        """Where the target computes, before anything is loaded."""
        machine = self.machine
        if not machine.gpus:
            return machine.host_bytes - ASSUMED.libraries
        kept = ASSUMED.cuda_libraries + KEPT_FREE if machine.unified else 0
        return machine.gpu_bytes - ASSUMED.cuda_context - kept

    def streaming(self, mode: Mode) -> Streaming | None:
        """How the target's layers are streamed in ``mode``; None: it is loaded whole."""
        shape, config, machine = self.shape, self.config, self.machine
        width = machine.weight_bytes
        if not (mode.streams and streams(config.target.stream, shape.parameters * width, self.free_bytes)):
            return None
        processes = max(1, machine.gpus) if mode.setting is None else self.trainers
        free = self.free_bytes - self.resident_bytes - (self.training().device if mode.setting else 0)
        share = math.ceil(self.workload.tokens / processes)
        whole = self.states(mode)
        at_once = share if mode.setting is None else share * mode.stored(whole, config.cache) / whole / _SEGMENTS
        batch, _ = self.workload.largest_batch(config.cache.batch_tokens)
        tokens = min(share, max(batch, min(pass_tokens(free, self.token_bytes), int(at_once))))
        passes = math.ceil(share / tokens)
        produced = mode.forwards(needs.epochs(config.train, self.workload.samples), config.cache)
        # What main memory holds beside a GPU is read from the disk once.
        kept = machine.gpus and not machine.unified and shape.stored_bytes < 0.9 * machine.host_bytes
        reads = 1 if kept else produced * passes * processes
        return Streaming(int(produced * passes), tokens, float(reads * shape.stored_bytes), self._in_groups)

    def states(self, mode: Mode) -> int:
        """Bytes of all hidden states as ``mode`` would store them."""
        asked = {"format": mode.format} if mode.format else {}
        return stored_bytes(
            self.config.cache.model_copy(update=asked),
            self.workload.tokens,
            self.workload.targets,
            self.workload.samples,
            num_taps=self.shape.taps,
            hidden_size=self.shape.hidden,
        )

    def _smaller_cache(self, mode: Mode, disk: dict[str, float]) -> list[str]:
        """Fewer samples, or fewer taps, with which the cache fits."""
        room = self.machine.disk_bytes - (sum(disk.values()) - disk["cache"])
        fitting = math.floor(self.workload.samples * room / disk["cache"])
        found = [f"The disk holds the cache of about {fitting:,} samples."] if fitting > 0 else []
        for taps in range(self.shape.taps - 1, 0, -1):
            smaller = dataclasses.replace(self.shape, taps=taps)
            if dataclasses.replace(self, shape=smaller).states(mode) <= room:
                return [*found, f"It holds all with --set draft.num_taps={taps}."]
        return found

    def _smaller_memory(self, stage: str, mode: Mode) -> str | None:
        """The setting with which ``stage`` fits, or that none of the usual ones makes it fit."""
        keys = {"cache": ("cache", "batch_tokens"), "train": ("train", "num_anchors")}
        if stage not in keys:
            return None
        apart = self._gpus_of_target() if not mode.streams else None
        if apart is not None:
            held = "a GPU has the target alone" if apart == 1 else f"{apart} GPUs hold the target"
            return f"train fits where {held} and the others train (--inference-gpus 1)."
        section, key = keys[stage]
        values = getattr(self.config, section)
        value = getattr(values, key)
        while (value := value // 2) >= 16:
            changed = self.config.model_copy(update={section: values.model_copy(update={key: value})})
            if not _lacking(dataclasses.replace(self, config=changed).memory(mode)[stage], self.machine):
                return f"{stage} fits with --set {section}.{key}={value}."
        layers = range(self.shape.layers - 1, 0, -1) if stage == "train" else ()
        for count in layers:
            case = dataclasses.replace(self, shape=self.shape.with_layers(count))
            if not _lacking(case.memory(mode)[stage], self.machine):
                return f"train fits with --set draft.num_layers={count}."
        keys_tried = f"{section}.{key}" + (" and draft.num_layers are" if layers else " is")
        return f"{stage} does not fit whatever {keys_tried}: it takes a machine with more memory."

    def _gpus_of_target(self) -> int | None:
        """How many GPUs hold the target while the others train a draft without it; None: there are too few."""
        weights, free = self.shape.parameters * self.machine.weight_bytes, self.free_bytes
        if ASSUMED.cuda_context + self.training().device > self.machine.gpu_bytes:
            return None
        return next((count for count in range(1, self.machine.gpus) if weights < room_on(count, free)), None)


def _lacking(need: MemoryNeeds, machine: Machine) -> str:
    """What ``machine`` has too little of, or an empty text."""
    if machine.unified or not machine.gpus:
        has = machine.gpu_bytes if machine.unified else machine.host_bytes
        total = need.gpu + need.host
        return f"{size(total)} of memory are needed, there are {size(has)}" if total > has else ""
    if need.gpu > machine.gpu_bytes:
        return f"{size(need.gpu)} on one GPU are needed, it has {size(machine.gpu_bytes)}"
    if need.host > machine.host_bytes:
        return f"{size(need.host)} of main memory are needed, there are {size(machine.host_bytes)}"
    return ""


def _reason(best: ModeNeeds | None, columns: Sequence[ModeNeeds]) -> str:
    if best is None:
        return "No mode fits this machine."
    others = [column for column in columns if column is not best]
    said = []
    for other in others:
        if other.problems:
            said.append(f"{other.mode} does not fit ({other.problems[0].rstrip('.')})")
        elif other.total_hours > 1.02 * best.total_hours:
            said.append(f"{other.mode} takes {hours(other.total_hours)} instead of {hours(best.total_hours)}")
        elif other.total_hours < best.total_hours / 1.02:
            said.append(f"{other.mode} takes only {hours(other.total_hours)}, with hidden states that are not exact")
        else:
            said.append(f"{other.mode} takes as long")
    more = f"; it needs {size(best.total_disk)} of disk" if not best.problems and others else ""
    return f"{best.mode} fits" + (f", and {'; '.join(said)}" if said else "") + f"{more}."


def _without(best: ModeNeeds, shape: Shape, machine: Machine) -> str:
    """What an engine elsewhere has to do where the target does not fit as a whole."""
    if best.streaming is None:
        return ""
    grouped = ", the experts of a layer in groups" if best.streaming.in_groups else ""
    text = f" The layers of the target, {size(shape.parameters * machine.weight_bytes)} in all, are streamed{grouped}."
    stages = [
        verb for stage, verb in (("answers", "write the answers"), ("eval", "measure")) if stage not in best.hours
    ]
    if not stages:
        return text
    return f"{text} An engine that holds the target must {' and '.join(stages)}."


def _commands(
    best: ModeNeeds, shape: Shape, config: RunConfig, machine: Machine, options: Sequence[str], data: Given
) -> tuple[str, ...]:
    name = Path(shape.name).name.lower() or "target"
    target = f"--target {shlex.quote(shape.name)}"
    given = "".join(f" {shlex.quote(text)}" for text in options)
    cache, run = f"caches/{shlex.quote(name)}", f"runs/{shlex.quote(name)}"
    data = " --data ".join(map(shlex.quote, listed(data)))
    mode = next(mode for mode in MODES if mode.name == best.mode)
    setting = mode.setting
    written = f" --cache-format {mode.format}" if mode.format not in (None, config.cache.format) else ""
    build = [f"nds cache build {target} --data {data} --out {cache}{given}{written}"] if setting is None else []
    states = f"--cache {cache}" if setting is None else f"--data {data} --set {setting}"
    processes = most_processes(config.train, machine.gpus) - config.train.inference_gpus + mode.apart(config)
    nds = f"torchrun --nproc-per-node {processes} -m nemotron_dspark" if processes > 1 else "nds"
    train = f"{nds} train {target} {states} --out {run}{given}"
    measured = f"--draft {run}/draft" if "eval" in best.hours else "--engine URL"
    return (*build, train, f"nds eval {target} {measured} --prompts held_out.jsonl{given}")


def hours(value: float) -> str:
    """Hours as a person reads them."""
    if value < 1 / 60:
        return f"{value * 3600:.0f} s"
    if value < 1:
        return f"{value * 60:.0f} min"
    return f"{value:.1f} h" if value < 100 else f"{value:,.0f} h"
