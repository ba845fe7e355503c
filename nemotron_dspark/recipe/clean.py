"""What of a recipe's files can go: what can be made again and is of no use to anything that is still to be made."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from nemotron_dspark import files
from nemotron_dspark.config.recipe import Recipe
from nemotron_dspark.folders import locked
from nemotron_dspark.recipe.graph import FOLDER, all_stages, drafts_of
from nemotron_dspark.recipe.ledger import Ledger


@dataclasses.dataclass(frozen=True)
class Removable:
    """A file or folder that can go."""

    path: Path
    bytes: int
    why: str


@dataclasses.dataclass(frozen=True)
class CleanReport:
    """What can go, or has gone."""

    removed: bool
    found: tuple[Removable, ...]

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.found)

    def to_json(self) -> dict[str, Any]:
        found = [{"path": str(each.path), "bytes": each.bytes, "why": each.why} for each in self.found]
        return {"removed": self.removed, "bytes": self.bytes, "found": found}


def clean(recipe: Recipe, *, remove: bool = False) -> CleanReport:
    """List, and ``remove``, caches and checkpoints of drafts that are trained, and what was set aside.

    Answers stay: they cost the most. A later run makes again what it then needs.

    Raises:
        EnvironmentFault: a recipe is running in the folder.
    """
    with locked((recipe.out / FOLDER).absolute()):
        ledger = Ledger(recipe.out)
        found = _removable(recipe, ledger)
        if remove:
            for each in found:
                shutil.rmtree(each.path) if each.path.is_dir() else each.path.unlink()
                ledger.forget_aside(each.path)
        return CleanReport(remove, tuple(found))


def _removable(recipe: Recipe, ledger: Ledger) -> list[Removable]:
    found = []
    stages = list(all_stages(drafts_of(recipe)))
    statuses = ledger.statuses(stages)
    trained = [stage for stage in stages if stage.kind == "train" and statuses[stage.name].state == "done"]
    for stage in stages:
        users = [user for user in stages if stage in user.before]
        mine = ledger.record(stage) is not None
        if stage.kind == "cache" and mine and stage.place.is_dir() and all(user in trained for user in users):
            found.append((stage.place, "hidden states; the drafts on them are trained"))
    for stage in trained:
        if (folder := stage.place / "checkpoints").is_dir():
            found.append((folder, "checkpoints of a run that is finished"))
    parts, answers = recipe.out / FOLDER / "answers", [stage for stage in stages if stage.kind == "answers"]
    if parts.is_dir() and all(statuses[stage.name].state in ("done", "not needed") for stage in answers):
        found.append((parts, "answers by temperature; all of them lie together in answers/"))
    found += [(path, "set aside, because what it was made from has changed") for path in ledger.set_aside()]
    return [Removable(path, files.size_of(path), why) for path, why in found]
