"""`nds train`: a draft for a target, from a target cache or from conversations."""

import contextlib
import dataclasses
import shlex
from pathlib import Path

import typer
from rich.table import Table

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig, load_config
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import write_text


def register(app: typer.Typer) -> None:
    @app.command()
    def train(
        target: shell.TargetOption,
        cache: Path | None = typer.Option(None, "--cache", help="Folder that `nds cache build` wrote."),
        data: Path | None = typer.Option(
            None, "--data", "-d", help="Instead of --cache: conversations, over which the target runs meanwhile."
        ),
        taps: shell.TapsOption = None,
        out: Path | None = typer.Option(None, "--out", "-o", help="Run folder; runs/<target> when not given."),
        config_file: shell.ConfigOption = None,
        assignments: shell.SetOption = None,
        engine: str = typer.Option("native", "--engine", help="native, or deepspec: DeepSpec's own loop on your GPUs."),
        fresh: bool = typer.Option(False, "--fresh", help="Refuse to go on with a run that the folder holds."),
        trust: shell.TrustOption = False,
        as_json: shell.JsonOption = False,
    ) -> None:
        """Train a draft. The same command again goes on where it stopped."""
        from nemotron_dspark.training.ranks import ALONE, joined

        # DeepSpec starts its processes itself, and reads the variables of torchrun in a way of its own.
        with joined() if engine == "native" else contextlib.nullcontext(ALONE) as ranks:
            given = [*(assignments or ()), *shell.taps_setting(taps), *shell.trust_setting(trust)]
            config = load_config(config_file, given, target=target)
            out = out or Path("runs") / _name(target)
            _check_that_one_is_given(target, cache, data)
            shell.quiet_libraries()
            if engine != "native":
                _train_with_deepspec(engine, target, cache, out, config)
                return
            from nemotron_dspark.training.display import Display
            from nemotron_dspark.training.loop import Watcher
            from nemotron_dspark.training.run import train_run

            with Display() if ranks.first else contextlib.nullcontext(Watcher()) as watcher:
                report = train_run(
                    target,
                    cache,
                    out,
                    config,
                    conversations=data,
                    resume=not fresh,
                    watcher=watcher,
                    ranks=ranks,
                )
        if not ranks.first:
            return
        if as_json:
            shell.emit(dataclasses.asdict(report))
            return
        table = Table(title="Draft trained", show_header=False, title_justify="left")
        for key, value in (
            ("draft", report.draft_folder),
            ("hidden states", report.mode),
            ("steps", f"{report.steps}" + (f" (from {report.resumed_from})" if report.resumed_from else "")),
            ("samples", str(report.samples)),
            ("trained parameters", f"{report.parameters:,}"),
            ("time", f"{report.seconds:.0f} s"),
        ):
            table.add_row(key, value)
        if report.final is not None:
            table.add_row("loss", f"{report.final.loss:.4f}")
            if report.final.tau is not None:
                table.add_row("tau on the training data", f"{report.final.tau:.2f}")
                rates = "  ".join(f"{rate:.2f}" for rate in report.final.accept_rate)
                table.add_row("acceptance by slot", rates)
        shell.out.print(table)


def _name(target: str) -> str:
    return Path(target).name or "target"


def _check_that_one_is_given(target: str, cache: Path | None, data: Path | None) -> None:
    if (cache is None) != (data is None):
        return
    folder = f"caches/{_name(target)}"
    raise InputError(
        "Training needs the target's hidden states, and neither --cache nor --data is given."
        if cache is None
        else "Both --cache and --data are given: hidden states come from one of them.",
        "Give `--data conversations.jsonl` to run the target while the draft trains, which needs no disk; or "
        f"build a cache once with `nds cache build --target {shlex.quote(target)} --data conversations.jsonl "
        f"--out {shlex.quote(folder)}` and give `--cache {shlex.quote(folder)}`: the target runs once, not "
        "once an epoch.",
    )


def _train_with_deepspec(engine: str, target: str, cache: Path | None, out: Path, config: RunConfig) -> None:
    """The same run as a DeepSpec config in ``out``, then what `nds deepspec train` does."""
    if engine != "deepspec":
        raise InputError(f"There is no engine {engine!r}.", "Use native or deepspec.")
    if cache is None:
        raise InputError("DeepSpec's loop reads a cache; --data is given.", "Build one with `nds cache build`.")
    from nemotron_dspark.cache.reader import read_layout
    from nemotron_dspark.cli.deepspec_command import start_training
    from nemotron_dspark.deepspec.config_file import config_for
    from nemotron_dspark.deepspec.launch import Nodes

    if config.draft.taps is None:  # the cache was built with some; they are the only ones there are
        taps = list(read_layout(cache).taps)
        config = config.model_copy(update={"draft": config.draft.model_copy(update={"taps": taps})})
    file = out / "deepspec_config.py"
    write_text(file, config_for(target, config, file=str(file)))
    options = {
        "data.target_cache_path": cache,
        "logging.checkpoint_dir": out / "checkpoints",
        "logging.tensorboard_dir": out / "tensorboard",
    }
    start_training(file, [f"{key}={path.absolute()}" for key, path in options.items()], Nodes())
