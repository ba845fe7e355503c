"""`nds data regenerate|check`: conversations with the target's own answers."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nemotron_dspark.cli import shell

if TYPE_CHECKING:
    from nemotron_dspark.data.check import DataReport
    from nemotron_dspark.data.regenerate import RegenerateProgress, RegenerateReport


def register(app: typer.Typer) -> None:
    commands = typer.Typer(no_args_is_help=True, help="Have the target answer prompts; check data files.")
    commands.command("regenerate")(regenerate)
    commands.command("check")(check)
    app.add_typer(commands, name="data")


def regenerate(
    prompts: Annotated[Path, typer.Option("--prompts", "-p", help="JSON lines of prompts or conversations.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON lines to write; an unfinished file is continued.")],
    base_url: Annotated[str, typer.Option(help="OpenAI-compatible server of the target, with /v1.")],
    model: Annotated[str | None, typer.Option(help="Model name; default: the server's first.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature of the answers.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; longer ones are kept, cut off.")] = 4096,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="Switch reasoning; default: the template's.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Default: the variable OPENAI_API_KEY.")] = None,
    as_json: shell.JsonOption = False,
) -> None:
    """Replace every answer by the target's own, through a server that runs it."""
    from nemotron_dspark.data import regenerate as room

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    bar = Progress(
        TextColumn("answers"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=shell.err,
        disable=not shell.err.is_terminal,
    )
    task = bar.add_task("", total=None, rate="")

    def show(progress: "RegenerateProgress") -> None:
        seconds = bar.tasks[task].elapsed or 0.0
        rate = f"{progress.tokens / seconds:,.0f} tokens/s" if progress.tokens and seconds > 0.5 else ""
        bar.update(task, completed=progress.done, total=progress.total, rate=rate)

    with bar:
        report = room.regenerate(
            prompts,
            out,
            base_url=base_url,
            model=model,
            concurrency=concurrency,
            temperature=temperature,
            max_tokens=max_tokens,
            thinking=thinking,
            api_key=api_key or os.environ.get("OPENAI_API_KEY", "none"),
            progress=show,
        )
    if as_json:
        shell.emit(report.to_json())
    else:
        _print_regenerated(report)


def check(
    file: Annotated[Path, typer.Argument(help="JSON lines of conversations.")],
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Also tokenise with this target's tokenizer and chat format.")
    ] = None,
    config: shell.ConfigOption = None,
    set_: shell.SetOption = None,
    as_json: shell.JsonOption = False,
) -> None:
    """Say which conversations can be used, which are skipped and why, and how many tokens would train the draft."""
    from nemotron_dspark.chat.tokenizer import load_tokenizer
    from nemotron_dspark.config.run import load_config
    from nemotron_dspark.data.check import check_data

    settings = load_config(config, set_ or [], target=target)
    shell.quiet_libraries()
    tokenizer = load_tokenizer(target, settings.target.revision) if target else None
    with shell.err.status("reading") as status:
        report = check_data(file, tokenizer, settings.data, progress=lambda n: n % 100 or status.update(f"line {n:,}"))
    if as_json:
        shell.emit(report.to_json())
    else:
        _print_checked(report)


def _print_regenerated(report: "RegenerateReport") -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("file", escape(str(report.out_file)))
    table.add_row("answered", f"{report.answered:,}, {report.reused:,} of them in an earlier run")
    table.add_row("cut off", f"{report.cut:,} at the longest answer allowed")
    table.add_row("tokens", f"{report.tokens:,} in {report.seconds:.1f} s")
    shell.out.print(table)
    for sentence in report.skipped.sentences():
        shell.out.print(f"[yellow]{escape(sentence)}[/]", soft_wrap=True)


def _print_checked(report: "DataReport") -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("file", escape(str(report.file)))
    table.add_row("usable", f"{report.conversations:,} conversations with {report.answers:,} answers")
    table.add_row("cut off", f"{report.cut_answers:,} have a last answer without an end")
    if report.tokens is not None:
        share = f"{report.loss_tokens / report.tokens:.0%}" if report.tokens else "none"
        table.add_row("samples", f"{report.samples:,}")
        table.add_row("tokens", f"{report.tokens:,}, {share} of them train the draft")
        table.add_row("lengths", f"median {report.median:,}, longest {report.longest:,}")
        table.add_row("at the maximal length", f"{report.at_max_length:,}")
    shell.out.print(table)
    for sentence in report.skipped.sentences():
        shell.out.print(f"[yellow]{escape(sentence)}[/]", soft_wrap=True)
