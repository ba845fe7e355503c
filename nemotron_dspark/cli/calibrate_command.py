"""`nds calibrate`: make what a draft foretells of its acceptance a probability."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig

if TYPE_CHECKING:
    from nemotron_dspark.evaluation.calibration_report import CalibrationReport


def register(app: typer.Typer) -> None:
    shell.command(app)(calibrate)


def calibrate(
    config: RunConfig,
    draft: Annotated[Path | None, shell.DRAFT] = None,
    prompts: Annotated[list[str] | None, shell.WORKLOADS] = None,
    margin: Annotated[
        bool, typer.Option("--margin", help="Use the draft's margin also where it has a confidence head.")
    ] = False,
    limit: Annotated[int | None, shell.LIMIT] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the files; by default `calibration` in the draft's.")
    ] = None,
) -> None:
    """Calibrate a draft's confidence on prompts, for the threshold here and for engines."""
    from nemotron_dspark import stages

    draft, prompts = draft or shell.newest_draft(config), prompts or shell.held_out_prompts()

    with shell.measuring() as (on_loaded, on_progress):
        report, written = stages.calibrate(
            config, draft, prompts, out=out, margin=margin, limit=limit, on_loaded=on_loaded, on_progress=on_progress
        )
    shell.present(report, _show, written)


def _show(report: "CalibrationReport") -> None:
    from nemotron_dspark.evaluation import calibration_report

    for fit in report.fits:
        shell.out.print(calibration_report.slot_table(fit))
    if (by_workload := calibration_report.workload_table(report)) is not None:
        shell.out.print(by_workload)
    for fit in report.fits:
        shell.out.print(escape(fit.verdict), soft_wrap=True)
