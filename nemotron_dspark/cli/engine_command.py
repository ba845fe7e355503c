"""`nds engine`: the command that serves a target and its draft with vLLM, SGLang, TensorRT-LLM or llama.cpp."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig

if TYPE_CHECKING:
    from nemotron_dspark.engines.commands import EngineCommand
    from nemotron_dspark.engines.preflight import Problem

_ENGINES = "vllm, sglang, trtllm or llamacpp."


def register(app: typer.Typer) -> None:
    shell.command(app, keys=[shell.TAPS], show=_show)(engine)


@dataclasses.dataclass(frozen=True)
class EngineReport:
    command: "EngineCommand"
    warnings: "tuple[Problem, ...]"

    def to_json(self) -> dict[str, Any]:
        warnings = [{"what": found.what, "do": found.do} for found in self.warnings]
        return dataclasses.asdict(self.command) | {"warnings": warnings}


def engine(
    config: RunConfig,
    name: Annotated[str, typer.Argument(metavar="ENGINE", help=_ENGINES)],
    draft: Annotated[Path | None, typer.Option("--draft", "-d", help="Folder of a trained draft.")] = None,
    hidden_states: Annotated[
        Path | None,
        typer.Option("--hidden-states", help="vllm, instead of --draft: write those of the taps to this folder."),
    ] = None,
    machine: Annotated[str | None, typer.Option(help="dgx-spark, h100 or cpu; flags known for it are added.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens drafted a round; the draft's block.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests answered at once.")] = 16,
    host: Annotated[str, typer.Option(help="Address the engine listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port the engine listens on.")] = 8000,
    gguf: Annotated[Path | None, typer.Option(help="Folder of llama.cpp's two files; DRAFT/gguf.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Start it, if it is installed.")] = False,
) -> EngineReport:
    """Print the command that serves a target and its draft with another engine, each flag with its reason.

    With --hidden-states, the command of a vLLM that `nds cache build --engine` can ask.
    """
    from nemotron_dspark.engines import commands, launch, preflight
    from nemotron_dspark.engines.pair import Pair
    from nemotron_dspark.errors import InputError

    if name not in commands.ENGINES:
        raise InputError(f"There is no engine {name!r}.", f"Choose one of {', '.join(commands.ENGINES)}.")
    if (draft is None) == (hidden_states is None):
        raise InputError("An engine serves a draft, or it writes hidden states.", "Give --draft or --hidden-states.")
    if hidden_states is not None:
        if name != "vllm":
            raise InputError(f"{name} writes no hidden states that are read here.", "Take vllm.")
        command = _for_hidden_states(config, hidden_states, machine, host, port)
        if run:
            shell.err.print(escape(command.text), soft_wrap=True)
            launch.run(command, host=host, port=port)
        return EngineReport(command, ())
    assert draft is not None
    pair = Pair.of(config.target, draft)
    warnings = tuple(preflight.check(name, pair, machine=machine, tokens=tokens))
    command = commands.engine_command(
        name, pair, machine=machine, tokens=tokens, requests=requests, host=host, port=port, gguf=gguf
    )
    if run:
        for found in warnings:
            shell.note(f"{found.what} {found.do}")
        shell.err.print(escape(command.text), soft_wrap=True)
        launch.run(command, host=host, port=port)
    return EngineReport(command, warnings)


def _for_hidden_states(config: RunConfig, folder: Path, machine: str | None, host: str, port: int) -> "EngineCommand":
    from nemotron_dspark.engines.commands import hidden_states_command
    from nemotron_dspark.targets import Checkpoint
    from nemotron_dspark.targets.taps import chosen_taps

    checkpoint = Checkpoint.of(config.target)
    taps, dtype = chosen_taps(checkpoint.read_spec(), config.draft), config.target.dtype
    length = config.data.max_length
    given = {"machine": machine, "host": host, "port": port}
    return hidden_states_command(checkpoint, taps, folder, dtype=dtype, max_length=length, **given)


def _show(report: EngineReport) -> None:
    command = report.command
    table = Table(title=f"{command.title} {command.minimum} or newer", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for flag in command.flags:
        table.add_row(flag.name, escape(flag.why))
    shell.err.print(table)
    shell.err.print(f"Taken from {escape(command.read_from)}.", soft_wrap=True)
    for found in report.warnings:
        shell.remark(shell.err, "warning", f"{found.what} {found.do}", "yellow")
    for line in command.prepare:
        shell.out.print(escape(f"{line}"), soft_wrap=True)
    for name, text in command.files.items():
        shell.out.print(escape(f"cat > {name} <<'END'\n{text}END"), soft_wrap=True)
    shell.out.print(escape(command.text), soft_wrap=True)
