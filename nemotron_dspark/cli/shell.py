"""What every command shares: consoles, the two-sentence complaint, `--json`, and the options that recur."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nemotron_dspark.errors import InputError, NdsError

out = Console(highlight=False)  # results; nothing but one JSON object under --json
err = Console(stderr=True, highlight=False)  # progress, warnings, complaints


@dataclasses.dataclass
class State:
    debug: bool = False


state = State()


def complain(error: NdsError) -> None:
    err.print(f"[bold red]error:[/] {escape(error.what)}", soft_wrap=True)
    err.print(f"  [bold]do:[/] {escape(error.do)}", soft_wrap=True)


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


def emit(value: Any) -> None:
    """Print ``value`` as one JSON object on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def taps_setting(taps: str | None) -> list[str]:
    """``--taps`` as assignments for the configuration.

    Raises:
        InputError: neither a known choice nor a list of layers.
    """
    from nemotron_dspark.config.run import read_taps

    if taps is None:
        return []
    try:
        return [f"draft.taps={read_taps(taps)}"]
    except ValueError as error:
        raise InputError(f"--taps {taps!r} is {error}.", "Leave it out for the default choice.") from None


def trust_setting(trust: bool) -> list[str]:
    """``--trust-remote-code`` as assignments for the configuration; without the flag the configuration decides."""
    return ["target.trust_remote_code=true"] if trust else []


def progress_bar(*, counts: bool = True) -> Progress:
    """A bar on stderr with the time left, and with a count unless the steps have none; several tasks may be added."""
    columns = [TextColumn("{task.description}"), BarColumn(), *([MofNCompleteColumn()] if counts else [])]
    return Progress(*columns, TimeRemainingColumn(), console=err, disable=not err.is_terminal)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and advice out of the output; call before importing transformers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


TargetOption = Annotated[str, typer.Option("--target", "-t", help="Hub id, local folder or alias of the target.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with sections of keys.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be given several times.")]
TapsOption = Annotated[
    str | None,
    typer.Option("--taps", help="Target layers the draft reads: even, attention or a list as 1,5,19 (draft.taps)."),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the target's checkpoint.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
