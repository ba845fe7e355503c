"""`nds calibrate`: make what a draft foretells of its acceptance a probability."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig


def register(app: typer.Typer) -> None:
    shell.command(app)(calibrate)


def calibrate(
    config: RunConfig,
    draft: Annotated[
        Path | None, typer.Option("--draft", "-d", help="Folder of a trained draft; the target's newest here.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            "-p",
            help="JSON lines of prompts the draft has not seen, without it those held out; repeated, each a workload.",
        ),
    ] = None,
    margin: Annotated[
        bool, typer.Option("--margin", help="Use the draft's margin also where it has a confidence head.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N prompts of each.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the files; by default `calibration` in the draft's.")
    ] = None,
) -> None:
    """Calibrate a draft's confidence on prompts, for the threshold here and for engines."""
    from nemotron_dspark import stages
    from nemotron_dspark.evaluation import calibration_report

    draft, prompts = draft or shell.newest_draft(config), prompts or shell.held_out_prompts()

    with shell.err.status("Loading and proving the target") as status, shell.bars() as bars:
        report, written = stages.calibrate(
            config, draft, prompts, out=out, margin=margin, limit=limit, on_loaded=status.stop, on_progress=bars.update
        )
    if shell.state.json:
        shell.emit(report.to_json())
        return
    for fit in report.fits:
        shell.out.print(calibration_report.slot_table(fit))
    if (by_workload := calibration_report.workload_table(report)) is not None:
        shell.out.print(by_workload)
    for fit in report.fits:
        shell.out.print(escape(fit.verdict), soft_wrap=True)
    shell.out.print(f"Written: {escape(', '.join(map(str, written)))}", soft_wrap=True)
