"""`nds compare`: several drafts of one target side by side, against no draft."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

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
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            "-p",
            help="JSON lines of prompts the drafts have not seen, or those held out; repeated, each a workload.",
        ),
    ] = None,
    lengths: Annotated[str | None, shell.CONTEXT_LENGTHS] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N prompts of each.")] = None,
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

    with shell.err.status("Loading and proving the target") as status, shell.bars() as bars:
        return stages.compare(
            config,
            drafts,
            prompts,
            lengths=shell.numbers("--context-lengths", lengths) if lengths is not None else (),
            limit=limit,
            engines=engines,
            on_loaded=status.stop,
            on_progress=bars.update,
        )


def show(found: "Comparison", out: Path | None) -> None:
    """Write ``found`` to the folder ``out``, print it, and fail where a draft changes what comes out."""
    from nemotron_dspark.evaluation import comparison

    written = found.save(out) if out is not None else ()
    if shell.state.json:
        shell.emit(found.to_json())
    else:
        shell.out.print(comparison.table(found))
        shell.show_rows([(name, what) for name, what in found.drafts.items()])
        if written:
            shell.out.print(f"Written: {escape(', '.join(map(str, written)))}", soft_wrap=True)
    if remark := found.check_lossless():
        shell.note(remark)
