"""`nds recipe run`: from prompts to an exported draft with one command, resumable anywhere."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from nemotron_dspark.cli import shell
from nemotron_dspark.config.recipe import RECIPE_FILE, Recipe, load_recipe
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import size_text

if TYPE_CHECKING:
    from nemotron_dspark.recipe.clean import CleanReport
    from nemotron_dspark.recipe.dry_run import PlannedStage, RecipePlan
    from nemotron_dspark.recipe.run import RecipeResult, RecipeStatus

FileArgument = Annotated[
    Path | None, typer.Argument(help=f"The recipe; {RECIPE_FILE} of this folder when neither it nor --target is given.")
]
_COLOURS = {"done": "green", "begun": "yellow", "again": "yellow"}


def register(app: typer.Typer) -> None:
    commands = shell.group(app, "recipe", "Everything from prompts to an exported draft, as one file says it.")
    shell.command(commands, show=_show_result, failed=lambda result: bool(result.refused))(run)
    shell.command(commands, show=_show_status)(status)
    shell.command(commands, show=_show_cleaned)(clean)


def run(
    file: FileArgument = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="Hub id, local folder or alias; may be repeated.")
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompts", "-p", help=shell.several("JSON lines of prompts"))
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help=shell.several("Instead of prompts: conversations the target has answered")),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            "--held-out", help=shell.several("Prompts to measure on; without it 5 % of the others. JSON lines")
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of all that is made; this one.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value of a run's configuration; may be repeated.")
    ] = None,
    until: Annotated[
        Literal["split", "answers", "cache", "train", "eval", "calibrate", "export"] | None,
        typer.Option("--until", help="The last kind of stage to run."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, with disk, memory and hours.")
    ] = False,
) -> "RecipeResult | None":
    """Go through every stage: answers, cache, train, eval, calibrate, export. The same command goes on."""
    recipe = read(file, assignments, target=target, prompts=prompts, data=data, held_out=held_out, out=out)
    shell.quiet_libraries()
    if dry_run:
        from nemotron_dspark.recipe.dry_run import dry_run as plan

        with shell.err.status("reading the target's config and the data"):
            planned = plan(recipe)
        if shell.state.json:
            shell.emit(planned.to_json())
        else:
            show_plan(planned)
        return None
    shell.stop_on_sigterm()
    from nemotron_dspark.cli.recipe_page import Page
    from nemotron_dspark.recipe.run import run_recipe

    with Page() as page:
        return run_recipe(recipe, until=until, progress=page)


def status(file: FileArgument = None) -> "RecipeStatus":
    """Say where each stage of a recipe stands, and why one is to be made again."""
    recipe = read(file)
    from nemotron_dspark.recipe.run import recipe_status

    return recipe_status(recipe)


def clean(
    file: FileArgument = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
) -> "CleanReport":
    """List what can go, as it can be made again: caches and checkpoints of trained drafts, what was set aside."""
    recipe = read(file)
    from nemotron_dspark.recipe import clean as cleaning

    return cleaning.clean(recipe, remove=yes)


def read(file: Path | None, assignments: list[str] | None = None, **given: Any) -> Recipe:
    """The recipe in ``file``, or in the folder's, below what is ``given`` by options."""
    given = {key: value for key, value in given.items() if value}
    if file is None and "target" not in given:
        places = (Path(RECIPE_FILE), Path("recipe") / RECIPE_FILE)  # the second is of the last run here
        file = next((path for path in places if path.is_file()), None)
        if file is None:
            raise InputError(
                f"There is no {RECIPE_FILE} here, and no --target is given.",
                "Give the recipe's file, or --target T --prompts prompts.jsonl.",
            )
    return load_recipe(file, assignments=assignments or (), **given)


def _show_status(found: "RecipeStatus") -> None:
    from nemotron_dspark.cli.recipe_page import stage_table

    shell.out.print(stage_table(found.stages, found.statuses, found.records, found.notes))
    shell.out.print(escape(found.sentence), soft_wrap=True)


def _show_cleaned(report: "CleanReport") -> None:
    if not report.found:
        shell.out.print("There is nothing that could go.")
        return
    shell.show_rows((size_text(each.bytes), f"{each.path}  ({each.why})") for each in report.found)
    total = size_text(report.bytes)
    shell.out.print(f"{total} removed." if report.removed else f"{total} can go: `nds recipe clean --yes` removes it.")


def _show_result(result: "RecipeResult") -> None:
    for draft in result.trained:
        said = result.measured(draft)
        shell.out.print(f"[bold]{escape(draft.label)}[/]  {escape(said)}".rstrip(), soft_wrap=True)
        serve = shlex.join(["nds", "serve", "--target", draft.target, "--draft", str(draft.folder)])
        shell.out.print(f"  {escape(serve)}", soft_wrap=True)
    for text in result.refused:
        shell.out.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)
    if result.report:
        shell.out.print(f"report   {escape(str(result.report))}", soft_wrap=True)
    else:
        shell.out.print("What was asked for is done; without --until the same command goes on.", soft_wrap=True)


def show_plan(planned: "RecipePlan") -> None:
    from nemotron_dspark.cli.recipe_page import indented, under_headings
    from nemotron_dspark.recipe.plan import hours

    machine = planned.machine
    shell.out.print(f"[bold]{escape(', '.join(planned.recipe.target))}[/] on {escape(machine.title)}")
    for text in planned.workloads:
        shell.out.print(escape(text), soft_wrap=True)
    apart = machine.gpus > 0 and not machine.unified
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("stage", "state", "GPU + main memory" if apart else "memory", "time"):
        table.add_column(name, justify="left" if name in ("stage", "state") else "right", no_wrap=True)
    by_name = {each.stage.name: each for each in planned.stages}
    for heading, stage in under_headings([each.stage for each in planned.stages]):
        if heading:
            table.add_row(f"[bold]{escape(heading)}[/]")
        each = by_name[stage.name]
        colour, time = _COLOURS.get(each.status.state), hours(each.hours) if each.hours else "-"
        state = f"[{colour}]{each.status.state}[/]" if colour else each.status.state
        table.add_row(indented(stage), state, _memory(each, apart), time)
    shell.out.print(table)
    for each in planned.stages:
        if each.status.why and each.status.state != "not needed":
            shell.out.print(f"{escape(each.stage.name)}: {escape(each.status.why)}.", soft_wrap=True)
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in planned.disk.items())
    shell.out.print(f"[bold]Disk[/]   {size_text(planned.total_disk)}: {escape(parts)}", soft_wrap=True)
    shell.out.print(
        f"       {size_text(planned.missing)} of it still to be written; free {size_text(machine.disk_bytes)}"
    )
    price = "" if planned.dollars is None else f", {planned.dollars:,.2f} dollars"
    shell.out.print(f"[bold]Time[/]   {hours(planned.total_hours)}{price}")
    for problem in planned.problems:
        shell.out.print(f"[red]Does not fit:[/] {escape(problem)}", soft_wrap=True)
    for text in planned.advice:
        shell.out.print(f"  {escape(text)}", soft_wrap=True)
    for sentence in (f"Machine: {machine.note}.", *planned.assumptions, "Computed, not measured; see docs/plan.md."):
        shell.out.print(f"[dim]{escape(sentence)}[/]")


def _memory(each: "PlannedStage", apart: bool) -> str:
    """Memory of the GPU and main memory, or both together where they are one."""
    if each.memory is None:
        return "-"
    if apart:
        return f"{size_text(each.memory.gpu)} + {size_text(each.memory.host)}"
    return size_text(each.memory.gpu + each.memory.host)
