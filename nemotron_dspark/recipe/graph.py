"""The stages of a recipe: what each makes, where, from what, and how it is told whether that has changed.

A stage's fingerprint is a digest of the settings it depends on, of the files it is given, and of the fingerprints of
the stages before it. So a change anywhere shows in exactly the stages that depend on it. Drafts of one target whose
hidden states would be the same share a cache.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from nemotron_dspark import stages
from nemotron_dspark.cache.build import weights_identity
from nemotron_dspark.config import RunConfig
from nemotron_dspark.config.known import ALIASES
from nemotron_dspark.config.recipe import Recipe
from nemotron_dspark.data.sources import one_file
from nemotron_dspark.files import sha256
from nemotron_dspark.training.run_folder import FREE_KEYS

Kind = Literal["split", "answers", "cache", "train", "eval", "calibrate", "export"]
FOLDER = "recipe"  # in the recipe's folder: what belongs to the recipe alone
KINDS: tuple[Kind, ...] = ("split", "answers", "cache", "train", "eval", "calibrate", "export")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One piece of work of a recipe."""

    kind: Kind
    label: str  # what it is for: a target, or one of its drafts; empty for what all share
    place: Path  # file or folder that it makes
    config: RunConfig
    inputs: dict[str, Any] = dataclasses.field(hash=False)  # settings and digests it depends on
    before: tuple["Stage", ...] = ()  # stages it takes something from
    files: tuple[str, ...] = ()  # what the user gives it
    format: str = ""  # of an export

    @property
    def name(self) -> str:
        """Unique in a recipe."""
        return " ".join(filter(None, (self.kind, self.label, self.format)))

    @property
    def short(self) -> str:
        """Unique among those of its label."""
        return " ".join(filter(None, (self.kind, self.format)))

    @functools.cached_property
    def depends_on(self) -> dict[str, Any]:
        """``inputs`` with the fingerprints of the stages before, as JSON has it."""
        found = self.inputs | {stage.kind: stage.fingerprint for stage in self.before}
        return json.loads(json.dumps(found, default=str))

    @property
    def fingerprint(self) -> str:
        text = json.dumps([self.kind, self.format, self.depends_on], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def get(self, kind: Kind) -> "Stage | None":
        """The stage of ``kind`` that this one takes something from."""
        return next((stage for stage in self.before if stage.kind == kind), None)


@dataclasses.dataclass(frozen=True)
class DraftStages:
    """One target with one of its drafts: the stages that end in it."""

    target: str
    variant: str  # its name in the recipe; empty where there is one draft
    config: RunConfig
    stages: tuple[Stage, ...]

    def get(self, kind: Kind) -> Stage | None:
        return next((stage for stage in self.stages if stage.kind == kind), None)

    @property
    def run(self) -> Stage:
        """The stage that trains it, which every draft has."""
        return next(stage for stage in self.stages if stage.kind == "train")

    @property
    def folder(self) -> Path:
        """Where the trained draft lies."""
        return self.run.place / "draft"

    @property
    def label(self) -> str:
        """Unique in a recipe."""
        return self.run.label


def drafts_of(recipe: Recipe) -> tuple[DraftStages, ...]:
    """Every draft of the recipe with its stages in order; stages that drafts share are the same object.

    Raises:
        InputError: a file that is given is missing, or the configuration is wrong.
    """
    out, found = recipe.out, []
    split = _split(recipe)
    held_out = tuple(recipe.held_out) if not isinstance(recipe.held_out, float) else ()
    names = [stages.target_folder_name(recipe.run_config(target)) for target in recipe.target]
    for target, name in zip(recipe.target, names, strict=True):
        if names.count(name) > 1:  # two owners' targets of one name
            name = target.strip("/").replace("/", "--")
        answers: Stage | None = None
        caches: dict[str, Stage] = {}
        for variant in recipe.variants:
            config = recipe.run_config(target, variant)
            label = _joined(name, variant)
            if recipe.prompts and answers is None:
                answers = _answers(recipe, config, out / "answers" / f"{name}.jsonl", name, split)
            data = answers or split
            cache = None
            if recipe.mode_of(config) in ("cached", "compact"):
                cache = _cache(recipe, config, out / "caches" / (label if caches else name), data)
                cache = caches.setdefault(cache.fingerprint, cache)
            train = _train(recipe, config, out / "runs" / label, label, cache, data)
            last = [_measured("eval", recipe, train, split, held_out)]
            if recipe.calibrate:
                last.append(_measured("calibrate", recipe, train, split, held_out))
            for form in recipe.export:
                last.append(
                    Stage(
                        "export",
                        label,
                        export_place(train.place, form),
                        config,
                        {"format": form},
                        (train,),
                        format=form,
                    )
                )
            chain = tuple(stage for stage in (split, answers, cache, train, *last) if stage)
            found.append(DraftStages(target, variant, config, chain))
    return tuple(found)


def all_stages(drafts: tuple[DraftStages, ...]) -> Iterator[Stage]:
    """Each stage once, in an order in which they can run."""
    seen: set[str] = set()
    for draft in drafts:
        for stage in draft.stages:
            if stage.name not in seen:
                seen.add(stage.name)
                yield stage


def export_place(run: Path, form: str) -> Path:
    """Where a run's draft goes in the format ``form`` when nothing else is said."""
    return run / "export" / (form if form != "gguf" else "draft.gguf")


def _split(recipe: Recipe) -> Stage | None:
    if not isinstance(recipe.held_out, float):
        return None
    inputs = {"conversations": _digest(recipe.asked), "held_out": recipe.held_out}
    return Stage("split", "", recipe.out / FOLDER / "prompts", RunConfig(), inputs, files=recipe.asked)


def _answers(recipe: Recipe, config: RunConfig, place: Path, name: str, split: Stage | None) -> Stage:
    settings = _set(recipe.answers, without={"base_url", "concurrency", "expected_tokens"})
    inputs = {"target": _target(config), "answers": settings, "thinking": config.data.thinking}
    return Stage("answers", name, place, config, inputs | _given(recipe, split), _present(split), _files(recipe, split))


def _cache(recipe: Recipe, config: RunConfig, place: Path, data: Stage | None) -> Stage:
    inputs = {
        "target": _target(config),
        "dtype": config.target.dtype,
        "draft": _set(config.draft, only={"taps", "num_taps", "mask_token_id"}),
        "data": _set(config.data),
        "cache": _set(config.cache, only={"format", "shard_bytes", "batch_tokens"}),
    }
    inputs |= _given(recipe, data)
    return Stage("cache", place.name, place, config, inputs, _present(data), _files(recipe, data))


def _train(
    recipe: Recipe, config: RunConfig, place: Path, label: str, cache: Stage | None, data: Stage | None
) -> Stage:
    inputs: dict[str, Any] = {
        "target": _target(config),
        "draft": _set(config.draft),
        "train": _set(config.train, without=set(FREE_KEYS)),
    }
    if cache is None:
        inputs |= {"data": _set(config.data), "cache": _set(config.cache)} | _given(recipe, data)
    if recipe.train_hours:
        inputs["train_hours"] = recipe.train_hours
    before = _present(cache or data)
    return Stage("train", label, place, config, inputs, before, () if cache else _files(recipe, data))


def _measured(
    kind: Literal["eval", "calibrate"], recipe: Recipe, train: Stage, split: Stage | None, files: tuple[str, ...]
) -> Stage:
    """Evaluation or calibration on the held-out prompts."""
    config = train.config
    inputs: dict[str, Any] = {"eval": _set(config.eval), "prompts": recipe.eval_prompts}
    inputs |= {"thinking": config.data.thinking}
    if files:
        inputs["held_out"] = _digest(files)
    place = train.place / "eval" if kind == "eval" else train.place / "draft" / "calibration"
    return Stage(kind, train.label, place, config, inputs, (train, *_present(split)), files)


def _given(recipe: Recipe, before: Stage | None) -> dict[str, str]:
    return {} if before else {"conversations": _digest(recipe.asked)}


def _files(recipe: Recipe, before: Stage | None) -> tuple[str, ...]:
    return () if before else recipe.asked


def _present(*found: Stage | None) -> tuple[Stage, ...]:
    return tuple(stage for stage in found if stage is not None)


def _set(section: BaseModel, *, only: set[str] | None = None, without: set[str] | None = None) -> dict[str, Any]:
    """Keys that differ from their defaults: a key that a later version adds changes no fingerprint."""
    return section.model_dump(include=only, exclude=without, exclude_defaults=True)


def _joined(*parts: str) -> str:
    return "-".join(filter(None, parts))


def _digest(given: tuple[str, ...]) -> str:
    return sha256(one_file(given))


def _target(config: RunConfig) -> dict[str, Any]:
    """What tells targets apart: the weights of a local one, name and revision of one from the hub."""
    name = config.target.named
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return {"name": name, "weights": weights_identity(folder)}
    return {"name": ALIASES.get(name, name), "revision": config.target.revision}
