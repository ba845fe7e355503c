"""`nds train`: a draft for a target, from a target cache or from conversations."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig
from nemotron_dspark.errors import InputError

if TYPE_CHECKING:
    from nemotron_dspark.training.run import TrainReport


def register(app: typer.Typer) -> None:
    shell.command(app, keys=[shell.TAPS, shell.FROM, shell.INFERENCE_GPUS], show=_show)(train)


def train(
    read_config: Callable[[], RunConfig],
    cache: Annotated[Path | None, typer.Option("--cache", help="Folder that `nds cache build` wrote.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help=shell.several("Instead of --cache: conversations to run the target over")),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; runs/<target> when not given.")] = None,
    trainer: Annotated[
        Literal["native", "deepspec"], typer.Option(help="native, or deepspec: DeepSpec's own loop on your GPUs.")
    ] = "native",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Time for a new run, such as 8h or 90m: as many steps as it holds, at most train.epochs, with fewer "
            "anchors where three epochs would not fit; measured in the first minutes.",
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse to go on with a run that the folder holds.")] = False,
) -> "TrainReport | None":
    """Train a draft. The same command again goes on where it stopped.

    Without --cache and --data it takes the newest cache of the target here, or its newest answers.
    """
    seconds = shell.duration("--budget", budget) if budget is not None else None
    if trainer == "deepspec" and seconds is not None:
        raise InputError("--budget belongs to --trainer native.", "Set train.epochs or train.max_steps.")
    if trainer == "deepspec":  # it starts its processes itself, and reads torchrun's variables in a way of its own
        config = read_config()
        from nemotron_dspark.deepspec.launch import train_on_cache
        from nemotron_dspark.stages import check_source, run_folder

        cache, data = _source(config, cache, data, shell.note)
        check_source(config, cache, data)
        return train_on_cache(config, cache, out or run_folder(config), shell.note)
    from nemotron_dspark.distributed import init_distributed

    with init_distributed() as context:
        config = read_config()
        from nemotron_dspark import stages
        from nemotron_dspark.training.display import Display

        cache, data = _source(config, cache, data, shell.note if context.is_main else lambda text: None)

        with Display() if context.is_main else contextlib.nullcontext() as display:
            report = stages.train(
                config,
                out,
                cache=cache,
                data=data,
                budget=seconds,
                resume=not fresh,
                callbacks=[display] if display else [],
                context=context,
            )
    return report if context.is_main else None


def _source(
    config: RunConfig, cache: Path | None, data: list[str] | None, tell: Callable[[str], None]
) -> tuple[Path | None, list[str] | None]:
    """What is given, or else what is found here, which is said."""
    if cache is not None or data:
        return cache, data or None
    from nemotron_dspark.recipe import latest

    kind, found = latest.to_train_on(config)
    tell(f"neither --cache nor --data is given: {found.said}.")
    return (found.path, None) if kind == "cache" else (None, [str(found.path)])


def _show(report: "TrainReport") -> None:
    final = report.final
    tau = final.tau if final else None
    rates = final.accept_rate if final and final.accept_rate else ()
    shell.out.print("[bold]Draft trained[/]")
    shell.show_rows(
        [
            ("draft", report.draft_folder),
            ("hidden states", report.mode),
            ("steps", f"{report.steps}" + (f" (from {report.resumed_from})" if report.resumed_from else "")),
            ("samples", str(report.samples)),
            ("trained parameters", f"{report.parameters:,}"),
            ("time", f"{report.seconds:.0f} s"),
            ("loss", f"{final.loss:.4f}" if final else None),
            ("tau on the training data", f"{tau:.2f}" if tau is not None else None),
            ("acceptance by slot", "  ".join(f"{rate:.2f}" for rate in rates) or None),
        ]
    )
