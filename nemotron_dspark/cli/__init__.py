"""`nds`: one module per command. A command parses, calls and prints; it holds no logic.

Command modules import torch and transformers inside the command, so that `--help` answers at once.
"""

import importlib
import os
import signal
import sys

import typer
from rich.markup import escape

from nemotron_dspark._version import __version__
from nemotron_dspark.cli import shell
from nemotron_dspark.errors import NdsError

COMMANDS = (
    "demo",
    "selftest",
    "doctor",
    "recipe",
    "launch",
    "inspect",
    "plan",
    "config",
    "data",
    "chat",
    "cache",
    "train",
    "eval",
    "compare",
    "calibrate",
    "profile",
    "export",
    "import",
    "serve",
    "engine",
    "deepspec",
)

app = typer.Typer(
    name="nds",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, measure and serve DSpark drafts for Nemotron-H and other hybrid targets.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        shell.out.print(f"nds {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    shell.state.debug = debug
    shell.show_log()
    if context.invoked_subcommand is None:
        _show_the_way()


def _show_the_way() -> None:
    """What `nds` alone says: the next sensible command."""
    from nemotron_dspark.recipe.guide import way_on

    way = way_on()
    shell.out.print(escape(way.here), soft_wrap=True)
    shell.out.print(f"Next: [bold]{escape(way.next)}[/]\n      {escape(way.why)}", soft_wrap=True)
    for command, why in way.others:
        shell.out.print(f"Or:   {escape(command)}\n      [dim]{escape(why)}[/]", soft_wrap=True)
    shell.out.print("[dim]nds --help lists all commands.[/]")


for _name in COMMANDS:
    importlib.import_module(f"nemotron_dspark.cli.{_name}_command").register(app)


def main() -> None:
    """Entry point of `nds`: errors become two sentences and an exit code, Ctrl-C becomes 130."""
    try:
        app()
    except NdsError as error:
        if shell.state.debug:
            raise
        shell.complain(error)
        sys.exit(error.exit_code)
    except SystemExit as leaving:
        first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun has started
        if leaving.code == 130:  # what typer makes of Ctrl-C, without a word
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the ending with a traceback
        if leaving.code == 130 and first:
            shell.err.print("[yellow]Stopped.[/] What was finished is saved; the same command goes on from there.")
        raise
    except BrokenPipeError:
        sys.exit(141)
