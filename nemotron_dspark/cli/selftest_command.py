"""`nds selftest`: every stage once on tiny models, one line per check."""

import dataclasses
import time

import typer
from rich.markup import escape

from nemotron_dspark.cli import shell


def register(app: typer.Typer) -> None:
    app.command("selftest", help="Prove this installation on tiny models: no GPU, no network, under a minute.")(run)


def run(json: shell.JsonOption = False) -> None:
    shell.quiet_libraries()
    from nemotron_dspark.recipe.selftest import run_selftest

    began = time.perf_counter()
    results = []
    for result in run_selftest():
        results.append(result)
        if not json:
            mark = "[green]✓[/]" if result.passed else "[red]✗[/]"
            shell.out.print(
                f"{mark} {result.name:<32} {result.seconds:5.1f} s  {escape(result.detail)}", soft_wrap=True
            )
    failed = [result for result in results if not result.passed]
    seconds = time.perf_counter() - began
    if json:
        shell.emit(
            {
                "passed": not failed,
                "seconds": round(seconds, 2),
                "checks": [dataclasses.asdict(result) for result in results],
            }
        )
    else:
        verdict = (
            f"[red]{len(failed)} of {len(results)} checks failed[/]" if failed else f"{len(results)} checks passed"
        )
        shell.out.print(f"{verdict} in {seconds:.1f} s")
    if failed:
        raise typer.Exit(1)
