"""A recipe: everything from prompts to an exported draft in one YAML file, `recipe.yaml`.

What the stages do is said by a `RunConfig`: the target's preset, then the file that ``config`` names, then ``set``,
then the entry of ``drafts``. The rest says where data comes from, which stages there are, and where they run.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from nemotron_dspark.config.run import RunConfig, Section, load_config, merge, read_assignment, read_yaml
from nemotron_dspark.config.validation import input_error
from nemotron_dspark.errors import InputError

RECIPE_FILE = "recipe.yaml"
Mode = Literal["cached", "compact", "rolling", "online"]
ExportFormat = Literal["deepspec", "vllm", "sglang", "speculators", "modelopt", "gguf"]
Settings = dict[str, dict[str, Any]]  # {"train": {"lr": 1e-4}}: some keys of a `RunConfig`


def _as_list(value: Any) -> Any:
    """One thing, or a list of them."""
    return value if isinstance(value, list | tuple) else () if value is None else (value,)


class AnswersConfig(Section):
    """How the target answers the prompts."""

    base_url: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        (), description="OpenAI-compatible server of the target, with /v1, or several; null = it is loaded here"
    )
    model: str | None = Field(None, description="model name at base_url; null = the server's first")
    temperatures: Annotated[tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(_as_list)] = Field(
        (0.7,), min_length=1, description="sampling temperature; of several, prompts take them in turn"
    )
    top_p: float | None = Field(None, gt=0, le=1, description="nucleus sampling; null = the server's")
    top_k: int | None = Field(None, ge=1, description="most likely tokens to sample from; null = all")
    max_tokens: int = Field(4096, ge=1, description="longest answer; longer ones are kept, cut off")
    concurrency: int = Field(64, ge=1, description="requests at a time to each server")
    expected_tokens: int = Field(500, ge=1, description="mean length of an answer, for the plan alone")


class Recipe(Section):
    """What `nds recipe run` does. Paths are relative to the folder it is called in."""

    target: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        min_length=1, description="hub id, local folder or alias of the target; or a list of them"
    )
    prompts: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        (), description="what the target is asked: files, globs, data sets"
    )
    data: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        (), description="instead of prompts: conversations with the target's own answers"
    )
    held_out: Annotated[float, Field(gt=0, lt=1)] | tuple[str, ...] = Field(
        0.05, description="share kept out of training, for eval and calibrate; or files of other prompts"
    )
    eval_prompts: int | None = Field(128, ge=1, description="of the held-out ones, how many are used; null = all")
    answers: AnswersConfig = AnswersConfig()
    mode: Mode | None = Field(
        None, description="as `nds plan` calls where hidden states lie; null = cached, in the format cache.format"
    )
    config: Path | None = Field(None, description="YAML file of a run's configuration, as --config takes it")
    set: Settings = Field({}, description="keys of a run's configuration by section, above that file")
    drafts: dict[str, Settings | None] = Field(
        {}, description="several drafts of each target by name, each with keys above set; {} = one"
    )
    train_hours: float | None = Field(
        None, gt=0, description="hours a draft may train: as many steps as they hold; null = as train.epochs says"
    )
    calibrate: bool = Field(True, description="make what the draft foretells of its acceptance a probability")
    export: Annotated[tuple[ExportFormat, ...], BeforeValidator(_as_list)] = Field(
        ("vllm",), description="formats that `nds export --to` writes"
    )
    out: Path = Field(Path("."), description="folder of answers/, caches/, runs/, recipe/ and report.html")
    gpus: int | None = Field(None, ge=1, description="GPUs that train, on one machine; null = those that are there")
    machine: str = Field("here", description="machine of the plan, as `nds plan --machine` takes it")
    price: float | None = Field(None, ge=0, description="dollars an hour for the whole machine")

    @field_validator("held_out", mode="before")
    @classmethod
    def _share_or_files(cls, value: Any) -> Any:
        return value if isinstance(value, int | float) else _as_list(value)

    @field_validator("drafts")
    @classmethod
    def _plain_names(cls, drafts: dict[str, Any]) -> dict[str, Any]:
        for name in drafts:
            if not name or not all(letter.isalnum() or letter in "._-" for letter in name) or name.startswith("."):
                raise ValueError(f"{name!r} is to be part of folder names: use letters, digits, . _ and -")
        return drafts

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the drafts of each target; one empty name where there is one draft."""
        return tuple(self.drafts) or ("",)

    @property
    def asked(self) -> tuple[str, ...]:
        """Where data comes from: ``prompts`` or ``data``."""
        return self.prompts or self.data

    def run_config(self, target: str, variant: str = "") -> RunConfig:
        """The configuration of one target and one of its drafts; `InputError` as `load_config`."""
        settings = merge(self.set, self.drafts.get(variant) or {})
        config = load_config(target, file=self.config, **settings)
        if self.mode is not None:
            changed = {"mode": self.mode} if self.mode in ("rolling", "online") else {}
            changed |= {"cached": {"format": "deepspec"}, "compact": {"format": "compact"}}.get(self.mode, {})
            config = config.model_copy(update={"cache": config.cache.model_copy(update=changed)})
        return config

    def mode_of(self, config: RunConfig) -> Mode:
        """``mode``, or what ``config`` of a run makes of it."""
        return self.mode or ("compact" if config.cache.format == "compact" else "cached")


def load_recipe(file: Path | None = None, *, assignments: Iterable[str] = (), **given: Any) -> Recipe:
    """The recipe in ``file``, with the keys ``given`` above its own, ``assignments`` ("train.lr=1e-4") above ``set``.

    Raises:
        InputError: a file is missing or malformed, a key is unknown, a value is out of range, or keys contradict.
    """
    write = "Write one as in docs/recipe.md; `nds recipe run` takes --target and --prompts in its place."
    values = read_yaml(file, write) if file else {}
    where = str(file) if file else "The recipe"
    if given.get("data"):
        values.pop("prompts", None)
    elif given.get("prompts"):
        values.pop("data", None)
    settings = values.get("set") or {}
    for text in assignments:
        settings = merge(settings, read_assignment(text))
    try:
        recipe = Recipe.model_validate({**values, **given, "set": settings})
    except ValidationError as error:
        do = "Correct the value; docs/recipe.md has every key."
        raise input_error(error, where, do, unknown=_nearest) from None
    _check(recipe, where)
    return recipe


def _check(recipe: Recipe, where: str) -> None:
    """`InputError` where keys contradict each other, or a run's configuration is wrong."""
    if bool(recipe.prompts) == bool(recipe.data):
        both = "both prompts and data" if recipe.data else "neither prompts nor data"
        raise InputError(
            f"{where} names {both}.", "Give prompts, which the target answers; or data, which holds its answers."
        )
    if recipe.data and len(recipe.target) > 1:
        raise InputError(
            f"{where} gives data to {len(recipe.target)} targets, and answers are those of one.",
            "Give prompts, which each target answers; or a recipe to each.",
        )
    for target in recipe.target:
        for variant in recipe.variants:
            config = recipe.run_config(target, variant)
            if recipe.train_hours and config.train.max_steps:
                raise InputError(f"{where} gives both train_hours and train.max_steps.", "Give one of them.")


def _nearest(key: str) -> str:
    section, _, leaf = key.partition(".")
    known = list(AnswersConfig.model_fields if section == "answers" and leaf else Recipe.model_fields)
    if section in RunConfig.model_fields and not leaf:
        return f"Keys of a run's configuration stand below `set:`, as in set: {{{section}: …}}."
    close = difflib.get_close_matches(leaf or section, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]}?"
    return "docs/recipe.md has every key."


def as_yaml_values(recipe: Recipe) -> Mapping[str, Any]:
    """Keys that differ from their defaults, as plain values."""
    return recipe.model_dump(mode="json", exclude_defaults=True)
