"""What a recipe has done in its folder, and whether that still is what it asks for: `recipe/state.json`.

A record says what a file or folder was made from. Where that has changed, what is there is not deleted: it is set aside
under its fingerprint, and taken back when the recipe asks for it again. Renames come before the record that tells of
them, and every step can be repeated, so a kill between two of them does no harm.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from nemotron_dspark import files
from nemotron_dspark.cache.layout import MANIFEST
from nemotron_dspark.drafts import temperatures
from nemotron_dspark.errors import InputError
from nemotron_dspark.folders import first_difference
from nemotron_dspark.recipe.graph import FOLDER, KINDS, Kind, Stage

_MADE: dict[Kind, str] = {  # what is there when a stage is finished, in its place
    "split": "train.jsonl",
    "cache": MANIFEST,
    "train": "draft/config.json",
    "eval": "eval.json",
    "calibrate": temperatures.FILE,
}
_CHECKED: tuple[Kind, ...] = ("answers", "cache", "train")  # that see for themselves whether what they find is theirs
_ENDS: tuple[Kind, ...] = ("train", "eval", "calibrate", "export")  # what a recipe is run for
_DIGEST = re.compile("[0-9a-f]{32,64}")

State = Literal["done", "begun", "again", "found", "to do", "not needed"]


@dataclasses.dataclass
class Record:
    """What is known of a stage's file or folder."""

    fingerprint: str
    depends_on: dict[str, Any]
    done: bool = False
    seconds: float = 0.0  # of all calls that ended by themselves
    said: str = ""  # the last sentence on it
    result: dict[str, Any] = dataclasses.field(default_factory=dict)  # "refused": why it cannot be made


@dataclasses.dataclass(frozen=True)
class Status:
    """Where a stage stands; ``why`` is empty where that needs no word."""

    state: State
    why: str = ""


class Ledger:
    """The records of one folder."""

    def __init__(self, out: Path):
        self.out = out
        self._path = out / FOLDER / "state.json"
        known = files.read_json(self._path) if self._path.is_file() else {}
        self._records = _records(known.get("records", {}))
        self._aside = {name: _records(records) for name, records in known.get("aside", {}).items()}

    def record(self, stage: Stage) -> Record | None:
        return self._records.get(self._key(stage))

    def statuses(self, stages: Iterable[Stage]) -> dict[str, Status]:
        """The status of each stage by name. Of those that only others need, one that none of them needs is not run."""
        found = {stage.name: (stage, self._status(stage)) for stage in stages}
        needed = {name for name, (stage, status) in found.items() if stage.kind in _ENDS and status.state != "done"}
        for name, (stage, _) in reversed(found.items()):  # a stage comes after those it takes something from
            if name in needed:
                needed |= {before.name for before in stage.before}
        return {
            name: status if status.state == "done" or name in needed else Status("not needed", _NOT_NEEDED)
            for name, (stage, status) in found.items()
        }

    def claim(self, stage: Stage) -> Record:
        """Make the stage's place its own: what was made from something else is set aside, and its own is taken back.

        Raises:
            InputError: there is something that no recipe made.
        """
        key, record = self._key(stage), self.record(stage)
        if record is not None and record.fingerprint != stage.fingerprint:
            self._set_aside(key, record)
            record = None
        self._take_back(key, stage)
        record = self.record(stage)
        if record is None:
            self.check(stage, {})
            record = self._records[key] = Record(stage.fingerprint, stage.depends_on)
            self.save()
        return record

    def check(self, stage: Stage, statuses: Mapping[str, Status]) -> None:
        """`InputError` if the stage's place holds what no recipe made, and what goes by none of ``statuses``."""
        train = stage.get("train")
        if train and train.name in statuses and statuses[train.name].state == "again":
            return  # it is set aside with the run that it lies in
        if self.record(stage) is None and stage.place.exists() and stage.kind not in _CHECKED:
            raise InputError(
                f"{stage.place} is there already, and no recipe made it.", "Move it away, or give another --out."
            )

    def save(self) -> None:
        values = {
            "records": _plain(self._records),
            "aside": {name: _plain(records) for name, records in self._aside.items()},
        }
        files.write_json(self._path, values)

    def set_aside(self) -> list[Path]:
        """Files and folders that lie aside."""
        folder = self.out / FOLDER / "aside"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def forget_aside(self, path: Path) -> None:
        """Forget ``path`` of `set_aside`, which was removed."""
        self._aside.pop(path.name, None)
        self.save()

    def _status(self, stage: Stage) -> Status:
        record = self.record(stage)
        if record is not None and record.fingerprint != stage.fingerprint:
            why = _reason(record.depends_on, stage.depends_on)
            if self._aside_path(self._key(stage), stage.fingerprint).exists():
                return Status("again", f"{why}; it was set aside before and is taken back")
            return Status("again", f"{why}; what is there is set aside")
        if record is None:
            return Status("found", "made by another command") if stage.place.exists() else Status("to do")
        if record.done:
            return Status("done") if made(stage, record) else Status("to do", f"{stage.place} is gone")
        return Status("begun")

    def _set_aside(self, key: str, record: Record) -> None:
        """Move the place aside, with all that lies in it and the records of that."""
        place, aside = self.out / key, self._aside_path(key, record.fingerprint)
        if place.exists():
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.rename(place, aside)
            files.fsync_folder(aside.parent)
        inside = {name: known for name, known in self._records.items() if name == key or name.startswith(f"{key}/")}
        self._records = {name: known for name, known in self._records.items() if name not in inside}
        self._aside[aside.name] = inside
        self.save()

    def _take_back(self, key: str, stage: Stage) -> None:
        place, aside = self.out / key, self._aside_path(key, stage.fingerprint)
        if place.exists() or not aside.exists():
            return
        self._records |= self._aside.get(aside.name, {})
        self.save()
        place.parent.mkdir(parents=True, exist_ok=True)
        os.rename(aside, place)
        self._aside.pop(aside.name, None)
        self.save()

    def _aside_path(self, key: str, fingerprint: str) -> Path:
        return self.out / FOLDER / "aside" / f"{key.replace('/', '.')}.{fingerprint[:12]}"

    def _key(self, stage: Stage) -> str:
        return stage.place.relative_to(self.out).as_posix()


_NOT_NEEDED = "all that is made from it is there"


def made(stage: Stage, record: Record) -> bool:
    """Whether what the stage makes is there, or cannot be."""
    if "refused" in record.result:
        return True
    return (stage.place / _MADE[stage.kind] if stage.kind in _MADE else stage.place).exists()


def refusals(records: Mapping[str, Record]) -> tuple[str, ...]:
    """What cannot be made, by a stage's name: in two sentences each."""
    return tuple(f"{name}: {text}" for name, record in records.items() if (text := record.result.get("refused")))


def _records(values: dict[str, Any]) -> dict[str, Record]:
    return {name: Record(**known) for name, known in values.items()}


def _plain(records: dict[str, Record]) -> dict[str, Any]:
    return {name: dataclasses.asdict(known) for name, known in records.items()}


def _reason(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Why a stage is made again: the first thing that differs."""
    key, old, new = first_difference(before, now) or ("", None, None)
    if key in KINDS and _DIGEST.fullmatch(str(old)) and _DIGEST.fullmatch(str(new)):
        return f"{key} is made again"
    if key == "conversations":
        return "the prompts or conversations have changed"
    if key == "held_out" and _DIGEST.fullmatch(str(new)):
        return "the held-out prompts have changed"
    if key == "target.weights":
        return "the target's weights have changed"
    return f"{key} was {_value(before, key)}, now it is {_value(now, key)}"


def _value(inputs: Mapping[str, Any], key: str) -> str:
    """What ``inputs`` have at the dotted ``key``; what is not there has its default."""
    for part in key.split("."):
        if part not in inputs:
            return "the default"
        inputs = inputs[part]
    return repr(inputs)
