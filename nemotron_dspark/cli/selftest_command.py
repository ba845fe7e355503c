"""`nds selftest`: every stage once on tiny models, one line per check."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from nemotron_dspark.cli import shell

if TYPE_CHECKING:
    from nemotron_dspark.recipe.selftest import CheckResult, SelftestReport


def register(app: typer.Typer) -> None:
    shell.command(app, show=_show, failed=lambda report: not report.passed)(selftest)


def selftest(
    device: Annotated[str, typer.Option(help="Where the tiny models run, e.g. cuda.")] = "cpu",
) -> "SelftestReport":
    """Prove this installation on tiny models: no GPU, no network, under a minute."""
    shell.quiet_libraries()
    from nemotron_dspark.recipe.selftest import SelftestReport, run_selftest

    checks = []
    for check in run_selftest(device=device):
        checks.append(check)
        if not shell.state.json:
            _show_check(check)
    return SelftestReport(tuple(checks))


def _show_check(result: "CheckResult") -> None:
    mark = "[green]✓[/]" if result.passed else "[red]✗[/]"
    shell.out.print(f"{mark} {result.name:<32} {result.seconds:5.1f} s  {escape(result.detail)}", soft_wrap=True)


def _show(report: "SelftestReport") -> None:
    count = len(report.checks)
    failed = sum(not check.passed for check in report.checks)
    verdict = f"[red]{failed} of {count} checks failed[/]" if failed else f"{count} checks passed"
    shell.out.print(f"{verdict} in {report.seconds:.1f} s")
