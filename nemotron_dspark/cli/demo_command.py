"""`nds demo`: the whole recipe on this machine, in minutes, from nothing."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from nemotron_dspark.cli import shell

_TITLES = {
    "target": "train a small Nemotron-H on the standard library",
    "answers": "let it answer prompts, through its own server",
    "cache": "prove it, and keep its hidden states",
    "train": "train a draft on them",
    "eval": "measure on prompts from modules nobody has seen",
    "serve": "serve speculatively, ask with the openai client",
}


def register(app: typer.Typer) -> None:
    app.command("demo", help="Run the whole recipe here: build a small hybrid target, train a draft, serve it.")(run)


def run(
    out: Annotated[Path, typer.Option("--out", help="Folder for the demo's run folders.")] = Path("runs"),
    scale: Annotated[
        float, typer.Option(min=0.01, max=4.0, help="Share of the usual budgets; less is sooner and worse.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of text, weights and sampling.")] = 0,
    json: shell.JsonOption = False,
) -> None:
    shell.quiet_libraries()
    from nemotron_dspark.recipe.demo import STAGES, Budget, Progress, new_run_dir, run_demo

    class Shown(Progress):
        """Stages and notes as lines, what is under way as a bar on a terminal."""

        def __init__(self, bar) -> None:
            self._bar = bar
            self._task = bar.add_task("", total=None)

        def stage(self, name: str) -> None:
            at = STAGES.index(name) + 1
            shell.err.print(f"[bold]{at}/{len(STAGES)} {name}[/]  {_TITLES[name]}")
            self._bar.reset(self._task, total=None, description="")

        def note(self, text: str) -> None:
            shell.err.print(f"    {escape(text)}", soft_wrap=True)

        def update(self, text: str, done: float, total: float) -> None:
            self._bar.update(self._task, description=f"    {escape(text)}", completed=done, total=total or None)

    began = time.monotonic()
    with shell.progress_bar(counts=False) as bar:
        result = run_demo(new_run_dir(out), Budget().scaled(scale), seed=seed, progress=Shown(bar))
    if json:
        shell.emit(result.to_json())
        return
    _print(result, time.monotonic() - began)


def _print(result, seconds: float) -> None:
    from nemotron_dspark.evaluation import report
    from nemotron_dspark.recipe.demo import labelled

    shell.out.print()
    shell.out.print(report.acceptance_table(labelled(result.measurements), "Held-out prompts"))
    shell.out.print(report.speed_table(result.evaluation))
    stages = Table(title="Seconds", title_justify="left")
    for name in result.stages:
        stages.add_column(name, justify="right")
    stages.add_column("all", justify="right")
    stages.add_row(*(f"{value:.0f}" for value in result.stages.values()), f"[bold]{seconds:.0f}[/]")
    shell.out.print(stages)
    shell.out.print(Panel(escape(result.served), title="answered speculatively", title_align="left"))
    shell.out.print(f"picture  {result.picture}\nrun      {result.run_dir}", soft_wrap=True)
    target = result.run_dir / "target"
    draft = result.run_dir / "run" / "draft"
    shell.out.print(f"try      nds serve --target {target} --draft {draft}", soft_wrap=True)
