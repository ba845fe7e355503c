"""`nds taps search`: which layers of a target a draft should read, measured on its own hidden states."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from nemotron_dspark.cli import shell
from nemotron_dspark.cli.inspect_command import KINDS
from nemotron_dspark.config import RunConfig

if TYPE_CHECKING:
    from nemotron_dspark.recipe.taps import TapReport
    from nemotron_dspark.targets.tap_search import TapSearch

_BAR = 16


def register(app: typer.Typer) -> None:
    commands = shell.group(app, "taps", "Choose the target layers that a draft reads.")
    shell.command(commands, show=_show)(search)


def search(
    config: RunConfig,
    data: Annotated[Path, typer.Option("--data", "-d", help="JSON lines of conversations with the target's answers.")],
    count: Annotated[int | None, typer.Option(min=1, help="Layers to choose; draft.num_taps when not given.")] = None,
    tokens: Annotated[int, typer.Option(min=100, help="Positions in answers to regress on.")] = 4000,
    width: Annotated[int, typer.Option(min=1, help="Numbers kept of a hidden state, by a random projection.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the conversations drawn and of the projection.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of taps.json and taps.png.")] = None,
) -> "TapReport":
    """Rank layers by how well they predict the target's later states, and choose a set. Trains nothing."""
    from nemotron_dspark.recipe.taps import search_taps
    from nemotron_dspark.stages import target_folder_name

    folder = out or Path("runs") / f"{target_folder_name(config)}-taps"
    labels = {kind: name for kind, (name, _) in KINDS.items()}
    with shell.bars() as bars:
        return search_taps(
            config, data, folder, labels, count=count, tokens=tokens, width=width, seed=seed, on_progress=bars.update
        )


def _show(report: "TapReport") -> None:
    _print(report.search)
    _print_notes(report)
    listed = ",".join(map(str, report.search.taps))
    shell.out.print(f"picture  {escape(str(report.picture))}", soft_wrap=True)
    shell.out.print(
        f"use      [bold]--taps {listed}[/]   or in a config   draft: {{taps: \\[{listed}]}}", soft_wrap=True
    )


def _print(found: "TapSearch") -> None:
    default = next(one.taps for one in found.sets if one.name == "default")
    table = Table(title="Layers", title_justify="left", caption_justify="left")
    table.caption = (
        "alone, gain: % of the variance of the target's later last hidden states,\n"
        "in held-out conversations; gain: when it was chosen, else if added to the chosen"
    )
    for name in ("rank", "layer", "kind", "alone", "", "gain", "chosen"):
        table.add_column(name, justify="right" if name in ("rank", "layer", "alone", "gain") else "left", no_wrap=True)
    best = max(found.layers[0].alone, 1e-9)
    for rank, score in enumerate(found.layers, start=1):
        kind, colour = KINDS.get(score.kind, (score.kind.lower(), "white"))
        chosen = [f"{score.order}."] if score.order else []
        table.add_row(
            str(rank),
            str(score.layer),
            f"[{colour}]{kind}[/]",
            _percent(score.alone),
            f"[{colour}]{'█' * round(_BAR * max(score.alone, 0) / best)}[/]",
            f"{100 * score.gain:+.2f}",
            " ".join([*chosen, *(["default"] if score.layer in default else [])]),
            style="bold" if score.order else "",
        )
    shell.out.print(table)
    sets = Table(title="Sets", title_justify="left", caption_justify="left")
    shown = sorted({0, len(found.ahead) // 2, len(found.ahead) - 1})  # the picture and --json have all
    sets.caption = "% of the variance; behind: how much less than the searched set, and its standard error"
    for name in ("", "taps", "all", "behind"):
        sets.add_column(name, justify="left" if name in ("", "taps") else "right", no_wrap=name != "taps")
    for at in shown:
        sets.add_column(f"{found.ahead[at]} ahead", justify="right", no_wrap=True)
    for one in found.sets:
        behind = "" if one.name == "searched" else f"{_percent(one.behind)} ± {_percent(one.behind_error)}"
        shares = [_percent(one.by_ahead[at]) for at in shown]
        sets.add_row(one.name, ",".join(map(str, one.taps)), f"[bold]{_percent(one.explained)}[/]", behind, *shares)
    shell.out.print(sets)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _print_notes(report: "TapReport") -> None:
    found, positions = report.search, report.positions
    projected = f"projected from {report.hidden} to {report.width}" if report.width < report.hidden else "whole"
    shell.out.print(f"{positions:,} positions of {report.conversations:,} conversations, hidden states {projected}")
    if positions < report.asked:
        shell.note(f"the data has {positions:,} positions that count, not {report.asked:,}.")
    idle = [str(score.layer) for score in found.layers if score.order and score.gain <= 0]
    if idle:
        shell.note(f"layer {', '.join(idle)} added nothing: fewer taps would do as well.")
    default = next(one for one in found.sets if one.name == "default")
    if default.taps != found.taps and default.behind < 2 * default.behind_error:
        shell.note(
            "the default set is not clearly behind: the difference is less than two standard errors. More --tokens "
            "narrow it."
        )
