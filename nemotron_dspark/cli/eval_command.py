"""`nds eval`: accepted length, acceptance by position, speed against plain decoding, and equality with it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig

if TYPE_CHECKING:
    from nemotron_dspark.evaluation.report import EvalReport


def register(app: typer.Typer) -> None:
    shell.command(app, "eval")(evaluate)


def evaluate(
    config: RunConfig,
    draft: Annotated[Path, typer.Option("--draft", "-d", help="Folder of a trained draft.")],
    prompts: Annotated[Path, typer.Option("--prompts", "-p", help="JSON lines of prompts the draft has not seen.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N prompts.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for eval.json and eval.png.")] = None,
) -> None:
    """Measure a draft: accepted length, acceptance by position, speed, equal output."""
    from nemotron_dspark import stages

    with shell.err.status("Loading and proving the target") as status, shell.bars() as bars:
        report = stages.evaluate(config, draft, prompts, limit=limit, on_loaded=status.stop, on_progress=bars.update)
    written = report.save(out) if out is not None else ()
    if shell.state.json:
        shell.emit(report.to_json())
    else:
        _show(report, written)
    if remark := report.check_lossless():
        shell.note(remark)


def _show(found: "EvalReport", written: tuple[Path, ...]) -> None:
    from nemotron_dspark.evaluation import report

    shell.out.print(report.acceptance_table(found.labelled, f"{found.prompts} prompts of {escape(found.prompts_file)}"))
    shell.out.print(report.speed_table(found.evaluation))
    if written:
        shell.out.print(f"Written: {escape(', '.join(map(str, written)))}", soft_wrap=True)
