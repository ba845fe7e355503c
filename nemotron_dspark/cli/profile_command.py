"""`nds profile`: what a round of drafting and verifying costs on this machine, by requests and tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig

if TYPE_CHECKING:
    from nemotron_dspark.evaluation.profile import Profile

_BUSY = 0.15  # of the median between the quartiles and it


def register(app: typer.Typer) -> None:
    shell.command(app)(profile)


def profile(
    config: RunConfig,
    draft: Annotated[
        Path | None, typer.Option("--draft", "-d", help="Folder of a trained draft; without one, the target alone.")
    ] = None,
    requests: Annotated[
        str, typer.Option("--requests", metavar="N,N,…", help="Requests at once, as far as the memory holds them.")
    ] = "1,2,4,8,16,32",
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Tokens before the block; 512, or what the target has room for."),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="About how long to measure; three times each at least.")
    ] = 40.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the files; by default `profile` in the draft's."),
    ] = None,
) -> None:
    """Measure what a round costs here, and write the tables that schedulers read."""
    from nemotron_dspark import stages

    rows = shell.numbers("--requests", requests)
    with shell.measuring() as (on_loaded, on_progress):
        found, written = stages.profile(
            config,
            draft,
            out=out,
            rows=rows,
            context=context,
            seconds=seconds,
            on_loaded=on_loaded,
            on_progress=on_progress,
        )
    shell.present(found, _show, written)


def _show(found: "Profile") -> None:
    from nemotron_dspark.evaluation.profile import spread, tables

    for table in tables(found):
        shell.out.print(table)
    if spread(found) > _BUSY:
        shell.note("the times are spread widely: is the machine busy? Another run on a quiet one will be nearer.")
    if found.left_out:
        shell.note(f"{found.left_out}: not measured.")
