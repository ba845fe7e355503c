"""`nds plan`: disk, memory, hours and dollars of a run, from a target's config alone."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from nemotron_dspark.cli import shell
from nemotron_dspark.cli.eval_command import PROFILE
from nemotron_dspark.config import RunConfig
from nemotron_dspark.files import size_text as size

if TYPE_CHECKING:
    from nemotron_dspark.recipe.plan import MemoryNeeds, ModeNeeds, ResourceEstimate

DISK = {
    "target": "target's weights",
    "cache": "cache",
    "tokens": "tokenised samples",
    "checkpoints": "checkpoints",
    "draft": "draft",
}
STREAMING = {"passes": "passes", "tokens": "tokens a pass", "read": "read from the disk"}
STAGES = {"answers": "answers", "cache": "cache", "train": "train", "eval": "eval"}


def register(app: typer.Typer) -> None:
    shell.command(app, keys=[shell.TAPS, PROFILE], show=_show)(plan)


def plan(
    config: RunConfig,
    data: Annotated[
        list[str] | None, typer.Option("--data", "-d", help=shell.several("JSON lines of conversations"))
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Instead of --data: how many conversations.")] = None,
    mean_length: Annotated[int | None, typer.Option("--mean-length", help="Their mean length in tokens.")] = None,
    answer_share: Annotated[float, typer.Option("--answer-share", help="Share of the tokens that are answers.")] = 0.6,
    machine: Annotated[
        str, typer.Option("--machine", "-m", help="dgx-spark, h100x8, h200, cpu, or here (measured).")
    ] = "here",
    price: Annotated[float | None, typer.Option("--price", help="Dollars an hour for the whole machine.")] = None,
) -> "ResourceEstimate":
    """Say what a run needs before it starts: disk, memory, hours, dollars."""
    from nemotron_dspark.recipe.plan import plan as estimate

    with shell.err.status("reading the target's config"):
        return estimate(
            config,
            data=data or None,
            samples=samples,
            mean_length=mean_length,
            answer_share=answer_share,
            machine=machine,
            price=price,
            options=shell.state.options,
        )


def _show(found: "ResourceEstimate") -> None:
    from nemotron_dspark.recipe.plan import hours

    machine = found.machine
    shell.out.print(f"[bold]{escape(found.target)}[/] on {escape(machine.title)}")
    shell.out.print(escape(found.workload.source))
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="bold")
    table.add_column("", no_wrap=True)
    for column in found.columns:
        style = "red" if column.problems else "green" if column.mode == found.recommended else ""
        table.add_column(column.mode, justify="right", style=style, no_wrap=True)
    # A column a mode, so that what differs between them stands side by side; below each part what there is of it.
    _rows(table, "Disk", found.columns, DISK, lambda column: column.disk, size)
    _total(table, [size(column.total_disk) for column in found.columns], f"of {size(machine.disk_bytes)}")
    if machine.gpus and not machine.unified:
        _rows(table, "GPU memory", found.columns, STAGES, lambda c: {k: m.gpu for k, m in c.memory.items()}, size)
        table.add_row(f"[dim]  of {size(machine.gpu_bytes)}[/]")
        _rows(table, "Main memory", found.columns, STAGES, lambda c: {k: m.host for k, m in c.memory.items()}, size)
        table.add_row(f"[dim]  of {size(machine.host_bytes)}[/]")
    else:
        _rows(table, "Memory", found.columns, STAGES, lambda c: {k: _whole(m) for k, m in c.memory.items()}, size)
        table.add_row(f"[dim]  of {size(machine.gpu_bytes if machine.unified else machine.host_bytes)}[/]")
    if any(column.streaming for column in found.columns):
        _rows(table, "Layers streamed", found.columns, STREAMING, _streamed, str)
    _rows(table, "Time", found.columns, STAGES, lambda column: column.hours, hours)
    _total(table, [hours(column.total_hours) for column in found.columns])
    if any(column.dollars is not None for column in found.columns):
        table.add_row("[bold]Dollars[/]", *(f"{column.dollars:,.2f}" for column in found.columns))
    shell.out.print(table)
    if found.expected:
        from nemotron_dspark.evaluation import expected

        shell.out.print(expected.table(found.expected))
        for sentence in expected.sentences(found.expected):
            shell.out.print(sentence, soft_wrap=True)
    # The verdict comes behind the reasons, the commands last: they are what is copied from the screen.
    for column in found.columns:
        for problem in column.problems:
            shell.out.print(f"[red]{column.mode} does not fit:[/] {escape(problem)}")
        for advice in column.advice:
            shell.out.print(f"  {escape(advice)}")
    verdict = f"[green]Recommended: {found.recommended}.[/]" if found.recommended else "[red]Recommended: none.[/]"
    shell.out.print(f"{verdict} {escape(found.reason)}")
    for command in found.commands:
        shell.out.print(f"  {escape(command)}", soft_wrap=True)
    shell.out.print()
    for sentence in (f"Machine: {machine.note}.", *found.assumptions, "Computed, not measured; see docs/plan.md."):
        shell.out.print(f"[dim]{escape(sentence)}[/]")


def _streamed(column: "ModeNeeds") -> dict[str, str]:
    found = column.streaming
    return (
        {}
        if found is None
        else {"passes": f"{found.passes:,}", "tokens": f"{found.tokens:,}", "read": size(found.read)}
    )


def _whole(memory: "MemoryNeeds") -> float:
    return memory.gpu + memory.host


def _rows(table: Table, title: str, columns: "tuple[ModeNeeds, ...]", labels: dict, values, text) -> None:
    """A heading, then a row for each label that any column has."""
    table.add_row(f"[bold]{title}[/]")
    for key, label in labels.items():
        found = [values(column).get(key) for column in columns]
        if any(value is not None for value in found):
            table.add_row(f"  {label}", *("-" if value is None else text(value) for value in found))


def _total(table: Table, totals: list[str], of: str = "") -> None:
    table.add_row("  total" + (f" [dim]{of}[/]" if of else ""), *totals)
