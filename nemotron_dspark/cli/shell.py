"""What every command shares: how it is registered, its consoles and tables, `--json`, and the two-sentence complaint.

`command` makes a command of a plain function. The options that put a configuration together (`--target`, `--config`,
`--set` and flags that stand for a key, such as `--taps`) are written here once; the function gets the `RunConfig`.
"""

import dataclasses
import inspect
import json
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from nemotron_dspark.config import RunConfig, load_config
from nemotron_dspark.errors import InputError, NdsError

if TYPE_CHECKING:
    from nemotron_dspark.cache.build import BuildProgress

out = Console(highlight=False)  # results; nothing but one JSON object under --json
err = Console(stderr=True, highlight=False)  # progress, warnings, complaints
LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal


@dataclasses.dataclass
class State:
    debug: bool = False
    json: bool = False  # the running command prints one JSON object
    options: tuple[str, ...] = ()  # those of the running command that made its configuration, as they were given


state = State()


@dataclasses.dataclass(frozen=True)
class KeyOption:
    """A flag that stands for a key of the configuration; its help is the key's own."""

    flag: str
    key: str  # section.key

    @property
    def name(self) -> str:
        return f"{self.flag.strip('-').replace('-', '_')}_given"  # --from is a flag, and no name

    def parameter(self) -> inspect.Parameter:
        section, key = self.key.split(".")
        field = type(getattr(RunConfig(), section)).model_fields[key]
        if field.annotation is bool:
            option = Annotated[bool, typer.Option(self.flag, help=f"{_sentence(field.description)} ({self.key}).")]
            return _parameter(self.name, option, False)
        option = Annotated[str | None, typer.Option(self.flag, help=f"{_sentence(field.description)} ({self.key}).")]
        return _parameter(self.name, option, None)


TAPS = KeyOption("--taps", "draft.taps")
FROM = KeyOption("--from", "train.init")
INFERENCE_GPUS = KeyOption("--inference-gpus", "train.inference_gpus")
STREAM = KeyOption("--stream", "target.stream")
TRUST = KeyOption("--trust-remote-code", "target.trust_remote_code")

_TARGET_HELP = "Hub id, local folder or alias of the target."
_CONFIG_OPTIONS = {
    "config_file": Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with sections of keys.")],
    "assignments": Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")],
}
DRAFT = typer.Option("--draft", "-d", help="Folder of a trained draft; the target's newest here.")
WORKLOADS = typer.Option(
    "--prompts",
    "-p",
    help="JSON lines of prompts that no draft has seen, without it those held out; repeated, each a workload.",
)
LIMIT = typer.Option("--limit", min=1, help="Use the first N prompts of each --prompts.")
CONTEXT_LENGTHS = typer.Option(
    "--context-lengths",
    metavar="N,N,…",
    help="Measure by length of the context: prompts made so many tokens long by others before them.",
)
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def command(
    app: typer.Typer,
    name: str | None = None,
    *,
    target: Literal["required", "optional", "none"] = "required",
    keys: Sequence[KeyOption] = (),
    show: Callable[[Any], None] | None = None,
    failed: Callable[[Any], int] = lambda report: 0,
) -> Callable[[Callable[..., Any]], None]:
    """Register a function as a command of ``app``, and print what it returns.

    A first parameter of type `RunConfig` gets the configuration of the options that ``target`` and ``keys`` ask for;
    one of type ``Callable[[], RunConfig]`` gets a function that reads it, for a command that does something before. The
    report is printed by ``show``, or under `--json` as its ``to_json()``; then ``failed`` of it is the exit code.
    """

    def register(function: Callable[..., Any]) -> None:
        # typer reads a signature: the function's own, with the options that make its configuration in place of that.
        own = list(inspect.signature(function).parameters.values())
        wants = own[0].name if own and own[0].annotation in (RunConfig, Callable[[], RunConfig]) else None
        flags = [*keys, TRUST] if target != "none" else list(keys)

        def run(**given: Any) -> None:
            state.json = given.pop("as_json")
            values = {option.key: value for option in flags if (value := given.pop(option.name, None))}
            if wants:
                values |= {"target.name": name} if (name := given.pop("target", None)) else {}
                file = given.pop("config_file")
                assignments = given.pop("assignments") or ()

                state.options = tuple(_as_given(file, assignments, values, flags))  # without the target

                def read_config() -> RunConfig:
                    config = load_config(file=file, assignments=assignments, **nested(values))
                    if config.target.name is not None:
                        quiet_libraries()
                    return config

                given[wants] = read_config() if own[0].annotation is RunConfig else read_config
            try:
                report = function(**given)
                if report is None:
                    return
                present(report, show)
            finally:  # a test, or a notebook, may run several commands in one process
                state.json = False
            if code := failed(report):
                raise typer.Exit(code)

        parameters = own[bool(wants) :]
        if wants:
            parameters += [option.parameter() for option in flags]
            parameters += [_parameter(key, option, None) for key, option in _CONFIG_OPTIONS.items()]
            if target == "required":
                option = Annotated[str, typer.Option("--target", "-t", help=_TARGET_HELP)]
                parameters.insert(0, _parameter("target", option, inspect.Parameter.empty))
            elif target == "optional":
                option = Annotated[str | None, typer.Option("--target", "-t", help=_TARGET_HELP)]
                parameters.insert(0, _parameter("target", option, None))
        parameters.append(_parameter("as_json", _JSON, False))
        keyword = inspect.Parameter.KEYWORD_ONLY
        signature = inspect.Signature([parameter.replace(kind=keyword) for parameter in parameters])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = function.__doc__
        app.command(name or function.__name__)(run)

    return register


def _as_given(
    file: Path | None, assignments: Iterable[str], values: Mapping[str, Any], flags: Iterable[KeyOption]
) -> Iterator[str]:
    yield from ("--config", str(file)) if file else ()
    for text in assignments:
        yield from ("--set", text)
    for option in flags:
        if option.key in values:
            value = values[option.key]
            yield from ("--set", f"{option.key}={'true' if value is True else value}")


def group(app: typer.Typer, name: str, text: str) -> typer.Typer:
    """A command ``name`` of ``app`` that has commands of its own."""
    commands = typer.Typer(no_args_is_help=True, help=text)
    commands.callback()(lambda: None)  # or typer would make a single command of it
    app.add_typer(commands, name=name)
    return commands


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"draft.taps": t} as {"draft": {"taps": t}}."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, leaf = key.split(".")
        sections.setdefault(section, {})[leaf] = value
    return sections


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _sentence(text: str | None) -> str:
    return (text or "")[:1].upper() + (text or "")[1:]


def stop_on_sigterm() -> None:
    """Let SIGTERM end the command as Ctrl-C does: what is finished is kept."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def complain(error: NdsError) -> None:
    err.print(f"[bold red]error:[/] {escape(error.what)}", soft_wrap=True)
    err.print(f"  [bold]do:[/] {escape(error.do)}", soft_wrap=True)


def note(text: str) -> None:
    """A remark on stderr that is no fault."""
    err.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)


class _Notes(logging.Handler):
    """What the package logs, as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def show_log() -> None:
    """Print what the package logs."""
    logger = logging.getLogger("nemotron_dspark")
    if not logger.handlers:
        logger.addHandler(_Notes())
        logger.setLevel(logging.INFO)


def remark(console: Console, label: str, text: str, style: str) -> None:
    """``label: text``, wrapped under itself on a terminal and in one line elsewhere, where it may be searched for."""
    if not console.is_terminal:
        console.print(f"[{style}]{label}:[/] {escape(text)}", soft_wrap=True)
        return
    columns = Table.grid(padding=(0, 1))
    columns.add_column(no_wrap=True)
    columns.add_column(overflow="fold")
    columns.add_row(f"[{style}]{label}:[/]", escape(text))
    console.print(columns)


def duration(option: str, text: str) -> float:
    """Seconds of ``text`` such as 8h, 90m or 45s; `InputError` for anything else."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(s|m|min|h|d)", text.strip())
    seconds = float(found[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}[found[2]] if found else 0.0
    if not seconds:
        raise InputError(f"{option} {text!r} is no duration.", "Write for example 8h, 90m or 45s.")
    return seconds


def numbers(option: str, text: str) -> list[int]:
    """The whole numbers above 0 in ``text``, such as 1,8,32; `InputError` where it is something else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"{option} {text!r} is not a list of numbers.", f"Write for example {option} 16,64,256.")
    return [int(part) for part in parts]


def newest_draft(config: RunConfig) -> Path:
    """The draft that is taken where --draft is not given, which is said; `InputError` where there is none."""
    from nemotron_dspark.recipe import latest

    found = latest.trained(config)
    note(f"--draft is not given: {found.said}.")
    return found.path


def held_out_prompts() -> list[str]:
    """The prompts that are taken where --prompts is not given, which is said; `InputError` where there are none."""
    from nemotron_dspark.recipe import latest

    found = latest.held_out()
    if not found:
        raise InputError(
            "--prompts is not given, and nothing here has held prompts out.",
            "Give JSON lines of prompts that the draft has not seen; `nds data split` holds some out.",
        )
    note(f"--prompts is not given: takes {', '.join(found)}.")
    return found


def several(what: str) -> str:
    """The help of an option that takes what `data.sources.one_file` does."""
    return f"{what}; several files (repeat it), a glob, or a data set org/name[:config][:split]."


def emit(value: Any) -> None:
    """Print ``value`` as one JSON object on stdout; what is not JSON in it by its ``to_json()``, or as text."""
    typer.echo(json.dumps(value, ensure_ascii=False, default=lambda part: getattr(part, "to_json", part.__str__)()))


def present(report: Any, show: Callable[[Any], None] | None, written: Sequence[Path] = ()) -> None:
    """Print ``report``: under `--json` its ``to_json()``, else by ``show``, and which files it was ``written`` to."""
    if state.json:
        emit(report.to_json() if hasattr(report, "to_json") else dataclasses.asdict(report))
        return
    if show is not None:
        show(report)
    if written:
        out.print(f"Written: {escape(', '.join(map(str, written)))}", soft_wrap=True)


def show_rows(rows: Iterable[tuple[str, str | None]], remarks: Iterable[str] = ()) -> None:
    """Labels and values, one a line without those that are None; then ``remarks``, a line each."""
    table = Table.grid(padding=(0, 2))
    for label, value in rows:
        if value is not None:
            table.add_row(label, escape(value))
    out.print(table)
    for sentence in remarks:
        out.print(f"[yellow]{escape(sentence)}[/]", soft_wrap=True)


def share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "none"


class Bars:
    """Progress bars on stderr, one for each thing that is counted; elsewhere than on a terminal a line now and then."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._first: dict[str, int] = {}  # tokens that were there at the first update
        self._told = time.monotonic()

    def update(self, what: str, done: float, total: float | None, *, tokens: int = 0, text: str | None = None) -> None:
        """``tokens`` done so far, if given, become a rate; ``text`` is shown in place of ``what``."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(escape(what), total=total or None, rate="")
            self._first[what] = tokens
        task = self._tasks[what]
        seconds, fresh = self._progress.tasks[task].elapsed or 0.0, tokens - self._first[what]
        rate = f"{fresh / seconds:,.0f} tokens/s" if tokens and seconds > 0.5 else ""
        self._progress.update(task, description=escape(text or what), completed=done, total=total or None, rate=rate)
        if not err.is_terminal and time.monotonic() - self._told > LINE_SECONDS:
            self._told = time.monotonic()
            share_done = f"{done / total:.0%}" if total else f"{done:g}"
            err.print(escape(f"{text or what}: {share_done}{', ' * bool(rate)}{rate}"), soft_wrap=True)


def show_build(bars: Bars, now: "BuildProgress") -> None:
    """Show how far a cache build is."""
    text = None if now.layer is None else f"{now.stage}, layer {now.layer}"
    bars.update(now.stage, now.samples, now.total_samples, tokens=now.tokens, text=text)


@contextmanager
def bars(*, counts: bool = True) -> Iterator[Bars]:
    """Bars while the block runs; with a count unless the steps have none."""
    columns = [TextColumn("{task.description}"), BarColumn(), *([MofNCompleteColumn()] if counts else [])]
    rest = [TextColumn("{task.fields[rate]}"), TimeRemainingColumn()]
    with Progress(*columns, *rest, console=err, disable=not err.is_terminal) as progress:
        yield Bars(progress)


@contextmanager
def measuring() -> Iterator[tuple[Callable[[], None], Callable[[str, int, int], None]]]:
    """Show that the target is loaded and proven, then bars: functions to call when it is, and how far a step is."""
    with err.status("Loading and proving the target") as status, bars() as shown:
        yield status.stop, shown.update


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and advice out of the output; call before importing transformers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
