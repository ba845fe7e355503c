"""The next sensible command, from what is in the folder: what `nds` alone shows.

It only looks at names and small files, and imports nothing heavy: it answers at once.
"""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from nemotron_dspark.config.recipe import RECIPE_FILE

_EXAMPLE = "nvidia/Nemotron-H-8B"


@dataclasses.dataclass(frozen=True)
class Way:
    """What is here, the command that comes next, and others that make sense."""

    here: str
    next: str
    why: str
    others: tuple[tuple[str, str], ...] = ()  # command, what for


def way_on() -> Way:
    """The way on from the folder that it is called in."""
    ways = (_recipe, _run, _cache, _answers, _prompts, _demo)
    return next(filter(None, (way() for way in ways)), None) or _nothing()


def _recipe() -> Way | None:
    files = (Path(RECIPE_FILE), Path("recipe", RECIPE_FILE))
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        return None
    command = "nds recipe run"  # it finds both files by itself
    records = _json(Path("recipe", "state.json")).get("records", {})
    if not records:
        others = ((command, "answers, cache, train, eval, calibrate, export"),)
        return Way(f"A recipe: {file}.", f"{command} --dry-run", "says what it would do, with disk and hours", others)
    done = sum(bool(record.get("done")) for record in records.values())
    others = (("nds recipe status", "where each stage stands"), ("nds recipe clean", "what can go from the disk"))
    if done == len(records) and Path("report.html").is_file() and (run := _newest_run()):
        return Way(f"A recipe that is finished, and its report.html: {file}.", _serve(run), "serves the draft", others)
    here = f"A recipe with {done} of its stages done: {file}."
    return Way(here, command, "goes on where it stopped", others)


def _run() -> Way | None:
    run = _newest_run()
    if run is None:
        return None
    target = shlex.quote(_target(run))
    if not (run / "draft" / "config.json").is_file():
        return Way(f"A run that is not finished: {run}.", _train(run), "goes on from its last checkpoint")
    prompts = held_out_file() or Path("held_out.jsonl")
    evaluate = f"nds eval --target {target} --draft {shlex.quote(str(run / 'draft'))}"
    evaluate += f" --prompts {shlex.quote(str(prompts))} --out {shlex.quote(str(run / 'eval'))}"
    if (run / "eval" / "eval.json").is_file():
        others = ((evaluate, "measures it again"), (f"nds export --target {target} --to vllm", "for another engine"))
        return Way(f"A trained draft that was measured: {run / 'draft'}.", _serve(run), "serves it", others)
    others = ((_serve(run), "serves it"),)
    return Way(f"A trained draft: {run / 'draft'}.", evaluate, "measures it on prompts it has not seen", others)


def _cache() -> Way | None:
    manifests = [*Path().glob("caches/*/manifest.json"), *Path().glob("*/manifest.json")]
    path = max(manifests, key=_age, default=None)
    target = _json(path).get("target_model_name_or_path") if path else None
    if path is None or target is None:
        return None
    command = f"nds train --target {shlex.quote(target)}"
    return Way(f"A cache of {target}: {path.parent}.", command, "trains a draft on it")


def _answers() -> Way | None:
    path = max([*Path().glob("answers/*.jsonl"), *Path().glob("answers.jsonl")], key=_age, default=None)
    if path is None:
        return None
    train = f"nds recipe run --target {_EXAMPLE} --data {shlex.quote(str(path))}"
    others = ((f"nds data check --target {_EXAMPLE} {shlex.quote(str(path))}", "what of them can be used"),)
    return Way(f"Answers: {path}.", f"{train} --dry-run", "plans a draft of their target (put its name there)", others)


def _prompts() -> Way | None:
    # by name, or as `nds data prompts` and `nds data split` write them
    patterns = ("*prompts*.jsonl", "*/train.jsonl", "prompts/*/train.jsonl")
    path = max((path for pattern in patterns for path in Path().glob(pattern)), key=_age, default=None)
    if path is None:
        return None
    command = f"nds recipe run --target {_EXAMPLE} --prompts {shlex.quote(str(path))}"
    if path.name == "train.jsonl" and (held_out := path.with_name("held_out.jsonl")).is_file():
        command += f" --held-out {shlex.quote(str(held_out))}"
    others = ((command, "the same, done"), (f"nds inspect --target {_EXAMPLE}", "what a target is"))
    return Way(f"Prompts: {path}.", f"{command} --dry-run", "plans a draft for a target (put its name there)", others)


def _demo() -> Way | None:
    path = max(Path().glob("runs/*/demo.json"), key=_age, default=None)
    if path is None or not (path.parent / "run" / "draft" / "config.json").is_file():
        return None
    run = path.parent / "run"
    others = tuple((command, why) for command, why in _nothing().others if not command.startswith("nds demo"))
    return Way(f"The demo's draft: {run / 'draft'}.", _serve(run), "serves it, with a page to look at", others)


def _nothing() -> Way:
    others = (
        ("nds demo", "the whole recipe on this machine in five minutes, from nothing"),
        ("nds inspect --list", "the targets that are known by name"),
        ("nds data prompts --preset chat --out prompts/chat", "prompts from open data sets"),
        (f"nds recipe run --target {_EXAMPLE} --prompts prompts.jsonl", "a draft for a target, from your prompts"),
    )
    return Way("Nothing of nds is in this folder.", "nds doctor", "says whether this machine is ready", others)


def held_out_file() -> Path | None:
    """The newest prompts that `nds data prompts` or `nds data split` has held out here."""
    patterns = ("held_out.jsonl", "*/held_out.jsonl", "prompts/*/held_out.jsonl")
    return max((path for pattern in patterns for path in Path().glob(pattern)), key=_age, default=None)


def _newest_run() -> Path | None:
    path = max([*Path().glob("runs/*/run.json"), *Path().glob("*/run.json")], key=_age, default=None)
    return path.parent if path else None


def _serve(run: Path) -> str:
    draft = shlex.quote(str(run / "draft"))
    return f"nds serve --target {shlex.quote(_target(run))} --draft {draft}"


def _train(run: Path) -> str:
    read_from = Path(_json(run / "run.json").get("read_from", "answers.jsonl"))
    source = f"--cache {shlex.quote(str(read_from))}" if read_from.is_dir() else f"--data {shlex.quote(str(read_from))}"
    config = f" --config {shlex.quote(str(run / 'config.yaml'))}"
    return f"nds train --target {shlex.quote(_target(run))}{config} {source} --out {shlex.quote(str(run))}"


def _target(run: Path) -> str:
    try:
        return str(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["target"]["name"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return _EXAMPLE


def _json(path: Path | None) -> dict[str, Any]:
    """The object in a file; an empty one where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _age(path: Path) -> float:
    return path.stat().st_mtime
