"""What is already here for a target, so that a stage that is given nothing finds what the one before it made.

Searched are the folder that a command is called in and two levels below it: `caches/`, `answers/` and `runs/` are where
stages write when nothing else is said. The newest counts.
"""

import dataclasses
import datetime
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import yaml

from nemotron_dspark import stages
from nemotron_dspark.cache.layout import MANIFEST, WORK, read_manifest
from nemotron_dspark.config import RunConfig
from nemotron_dspark.config.known import ALIASES, known_target
from nemotron_dspark.config.recipe import RECIPE_FILE
from nemotron_dspark.errors import InputError, NdsError
from nemotron_dspark.files import read_json
from nemotron_dspark.recipe.graph import FOLDER
from nemotron_dspark.recipe.guide import held_out_file
from nemotron_dspark.training.run_folder import RUN_FILE


@dataclasses.dataclass(frozen=True)
class Found:
    """A file or folder that is taken, and a sentence that says so."""

    path: Path
    said: str


def cache_of(config: RunConfig) -> Found | None:
    """The newest finished cache of the target here."""
    manifests = (path for level in ("*", "*/*") for path in Path().glob(f"{level}/{MANIFEST}"))
    return _newest("cache", config, (path for path in manifests if _is_of(config, _target_of_cache, path)))


def answers_of(config: RunConfig) -> Found | None:
    """The newest answers of the target here, by the file's name; else a file `answers.jsonl`, whosever it is."""
    names = {name.lower() for name in _names(config)}
    files = [path for path in Path("answers").glob("*.jsonl") if path.stem.lower() in names]
    if found := _newest("answers", config, files):
        return found
    plain = Path("answers.jsonl")
    if plain.is_file():
        return Found(plain, f"takes {plain}, which does not say whose answers it holds")
    return None


def draft_of(config: RunConfig) -> Found | None:
    """The newest trained draft of the target here."""
    runs = (path for level in ("*", "*/*") for path in Path().glob(f"{level}/{RUN_FILE}"))
    trained = (path.parent / "draft" / "config.json" for path in runs if _is_of(config, _target_of_run, path))
    return _newest("draft", config, (path for path in trained if path.is_file()))


def held_out() -> list[str]:
    """The prompts that the recipe which was run here has kept out of training, else those of the newest split here."""
    path = Path(FOLDER) / "prompts" / "held_out.jsonl"
    if path.is_file():
        return [str(path)]
    recipe = Path(FOLDER) / RECIPE_FILE
    given = (yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("held_out") if recipe.is_file() else None
    if isinstance(given, list):
        return list(map(str, given))
    newest = held_out_file()
    return [str(newest)] if newest else []


def to_train_on(config: RunConfig) -> tuple[Literal["cache", "data"], Found]:
    """A cache of the target, else answers of it.

    Raises:
        InputError: there is neither, and the command that comes first is named; or a cache is begun and not finished.
    """
    if cache := cache_of(config):
        return "cache", cache
    if (default_cache(config) / WORK).is_dir():
        read_manifest(default_cache(config))  # says that it is unfinished
    if answers := answers_of(config):
        return "data", answers
    raise InputError(f"There is neither a cache nor answers of {config.target.named} here.", _first(config))


def answered(config: RunConfig) -> Found:
    """Answers of the target; `InputError` that names the command that comes first."""
    if found := answers_of(config):
        return found
    raise InputError(f"There are no answers of {config.target.named} here.", _first(config))


def trained(config: RunConfig) -> Found:
    """A draft of the target; `InputError` that names the command that comes first."""
    if found := draft_of(config):
        return found
    target = shlex.quote(config.target.named)
    there = cache_of(config) or answers_of(config)
    do = f"Train one with `nds train --target {target}`, or give --draft." if there else _first(config)
    raise InputError(f"There is no trained draft of {config.target.named} here.", do)


def same_target(one: str, other: str) -> bool:
    """Whether two names are of the same target: a folder, or an alias, a repository, or a copy of it."""
    if one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve():
        return True
    known = known_target(one)
    return ALIASES.get(one, one) == ALIASES.get(other, other) or (known is not None and known is known_target(other))


def default_answers(target: str) -> Path:
    """Where answers go when nothing else is said."""
    return Path("answers") / f"{Path(target).name or 'target'}.jsonl"


def default_cache(config: RunConfig) -> Path:
    """Where a cache goes when nothing else is said."""
    return Path("caches") / stages.target_folder_name(config)


def _first(config: RunConfig) -> str:
    target, prompts = shlex.quote(config.target.named), next(iter(prompt_files()), Path("prompts.jsonl"))
    return (
        f"First `nds data regenerate --target {target} --prompts {prompts} --base-url URL`; or all stages at once with "
        f"`nds recipe run --target {target} --prompts {prompts}`. With answers of your own: `--data answers.jsonl`, or "
        f"once `nds cache build --target {target} --data answers.jsonl`."
    )


def prompt_files() -> list[Path]:
    """Files here that are called like prompts."""
    return sorted(Path().glob("*prompts*.jsonl"))


def _newest(what: str, config: RunConfig, paths: Iterable[Path]) -> Found | None:
    path = max(paths, key=lambda path: path.stat().st_mtime, default=None)
    if path is None:
        return None
    made = datetime.datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    place = path if what == "answers" else path.parent
    return Found(place, f"takes {place}, the newest {what} of {config.target.named} here ({made})")


def _is_of(config: RunConfig, read: Callable[[Path], str | None], path: Path) -> bool:
    """Whether the target is what ``read`` finds in ``path``; what cannot be read is nobody's."""
    try:
        name = read(path)
    except (NdsError, OSError, AttributeError, KeyError, TypeError, yaml.YAMLError, UnicodeDecodeError):
        return False
    return name is not None and same_target(config.target.named, name)


def _target_of_cache(manifest: Path) -> str | None:
    return read_json(manifest).get("target_model_name_or_path")


def _target_of_run(run: Path) -> str | None:
    return yaml.safe_load((run.parent / "config.yaml").read_text(encoding="utf-8"))["target"]["name"]


def _names(config: RunConfig) -> Iterator[str]:
    yield stages.target_folder_name(config)
    if known := known_target(config.target.named):
        yield from (Path(name).name for name in (known.repository, *known.aliases))
