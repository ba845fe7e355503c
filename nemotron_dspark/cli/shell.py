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

from nemotron_dspark.errors import NdsError

out = Console(highlight=False)  # results; nothing but one JSON object under --json
err = Console(stderr=True, highlight=False)  # progress, warnings, complaints


@dataclasses.dataclass
class State:
    debug: bool = False


state = State()


def complain(error: NdsError) -> None:
    err.print(f"[bold red]error:[/] {escape(error.what)}", soft_wrap=True)
    err.print(f"  [bold]do:[/] {escape(error.do)}", soft_wrap=True)


def emit(value: Any) -> None:
    """Print ``value`` as one JSON object on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False))


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
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
