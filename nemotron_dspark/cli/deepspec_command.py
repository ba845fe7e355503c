"""`nds deepspec install|check|config|prepare|train|eval`: DeepSpec itself, on any target."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from nemotron_dspark import files
from nemotron_dspark.cli import cache_command, shell
from nemotron_dspark.config import RunConfig
from nemotron_dspark.errors import InputError

if TYPE_CHECKING:
    from nemotron_dspark.deepspec.checkout import Checkout
    from nemotron_dspark.deepspec.status import BridgeStatus
    from nemotron_dspark.stages import CacheReport

ConfigArgument = Annotated[Path, typer.Argument(help="A DeepSpec config, or the name of a worked one.")]
OptsOption = Annotated[list[str] | None, typer.Option("--opts", help="section.key=value, as DeepSpec's own --opts.")]
NodesOption = Annotated[
    int | None, typer.Option("--nodes", min=1, help="Machines of the run; default WORLD_SIZE or 1.")
]
RankOption = Annotated[
    int | None, typer.Option("--node-rank", min=0, help="Number of this machine; default RANK or 0.")
]
MasterOption = Annotated[str | None, typer.Option("--master", help="host:port of the first machine.")]


def register(app: typer.Typer) -> None:
    commands = shell.group(app, "deepspec", "Run DeepSpec itself on a target, unedited.")
    shell.command(commands, show=_show_installed)(install)
    shell.command(commands, show=_show_status, failed=lambda found: 3 if found.missing else 0)(check)
    shell.command(commands)(config)
    shell.command(commands, show=cache_command.show_built)(prepare)
    shell.command(commands)(train)
    shell.command(commands, "eval")(evaluate)


def install(
    folder: Annotated[Path | None, typer.Option("--folder", help="Where to; default: your cache folder.")] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Another repository; default DEEPSPEC_URL or GitHub.")
    ] = None,
) -> "Checkout":
    """Clone DeepSpec at the commit the bridge was made for."""
    from nemotron_dspark.deepspec import checkout

    with shell.err.status("cloning DeepSpec"):
        return checkout.install(folder, url=url)


def check(
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Also: what goes wrong with this target.")
    ] = None,
) -> "BridgeStatus":
    """Compare this machine with what DeepSpec needs; exit code 3 when it cannot run here."""
    shell.quiet_libraries()
    from nemotron_dspark.deepspec.status import status

    return status(target)


def config(
    config: RunConfig,
    algorithm: Annotated[
        str | None, typer.Option("--algorithm", help="dspark or eagle3; draft.kind when not given.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; printed when not given.")] = None,
) -> None:
    """Write a commented DeepSpec config for a target."""
    from nemotron_dspark.deepspec.config_file import config_for

    text = config_for(config, algorithm=algorithm, file=out.name if out else None)
    if out is None:
        shell.out.print(text, end="", markup=False, soft_wrap=True)
        return
    files.write_text(out, text)
    shell.out.print(f"Written: {escape(str(out))}", soft_wrap=True)


def prepare(
    config: ConfigArgument,
    data: Annotated[list[str], typer.Option("--data", "-d", help=shell.several("JSON lines of conversations"))],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the cache, shared by all machines.")],
    opts: OptsOption = None,
    min_loss_tokens: Annotated[int, typer.Option(min=1, help="Samples with fewer loss tokens are dropped.")] = 14,
    shard_bytes: Annotated[int, typer.Option(min=1, help="A shard is closed when it holds this many.")] = 4 * 1024**3,
    device: Annotated[str | None, typer.Option(help="Build on this device, e.g. cpu; default: every GPU.")] = None,
    nodes: NodesOption = None,
    node_rank: RankOption = None,
    master: MasterOption = None,
) -> "CacheReport | None":
    """Build the target cache of a config with our builder. The same command goes on where it stopped."""
    shell.quiet_libraries()
    shell.stop_on_sigterm()
    from nemotron_dspark.deepspec import launch
    from nemotron_dspark.deepspec import prepare as preparing

    places = launch.Nodes(nodes, node_rank, master).variables()
    home = _home()
    if device is None:
        launch.require_gpus()
    cfg = launch.load_config(home, launch.resource_config(config), opts or ())
    run = preparing.run_config(cfg, min_loss_tokens=min_loss_tokens, shard_bytes=shard_bytes, device=device or "auto")
    with shell.bars() as bars:
        return preparing.prepare(run, data, out, places, lambda now: shell.show_build(bars, now))


def train(
    config: ConfigArgument,
    opts: OptsOption = None,
    nodes: NodesOption = None,
    node_rank: RankOption = None,
    master: MasterOption = None,
) -> None:
    """Run DeepSpec's train.py on a config: one worker per visible GPU."""
    shell.quiet_libraries()
    from nemotron_dspark.deepspec import launch

    launch.train(launch.resource_config(config), opts or [], launch.Nodes(nodes, node_rank, master), shell.note)


def evaluate(
    config: ConfigArgument,
    draft: Annotated[str | None, typer.Option("--draft", help="Draft; default: the config's step_latest.")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="gsm8k:100,math500; default: DeepSpec's list.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: DeepSpec's 2048.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Default: DeepSpec's 1.0.")] = None,
    confidence_threshold: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Default 0: never cut.")] = None,
    tensorboard_dir: Annotated[Path | None, typer.Option(help="Folder for TensorBoard; needs --step.")] = None,
    step: Annotated[int | None, typer.Option(help="Step the results are logged at.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: DeepSpec's.")] = None,
    opts: OptsOption = None,
    nodes: NodesOption = None,
    node_rank: RankOption = None,
    master: MasterOption = None,
) -> None:
    """Run DeepSpec's eval.py with our decoding on a config's target and draft."""
    shell.quiet_libraries()
    from nemotron_dspark.deepspec import launch
    from nemotron_dspark.drafts.config import read_draft_config

    home = _home()
    places = launch.Nodes(nodes, node_rank, master)
    places.variables()
    if (tensorboard_dir is None) != (step is None):
        raise InputError("--tensorboard-dir and --step belong together.", "Give both or neither.")
    launch.require_gpus()
    cfg = launch.load_config(home, launch.resource_config(config), opts or ())
    spec = launch.spec_of(cfg)
    folder = Path(draft or Path(cfg["logging"]["checkpoint_dir"]) / "step_latest").expanduser().absolute()
    read_draft_config(folder).check_target(spec)
    target = str(Path(spec.name).absolute()) if Path(spec.name).exists() else spec.name
    options = {
        "max-new-tokens": max_new_tokens,
        "temperature": temperature,
        "confidence-threshold": confidence_threshold,
        "tensorboard-dir": tensorboard_dir.absolute() if tensorboard_dir else None,
        "step": step,
        "seed": seed,
    }
    command = launch.evaluation_command(target, str(folder), launch.read_tasks(home, tasks), options)
    launch.run(home, command, places, home.folder)  # it looks for eval_datasets/ in its working directory


def _home() -> "Checkout":
    from nemotron_dspark.deepspec.checkout import find

    found = find()
    _warn(found)
    return found


def _warn(found: "Checkout") -> None:
    for sentence in found.warnings():
        shell.note(sentence)


def _show_installed(found: "Checkout") -> None:
    from nemotron_dspark.deepspec import checkout

    _warn(found)
    shell.out.print(f"DeepSpec {(found.commit or 'unknown')[:7]} is in {escape(str(found.folder))}", soft_wrap=True)
    if found.folder != checkout.install_folder():
        shell.out.print(f"To use it: export {checkout.HOME_VARIABLE}={escape(str(found.folder))}", soft_wrap=True)


def _show_status(found: "BridgeStatus") -> None:
    from nemotron_dspark.deepspec import status

    table = Table(title="DeepSpec on this machine", title_justify="left", show_header=False)
    marks = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "missing": "[red]✗[/]"}
    for row in found.lines:
        table.add_row(marks[row.level], row.item, escape(row.found), escape(row.meaning))
    shell.out.print(table)
    shell.out.print(escape(found.override), soft_wrap=True)
    if found.target:
        table = Table(title=f"transformers on {escape(found.target)}", title_justify="left")
        for column in ("", status.PINNED_TRANSFORMERS, version("transformers"), "what the bridge does"):
            table.add_column(column)
        for fault in found.faults:
            wrong = ("[red]wrong[/]" if here else "right" for here in (fault.in_deepspecs_pin, fault.here))
            table.add_row(fault.what, *wrong, fault.cure)
        if not found.faults:
            table.add_row("nothing known", "", "", "the target has no recurrent state")
        shell.out.print(table)
    if found.missing:
        shell.out.print(f"[red]Missing for DeepSpec:[/] {', '.join(found.missing)}.", soft_wrap=True)
