"""`nds doctor`: what this machine is, whether it is ready, and the command that mends what is not."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from nemotron_dspark.cli import shell

if TYPE_CHECKING:
    from nemotron_dspark.recipe.doctor import Report

STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red", "skipped": "dim"}


def register(app: typer.Typer) -> None:
    shell.command(app, target="none", show=_show, failed=lambda report: not report.ready)(doctor)


def doctor(
    folder: Annotated[
        Path, typer.Option("--folder", exists=True, file_okay=False, help="Folder whose disk is measured.")
    ] = Path("."),
) -> "Report":
    """Say what this machine is and whether it is ready. A bug report should hold what --json prints."""
    from nemotron_dspark.recipe.doctor import examine

    with shell.err.status("examining this machine; with a GPU, kernels are compiled"):
        return examine(folder.absolute())


def _show(report: "Report") -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in report.findings:
        style = STYLES[finding.state]
        table.add_row(f"[{style}]{finding.state}[/]", finding.name, escape(finding.found))
    shell.out.print(table)
    mends = [finding for finding in report.findings if finding.mend]
    for finding in mends:  # below the table, in one piece each, to be copied
        style = STYLES[finding.state]
        shell.out.print(f"\n[{style}]{finding.name}[/], to mend it:\n  {escape(finding.mend or '')}", soft_wrap=True)
    faults = sum(finding.state == "fault" for finding in report.findings)
    counted = "1 fault" if faults == 1 else f"{faults} faults"
    shell.out.print(f"\n[bold red]{counted}.[/]" if faults else "\n[green]No faults.[/]")
