"""What a recipe would do: each stage with its state, and disk, memory and hours of what is left.

The formulas are those of `plan`; here they are added up over targets and drafts, what they share once. Until there are
answers their number is that of the prompts and their length an assumption, which is printed.
"""

import dataclasses
from typing import Any

from nemotron_dspark.config import RunConfig
from nemotron_dspark.config.recipe import Recipe
from nemotron_dspark.data.prompts import Prompt, read_prompts
from nemotron_dspark.data.sources import named, one_file
from nemotron_dspark.drafts.kinds import config_for, has_mask_token
from nemotron_dspark.files import size_of, size_text
from nemotron_dspark.recipe import needs
from nemotron_dspark.recipe.describe import inspect, tokenizer_in
from nemotron_dspark.recipe.graph import DraftStages, Stage, all_stages, drafts_of
from nemotron_dspark.recipe.ledger import Ledger, Status
from nemotron_dspark.recipe.machines import Machine
from nemotron_dspark.recipe.machines import machine as machine_called
from nemotron_dspark.recipe.needs import ASSUMED, Shape
from nemotron_dspark.recipe.plan import MemoryNeeds, ModeNeeds, assumptions, estimate
from nemotron_dspark.recipe.workload import CHARACTERS_PER_TOKEN, Workload, from_file, from_numbers
from nemotron_dspark.targets import Checkpoint


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """A stage of the recipe. ``hours`` are 0 where nothing is left to do, and for what takes seconds."""

    stage: Stage
    status: Status
    hours: float
    memory: MemoryNeeds | None  # None where it is little

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.stage.kind,
            "label": self.stage.label,
            "format": self.stage.format,
            "place": str(self.stage.place),
            "state": self.status.state,
            "why": self.status.why,
            "hours": self.hours,
            "memory": self.memory and dataclasses.asdict(self.memory),
        }


@dataclasses.dataclass(frozen=True)
class RecipePlan:
    """What `nds recipe run --dry-run` says. Bytes and hours; ``missing`` is what the disk still has to take."""

    recipe: Recipe
    machine: Machine
    drafts: tuple[DraftStages, ...]
    stages: tuple[PlannedStage, ...]
    disk: dict[str, float]  # by what lies there: targets, caches, checkpoints, drafts
    missing: float
    workloads: tuple[str, ...]  # how much data there is, in words
    problems: tuple[str, ...]  # why it does not fit; none: it does
    advice: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def total_disk(self) -> float:
        return sum(self.disk.values())

    @property
    def total_hours(self) -> float:
        """Hours of what is left to do."""
        return sum(planned.hours for planned in self.stages)

    @property
    def dollars(self) -> float | None:
        return None if self.recipe.price is None else self.recipe.price * self.total_hours

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        recipe = self.recipe
        return {
            "targets": list(recipe.target),
            "out": str(recipe.out),
            "gpus": self.machine.gpus,
            "machine": dataclasses.asdict(self.machine),
            "stages": [planned.to_json() for planned in self.stages],
            "disk": self.disk,
            "total_disk": self.total_disk,
            "missing_disk": self.missing,
            "total_hours": self.total_hours,
            "dollars": self.dollars,
            "fits": not self.problems,
            "problems": self.problems,
            "advice": self.advice,
            "workloads": self.workloads,
            "assumptions": self.assumptions,
        }


def dry_run(recipe: Recipe) -> RecipePlan:
    """Plan every stage of ``recipe`` without making anything.

    Raises:
        InputError: data is missing, a target cannot be found or its size not told, or there is no such draft for it.
    """
    drafts = drafts_of(recipe)
    ledger = Ledger(recipe.out)
    statuses = ledger.statuses(all_stages(drafts))
    machine = _machine(recipe)
    planned: dict[str, PlannedStage] = {}
    disk: dict[str, float] = {}
    missing = 0.0
    problems, advice, said = [], [], []
    for draft in drafts:
        config = draft.config
        shape = Shape.of(inspect(config))
        if not has_mask_token(config.draft):  # of the other kinds `inspect` has made the config
            config_for(shape.spec, config.draft, mask_token_id=None, num_anchors=config.train.num_anchors)
        workload = _workload(recipe, draft)
        said.append(f"{draft.target}: {workload.source}")
        # `plan` knows one target with one draft: its column for this recipe's mode has all that is needed.
        found = estimate(shape, config, workload, machine)
        mode = recipe.mode_of(config)
        column = next(column for column in found.columns if column.mode == mode)
        problems += [f"{draft.label}, {mode}: {text}" for text in column.problems if not text.startswith("disk")]
        advice += column.advice
        if "eval" not in column.memory:  # streamed, and it fits nowhere whole
            needing = [stage for stage in draft.stages if stage.kind in ("eval", "calibrate")]
            if draft.get("answers") and not recipe.answers.base_url:
                problems.append(f"{draft.target} does not fit as a whole, and cannot answer here.")
                advice.append("Name an engine that serves it: answers.base_url.")
            if needing:
                problems.append(
                    f"{draft.label}: the target does not fit as a whole, and its draft is not measured here."
                )
                advice.append("End with --until train, and measure where an engine serves both: nds eval --engine.")
        if column.problems and found.recommended:
            advice.append(f"mode: {found.recommended} fits {draft.target}.")
        for stage in draft.stages:
            if stage.name in planned:  # drafts share it: its time and its disk count once
                continue
            status = statuses[stage.name]
            idle = status.state in ("done", "not needed")
            hours = 0.0 if idle else _hours(stage, column, shape, recipe, machine)
            memory = column.memory.get({"answers": "eval", "calibrate": "eval"}.get(stage.kind, stage.kind))
            if stage.kind == "answers" and recipe.answers.base_url:
                memory = None
            planned[stage.name] = PlannedStage(stage, status, hours, memory)
            sizes = _sizes(stage, column)
            for name, size in sizes.items():
                disk[name] = disk.get(name, 0.0) + size
            if not idle:
                missing += max(0.0, sum(sizes.values()) - size_of(stage.place))
        if draft.variant in ("", next(iter(recipe.drafts), "")) and (size := column.disk.get("target")):
            disk[f"weights of {draft.target}"] = size
            missing += size
    if missing > machine.disk_bytes:
        problems.append(
            f"The recipe needs {size_text(missing)} more, and the disk of {machine.title} has "
            f"{size_text(machine.disk_bytes)}."
        )
    if recipe.gpus and recipe.gpus > machine.gpus:
        problems.append(f"{recipe.gpus} GPUs are asked for, and {machine.title} has {machine.gpus or 'none'}.")
        advice.append("Name the machine it will run on (machine: h100x8), or leave out gpus.")
    return RecipePlan(
        recipe,
        machine,
        drafts,
        tuple(planned.values()),
        disk,
        missing,
        tuple(dict.fromkeys(said)),
        tuple(problems),
        tuple(dict.fromkeys(advice)),
        assumptions(machine, _eval_prompts(recipe)),
    )


def _machine(recipe: Recipe) -> Machine:
    """The one the plan is for; fewer of its GPUs where the recipe says so."""
    folder = next(folder for folder in (recipe.out, *recipe.out.absolute().parents) if folder.is_dir())
    found = machine_called(recipe.machine, folder)
    return dataclasses.replace(found, gpus=recipe.gpus) if recipe.gpus and recipe.gpus < found.gpus else found


def _workload(recipe: Recipe, draft: DraftStages) -> Workload:
    """How much data there will be, by the answers where they are there, else by the prompts."""
    config, checkpoint = draft.config, Checkpoint.of(draft.config.target)
    positions = checkpoint.read_spec().max_position_embeddings
    answers = draft.get("answers")
    file = answers.place if answers else one_file(recipe.asked)
    share = recipe.held_out if isinstance(recipe.held_out, float) else 0.0
    if answers is None or (file.is_file() and Ledger(recipe.out).statuses([answers])[answers.name].state == "done"):
        return from_file(file, tokenizer_in(checkpoint)[0], config.data, positions)
    return _from_prompts(recipe, config, positions, share)


def _from_prompts(recipe: Recipe, config: RunConfig, positions: int, held_out: float) -> Workload:
    count = answers = characters = 0
    for prompt in read_prompts(one_file(recipe.asked)):
        if isinstance(prompt, Prompt):
            count += 1
            answers += len(prompt.turns)
            characters += sum(len(message.content) for turn in prompt.turns for message in turn)
    each = min(recipe.answers.expected_tokens, recipe.answers.max_tokens)
    written = answers / count * each
    read = characters / count / CHARACTERS_PER_TOKEN
    mean = max(1, min(round(written + read), config.data.max_length, positions))
    samples = max(1, round(count * (1 - held_out)))
    found = from_numbers(samples, mean, config.data, positions, min(1.0, written / (written + read)))
    text = (
        f"{named(recipe.asked)}: {samples:,} prompts, answers assumed to have {each:,} tokens (answers.expected_tokens)"
    )
    return dataclasses.replace(found, source=text)


def _eval_prompts(recipe: Recipe) -> int:
    """How many are measured on, at most; as many as `nds plan` counts where all held-out ones are."""
    return recipe.eval_prompts or ASSUMED.eval_prompts


def _hours(stage: Stage, column: ModeNeeds, shape: Shape, recipe: Recipe, machine: Machine) -> float:
    share = _eval_prompts(recipe) / ASSUMED.eval_prompts
    if stage.kind == "calibrate":
        return share * needs.calibration_seconds(shape, stage.config.eval, machine) / 3600
    if stage.kind == "train" and recipe.train_hours:
        return min(recipe.train_hours, column.hours["train"])
    return column.hours.get(stage.kind, 0.0) * (share if stage.kind == "eval" else 1.0)


def _sizes(stage: Stage, column: ModeNeeds) -> dict[str, float]:
    """Bytes on the disk by what they are."""
    kinds = {
        "cache": {"caches": ["cache"]},
        "train": {
            "checkpoints": ["checkpoints"],
            "drafts": ["draft"],
            "tokenised samples": ["tokens"],
            "caches": ["cache"] if "tokens" in column.disk else [],
        },
        "export": {"exports": ["draft"]},
    }
    sizes = {
        name: sum(column.disk.get(part, 0.0) for part in parts) for name, parts in kinds.get(stage.kind, {}).items()
    }
    return {name: size for name, size in sizes.items() if size}
