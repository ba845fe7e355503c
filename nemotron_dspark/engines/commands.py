"""The command that serves a pair with an engine, as `configs/engines/` has it: every flag with its reason.

A flag is given when all traits under its ``when`` hold: of the pair (`Pair.traits`), the machine's name, and ``gpu``.
Values may name ``$target``, ``$draft``, ``$tokens`` (drafted a round), ``$slots``,
``$state``, ``$requests``, ``$context``, ``$host``, ``$port``; for hidden states ``$ids``, ``$folder``, ``$dtype``.
"""

import dataclasses
import functools
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, Literal, get_args

import yaml

from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.engines.hidden_states import layer_ids
from nemotron_dspark.engines.pair import Pair
from nemotron_dspark.errors import InputError
from nemotron_dspark.resources import resource_folder
from nemotron_dspark.targets import Checkpoint

EngineName = Literal["vllm", "sglang", "trtllm", "llamacpp"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
MACHINES = ("dgx-spark", "h100", "cpu")
GGUF_FILES = ("target.gguf", "draft.gguf")  # what llama.cpp is given, in the folder of `--gguf`


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of the command."""

    name: str
    value: str | None  # None: the flag stands alone
    why: str


@dataclasses.dataclass(frozen=True)
class EngineTable:
    """A file of `configs/engines/`: what is known of an engine."""

    title: str
    command: tuple[str, ...]
    version: tuple[str, ...]  # prints its version, or what ``shows`` is looked for in
    install: str
    minimum: Mapping[str, str]  # oldest version by trait of the pair
    read_from: str  # versions and texts that the flags were taken from
    flags: tuple[Mapping[str, Any], ...]
    shows: str | None = None  # what a version that is new enough prints, where versions are not told
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # name to contents, as YAML
    hidden_states: tuple[Mapping[str, Any], ...] = ()  # in place of ``flags``, for a server that writes hidden states


@dataclasses.dataclass(frozen=True)
class EngineCommand:
    """How to serve a pair. ``argv`` is the whole command."""

    engine: EngineName
    title: str
    argv: tuple[str, ...]
    flags: tuple[Flag, ...]
    environment: Mapping[str, str]
    files: Mapping[str, str]  # to be written beside: name to contents
    prepare: tuple[str, ...]  # commands to run once before
    minimum: str
    read_from: str

    @property
    def text(self) -> str:
        """The command for a shell, a flag a line."""
        start = len(self.argv) - sum(1 + (flag.value is not None) for flag in self.flags)
        lines = [shlex.join(self.argv[:start])]
        lines += [shlex.join([flag.name, *([flag.value] if flag.value is not None else [])]) for flag in self.flags]
        variables = "".join(f"{name}={shlex.quote(value)} " for name, value in self.environment.items())
        return variables + " \\\n  ".join(lines)


@functools.cache
def engine_table(engine: EngineName) -> EngineTable:
    """What `configs/engines/` says of ``engine``."""
    values = yaml.safe_load((resource_folder("configs") / "engines" / f"{engine}.yaml").read_text(encoding="utf-8"))
    return EngineTable(**values)


def minimum_version(engine: EngineName, pair: Pair) -> str:
    """The oldest version of ``engine`` that serves the pair."""
    minimum = engine_table(engine).minimum
    return max((minimum[trait] for trait in pair.traits if trait in minimum), key=version_key)


def version_key(text: str) -> tuple[int, ...]:
    """What versions are ordered by; a release candidate comes before its release."""
    release, _, candidate = text.partition("rc")
    numbers = [int("".join(filter(str.isdigit, part)) or 0) for part in release.split("+")[0].split(".")[:3]]
    return (*numbers, *(0,) * (3 - len(numbers)), int(candidate) if candidate.isdigit() else 10**6)


def engine_command(
    engine: EngineName,
    pair: Pair,
    *,
    machine: str | None = None,
    tokens: int | None = None,
    requests: int = 16,
    host: str = "127.0.0.1",
    port: int = 8000,
    gguf: Path | None = None,
) -> EngineCommand:
    """The command that serves ``pair`` with ``engine``; errors of `preflight` are not looked for.

    ``tokens`` drafted a round are the draft's block where not given; ``gguf`` is the folder of llama.cpp's two files.

    Raises:
        InputError: no such machine.
    """
    _check_machine(machine)
    table = engine_table(engine)
    tokens = tokens or pair.draft.block_size
    target, draft, prepare = _exported(engine, pair, gguf)
    state = pair.state_bytes
    values: dict[str, Any] = {
        "target": target,
        "draft": draft,
        "tokens": tokens,
        "slots": tokens + 1,
        "state": f": {state * (tokens + 1) / 1e6:,.0f} MB in fp32" if state else "",
        "requests": requests,
        "context": requests * min(4096, pair.spec.max_position_embeddings),
        "host": host,
        "port": port,
    }
    flags = _chosen(table.flags, pair.traits, machine, values)
    return EngineCommand(
        engine=engine,
        title=table.title,
        argv=_argv(table, flags, values),
        flags=flags,
        environment=table.environment,
        files={name: yaml.safe_dump(_filled(content, values)) for name, content in table.files.items()},
        prepare=prepare,
        minimum=minimum_version(engine, pair),
        read_from=table.read_from,
    )


def hidden_states_command(
    checkpoint: Checkpoint,
    taps: Sequence[int],
    folder: Path,
    *,
    dtype: str,
    max_length: int,
    machine: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> EngineCommand:
    """The command of a vLLM that writes the hidden states of a cache with ``taps`` to ``folder``.

    ``dtype`` is a type's name or "auto"; samples have up to ``max_length`` tokens. `InputError`: no such machine.
    """
    _check_machine(machine)
    spec, table = checkpoint.read_spec(), engine_table("vllm")
    kind = "hybrid" if any(layer.recurrent for layer in spec.layers) else "attention"
    values: dict[str, Any] = {
        "target": spec.name,
        "ids": layer_ids(taps, spec.num_layers),
        "folder": str(folder.absolute()),
        "context": min(max_length + 1, spec.max_position_embeddings),
        "dtype": dtype,
        "host": host,
        "port": port,
    }
    flags = _chosen(table.hidden_states, {kind}, machine, values)
    argv = _argv(table, flags, values)
    return EngineCommand("vllm", table.title, argv, flags, table.environment, {}, (), "0.32.0", table.read_from)


def _check_machine(machine: str | None) -> None:
    if machine is not None and machine not in MACHINES:
        raise InputError(f"There are no flags for a machine {machine!r}.", f"Choose one of {', '.join(MACHINES)}.")


def _chosen(
    rows: Sequence[Mapping[str, Any]], traits: Collection[str], machine: str | None, values: Mapping[str, Any]
) -> tuple[Flag, ...]:
    """The flags whose conditions hold, filled in."""
    holds = frozenset(traits) | ({machine} if machine else set()) | (set() if machine == "cpu" else {"gpu"})
    chosen = [row for row in rows if _all(row.get("when", []), holds)]
    return tuple(Flag(row["flag"], _text(row.get("value"), values), str(_filled(row["why"], values))) for row in chosen)


def _argv(table: EngineTable, flags: Sequence[Flag], values: Mapping[str, Any]) -> tuple[str, ...]:
    arguments = [part for flag in flags for part in (flag.name, flag.value) if part is not None]
    return (*(str(_filled(part, values)) for part in table.command), *arguments)


def _exported(engine: EngineName, pair: Pair, gguf: Path | None) -> tuple[str, str, tuple[str, ...]]:
    """What the engine is given as target and draft, and the commands that make it where it is not what there is."""
    target, draft = pair.target, str(pair.draft_folder)
    kind = {"llamacpp": "gguf", "sglang": "sglang"}.get(engine, "vllm")
    export = ["nds", "export", "--to", kind, "--target", target]
    if engine == "llamacpp":
        files = [str((gguf or pair.draft_folder / kind) / name) for name in GGUF_FILES]
        made = [*export, "--out", files[0]], [*export, "--draft", draft, "--out", files[1]]
        return files[0], files[1], tuple(map(shlex.join, made))
    if pair.kind == "dflash" or (isinstance(pair.draft, DraftConfig) and pair.draft.markov_rank):
        return target, draft, ()  # these three read DeepSpec's own layout
    folder = str(pair.draft_folder / kind)
    return target, folder, (shlex.join([*export, "--draft", draft, "--out", folder]),)


def _all(when: str | list[str], holds: frozenset[str]) -> bool:
    return {when} <= holds if isinstance(when, str) else set(when) <= holds


def _text(value: Any, values: Mapping[str, Any]) -> str | None:
    value = _filled(value, values)
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _filled(value: Any, values: Mapping[str, Any]) -> Any:
    """``value`` with names filled in, also inside; a text that is one name alone becomes what it stands for."""
    if isinstance(value, dict):
        return {key: _filled(item, values) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    return values[value[1:]] if value[:1] == "$" and value[1:] in values else Template(value).substitute(values)
