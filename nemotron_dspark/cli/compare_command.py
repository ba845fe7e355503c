"""`nds compare`: several drafts of one target side by side, against no draft."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig

if TYPE_CHECKING:
    from nemotron_dspark.evaluation.comparison import Comparison


def register(app: typer.Typer) -> None:
    shell.command(app)(compare)


def compare(
    config: RunConfig,
    drafts: Annotated[
        list[Path], typer.Option("--draft", "-d", help="Folder of a trained draft, of any kind; repeat for each.")
    ],
    prompts: Annotated[list[str] | None, shell.WORKLOADS] = None,
    lengths: Annotated[str | None, shell.CONTEXT_LENGTHS] = None,
    limit: Annotated[int | None, shell.LIMIT] = None,
    engines: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="URL",
            help="One row more: a running engine that serves the target with a draft of its own; repeat for several.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for compare.json and compare.png.")] = None,
) -> None:
    """Compare drafts: tokens and cost of a round, speed, equal output; by workload and length."""
    show(compared(config, drafts, prompts or shell.held_out_prompts(), lengths, limit, engines or ()), out)


def compared(
    config: RunConfig,
    drafts: Sequence[Path],
    prompts: Sequence[str],
    lengths: str | None,
    limit: int | None,
    engines: Sequence[str] = (),
) -> "Comparison":
    """`stages.compare` with its progress shown."""
    from nemotron_dspark import stages

    with shell.measuring() as (on_loaded, on_progress):
        return stages.compare(
            config,
            drafts,
            prompts,
            lengths=shell.numbers("--context-lengths", lengths) if lengths is not None else (),
            limit=limit,
            engines=engines,
            on_loaded=on_loaded,
            on_progress=on_progress,
        )


def show(found: "Comparison", out: Path | None) -> None:
    """Write ``found`` to the folder ``out``, print it, and fail where a draft changes what comes out."""
    shell.present(found, _show, found.save(out) if out is not None else ())
    if remark := found.check_lossless():
        shell.note(remark)


def _show(found: "Comparison") -> None:
    from nemotron_dspark.evaluation import comparison

    shell.out.print(comparison.table(found))
    shell.show_rows([(name, what) for name, what in found.drafts.items()])
