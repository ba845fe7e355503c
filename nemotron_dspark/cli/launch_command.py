"""`nds launch`: a recipe as a job of torchrun, Slurm, SkyPilot or Docker."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from nemotron_dspark.cli import shell
from nemotron_dspark.config.recipe import load_recipe

if TYPE_CHECKING:
    from nemotron_dspark.recipe.launch import Launch


def register(app: typer.Typer) -> None:
    shell.command(app, show=_show)(launch)


def launch(
    file: Annotated[Path, typer.Argument(help="The recipe, as `nds recipe run` takes it.")],
    on: Annotated[Literal["torchrun", "slurm", "skypilot", "docker"], typer.Option("--on", help="What is to run it.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines that train together (torchrun, slurm).")] = 1,
    submit: Annotated[bool, typer.Option("--submit", help="Start it, too.")] = False,
    package: Annotated[
        str, typer.Option(help="What pip installs in the cloud or the image: a wheel, a URL or a name.")
    ] = "nemotron-dspark",
    accelerators: Annotated[
        str | None, typer.Option(help="GPUs of a cloud machine, as in H100:8; default: those of the recipe's machine.")
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="An option more for Slurm, as in --sbatch=--partition=gpu; repeat it.")
    ] = None,
) -> "Launch":
    """Write the files that run a recipe elsewhere to the folder launch, and start them with --submit.

    A job that is preempted goes on where it was.
    """
    recipe = load_recipe(file)
    shell.quiet_libraries()
    from nemotron_dspark.recipe import launch as room

    return room.launch(
        recipe,
        file,
        on,
        nodes=nodes,
        submit=submit,
        package=package,
        accelerators=accelerators,
        sbatch=sbatch or (),
    )


def _show(job: "Launch") -> None:
    for path in job.files:
        shell.out.print(f"written  {escape(str(path))}", soft_wrap=True)
    for text in job.remarks:
        shell.out.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)
    if job.submitted:
        shell.out.print(escape(job.said or "done"), soft_wrap=True)
        return
    for command in job.commands:
        shell.out.print(f"[bold]run[/]      {escape(shlex.join(command))}", soft_wrap=True)
