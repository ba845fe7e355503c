"""`nds deepspec install|check|config|prepare|train|eval`: DeepSpec itself, on any target."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from nemotron_dspark import files
from nemotron_dspark.cli import shell
from nemotron_dspark.errors import EnvironmentFault, InputError

if TYPE_CHECKING:
    from nemotron_dspark.cache.build import BuildProgress
    from nemotron_dspark.deepspec.checkout import Checkout
    from nemotron_dspark.deepspec.launch import Nodes

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
    commands = typer.Typer(no_args_is_help=True, help="Run DeepSpec itself on a target, unedited.")
    commands.command()(install)
    commands.command()(check)
    commands.command()(config)
    commands.command()(prepare)
    commands.command()(train)
    commands.command("eval")(evaluate)
    app.add_typer(commands, name="deepspec")


def install(
    folder: Annotated[Path | None, typer.Option("--folder", help="Where to; default: your cache folder.")] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Another repository; default DEEPSPEC_URL or GitHub.")
    ] = None,
    as_json: shell.JsonOption = False,
) -> None:
    """Clone DeepSpec at the commit the bridge was made for."""
    from nemotron_dspark.deepspec import checkout

    with shell.err.status("cloning DeepSpec"):
        found = checkout.install(folder, url=url)
    if as_json:
        shell.emit({"folder": str(found.folder), "commit": found.commit})
        return
    _warn(found)
    shell.out.print(f"DeepSpec {found.commit[:7]} is in {escape(str(found.folder))}", soft_wrap=True)
    if folder is not None:
        shell.out.print(f"To use it: export {checkout.HOME_VARIABLE}={escape(str(found.folder))}", soft_wrap=True)


def check(
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Also: what goes wrong with this target.")
    ] = None,
    as_json: shell.JsonOption = False,
) -> None:
    """Compare this machine with what DeepSpec needs; exit code 3 when it cannot run here."""
    shell.quiet_libraries()
    import transformers

    from nemotron_dspark.deepspec import checkout, status
    from nemotron_dspark.targets.locate import locate
    from nemotron_dspark.targets.spec import TargetSpec

    try:
        home = checkout.find()
    except EnvironmentFault:
        home = None
    rows = status.environment(home)
    spec = TargetSpec.from_folder(locate(target), target) if target else None
    faults = status.faults(spec, transformers.__version__, kernels=status.has_kernels(spec)) if spec else []
    absent = status.missing(rows)
    if as_json:
        shell.emit(
            {
                "lines": [dataclasses.asdict(row) for row in rows],
                "missing": absent,
                "override": status.OVERRIDE,
                "target": target,
                "faults": [
                    {"what": fault.what, "in_deepspecs_pin": pinned, "here": here, "cure": fault.cure}
                    for fault, pinned, here in faults
                ],
            }
        )
    else:
        _print_environment(rows, status.OVERRIDE)
        if spec:
            _print_faults(faults, target, transformers.__version__, status.PINNED_TRANSFORMERS)
        if absent:
            shell.out.print(f"[red]Missing for DeepSpec:[/] {', '.join(absent)}.", soft_wrap=True)
    if absent:
        raise typer.Exit(EnvironmentFault.exit_code)


def config(
    target: shell.TargetOption,
    algorithm: Annotated[str, typer.Option("--algorithm", help="dspark or eagle3.")] = "dspark",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; printed when not given.")] = None,
    config_file: shell.ConfigOption = None,
    settings: shell.SetOption = None,
) -> None:
    """Write a commented DeepSpec config for a target."""
    from nemotron_dspark.config import load_config

    run = load_config(config_file, settings or (), target=target)
    shell.quiet_libraries()
    from nemotron_dspark.deepspec.config_file import config_for

    text = config_for(target, run, algorithm=algorithm, file=out.name if out else None)
    if out is None:
        shell.out.print(text, end="", markup=False, soft_wrap=True)
        return
    files.write_text(out, text)
    shell.out.print(f"Written: {escape(str(out))}", soft_wrap=True)


def prepare(
    config: ConfigArgument,
    data: Annotated[list[Path], typer.Option("--data", "-d", help="JSON lines of conversations; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the cache, shared by all machines.")],
    opts: OptsOption = None,
    min_loss_tokens: Annotated[int, typer.Option(min=1, help="Samples with fewer loss tokens are dropped.")] = 14,
    shard_bytes: Annotated[int, typer.Option(min=1, help="A shard is closed when it holds this many.")] = 4 * 1024**3,
    device: Annotated[str | None, typer.Option(help="One worker on this device, e.g. cpu; default: every GPU.")] = None,
    nodes: NodesOption = None,
    node_rank: RankOption = None,
    as_json: shell.JsonOption = False,
) -> None:
    """Build the target cache of a config with our builder. The same command goes on where it stopped."""
    shell.quiet_libraries()
    from nemotron_dspark.deepspec import launch
    from nemotron_dspark.deepspec import prepare as preparing

    home = _home()
    places = launch.Nodes(nodes, node_rank).variables()
    devices = [device] if device else None
    cfg = launch.load_config(home, launch.resource_config(config), opts or ())
    devices = devices or [f"cuda:{index}" for index in range(launch.require_gpus())]
    rank, workers = int(places["RANK"]), len(devices) * int(places["WORLD_SIZE"])
    job = preparing.Job.of(cfg, data, out, workers, min_loss_tokens=min_loss_tokens, shard_bytes=shard_bytes)
    if not preparing.begin(job):
        preparing.run_workers(job, rank * len(devices), devices, _Lines())
        if rank:
            shell.err.print(f"This machine's parts of {escape(str(out))} are done; the first machine joins them.")
            return
        preparing.wait_for_parts(
            job, lambda parts: shell.err.print(f"waiting for {len(parts)} parts of other machines")
        )
    whole = preparing.join(job)
    if as_json:
        shell.emit({"folder": str(out), "samples": whole.num_samples, "shards": len(whole.shard_files)})
    else:
        shell.out.print(f"Target cache {escape(str(out))}: {whole.num_samples} samples", soft_wrap=True)


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

    start_training(launch.resource_config(config), opts or [], launch.Nodes(nodes, node_rank, master))


def start_training(config: Path, opts: list[str], nodes: "Nodes") -> None:
    """Check everything, then become DeepSpec's train.py."""
    from nemotron_dspark.deepspec import launch

    home = _home()
    machines = int(nodes.variables()["WORLD_SIZE"])
    gpus = launch.require_gpus()
    for note in launch.check_training(launch.load_config(home, config, opts), gpus * machines):
        shell.err.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    launch.run(home, launch.training_command(home, config, opts), nodes)


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
    from nemotron_dspark.drafts.load import read_draft_config

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


class _Lines:
    """Progress of several processes: a line each, not more than one in ten seconds."""

    def __init__(self) -> None:
        self._told = self._started = time.monotonic()

    def __call__(self, part: int, progress: "BuildProgress") -> None:
        now = time.monotonic()
        if progress.stage != "capture" or (now - self._told < 10 and progress.samples < progress.total_samples):
            return
        self._told = now
        rate = progress.tokens / max(now - self._started, 1e-9)
        left = (progress.total_tokens - progress.tokens) / max(rate, 1e-9) / 60
        done = f"{progress.samples}/{progress.total_samples} samples"
        shell.err.print(f"part {part}: {done}, {rate:,.0f} tokens/s, {left:.0f} min left")


def _home() -> "Checkout":
    from nemotron_dspark.deepspec.checkout import find

    found = find()
    _warn(found)
    return found


def _warn(found: "Checkout") -> None:
    for sentence in found.warnings():
        shell.err.print(f"[yellow]note:[/] {escape(sentence)}", soft_wrap=True)


def _print_environment(rows: list, override: str) -> None:
    table = Table(title="DeepSpec on this machine", title_justify="left", show_header=False)
    marks = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "missing": "[red]✗[/]"}
    for row in rows:
        table.add_row(marks[row.level], row.item, escape(row.found), escape(row.meaning))
    shell.out.print(table)
    shell.out.print(escape(override), soft_wrap=True)


def _print_faults(faults: list, target: str, here: str, pin: str) -> None:
    table = Table(title=f"transformers on {escape(target)}", title_justify="left")
    for column in ("", pin, here, "what the bridge does"):
        table.add_column(column)
    for fault, pinned, now in faults:
        table.add_row(fault.what, *("[red]wrong[/]" if wrong else "right" for wrong in (pinned, now)), fault.cure)
    if not faults:
        table.add_row("nothing known", "", "", "the target has no recurrent state")
    shell.out.print(table)
