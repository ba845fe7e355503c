"""Run a recipe: each stage through `stages`, resumed or skipped by what is there, then the report.

A stage is called as its own command calls it, so whatever it resumes alone it resumes here. The ledger says what may be
skipped; a kill between a stage and its record means that the stage is called once more, and finds its work done.
"""

import dataclasses
import importlib.util
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

from nemotron_dspark import files
from nemotron_dspark.config.recipe import RECIPE_FILE, Recipe, as_yaml_values, load_recipe
from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.folders import is_locked, locked
from nemotron_dspark.recipe import page
from nemotron_dspark.recipe.dry_run import RecipePlan, dry_run
from nemotron_dspark.recipe.graph import FOLDER, KINDS, DraftStages, Kind, Stage, all_stages, drafts_of
from nemotron_dspark.recipe.ledger import Ledger, Record, Status, refusals
from nemotron_dspark.recipe.work import RecipeProgress, Work, config_file
from nemotron_dspark.training.metrics import read_metrics

REPORT = "report.html"


@dataclasses.dataclass(frozen=True)
class RecipeResult:
    """A recipe that was run, to its end or to the stage that was asked for."""

    out: Path
    drafts: tuple[DraftStages, ...]
    records: dict[str, Record]  # by a stage's name
    report: Path | None  # None where the run ended before
    refused: tuple[str, ...]  # what was asked for and cannot be made, in two sentences each

    @property
    def trained(self) -> tuple[DraftStages, ...]:
        """The drafts that are there; a run that ended before its training has none."""
        return tuple(draft for draft in self.drafts if (draft.folder / "config.json").is_file())

    def measured(self, draft: DraftStages) -> str:
        """The sentence on its evaluation; empty where it has none."""
        record = self._evaluation(draft)
        return record.said if record and record.done else ""

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "report": self.report and str(self.report),
            "refused": self.refused,
            "drafts": [self._draft(draft) for draft in self.drafts],
            "seconds": {name: record.seconds for name, record in self.records.items()},
        }

    def _draft(self, draft: DraftStages) -> dict[str, Any]:
        record = self._evaluation(draft)
        found = {"target": draft.target, "variant": draft.variant, "draft": str(draft.folder)}
        return found | {"evaluation": record.result if record else None}

    def _evaluation(self, draft: DraftStages) -> Record | None:
        stage = draft.get("eval")
        return self.records.get(stage.name) if stage else None


def run_recipe(
    recipe: Recipe | Path | str, *, until: Kind | None = None, progress: RecipeProgress | None = None
) -> RecipeResult:
    """Go through all stages of ``recipe``, or those up to ``until``, and write ``report.html`` when all are done.

    The same call goes on where an earlier one ended, however that ended. What was made from inputs that have changed
    since is set aside and made again.

    Raises:
        InputError: an input is missing or wrong, or a folder holds what the recipe did not make.
        EnvironmentFault: the disk or a package is missing, or another process runs a recipe in the folder.
        and whatever a stage raises; what was made before stays there.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    own = recipe.out / FOLDER
    with locked(own.absolute()) as lock:
        drafts = drafts_of(recipe)
        ledger = Ledger(recipe.out)
        found = list(all_stages(drafts))
        statuses = ledger.statuses(found)
        last = KINDS.index(until) if until else len(KINDS)
        left = [
            stage for stage in found if statuses[stage.name].state not in ("done", "not needed") and _upto(stage, last)
        ]
        for stage in left:
            ledger.check(stage, statuses)
        if left:
            _check_gpus(recipe, left)
            _check_packages(recipe, left)
            _check_disk(recipe, dry_run(recipe))
        files.write_text(own / RECIPE_FILE, yaml.safe_dump(dict(as_yaml_values(recipe)), sort_keys=False))
        for draft in drafts:
            configuration = yaml.safe_dump(draft.config.model_dump(mode="json"), sort_keys=False)
            files.write_text(config_file(recipe.out, draft.run), configuration)
        tell = progress or RecipeProgress()
        tell.begin(found, ledger)
        work = Work(recipe, ledger, tell, lock)
        for stage in left:
            work.do(stage, statuses[stage.name])
        records = _records(ledger, found)
        report = None
        if until is None:
            report = recipe.out / REPORT
            page.write(report, recipe, drafts, records)
    asked = {stage.name: records[stage.name] for stage in found if stage.name in records and _upto(stage, last)}
    return RecipeResult(recipe.out, drafts, records, report, refusals(asked))


@dataclasses.dataclass(frozen=True)
class RecipeStatus:
    """Where a recipe stands; ``notes`` are of stages that are under way."""

    stages: tuple[Stage, ...]
    statuses: dict[str, Status]
    records: dict[str, Record]
    notes: dict[str, str]
    running: bool  # a process runs a recipe in the folder now
    report: Path | None

    @property
    def sentence(self) -> str:
        left = sum(status.state not in ("done", "not needed") for status in self.statuses.values())
        done = f"{len(self.stages) - left} of {len(self.stages)} stages are done"
        if self.running:
            return f"{done}; a process is at work in this folder."
        if left:
            return f"{done}. Go on with `nds recipe run`."
        return f"{done}. The report is {self.report}." if self.report else f"{done}."

    def to_json(self) -> dict[str, Any]:
        rows = []
        for stage in self.stages:
            record = self.records.get(stage.name)
            row = {"stage": stage.name, "place": str(stage.place)} | dataclasses.asdict(self.statuses[stage.name])
            rows.append(row | {"seconds": record.seconds if record else 0.0, "note": self.notes.get(stage.name, "")})
        return {"stages": rows, "running": self.running, "report": self.report and str(self.report)}


def recipe_status(recipe: Recipe) -> RecipeStatus:
    """Where ``recipe`` stands. It may be running meanwhile.

    Raises:
        InputError: a file that is given is missing.
    """
    ledger = Ledger(recipe.out)
    found = tuple(all_stages(drafts_of(recipe)))
    statuses = ledger.statuses(found)
    notes = {}
    for stage in found:
        if stage.kind == "train" and statuses[stage.name].state == "begun" and (lines := read_metrics(stage.place)):
            notes[stage.name] = f"step {lines[-1]['step']:,}, loss {lines[-1]['loss']:.3f}"
    path = recipe.out / REPORT
    report = path if path.is_file() else None
    running = is_locked((recipe.out / FOLDER).absolute())
    return RecipeStatus(found, statuses, _records(ledger, found), notes, running, report)


def _records(ledger: Ledger, found: Iterable[Stage]) -> dict[str, Record]:
    return {stage.name: record for stage in found if (record := ledger.record(stage)) is not None}


def _upto(stage: Stage, last: int) -> bool:
    return KINDS.index(stage.kind) <= last


def _check_gpus(recipe: Recipe, left: Iterable[Stage]) -> None:
    """`EnvironmentFault` if there are fewer GPUs than the recipe asks for."""
    there = torch.cuda.device_count()
    if recipe.gpus and recipe.gpus > there and any(stage.kind in ("cache", "train") for stage in left):
        raise EnvironmentFault(
            f"The recipe asks for {recipe.gpus} GPUs, and this machine has {there or 'none'}.",
            "Leave out gpus, or run it where they are; with --dry-run it is only planned.",
        )


def _check_packages(recipe: Recipe, left: Iterable[Stage]) -> None:
    """`EnvironmentFault` if a stage would find a package missing, hours later."""
    kinds = {stage.kind for stage in left}
    wanted = {"openai": "data"} if "answers" in kinds else {}
    if "answers" in kinds and not recipe.answers.base_url:
        wanted |= {"fastapi": "serve", "uvicorn": "serve", "prometheus_client": "serve"}
    if any(stage.format == "gguf" for stage in left):
        wanted |= {"gguf": "gguf"}
    for package, extra in wanted.items():
        if importlib.util.find_spec(package) is None:
            stage = "export to gguf" if package == "gguf" else "answers"
            raise EnvironmentFault(
                f"The stage {stage} needs the package {package.replace('_', '-')}, which is not installed.",
                f"Run: pip install 'nemotron-dspark[{extra}]'.",
            )


def _check_disk(recipe: Recipe, planned: RecipePlan) -> None:
    """`EnvironmentFault` if the disk has no room for what is left to make; the plan is kept for the report."""
    free = shutil.disk_usage(recipe.out).free
    if planned.missing > free:
        clean = " `nds recipe clean` says what can go."
        raise EnvironmentFault(
            f"By the plan the recipe needs {files.size_text(planned.missing)} more on the disk, and {recipe.out} has "
            f"{files.size_text(free)} free.",
            "Free some, take a mode that needs less (mode: compact, rolling or online), or give another out." + clean,
        )
    path = recipe.out / FOLDER / page.PLAN
    before = files.read_json(path) if path.is_file() else {}
    hours = {each.stage.name: each.hours for each in planned.stages if each.hours}
    files.write_json(path, {"machine": planned.machine.title, "hours": before.get("hours", {}) | hours})
